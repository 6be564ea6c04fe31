"""Gradients at ports times what writers sent: all edges at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from unweave.execution import PortPlan, Trace
from unweave.graph import Graph
from unweave.ops import BlockMap
from unweave.statistics import (
    Gradients,
)

__all__ = ["BLOCK", "Products", "edge_products", "port_gradients", "products_by_edge", "products_by_token"]

# positions per block of the variance-reduced Fisher estimate
BLOCK = 4


def edge_products(t: Trace, sent: list[Tensor], gradients: Gradients) -> Float[Tensor, "batch ports writers"]:
    """The first-order change of the differentiated value if an edge were to carry what its writer writes instead of
    ``sent``, for every possible edge, cut ones too: sum over positions of g_j . (y_i - m_i)."""
    return Products(t, sent, t.context.n_pos)(gradients, cut_too=True).sum(1)


def products_by_token(t: Trace, sent: list[Tensor]) -> Callable[[Gradients], Float[Tensor, "batch pos ports writers"]]:
    """A function of gradients: :func:`edge_products` position by position, zero where there is no edge."""
    return Products(t, sent, 1)


def products_by_edge(t: Trace, sent: list[Tensor]) -> Callable[[Gradients], Float[Tensor, "batch pos edge"]]:
    """:func:`products_by_token` of the edges alone, in the order of ``graph.edges``."""
    return Products(t, sent, 1).by_edge


def port_gradients(t: Trace) -> Callable[[int, str, Gradients], Float[Tensor, "node batch pos d_model"]]:
    """A function of (stage, port, gradients): the gradient at what each node of the port hears."""
    products = Products(t, [], t.context.n_pos)

    def of(s: int, name: str, gradients: Gradients) -> Float[Tensor, "node batch pos d_model"]:
        (port,) = [p for p in t.plan.stages[s].ports if p.port.name == name]
        return products.gradient(s, port, gradients.reads[s, name])

    return torch.no_grad()(of)


class Products:
    """sum over positions of g_j . (y_i - m_i), for every edge, sequence and block of positions.

    With x the input of a port, n and s from :meth:`Norm.standardise`, F the folded read and a the gradient at
    the read, g = F^T (s a) - n (n . F^T (s a)) / d. The second factor needs no vector of length d: n . F^T a is
    a product of what was read with its gradient. So each port costs two matrix products and one pass over g.

    Everything is laid out ``[node, batch * block, within, d]``: one product per node over all tokens, and one
    per block over all nodes, with no copy between them. Where every writer has a place of its own (feature maps), the
    products come from the gradients of the maps that read them, and neither g nor each y_i is made.

    Args:
        of: the differences y_i - m_i of another run, in place of this one's.
    """

    def __init__(self, t: Trace, sent: list[Tensor], block: int, of: Products | None = None) -> None:
        self.t, self.block, self.sent = t, min(block, t.context.n_pos), sent
        self.one_stream = all(stage.visible[0] == 0 for stage in t.graph.stages)
        self.folded: dict[tuple[int, str], list[Tensor]] = {}
        self.normed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.along: dict[tuple[int, str], list[Tensor]] = {}
        self.of = self if of is None else of
        self.streams: dict[tuple[int, int], Tensor] = {}

    @cached_property
    @torch.no_grad()
    def written(self) -> list[Float[Tensor, "node batch_block within d"]]:
        """y_i - m_i by stage; with one residual stream, every stage sees a prefix of one stack."""
        out = []
        for s, other in enumerate(self.sent):
            written = self.t.node_writes(s).detach().float()
            out.append(self._blocks(written - rearrange(other, "n b t d -> b n t d").to(written)))
        return [torch.cat(out)] if self.one_stream else out

    def stream(self, lo: int, hi: int) -> Float[Tensor, "batch pos d"]:
        """The sum over writers of y_i - m_i."""
        if (lo, hi) not in self.streams:
            instead = [other.sum(0) for other in self.sent[lo:hi]]
            heard = self.t.stream(lo, hi).detach().float()
            self.streams[lo, hi] = heard - torch.stack([x.to(heard).expand_as(heard) for x in instead]).sum(0)
        return self.streams[lo, hi]

    def _blocks(self, x: Float[Tensor, "batch n pos d"]) -> Float[Tensor, "n batch_block within d"]:
        batch, nodes, n_pos, d = x.shape
        blocks = -(-n_pos // self.block)
        out = x.new_empty(nodes, batch, blocks * self.block, d)
        out[:, :, :n_pos], out[:, :, n_pos:] = x.transpose(0, 1), 0.0
        return rearrange(out, "n b (k w) d -> n (b k) w d", w=self.block)

    def _heard(self, graph: Graph, s: int) -> Float[Tensor, "batch_block within_d writers"]:
        if self.one_stream:
            heard = self.of.written[0][graph.visible_writers(s)]
        else:
            heard = torch.cat(self.of.written[slice(*graph.stages[s].visible)])
        return rearrange(heard, "n b w d -> b (w d) n")

    @torch.no_grad()
    def __call__(self, gradients: Gradients, *, cut_too: bool = False) -> Float[Tensor, "batch block ports writers"]:
        graph, batch = self.t.graph, self.t.context.inputs.shape[0]
        n = batch * -(-self.t.context.n_pos // self.block)
        out = torch.zeros(n, len(graph.ports), len(graph.writers), device=self.t.context.inputs.device)
        for s, row, product in self._by_port(gradients):
            out[:, row : row + product.shape[1], graph.visible_writers(s)] = product
        if not cut_too and graph.is_cut:
            out *= graph.edge_matrix.to(out)
        return rearrange(out, "(b k) p w -> b k p w", b=batch)

    @torch.no_grad()
    def by_edge(self, gradients: Gradients) -> Float[Tensor, "batch block edge"]:
        """The products of the edges alone, in their order: no table of all ports and writers is made."""
        graph, found = self.t.graph, []
        for s, row, product in self._by_port(gradients):
            there = graph.edge_matrix[row : row + product.shape[1], graph.visible_writers(s)].flatten()
            flat = product.flatten(1)
            found.append(flat if bool(there.all()) else flat[:, there.to(flat.device)])
        return rearrange(torch.cat(found, dim=1), "(b k) e -> b k e", b=self.t.context.inputs.shape[0])

    def _by_port(self, gradients: Gradients) -> Iterator[tuple[int, int, Float[Tensor, "batch_block node writers"]]]:
        """(stage, first row, products with all writers that it sees) of every port, row after row."""
        graph = self.t.graph
        for s, stage in enumerate(self.t.plan.stages):
            for port in stage.ports:
                reads = gradients.reads[s, port.port.name]
                product = self._in_places(s, port, reads)
                if product is None:
                    g = self.gradient(s, port, reads)
                    product = rearrange(g, "n b w d -> b n (w d)") @ self._heard(graph, s)
                yield s, graph.port_starts[s, port.port.name], product

    def _in_places(
        self, s: int, port: PortPlan, grads: list[Tensor]
    ) -> Float[Tensor, "batch_block node writers"] | None:
        """The products, pair by pair of maps; None where writers have no places of their own."""
        plan = self.t.plan.stages[s]
        if plan.places is None or port.norm is not None:
            return None
        total = torch.zeros(())
        x = rearrange(self.of.stream(*plan.stage.visible), "b t d -> (b t) d")
        for a, read in zip(grads, port.reads, strict=True):
            if not isinstance(read.map, BlockMap) or not read.in_blocks:
                return None
            g = rearrange(a.detach(), "b n t w -> (b t) n w")
            pairs = read.map.pair_products(g, x.to(g), plan.places)
            if pairs is None:
                return None
            total = total.to(pairs) + pairs.float()
        by_block = self._blocks(rearrange(total, "(b t) n i -> b n t i", b=grads[0].shape[0]))
        return rearrange(by_block.sum(2), "n b i -> b n i")

    def gradient(self, s: int, port: PortPlan, grads: list[Tensor]) -> Float[Tensor, "node batch_block within d"]:
        """The gradient at what each node hears."""
        key = (s, port.port.name)
        if port.norm is None and all(read.in_blocks for read in port.reads):
            return self._blocks(_total(read.pull(a).float() for a, read in zip(grads, port.reads, strict=True)))
        if key not in self.folded:
            self.folded[key] = [read.folded(port.norm).float() for read in port.reads]
        folded = self.folded[key]
        if port.norm is None:
            return _total(_per_node(self._blocks(a.float()), f) for a, f in zip(grads, folded, strict=True))
        inverse, n = self._standardised(key, port)
        blocks = [self._blocks(a.float() * inverse) for a in grads]
        g = _per_node(blocks[0], folded[0])
        for a, f in zip(blocks[1:], folded[1:], strict=True):
            g += _per_node(a, f)
        if port.norm.is_linear:
            return g
        if key not in self.along:
            self.along[key] = [_per_node(n, f.transpose(1, 2)) for f in folded]
        weight = _total((a * e).sum(-1, keepdim=True) for a, e in zip(blocks, self.along[key], strict=True))
        return g.addcmul_(weight, n, value=-1.0 / n.shape[-1])

    def _standardised(self, key: tuple[int, str], port: PortPlan) -> tuple[Tensor, Tensor]:
        """s and n of a port's input, made once for all cotangents and for all ports that hear and normalise alike."""
        heard = self.t.inputs[key]
        shared = (id(heard), id(port.norm))
        if shared not in self.normed:
            assert port.norm is not None
            x, nodes = heard.detach().float(), len(port.row_of)
            n, inverse = port.norm.standardise(x if x.shape[1] in (1, nodes) else x[:, port.row_of])
            self.normed[shared] = inverse, self._blocks(n)
        return self.normed[shared]


def _total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _per_node(x: Float[Tensor, "#node batch_block within w"], weight: Float[Tensor, "node w d"]) -> Tensor:
    """Each node's own matrix applied to its tokens."""
    flat = x.flatten(1, 2).expand(weight.shape[0], -1, -1) @ weight
    return flat.unflatten(1, x.shape[1:3])
