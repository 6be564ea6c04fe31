"""Modules: found where they are known, not found where there are none, and what stories260K has.

    python -m benchmarks.modules [known] [bundled] [false_positives] [shared] [layers] [stories260K]

Known modules: two_tasks trained over five seeds, the retina over three, the shared step; adjusted Rand index on the
neurons that the models' own records name. Baselines see the same measured nats (Louvain, spectral clustering; the
number of blocks of greatest modularity) or the weights (k-means, told the right number). False positives: networks
with shuffled weights and untrained ones, at the 5% level. stories260K: everything that can be said of its partition,
at several resolutions (tokens that the description serves). It has no significant modules, so the causal checks are
made of two partitions that anyone would think of, one block per layer and heads against MLPs, beside random partitions
of the same sizes. Each part is saved when it is done; without arguments all are made.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.cluster import KMeans
from torch import nn

from benchmarks.common import RESULTS, model, save
from unweave import zoo
from unweave.capture import capture
from unweave.data import TokenData, load_data
from unweave.errors import UnweaveError
from unweave.graph import Graph
from unweave.modules.ablating import ablate_modules
from unweave.modules.communication import Communication
from unweave.modules.criterion import possible_pairs
from unweave.modules.found import Modules
from unweave.modules.grouping import group_neurons
from unweave.modules.interfaces import measure_interfaces
from unweave.modules.nulls import shuffle_weights
from unweave.modules.participation import reuse
from unweave.modules.partition import Partition
from unweave.modules.partitioners import PARTITIONERS
from unweave.modules.search import find_modules, modules_of
from unweave.modules.swapping import swap_interfaces
from unweave.modules.widths import measured_width
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import collect_means
from unweave.zoo import shared_step

SEEDS = range(5)
RANDOM_PARTITIONS = 20
METHODS = ("spectral", "louvain")
ANSWERED = Scope(positions="answered")
FALSE_POSITIVE_CASES = 25
# for how many tokens the descriptions of known models are asked as well
SERVED = (64, 256, 1024, 4096)
# of stories260K: where all edges are worth their bits, one list is best; fewer tokens drop the weak ones
RESOLUTIONS = (1024, 256, 64)


def neurons(graph: Graph) -> Graph:
    """Every MLP in neurons."""
    return graph.refine({s.nodes[0]: s.code_widths[0] for s in graph.stages if s.kind == "mlp"})


def truth_of(facts: dict[str, Any]) -> Partition:
    """The recorded modules of the neurons that are in one."""
    modules = facts.get("modules") or {k: facts[k] for k in ("shared", "copy_only", "successor_only")}
    nodes = [(node, b) for b, block in enumerate(modules.values()) for node in block]
    return Partition(tuple(n for n, _ in nodes), tuple(b for _, b in nodes))


def tests(found: Modules) -> dict[str, Any]:
    """z and p of every statistic against every null."""
    rows = [{"null": t.null, "statistic": t.statistic, "value": t.value, "z": t.z, "p": t.p} for t in found.tests]
    sizes = sorted((len(b) for b in found.active_partition.blocks.values()), reverse=True)
    return {"significant": found.significant(), "sizes": sizes, "tests": rows}


# ---- known modules ------------------------------------------------------------------------------------------


Known = tuple[str, int | str, nn.Module, dict[str, Any]]


def trained_models() -> Iterator[Known]:
    """(room, seed, model, what is known of it)."""
    for name, seeds in (("two_tasks", SEEDS), ("retina", SEEDS[:3])):
        for seed in seeds:
            *_, (_, _, trained) = zoo.room(name).train(seed)
            yield name, seed, trained.eval(), zoo.room(name).known(trained)


def bundled_models() -> Iterator[Known]:
    for name in ("two_tasks", "retina", "shared_step"):
        yield name, "bundled", zoo.load(name), zoo.known(name)


def known_row(name: str, seed: int | str, net: nn.Module, facts: dict[str, Any]) -> dict[str, Any]:
    """Ours and the baselines against the truth."""
    graph, data, truth = neurons(capture(net)), load_data(f"zoo:{name}", limit=2048), truth_of(facts)
    begin = time.perf_counter()
    # the slow nulls for the models that anyone has
    networks = ("shuffled", "reinitialised") if seed == "bundled" else ()
    options = {"n_null": 39, "n_networks": 19, "nulls": ("rewired", *networks), "methods": METHODS}
    found = find_modules(graph, data, ANSWERED, batch_size=256, progress=False, **options)
    row = {"model": name, "seed": seed, "n_truth": len(truth), "n_modules": truth.n_blocks, **tests(found)}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    named = {"unweave": found.partition, **plain(found.communication)}
    row["adjusted_rand"] = {k: p.restricted(truth.nodes).adjusted_rand(truth) for k, p in named.items()}
    row["tokens"], row["adjusted_rand_by_tokens"] = found.criterion.tokens, {}
    for tokens in SERVED:
        other = modules_of(
            found.communication,
            possible_pairs(graph),
            tokens=tokens,
            n_null=1,
            level=0.5,
            methods=METHODS,
            progress=False,
        )
        row["adjusted_rand_by_tokens"][tokens] = other.partition.restricted(truth.nodes).adjusted_rand(truth)
    if isinstance(net, nn.Sequential):
        row["adjusted_rand"]["k-means on weights"] = k_means(net, truth).adjusted_rand(truth)
    return row


def plain(told: Communication) -> dict[str, Partition]:
    """What the methods give on the nats as they are, by greatest modularity."""
    weights = told.symmetric().double()
    out = {}
    for method in ("louvain", "spectral"):
        proposed = PARTITIONERS[method](told.nodes, weights, 12, 0)
        whole = Partition(told.nodes, (0,) * len(told.nodes))
        out[method] = max([whole, *proposed], key=lambda p: p.modularity(weights))
    return out


def k_means(net: nn.Sequential, truth: Partition) -> Partition:
    """k-means on the absolute weights in and out of each neuron, one coordinate per other neuron, input and output."""
    layers = [m.weight.detach().abs() for m in net if isinstance(m, nn.Linear)]
    starts = [0]
    for w in layers:
        starts.append(starts[-1] + w.shape[1])
    n = starts[-1] + layers[-1].shape[0]
    table = torch.zeros(n, n)
    for k, w in enumerate(layers):
        table[starts[k + 1] : starts[k + 1] + len(w), starts[k] : starts[k] + w.shape[1]] = w
    table = table + table.T
    at = [starts[int(node.split(".")[1]) + 1] + int(node.split(".")[3]) for node in truth.nodes]
    labels = KMeans(truth.n_blocks, n_init=10, random_state=0).fit_predict(table[at].numpy())
    return Partition(truth.nodes, tuple(int(x) for x in labels))


# ---- false positives ------------------------------------------------------------------------------------------


def false_positives(name: str, kind: str) -> dict[str, Any]:
    """How often networks without modules are said to have some."""
    graph, data, hits, p_values = neurons(capture(f"zoo:{name}")), load_data(f"zoo:{name}", limit=256), 0, []
    for seed in range(FALSE_POSITIVE_CASES):
        if kind == "shuffled":
            other = shuffle_weights(graph, torch.Generator().manual_seed(1000 + seed))
        else:
            torch.manual_seed(seed)
            other = neurons(capture(zoo.untrained(name)))
        options = {"n_null": 19, "methods": ("spectral",), "seed": seed, "batch_size": 256, "progress": False}
        found = find_modules(other, data, ANSWERED, **options)
        hits += found.significant()
        p_values.append({statistic: found.p["rewired", statistic] for _, statistic in found.p})
    at_level = {s: sum(p[s] <= 0.05 for p in p_values) for s in p_values[0]}
    return {"model": name, "kind": kind, "hits": hits, "at_level": at_level, **rate(hits, FALSE_POSITIVE_CASES)}


def rate(hits: int, n: int) -> dict[str, Any]:
    """With an exact binomial interval."""
    interval = binomtest(hits, n).proportion_ci(0.95)
    return {"n": n, "rate": hits / n, "low": float(interval.low), "high": float(interval.high)}


# ---- stories260K ------------------------------------------------------------------------------------------------


def stories() -> dict[str, Any]:
    """The hierarchy, the nulls, and the causal checks of the partition chosen."""
    whole, train, held = model("stories260K", context=64)
    data, held = train.select(slice(0, 64)), held.select(slice(0, 24))
    auto = group_neurons(whole, data, progress=False)
    graph = group_neurons(whole, data, groups=4, progress=False)
    options = {"n_null": 39, "n_networks": 19, "nulls": ("rewired", "shuffled", "reinitialised"), "methods": METHODS}
    found = find_modules(graph, data, batch_size=32, progress=False, **options)
    sweep = []
    for tokens in RESOLUTIONS:
        coarse = modules_of(
            found.communication, possible_pairs(graph), tokens=tokens, n_null=39, methods=METHODS, progress=False
        )
        sweep.append(
            {"tokens": tokens, "active": len(coarse.active_partition), **tests(coarse), "curve": coarse.curve()}
        )
        if found.active_partition.is_trivial and not coarse.active_partition.is_trivial:
            found_at, chosen = tokens, coarse
            break
    else:
        found_at, chosen = found.criterion.tokens, found
    partition = best_of(chosen)
    grouped = graph.quotient(partition.blocks)
    return {
        "nodes": len(graph.nodes),
        "groups_of_neurons_auto": sum(".part." in n for n in auto.nodes),
        "tokens": found.criterion.tokens,
        **tests(found),
        "curve": found.curve(),
        "resolutions": sweep,
        "partition_at_tokens": found_at,
        "partition_significant": chosen.significant(),
        "partition_trivial": chosen.active_partition.is_trivial,
        "blocks": {name: list(nodes) for name, nodes in partition.blocks.items()},
        "interfaces": interface_rows(grouped, held),
        **causal_checks(grouped, held),
    }


# ---- natural partitions -----------------------------------------------------------------------------------------


def natural_partitions() -> dict[str, Any]:
    """Blocks ablated alone, in pairs and swapped, for two partitions of stories260K and for random ones like them."""
    graph, _, held = model("stories260K", context=64)
    held, scores = held.select(slice(0, 24)), None
    parts = [n for n in graph.nodes if n.startswith("blocks.")]
    kinds = {n: "mlp" if n.endswith(".mlp") else "head" for n in parts}
    layers = Partition(tuple(parts), tuple(int(n.split(".")[1]) for n in parts))
    by_kind = Partition(tuple(parts), tuple(int(kinds[n] == "mlp") for n in parts))
    means = collect_means(graph, held, batch_size=24, progress=False)
    scores = score_edges(graph, held, means=means, samples=8, batch_size=24, progress=False)
    out: dict[str, Any] = {"n": len(held), "random_partitions": RANDOM_PARTITIONS}
    # among layers heads change places with heads and MLPs with MLPs; between kinds all nodes do
    for name, partition, alike in (("layers", layers, kinds), ("heads, MLPs", by_kind, dict.fromkeys(parts, ""))):
        own = checked(graph, partition, held, means, scores)
        rng = np.random.default_rng(0)
        drawn = [shuffled(partition, alike, rng) for _ in range(RANDOM_PARTITIONS)]
        out[name] = against(own, [checked(graph, p, held, means, scores) for p in drawn])
        print(name, time.process_time(), flush=True)
    return out


def shuffled(partition: Partition, alike: dict[str, str], rng: np.random.Generator) -> Partition:
    """Labels dealt out anew among nodes of a kind."""
    labels, kind = np.array(partition.labels), np.array([alike[n] for n in partition.nodes])
    for k in np.unique(kind):
        labels[kind == k] = rng.permutation(labels[kind == k])
    # numbered anew by the partition: which block is which means nothing
    return Partition(partition.nodes, tuple(labels.tolist()))


def checked(graph: Graph, partition: Partition, data: TokenData, means: Any, scores: Any) -> dict[str, Any]:
    """The rows of the causal checks."""
    grouped = graph.quotient(partition.blocks)
    options: dict[str, Any] = {"blocks": [*partition.blocks], "n_random": 0, "batch_size": 24, "progress": False}
    effects = ablate_modules(grouped, data, means=means, **options)
    swaps = swap_interfaces(grouped, data, scores=scores, **options)
    rows = effects.table()
    for row in rows:
        row["nodes"] = [len(partition.blocks[b]) for b in row["modules"].split(" + ")]
    return {"alone": [r for r in rows if r["interaction"] is None], "swapped": swaps.table()} | {
        "pairs": [r for r in rows if r["interaction"] is not None],
        "blocks": {name: list(nodes) for name, nodes in partition.blocks.items()},
    }


def against(own: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """The partition's mean figures beside those of the random ones, with the percentile (ties count half)."""
    figures = {"alone": mean_alone, "interaction": mean_interaction, "agreement": mean_agreement}
    out = dict(own)
    for name, figure in figures.items():
        value, there = figure(own), np.array([figure(o) for o in others])
        below = float((there < value).mean() + 0.5 * (there == value).mean())
        row = {"value": value, "random_mean": float(there.mean()), "percentile": 100 * below}
        out[f"mean_{name}"] = row | {"random_low": float(there.min()), "random_high": float(there.max())}
    sizes = {tuple(r["nodes"]) for r in own["alone"]}
    # every block beside the random blocks of as many nodes
    for row in own["alone"] if len(sizes) > 1 else []:
        there = np.array([r["nats"] for o in others for r in o["alone"] if r["nodes"] == row["nodes"]])
        row["random"] = {"mean": float(there.mean()), "percentile": 100 * float((there < row["nats"]).mean())}
    return out


def mean_alone(found: dict[str, Any]) -> float:
    return float(np.mean([row["nats"] for row in found["alone"]]))


def mean_interaction(found: dict[str, Any]) -> float:
    return float(np.mean([abs(row["interaction"]) for row in found["pairs"]]))


def mean_agreement(found: dict[str, Any]) -> float:
    return float(np.nanmean([row["agreement"] for row in found["swapped"]]))


def best_of(found: Modules) -> Partition:
    """The partition chosen, or the best that is not trivial."""
    if not found.active_partition.is_trivial:
        return found.partition
    other = [p for p in found.hierarchy if not p.is_trivial]
    best = min(other, key=lambda p: found.criterion.describe(p).bits)
    return Partition.from_blocks(found.partition.nodes, best.blocks.values())


def interface_rows(graph: Graph, data: TokenData, k: int = 8) -> list[dict[str, Any]]:
    """The interfaces worth most, and in how many directions they are needed."""
    found = measure_interfaces(graph, data, n_examples=0, n_shown=0, progress=False)
    rows = []
    for i in sorted(found.interfaces, key=lambda i: -i.nats)[:k]:
        width = measured_width(found, data, i.src, i.dst, 0.9, progress=False)
        row = {"src": i.src, "dst": i.dst, "nats": i.nats, "dimensions_99": i.dimensions(0.99), "width_90": width}
        rows.append(row)
    return rows


def causal_checks(graph: Graph, data: TokenData) -> dict[str, Any]:
    """Blocks ablated and swapped, beside random sets; blocks with the output in them cannot be."""
    multiple = {b for b in set(graph.modules.values()) if list(graph.modules.values()).count(b) > 1}
    blocks = sorted(b for b in multiple if graph.modules.get(graph.nodes[-1]) != b)
    try:
        effects = ablate_modules(graph, data, blocks=blocks, n_random=4, progress=False)
        swaps = swap_interfaces(graph, data, blocks=blocks, n_random=4, progress=False)
    except UnweaveError as error:
        return {"checks": str(error)}
    return {"ablated": effects.table(), "swapped": swaps.table(), "violations": swaps.violations}


# ---- a step that two tasks share --------------------------------------------------------------------------------


def shared_steps() -> list[dict[str, Any]]:
    """Modules by usage: nodes put with the task that drives them; the head is shared."""
    rows = []
    for name in ("shared_step", "shared_step_regularised"):
        graph, truth = neurons(capture(f"zoo:{name}")), truth_of(zoo.known(name))
        data = load_data(f"zoo:{name}", limit=1024)
        asked = data.tokens[:, -1] - shared_step.COPY
        kinds = {task: data.select(asked == k) for k, task in enumerate(shared_step.TASKS)}
        found = reuse(graph, kinds, ANSWERED, samples=4, draws=200, batch_size=128, progress=False)
        head = found.nodes.index(truth.nodes[0])
        by_usage = found.partition().restricted(truth.nodes)
        row = {"model": name, "n_truth": len(truth), "adjusted_rand": by_usage.adjusted_rand(truth)}
        row["head"] = {"participation": float(found.participation[head]), "z": found.against_null[head].z}
        row["wrong"] = wrong(by_usage, truth)
        rows.append(row)
        print(row, flush=True)
    return rows


def wrong(found: Partition, truth: Partition) -> list[str]:
    """Nodes apart from most of their block."""
    out = []
    for nodes in truth.blocks.values():
        labels = [found[n] for n in nodes]
        out += [n for n, label in zip(nodes, labels, strict=True) if label != max(set(labels), key=labels.count)]
    return out


def rows_of(cases: Iterator[Known]) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        rows.append(known_row(*case))
        row = rows[-1]
        print(row["model"], row["seed"], row["adjusted_rand"], row["significant"], row["seconds"], flush=True)
    return rows


def all_false_positives() -> list[dict[str, Any]]:
    rows = []
    for name in ("two_tasks", "retina"):
        for kind in ("shuffled", "untrained"):
            rows.append(false_positives(name, kind))
            print(rows[-1], flush=True)
    return rows


PARTS: dict[str, Callable[[], Any]] = {
    "known": lambda: rows_of(trained_models()),
    "bundled": lambda: rows_of(bundled_models()),
    "false_positives": all_false_positives,
    "shared": shared_steps,
    "layers": natural_partitions,
    "stories260K": stories,
}


def main(wanted: list[str]) -> None:
    started = time.time()
    torch.set_num_threads(1)
    path = RESULTS / "modules.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in wanted or [*PARTS]:
        began = time.time()
        result[name] = PARTS[name]()
        if name == "false_positives":
            rows = result[name]
            result["false_positive_rate"] = rate(sum(row["hits"] for row in rows), sum(row["n"] for row in rows))
        result["seconds"] = {**result.get("seconds", {}), name: round(time.time() - began)}
        print(name, result["seconds"][name], flush=True)
        save("modules", result, started, "python -m benchmarks.modules")


if __name__ == "__main__":
    main(sys.argv[1:])
