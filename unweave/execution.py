"""Run a graph: the one executor for full, cut and compressed graphs.

Where nothing is cut, all ports of a stage share one residual sum and one matrix product, as in the model
itself. Where edges are cut, ports that hear the same writers share their sum, and all sums of a stage are
one matrix product of its edge table with what was written. There is no loop over edges, heads or tokens.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError, UnknownNameError, UnweaveError
from unweave.graph import Edge, Graph, Port, Read, Stage, at_positions
from unweave.ops import Attention, Context, Dense, LinearMap, LowRank, Norm, RMSNorm

__all__ = [
    "BEFORE",
    "Patch",
    "Run",
    "Trace",
    "check_inputs",
    "finish_stage",
    "plan_of",
    "run",
    "run_stages",
    "trace",
    "uncut",
]

Patch = Tensor | Callable[[Tensor], Tensor]

# "before NODE" names the residual stream that a node's stage finds
BEFORE = "before "


# ---- the plan: what can be worked out once per graph ----------------------------------------------------


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

    def apart_for(self, x: Float[Tensor, "batch row pos d"], nodes: Int[Tensor, " row"]) -> Tensor:
        """Row r read as node ``nodes[r]`` would."""
        if self.blocks == 1:
            out = self.map.apply(x)
            return out if self.bias is None else out + self.bias.flatten()
        first, weight = self.per_node
        out = (first.apply(x) if first is not None else x) @ weight[nodes]
        return out if self.bias is None else out + self.bias[nodes // self.copies][:, None]

    def apart(self, x: Float[Tensor, "batch row pos d"], row_of: Int[Tensor, " nodes"]) -> Tensor:
        """The reads of inputs that differ: node n reads row ``row_of[n]``."""
        first, weight = self.per_node
        x = first.apply(x) if first is not None else x
        x = x if x.shape[1] == len(row_of) else x[:, row_of]
        out = x @ weight
        if self.bias is not None:
            out = out + self.bias.repeat_interleave(self.copies, 0)[:, None]
        return out


@dataclass(frozen=True)
class PortPlan:
    """Which distinct sums the nodes of a port need.

    ``table`` is None when every node hears everything and nothing was left in place of a cut edge. ``norm`` is one
    object for all ports of a stage that normalise alike.
    """

    port: Port
    norm: Norm | None
    reads: tuple[ReadPlan, ...]
    table: Bool[Tensor, "row writers"] | None
    row_of: Int[Tensor, " nodes"]
    offset: Float[Tensor, "row #pos d"] | None


@dataclass(frozen=True)
class StagePlan:
    """A stage ready to run."""

    stage: Stage
    ports: tuple[PortPlan, ...]
    write: LinearMap | None
    each_needed: bool

    @cached_property
    @torch.inference_mode(False)
    def table(self) -> Bool[Tensor, "row writers"] | None:
        """The tables of all ports that have one, so that one product makes all their sums."""
        tables = [port.table for port in self.ports if port.table is not None]
        return torch.cat(tables) if tables else None

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
    ports = [tuple(_plan_port(stage, port) for port in stage.ports) for stage in graph.stages]
    needed = _stages_needed_apart(graph, ports)
    stages = tuple(StagePlan(stage, ports[s], _pad_write(stage), s in needed) for s, stage in enumerate(graph.stages))
    return Plan(stages)


def _alike(a: Norm | None, b: Norm | None) -> bool:
    """Whether two norms are one: the same kind with the very same gain."""
    if a is None or b is None or type(a) is not type(b):
        return a is b
    fields = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]  # type: ignore[arg-type]
    return all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in fields)


def _plan_port(stage: Stage, port: Port) -> PortPlan:
    norm = next(p.norm for p in stage.ports if _alike(p.norm, port.norm))
    reads = tuple(_pad_read(stage, read) for read in port.reads)
    n = len(stage.nodes)
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
    return PortPlan(port, norm, reads, table, row_of, None if port.offset is None else port.offset[first])


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
    return map_ if isinstance(map_, Dense) or map_.keeps_blocks else Dense(map_.dense())


def _pad_write(stage: Stage) -> LinearMap | None:
    widths = stage.code_widths
    if stage.write is None or len(set(widths)) == 1:
        return stage.write and _cheapest(stage.write)
    widest, columns = max(widths), stage.write.dense().split(list(widths), dim=1)
    padded = [torch.nn.functional.pad(block, (0, widest - block.shape[1])) for block in columns]
    return Dense(torch.cat(padded, dim=1))


def _stages_needed_apart(graph: Graph, ports: list[tuple[PortPlan, ...]]) -> set[int]:
    """Stages whose nodes' writes are needed one by one, because some later port hears only part of them."""
    needed = set()
    for stage, plans in zip(graph.stages, ports, strict=True):
        for plan in plans:
            if plan.table is not None:
                needed |= set(range(*stage.visible))
    return needed


# ---- one run --------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """The working memory of one run, and what it was asked to keep.

    Attributes:
        total: by stage, the sum of what its nodes write, bias included: ``[batch pos d_model]``.
        each: by stage, what each node writes: ``[batch node pos d_model]``, where that was needed.
        inputs, normed, reads, codes: kept by (stage, port) or stage when ``keep`` is set.
    """

    graph: Graph
    plan: Plan
    context: Context
    keep: bool = False
    apart: bool = False
    total: list[Tensor] = field(default_factory=list)
    each: list[Tensor | None] = field(default_factory=list)
    inputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    normed: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    reads: dict[tuple[int, str], tuple[Tensor, ...]] = field(default_factory=dict)
    codes: dict[int, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    counterfactual: Trace | None = None
    _sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def stream(self, lo: int, hi: int) -> Float[Tensor, "batch pos d_model"]:
        """Everything written by stages lo..hi-1."""
        if (lo, hi) not in self._sums:
            last = self.total[hi - 1]
            self._sums[lo, hi] = last if hi == lo + 1 else self.stream(lo, hi - 1) + last
        return self._sums[lo, hi]

    def preset(self, lo: int, hi: int, sums: Float[Tensor, "batch pos d_model"]) -> None:
        """Set what stages lo..hi-1 have written, for a run that starts after them."""
        self._sums[lo, hi] = sums

    def shift(self, lo: int, hi: int, to: Float[Tensor, "batch pos d_model"]) -> None:
        """Set what stages lo..hi-1 have written, for all who listen later; the last of their nodes takes the change."""
        change = to - self.stream(lo, hi)
        self.total[hi - 1] = self.total[hi - 1] + change
        each = self.each[hi - 1]
        if each is not None:
            self.each[hi - 1] = torch.cat([each[:, :-1], each[:, -1:] + change[:, None]], dim=1)
        self._sums = {}
        self.preset(lo, hi, to)

    def written(self, lo: int, hi: int) -> Float[Tensor, "batch writer pos d_model"]:
        """What each node of stages lo..hi-1 writes, biases left out."""
        return torch.cat([self.node_writes(s) for s in range(lo, hi)], dim=1)

    def node_writes(self, s: int) -> Float[Tensor, "batch node pos d_model"]:
        """What each node of stage s writes (computed from its codes if the run did not need it)."""
        kept = self.each[s]
        if kept is None:
            kept = _write_each(self.plan.stages[s], self.codes[s])
        return kept

    @property
    def output(self) -> Tensor:
        """The output node's code: logits."""
        return self.codes[len(self.plan.stages) - 1][:, 0]


def trace(
    graph: Graph,
    context: Context,
    *,
    keep: bool = False,
    apart: bool = False,
    record: frozenset[str] = frozenset(),
    patch: Mapping[str, Patch] | None = None,
    counterfactual: Trace | None = None,
) -> Trace:
    """Run all stages, keeping intermediate values for those who compute on them (statistics, scores).

    Args:
        keep: keep every port's input, normalised input, reads and every stage's codes.
        apart: compute what each node writes even where only the sum is needed.
        record, patch: see :func:`run`; names already checked.
        counterfactual: the run that cut edges of a resampling graph hear.
    """
    plan = plan_of(graph)
    out = Trace(graph, plan, context, keep=keep, apart=apart, counterfactual=counterfactual)
    run_stages(out, 0, _Hooks(graph, record, dict(patch or {})))
    return out


def run_stages(t: Trace, start: int, hooks: _Hooks | None = None, stop: int | None = None) -> None:
    """Run stage ``start`` and all after it (or those before ``stop``), on top of what the trace holds already."""
    hooks = hooks or _Hooks(t.graph, frozenset(), {})
    for s in range(start, len(t.plan.stages) if stop is None else stop):
        try:
            hooks.stream(t, s)
            _run_stage(t, s, hooks)
        except (UnweaveError, RuntimeError, IndexError) as error:
            error.add_note(f"while running {', '.join(t.plan.stages[s].stage.nodes[:3])} (stage {s})")
            raise


def _run_stage(t: Trace, s: int, hooks: _Hooks) -> None:
    plan = t.plan.stages[s]
    reads: list[Tensor] = []
    normed_once: dict[tuple[int, int], Tensor] = {}  # ports that hear the same often share their norm, too
    for port, heard in zip(plan.ports, _hear(t, plan), strict=True):
        x = hooks.port(t, s, port, heard)
        norm, key = port.norm, (id(x), id(port.norm))
        if key not in normed_once:
            normed_once[key] = x if norm is None else norm.apply(x)
        normed = normed_once[key]
        if x.shape[1] == 1:
            got = tuple(read.shared(normed[:, 0]) for read in port.reads)
        else:
            row_of = port.row_of if x.shape[1] == int(port.row_of.max()) + 1 else torch.arange(x.shape[1])
            got = tuple(read.apart(normed, row_of) for read in port.reads)
        if t.keep:
            # one read per node, so that gradients at the reads tell apart heads that share keys and values
            got = tuple(
                r.repeat_interleave(p.copies, 1) if r.shape[1] < len(plan.stage.nodes) else r
                for r, p in zip(got, port.reads, strict=True)
            )
            t.inputs[s, port.port.name], t.normed[s, port.port.name], t.reads[s, port.port.name] = x, normed, got
        reads.extend(got)
    finish_stage(t, s, hooks.core(t, s, tuple(reads)), hooks)


def finish_stage(t: Trace, s: int, codes: Tensor, hooks: _Hooks | None = None) -> None:
    """From the codes of stage s to what it writes."""
    plan = t.plan.stages[s]
    last = plan.write is None
    if t.keep or last:
        t.codes[s] = codes
    if last:
        t.total.append(codes[:, 0])
        t.each.append(None)
        return
    patched = hooks is not None and hooks.touches(s)
    each = total = None
    if plan.each_needed or t.apart or patched:
        each = _write_each(plan, codes)
        each = hooks.node(t, s, each) if hooks is not None and patched else each
        total = each.sum(1) if each.shape[1] > 1 else each[:, 0]
    else:
        total = _write_sum(plan, codes)
    t.total.append(total if plan.stage.bias is None else total + plan.stage.bias)
    t.each.append(each)


def _write_sum(plan: StagePlan, codes: Float[Tensor, "batch node pos width"]) -> Float[Tensor, "batch pos d_model"]:
    assert plan.write is not None
    total = plan.write.apply(rearrange(codes, "b n t w -> b t (n w)"))
    return total if plan.stage.post is None else plan.stage.post.apply(total)


def _write_each(
    plan: StagePlan, codes: Float[Tensor, "batch node pos width"]
) -> Float[Tensor, "batch node pos d_model"]:
    assert plan.write is not None
    if plan.write.keeps_blocks:
        each = codes
    elif codes.shape[1] == 1:
        each = plan.write.apply(codes)
    else:
        each = codes @ plan.node_write.to(codes)  # an identity's matrix knows no device
    post = plan.stage.post
    if post is None:
        return each
    assert isinstance(post, RMSNorm)
    return each * post.scale(each.sum(1, keepdim=True))


def _hear(t: Trace, plan: StagePlan) -> list[Float[Tensor, "batch row pos d_model"]]:
    """For each port, the distinct sums that its nodes hear."""
    if not plan.ports:
        return []
    lo, hi = plan.stage.visible
    everything = t.stream(lo, hi)[:, None]
    heard = [everything] * len(plan.ports)
    if plan.table is not None:
        sums = iter(_cut_sums(t, lo, hi, plan.table, everything).split(list(plan.rows), dim=1))
        heard = [everything if port.table is None else next(sums) for port in plan.ports]
    heard = [
        x if port.offset is None else x + _at_positions(port.offset, x.shape[2]).to(x.dtype)
        for port, x in zip(plan.ports, heard, strict=True)
    ]
    return [_add_wires(t, lo, hi, port, x) for port, x in zip(plan.ports, heard, strict=True)]


def _add_wires(
    t: Trace, lo: int, hi: int, port: PortPlan, x: Float[Tensor, "batch row pos d"]
) -> Float[Tensor, "batch row pos d"]:
    """What comes over edges that carry some dimensions only."""
    wires = port.port.wires
    if wires is None:
        return x
    sent = t.written(lo, hi)[:, wires.writers]
    if t.counterfactual is not None:
        sent = sent - t.counterfactual.written(lo, hi)[:, wires.writers]
    return x.index_add(1, port.row_of[wires.nodes], wires.carry(sent))


def _cut_sums(
    t: Trace, lo: int, hi: int, table: Bool[Tensor, "row writers"], everything: Float[Tensor, "batch 1 pos d"]
) -> Float[Tensor, "batch row pos d"]:
    """Row r: the sum of the writers marked in table[r], plus what is never cut (biases)."""
    written = t.written(lo, hi)
    columns = (~table).any(0).nonzero()[:, 0]
    whole = everything.dtype == torch.float32 and 2 * len(columns) < table.shape[1]
    if whole:  # few writers are cut somewhere: subtract those from the shared sum
        sums = everything - _weigh(~table[:, columns], written[:, columns])
    else:
        sums = _weigh(table, written)
        biases = [stage.stage.bias for stage in t.plan.stages[lo:hi] if stage.stage.bias is not None]
        if biases:
            sums = sums + torch.stack(biases).sum(0)
    if t.counterfactual is not None:
        sums = sums + _weigh(~table, t.counterfactual.written(lo, hi))
    return sums


def _weigh(table: Bool[Tensor, "row writers"], written: Float[Tensor, "batch writers pos d"]) -> Tensor:
    flat = table.to(written.dtype) @ rearrange(written, "b n t d -> b n (t d)")
    return rearrange(flat, "b r (t d) -> b r t d", t=written.shape[2])


def _at_positions(offset: Float[Tensor, "row _ d"], n_pos: int) -> Float[Tensor, "row _ d"]:
    if offset.shape[1] == 1 or offset.shape[1] == n_pos:
        return offset
    if offset.shape[1] < n_pos:
        raise InputError(
            f"the means left by cut edges cover {offset.shape[1]} positions and the input has {n_pos}; "
            "collect means on longer texts or average them over positions"
        )
    return offset[:, :n_pos]


# ---- recording and patching by name ---------------------------------------------------------------------


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of this shape broadcasts to the wanted one."""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(a in (1, b) for a, b in pairs)


class _Hooks:
    """What one run records and patches, sorted by where it happens."""

    def __init__(self, graph: Graph, record: frozenset[str], patch: dict[str, Patch]) -> None:
        self.record, self.patch = record, patch
        self.active = bool(record or patch)
        self.edges = {name: Edge.parse(name) for name in patch if "->" in name}
        self.stages_apart = {graph.where[e.src][0] for e in self.edges.values()}
        self.stages_apart |= {graph.where[n][0] for n in (*record, *patch) if n in graph.where}

    def touches(self, s: int) -> bool:
        """Whether the nodes of a stage must be known one by one."""
        return self.active and s in self.stages_apart

    def _apply(self, t: Trace, name: str, value: Tensor) -> Tensor:
        if name in self.patch:
            given = self.patch[name]
            new = given(value) if callable(given) else given
            if not isinstance(new, Tensor) or not _fits(new.shape, value.shape):
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ShapeError(f"the patch of {name} must have shape {tuple(value.shape)}, got {got}")
            value = new.to(value).expand_as(value)
        if name in self.record:
            t.values[name] = value
        return value

    def _each_node(self, t: Trace, s: int, suffix: str, value: Tensor) -> Tensor:
        """Apply to every node of ``[batch node ...]``, replacing only those patched."""
        for i, node in enumerate(t.plan.stages[s].stage.nodes):
            new = self._apply(t, node + suffix, value[:, i])
            if node + suffix in self.patch:
                value = value.clone()
                value[:, i] = new
        return value

    def node(self, t: Trace, s: int, each: Tensor) -> Tensor:
        return self._each_node(t, s, "", each)

    def stream(self, t: Trace, s: int) -> None:
        """Record or patch the residual stream before stage s, for that stage and all after it."""
        if not self.active:
            return
        for name in (f"{BEFORE}{node}" for node in t.plan.stages[s].stage.nodes):
            if name in self.record or name in self.patch:
                lo, hi = t.plan.stages[s].stage.visible
                new = self._apply(t, name, t.stream(lo, hi))
                if name in self.patch:
                    t.shift(lo, hi, new)

    def port(self, t: Trace, s: int, plan: PortPlan, x: Tensor) -> Tensor:
        if not self.active:
            return x
        nodes = t.plan.stages[s].stage.nodes
        name = "." + plan.port.name
        here = {n: e for n, e in self.edges.items() if e.port == plan.port.name and e.dst in nodes}
        if not here and not any(n + name in self.patch or n + name in self.record for n in nodes):
            return x
        x = x.expand(-1, len(nodes), -1, -1) if x.shape[1] == 1 else x[:, plan.row_of]
        for text, edge in here.items():
            stage, i = t.graph.where[edge.src]
            sent = t.node_writes(stage)[:, i]
            x = x.clone()
            x[:, nodes.index(edge.dst)] += self._apply(t, text, sent) - sent
        return self._each_node(t, s, name, x)

    def core(self, t: Trace, s: int, reads: tuple[Tensor, ...]) -> Tensor:
        stage = t.plan.stages[s].stage
        core, nodes = stage.core, stage.nodes
        wanted = self.active and any(n + ".pattern" in self.record or n + ".pattern" in self.patch for n in nodes)
        if wanted and isinstance(core, Attention):
            pattern = self._each_node(t, s, ".pattern", core.pattern(reads[0], reads[1], t.context))
            codes = core.mix(pattern, reads[2])
        else:
            codes = core.forward(reads, t.context)
        codes = at_positions(stage, codes)
        return at_positions(stage, self._each_node(t, s, ".code", codes)) if self.active else codes


# ---- the public function --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run returns.

    Attributes:
        logits: ``[batch pos d_out]``.
        values: what was recorded, by name.
    """

    logits: Float[Tensor, "batch pos d_out"]
    values: Mapping[str, Tensor]


def run(
    graph: Graph,
    inputs: Tensor,
    mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    *,
    record: Iterable[str] = (),
    patch: Mapping[str, Patch] | None = None,
    counterfactual: Tensor | None = None,
) -> Run:
    """Run a graph on inputs; record and patch any value on the way. Gradients flow.

    Args:
        inputs: token ids ``[batch pos]``, or reals ``[batch pos features]`` where the network reads those.
        mask: 1 or True where a token is real (right or left padding).
        record: names of values to return: a node (``"blocks.0.attn.head.1"``: what it writes), a port
            (``"blocks.0.attn.head.1.q"``: what it hears, before its norm), ``NODE.code``, ``HEAD.pattern``,
            ``before NODE`` (the residual stream; patched for that node's stage and all after it, in an uncut graph).
        patch: values to set, as a tensor or a function of the value, by the same names; an edge
            (``"embed->blocks.0.mlp.in"``) is patched for its one reader only.
        counterfactual: other inputs of the same shape, needed by a graph whose cut edges are resampled.

    Returns:
        A :class:`Run`.

    Raises:
        InputError: ids out of range, a sequence longer than the context, a cut edge patched.
        ShapeError: inputs, mask or patch of the wrong shape.
        UnknownNameError: an unknown name; lists the closest.

    Cost:
        One forward pass; an uncut graph costs what the model costs.

    Exact?
        Yes, up to floating-point summation order.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> tokens = torch.tensor([[0, 5, 9, 5]])
        >>> out = unweave.run(graph, tokens, record=["blocks.0.attn.head.0.pattern"])
        >>> out.values["blocks.0.attn.head.0.pattern"].shape
        torch.Size([1, 4, 4])
    """
    context = check_inputs(graph, inputs, mask)
    names = frozenset(record)
    _check_names(graph, names, patch or {})
    other = None
    if graph.resample:
        if counterfactual is None:
            raise InputError("this graph's cut edges hear another input: pass counterfactual=...")
        if counterfactual.shape != inputs.shape:
            raise ShapeError(f"counterfactual must have shape {tuple(inputs.shape)}, got {tuple(counterfactual.shape)}")
        other = trace(uncut(graph), check_inputs(graph, counterfactual, mask), apart=True)
    out = trace(graph, context, record=names, patch=patch, counterfactual=other)
    return Run(out.output, out.values)


def uncut(graph: Graph) -> Graph:
    """The graph with every edge restored and every constant removed; the graph itself where nothing was cut."""
    if not graph.resample and not any(p.is_cut for s in graph.stages for p in s.ports):
        return graph
    whole = {"edges": None, "offset": None, "wires": None}
    stages = tuple(
        dataclasses.replace(s, ports=tuple(dataclasses.replace(p, **whole) for p in s.ports))  # type: ignore[arg-type]
        for s in graph.stages
    )
    return dataclasses.replace(graph, stages=stages, resample=False)


def check_inputs(graph: Graph, inputs: Tensor, mask: Tensor | None = None) -> Context:
    """The context of a run, after checking that the graph can read these inputs."""
    features = graph.info.get("d_input")
    if features is None:
        if inputs.ndim != 2 or inputs.is_floating_point() or inputs.dtype == torch.bool:
            raise ShapeError(f"token ids must be integers [batch, pos], got {inputs.dtype} {tuple(inputs.shape)}")
    elif inputs.ndim != 3 or inputs.shape[2] != features:
        raise ShapeError(f"inputs must be reals [batch, pos, {features}], got {tuple(inputs.shape)}")
    if inputs.shape[0] == 0 or inputs.shape[1] == 0:
        raise ShapeError(f"inputs are empty: {tuple(inputs.shape)}")
    limit = graph.info.get("n_ctx")
    if limit is not None and inputs.shape[1] > limit:
        raise InputError(f"a sequence of {inputs.shape[1]} tokens is longer than the context of {limit}; cut it")
    vocabulary = graph.info.get("d_vocab")
    if features is None and vocabulary is not None:
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= vocabulary:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocabulary}")
    if mask is not None:
        if mask.shape != inputs.shape[:2]:
            raise ShapeError(f"mask must have shape {tuple(inputs.shape[:2])}, got {tuple(mask.shape)}")
        mask = mask.to(device=graph.device, dtype=torch.bool)
        mask = None if bool(mask.all()) else mask
    return Context(inputs.to(graph.device), mask)


def _check_names(graph: Graph, record: frozenset[str], patch: Mapping[str, Patch]) -> None:
    known = set(graph.nodes) | set(graph.ports)
    known |= {f"{n}.code" for n in graph.nodes}
    known |= {f"{n}.pattern" for s in graph.stages if isinstance(s.core, Attention) for n in s.nodes}
    known -= set(graph.stages[-1].nodes)
    known |= {f"{BEFORE}{n}" for s in graph.stages if s.visible[1] > s.visible[0] for n in s.nodes}
    for name in (*record, *(n for n in patch if "->" not in n)):
        if name not in known:
            raise UnknownNameError("value", name, sorted(known))
    if graph.is_cut and any(name.startswith(BEFORE) for name in patch):
        raise InputError(
            "where edges are cut, readers hear different sums and no one stream can be patched; patch ports"
        )
    edges = [n for n in patch if "->" in n]
    cut = graph.mark_edges(edges) & ~graph.edge_matrix
    if bool(cut.any()):
        raise InputError(f"{graph.name_edges(cut)[0]} is cut in this graph and cannot be patched; patch an uncut graph")
