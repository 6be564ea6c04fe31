"""What a circuit is: a graph with few edges left, and what is needed to test it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from unweave.ablation import Replacement
from unweave.circuits.division import edge_numbers
from unweave.graph import Edge, Graph
from unweave.scope import Scope
from unweave.scoring import EdgeScores

__all__ = ["Circuit", "Trial", "connected"]


class Trial(NamedTuple):
    """One candidate that the search measured: how many edges, and how many nats it is away on the search data."""

    n_edges: int
    nats: float


@dataclass(frozen=True, eq=False)
class Circuit:
    """A part of a network that stands for the whole within a scope.

    Attributes:
        graph: the network with every other edge ablated; runs, saves and draws like any graph.
        original: the whole network.
        kept: the circuit's edges, over (ports, writers).
        scope: the signal that it explains.
        instead: what its ablated edges carry.
        scores: of the original's edges, which guided the search.
        nats: measured on the search data: the divergence from the original, per token of the scope.
        empty_nats: the same when every edge is ablated.
        trials: every candidate measured, in order.
    """

    graph: Graph
    original: Graph
    kept: Bool[Tensor, "ports writers"]
    scope: Scope
    instead: Replacement
    scores: EdgeScores
    nats: float
    empty_nats: float
    trials: tuple[Trial, ...] = ()

    @property
    def n_edges(self) -> int:
        """How many edges are left."""
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The circuit's edges."""
        return self.original.name_edges(self.kept)

    @property
    def n_numbers(self) -> int:
        """Dimensions written times dimensions read, summed over the edges: the size of their virtual weights."""
        return edge_numbers(self.original, self.edges)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that its edges join, in execution order."""
        ends = {end for edge in self.edges for end in (edge.src, edge.dst)}
        return tuple(n for n in self.original.nodes if n in ends)

    @property
    def faithfulness(self) -> float:
        """1 - nats / empty_nats on the search data; see :func:`unweave.prove` for held-out data with intervals."""
        return 1.0 - self.nats / self.empty_nats if self.empty_nats > 0 else 1.0

    def __repr__(self) -> str:
        share = self.n_edges / max(self.original.n_edges, 1)
        return f"Circuit({self.n_edges} edges, {share:.2%} of the graph, {len(self.nodes)} nodes, {self.nats:.3g} nats)"


def connected(graph: Graph, keep: Bool[Tensor, "ports writers"], *, fed: bool = True) -> Bool[Tensor, "ports writers"]:
    """The edges of ``keep`` that lie on a path, within ``keep``, from an input to the output.

    Args:
        fed: False asks only for a path to the output: a node that hears constants alone still writes a constant,
            which an edge out of it carries (positions, where what is replaced has the same positions).

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> lonely = graph.mark_edges(["embed->blocks.0.attn.head.0.q"])
        >>> int(connected(graph, lonely).sum())
        0
    """
    keep = keep & graph.edge_matrix
    writer_at = {name: i for i, name in enumerate(graph.writers)}
    speaks, useful = (torch.full((len(graph.writers),), not fed), torch.zeros(len(graph.writers), dtype=torch.bool))
    rows = {node: _rows(graph, s, i) for s, stage in enumerate(graph.stages) for i, node in enumerate(stage.nodes)}
    for name, i in writer_at.items():
        inputs = rows[name]
        speaks[i] |= not inputs or bool((keep[inputs] & speaks).any())
    for name in reversed(graph.nodes):
        if name not in writer_at or bool(useful[writer_at[name]]):
            useful |= keep[rows[name]].any(0)
    alive = torch.zeros(len(graph.ports), dtype=torch.bool)
    for name, inputs in rows.items():
        alive[inputs] = name not in writer_at or bool(useful[writer_at[name]])
    return keep & alive[:, None] & speaks[None]


def _rows(graph: Graph, s: int, i: int) -> list[int]:
    return [graph.port_starts[s, port.name] + i for port in graph.stages[s].ports]
