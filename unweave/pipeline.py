"""The main job in one call: a model and data in, an executable compressed graph with its account out."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unweave import __version__
from unweave.ablation import Replacement
from unweave.annotations import driver_facts, page_kind, pair_facts, with_kernels
from unweave.capture import capture, load_tokenizer
from unweave.compression.allocation import Budgeter, compress
from unweave.compression.baselines import activation_svd, magnitude, plain_svd, wanda
from unweave.compression.masks import Masker
from unweave.compression.moments import ChannelMoments, channel_moments, survey
from unweave.compression.refinement import refine_factors
from unweave.data import TokenData, load_data
from unweave.errors import InputError
from unweave.evaluation import Estimate, Faithfulness, evaluate
from unweave.graph import Graph
from unweave.report import MAX_EDGES
from unweave.scope import Scope, describe
from unweave.scoring import EdgeScores, calibrate
from unweave.statistics import collect_means
from unweave.storage import save_graph
from unweave.subspaces import favoured_tokens, node_subspaces, read_tokens

__all__ = [
    "Decompiled",
    "data_for",
    "decompile",
    "default_scope",
    "edge_facts",
    "node_facts",
    "stamp",
    "token_strings",
]

CURVE_SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
DIRECTIONS_SHOWN = 6


@dataclass(frozen=True, eq=False)
class Decompiled:
    """What :func:`decompile` made.

    Attributes:
        graph: compressed, executable.
        original: the captured graph, exactly the model.
        scores: of the compressed graph's edges.
        faithfulness: by name, graphs and baselines against the model on held-out data.
        curve: by name, (size, divergence) with intervals: rate against distortion.
        report: everything a page or a table needs, as plain data.
    """

    graph: Graph
    original: Graph
    scores: EdgeScores
    faithfulness: Mapping[str, Faithfulness]
    curve: Mapping[str, list[tuple[float, Estimate]]]
    report: Mapping[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per method and size of the curve: method, size, kl_nats with its interval."""
        return [
            {"method": name, "size": size, **kl.columns("kl_nats")}
            for name, points in self.curve.items()
            for size, kl in points
        ]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the graph, its results and where the model was, as one folder."""
        return save_graph(self.graph, folder, results=self.report, overwrite=overwrite)


def decompile(
    model: str | Path | nn.Module,
    data: str | Path | TokenData | None = None,
    *,
    size: float | None = None,
    kl_nats: float | None = None,
    form: str = "low-rank",
    scope: Scope | None = None,
    tokenizer: Any = None,
    context: int = 128,
    sequences: int = 128,
    held_out: int = 64,
    refine_steps: int = 0,
    measure_top: int = 50,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Decompiled:
    """Decompile a model: capture, measure, compress, score, and compare with the model on held-out data.

    Args:
        model: see :func:`capture`.
        data: a file, hub data set or :class:`TokenData`; zoo models bring their own.
        size: share of the channels' numbers to keep; or
        kl_nats: nats per token to allow. By default kl_nats = 0.05.
        form: "low-rank" or "sparse", see :func:`compress`.
        sequences, held_out: how many sequences to calibrate on, and to test on (at most half of the data).
        refine_steps: KL training steps after the closed form; 0 for none.
        measure_top: how many of the largest edges are measured exactly.

    Returns:
        :class:`Decompiled`.

    Raises:
        InputError: no data, or both budgets.

    Cost:
        About a dozen passes over the calibration data, without refinement.

    Example:
        >>> import unweave
        >>> result = unweave.decompile("zoo:induction", size=0.7, sequences=32, held_out=16, measure_top=0)
        >>> result.graph.n_channel_parameters <= 0.7 * result.original.n_channel_parameters
        True
    """
    if size is not None and kl_nats is not None:
        raise InputError("give one budget: size= or kl_nats=")
    started = time.time()
    scope = scope or default_scope(model)
    original = capture(model)
    tokenizer = tokenizer if tokenizer is not None or isinstance(model, nn.Module) else load_tokenizer(model)
    everything = data_for(model, data, original, tokenizer, context, 4 * (sequences + held_out), progress)
    train, test = everything.split(held_out=min(0.5, held_out / max(len(everything), 1)), seed=seed)
    train, test = train.select(slice(0, sequences)), test.select(slice(0, held_out))
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    means = collect_means(original, train, **options)
    moments = channel_moments(original, train, scope, seed=seed, **options)
    budget: dict[str, Any] = {"size": size} if size is not None else {"kl_nats": kl_nats or 0.05}
    graph = compress(original, train, scope, moments=moments, form=form, **options, **budget)
    if refine_steps:
        graph = refine_factors(graph, original, train, scope, steps=refine_steps, seed=seed, **options)
    scores, graph_moments = _survey(graph, train, scope, measure_top, seed, options)
    share = graph.n_channel_parameters / original.n_channel_parameters
    rivals = _rivals(form, original, moments, share)
    faithfulness = evaluate({"decompiled graph": graph, **rivals}, original, test, scope, means=means, **options)
    curve = _curve(form, original, moments, test, scope, batch_size)
    graph = dataclasses.replace(
        graph, info={**graph.info, "model": str(model) if not isinstance(model, nn.Module) else ""}
    )
    report = _report(graph, original, scores, faithfulness, curve, train, test, scope, tokenizer, rivals, graph_moments)
    report |= _annotations(graph, train, test, graph_moments, report["edges"], scope, tokenizer, options)
    report["provenance"] = _provenance(model, data, {"form": form, **budget}, refine_steps, seed, started)
    return Decompiled(graph, original, scores, faithfulness, curve, report)


def _survey(
    graph: Graph, data: TokenData, scope: Scope, measure_top: int, seed: int, options: Mapping[str, Any]
) -> tuple[EdgeScores, dict[int, ChannelMoments]]:
    """The compressed graph's own scores, the largest of them measured, and what its channels read and write."""
    means = collect_means(graph, data, **options)
    scores, moments = survey(graph, data, scope, means, seed=seed, **options)
    if measure_top:
        scores = calibrate(scores, data, scope, Replacement("mean", means), measure_top, **options)
    return scores, moments


def default_scope(model: str | Path | nn.Module) -> Scope:
    """Zoo rooms say which positions have an answer; elsewhere every position counts."""
    if str(model).startswith("zoo:"):
        return Scope(positions="answered", description="positions whose answer is determined")
    return Scope()


def data_for(
    model: Any, data: Any, graph: Graph, tokenizer: Any, context: int, limit: int, progress: bool | None
) -> TokenData:
    """The data that was given, or a room's own, no longer than the model reads."""
    if isinstance(data, TokenData):
        return data
    if data is None:
        if not str(model).startswith("zoo:"):
            raise InputError(
                "give data: a .txt, .jsonl, .npy or .safetensors file, a folder of them, or a hub data set"
            )
        data = model
    context = min(context, graph.info.get("n_ctx", context))
    vocabulary = graph.info.get("d_vocab")
    return load_data(data, tokenizer, context=context, limit=limit, vocabulary=vocabulary, progress=progress)


def _rivals(form: str, original: Graph, moments: Mapping[int, ChannelMoments], size: float) -> dict[str, Graph]:
    """The baselines of the same form and size."""
    if form == "sparse":
        return {"Wanda": wanda(original, size, moments), "magnitude": magnitude(original, size)}
    return {
        "activation-whitened SVD": activation_svd(original, size, moments),
        "plain SVD": plain_svd(original, size),
    }


def _curve(
    form: str, original: Graph, moments: Mapping[int, ChannelMoments], data: TokenData, scope: Scope, batch_size: int
) -> dict[str, list[tuple[float, Estimate]]]:
    """Held-out divergence at several sizes, ours (masks before their sweep) and the baselines', all in one pass."""
    budgeter = Masker(original, moments) if form == "sparse" else Budgeter(original, moments)
    graphs: dict[str, Graph] = {}
    for size in CURVE_SIZES:
        try:
            graphs[f"unweave/{size}"] = budgeter.at_size(size)
        except InputError:
            continue  # smaller than its biases alone: the curve ends here
        for name, rival in _rivals(form, original, moments, size).items():
            graphs[f"{name}/{size}"] = rival
    results = evaluate(
        graphs, original, data.select(slice(0, 32)), scope, batch_size=batch_size, n_worst=0, progress=False
    )
    curve: dict[str, list[tuple[float, Estimate]]] = {}
    for key, result in results.items():
        name, _, size_text = key.rpartition("/")
        if name:
            curve.setdefault(name, []).append((float(size_text), result.kl_nats))
    return curve


def token_strings(tokenizer: Any, n: int) -> list[str]:
    """The text of every token id, for people; the id itself where there is no tokenizer."""
    if tokenizer is None:
        return [f"[{i}]" for i in range(n)]
    texts = [tokenizer.decode([i]) for i in range(n)]
    # decoding a sentencepiece token alone drops the space it begins with
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    spaced = [isinstance(piece, str) and piece.startswith("\u2581") for piece in pieces]
    return [
        " " + text if space and not text.startswith(" ") else text or f"[{i}]"
        for i, (text, space) in enumerate(zip(texts, spaced, strict=True))
    ]


def _provenance(
    model: Any, data: Any, budget: Mapping[str, Any], steps: int, seed: int, started: float
) -> dict[str, Any]:
    return {
        "model": model if isinstance(model, str) else str(getattr(model, "name_or_path", model)),
        "data": data.source if isinstance(data, TokenData) else str(data or model),
        "budget": dict(budget),
        "refine_steps": steps,
        **stamp(seed, started),
    }


def stamp(seed: int, started: float) -> dict[str, Any]:
    """When, for how long and with which versions something was computed."""
    return {
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "unweave_version": __version__,
        "torch_version": torch.__version__,
        "wall_s": round(time.time() - started, 1),
    }


# ---- plain data for tables and pages --------------------------------------------------------------------


def _report(
    graph: Graph,
    original: Graph,
    scores: EdgeScores,
    faithfulness: Mapping[str, Faithfulness],
    curve: Mapping[str, list[tuple[float, Estimate]]],
    train: TokenData,
    test: TokenData,
    scope: Scope,
    tokenizer: Any,
    rivals: Mapping[str, Graph],
    moments: Mapping[int, ChannelMoments],
) -> dict[str, Any]:
    """Everything a page needs, as plain data."""
    sizes = {"decompiled graph": graph, "original": original, **rivals}
    n_in, n_out = original.info.get("d_vocab", 0), original.info["d_out"]
    tokens = token_strings(tokenizer, max(n_in, n_out)) if n_in else [f"[{i}]" for i in range(n_out)]
    return {
        "format": "unweave-report",
        "version": 1,
        "title": str(original.info.get("name", "graph")),
        "model": {**original.info, "n_parameters": original.n_parameters},
        "scope": {
            **describe(scope),
            "n_sequences_calibration": len(train),
            "n_tokens_calibration": train.n_tokens,
            "n_sequences_held_out": len(test),
            "n_tokens_held_out": faithfulness["original"].n_tokens,
        },
        "faithfulness": [_row(n, f, sizes.get(n), original) for n, f in faithfulness.items()],
        "worst_tokens": _worst(faithfulness["decompiled graph"], tokens),
        "rate_distortion": [_curve_row(name, points) for name, points in curve.items()],
        "nodes": _nodes(graph, scores, moments, tokens),
        "edges": edge_facts(graph, scores, scores.ranked()[:MAX_EDGES].tolist()),
    }


def _annotations(
    graph: Graph,
    train: TokenData,
    test: TokenData,
    moments: Mapping[int, ChannelMoments],
    edges: list[dict[str, Any]],
    scope: Scope,
    tokenizer: Any,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What pages of single nodes show; the edges are told how their nats divide."""
    tokens = token_strings(tokenizer, max(graph.info.get("d_vocab") or 0, graph.info["d_out"]))
    for place, pairs in pair_facts(graph, moments, edges).items():
        edges[place]["pairs"] = pairs
    drivers = driver_facts(graph, train, test, moments, tokens, scope=scope, **options)
    return {} if drivers is None else {"drivers": drivers}


def _curve_row(name: str, points: list[tuple[float, Estimate]]) -> dict[str, Any]:
    rows = [{"size": size, "kl_nats": kl.value, "low": kl.low, "high": kl.high} for size, kl in points]
    return {"name": name, "baseline": name != "unweave", "points": rows}


def _row(name: str, f: Faithfulness, graph: Graph | None, original: Graph) -> dict[str, Any]:
    context = int(original.info.get("n_ctx", 1))
    row = {
        "name": name,
        "baseline": name not in ("decompiled graph", "original"),
        "kl_nats": f.kl_nats._asdict(),
        "loss_nats": f.loss_nats._asdict(),
        "top1_agreement": f.top1_agreement._asdict(),
        "loss_recovered": f.loss_recovered._asdict(),
        "kl_p99": f.kl_p99,
        "kl_p999": f.kl_p999,
        "kl_max": f.kl_max,
    }
    if graph is not None:
        row |= {
            "size": graph.n_channel_parameters / original.n_channel_parameters,
            "n_parameters": graph.n_parameters,
            "flops_per_token": graph.flops_per_token(min(context, 128)),
            "size_bits": graph.size_bits,
        }
    return row


def _worst(f: Faithfulness, tokens: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "kl_nats": nats,
            "context": "".join(tokens[i] for i in context[:-1]),
            "token": tokens[context[-1]],
            "model_prediction": tokens[a],
            "graph_prediction": tokens[b],
        }
        for nats, _, _, context, a, b in f.worst
    ]


def node_facts(graph: Graph, scores: EdgeScores, node: str) -> dict[str, Any]:
    """What a report's row says of any node."""
    stage, _ = graph.find(node)
    at = graph.writers.index(node) if stage.write is not None else None
    return {
        "name": node,
        "kind": page_kind(stage),
        "layer": stage.layer,
        "ports": [port.name for port in stage.ports],
        "score_nats": None if at is None else float(scores.node_nats[at]),
        "score_se": None if at is None else float(scores.node_se[at]),
    }


def _nodes(
    graph: Graph, scores: EdgeScores, moments: Mapping[int, ChannelMoments], tokens: list[str]
) -> list[dict[str, Any]]:
    subspaces = node_subspaces(graph, moments)
    rows = []
    for stage in graph.stages:
        for name in stage.nodes:
            row = node_facts(graph, scores, name) | {"spectra": {}, "ranks": {}, "writes": [], "reads": []}
            if len(stage.nodes) == 1:  # heads share matrices: their numbers cannot be told apart
                row["n_parameters"] = stage.n_parameters
            for key, space in subspaces.get(name, {}).items():
                row["ranks"][key] = space.rank
                row["spectra"][key] = [round(float(v), 8) for v in space.nats[:64]]
                _describe_directions(graph, row, key, space, tokens)
            rows.append(row)
    return rows


def _describe_directions(graph: Graph, row: dict[str, Any], key: str, space: Any, tokens: list[str]) -> None:
    """The tokens that the leading directions promote, or are read from."""
    one_stream = all(s.visible[0] == 0 for s in graph.stages)
    if not one_stream or not hasattr(graph.stages[0].core, "table"):
        return
    for k in range(min(DIRECTIONS_SHOWN, len(space.nats))):
        nats, direction = float(space.nats[k]), space.directions[k]
        if key == "write":
            up, down = favoured_tokens(graph, direction)
            entry = {"promotes": _named(up, tokens), "suppresses": _named(down, tokens)}
            row["writes"].append({"dimension": k, "nats": nats, **entry})
        else:
            read: dict[str, Any] = {"port": key.removeprefix("read."), "dimension": k, "nats": nats}
            row["reads"].append({**read, "tokens": _named(read_tokens(graph, direction), tokens)})


def _named(pairs: list[tuple[int, float]], tokens: list[str]) -> list[list[Any]]:
    return [[tokens[i], round(v, 4)] for i, v in pairs]


def edge_facts(graph: Graph, scores: EdgeScores, pairs: Iterable[Sequence[int]]) -> list[dict[str, Any]]:
    """The rows of a report for some edges, given as (port, writer)."""
    node_at = {name: i for i, name in enumerate(graph.nodes)}
    split = [port.rsplit(".", 1) for port in graph.ports]
    rows = [
        {
            "src": node_at[graph.writers[i]],
            "dst": node_at[split[j][0]],
            "port": split[j][1],
            "nats": float(scores.nats[j, i]),
            "se": float(scores.se[j, i]),
            "measured": bool(scores.measured[j, i]),
        }
        for j, i in pairs
    ]
    return with_kernels(graph, rows)
