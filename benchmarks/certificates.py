"""Certificates: sound over whole domains, how tight, and what a proof about the maximum of k costs.

    python -m benchmarks.certificates

Boxes: bounds of graph - model over [-r, r]^d for compressed and cut graphs of two_tasks and retina, at fixed settings
(factor 2, at most 100,000 boxes), against plain intervals and against linear bounds of both networks apart. r was fixed
beforehand: 1 for retina (its pixels are -1 or 1) and 1.4 for two_tasks (bits of -1 or 1, two deviations of noise).
Sampled points are uniform over the box, and corners; they play no part in the bounds. All inputs: finite sets of
tokens, exact. Maximum: certified share of all 64^4 inputs against all inputs tried, by the model itself and from
tables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common import save
from unweave.capture import capture
from unweave.certificates import certify_boxes, certify_exhaustively, head_tables, prove_maximum
from unweave.certificates.chains import pair_up
from unweave.compression import compress
from unweave.data import TokenData, from_tensor, load_data
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import collect_means
from unweave.zoo import modular_addition

REACH = {"retina": 1.0, "two_tasks": 1.4}
# of the channels' numbers, and of the edges; two_tasks is sparse, and loses nothing at half of either
SIZES = {"retina": (0.8, 0.5, 0.3), "two_tasks": (0.5, 0.3, 0.2)}
SHARES = {"retina": (0.8, 0.5), "two_tasks": (0.1, 0.07)}
LIMIT, LIMIT_APART = 100_000, 1_000
# the rounding of the bound of a KL is 1e-10
TOLERANCE = 1e-9
POINTS = 1_000_000
AT_ONCE = 50_000
BRUTE = 65_536
# the model is timed on one batch of so many, spread over all inputs, and the time multiplied
EVERY = 16
LAST = Scope(positions="last")


def cut(model: Graph, data: TokenData, share: float, scope: Scope | None = None) -> Graph:
    """The graph with the weakest edges cut to their means; plain layers neuron by neuron."""
    plain = {n: s.code_widths[0] for s in model.stages if s.kind == "mlp" for n in s.nodes if model.info.get("d_input")}
    finer = model.refine(plain)
    scores = score_edges(finer, data, scope or Scope(), progress=False)
    order = scores.nats.nan_to_num(-1.0).flatten().argsort(descending=True)
    keep = torch.zeros(finer.edge_matrix.numel(), dtype=torch.bool)
    keep[order[: round(share * finer.n_edges)]] = True
    means = collect_means(finer, data, progress=False)
    return finer.restrict(keep.reshape(finer.edge_matrix.shape) & finer.edge_matrix, means=means)


def sampled(graph: Graph, model: Graph, r: float, quantity: str, bound: float) -> tuple[int, float]:
    """(violations among the sampled points, the most found there), in float64."""
    pair, generator = pair_up(graph, model), torch.Generator().manual_seed(12345)
    violations, most = 0, 0.0
    x = r * (2 * torch.rand(5000, pair.d_input, generator=generator, dtype=torch.float64) - 1)
    runs = [run(g.to(dtype=torch.float64), x[:, None]).logits[:, 0] for g in (graph, model)]
    assert torch.allclose(pair.difference(x), runs[0] - runs[1], atol=1e-9)  # what is sampled is what runs
    for start in range(0, POINTS, AT_ONCE):
        x = 2 * torch.rand(AT_ONCE, pair.d_input, generator=generator, dtype=torch.float64) - 1
        x = r * (x.sign() if start % (4 * AT_ONCE) == 0 else x)  # every fourth batch: corners
        a, b = pair.graph.run(x), pair.original.run(x)
        if quantity == "output":
            values = (a - b).abs().amax(1)
        else:
            p, q = b.log_softmax(1), a.log_softmax(1)
            values = (p.exp() * (p - q)).sum(1)
        violations += int((values > bound).sum())
        most = max(most, float(values.max()))
    return violations, most


def box_row(graph: Graph, model: Graph, quantity: str, r: float) -> dict[str, Any]:
    """The bound over [-r, r]^d, its baselines, and what sampling finds."""
    high = torch.full((model.info["d_input"],), r, dtype=torch.float64)
    options: dict[str, Any] = {"quantity": quantity, "tolerance": TOLERANCE, "progress": False}
    start, cpu = time.perf_counter(), time.process_time()
    found = certify_boxes(graph, model, -high, high, limit=LIMIT, **options)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    apart = certify_boxes(graph, model, -high, high, limit=LIMIT_APART, pairing=False, **options)
    violations, most = sampled(graph, model, r, quantity, found.bound)
    worst = max(found.found, most)
    bounds = {
        "bound": found.bound,
        "unsplit": found.unsplit_bound,
        "intervals": found.interval_bound,
        "apart": apart.bound,
    }
    return {
        "quantity": quantity,
        "bound": found.bound,
        "worst_found": worst,
        "worst_sampled": most,
        **{f"{name}_to_worst": bound / worst if worst > 0 else None for name, bound in bounds.items()},
        "n_boxes": found.n_boxes,
        "finished": found.finished,
        "sampled": POINTS,
        "violations": violations,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
    }


def graphs_of(room: str) -> tuple[Graph, dict[str, Graph]]:
    """(the model, its compressed and cut graphs by name)."""
    model, data = capture(f"zoo:{room}"), load_data(f"zoo:{room}")
    graphs = {f"size {s}": compress(model, data, size=s, progress=False) for s in SIZES[room]}
    return model, graphs | {f"{s:.0%} of edges": cut(model, data, s) for s in SHARES[room]}


def boxes(room: str) -> Iterator[dict[str, Any]]:
    model, graphs = graphs_of(room)
    for name, graph in graphs.items():
        for quantity in ("output", "kl"):
            yield {"model": room, "graph": name} | box_row(graph, model, quantity, REACH[room])


def finite() -> list[dict[str, Any]]:
    rows = []
    addition, pairs = capture("zoo:modular_addition"), modular_addition.all_pairs()[0]
    data = load_data("zoo:modular_addition", limit=1024)
    domains: dict[str, Any] = {"modular_addition": (addition, data, [range(113), range(113), [113]], LAST)}
    induction = capture("zoo:induction")
    # BOS a b a, for all a and b: what comes next is b
    a, b = torch.cartesian_prod(torch.arange(1, 48), torch.arange(1, 48)).unbind(1)
    repeats = from_tensor(torch.stack([torch.zeros_like(a), a, b, a], dim=1))
    domains["induction"] = (induction, load_data("zoo:induction", limit=128), repeats, LAST)
    assert len(pairs) == 113**2
    for name, (model, given, domain, scope) in domains.items():
        graphs = {"size 0.5": compress(model, given, Scope(positions="answered"), size=0.5, progress=False)}
        graphs |= {f"{s:.0%} of edges": cut(model, given, s, Scope(positions="answered")) for s in (0.8, 0.5)}
        for kind, graph in graphs.items():
            found = certify_exhaustively(graph, model, domain, scope, progress=False)
            rows.append(
                {
                    "model": name,
                    "graph": kind,
                    "n_inputs": found.n_inputs,
                    "worst_nats": found.worst_nats,
                    "mean_nats": found.mean_nats,
                    "worst_input": list(found.worst_input),
                    "worst_logit_difference": found.worst_logit_difference,
                    "agreement": found.agreement,
                }
            )
    return rows


@torch.no_grad()
def by_model(graph: Graph) -> tuple[float, float]:
    """(share answered right, seconds for all 64^4 inputs) by the graph, which costs what the model costs."""
    right, start = 0, time.perf_counter()
    number = torch.arange(BRUTE)
    firsts = range(0, 64**4, BRUTE * EVERY)
    for first in firsts:
        n = number + first
        tokens = torch.stack([n // 64**3, n // 64**2 % 64, n // 64 % 64, n % 64], dim=1)
        right += int((run(graph, tokens).logits[:, -1].argmax(1) == tokens.amax(1)).sum())
    return right / (BRUTE * len(firsts)), (time.perf_counter() - start) * EVERY


def maximum() -> dict[str, Any]:
    graph = capture("zoo:max_of_k")
    tables = head_tables(graph)
    right, wall_s = by_model(graph)
    operations = 64**4 * 4 * graph.flops_per_token(4)
    rows: dict[str, Any] = {"the model on all inputs": {"accuracy": right, "wall_s": wall_s, "ratio_wall": 1.0}}
    rows["the model on all inputs"] |= {"operations": operations, "ratio_operations": 1.0}
    truth = prove_maximum(tables, "brute force")
    for proof in ("brute force", "cubic", "quadratic"):
        bound = truth if proof == "brute force" else prove_maximum(graph, proof)
        rows["tables on all inputs" if proof == "brute force" else proof] = {
            "accuracy": bound.accuracy,
            "wall_s": bound.wall_s,
            "operations": bound.operations,
            "ratio_wall": bound.wall_s / wall_s,
            "ratio_operations": bound.operations / operations,
            "classes_with_more_certified_than_right": int((bound.certified > truth.certified).sum()),
        }
    return {"n_inputs": 64**4, "slack": truth.slack, "proofs": rows}


def main() -> None:
    started = time.time()
    result: dict[str, Any] = {"factor": 2.0, "limit": LIMIT, "reach": REACH, "boxes": []}
    steps = (("finite", finite), ("maximum", maximum))
    for name, step in steps:
        result[name] = step()
        save("certificates", dict(result), started, "python -m benchmarks.certificates")
    for room in REACH:
        for row in boxes(room):
            result["boxes"].append(row)
            save("certificates", dict(result), started, "python -m benchmarks.certificates")


if __name__ == "__main__":
    main()
