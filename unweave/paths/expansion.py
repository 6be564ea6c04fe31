"""The path expansion: the logits of attention as a sum over chains of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import InputError, UnsupportedModelError
from unweave.execution import PortPlan, Trace, check_inputs, trace
from unweave.freezing import clean_pattern, clean_scale
from unweave.graph import Graph
from unweave.ops import Attention, Readout, RMSNorm, norm_bias, wide
from unweave.paths.weights import check_token_ids

__all__ = ["PathExpansion", "expand_paths"]


@dataclass(frozen=True, eq=False)
class PathExpansion:
    """The logits of a batch, term by term.

    Attributes:
        paths: of each term, the nodes it passes: a source, then heads. A source is an embedding, an MLP (as a
            writer), ``NODE.bias`` (what a head writes whatever it looks at, or a layer's constant) or
            ``unembed.bias``.
        logits: each term's share, before a cap of the logits.
        n_heads: how many heads each term passes.
        softcap: of the logits, or None.
        frozen: what is held at its value of this run, so that the terms add up.
    """

    paths: tuple[tuple[str, ...], ...]
    logits: Float[Tensor, "paths batch pos outputs"]
    n_heads: tuple[int, ...]
    softcap: float | None
    frozen: str = "patterns and norms"

    def total(self) -> Float[Tensor, "batch pos outputs"]:
        """All terms together: the graph's logits."""
        logits = self.logits.sum(0)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def by_depth(self) -> Float[Tensor, "heads batch pos outputs"]:
        """The terms that pass no head, one head, two heads, ..., added up."""
        depth = torch.tensor(self.n_heads, device=self.logits.device)
        out = self.logits.new_zeros(int(depth.max()) + 1, *self.logits.shape[1:])
        return out.index_add(0, depth, self.logits)


@dataclass
class _Terms:
    """The terms that stand in the stream so far.

    ``writers`` is the number, among the graph's writers, of the node each term was last written by; -1 for a stage's
    constant, which is never cut. ``stages`` is the stage that wrote it.
    """

    paths: list[tuple[str, ...]]
    n_heads: list[int]
    writers: list[int]
    stages: list[int]
    streams: Float[Tensor, "terms batch pos d_model"]

    def add(self, path: tuple[str, ...], writer: int, stage: int, stream: Float[Tensor, "batch pos d_model"]) -> None:
        self.extend([path], [0], [writer], stage, stream[None])

    def extend(
        self, paths: list[tuple[str, ...]], n_heads: list[int], writers: list[int], stage: int, streams: Tensor
    ) -> None:
        self.paths += paths
        self.n_heads += n_heads
        self.writers += writers
        self.stages += [stage] * len(paths)
        self.streams = torch.cat([self.streams, streams])


@torch.no_grad()
def expand_paths(
    graph: Graph,
    inputs: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    mlps: str | None = None,
    outputs: Int[Tensor, " outputs"] | None = None,
    max_paths: int = 1024,
) -> PathExpansion:
    """Every chain of heads from a source to the logits, as one term each; the terms sum to the logits exactly.

    With patterns A and norm scales held at their values of this run, a head is linear in what it hears, so

    logits = W_U F s (x_0 + sum_h OV_h A_h x_0 + sum_h' sum_h OV_h' A_h' OV_h A_h x_0 + ...) + constants:

    the direct path, single heads, pairs of heads (virtual attention heads), up to the model's depth, for every source.

    Args:
        inputs, mask: as for :func:`unweave.run`.
        mlps: "as writers" takes what each MLP writes in this run as a source, as it stands.
        outputs: only these logits.
        max_paths: refuse to make more terms than these.

    Returns:
        :class:`PathExpansion`; a term that is cut away is left out.

    Raises:
        UnsupportedModelError: the graph has MLPs (``mlps`` unset), or nodes that are neither.
        InputError: too many terms, ids out of range, or a graph whose cut edges hear another input.

    Cost:
        One forward pass, and per layer one batched product over terms. The number of terms is the product over layers
        of (1 + heads), for each source; memory paths x batch x positions x (d_model + outputs).

    Exact?
        Yes, up to floating-point summation order: it is an identity. What would happen if a term were changed is
        another question: patterns and scales would follow.

    Example:
        >>> import torch, unweave
        >>> graph, tokens = unweave.capture("zoo:induction"), torch.tensor([[0, 5, 9, 5]])
        >>> terms = expand_paths(graph, tokens)
        >>> torch.allclose(terms.total(), unweave.run(graph, tokens).logits, atol=1e-4)
        True

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    _check(graph, mlps)
    count = _count_paths(graph)
    if count > max_paths:
        raise InputError(
            f"the expansion has {count} terms and max_paths is {max_paths}; raise it, or restrict the graph to the "
            "edges that matter first"
        )
    t = trace(graph, check_inputs(graph, inputs, mask), keep=True, apart=True)
    start = wide(t.total[0])
    terms = _Terms([], [], [], [], start.new_zeros(0, *start.shape))
    for s, stage in enumerate(graph.stages[:-1]):
        if isinstance(stage.core, Attention):
            _through_heads(t, s, terms)
        else:
            for i, node in enumerate(stage.nodes):
                terms.add((node,), graph.writer_starts[s] + i, s, wide(t.node_writes(s)[:, i]))
        if stage.bias is not None:
            name = f"{stage.nodes[0].rpartition('.head.')[0] or stage.nodes[0]}.bias"
            terms.add((name,), -1, s, wide(stage.bias).expand_as(start))
    return _read_out(t, terms, outputs)


def _check(graph: Graph, mlps: str | None) -> None:
    if mlps not in (None, "as writers"):
        raise InputError(f"mlps must be 'as writers' or None, got {mlps!r}")
    if graph.resample:
        raise InputError("this graph's cut edges hear another input, which no path of this one begins at")
    names = [n for s in graph.stages[:-1] if s.kind != "embed" and not isinstance(s.core, Attention) for n in s.nodes]
    if names and mlps is None:
        raise UnsupportedModelError(
            f"paths do not pass through MLPs, which are not linear: {', '.join(names[:6])}"
            f"{', ...' if len(names) > 6 else ''}; pass mlps='as writers' to take what each writes as a source"
        )


def _count_paths(graph: Graph) -> int:
    """How many terms there will be, as if no edge were cut."""
    count = 0
    for stage in graph.stages[:-1]:
        n = len(stage.nodes)
        count += n * (count + 1) if isinstance(stage.core, Attention) else n
        count += stage.bias is not None
    return count + 1


def _heard(graph: Graph, s: int, port: str, terms: _Terms) -> Bool[Tensor, "nodes terms"]:
    """Which nodes of a stage hear which terms."""
    row, n = graph.port_starts[s, port], len(graph.stages[s].nodes)
    lo, hi = graph.stages[s].visible
    table = torch.cat([graph.edge_matrix[row : row + n], torch.ones(n, 1, dtype=torch.bool)], dim=1)
    visible = torch.tensor([lo <= stage < hi for stage in terms.stages], dtype=torch.bool)
    return table[:, terms.writers] & visible


def _constant(port: PortPlan, scale: Tensor, like: Float[Tensor, "... d"]) -> Float[Tensor, "batch node pos width"]:
    """What a port's nodes read whatever is written: biases of read and norm, and what cut edges left."""
    read, norm, n = port.reads[0], port.port.norm, len(port.row_of)
    folded = wide(read.folded(norm))
    _, own = read.per_node
    bare = wide(own.transpose(1, 2) if read.per_node[0] is None else own.transpose(1, 2) @ read.per_node[0].dense())
    out = torch.einsum("d,nwd->nw", norm_bias(norm, like), bare)[None, :, None]
    if read.bias is not None:
        out = out + wide(read.bias).repeat_interleave(n // read.blocks, 0)[None, :, None]
    out = out.expand(like.shape[0], -1, like.shape[1], -1)
    if port.port.offset is not None:
        offset = wide(port.port.offset)[:, : like.shape[1]]
        out = out + torch.einsum("ntd,nwd->ntw", offset, folded) * scale
    return out


def _scales(t: Trace, s: int, port: PortPlan) -> Float[Tensor, "batch #node pos 1"]:
    scale = wide(clean_scale(t, s, port))
    return scale if scale.shape[1] in (1, len(port.row_of)) else scale[:, port.row_of]


def _through_heads(t: Trace, s: int, terms: _Terms) -> None:
    """Add what the heads of a stage write of every term they hear, and of their own constants."""
    graph, stage, plan = t.graph, t.graph.stages[s], t.plan.stages[s]
    port = next(p for p in plan.ports if p.port.name == "v")
    scale, pattern = _scales(t, s, port), wide(clean_pattern(t, s))
    like = terms.streams[0] if len(terms.streams) else wide(t.total[0])
    write = wide(plan.node_write)[:, None].expand(-1, like.shape[0], -1, -1)
    after = _post_factor(t, s)

    def written(values: Float[Tensor, "... batch node pos width"]) -> Float[Tensor, "... batch node pos d_model"]:
        return torch.einsum("bnqk,...bnkw,nbwd->...bnqd", pattern, values, write) * after

    constants = written(_constant(port, scale, like))
    first = graph.writer_starts[s]
    heard = _heard(graph, s, "v", terms)
    values = torch.einsum("pbtd,nwd->pbntw", terms.streams, wide(port.reads[0].folded(port.port.norm))) * scale
    streams = rearrange(written(values), "p b n t d -> n p b t d")[heard.to(values.device)]
    pairs = heard.nonzero().tolist()
    paths = [(*terms.paths[p], stage.nodes[i]) for i, p in pairs]
    terms.extend(paths, [terms.n_heads[p] + 1 for _, p in pairs], [first + i for i, _ in pairs], s, streams)
    for i, node in enumerate(stage.nodes):
        terms.add((f"{node}.bias",), first + i, s, constants[:, i])


def _post_factor(t: Trace, s: int) -> Tensor:
    """What a norm behind the writes multiplied them with in this run; 1 where there is none."""
    post = t.graph.stages[s].post
    if post is None:
        return torch.ones(())
    assert isinstance(post, RMSNorm)
    plan = t.plan.stages[s]
    assert plan.write is not None
    whole = plan.write.apply(rearrange(t.codes[s], "b n t w -> b t (n w)"))
    return wide(post.scale(whole))[:, None]


def _read_out(t: Trace, terms: _Terms, outputs: Tensor | None) -> PathExpansion:
    graph, s = t.graph, len(t.graph.stages) - 1
    last = graph.stages[s]
    port = t.plan.stages[s].ports[0]
    scale = _scales(t, s, port)
    weight = wide(port.reads[0].folded(port.port.norm))[0]
    constant = _constant(port, scale, terms.streams[0])[:, 0]
    if outputs is not None:
        chosen = check_token_ids(outputs, len(weight)).to(weight.device)
        weight, constant = weight[chosen], constant[..., chosen]
    kept = _heard(graph, s, port.port.name, terms)[0]
    logits = (terms.streams[kept.to(terms.streams.device)] * scale[:, 0]) @ weight.T
    which: Sequence[int] = kept.nonzero()[:, 0].tolist()
    core = last.core
    factor, softcap = (core.scale, core.softcap) if isinstance(core, Readout) else (1.0, None)
    paths = (*(terms.paths[p] for p in which), (f"{last.nodes[0]}.bias",))
    n_heads = (*(terms.n_heads[p] for p in which), 0)
    return PathExpansion(paths, torch.cat([logits, constant[None]]) * factor, n_heads, softcap)
