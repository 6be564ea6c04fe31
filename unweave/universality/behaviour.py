"""How alike nodes of two networks behave on the same texts: where heads look, and what the output would miss.

Both are correlations over a data set that know nothing of the network's inner coordinates:

- patterns: of attention over even attention, A_h[t, s] - 1 / (visible keys of t), over all queries and keys.
- effects: of what the output loses without the node, e_i[t, v] = sqrt(p[t, v]) (log p[t, v] - log p_i[t, v]), with p_i
  the output when node i writes its mean; |e_i[t]|^2 / 2 is about the KL. Over real outputs, e = y - y_i. Between
  different vocabularies, the KL itself.

Permuting heads or neurons and rotating the stream change neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.execution import check_inputs, trace
from unweave.graph import Graph
from unweave.ops import Attention, wide
from unweave.statistics import Sums
from unweave.universality.aligning import Units

__all__ = ["Effects", "correlation", "head_patterns", "products"]

# vocabularies above this are seen through as many random signed sums, the same for both networks
SKETCH = 256
IDLE = 1e-8


def products(x: Float[Tensor, "a samples width"], y: Float[Tensor, "b samples width"]) -> Sums:
    """Sums over samples from which :func:`correlation` is made."""
    x, y = x.double().cpu(), y.double().cpu()
    return {
        "n": torch.tensor(float(x.shape[1])),
        "a": x.sum(1),
        "b": y.sum(1),
        "aa": x.square().sum((1, 2)),
        "bb": y.square().sum((1, 2)),
        "ab": x.flatten(1) @ y.flatten(1).T,
    }


def correlation(sums: Sums) -> Float[Tensor, "a b"]:
    """The correlation between all pairs; 0 where one of them is constant beside the others."""
    n = sums["n"]
    a = sums["aa"] - sums["a"].square().sum(1) / n
    b = sums["bb"] - sums["b"].square().sum(1) / n
    between = sums["ab"] - sums["a"] @ sums["b"].T / n
    live = (a > IDLE * a.max())[:, None] & (b > IDLE * b.max())
    return torch.where(live, between / (a[:, None] * b).clamp(min=torch.finfo(a.dtype).tiny).sqrt(), 0.0)


def head_patterns(graph: Graph, batch: Batch, units: Units) -> Float[Tensor, "head samples 1"]:
    """What each head spends on each unit more than even attention would, over all real queries and keys."""
    stages = [stage for stage in graph.stages if isinstance(stage.core, Attention)]
    context = check_inputs(graph, batch.inputs, batch.mask)
    t = trace(graph, context, record=frozenset(f"{n}.pattern" for stage in stages for n in stage.nodes))
    real = units.mask[:, :, None] & units.mask[:, None]
    out = []
    for stage in stages:
        assert isinstance(stage.core, Attention)
        seen = stage.core.visible(context)
        if seen is None:
            n = context.n_pos
            seen = torch.ones(1, 1, n, n, dtype=torch.bool, device=graph.device)
            seen = seen.tril() if stage.core.causal else seen
        even = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        patterns = torch.stack([t.values[f"{n}.pattern"] for n in stage.nodes], dim=1).float()
        out.append(units.between(patterns - even).transpose(0, 1)[:, real])
    return torch.cat(out)[..., None]


@dataclass(frozen=True, eq=False)
class Effects:
    """What a network's output loses without each of some nodes.

    Attributes:
        means: what each node writes on average.
        scalar: the KL alone, for vocabularies that cannot be compared.
    """

    graph: Graph
    nodes: tuple[str, ...]
    means: Mapping[str, Tensor]
    scalar: bool = False

    def __call__(self, batch: Batch, units: Units) -> Float[Tensor, "node samples width"]:
        context = check_inputs(self.graph, batch.inputs, batch.mask)
        whole = wide(trace(self.graph, context).output)
        found = []
        for node in self.nodes:
            without = wide(trace(self.graph, context, patch={node: self.means[node]}).output)
            found.append(self._lost(units.at(whole[:, None])[:, 0], units.at(without[:, None])[:, 0])[units.mask])
        return torch.stack(found)

    def _lost(self, whole: Float[Tensor, "b u v"], without: Float[Tensor, "b u v"]) -> Float[Tensor, "b u w"]:
        if self.graph.info.get("d_input") is not None:
            return whole - without
        log_p, log_q = whole.log_softmax(-1), without.log_softmax(-1)
        if self.scalar:
            return (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        lost = (0.5 * log_p).exp() * (log_p - log_q)
        return lost if lost.shape[-1] <= SKETCH else lost @ _signs(lost.shape[-1]).to(lost)


def _signs(size: int) -> Float[Tensor, "size sketch"]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 2, (size, SKETCH), generator=generator) * 2.0 - 1) / math.sqrt(SKETCH)


def same_outputs(graph_a: Graph, graph_b: Graph, data_b: TokenData | None) -> bool:
    """Whether outputs of the two networks mean the same, number by number."""
    return data_b is None and graph_a.info.get("d_out") == graph_b.info.get("d_out")
