"""A behaviour in one call: a model and a task, or plain data, in; a circuit with its proof out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unweave.capture import capture, load_tokenizer
from unweave.circuits import Circuit, FaithfulnessCurve, Proof, faithfulness_curve, find_circuit, prove
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.pipeline import data_for, default_scope, edge_facts, node_facts, stamp
from unweave.report import MAX_EDGES
from unweave.scope import Scope, describe, require_positions
from unweave.scoring import EdgeScores, measure_edges, score_edges
from unweave.storage import save_graph
from unweave.tasks import Task, TaskCheck, check_task, list_tasks, load_task, make_task, require_solved

__all__ = ["Dissected", "Prediction", "dissect", "predict_effects", "proof_prompts"]

SEQUENCES, VECTORS = 128, 512
POSITIONS = ("together", "apart", "named")


@dataclass(frozen=True, eq=False)
class Dissected:
    """What :func:`dissect` found.

    Attributes:
        task: with all its prompts, or the data and its scope as one.
        check: how well the model does the task; None for plain data, which has no right answers to compare with.
        circuit: found on half of the prompts.
        proof: on the other half.
        curves: faithfulness against size, by ranking: "unweave", "EAP-IG", "EAP", "random".
        prediction: attributed against measured effects of single edges, see :func:`predict_effects`.
        report: everything a page or a table needs, as plain data.
    """

    task: Task
    check: TaskCheck | None
    circuit: Circuit
    proof: Proof
    curves: Mapping[str, FaithfulnessCurve]
    prediction: Prediction
    report: dict[str, Any]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the circuit as a graph folder, with its results."""
        return save_graph(self.circuit.graph, folder, results=self.report, overwrite=overwrite)


def dissect(
    model: str | Path | nn.Module,
    task: str | Path | Task | None = None,
    *,
    data: str | Path | TokenData | None = None,
    scope: Scope | None = None,
    edges: int | None = None,
    kl_nats: float | None = None,
    faithfulness: float | None = None,
    ablation: str | None = None,
    metric: str = "kl",
    prompts: int | None = None,
    context: int = 128,
    level: str = "edge",
    positions: str = "together",
    frozen: str = "none",
    tokenizer: Any = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Dissected:
    """Find the circuit of a behaviour on half of its prompts and prove it on the other half.

    The behaviour is a task, or what the model says on plain data, right or wrong: then nothing is asked of the model.

    Args:
        model: see :func:`capture`.
        task: the name of a ready-made one (:func:`unweave.tasks.list_tasks`), a ``.jsonl`` file
            (:func:`unweave.tasks.load_task`), or a :class:`Task`. Without one:
        data: see :func:`load_data`; zoo models bring their own.
        scope: the positions of the data to explain; by default all, or those labelled "answered", as zoo rooms
            do.
        edges, kl_nats, faithfulness: the budget; by default faithfulness = 0.9.
        ablation: by default "counterfactual" where the task has corrupted prompts, else "mean".
        metric: "kl" or "logit_difference", for tasks made or loaded here.
        prompts: how many to make, or how many sequences to load; by default 128, and 512 where each is one vector or
            image, of which one output is explained.
        context: the longest sequence to load.
        level: see :func:`find_circuit`.
        positions: "together"; "apart": an edge leads from one position to another (:meth:`Graph.unroll`), which wants
            short prompts of one form; or "named": only positions that the task names are apart.
        frozen: what the gradients that guide the search do not pass through, see :func:`score_edges`.

    Raises:
        InputError: both a task and data, or neither; the model cannot do the task better than chance, or the budget
            cannot be met.

    Cost:
        That of :func:`find_circuit` and :func:`prove`, and one pass per size for each of four rankings.

    Example:
        >>> import unweave
        >>> found = unweave.dissect("zoo:induction", "induction", prompts=32)
        >>> found.proof.faithfulness.value > 0.8
        True
    """
    started = time.time()
    graph = capture(model)
    source = "" if isinstance(model, nn.Module) else str(model)
    graph = dataclasses.replace(graph, info={**graph.info, "model": source})
    tokenizer = tokenizer if tokenizer is not None or isinstance(model, nn.Module) else load_tokenizer(model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if prompts is None:
        prompts = SEQUENCES if graph.info.get("d_vocab") else VECTORS
    origin: dict[str, Any] = {"prompts": prompts, "metric": metric}
    check = None
    if task is None:
        rows = data_for(source, data, graph, tokenizer, context, prompts, progress)
        task = _data_task(rows, scope, graph, metric)
        origin |= {"metric": task.metric, "context": context} | _origin(data, source, task.scope)
    else:
        if data is not None or scope is not None:
            raise InputError("give a task, which has its own prompts and scope, or data (and scope), not both")
        origin["made_of"] = str(task) if isinstance(task, str | Path) else ""
        task = _task(task, graph, tokenizer, metric, prompts, seed)
        check = check_task(graph, task, **options)
        require_solved(check)
    graph = _unrolled(graph, task, positions)
    kind = ablation or ("mean" if task.corrupted is None else "counterfactual")
    found, held_out = _halves(task, kind, seed)
    budget = {"edges": edges, "kl_nats": kl_nats, "faithfulness": faithfulness}
    if all(b is None for b in budget.values()):
        budget["faithfulness"] = 0.9
    search: dict[str, Any] = {"ablation": kind, "level": level, "frozen": frozen, "seed": seed, **budget, **options}
    circuit = find_circuit(graph, found, task.scope, **search)
    proof = prove(circuit, held_out, seed=seed, **options)
    curves = _curves(circuit, found, held_out, seed, options)
    prediction = predict_effects(circuit, held_out, seed=seed, **options)
    report = _report(circuit, proof, curves, prediction, task, check, found)
    report["provenance"] = {
        "model": source or type(model).__name__,
        "task": task.name,
        **origin,
        "ablation": kind,
        "level": level,
        "positions": positions,
        "frozen": frozen,
        "budget": {k: v for k, v in budget.items() if v is not None},
        **stamp(seed, started),
    }
    return Dissected(task, check, circuit, proof, curves, prediction, report)


def _data_task(data: TokenData, scope: Scope | None, graph: Graph, metric: Any) -> Task:
    """Plain data with its scope as a task without answers."""
    _require_fitting(data, graph)
    if scope is None:
        scope = dataclasses.replace(default_scope("zoo:" if "answered" in data.labels else ""), divergence=metric)
        if data.tokens.is_floating_point():
            scope = dataclasses.replace(scope, description="what it says to every input")
    own = bool(data.source) and data.source == graph.info.get("model")
    name = "its own data" if own else Path(data.source).name or "data"
    task = Task(name, data, scope, description=scope.description)
    require_positions(scope, data)
    return task


def _origin(data: str | Path | TokenData | None, model: str, scope: Scope) -> dict[str, Any]:
    """Where plain data came from, for :func:`proof_prompts`; nothing where it cannot be loaded again."""
    if isinstance(data, TokenData) or callable(scope.positions):
        return {}
    return {"data": str(data or model), "scope": scope.to_json()}


def _require_fitting(data: TokenData, graph: Graph) -> None:
    """Refuse vectors for a model of tokens, ids for one of vectors, and vectors of another length."""
    wanted = graph.info.get("d_input")
    got = data.tokens.shape[2] if data.tokens.is_floating_point() else None
    if wanted != got:
        shape = " x ".join(map(str, graph.info.get("image", ())))
        reads = f"vectors of {wanted} numbers{f' (images of {shape})' if shape else ''}" if wanted else "token ids"
        held = f"vectors of {got} numbers" if got else "token ids"
        raise InputError(f"the model reads {reads}, and {data.source or 'the data'} holds {held}; give what it reads")


def _halves(task: Task, ablation: str, seed: int) -> tuple[TokenData, TokenData]:
    """(prompts to search with, prompts to prove on), with partners where the ablation wants them."""
    found, held_out = (t.paired if ablation == "counterfactual" else t.data for t in task.split(0.5, seed))
    return found, held_out


def proof_prompts(provenance: Mapping[str, Any], graph: Graph, tokenizer: Any = None) -> tuple[TokenData, Scope] | None:
    """The prompts that a circuit was proved on, and its scope, made again from what its folder says of its origin.

    Args:
        provenance: of the report of :func:`dissect`.
        graph: of the model.

    Returns:
        None where the origin is no task that can be made again, and no data that can be loaded again.

    Raises:
        InputError: the task cannot be made with this tokenizer.
        StorageError: its file, or that of the data, is gone.

    Example:
        >>> import unweave
        >>> found = unweave.dissect("zoo:induction", "induction", prompts=16)
        >>> data, scope = proof_prompts(found.report["provenance"], found.circuit.original)
        >>> len(data), scope.positions
        (8, 'end')
    """
    made_of, source = provenance.get("made_of"), provenance.get("data")
    known: dict[str, type] = {"prompts": int, "seed": int, "ablation": str}
    known |= {"data": str, "context": int, "scope": dict} if source else {"made_of": str, "metric": str}
    if not (made_of or source) or not all(isinstance(provenance.get(key), kind) for key, kind in known.items()):
        return None
    prompts, seed = int(provenance["prompts"]), int(provenance["seed"])
    if source:
        scope, context = Scope.from_json(provenance["scope"]), int(provenance["context"])
        rows = data_for("", str(source), graph, tokenizer, context, prompts, None)
        task = _data_task(rows, scope, graph, scope.divergence)
    else:
        task = _task(str(made_of), graph, tokenizer, provenance["metric"], prompts, seed)
    return _halves(task, str(provenance["ablation"]), seed)[1], task.scope


def _unrolled(graph: Graph, task: Task, positions: str) -> Graph:
    if positions not in POSITIONS:
        raise InputError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions == "together":
        return graph
    groups = task.position_groups() if positions == "named" else None
    return graph.unroll(task.data.tokens.shape[1], groups)


def _task(task: str | Path | Task, graph: Graph, tokenizer: Any, metric: Any, prompts: int, seed: int) -> Task:
    if isinstance(task, Task):
        return task
    vocabulary = graph.info.get("d_vocab")
    if vocabulary is None:
        raise InputError("this network reads no tokens, which every ready-made task is made of: give data instead")
    if str(task) not in list_tasks() and (Path(task).suffix == ".jsonl" or Path(task).exists()):
        return load_task(task, tokenizer, vocabulary=vocabulary, metric=metric)
    own = {"vocabulary": vocabulary} if tokenizer is None else {}
    # the zoo's models were trained on sequences that begin with id 0
    first = 0 if str(graph.info.get("name", "")).startswith("zoo:") else None
    return make_task(str(task), tokenizer, n=prompts, seed=seed, metric=metric, first=first, **own)


def _curves(
    circuit: Circuit, data: Any, test: Any, seed: int, options: Mapping[str, Any]
) -> dict[str, FaithfulnessCurve]:
    """Rankings by size: ours, the published ones with the same ablation, and none."""
    graph, scope, instead = circuit.original, circuit.scope, circuit.instead
    given: dict[str, Any] = {"ablation": instead.kind, "means": instead.means, **options}
    rankings = {
        "unweave": circuit.scores,
        "EAP-IG": score_edges(graph, data, scope, method="eap-ig", **given),
        "EAP": score_edges(graph, data, scope, method="eap", **given),
        "random": _random(circuit.scores, seed),
    }
    return {
        name: faithfulness_curve(r, graph, test, scope, instead, seed=seed, **options) for name, r in rankings.items()
    }


def _random(scores: EdgeScores, seed: int) -> EdgeScores:
    noise = torch.rand(scores.nats.shape, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(scores, nats=noise.masked_fill(scores.nats.isnan(), torch.nan), method="random")


@dataclass(frozen=True)
class Prediction:
    """Attributed against measured effects of single edges.

    Attributes:
        points: one plain row per edge: edge, attributed, measured (nats per token), kept.
        slope, r2: of the straight line measured = slope attributed.
        spearman: the rank correlation.
    """

    points: list[dict[str, Any]]
    slope: float
    r2: float
    spearman: float

    def table(self) -> list[dict[str, Any]]:
        """One plain row per edge: edge, attributed_nats, measured_nats, kept."""
        nats = ("attributed", "measured")
        return [{f"{key}_nats" if key in nats else key: x for key, x in point.items()} for point in self.points]


def predict_effects(circuit: Circuit, data: Any, *, n: int = 100, seed: int = 0, **options: Any) -> Prediction:
    """How well attributions predict measured effects: ``n`` single edges of the circuit and ``n`` outside it.

    The Fisher attribution of each edge of the whole graph against the measured effect of ablating it alone, on the same
    prompts.

    Cost:
        One scoring pass and up to n forward passes.
    """
    graph, kept = circuit.original, circuit.kept
    data = circuit.instead.paired(data, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(kept)
    for places in (kept.nonzero(), (graph.edge_matrix & ~kept).nonzero()):
        some = places[torch.randperm(len(places), generator=generator)[:n]]
        chosen[some[:, 0], some[:, 1]] = True
    ablation: dict[str, Any] = {"ablation": circuit.instead.kind, "means": circuit.instead.means}
    estimated = score_edges(graph, data, circuit.scope, samples=4, seed=seed, **ablation, **options).nats[chosen]
    measured = measure_edges(graph, data, circuit.scope, chosen, circuit.instead, **options).nats[chosen]
    x, y = estimated.double().numpy(), measured.double().numpy()
    slope = float((x * y).sum() / max((x * x).sum(), 1e-300))
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1.0 - float(((y - slope * x) ** 2).sum()) / spread if spread > 0 else float("nan")
    rows = zip(graph.name_edges(chosen), x.tolist(), y.tolist(), kept[chosen].tolist(), strict=True)
    points = [{"edge": str(e), "attributed": a, "measured": m, "kept": k} for e, a, m, k in rows]
    return Prediction(points, slope, r2, float(np.corrcoef(_ranks(x), _ranks(y))[0, 1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


# ---- plain data for tables and pages ----------------------------------------------------------------------------


def _report(
    circuit: Circuit,
    proof: Proof,
    curves: Mapping[str, FaithfulnessCurve],
    prediction: Prediction,
    task: Task,
    check: TaskCheck | None,
    found: TokenData,
) -> dict[str, Any]:
    graph = circuit.original
    return {
        "format": "unweave-report",
        "version": 1,
        "title": f"{graph.info.get('name', 'graph')}: {task.name}",
        "model": {**graph.info, "n_parameters": graph.n_parameters},
        "scope": {
            **describe(circuit.scope),
            "description": task.description or task.name,
            "n_sequences_calibration": len(found),
            "n_tokens_calibration": require_positions(circuit.scope, found),
            "n_sequences_held_out": proof.n_prompts,
            "n_tokens_held_out": proof.n_tokens,
        },
        "faithfulness": _faithfulness(circuit, proof),
        "worst_tokens": [],
        "rate_distortion": [_curve(name, curve) for name, curve in curves.items()],
        "size_of": "edges",
        "proof": _proof(proof, curves, prediction, check),
        "predictions": prediction.points,
        "nodes": [node_facts(graph, circuit.scores, name) for name in graph.nodes],
        "edges": _edges(circuit, proof),
    }


def _exactly(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None}


def _faithfulness(circuit: Circuit, proof: Proof) -> list[dict[str, Any]]:
    share = circuit.n_edges / circuit.original.n_edges
    random = float(np.median(proof.random_nats)) if proof.random_nats else None
    return [
        {"name": "original", "baseline": False, "size": 1.0, "kl_nats": _exactly(0.0), "top1_agreement": _exactly(1.0)},
        {
            "name": "circuit",
            "baseline": False,
            "size": share,
            "kl_nats": proof.nats._asdict(),
            "top1_agreement": proof.agreement._asdict(),
        },
        {
            "name": "random circuits of that size (median)",
            "baseline": True,
            "size": share,
            "kl_nats": _exactly(random),
            "top1_agreement": _exactly(None),
        },
        {
            "name": "every edge ablated",
            "baseline": True,
            "size": 0.0,
            "kl_nats": _exactly(proof.empty_nats),
            "top1_agreement": _exactly(None),
        },
    ]


def _curve(name: str, curve: FaithfulnessCurve) -> dict[str, Any]:
    points = [
        {"size": s, "kl_nats": d, "low": None, "high": None} for s, d in zip(curve.shares, curve.nats, strict=True)
    ]
    return {"name": f"{name} ranking", "baseline": name != "unweave", "points": points}


def _proof(
    proof: Proof, curves: Mapping[str, FaithfulnessCurve], prediction: Prediction, check: TaskCheck | None
) -> list[dict[str, Any]]:
    rows = [{key: row[key] for key in ("what", "value", "low", "high")} for row in proof.table()]
    if check is not None:
        rows[:0] = [
            {"what": "accuracy of the model on the task", **_exactly(check.accuracy)},
            {"what": "chance", **_exactly(check.chance)},
        ]
    for name, curve in curves.items():
        rows.append({"what": f"CPR, {name} ranking (higher is better)", **_exactly(curve.cpr)})
        rows.append({"what": f"CMD, {name} ranking (lower is better)", **_exactly(curve.cmd)})
    for text, value in (("slope", prediction.slope), ("R2", prediction.r2), ("rank correlation", prediction.spearman)):
        rows.append({"what": f"measured against attributed effect, {text}", **_exactly(value)})
    return rows


def _edges(circuit: Circuit, proof: Proof) -> list[dict[str, Any]]:
    """The circuit's edges with their measured effect inside it, then the strongest of the rest."""
    graph, own, scores = circuit.original, proof.own_effects, circuit.scores
    ranked = [tuple(pair) for pair in scores.ranked().tolist()]
    kept = sorted((pair for pair in ranked if bool(circuit.kept[pair])), key=lambda pair: -float(own.nats[pair]))
    others = [pair for pair in ranked if not bool(circuit.kept[pair])]
    rows = [row | {"kept": True} for row in edge_facts(graph, own, kept)]
    rows += [row | {"kept": False} for row in edge_facts(graph, scores, others[: max(0, MAX_EDGES - len(kept))])]
    return rows[:MAX_EDGES]
