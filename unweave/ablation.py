"""What an ablated edge carries instead of what its writer writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import InputError, ShapeError
from unweave.execution import Trace, check_inputs, trace, uncut
from unweave.graph import Edge, Graph

__all__ = [
    "CORRUPTED",
    "KINDS",
    "Means",
    "Replacement",
    "counterfactual_trace",
    "pair_at_random",
    "batch_trace",
]

KINDS = ("mean", "mean per position", "zero", "resample", "counterfactual")
Means = Mapping[str, Tensor]

# the label of a data set that holds, for every sequence, another input of the same shape
CORRUPTED = "corrupted"


@dataclass(frozen=True, eq=False)
class Replacement:
    """What ablated edges carry.

    Attributes:
        kind: "mean" (over all positions), "mean per position", "zero", or what the writer writes on another input:
            a random sequence of the data ("resample") or each sequence's own corrupted partner ("counterfactual").
        means: what each writer writes on average; None where another input is run.
    """

    kind: str
    means: Means | None = None

    def cut(self, graph: Graph, keep: Bool[Tensor, "ports writers"]) -> Graph:
        """The graph with the edges not in ``keep`` ablated."""
        return graph.restrict(keep, ablation=self._verb, means=self.means)

    def narrow(self, graph: Graph, projections: Mapping[Edge | str, tuple[Tensor, Tensor]]) -> Graph:
        """The graph with edges that carry a few dimensions, the rest of each ablated."""
        return graph.narrow(projections, ablation=self._verb, means=self.means)

    @property
    def _verb(self) -> Literal["mean", "zero", "resample"]:
        if self.kind == "zero":
            return "zero"
        return "resample" if self.means is None else "mean"

    def paired(self, data: TokenData, seed: int = 0) -> TokenData:
        """The data with the partners that this kind draws; what a circuit cut by it has to be run on."""
        return pair_at_random(data, seed) if self.kind == "resample" else data

    def sent(self, graph: Graph, batch: Batch, other: Trace | None = None) -> list[Float[Tensor, "node #batch #pos d"]]:
        """By stage, what each node sends over its ablated edges (``other``: the partners' run, if known already)."""
        stages = graph.stages[:-1]
        if self.means is not None:
            n_pos = batch.inputs.shape[1]
            return [torch.stack([self.means[n][:n_pos] for n in stage.nodes])[:, None] for stage in stages]
        other = other or counterfactual_trace(graph, batch)
        return [rearrange(other.node_writes(s), "b n t d -> n b t d") for s in range(len(stages))]


def counterfactual_trace(graph: Graph, batch: Batch) -> Trace:
    """The uncut graph's run on each sequence's partner.

    Raises:
        InputError: the data has no partners.
        ShapeError: they are not of the inputs' shape.
    """
    if CORRUPTED not in batch.labels:
        raise InputError(
            f"this ablation needs another input for every sequence: a label {CORRUPTED!r} of the data with ids of the "
            'same shape; or use ablation="resample", "mean" or "zero"'
        )
    other = batch.labels[CORRUPTED][:, : batch.inputs.shape[1]]
    if other.shape != batch.inputs.shape:
        raise ShapeError(f"corrupted inputs must be {tuple(batch.inputs.shape)}, got {tuple(other.shape)}")
    other = other.to(batch.inputs.dtype)
    return trace(uncut(graph), check_inputs(graph, other, batch.mask), apart=True)


def pair_at_random(data: TokenData, seed: int = 0) -> TokenData:
    """The data with another of its sequences as every sequence's partner; partners of padded data differ in length.

    Raises:
        InputError: fewer than two sequences.
    """
    n = len(data)
    if n < 2:
        raise InputError(f"resampling needs at least two sequences, got {n}")
    # a cyclic shift of a random order pairs no sequence with itself
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return dataclasses.replace(data, labels={**data.labels, CORRUPTED: data.tokens[partner]})


def batch_trace(graph: Graph, batch: Batch, *, keep: bool = False, other: Trace | None = None) -> Trace:
    """Run a graph on a batch; cut edges that carry another input get it from the batch's label.

    Args:
        other: the partners' run, if known already: all cuts of one graph share it.
    """
    if graph.resample:
        other = other or counterfactual_trace(graph, batch)
    else:
        other = None
    return trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=keep, counterfactual=other)
