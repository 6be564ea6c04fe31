"""The central type: a network as channels that read from, and add to, a shared state.

A :class:`Graph` is a tuple of stages; a stage is a row of parallel nodes (the heads of a layer, the neuron
groups of an MLP) with read ports; every port lists the writers it hears. Nothing in it changes: every
verb returns a new graph, sharing the tensors it did not touch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave import tree
from unweave.errors import GraphError, InputError, UnknownNameError
from unweave.ops import Attention, Core, LinearMap, Norm

__all__ = ["Ablation", "Edge", "Graph", "Port", "Read", "Stage"]

Ablation = Literal["mean", "zero", "resample"]
CHANNEL_KINDS = ("attn", "mlp")


@dataclass(frozen=True, order=True)
class Edge:
    """What node ``src`` writes, as heard by port ``port`` of node ``dst``; prints as ``src->dst.port``."""

    src: str
    dst: str
    port: str

    def __str__(self) -> str:
        return f"{self.src}->{self.dst}.{self.port}"

    @classmethod
    def parse(cls, text: str) -> Edge:
        """The edge that prints as ``text``.

        Raises:
            InputError: the text is not of that form.

        Example:
            >>> Edge.parse("embed->blocks.0.attn.head.1.q")
            Edge(src='embed', dst='blocks.0.attn.head.1', port='q')
        """
        src, arrow, rest = text.partition("->")
        dst, dot, port = rest.rpartition(".")
        if not (arrow and dot and src and dst and port):
            raise InputError(f"an edge is written 'source->node.port', got {text!r}")
        return cls(src, dst, port)


@tree.register
@dataclass(frozen=True, eq=False)
class Read:
    """A linear map out of a port's input, for all nodes of the stage at once.

    Attributes:
        map: stream -> the blocks' outputs, one after the other.
        widths: outputs of each block; fewer blocks than nodes when neighbouring nodes share one
            (grouped-query attention).
        bias: one number per output, or None.
    """

    map: LinearMap
    widths: tuple[int, ...]
    bias: Float[Tensor, " outputs"] | None = None


@tree.register
@dataclass(frozen=True, eq=False)
class Port:
    """One way in which the nodes of a stage read: x = sum of the writers heard + offset; reads of norm(x).

    Attributes:
        name: "q", "k", "v" for attention, "in" otherwise.
        reads: the maps applied to the normalised input (two for a gated MLP).
        norm: the normalisation in front, or None.
        edges: which visible writer each node hears; None when all hear all.
        offset: the constant left in place of cut edges, one per node, for all positions or for each.
    """

    name: str
    reads: tuple[Read, ...]
    norm: Norm | None = None
    edges: Bool[Tensor, "nodes writers"] | None = None
    offset: Float[Tensor, "nodes #pos d_model"] | None = None


@tree.register
@dataclass(frozen=True, eq=False)
class Stage:
    """A row of parallel nodes.

    Attributes:
        nodes: their names.
        kind: "embed", "attn", "mlp", "unembed" or "other"; the middle two are the channels.
        layer: -1 before the first block.
        ports: how they read.
        core: from reads to codes.
        write: all codes, one after the other, -> stream; None for the output node.
        code_widths: the length of each node's code.
        visible: the half-open range of earlier stages whose writes can be heard.
        bias: a constant added to the stream once for the whole stage. It reaches every later port whatever
            is cut: a constant carries no information.
        post: a normalisation of the summed writes (Gemma); its scale couples the nodes of the stage.
    """

    nodes: tuple[str, ...]
    kind: str
    layer: int
    ports: tuple[Port, ...]
    core: Core
    write: LinearMap | None
    code_widths: tuple[int, ...]
    visible: tuple[int, int]
    bias: Float[Tensor, " d_model"] | None = None
    post: Norm | None = None

    @cached_property
    def n_parameters(self) -> int:
        """Stored numbers: maps, biases, norms, tables; constants left by cut edges are not counted."""
        maps = [read.map.n_parameters for port in self.ports for read in port.reads]
        loose = [read.bias for port in self.ports for read in port.reads] + [self.bias]
        norms = tree.tensors([port.norm for port in self.ports]).values()  # ports that share a norm count it once
        return (
            sum(maps)
            + (self.write.n_parameters if self.write is not None else 0)
            + sum(t.numel() for t in loose if t is not None)
            + sum(t.numel() for t in norms)
            + (self.post.n_parameters if self.post is not None else 0)
            + self.core.n_parameters
        )

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next((t.device for _, t in tree.leaves(self)), torch.device("cpu"))

    def multiplications(self, context: int) -> int:
        """Multiply-adds per token with ``context`` tokens to attend to."""
        n = sum(read.map.n_multiplications for port in self.ports for read in port.reads)
        n += self.write.n_multiplications if self.write is not None else 0
        if isinstance(self.core, Attention):
            q = self.ports[0].reads[0].widths
            n += context * (sum(q) * (len(self.nodes) // len(q)) + sum(self.code_widths))
        return n


@dataclass(frozen=True, eq=False)
class Graph:
    """A decompiled network. Exactly the model when captured; every verb returns another graph.

    Attributes:
        stages: in execution order; the last one is the output.
        info: plain facts about the model (name, family, n_layers, n_ctx, d_vocab, ...).
        resample: True when cut edges carry what another input would send instead of a constant.
        modules: the block of the partition each node belongs to, after :meth:`quotient`.
    """

    stages: tuple[Stage, ...]
    info: Mapping[str, Any] = field(default_factory=dict)
    resample: bool = False
    modules: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lint()

    # ---- names -----------------------------------------------------------------------------------------

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Every node, in execution order."""
        return tuple(name for stage in self.stages for name in stage.nodes)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Every node that writes to the stream: all but the output."""
        return tuple(name for stage in self.stages if stage.write is not None for name in stage.nodes)

    @cached_property
    def ports(self) -> tuple[str, ...]:
        """Every read port as ``node.port``: by stage, then port, then node."""
        return tuple(f"{n}.{p.name}" for s in self.stages for p in s.ports for n in s.nodes)

    @cached_property
    def where(self) -> Mapping[str, tuple[int, int]]:
        """The (stage, place in it) of every node."""
        return {n: (s, i) for s, stage in enumerate(self.stages) for i, n in enumerate(stage.nodes)}

    @cached_property
    def writer_starts(self) -> tuple[int, ...]:
        """For each stage, the number of writers in the stages before it (one more entry at the end)."""
        starts = [0]
        for stage in self.stages:
            starts.append(starts[-1] + (len(stage.nodes) if stage.write is not None else 0))
        return tuple(starts)

    @cached_property
    def port_starts(self) -> Mapping[tuple[int, str], int]:
        """The row in :attr:`ports` where each (stage, port name) begins."""
        starts, at = {}, 0
        for s, stage in enumerate(self.stages):
            for port in stage.ports:
                starts[s, port.name] = at
                at += len(stage.nodes)
        return starts

    def find(self, node: str) -> tuple[Stage, int]:
        """The stage of a node and its place in it.

        Raises:
            UnknownNameError: no such node; lists the closest names.
        """
        if node not in self.where:
            raise UnknownNameError("node", node, self.nodes)
        stage, i = self.where[node]
        return self.stages[stage], i

    # ---- edges -----------------------------------------------------------------------------------------

    def visible_writers(self, stage: int) -> slice:
        """The range of :attr:`writers` that a stage could hear."""
        lo, hi = self.stages[stage].visible
        return slice(self.writer_starts[lo], self.writer_starts[hi])

    def _matrix(self, kept_only: bool) -> Bool[Tensor, "ports writers"]:
        out = torch.zeros(len(self.ports), len(self.writers), dtype=torch.bool)
        for s, stage in enumerate(self.stages):
            for port in stage.ports:
                row = self.port_starts[s, port.name]
                kept = port.edges.cpu() if kept_only and port.edges is not None else True
                out[row : row + len(stage.nodes), self.visible_writers(s)] = kept
        return out

    @cached_property
    def edge_matrix(self) -> Bool[Tensor, "ports writers"]:
        """Which port hears which writer."""
        return self._matrix(kept_only=True)

    @cached_property
    def possible_edges(self) -> Bool[Tensor, "ports writers"]:
        """Which port could hear which writer, were nothing cut."""
        return self._matrix(kept_only=False)

    @property
    def n_edges(self) -> int:
        """How many edges are there."""
        return int(self.edge_matrix.sum())

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, ordered by port, then writer."""
        return self.name_edges(self.edge_matrix)

    def name_edges(self, matrix: Bool[Tensor, "ports writers"]) -> tuple[Edge, ...]:
        """The edges marked in a matrix over :attr:`ports` and :attr:`writers`."""
        split = [port.rsplit(".", 1) for port in self.ports]
        return tuple(Edge(self.writers[i], *split[j]) for j, i in matrix.nonzero().tolist())

    def mark_edges(self, edges: Iterable[Edge | str]) -> Bool[Tensor, "ports writers"]:
        """The inverse of :meth:`name_edges`.

        Raises:
            UnknownNameError: an unknown node or port.
            InputError: the port comes before the writer.
        """
        port_at = {name: j for j, name in enumerate(self.ports)}
        writer_at = {name: i for i, name in enumerate(self.writers)}
        out = torch.zeros(len(self.ports), len(self.writers), dtype=torch.bool)
        for edge in edges:
            edge = Edge.parse(edge) if isinstance(edge, str) else edge
            if edge.src not in writer_at:
                raise UnknownNameError("writer", edge.src, self.writers)
            port = f"{edge.dst}.{edge.port}"
            if port not in port_at:
                raise UnknownNameError("port", port, self.ports)
            out[port_at[port], writer_at[edge.src]] = True
        if bool((out & ~self.possible_edges).any()):
            wrong = self.name_edges(out & ~self.possible_edges)[0]
            raise InputError(f"no such edge: {wrong}; {wrong.dst} does not come after {wrong.src}")
        return out

    # ---- verbs -----------------------------------------------------------------------------------------

    def restrict(
        self,
        keep: Iterable[Edge | str] | Bool[Tensor, "ports writers"],
        *,
        ablation: Ablation = "mean",
        means: Mapping[str, Float[Tensor, "#pos d_model"]] | None = None,
    ) -> Graph:
        """Keep a set of edges and ablate the rest: a circuit, which is again a graph.

        A cut edge i -> j sends a constant to port j in place of what i writes: its mean over the data
        ("mean"), nothing ("zero"), or what i writes on another input ("resample"; say which one when the
        graph is run). Cutting is final: ``restrict(A).restrict(B)`` keeps the edges in both.

        Args:
            keep: edges, or a boolean matrix over (:attr:`ports`, :attr:`writers`).
            ablation: what replaces the rest.
            means: for "mean": what each writer writes on average, ``[1, d_model]`` or ``[pos, d_model]``
                (from :func:`unweave.collect_means`).

        Raises:
            InputError: means are missing or of the wrong shape, or two kinds of ablation are mixed.
            UnknownNameError: an edge names an unknown node or port.
        """
        if ablation not in get_args(Ablation):
            raise InputError(f"unknown ablation {ablation!r}; choose one of {', '.join(get_args(Ablation))}")
        wanted = keep if isinstance(keep, Tensor) else self.mark_edges(keep)
        if wanted.shape != self.edge_matrix.shape:
            raise InputError(
                f"keep must be {tuple(self.edge_matrix.shape)} (ports x writers), got {tuple(wanted.shape)}"
            )
        if wanted.dtype != torch.bool:
            raise InputError(f"keep must be a boolean matrix, True where an edge stays, got {wanted.dtype}")
        cut = self.edge_matrix & ~wanted.cpu()
        if not bool(cut.any()):
            return self
        already_cut = bool((self.possible_edges & ~self.edge_matrix).any())
        if already_cut and self.resample != (ablation == "resample"):
            raise InputError("edges cut by resampling and edges cut to a constant cannot be mixed in one graph")
        table = self._mean_rows(means, cut) if ablation == "mean" else None
        stages = tuple(self._cut_stage(s, cut, table) for s in range(len(self.stages)))
        return dataclasses.replace(self, stages=stages, resample=ablation == "resample")

    def _mean_rows(self, means: Mapping[str, Tensor] | None, cut: Tensor) -> Mapping[str, Tensor]:
        if means is None:
            raise InputError("mean ablation needs means=...; collect them with unweave.collect_means(graph, data)")
        missing = [w for i, w in enumerate(self.writers) if w not in means and bool(cut[:, i].any())]
        if missing:
            raise InputError(f"no mean was given for {missing[0]}; collect means on this graph")
        for i in cut.any(0).nonzero()[:, 0].tolist():
            name, width = self.writers[i], self._stream_width(self.writers[i])
            if means[name].ndim != 2 or means[name].shape[1] != width:
                got = tuple(means[name].shape)
                raise InputError(f"the mean of {name} must be [1, {width}] or [pos, {width}], got {got}")
        return means

    def _stream_width(self, writer: str) -> int:
        write = self.find(writer)[0].write
        assert write is not None
        return write.d_out

    def _cut_stage(self, s: int, cut: Tensor, means: Mapping[str, Tensor] | None) -> Stage:
        stage = self.stages[s]
        names = self.writers[self.visible_writers(s)]
        ports = []
        for port in stage.ports:
            row = self.port_starts[s, port.name]
            gone = cut[row : row + len(stage.nodes), self.visible_writers(s)]
            if not bool(gone.any()):
                ports.append(port)
                continue
            edges = ~gone if port.edges is None else port.edges.cpu() & ~gone
            offset = port.offset
            if means is not None:
                offset = _add_constants(offset, gone, [means.get(n) for n in names])
            ports.append(dataclasses.replace(port, edges=edges.to(stage.device), offset=offset))
        return dataclasses.replace(stage, ports=tuple(ports))

    def quotient(self, modules: Mapping[str, Iterable[str]]) -> Graph:
        """Group nodes into modules; the function computed is unchanged.

        Args:
            modules: the nodes of each module; nodes not named stay on their own.

        Raises:
            InputError: a node is in two modules.
            UnknownNameError: an unknown node.
        """
        of: dict[str, str] = {}
        for module, members in modules.items():
            for node in members:
                self.find(node)
                if node in of:
                    raise InputError(f"{node} is in two modules, {of[node]!r} and {module!r}")
                of[node] = module
        return dataclasses.replace(self, modules=of)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Graph:
        """The graph on another device or in another precision (integers and rotary frequencies keep theirs)."""
        rotaries = [s.core.rotary for s in self.stages if isinstance(s.core, Attention)]
        # a rounded frequency would turn later positions by a wrong angle
        exact = {id(r.inv_freq) for r in rotaries if r is not None}

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() and id(t) not in exact else None)

        info = dict(self.info) | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})
        return dataclasses.replace(self, stages=tree.map_tensors(self.stages, move), info=info)

    # ---- sizes -----------------------------------------------------------------------------------------

    @property
    def n_parameters(self) -> int:
        """Stored numbers; a table tied to the readout counts once."""
        tables = {id(t) for s in self.stages if s.kind == "embed" for t in tree.tensors(s.core).values()}
        tied = sum(
            t.numel()
            for s in self.stages
            if s.kind == "unembed"
            for t in tree.tensors(s.ports).values()
            if id(t) in tables
        )
        return sum(stage.n_parameters for stage in self.stages) - tied

    @property
    def n_channel_parameters(self) -> int:
        """Stored numbers of attention heads and MLPs: what compression budgets are a share of."""
        return sum(stage.n_parameters for stage in self.stages if stage.kind in CHANNEL_KINDS)

    def flops_per_token(self, context: int = 1) -> int:
        """Floating-point operations per token of an uncut run: 2 per multiply-add.

        Args:
            context: how many tokens each token attends to.
        """
        return 2 * sum(stage.multiplications(context) for stage in self.stages)

    @property
    def size_bits(self) -> int:
        """Bits of all stored tensors, constants and edge lists included (an edge takes one bit)."""
        return sum(t.numel() * (1 if t.dtype == torch.bool else 8 * t.element_size()) for t in self.tensors)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every distinct tensor."""
        return tuple(tree.tensors(self.stages).values())

    @property
    def device(self) -> torch.device:
        """Where the graph's tensors are."""
        return next(t.device for _, t in tree.leaves(self.stages))

    # ---- printing and checking -------------------------------------------------------------------------

    def __repr__(self) -> str:
        name = self.info.get("name", "graph")
        return f"Graph({name}: {len(self.nodes)} nodes, {self.n_edges} edges, {self.n_parameters:,} parameters)"

    def __str__(self) -> str:
        lines = [repr(self)]
        for s, stage in enumerate(self.stages):
            lines.append(f"  {_stage_title(stage)}  {stage.n_parameters:,} parameters")
            for port in stage.ports:
                row = self.port_starts[s, port.name]
                rows = slice(row, row + len(stage.nodes))
                kept, possible = int(self.edge_matrix[rows].sum()), int(self.possible_edges[rows].sum())
                lines.append(f"    .{port.name:<3} hears {kept} of {possible} edges")
        return "\n".join(lines)

    def lint(self) -> None:
        """Check the graph's own rules.

        Raises:
            GraphError: the first rule broken, and where.
        """
        if not self.stages or self.stages[-1].write is not None:
            raise GraphError("a graph needs stages, and the last one must be an output that writes nothing")
        if len(set(self.nodes)) != len(self.nodes):
            twice = next(n for n in self.nodes if self.nodes.count(n) > 1)
            raise GraphError(f"two nodes are named {twice!r}")
        for s, stage in enumerate(self.stages):
            self._lint_stage(s, stage)

    def _lint_stage(self, s: int, stage: Stage) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise GraphError(f"stage {s} ({stage.nodes[0] if stage.nodes else 'empty'}): {what}")

        check(bool(stage.nodes), "has no nodes")
        lo, hi = stage.visible
        check(0 <= lo <= hi <= s, f"sees stages {lo}..{hi}, which are not all before it")
        check(bool(stage.ports) == (hi > lo), "must have ports exactly if it sees earlier stages")
        check(len(stage.code_widths) == len(stage.nodes), "needs one code width per node")
        if stage.write is not None:
            check(stage.write.d_in == sum(stage.code_widths), "its write map does not fit its codes")
        else:
            check(s == len(self.stages) - 1, "writes nothing but is not the last")
        widths = {write.d_out for i in range(lo, hi) if (write := self.stages[i].write) is not None}
        check(len(widths) <= 1, f"hears writers of different widths {sorted(widths)}")
        for port in stage.ports:
            self._lint_port(s, port, next(iter(widths)), check)

    def _lint_port(self, s: int, port: Port, width: int, check: Any) -> None:
        n, writers = len(self.stages[s].nodes), self.visible_writers(s)
        for read in port.reads:
            check(read.map.d_in == width, f"port {port.name} reads {read.map.d_in} dimensions of a stream of {width}")
            check(
                sum(read.widths) == read.map.d_out,
                f"port {port.name}: block widths do not add up to the read map's outputs",
            )
            check(
                n % max(len(read.widths), 1) == 0, f"port {port.name}: {n} nodes cannot share {len(read.widths)} blocks"
            )
        if port.edges is not None:
            check(
                port.edges.shape == (n, writers.stop - writers.start),
                f"port {port.name}: the edge table has a wrong shape",
            )
        if port.offset is not None:
            check(
                port.offset.ndim == 3 and port.offset.shape[::2] == (n, width),
                f"port {port.name}: a wrong offset shape",
            )


def _stage_title(stage: Stage) -> str:
    if len(stage.nodes) == 1:
        return stage.nodes[0]
    stem = stage.nodes[0].rsplit(".", 1)[0]
    return f"{stem}.[{stage.nodes[0].rsplit('.', 1)[1]}..{stage.nodes[-1].rsplit('.', 1)[1]}]"


def _add_constants(
    offset: Float[Tensor, "nodes _ d_model"] | None,
    gone: Bool[Tensor, "nodes writers"],
    constants: list[Float[Tensor, "_ d_model"] | None],
) -> Float[Tensor, "nodes _ d_model"]:
    """Offsets after the writers marked as gone have been replaced by their constants."""
    given = [(i, c) for i, c in enumerate(constants) if c is not None]
    longest = max(c.shape[0] for _, c in given)
    if any(c.shape[0] not in (1, longest) for _, c in given):
        raise InputError("means per position must cover the same number of positions for every writer")
    table = torch.stack([c.expand(longest, -1) for _, c in given])
    weights = gone[:, [i for i, _ in given]].to(table)
    added = torch.einsum("nw,wpd->npd", weights, table)
    if offset is None:
        return added
    if offset.shape[1] != added.shape[1] and 1 not in (offset.shape[1], added.shape[1]):
        raise InputError("means per position must cover the same number of positions in every cut")
    return offset + added
