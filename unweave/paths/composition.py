"""How much each head reads of what each earlier head writes, from the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import InputError
from unweave.execution import check_inputs, plan_of, trace
from unweave.graph import Graph
from unweave.ops import Attention, RMSNorm, wide
from unweave.paths.circuits import turn
from unweave.paths.weights import port_of
from unweave.statistics import Sums, accumulate

__all__ = ["Composition", "composition"]


@dataclass(frozen=True, eq=False)
class Composition:
    """Composition scores of all pairs of heads; NaN where the reader does not hear the writer.

    Attributes:
        heads: rows (readers) and columns (writers), in order.
        q, k, v: by which port: the ratio of norms, minus the baseline.
        baseline: what heads that know nothing of each other get, 1 / sqrt(d_model).
        weighted: whether writers count with what they write on data.
    """

    heads: tuple[str, ...]
    q: Float[Tensor, "readers writers"]
    k: Float[Tensor, "readers writers"]
    v: Float[Tensor, "readers writers"]
    baseline: float
    weighted: bool

    def table(self, k: int | None = None) -> list[dict[str, Any]]:
        """The k largest scores as plain rows: edge, score."""
        flat = torch.stack([self.q, self.k, self.v]).nan_to_num(-torch.inf).flatten()
        known = int((flat > -torch.inf).sum())
        top = flat.topk(known if k is None else min(k, known))
        n = len(self.heads)
        rows = []
        for score, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            port, pair = divmod(place, n * n)
            reader, writer = divmod(pair, n)
            rows.append({"edge": f"{self.heads[writer]}->{self.heads[reader]}.{'qkv'[port]}", "score": score})
        return rows


def composition(
    graph: Graph,
    *,
    distance: int = 0,
    data: TokenData | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Composition:
    """q-, k- and v-composition of every pair of heads (reader B, earlier writer A).

    With QK = W_Q^T W_K and OV = W_O W_V: q: |QK_B^T OV_A| / (|QK_B| |OV_A|), k: |QK_B OV_A| / (|QK_B| |OV_A|),
    v: |OV_B OV_A| / (|OV_B| |OV_A|), in Frobenius norms, minus the baseline. The linear parts of norms are folded in.
    The baseline 1 / sqrt(d_model) is exactly the root mean square of the ratio when A is turned at random.

    Args:
        distance: how many tokens the query comes after the key, for rotary embeddings.
        data: weight writers by it: OV_A is replaced by W_O C^1/2, where C is the covariance of A's code over the
            real tokens, so that directions A never writes do not count.

    Returns:
        :class:`Composition`.

    Raises:
        InputError: the graph has no attention heads.

    Cost:
        Per layer, one batched product of ranks x ranks for all pairs; no d_model x d_model matrix. With data, one
        forward pass.

    Exact?
        Yes, of the linear parts; the scales of norms are left out.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> composition(graph).table(1)[0]["edge"]
        'blocks.0.attn.head.0->blocks.1.attn.head.1.k'

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (whose baseline is sampled).
    """
    stages = [s for s, stage in enumerate(graph.stages) if isinstance(stage.core, Attention)]
    if not stages:
        raise InputError("the graph has no attention heads, so none can compose; it needs at least one")
    heads = tuple(n for s in stages for n in graph.stages[s].nodes)
    covariances = None if data is None else _code_covariances(graph, data, batch_size, progress)
    factors = {s: _factors(graph, s, distance) for s in stages}
    place = {s: sum(len(graph.stages[r].nodes) for r in stages if r < s) for s in stages}
    width = next(iter(factors.values()))["o"].shape[-1]
    scores = {name: torch.full((len(heads), len(heads)), torch.nan) for name in "qkv"}
    for b in stages:
        for a in (a for a in stages if a < b):
            writer = factors[a]
            inner = _gram(writer["v"]) if covariances is None else covariances[a].to(writer["o"])
            rows, columns = (slice(place[s], place[s] + len(graph.stages[s].nodes)) for s in (b, a))
            for name, ratio in _ratios(factors[b], writer["o"], inner).items():
                heard = _heard(graph, b, a, name)
                scores[name][rows, columns] = torch.where(heard, ratio.cpu() - width**-0.5, torch.nan).float()
    return Composition(heads, scores["q"], scores["k"], scores["v"], width**-0.5, data is not None)


def _factors(graph: Graph, s: int, distance: int) -> dict[str, Float[Tensor, "head width d_model"]]:
    """W_Q, W_K, W_V (folded) and W_O^T of every head of a stage."""
    stage, plan = graph.stages[s], plan_of(graph).stages[s]
    core = stage.core
    assert isinstance(core, Attention)
    out = {}
    for port in plan.ports:
        norm = port_of(stage, port.port.name).norm
        out[port.port.name] = wide(port.reads[0].folded(norm))
    for name, norm, at in (("q", core.q_norm, distance), ("k", core.k_norm, 0)):
        weight = out[name] if norm is None else out[name] * norm.gain[:, None]
        turned = turn(core.rotary, rearrange(weight, "n w d -> (n d) w"), at)
        out[name] = rearrange(turned, "(n d) w -> n w d", n=len(weight))
    out["o"] = wide(plan.node_write)
    if isinstance(stage.post, RMSNorm):
        out["o"] = stage.post.fold(out["o"])
    return out


def _gram(x: Float[Tensor, "head width d"]) -> Float[Tensor, "head width width"]:
    return x @ x.transpose(1, 2)


def _ratios(
    reader: Mapping[str, Tensor], o: Float[Tensor, "writer width d"], inner: Float[Tensor, "writer width width"]
) -> dict[str, Float[Tensor, "reader writer"]]:
    """|X Y^T| / (|X| |Y|) for X = outer^T read, Y = inner^1/2 o, of every pair, from their small Gram matrices."""
    outer = {"q": _gram(reader["k"]), "k": _gram(reader["q"]), "v": _gram(reader["o"])}
    written = (_gram(o) * inner).sum((1, 2))
    out = {}
    for name, gram in outer.items():
        both = torch.einsum("bwd,avd->bawv", reader[name], o)
        squared = (torch.einsum("bwx,baxv->bawv", gram, both) * torch.einsum("bawx,axv->bawv", both, inner)).sum((2, 3))
        size = (_gram(reader[name]) * gram).sum((1, 2))[:, None] * written
        ratio = (squared.clamp(min=0) / size.clamp(min=torch.finfo(size.dtype).tiny)).sqrt()
        out[name] = torch.where(size > 0, ratio, o.shape[-1] ** -0.5)  # a head that does nothing shows nothing
    return out


def _heard(graph: Graph, reader: int, writer: int, port: str) -> Bool[Tensor, "readers writers"]:
    row, column = graph.port_starts[reader, port], graph.writer_starts[writer]
    rows = slice(row, row + len(graph.stages[reader].nodes))
    return graph.edge_matrix[rows, column : column + len(graph.stages[writer].nodes)]


def _code_covariances(
    graph: Graph, data: TokenData, batch_size: int, progress: bool | None
) -> dict[int, Float[Tensor, "head width width"]]:
    """The covariance of each head's code over the real tokens, by stage."""
    stages = [s for s, stage in enumerate(graph.stages) if isinstance(stage.core, Attention)]

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        weight = batch.mask.to(graph.device, torch.float64)
        out: Sums = {"tokens": weight.sum()}
        for s in stages:
            code = t.codes[s].to(torch.float64)
            out[f"sum{s}"] = torch.einsum("bntw,bt->nw", code, weight)
            out[f"square{s}"] = torch.einsum("bntw,bntv,bt->nwv", code, code, weight)
        return out

    sums = accumulate(data, step, batch_size=batch_size, description="codes of heads", progress=progress)
    found = {}
    for s in stages:
        mean = sums[f"sum{s}"] / sums["tokens"]
        found[s] = sums[f"square{s}"] / sums["tokens"] - mean[:, :, None] * mean[:, None]
    return found
