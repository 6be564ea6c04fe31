"""What a graph is made of: edges, reads, ports, stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave import tree
from unweave.errors import InputError
from unweave.ops import Attention, BlockMap, Core, LinearMap, Norm

__all__ = ["Edge", "Port", "Read", "Stage", "Wires"]


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

    @property
    def n_parameters(self) -> int:
        """Stored numbers; the bias of a feature map, which all of its pixels share, counts once."""
        if self.bias is None:
            return self.map.n_parameters
        shared = isinstance(self.map, BlockMap) and self.map.shares_pixels
        return self.map.n_parameters + (len(self.widths) if shared else self.bias.numel())


@tree.register
@dataclass(frozen=True, eq=False)
class Wires:
    """Edges of a port that carry k dimensions: the node hears r + left right (y - r) of what a writer writes, y.

    r is what an ablated edge carries. Edges that carry fewer than the widest of the port are padded with zeros.

    Attributes:
        nodes: the place of each edge's reader in the stage.
        writers: the place of each edge's writer among those visible.
        left, right: the two factors of each projection.
    """

    nodes: Int[Tensor, " edges"]
    writers: Int[Tensor, " edges"]
    left: Float[Tensor, "edges d_model k"]
    right: Float[Tensor, "edges k d_model"]

    def carry(self, sent: Float[Tensor, "batch edges pos d_model"]) -> Float[Tensor, "batch edges pos d_model"]:
        """The projection of what each edge is given."""
        return sent @ self.right.mT @ self.left.mT

    def select(self, which: Bool[Tensor, " edges"]) -> Wires | None:
        """Some of the edges; None if none."""
        if not bool(which.any()):
            return None
        return Wires(self.nodes[which], self.writers[which], self.left[which], self.right[which])

    @property
    def n_dimensions(self) -> Int[Tensor, " edges"]:
        """How many dimensions each edge carries."""
        return (self.right != 0).any(-1).sum(-1)


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
        wires: edges that carry only some dimensions, after :meth:`Graph.narrow`; ``edges`` counts them as cut.
        reach: which visible writer each node can hear at all; None when all can. The others' places are not read:
            maps of another group of a convolution, or of a layer between the two that a skip connects.
    """

    name: str
    reads: tuple[Read, ...]
    norm: Norm | None = None
    edges: Bool[Tensor, "nodes writers"] | None = None
    offset: Float[Tensor, "nodes #pos d_model"] | None = None
    wires: Wires | None = None
    reach: Bool[Tensor, "nodes writers"] | None = None

    @property
    def is_cut(self) -> bool:
        """Whether something was cut or left in place of it."""
        return self.edges is not None or self.offset is not None or self.wires is not None

    def kept(self, n_writers: int, n_nodes: int) -> Bool[Tensor, "nodes writers"]:
        """Which writers each node hears, in whole or in part."""
        marked = torch.ones(n_nodes, n_writers, dtype=torch.bool) if self.edges is None else self.edges.cpu().clone()
        if self.wires is not None:
            marked[self.wires.nodes.cpu(), self.wires.writers.cpu()] = True
        return marked


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
        positions: where each node writes, after :meth:`Graph.unroll`; None where all write everywhere.
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
    positions: Bool[Tensor, "nodes pos"] | None = None

    @cached_property
    def n_parameters(self) -> int:
        """Stored numbers: maps, biases, norms, tables; constants left by cut edges are not counted."""
        maps = [read.n_parameters for port in self.ports for read in port.reads]
        loose = [
            self.bias,
            *(t for port in self.ports if port.wires is not None for t in (port.wires.left, port.wires.right)),
        ]
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
