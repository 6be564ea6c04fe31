"""The central type: a network as channels that read from, and add to, a shared state.

A :class:`Graph` is a tuple of stages; a stage is a row of parallel nodes (the heads of a layer, the neuron
groups of an MLP) with read ports; every port lists the writers it hears. Nothing in it changes: every
verb returns a new graph, sharing the tensors it did not touch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave import tree
from unweave.errors import GraphError, InputError, UnknownNameError
from unweave.graph.checking import check_stage
from unweave.graph.cutting import check_means, cut_stage
from unweave.graph.display import summary_html
from unweave.graph.narrowing import add_wires, check_factors
from unweave.graph.parts import Edge, Port, Stage
from unweave.graph.splitting import Parts, part_names, read_parts, split_stage, split_writers
from unweave.graph.unrolling import copy_names, listening, meet, read_groups, unroll_stage

__all__ = ["CHANNEL_KINDS", "Ablation", "Graph"]

Ablation = Literal["mean", "zero", "resample"]
CHANNEL_KINDS = ("attn", "mlp")


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
                heard = [t for t in self.stages[slice(*stage.visible)] if t.write is not None]
                meets = meet(listening(stage, port), [t.positions for t in heard], [len(t.nodes) for t in heard])
                kept = port.kept(sum(len(t.nodes) for t in heard), len(stage.nodes)) if kept_only else True
                meets = meets if port.reach is None else meets & port.reach.cpu()
                out[row : row + len(stage.nodes), self.visible_writers(s)] = meets & kept
        return out

    @cached_property
    def edge_matrix(self) -> Bool[Tensor, "ports writers"]:
        """Which port hears which writer."""
        return self._matrix(kept_only=True)

    @cached_property
    def possible_edges(self) -> Bool[Tensor, "ports writers"]:
        """Which port could hear which writer, were nothing cut."""
        return self._matrix(kept_only=False)

    @cached_property
    def is_cut(self) -> bool:
        """Whether an edge is missing, or carries only some dimensions."""
        return self.is_narrow or bool((self.possible_edges & ~self.edge_matrix).any())

    @cached_property
    def is_narrow(self) -> bool:
        """Whether an edge carries only some dimensions, see :meth:`narrow`."""
        return any(port.wires is not None for stage in self.stages for port in stage.ports)

    @property
    def is_unrolled(self) -> bool:
        """Whether its nodes write at some positions only, see :meth:`unroll`."""
        return any(stage.positions is not None for stage in self.stages)

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
            why = "does not come after" if "@" not in wrong.src else "does not come after, or never listens where"
            raise InputError(
                f"no such edge: {wrong}; {wrong.dst} {why} {wrong.src}{' writes' if '@' in wrong.src else ''}"
            )
        return out

    # ---- verbs -----------------------------------------------------------------------------------------

    def restrict(
        self,
        keep: Iterable[Edge | str] | Bool[Tensor, "ports writers"],
        *,
        ablation: Ablation = "mean",
        means: Mapping[str, Float[Tensor, "#pos d_write"]] | None = None,
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
        if self.is_cut and self.resample != (ablation == "resample"):
            raise InputError("edges cut by resampling and edges cut to a constant cannot be mixed in one graph")
        table = check_means(self.writers, means, cut, self._stream_width) if ablation == "mean" else None
        stages = []
        for s, stage in enumerate(self.stages):
            rows = {p.name: slice(r := self.port_starts[s, p.name], r + len(stage.nodes)) for p in stage.ports}
            heard = self.visible_writers(s)
            gone = {name: cut[row, heard] for name, row in rows.items()}
            stages.append(cut_stage(stage, gone, self.writers[heard], table))
        return dataclasses.replace(self, stages=tuple(stages), resample=ablation == "resample")

    def narrow(
        self,
        projections: Mapping[Edge | str, tuple[Float[Tensor, "d_stream k"], Float[Tensor, "k d_stream"]]],
        *,
        ablation: Ablation = "mean",
        means: Mapping[str, Float[Tensor, "#pos d_write"]] | None = None,
    ) -> Graph:
        """Let edges carry k dimensions only: port j then hears r_i + L R (y_i - r_i) instead of y_i.

        r_i is what a cut edge would carry (see :meth:`restrict`), L R a projection; k = d_model with L R = 1 is the
        whole edge, k = 0 the cut one.

        Args:
            projections: (L, R) by edge; :func:`unweave.circuits.narrow_circuit` finds good ones.
            ablation, means: what replaces the rest, as in :meth:`restrict`; one kind in one graph.

        Raises:
            InputError: an edge that is cut or narrow already, factors of a wrong shape or not finite, missing means.
            UnknownNameError: an edge names an unknown node or port.

        Example:
            >>> import torch, unweave
            >>> graph = unweave.capture("zoo:induction")
            >>> first = torch.eye(64)[:, :3]
            >>> graph.narrow({"embed->blocks.0.attn.head.0.v": (first, first.T)}, ablation="zero").n_edges
            42
        """
        edges = [Edge.parse(e) if isinstance(e, str) else e for e in projections]
        marked = self.mark_edges(edges)
        if bool((marked & ~self.edge_matrix).any()):
            raise InputError(f"{self.name_edges(marked & ~self.edge_matrix)[0]} is cut and carries nothing to narrow")
        if twice := [e for e in edges if e in self.dimensions]:
            raise InputError(f"{twice[0]} is narrow already")
        factors = [
            check_factors(e, *f, self._stream_width(e.src)) for e, f in zip(edges, projections.values(), strict=True)
        ]
        cut = self.restrict(self.edge_matrix & ~marked, ablation=ablation, means=means)
        given = means if ablation == "mean" else None
        stages = list(cut.stages)
        for (s, name), places in self._by_port(edges).items():
            writers = self.writers[self.visible_writers(s)]
            wires = [(*place, *factors[number]) for number, place in places]
            stages[s] = add_wires(stages[s], name, wires, writers, given)
        return dataclasses.replace(cut, stages=tuple(stages))

    @cached_property
    def dimensions(self) -> Mapping[Edge, int]:
        """How many dimensions each narrow edge carries."""
        out = {}
        for s, stage in enumerate(self.stages):
            writers = self.writers[self.visible_writers(s)]
            for port in stage.ports:
                if port.wires is not None:
                    columns = (port.wires.writers, port.wires.nodes, port.wires.n_dimensions)
                    for i, node, k in zip(*(c.tolist() for c in columns), strict=True):
                        out[Edge(writers[i], stage.nodes[node], port.name)] = k
        return out

    def _by_port(self, edges: Sequence[Edge]) -> dict[tuple[int, str], list[tuple[int, tuple[int, int]]]]:
        """By (stage, port): the number of each edge and its place (node of the stage, writer among the visible)."""
        at = {name: i for i, name in enumerate(self.writers)}
        out: dict[tuple[int, str], list[tuple[int, tuple[int, int]]]] = {}
        for number, edge in enumerate(edges):
            s, node = self.where[edge.dst]
            out.setdefault((s, edge.port), []).append((number, (node, at[edge.src] - self.visible_writers(s).start)))
        return out

    def _stream_width(self, writer: str) -> int:
        write = self.find(writer)[0].write
        assert write is not None
        return write.d_out

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

    def refine(self, parts: Mapping[str, int | Sequence[Sequence[int]]]) -> Graph:
        """Split nodes into finer ones: neurons of an MLP into groups, a head's value coordinates into parts.

        Part k of ``NODE`` is named ``NODE.part.k``; it hears what the node heard and writes its share, so that the
        parts together write what the node wrote: the function is unchanged. All heads of a layer must be split into
        equally many parts; where heads share values (grouped queries) each part stores its own copy of its rows.

        Args:
            parts: for each node, how many equal consecutive parts, or the code coordinates of each part.

        Returns:
            The finer graph; a module of the coarse one keeps all parts of its nodes.

        Raises:
            InputError: parts that do not cover every coordinate once, or a node that cannot be split.
            UnknownNameError: an unknown node.

        Exact?
            Yes, up to floating-point summation order.

        Example:
            >>> import unweave
            >>> graph = unweave.capture("zoo:modular_addition")
            >>> finer = graph.refine({"blocks.0.mlp": 4})
            >>> [n for n in finer.nodes if "mlp" in n][:2]
            ['blocks.0.mlp.part.0', 'blocks.0.mlp.part.1']
        """
        if self.is_narrow:
            raise InputError("edges of this graph carry only some dimensions; refine the graph before it is narrowed")
        wanted: dict[int, dict[int, Parts]] = {}
        for node, given in parts.items():
            stage, i = self.find(node)
            wanted.setdefault(self.where[node][0], {})[i] = read_parts(node, given, stage.code_widths[i])
        counts = {n: len(wanted.get(s, {}).get(i, ((),))) for n, (s, i) in self.where.items()}
        stages = []
        for s, stage in enumerate(self.stages):
            stage = split_stage(stage, wanted[s]) if s in wanted else stage
            stages.append(split_writers(stage, [counts[n] for n in self.writers[self.visible_writers(s)]]))
        modules = {part: module for n, module in self.modules.items() for part in part_names(n, counts[n])}
        return dataclasses.replace(self, stages=tuple(stages), modules=modules)

    def unroll(self, n_pos: int, groups: Mapping[str, Iterable[int]] | None = None) -> Graph:
        """Split nodes by position: an edge then leads from one position to another, and a circuit is positional.

        The copy ``NODE@p`` hears what the node heard and writes at position p alone (or at the positions of group p),
        so that the copies together write what the node wrote: the function is unchanged on inputs of up to ``n_pos``
        positions. An edge ``A@p->B@q.v`` carries what A writes at p to what B writes at q; only those exist that can
        carry anything: p = q into queries and MLPs, p up to q into keys and values. The output stays whole.

        Args:
            n_pos: how many positions inputs have at most.
            groups: positions that are taken together, by name; those in none are the group "rest". By default every
                position is apart.

        Raises:
            InputError: groups that overlap or reach too far, or a graph that is unrolled already.

        Cost:
            A run of the graph, once it is cut, grows with the number of groups: for short prompts, or few groups.

        Exact?
            Yes, up to floating-point summation order.

        Example:
            >>> import unweave
            >>> graph = unweave.capture("zoo:induction").unroll(8, {"end": [7]})
            >>> [n for n in graph.nodes if n.startswith("blocks.1.attn.head.0")]
            ['blocks.1.attn.head.0@end', 'blocks.1.attn.head.0@rest']

        Source:
            Positional circuits: Haklay et al. 2025, "Position-aware Automatic Circuit Discovery".
        """
        if self.is_narrow:
            raise InputError("edges of this graph carry only some dimensions; unroll the graph before it is narrowed")
        limit = self.info.get("n_ctx")
        if limit is not None and n_pos > limit:
            raise InputError(f"n_pos is {n_pos} and the model's context only {limit}")
        marks = read_groups(n_pos, groups)
        heard = [len(self.writers[self.visible_writers(s)]) for s in range(len(self.stages))]
        copies = [unroll_stage(stage, marks) for stage in self.stages]
        stages = tuple(split_writers(stage, [len(marks)] * n) for stage, n in zip(copies, heard, strict=True))
        names = {n: [n] if self.find(n)[0].write is None else copy_names(n, marks) for n in self.nodes}
        modules = {copy: module for n, module in self.modules.items() for copy in names[n]}
        return dataclasses.replace(self, stages=stages, modules=modules, info={**self.info, "n_ctx": n_pos})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Graph:
        """The graph on another device or in another precision (integers and rotary frequencies keep theirs)."""
        # a rounded frequency would turn later positions by a wrong angle
        exact = {id(t) for path, t in tree.leaves(self.stages) if path.endswith(".inv_freq")}

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

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """The stages that are attention or MLPs."""
        return tuple(s for s, t in enumerate(self.stages) if t.kind in CHANNEL_KINDS and t.write is not None)

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
                kept, possible = self._hears(s, port)
                lines.append(f"    .{port.name:<3} hears {kept} of {possible} edges")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The graph in a notebook: sizes, and a row for every stage."""
        ports = [[(p.name, *self._hears(s, p)) for p in t.ports] for s, t in enumerate(self.stages)]
        return summary_html(repr(self), self.stages, [_stage_title(t) for t in self.stages], ports)

    def _hears(self, s: int, port: Port) -> tuple[int, int]:
        """(edges into a port of a stage, how many there could be)."""
        row = self.port_starts[s, port.name]
        rows = slice(row, row + len(self.stages[s].nodes))
        return int(self.edge_matrix[rows].sum()), int(self.possible_edges[rows].sum())

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
        for s in range(len(self.stages)):
            check_stage(self.stages, s)


def _stage_title(stage: Stage) -> str:
    if len(stage.nodes) == 1:
        return stage.nodes[0]
    stem = stage.nodes[0].rsplit(".", 1)[0]
    return f"{stem}.[{stage.nodes[0].rsplit('.', 1)[1]}..{stage.nodes[-1].rsplit('.', 1)[1]}]"
