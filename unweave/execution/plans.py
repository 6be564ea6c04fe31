"""What can be worked out once per graph: padded reads, shared sums, edge tables."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.graph import Graph, Port, Read, Stage
from unweave.ops import (
    BlockMap,
    Dense,
    DenseBlocks,
    FeatureCore,
    Identity,
    LinearMap,
    LowRank,
    Norm,
    Placed,
    Places,
    RMSNorm,
)

__all__ = ["Plan", "PortPlan", "StagePlan", "plan_of", "write_each"]


@dataclass(frozen=True)
class ReadPlan:
    """A read with its blocks padded to one width."""

    map: LinearMap
    bias: Float[Tensor, "blocks width"] | None
    blocks: int
    width: int
    copies: int

    @cached_property
    @torch.inference_mode(False)  # kept for later runs, which may need gradients
    def per_node(self) -> tuple[LinearMap | None, Float[Tensor, "nodes d width"]]:
        """(what all nodes apply first, each node's own matrix): the same read, for inputs that differ by node."""
        first, last = (self.map.right, self.map.left) if isinstance(self.map, LowRank) else (None, self.map.dense())
        weight = rearrange(last, "(b w) d -> b d w", b=self.blocks)
        return first, weight.repeat_interleave(self.copies, 0) if self.copies > 1 else weight

    def folded(self, norm: Norm | None) -> Float[Tensor, "nodes width d"]:
        """Each node's own matrix with the norm's gain multiplied in: what gradients flow back through."""
        first, weight = self.per_node
        weight = weight.transpose(1, 2)
        weight = weight if first is None else weight @ first.dense()
        return weight if norm is None else norm.fold(weight)

    def shared(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch block pos width"]:
        """The read of one input that all nodes share."""
        out = self.map.apply(x)
        if self.bias is not None:
            out = out + self.bias.flatten()
        return rearrange(out, "b t (n w) -> b n t w", n=self.blocks)

    @property
    def in_blocks(self) -> bool:
        """Whether the map knows what each node reads."""
        return isinstance(self.map, BlockMap) and self.map.blocks == self.blocks

    def _by_blocks(self, x: Float[Tensor, "batch row pos d"], nodes: Int[Tensor, " row"]) -> Tensor:
        assert isinstance(self.map, BlockMap)
        nodes = nodes // self.copies
        out = self.map.apply_blocks(x.transpose(1, 2), nodes).transpose(1, 2)
        return out if self.bias is None else out + self.bias[nodes][:, None]

    def pull(self, g: Float[Tensor, "batch node pos width"]) -> Float[Tensor, "batch node pos d"]:
        """Gradients at what each node reads, back at what it hears."""
        if self.in_blocks:
            assert isinstance(self.map, BlockMap)
            nodes = torch.arange(g.shape[1], device=g.device) // self.copies
            return self.map.pull(g.transpose(1, 2), nodes).transpose(1, 2)
        return g @ self.folded(None).to(g)

    def apart_for(self, x: Float[Tensor, "batch row pos d"], nodes: Int[Tensor, " row"]) -> Tensor:
        """Row r read as node ``nodes[r]`` would."""
        if self.in_blocks:
            return self._by_blocks(x, nodes)
        if self.blocks == 1:
            out = self.map.apply(x)
            return out if self.bias is None else out + self.bias.flatten()
        first, weight = self.per_node
        out = (first.apply(x) if first is not None else x) @ weight[nodes]
        return out if self.bias is None else out + self.bias[nodes // self.copies][:, None]

    def apart(self, x: Float[Tensor, "batch row pos d"], row_of: Int[Tensor, " nodes"]) -> Tensor:
        """The reads of inputs that differ: node n reads row ``row_of[n]``."""
        if self.in_blocks:
            x = x if x.shape[1] == len(row_of) else x[:, row_of]
            return self._by_blocks(x, torch.arange(len(row_of), device=x.device))
        if self.blocks == 1:
            out = self.shared(rearrange(x, "b r t d -> (b r) t d"))
            out = rearrange(out, "(b r) 1 t w -> b r t w", r=x.shape[1])
            return out if x.shape[1] == len(row_of) else out[:, row_of]
        first, weight = self.per_node
        x = first.apply(x) if first is not None else x
        x = x if x.shape[1] == len(row_of) else x[:, row_of]
        # at one position, a product of stacks would copy the matrices once for each of the batch
        out = torch.einsum("bntd,ndw->bntw", x, weight) if x.shape[2] == 1 else x @ weight
        if self.bias is not None:
            out = out + self.bias.repeat_interleave(self.copies, 0)[:, None]
        return out


@dataclass(frozen=True)
class PortPlan:
    """Which distinct sums the nodes of a port need.

    ``table`` is None when every node hears everything and nothing was left in place of a cut edge. ``norm`` is one
    object for all ports of a stage that normalise alike. Where every writer has a place of its own, cut edges are zeros
    in ``masked`` (with what they leave in the bias) and no sums are needed; ``gone`` reads them alone, from another
    input.
    """

    port: Port
    norm: Norm | None
    reads: tuple[ReadPlan, ...]
    table: Bool[Tensor, "row writers"] | None
    row_of: Int[Tensor, " nodes"]
    offset: Float[Tensor, "row #pos d"] | None
    masked: tuple[ReadPlan, ...] | None = None
    gone: tuple[ReadPlan, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether its nodes may hear different sums."""
        return self.table is not None or self.offset is not None


@dataclass(frozen=True)
class StagePlan:
    """A stage ready to run."""

    stage: Stage
    ports: tuple[PortPlan, ...]
    write: LinearMap | None
    each_needed: bool
    codes_needed: bool
    places: Places | None

    @cached_property
    @torch.inference_mode(False)
    def table(self) -> Bool[Tensor, "row writers"] | None:
        """The tables of all ports that have one, so that one product makes all their sums."""
        tables = [port.table for port in self.ports if port.table is not None]
        return torch.cat(tables) if tables else None

    @cached_property
    @torch.inference_mode(False)
    def joint_rows(self) -> tuple[Int[Tensor, "ports row"], Int[Tensor, " nodes"]] | None:
        """(of each port, the rows that nodes hear together; of each node, which of these), where the core can be
        computed once for all nodes that hear the same."""
        if not isinstance(self.stage.core, FeatureCore) or self.stage.positions is not None or not self.ports:
            return None
        together, of_node = torch.stack([port.row_of for port in self.ports]).unique(dim=1, return_inverse=True)
        return together, of_node

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows of :attr:`table` each of those ports has."""
        return tuple(len(port.table) for port in self.ports if port.table is not None)

    @cached_property
    @torch.inference_mode(False)
    def node_write(self) -> Float[Tensor, "nodes width d_model"]:
        """Each node's own write matrix, padded."""
        assert self.write is not None
        return rearrange(self.write.dense(), "d (n w) -> n w d", n=len(self.stage.nodes))


@dataclass(frozen=True)
class Plan:
    """A graph ready to run (it does not hold the graph, so that plans die with their graphs)."""

    stages: tuple[StagePlan, ...]


_PLANS: weakref.WeakKeyDictionary[Graph, Plan] = weakref.WeakKeyDictionary()


def plan_of(graph: Graph) -> Plan:
    """The plan of a graph, made once and kept as long as the graph lives (not while factors are trained)."""
    if any(t.requires_grad for t in graph.tensors):
        return _make_plan(graph)
    if graph not in _PLANS:
        _PLANS[graph] = _make_plan(graph)
    return _PLANS[graph]


@torch.inference_mode(False)
def _make_plan(graph: Graph) -> Plan:
    places = [_places(graph.stages[slice(*stage.visible)]) for stage in graph.stages]
    ports = [
        tuple(_plan_port(stage, port, places[s], graph.resample) for port in stage.ports)
        for s, stage in enumerate(graph.stages)
    ]
    each = _stages_heard(graph, ports, lambda port: port.table is not None and port.masked is None)
    codes = _stages_heard(graph, ports, lambda port: port.masked is not None)
    stages = tuple(
        StagePlan(stage, ports[s], _pad_write(stage), s in each, s in codes, places[s])
        for s, stage in enumerate(graph.stages)
    )
    return Plan(stages)


def _places(heard: Sequence[Stage]) -> Places | None:
    """Where in their sum each of the writers stands; None unless each has a place of its own."""
    found = []
    for stage in heard:
        whole = type(stage.write) is Identity and len(stage.nodes) == 1 == len(heard)
        if not (whole or isinstance(stage.write, Placed)) or any(
            x is not None for x in (stage.positions, stage.post, stage.bias)
        ):
            return None
        at = stage.write.start if isinstance(stage.write, Placed) else 0
        for width in stage.code_widths:
            found.append((at, width))
            at += width
    taken = sorted(found)
    apart = all(a + width <= b for (a, width), (b, _) in pairwise(taken))
    return tuple(found) if found and apart else None


def _alike(a: Norm | None, b: Norm | None) -> bool:
    """Whether two norms are one: the same kind with the very same gain."""
    if a is None or b is None or type(a) is not type(b):
        return a is b
    fields = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]  # type: ignore[arg-type]
    return all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in fields)


def _plan_port(stage: Stage, port: Port, places: Places | None, resample: bool) -> PortPlan:
    norm = next(p.norm for p in stage.ports if _alike(p.norm, port.norm))
    reads = tuple(_pad_read(stage, read) for read in port.reads)
    n = len(stage.nodes)
    if places is not None and norm is None and stage.positions is None:
        reads = tuple(_in_blocks(read, n) for read in reads)
    device = port.edges.device if port.edges is not None else None
    everything = port.edges is None or bool(port.edges.all())
    if everything and port.offset is None:
        return PortPlan(port, norm, reads, None, torch.zeros(n, dtype=torch.long, device=device), None)
    edges = port.edges if port.edges is not None else torch.ones(n, 1, dtype=torch.bool)
    key = edges.to(torch.float32)
    if port.offset is not None:
        key = torch.cat([key, port.offset.flatten(1).float()], dim=1)
    if port.wires is not None:  # what a node hears over its wires is its own
        own = torch.zeros(n, 1, device=device).index_fill_(0, port.wires.nodes, 1.0)
        key = torch.cat([key, own * torch.arange(1, n + 1, device=device)[:, None]], dim=1)
    _, alike = torch.unique(key, dim=0, return_inverse=True)
    if port.offset is not None and port.offset.requires_grad:
        alike = torch.arange(n, device=device)  # constants that are equal now train apart
    # rows in the order of their first nodes: where all nodes differ, row r is node r
    first, row_of = torch.unique((alike[:, None] == alike).int().argmax(1), return_inverse=True)
    table = None if port.edges is None else edges[first]
    offset = None if port.offset is None else port.offset[first]
    masked, gone = _mask_reads(port, reads, places, resample)
    return PortPlan(port, norm, reads, table, row_of, offset, masked, gone)


def _in_blocks(read: ReadPlan, n: int) -> ReadPlan:
    """A read of writers that have places of their own, in a form that knows of them where there is one."""
    if not isinstance(read.map, Dense) or read.blocks != n:
        return read
    return dataclasses.replace(read, map=DenseBlocks(read.map.weight, n))


def _mask_reads(
    port: Port, reads: tuple[ReadPlan, ...], places: Places | None, resample: bool
) -> tuple[tuple[ReadPlan, ...] | None, tuple[ReadPlan, ...]]:
    """(reads with zeros for cut edges and what these leave in their bias, reads of nothing but cut edges)."""
    edges, offset = port.edges, port.offset
    if places is None or port.wires is not None or (offset is not None and offset.shape[1] > 1) or edges is None:
        return None, ()
    masked, gone = [], []
    for read in reads:
        if not isinstance(read.map, BlockMap) or not read.in_blocks or read.blocks != len(edges):
            return None, ()
        kept, cut = read.map.mask(edges, places), read.map.mask(~edges, places) if resample else read.map
        if kept is None or cut is None:
            return None, ()
        bias = read.bias
        if offset is not None:
            left = read.map.apply_blocks(offset[:, 0].to(edges.device), torch.arange(read.blocks, device=edges.device))
            bias = left if bias is None else bias + left
        masked.append(dataclasses.replace(read, map=kept, bias=bias))
        gone.append(dataclasses.replace(read, map=cut, bias=None))
    return tuple(masked), tuple(gone) if resample else ()


def _pad_read(stage: Stage, read: Read) -> ReadPlan:
    """A read whose blocks all have the width of the widest; what is added is always zero."""
    blocks, width = len(read.widths), max(read.widths)
    copies = len(stage.nodes) // blocks
    if min(read.widths) == width:
        bias = None if read.bias is None else rearrange(read.bias, "(b w) -> b w", b=blocks)
        return ReadPlan(_cheapest(read.map), bias, blocks, width, copies)
    device = stage.device
    widths = torch.tensor(read.widths, device=device)[:, None]
    column = torch.arange(width, device=device)
    index = torch.where(column < widths, widths.cumsum(0) - widths + column, -1)
    flat = index.flatten()
    bias = None if read.bias is None else torch.where(index >= 0, read.bias[index.clamp(min=0)], 0.0)
    return ReadPlan(_cheapest(read.map.select_outputs(flat)), bias, blocks, width, copies)


def _cheapest(map_: LinearMap) -> LinearMap:
    """The same map in the form that takes fewest multiplications: one matrix, or two with a narrow code between."""
    if isinstance(map_, LowRank):
        rank = map_.left.shape[1]
        if rank * (map_.d_in + map_.d_out) < map_.d_in * map_.d_out:
            return LowRank(map_.left, Dense(map_.right.dense()))
    return map_ if isinstance(map_, Dense) or map_.keeps_blocks or map_.is_structured else Dense(map_.dense())


def _pad_write(stage: Stage) -> LinearMap | None:
    widths = stage.code_widths
    if stage.write is None or len(set(widths)) == 1:
        return stage.write and _cheapest(stage.write)
    widest, columns = max(widths), stage.write.dense().split(list(widths), dim=1)
    padded = [torch.nn.functional.pad(block, (0, widest - block.shape[1])) for block in columns]
    return Dense(torch.cat(padded, dim=1))


def _stages_heard(graph: Graph, ports: list[tuple[PortPlan, ...]], where: Callable[[PortPlan], bool]) -> set[int]:
    """The stages that a port of some kind hears: their nodes' writes are needed one by one, or their codes."""
    needed = set()
    for stage, plans in zip(graph.stages, ports, strict=True):
        if any(where(plan) for plan in plans):
            needed |= set(range(*stage.visible))
    return needed


def write_each(
    plan: StagePlan, codes: Float[Tensor, "batch node pos width"]
) -> Float[Tensor, "batch node pos d_model"]:
    assert plan.write is not None
    if plan.write.keeps_blocks:
        each = codes
    elif codes.shape[1] == 1:
        each = plan.write.apply(codes)
    elif isinstance(plan.write, Placed):
        places = torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
        each = rearrange(torch.einsum("bntw,nm->bntmw", codes, places), "b n t m w -> b n t (m w)")
        each = plan.write.apply(each)
    else:
        weight = plan.node_write.to(codes)  # an identity's matrix knows no device
        # where texts are short, a product of stacks copies more matrices than codes
        short = codes.shape[2] < weight.shape[2]
        each = torch.einsum("bntw,nwd->bntd", codes, weight) if short else codes @ weight
    post = plan.stage.post
    if post is None:
        return each
    assert isinstance(post, RMSNorm)
    return each * post.scale(each.sum(1, keepdim=True))
