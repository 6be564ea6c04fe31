"""Usage of every token of a data set, and circuits of kinds of data that nobody named.

    python -m benchmarks.usage [--only cost|circuits|relative] [--sequences N]

Cost: processor time of recording every story of stories260K (772k tokens), at level "node" and "edge", against one
forward + backward pass of the Hugging Face model over the same tokens on one thread, half of it before and half after
the first recording; peak memory of a process that records an eighth, half and all of them. ``--sequences`` takes only
the first N, as a quick run.
Circuits: on zoo:three_tasks, against the true tasks; on stories260K, what is found, on held-out stories, beside one
circuit for every token.
Relative: on stories260K, types relative to the background, on texts that nothing was chosen on; circuits of one size
for each of them and for every token, each on the held-out tokens of each type; what the same procedure finds in
shuffled usage and on zoo:three_tasks.
What the result file holds already is not measured again; delete it to start afresh.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import unweave
from benchmarks.common import RESULTS, SHARED, model, save
from benchmarks.sampling import shuffled
from unweave.ablation import Replacement
from unweave.capture import load_model, load_tokenizer
from unweave.circuits import Circuit
from unweave.circuits.curve import faithfulness_of
from unweave.circuits.distance import per_prompt
from unweave.data import TokenData
from unweave.drivers.describing import describe_values
from unweave.graph import Graph
from unweave.intervals import bootstrap
from unweave.pipeline import token_strings
from unweave.sampling import (
    LEVELS,
    DataTypes,
    TypeCircuit,
    Usage,
    circuits_of_types,
    find_types,
    place_types,
    record_usage,
)
from unweave.sampling.factors import estimate_loads
from unweave.zoo.three_tasks import TASKS

MODEL = SHARED / "models" / "stories260K"
STORIES = SHARED / "data" / "stories260K.jsonl"
CONTEXT = 256
# types are found on so many texts of 128 tokens, with so many cotangents
TEXTS = 60
SAMPLES = 8
NULLS = 6
RECORD = """
import json, re, sys, time, torch
torch.set_num_threads(1)
from unweave import capture
from unweave.sampling import record_usage
from benchmarks.usage import stories
data = stories({n})
graph = capture({model!r})
before, started = time.process_time(), time.perf_counter()
usage = record_usage(graph, data, None, {folder!r}, level={level!r})
spent = time.process_time() - before
# not getrusage: its peak includes that of the process that started this one
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
out = {{"tokens": usage.n_tokens, "cpu_s": spent, "wall_s": time.perf_counter() - started, "peak_mb": peak}}
sys.stdout.write("\\n" + json.dumps(out))
"""


def stories(n: int | None = None) -> TokenData:
    return unweave.load_data(STORIES, load_tokenizer(MODEL), context=CONTEXT, limit=n)


def recorded(folder: Path, n: int, level: str) -> dict[str, Any]:
    """What recording the first n sequences takes, in a process of its own."""
    code = RECORD.format(n=n, model=str(MODEL), folder=str(folder), level=level)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(out.stdout.strip().splitlines()[-1])
    found["disk_mb"] = sum(p.stat().st_size for p in folder.glob("part-*")) / 1e6
    for path in folder.iterdir():
        path.unlink()
    return found


def processor_time(step: Callable[[Any], None], data: TokenData) -> float:
    before = time.process_time()
    for batch in data.batches(16):
        step(batch)
    return time.process_time() - before


def model_pass(original: Any) -> Callable[[Any], None]:
    def step(batch: Any) -> None:
        logits = original(batch.inputs, attention_mask=batch.mask.long()).logits
        targets = batch.inputs.masked_fill(~batch.mask, -100)[:, 1:]
        F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        original.zero_grad()

    return step


def cost_stages(folder: Path, n: int | None) -> dict[str, Callable[[], Any]]:
    """What is measured, in order: the passes stand on both sides of the first recording of everything."""
    data = stories(n)
    original, middle = load_model(MODEL), len(data) // 2
    halves = (data.select(slice(0, middle)), data.select(slice(middle, None)))
    stages: dict[str, Callable[[], Any]] = {"tokens": lambda: data.n_tokens}
    stages["passes, first half"] = lambda: processor_time(model_pass(original), halves[0])
    stages |= recordings(folder, len(data), [("node", 1.0)])
    stages["passes, second half"] = lambda: processor_time(model_pass(original), halves[1])
    rest = [("edge", 0.125), ("node", 0.125), ("edge", 1.0), ("node", 0.5), ("edge", 0.5)]
    return stages | recordings(folder, len(data), rest)


def recordings(folder: Path, n: int, wanted: list[tuple[str, float]]) -> dict[str, Callable[[], Any]]:
    return {
        f"{level}, {share}": lambda level=level, share=share: recorded(
            folder / f"{level} {share}", round(share * n), level
        )
        for level, share in wanted
    }


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Processor time of recording everything over that of the passes, as far as both are measured."""
    passes = [found.get(f"passes, {half} half") for half in ("first", "second")]
    if None in passes:
        return {}
    done = [level for level in LEVELS[:2] if f"{level}, 1.0" in found]
    return {level: found[f"{level}, 1.0"]["cpu_s"] / sum(passes) for level in done}


# ---- the mixture of three tasks ---------------------------------------------------------------------------


def f1(found: torch.Tensor, true: torch.Tensor) -> float:
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def matched(types: DataTypes, data: TokenData) -> tuple[list[int], list[float]]:
    """(task of each type, correlation with its indicator)."""
    truth = data.labels["task"][:, None].expand(data.mask.shape)
    table = np.array(
        [
            [np.corrcoef(t.tokens.flatten(), (truth == k).flatten())[0, 1] for k in range(len(TASKS))]
            for t in types.types
        ]
    )
    rows, columns = linear_sum_assignment(-table)
    return [int(columns[list(rows).index(r)]) for r in range(len(table))], table.max(1).tolist()


def mixture(folder: Path) -> dict[str, Any]:
    """Found types and their circuits against the true tasks; the search of neither has seen the held-out texts."""
    graph, scope = unweave.capture("zoo:three_tasks"), unweave.Scope(positions="answered")
    data, held_out = unweave.load_data("zoo:three_tasks").split(held_out=0.5)
    usage, other = (
        record_usage(graph, texts, scope, folder / f"mixture {n}", level="edge", samples=2)
        for n, texts in enumerate((data, held_out))
    )
    types = find_types(usage, units="sequence")
    found = circuits_of_types(graph, types, data, other, held_out, scope, faithfulness=0.9, n_random=20)
    tasks, correlations = matched(DataTypes(tuple(kind.held_out for kind in found), 0), held_out)
    means = unweave.collect_means(graph, data)
    rows = []
    for kind, task, correlation in zip(found, tasks, correlations, strict=True):
        own = data.select(data.labels["task"] == task)
        true = unweave.find_circuit(graph, own, scope, faithfulness=0.9, means=means).kept
        rows.append(kind.row() | {"task": TASKS[task], "correlation": correlation, "f1": f1(kind.circuit.kept, true)})
    by_token = find_types(usage)
    return {
        "types": rows,
        "mean_correlation": float(np.mean(correlations)),
        "least_f1": min(row["f1"] for row in rows),
        "by_token": dict(zip([t.name for t in by_token.types], matched(by_token, data)[1], strict=True)),
        "found_in_nulls": [
            len(find_types(shuffled(usage, folder / f"null {n}", n), units=("sequence", "token")[n % 2], seed=n).types)
            for n in range(NULLS)
        ],
    }


# ---- stories ----------------------------------------------------------------------------------------------


def found_circuits(folder: Path) -> dict[str, Any]:
    """Types of tokens of some stories, with words, circuits and proofs on other stories."""
    graph, data, held_out = model("stories260K")
    strings = token_strings(load_tokenizer(MODEL), 512)
    data, held_out = data.select(slice(0, TEXTS)), held_out.select(slice(0, TEXTS))
    usage, other = (
        record_usage(graph, texts, None, folder / f"stories {n}", level="edge", samples=SAMPLES, strings=strings)
        for n, texts in enumerate((data, held_out))
    )
    types = find_types(usage, max_units=1500, seeds=2, splits=4, nulls=2)
    means = unweave.collect_means(graph, data)
    limits = {"faithfulness": 0.8, "max_trials": 60}
    found = circuits_of_types(
        graph,
        types,
        data,
        other,
        held_out,
        means=means,
        token_strings=strings,
        most_sequences=12,
        n_subsets=5,
        **limits,
    )
    everything = unweave.find_circuit(graph, data.select(slice(0, 12)), means=means, **limits)
    return {
        "n_factors": types.n_factors,
        "trials": list(types.trials),
        "null_agreement": list(types.null_agreement),
        "types": [kind.row() for kind in found],
        "every token": {"n_edges": everything.n_edges, "faithfulness_found": everything.faithfulness},
        "faithfulness_across": across(found, everything, place_types(types, other).marked(held_out)),
        "edges_shared": [[f1(a.circuit.kept, b.circuit.kept) for b in found] for a in found],
    }


def across(found: tuple[TypeCircuit, ...], everything: Circuit, held_out: TokenData) -> dict[str, dict[str, float]]:
    """Faithfulness of every circuit (rows) on the held-out tokens of every type (columns)."""
    circuits = {kind.kind.name: kind.circuit for kind in found} | {"every token": everything}
    out: dict[str, dict[str, float]] = {name: {} for name in circuits}
    for kind in found:
        one = kind.circuit
        texts = held_out.select(held_out.labels[kind.kind.name].any(1)).select(slice(0, 16))
        graphs = {name: circuit.graph for name, circuit in circuits.items()}
        graphs["empty"] = one.instead.cut(one.original, torch.zeros_like(one.kept))
        measured = per_prompt(graphs, one.original, texts, one.scope)
        for name in circuits:
            f = faithfulness_of(measured["original"], measured[name], measured["empty"], one.scope)
            out[name][kind.kind.name] = f.value
    return out


# ---- relative to the background ---------------------------------------------------------------------------

# development looked at the stories before 256 only
FOUND_FROM, HELD_FROM, RANKED_FROM = 1000, 2000, 2300
FINDING: dict[str, Any] = {"relative": True, "most": 10, "max_units": 2000, "seeds": 2, "splits": 4, "nulls": 2}
N_EDGES = 120
SIZES = (150, 300, 600)
SEARCHED, PROVED, COMPARED = 16, 12, 40


def new_stories(
    folder: Path, seed: int = 0, held_from: int = HELD_FROM
) -> tuple[Graph, list[TokenData], list[Usage], list[str]]:
    """(graph, texts to find on and held-out texts, their usages, the tokens' strings)."""
    graph, data, _ = model("stories260K")
    strings = token_strings(load_tokenizer(MODEL), 512)
    options: dict[str, Any] = {"level": "edge", "samples": 16, "strings": strings, "seed": seed}
    starts = (FOUND_FROM, held_from)
    sides = [data.select(data.documents >= start).select(slice(0, TEXTS)) for start in starts]
    usages = [
        record_usage(graph, side, None, folder / f"from {start}, {seed}", **options)
        for start, side in zip(starts, sides, strict=True)
    ]
    return graph, sides, usages, strings


def relative_types(folder: Path) -> dict[str, Any]:
    """The types, their words, and whether other cotangents would have put the same tokens in them."""
    _, (data, held_out), (usage, other), strings = new_stories(folder)
    types = find_types(usage, **FINDING)
    placed = place_types(types, other)
    again = place_types(types, new_stories(folder, seed=1)[2][1])
    values = [{kind.name: kind.tokens.float() for kind in side.types} for side in (types, placed)]
    words = describe_values(values[0], data, values[1], held_out, token_strings=strings).items
    rows = []
    for kind, out, twice, said in zip(types.types, placed.types, again.types, words, strict=True):
        rows.append(
            {
                "type": kind.name,
                "tokens": int(kind.tokens.sum()),
                "tokens_held_out": int(out.tokens.sum()),
                "texts_held_out": int(out.tokens.any(1).sum()),
                "agreement": kind.agreement,
                "stability": kind.stability,
                "same_tokens_by_other_cotangents": f1(out.tokens, twice.tokens),
                "words": said.text,
                "labelled": said.label is not None,
                "words_r2": said.score,
                "words_auroc": said.auroc,
                "parts": kind.top(8),
                "common_tokens": common(data, kind.tokens, strings),
            }
        )
    trials, null = list(types.trials), list(types.null_agreement)
    return {"n_factors": types.n_factors, "bar": types.bar, "trials": trials, "null_agreement": null, "types": rows}


def common(data: TokenData, tokens: torch.Tensor, strings: list[str], n: int = 10) -> dict[str, float]:
    """The tokens that are most of a type: by count, the share of their occurrences that are of it."""
    counts, every = (torch.bincount(data.tokens[mask].long(), minlength=512) for mask in (tokens, data.mask))
    order = (counts.square() / every.clamp(min=1)).argsort(descending=True)[:n]
    return {strings[int(k)]: round(float(counts[k] / every[k].clamp(min=1)), 2) for k in order}


def relative_circuits(folder: Path) -> dict[str, Any]:
    """A circuit of one size for every type and for all tokens, proofs, and whether a type's own is the best for it."""
    graph, (data, held_out), (usage, other), _ = new_stories(folder)
    types = find_types(usage, **FINDING)
    marked, marked_out = types.marked(data), place_types(types, other).marked(held_out)
    means = unweave.collect_means(graph, data)
    limits: dict[str, Any] = {"edges": N_EDGES, "means": means, "max_trials": 40}
    circuits = {"every token": unweave.find_circuit(graph, data.select(slice(0, SEARCHED)), **limits)}
    proofs: dict[str, Any] = {}
    for kind in types.types:
        texts = holding(marked, kind.name, SEARCHED)
        circuit = circuits[kind.name] = unweave.find_circuit(graph, texts, kind.scope(), **limits)
        proof = unweave.prove(circuit, holding(marked_out, kind.name, PROVED), n_random=20, n_subsets=3)
        proofs[kind.name] = {"n_edges": circuit.n_edges, "tokens": proof.n_tokens, "proof": proof.table()}
        proofs[kind.name]["faithfulness_found"] = circuit.faithfulness
    graphs = {name: circuit.graph for name, circuit in circuits.items()}
    whole = circuits["every token"]
    graphs["empty"] = whole.instead.cut(graph, torch.zeros_like(whole.kept))
    return {
        "proofs": proofs,
        "edges_by_type": {name: [str(edge) for edge in circuit.edges] for name, circuit in circuits.items()},
        "edges_shared": [[f1(a.kept, b.kept) for b in circuits.values()] for a in circuits.values()],
        "specificity": {
            kind.name: specificity(graphs, graph, kind.scope(), holding(marked_out, kind.name, COMPARED))
            for kind in types.types
        },
    }


def holding(marked: TokenData, name: str, most: int) -> TokenData:
    return marked.select(marked.labels[name].any(1)).select(slice(0, most))


def specificity(graphs: dict[str, Graph], whole: Graph, scope: unweave.Scope, texts: TokenData) -> dict[str, Any]:
    """Faithfulness of every cut graph on a type's held-out tokens, how much more its own has (intervals: texts)."""
    name = str(scope.positions)
    measured = per_prompt(graphs, whole, texts, scope)
    empty = measured["empty"].nats
    rest = {other: measured[other].nats for other in graphs if other not in (name, "empty")}
    more = {
        other: bootstrap({"own": measured[name].nats, "other": nats, "empty": empty}, advantage)._asdict()
        for other, nats in rest.items()
    }
    return {
        "texts": len(texts),
        "faithfulness": {other: 1 - float(measured[other].nats.sum() / empty.sum()) for other in [name, *rest]},
        "own_more_than": more,
        "own_is_best": all(difference["low"] > 0 for difference in more.values()),
    }


def relative_rankings(folder: Path) -> dict[str, Any]:
    """Specificity without a search, at exactly equal sizes: the edges that score highest on a type's tokens."""
    graph, (data, held_out), (usage, other), _ = new_stories(folder, held_from=RANKED_FROM)
    types = find_types(usage, **FINDING)
    marked, marked_out = types.marked(data), place_types(types, other).marked(held_out)
    means = unweave.collect_means(graph, data)
    instead = Replacement("mean", means)
    scores = {"every token": unweave.score_edges(graph, data, means=means, samples=4)}
    for kind in types.types:
        scores[kind.name] = unweave.score_edges(graph, marked, kind.scope(), means=means, samples=4)
    out: dict[str, Any] = {}
    for size in SIZES:
        graphs = {name: instead.cut(graph, score.top(size)) for name, score in scores.items()}
        graphs["empty"] = instead.cut(graph, torch.zeros_like(graph.edge_matrix))
        out[str(size)] = {
            kind.name: specificity(graphs, graph, kind.scope(), holding(marked_out, kind.name, COMPARED))
            for kind in types.types
        }
    return out


def advantage(own: float, other: float, empty: float) -> float:
    return (other - own) / empty if empty > 0 else float("nan")


def relative_again(folder: Path) -> dict[str, Any]:
    """Harder than the library's own test: halves of edges that share no node, and the same types from other texts."""
    _, _, (usage, other), _ = new_stories(folder)
    types = find_types(usage, **FINDING)
    early = model("stories260K")[1]
    early = early.select(early.documents <= 255).select(slice(0, TEXTS))
    first = record_usage(unweave.capture(MODEL), early, None, folder / "early", level="edge", samples=16)
    before = find_types(first, **FINDING)
    assert types.factors is not None
    assert before.factors is not None
    cosines = types.factors[list(types.standing)] @ before.factors[list(before.standing)].T
    rows, columns = linear_sum_assignment(-cosines)
    placed, elsewhere = (place_types(kinds, other).types for kinds in (types, before))
    return {
        "types_of_early_texts": len(before.types),
        "cosine_with_early": {types.types[r].name: float(cosines[r, c]) for r, c in zip(rows, columns, strict=True)},
        "f1_of_held_out_tokens": {
            placed[r].name: f1(placed[r].tokens, elsewhere[c].tokens) for r, c in zip(rows, columns, strict=True)
        },
        "agreement_without_shared_nodes": agreement_of_nodes(types, other),
        "shuffled": agreement_of_nodes(types, shuffled(other, folder / "shuffled held out", 0)),
    }


def agreement_of_nodes(types: DataTypes, usage: Usage, splits: int = 8) -> dict[str, float]:
    """Correlation of the loads estimated from the edges within either half of the nodes, mean over halvings."""
    assert types.factors is not None
    assert types.background is not None
    rows = types.background.over(usage.matrix().astype(np.float64))
    ends = [(writer, port.rpartition(".")[0]) for writer, port in (name.split("->") for name in usage.columns)]
    nodes, rng, found = sorted({node for pair in ends for node in pair}), np.random.default_rng(0), []
    for _ in range(splits):
        first = set(rng.choice(nodes, len(nodes) // 2, replace=False))
        inside = np.array([(writer in first) + (port in first) for writer, port in ends])
        loads = [estimate_loads(rows[:, inside == n], types.factors[:, inside == n]) for n in (0, 2)]
        loads = [load / np.maximum(np.linalg.norm(load, axis=1, keepdims=True), 1.0) for load in loads]
        found.append([np.corrcoef(loads[0][:, k], loads[1][:, k])[0, 1] for k in types.standing])
    return dict(zip([kind.name for kind in types.types], np.mean(found, axis=0).tolist(), strict=True))


def relative_nulls(folder: Path) -> dict[str, Any]:
    """Types that the same procedure finds in shuffled usage, and on the mixture of three tasks."""
    usage = new_stories(folder)[2][0]
    found = []
    for n in range(NULLS - 1):
        found.append(len(find_types(shuffled(usage, folder / f"new null {n}", n), **FINDING, seed=n).types))
    scope, data = unweave.Scope(positions="answered"), unweave.load_data("zoo:three_tasks")
    graph = unweave.capture("zoo:three_tasks")
    usage = record_usage(graph, data, scope, folder / "relative mixture", level="edge", samples=2)
    types = {units: find_types(usage, units=units, relative=True) for units in ("sequence", "token")}
    by_text = matched(types["sequence"], data)[1]
    none = [
        len(find_types(shuffled(usage, folder / f"relative {n}", n), units=units, relative=True, seed=n).types)
        for n, units in enumerate(("sequence", "token") * 3)
    ]
    return {
        "found_in_shuffled_stories": found,
        "mixture_correlations_by_text": by_text,
        "mixture_types_by_token": len(types["token"].types),
        "found_in_shuffled_mixture": none,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("cost", "circuits", "relative"))
    parser.add_argument("--sequences", type=int)
    given = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks.usage", *sys.argv[1:]])
    path = RESULTS / "usage.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    cost = result.setdefault("cost", {})
    if cost.get("sequences") != given.sequences:
        cost = result["cost"] = {"sequences": given.sequences}

    def keep(part: dict[str, Any], stages: dict[str, Callable[[], Any]]) -> None:
        for name, stage in stages.items():
            if name not in part:
                part[name] = stage()
                result["cost"]["ratio"] = ratios(cost)
                save("usage", result, started, command)
                sys.stdout.write(f"{time.time() - started:.0f} s: {name}: {json.dumps(part[name])[:4000]}\n")
                sys.stdout.flush()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = cost_stages(folder, given.sequences) if given.only in (None, "cost") else {}
        keep(cost, dict(list(stages.items())[:5]))
        if given.only in (None, "relative"):
            parts = {
                "types": relative_types,
                "circuits": relative_circuits,
                "rankings": relative_rankings,
                "again": relative_again,
                "nulls": relative_nulls,
            }
            relative = {name: lambda part=part: part(folder) for name, part in parts.items()}
            keep(result.setdefault("relative", {}), relative)
        if given.only in (None, "circuits"):
            keep(result, {"stories": lambda: found_circuits(folder), "mixture": lambda: mixture(folder)})
        keep(cost, stages)


if __name__ == "__main__":
    main()
