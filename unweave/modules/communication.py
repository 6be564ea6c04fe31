"""Who talks to whom: the nats and the dimensions that travel from every node to every later one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.ablation import Means, Replacement
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import Trace, check_inputs, trace
from unweave.graph import Graph
from unweave.modules.cells import (
    cell_layers,
    cell_names,
    felt_values,
    read_maps,
    stage_cells,
    standardised,
    written_maps,
    written_values,
)
from unweave.modules.directions import DirectionMeasure, Directions, directions_from, shared_dimensions, stage_pairs
from unweave.scope import Scope
from unweave.scoring import edge_products
from unweave.statistics import FisherPass, Gradients, Sums, Tally, accumulate, collect_means

__all__ = ["Communication", "measure_communication", "talk"]

# numbers in one table of products between coordinates; bounds memory, not the result
NUMBERS_AT_ONCE = 1 << 24
# of what the busiest node says: below it is what rounding leaves
LEAST_SHARE = 1e-9


@dataclass(frozen=True, eq=False)
class Communication:
    """Who talks to whom.

    Attributes:
        nodes: names, in execution order: all of ``graph.nodes``, or ``NODE.code[i]`` where nodes were split.
        nats: nats[j, i]: what all that j reads of what i writes is worth, all ports of j together, in nats per
            token; 0 where there is no edge.
        dimensions: dimensions[j, i]: in how many dimensions of the stream i talks to j (a participation ratio); 0
            where there is no edge.
        layer: the graph's layer of each node.

    Raises:
        ShapeError: the tables do not fit the nodes.
        InputError: a negative or not finite number, or a name twice.
    """

    nodes: tuple[str, ...]
    nats: Float[Tensor, "nodes nodes"]
    dimensions: Float[Tensor, "nodes nodes"]
    layer: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.nodes)
        for name, table in (("nats", self.nats), ("dimensions", self.dimensions)):
            if tuple(table.shape) != (n, n):
                raise ShapeError(f"{name} of {n} nodes must have shape {(n, n)}, got {tuple(table.shape)}")
            if not bool((torch.isfinite(table) & (table >= 0)).all()):
                raise InputError(f"{name} must be finite and not negative; set them to 0 where there is no edge")
        if len(self.layer) != n or len(set(self.nodes)) != n:
            raise InputError(f"{n} nodes need {n} different names and as many layers, got {len(self.layer)} layers")

    def symmetric(self) -> Float[Tensor, "nodes nodes"]:
        """Undirected weights: nats[j, i] + nats[i, j], whichever of the two writes."""
        return self.nats + self.nats.T

    def relative(self) -> Communication:
        """The same graph with nodes that weigh alike: 1/2 ln(1 + s), s[j, i] = nats[j, i] / sqrt(heard_j said_i).

        heard_j is all that j hears and said_i all that i says, in nats; s is 1 where i talks to j alone and j hears i
        alone. 1/2 ln(1 + s) nats are what a Gaussian channel of this signal-to-noise ratio carries. What a network is
        worth in all plays no part, so a saturated one, whose Fisher information vanishes, loses nothing; and neurons
        that do little say as clearly as busy ones with whom they work. A node that says (or hears) less than 1e-9 of
        what the busiest does says nothing.

        Example:
            >>> told = Communication(("a", "b"), torch.tensor([[0, 0], [1e-4, 0]]), torch.zeros(2, 2), (0, 1))
            >>> told.relative().nats
            tensor([[0.0000, 0.0000],
                    [0.3466, 0.0000]])
        """
        nats = self.nats.double()
        heard, said = (torch.where(x > LEAST_SHARE * x.max(), x, math.inf) for x in (nats.sum(1), nats.sum(0)))
        share = nats / (heard[:, None].sqrt() * said.sqrt())
        return dataclasses.replace(self, nats=(0.5 * torch.log1p(share)).to(self.nats))

    @cached_property
    def place(self) -> dict[str, int]:
        """The row of every node."""
        return {name: i for i, name in enumerate(self.nodes)}

    def between(self, src: str, dst: str) -> tuple[float, float]:
        """(nats, dimensions) that travel from one node to another.

        Raises:
            UnknownNameError: no such node.
        """
        for name in (src, dst):
            if name not in self.place:
                raise UnknownNameError("node", name, self.nodes)
        at = self.place[dst], self.place[src]
        return float(self.nats[at]), float(self.dimensions[at])

    def table(self, k: int | None = None) -> list[dict[str, Any]]:
        """The k strongest pairs as plain rows: src, dst, nats, dimensions."""
        pairs = (self.nats > 0).nonzero()
        order = self.nats[pairs[:, 0], pairs[:, 1]].argsort(descending=True, stable=True)[:k]
        return [
            {
                "src": self.nodes[i],
                "dst": self.nodes[j],
                "nats": float(self.nats[j, i]),
                "dimensions": float(self.dimensions[j, i]),
            }
            for j, i in pairs[order].tolist()
        ]


def measure_communication(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    level: str = "node",
    means: Means | None = None,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> Communication:
    """The communication graph: nats and shared dimensions of every pair of nodes.

    nats[j, i] = 1/2 E[(sum over ports of j and positions of g . (y_i - m_i))^2] per token, with g the gradient at what
    the port hears under a random cotangent with the Fisher information of the output, y_i what i writes and m_i its
    mean: to second order, the KL if j heard the mean of i at all its ports. (Not the sum over ports of their scores:
    q, k and v of one head may do the same work, or undo each other's.)

    dimensions[j, i] = (sum of s^2)^2 / (sum of s^4), s the singular values of the virtual weight from i to j as
    weighted by both ends, B_j A_i: A_i A_i^T is the covariance of y_i, and B_j^T B_j the second moment of g over all
    ports of j. One line through the stream counts 1, k equally strong ones k.

    Args:
        level: "node": the graph's nodes. "dimension": neurons, features of real inputs, and outputs of networks that
            read reals are nodes of their own, called ``NODE.code[i]``; heads and embeddings, whose coordinates have no
            meaning of their own, stay whole. (The same as "node" on a graph refined into neurons, inputs and outputs
            apart, but for less time and memory.)
        means: what each writer writes on average, for level "node"; collected here (one more forward pass) if missing.
        samples: cotangents per sequence.
        batch_size: sequences per pass.
        seed: of the cotangents.
        checkpoint: a file that lets a killed pass resume.

    Returns:
        :class:`Communication`, on the CPU.

    Raises:
        InputError: an unknown level, fewer than one sample, more than 4096 nodes, or level "dimension" of a graph with
            cut edges or neurons that write through a norm.
        EmptyDataError: the scope selects no position.

    Cost:
        Two forward and ``samples`` backward passes. Level "node": products as in :func:`unweave.score_edges`. Level
        "dimension": per sequence, positions x coordinates x coordinates. Memory: nodes x nodes, and for the dimensions
        a square matrix per node of its reads and of its code (d_model at most).

    Exact?
        nats: the second-order term of the KL, estimated from so many cotangents: a pair's relative standard error is
        about sqrt(2 / (samples x sequences)) or less. dimensions: g and y are taken to be independent and positions to
        be alike, and a norm's scale counts but not what it takes away along the stream itself; a pair of which some
        ports are cut counts them all.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> row = measure_communication(graph, data, unweave.Scope(positions="answered"), samples=1).table(1)[0]
        >>> row["src"], row["dst"], row["dimensions"] > 1
        ('embed', 'blocks.1.attn.head.1', True)

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (the stream as a channel and virtual
        weights); Merullo et al. 2024, "Talking Heads" (heads that talk through low-rank subspaces).
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "checkpoint": checkpoint}
    nats, found = talk(graph, data, scope, level=level, means=means, samples=samples, seed=seed, **options)
    nodes = cell_names(graph, level)
    dimensions = torch.zeros(nats.shape, dtype=torch.float64)
    at = _stage_slices(graph, level)
    for s, z in stage_pairs(graph):
        written, felt = found.written[z], found.felt[s]
        assert written is not None
        assert felt is not None
        dimensions[at[s], at[z]] = shared_dimensions(written, felt).cpu()
    dimensions = torch.where(nats > 0, dimensions, 0.0)
    return Communication(nodes, nats.float(), dimensions.float(), cell_layers(graph, level))


def talk(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    level: str = "node",
    means: Means | None = None,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> tuple[Float[Tensor, "nodes nodes"], Directions]:
    """The nats of :func:`measure_communication` in float64, and the directions behind its dimensions, from one pass."""
    cell_names(graph, level)
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    scope = scope or Scope()
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    measure: _NodeMeasure | _DimensionMeasure
    if level == "node":
        measure = _NodeMeasure(scope, Replacement("mean", means or collect_means(graph, data, **options)))
    else:
        measure = _DimensionMeasure(scope, _mean_values(graph, data, level, **options))
    step = FisherPass(graph, scope, samples, seed, (measure, DirectionMeasure(scope, level)))
    identity = (
        "communication",
        level,
        samples,
        seed,
        graph,
        scope,
        *(() if means is None else (Replacement("mean", means),)),
    )
    sums = accumulate(data, step, description="communication", identity=identity, checkpoint=checkpoint, **options)
    if float(sums["scoped"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set; choose positions within its sequences")
    return (sums["nats"] / sums["scoped"]).cpu(), directions_from(graph, sums, level)


def _stage_slices(graph: Graph, level: str) -> list[slice]:
    """The rows of each stage's cells."""
    out, start = [], 0
    for stage in graph.stages:
        count = len(stage_cells(graph, stage, level))
        out.append(slice(start, start + count))
        start += count
    return out


# ---- nodes: the edges' products, summed over the ports of a node ------------------------------------------


@dataclass(frozen=True)
class _NodeMeasure:
    scope: Scope
    instead: Replacement

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        return _NodeTally(t, self.instead.sent(t.graph, batch))


@dataclass
class _NodeTally:
    t: Trace
    sent: list[Tensor]
    gathered: list[Tensor] = field(default_factory=list)

    def add(self, gradients: Gradients) -> None:
        graph = self.t.graph
        products = edge_products(self.t, self.sent, gradients) * graph.edge_matrix.to(graph.device)
        by_node = products.new_zeros(len(products), len(graph.nodes), len(graph.writers))
        by_node.index_add_(1, _node_of_port(graph).to(graph.device), products)
        self.gathered.append(0.5 * by_node.double().square().sum(0))

    def sums(self) -> Sums:
        graph = self.t.graph
        nats = self.gathered[0].new_zeros(len(graph.nodes), len(graph.nodes))
        # the output is last and writes nothing
        nats[:, : len(graph.writers)] = torch.stack(self.gathered).mean(0)
        return {"nats": nats}


def _node_of_port(graph: Graph) -> Int[Tensor, " ports"]:
    """The row in ``graph.nodes`` of every port's node."""
    starts = _stage_slices(graph, "node")
    rows = [torch.arange(at.start, at.stop) for at, s in zip(starts, graph.stages, strict=True) for _ in s.ports]
    return torch.cat(rows)


# ---- dimensions: products between coordinates --------------------------------------------------------------


def _mean_values(graph: Graph, data: TokenData, level: str, **options: Any) -> list[Float[Tensor, "cell width"]]:
    """By stage, the mean over real tokens of what the cells write, in their coordinates."""

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        real = batch.mask.to(graph.device, torch.float64)
        stages = range(len(graph.stages) - 1)
        values = {str(s): torch.einsum("bntw,bt->nw", written_values(t, s, level).double(), real) for s in stages}
        return {"tokens": real.sum(), **values}

    sums = accumulate(data, step, description="means", **options)
    return [(sums[str(s)] / sums["tokens"]).float() for s in range(len(graph.stages) - 1)]


@dataclass(frozen=True)
class _DimensionMeasure:
    scope: Scope
    means: list[Tensor]

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        return _DimensionTally(t, self.means, _stage_slices(t.graph, "dimension"))


@dataclass
class _DimensionTally:
    """Sum over positions of g_k . w_l c_l, for every read coordinate k and every written coordinate l.

    With a the gradient at read k, f_k its row and w_l what one unit of code l writes, and n, s the stream and scale of
    the norm, the gradient at the stream is s a (f_k - n (n . f_k) / d); so the sum is (f_k . w_l) (sum of s a c_l) -
    sum of s a (n . f_k) (n . w_l) c_l / d: two products over positions, and no vector of length d.
    """

    t: Trace
    means: list[Tensor]
    at: list[slice]
    gathered: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        n = self.at[-1].stop
        out = torch.zeros(n, n, dtype=torch.float64, device=self.t.graph.device)
        for s, stage in enumerate(self.t.graph.stages):
            if stage.ports:
                heard = slice(self.at[stage.visible[0]].start, self.at[stage.visible[1] - 1].stop)
                out[self.at[s], heard] = self._stage(s, gradients)
        self.gathered.append(out)

    def sums(self) -> Sums:
        return {"nats": torch.stack(self.gathered).mean(0)}

    def _stage(self, s: int, gradients: Gradients) -> Float[Tensor, "readers writers"]:
        graph = self.t.graph
        visible = range(*graph.stages[s].visible)
        maps = [written_maps(graph, z, "dimension") for z in visible]
        values = [written_values(self.t, z, "dimension") - self.means[z][:, None] for z in visible]
        weight = torch.cat([m.flatten(0, 1) for m in maps])
        codes = torch.cat([v.transpose(2, 3).flatten(1, 2) for v in values], 1)
        owner = torch.cat(
            [_owners(m, self.at[z].start - self.at[visible[0]].start) for m, z in zip(maps, visible, strict=True)]
        )
        readers, writers = self.at[s].stop - self.at[s].start, int(owner.max()) + 1
        reads = list(zip(felt_values(self.t, s, gradients, "dimension"), read_maps(graph, s, "dimension"), strict=True))
        rows = max(m.shape[0] * m.shape[1] for _, m in reads)
        total = torch.zeros(readers, writers, dtype=torch.float64, device=graph.device)
        for some in torch.arange(len(codes)).split(max(1, NUMBERS_AT_ONCE // (rows * len(weight)))):
            product = codes.new_zeros(len(some), readers, writers)
            for (port, felt), read in reads:
                normed = None if port.norm is None else standardised(self.t, s, port)[0][some, 0]
                pairs = _coordinate_products(felt[some], read, codes[some], weight, normed)
                product.index_add_(2, owner, pairs)
            total += 0.5 * product.double().square().sum(0)
        return total


def _owners(maps: Float[Tensor, "cell width d_model"], start: int) -> Int[Tensor, " coordinates"]:
    return start + torch.arange(len(maps), device=maps.device).repeat_interleave(maps.shape[1])


def _coordinate_products(
    felt: Float[Tensor, "batch reader pos width"],
    read: Float[Tensor, "reader width d_model"],
    codes: Float[Tensor, "batch coordinate pos"],
    weight: Float[Tensor, "coordinate d_model"],
    normed: Float[Tensor, "batch pos d_model"] | None,
) -> Float[Tensor, "batch reader coordinate"]:
    """For every reader and every written coordinate, the sum over its reads and positions."""
    virtual = torch.einsum("rwd,ld->rwl", read, weight)
    out = torch.einsum("brtw,blt,rwl->brl", felt, codes, virtual)
    if normed is not None:
        along = torch.einsum("brtw,rwd,btd->brt", felt, read, normed)
        written = torch.einsum("btd,ld,blt->blt", normed, weight, codes)
        out -= torch.einsum("brt,blt->brl", along, written) / normed.shape[-1]
    return out
