"""What a circuit has to show on data that its search has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from unweave.circuits.circuit import Circuit
from unweave.circuits.curve import faithfulness_of
from unweave.circuits.distance import Prompts, per_prompt
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap_ratio
from unweave.scoring import EdgeScores, measure_edges

__all__ = ["Proof", "prove", "random_edges"]


@dataclass(frozen=True, eq=False)
class Proof:
    """Faithfulness, completeness and minimality of a circuit, against random circuits of its size.

    Attributes:
        nats: divergence from the whole graph, nats per token of the scope.
        faithfulness: see :func:`faithfulness_of`.
        agreement: how often both put the same output first.
        empty_nats: divergence of the empty circuit.
        random_nats: divergence of random circuits with as many edges.
        p_random: (1 + random circuits at least as close) / (1 + random circuits).
        incompleteness: for random sets K of the circuit's edges, |f(circuit without K) - f(whole without K)|.
        own_effects: of each edge of the circuit, inside the circuit: nats per token when it alone is ablated.
        n_prompts, n_tokens: on how much data.
    """

    nats: Estimate
    faithfulness: Estimate
    agreement: Estimate
    empty_nats: float
    random_nats: tuple[float, ...]
    p_random: float
    incompleteness: tuple[float, ...]
    own_effects: EdgeScores
    n_prompts: int
    n_tokens: int

    def table(self) -> list[dict[str, Any]]:
        """The proof as plain rows: what, value, low, high, unit."""
        own = self.own_effects.nats[self.own_effects.graph.edge_matrix].numpy()
        intervals = (
            ("divergence, nats per token", self.nats, "nats"),
            ("faithfulness", self.faithfulness, "share"),
            ("top-1 agreement", self.agreement, "share"),
        )
        rest = (
            ("nats of the empty circuit", self.empty_nats, "nats"),
            ("nats of random circuits, median", _median(self.random_nats), "nats"),
            ("nats of random circuits, closest", min(self.random_nats, default=float("nan")), "nats"),
            ("share of random circuits as close (p)", self.p_random, "share"),
            ("incompleteness, mean", _mean(self.incompleteness), "share"),
            ("incompleteness, largest", max(self.incompleteness, default=float("nan")), "share"),
            ("own effect of an edge, smallest", float(own.min(initial=np.inf)), "nats"),
            ("own effect of an edge, median", _median(tuple(own.tolist())), "nats"),
        )
        rows: list[dict[str, Any]] = [{"what": name, **e._asdict(), "unit": unit} for name, e, unit in intervals]
        return rows + [{"what": n, "value": v, "low": None, "high": None, "unit": unit} for n, v, unit in rest]


def _mean(values: tuple[float, ...]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _median(values: tuple[float, ...]) -> float:
    return float(np.median(values)) if values else float("nan")


def prove(
    circuit: Circuit,
    data: TokenData,
    *,
    n_random: int = 20,
    n_subsets: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Proof:
    """Test a circuit on held-out prompts.

    - Faithful: close to the whole graph, and closer than random circuits with as many edges.
    - Complete: without a random set K of its edges (a tenth to nine tenths of them), it is as broken as the whole
      graph without K; a circuit that left out a backup path is not. incompleteness = |f(C - K) - f(M - K)|.
    - Minimal: every edge has an effect of its own inside the circuit.

    Args:
        data: prompts that the search has not seen; with the label "corrupted" where the ablation needs it.
        n_random, n_subsets: how many random circuits, and random sets K.

    Returns:
        :class:`Proof`.

    Raises:
        InputError: the circuit is empty.
        EmptyDataError: the scope selects no position.

    Cost:
        n_random + 2 n_subsets + (edges of the circuit) / 2 forward passes.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> found, held_out = unweave.load_data("zoo:induction", limit=64).split(held_out=0.5)
        >>> circuit = unweave.find_circuit(graph, found, unweave.Scope(positions="answered"), faithfulness=0.9)
        >>> proof = unweave.prove(circuit, held_out)
        >>> proof.nats.value < proof.empty_nats
        True

    Source:
        Wang et al. 2023 (faithfulness, completeness, minimality of the IOI circuit).
    """
    if circuit.n_edges == 0:
        raise InputError("the circuit has no edge: there is nothing to prove")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    data = circuit.instead.paired(data, seed)
    whole, generator = circuit.original, torch.Generator().manual_seed(seed)

    def cut(keep: Tensor) -> Graph:
        return circuit.instead.cut(whole, keep)

    graphs = {"circuit": circuit.graph, "empty": cut(torch.zeros_like(circuit.kept))}
    for i in range(n_random):
        graphs[f"random {i}"] = cut(random_edges(whole, circuit.n_edges, generator))
    for i in range(n_subsets):
        gone = circuit.kept & (torch.rand(circuit.kept.shape, generator=generator) < (i + 0.5) / n_subsets)
        graphs[f"circuit without {i}"] = circuit.instead.cut(circuit.graph, circuit.kept & ~gone)
        graphs[f"whole without {i}"] = cut(whole.edge_matrix & ~gone)
    measured = per_prompt(graphs, whole, data, circuit.scope, description="proving the circuit", **options)
    own = measure_edges(circuit.graph, data, circuit.scope, circuit.kept, circuit.instead, **options)
    return _summary(circuit, measured, own, n_random, n_subsets, seed)


def _summary(
    circuit: Circuit, measured: dict[str, Prompts], own: EdgeScores, n_random: int, n_subsets: int, seed: int
) -> Proof:
    full, empty, own_row = measured["original"], measured["empty"], measured["circuit"]

    def f(name: str) -> float:
        return faithfulness_of(full, measured[name], empty, circuit.scope, seed).value

    nats = {name: row.nats.sum() / row.tokens.sum() for name, row in measured.items()}
    random = tuple(float(nats[f"random {i}"]) for i in range(n_random))
    as_close = sum(value <= nats["circuit"] for value in random)
    gaps = tuple(abs(f(f"circuit without {i}") - f(f"whole without {i}")) for i in range(n_subsets))
    return Proof(
        bootstrap_ratio(own_row.nats, own_row.tokens, seed),
        faithfulness_of(full, own_row, empty, circuit.scope, seed),
        bootstrap_ratio(own_row.same, own_row.tokens, seed),
        float(nats["empty"]),
        random,
        float((1 + as_close) / (1 + n_random)),
        gaps,
        own,
        len(full.tokens),
        int(full.tokens.sum()),
    )


def random_edges(graph: Graph, n: int, generator: torch.Generator) -> Bool[Tensor, "ports writers"]:
    """n edges of a graph, drawn at random."""
    places = graph.edge_matrix.nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[:n]]
    keep = torch.zeros_like(graph.edge_matrix)
    keep[chosen[:, 0], chosen[:, 1]] = True
    return keep
