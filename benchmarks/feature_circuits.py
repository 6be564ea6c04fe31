"""Circuits over features beside circuits over nodes: exactness, edges and faithfulness on one task.

    python -m benchmarks.feature_circuits [circuits] [speed]

stories260K closes quotes. Every MLP is split by the TopK dictionary of 128 latents of ``benchmarks.dictionaries``: six
latents as nodes of their own, the other 122 as one, and what the dictionary leaves out (the error). The six have the
largest second-order worth E (f - E f)^2 d^T G d on the prompts that the search sees, G the second moment of the
gradient at what the MLP writes. Circuits are searched on half of the prompts, to a faithfulness of 0.9 of the
divergence under counterfactual ablation, and measured on the other half, beside random circuits of the same size. The
search stops after 16 measurements, which is the bisection of the ranking and little more.

Speed: one MLP in 64 to 256 latents, each a node, and the same with the whole layer computed for each node (the slow
way), in one run: scores of all edges, a graph of half of the edges at random, and one of the 500 of largest EAP score.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, SHARED, model, save
from benchmarks.dictionaries import TOKENS, fitted
from unweave.ablation import Replacement
from unweave.capture import load_tokenizer
from unweave.circuits import find_circuit
from unweave.circuits.curve import faithfulness_of
from unweave.circuits.distance import Distance, per_prompt
from unweave.circuits.proof import random_edges
from unweave.compression.moments import channel_moments
from unweave.data import TokenData
from unweave.execution import run
from unweave.features import Dictionary, Recipe, collect_activations, refine_features, untrained_dictionary
from unweave.graph import Graph
from unweave.ops import feature_core
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import replacement
from unweave.tasks import Task, make_task

NAME, SIZE, ALONE = "stories260K", "topk-128", 6
PROMPTS, TRIALS, RANDOM, FAITHFULNESS = 64, 16, 5, 0.9
LATENTS, SEQUENCES = (64, 128, 256), 16
CUTS = ("half of the edges", "500 edges")


def worth(graph: Graph, where: str, dictionary: Dictionary, data: TokenData, moments: Any) -> Tensor:
    """Nats of every latent, second order, with its mean in its place."""
    latents = dictionary.encode(collect_activations(graph, where, data))
    gradient2 = moments[graph.where[where][0]].written2.float()
    return 0.5 * latents.var(0) * (dictionary.decoder * (gradient2 @ dictionary.decoder)).sum(0)


def split(graph: Graph, texts: TokenData, data: TokenData, scope: Scope) -> tuple[Graph, dict[str, Any]]:
    """(the graph of features, the share of the second-order worth of each MLP that its six latents have)."""
    moments = channel_moments(graph, data, scope, progress=False)
    mlps = [stage.nodes[0] for stage in graph.stages if stage.kind == "mlp"]
    dictionaries, groups, shares = {}, {}, {}
    for where in mlps:
        collect = partial(collect_activations, graph, where, texts, limit=TOKENS)
        dictionaries[where] = fitted(NAME, where, collect, [SIZE])[SIZE]
        nats = worth(graph, where, dictionaries[where], data, moments)
        chosen = nats.topk(ALONE).indices.tolist()
        groups[where] = [[i] for i in chosen]
        shares[where] = {"latents": chosen, "share": float(nats[chosen].sum() / nats.sum())}
    return refine_features(graph, dictionaries, groups), shares


def exactness(graph: Graph, finer: Graph, data: TokenData) -> dict[str, float]:
    a, b = (run(g, data.tokens, data.mask).logits[data.mask] for g in (graph, finer))
    return {"largest_difference": float((a - b).abs().max()), "largest_logit": float(a.abs().max())}


def measure(graph: Graph, task: tuple[TokenData, TokenData], scope: Scope) -> dict[str, Any]:
    """A circuit of one graph, its held-out faithfulness, and that of random ones."""
    data, test = task
    started = time.time()
    options: dict[str, Any] = {"ablation": "counterfactual", "max_trials": TRIALS, "progress": False}
    circuit = find_circuit(graph, data, scope, faithfulness=FAITHFULNESS, **options)
    spent = time.time() - started
    instead: Replacement = replacement(graph, test, "counterfactual")[0]
    generator = torch.Generator().manual_seed(0)
    keeps = {"circuit": circuit.kept, "empty": torch.zeros_like(circuit.kept)}
    keeps |= {f"random {i}": random_edges(graph, circuit.n_edges, generator) for i in range(RANDOM)}
    left_over = torch.tensor([name.endswith(".error") for name in graph.writers])
    keeps |= {
        "circuit without errors": circuit.kept & ~left_over,
        "whole without errors": graph.edge_matrix & ~left_over,
    }
    graphs = {name: instead.cut(graph, keep) for name, keep in keeps.items()}
    told = per_prompt(graphs, graph, test, scope, progress=False)
    f = {name: faithfulness_of(told["original"], told[name], told["empty"], scope) for name in keeps}
    return {
        "nodes": len(graph.nodes),
        "edges": graph.n_edges,
        "kept": circuit.n_edges,
        "kept_from": sources(graph, circuit.kept),
        "faithfulness": {name: tuple(value) for name, value in f.items()},
        "empty_nats": float(told["empty"].nats.sum() / told["empty"].tokens.sum()),
        "search_s": round(spent, 1),
        "n": len(test),
    }


def sources(graph: Graph, kept: Tensor) -> dict[str, int]:
    """How many kept edges come from each kind of node."""
    kinds = {".latent.": "latents", ".latents.": "other latents", ".error": "errors", ".mlp": "MLPs", ".head.": "heads"}
    counts: dict[str, int] = {}
    for i, node in enumerate(graph.writers):
        kind = next((name for part, name in kinds.items() if part in node), "embedding")
        counts[kind] = counts.get(kind, 0) + int(kept[:, i].sum())
    return counts


def speed(graph: Graph, texts: TokenData, data: TokenData, scope: Scope) -> dict[str, Any]:
    """Processor seconds of each way by the number of latents, and how far apart their results are."""
    where, out = "blocks.1.mlp", {}
    x = collect_activations(graph, where, texts, limit=5000)
    plain = Timing(data, scope).of(graph)
    for n in LATENTS:
        # what dictionary it is does not change the time
        dictionary = untrained_dictionary(x, Recipe(n, k=8))
        ways: dict[int, dict[str, tuple[float, Tensor]]] = {}
        timing = Timing(data, scope)
        for few in (feature_core.FEW, 0):
            usual, feature_core.FEW = feature_core.FEW, few
            finer = refine_features(graph, {where: dictionary}, {where: [[i] for i in range(n)]})
            ways[few] = timing.of(finer)
            feature_core.FEW = usual
        fast, slow = ways.values()
        out[str(n)] = {"nodes": len(finer.nodes), "edges": finer.n_edges} | {
            name: {
                "ratio": slow[name][0] / fast[name][0],
                "seconds": [fast[name][0], slow[name][0], plain[name][0]],
                "largest_difference": float((fast[name][1] - slow[name][1]).abs().max()),
                "largest": float(slow[name][1].abs().max()),
            }
            for name in fast
        }
        sys.stdout.write(f"{n}: {out[str(n)]}\n")
    return out


@dataclass
class Timing:
    """Scores and cut graphs of one graph and then of the same graph computed in another way."""

    data: TokenData
    scope: Scope
    kept: dict[str, Tensor] = field(default_factory=dict)

    def of(self, graph: Graph) -> dict[str, tuple[float, Tensor]]:
        """(processor seconds, the least of three; what came out)."""
        options: dict[str, Any] = {"ablation": "counterfactual", "progress": False}
        instead, paired = replacement(graph, self.data, "counterfactual")
        first = score_edges(graph, self.data, self.scope, method="eap", **options)
        if not self.kept:
            generator = torch.Generator().manual_seed(0)
            half = graph.edge_matrix & (torch.rand(graph.edge_matrix.shape, generator=generator) < 0.5)
            self.kept = dict(zip(CUTS, (half, first.top(500)), strict=True))
        spent = least(lambda: score_edges(graph, self.data, self.scope, **options))
        out = {"scores": (spent, first.nats[graph.edge_matrix])}
        distance = Distance(graph, paired, self.scope, instead)
        distance.of_graph(graph)  # the whole graph's runs, which are kept
        for name, keep in self.kept.items():
            nats = distance.of(keep)
            cut = instead.cut(graph, keep)
            out[name] = least(partial(distance.of_graph, cut)), torch.tensor([nats])
        return out


def least(function: Callable[[], Any]) -> float:
    """Processor seconds of the quickest of three."""
    times = []
    for _ in range(3):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    started = time.time()
    torch.set_num_threads(1)
    graph, texts, _ = model(NAME)
    task: Task = make_task("quotes", load_tokenizer(SHARED / "models" / NAME), n=2 * PROMPTS)
    found, held_out = task.split(0.5, 0)
    pair = found.paired, held_out.paired
    path, parts = RESULTS / "feature_circuits.json", sys.argv[1:] or ["circuits", "speed"]
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "speed" in parts:
        result["speed"] = speed(graph, texts, found.paired.select(slice(0, SEQUENCES)), task.scope)
    if "circuits" in parts:
        finer, shares = split(graph, texts, found.data, task.scope)
        result |= {"task": "quotes", "alone": shares, "exactness": exactness(graph, finer, held_out.data)}
        for name, g in (("nodes", graph), ("features", finer)):
            result[name] = measure(g, pair, task.scope)
            sys.stdout.write(f"{name}: {result[name]}\n")
    save("feature_circuits", result, started, "python -m benchmarks.feature_circuits")


if __name__ == "__main__":
    main()
