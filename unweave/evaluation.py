"""How far a graph is from the network: one table, on held-out data, with intervals and the tail."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unweave.ablation import Means, batch_trace
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError
from unweave.graph import CHANNEL_KINDS, Graph
from unweave.progress import track
from unweave.scope import Scope, agreement, divergence, loss, position_mask

__all__ = ["Estimate", "Faithfulness", "evaluate", "mean_ablated"]

# per-token divergences are counted in bins of equal width on a log scale: quantiles good to 1%, memory flat
BINS = np.logspace(-9, 3, 2401)


class Estimate(NamedTuple):
    """A mean with its 95% interval (bootstrap over sequences)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Faithfulness:
    """How one graph compares with the original, over held-out tokens.

    Attributes:
        kl_nats: divergence to the original's output, nats per token of the scope.
        loss_nats: its own next-token loss (NaN for networks without tokens).
        top1_agreement: how often both put the same output first.
        loss_recovered: (L0 - L) / (L0 - L*), with L0 the loss when every channel is at its mean.
        kl_p99, kl_p999, kl_max: the tail of the divergence over tokens.
        worst: the tokens where it is largest: (nats, sequence, position, context ids, the two predictions).
        n_sequences, n_tokens: on how much data.
    """

    kl_nats: Estimate
    loss_nats: Estimate
    top1_agreement: Estimate
    loss_recovered: Estimate
    kl_p99: float
    kl_p999: float
    kl_max: float
    worst: tuple[tuple[float, int, int, tuple[int, ...], int, int], ...]
    n_sequences: int
    n_tokens: int


@dataclass
class _Tally:
    """Per-sequence sums, a histogram and the worst tokens of one graph."""

    per_sequence: list[np.ndarray] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(BINS) + 1, dtype=np.int64))
    top: float = 0.0
    worst: list[tuple[float, int, int, tuple[int, ...], int, int]] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    graphs: Mapping[str, Graph],
    original: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    means: Means | None = None,
    batch_size: int = 16,
    n_worst: int = 20,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Faithfulness]:
    """Compare graphs with the original on the same held-out data, in one pass.

    Args:
        graphs: by name; the original itself and the all-means baseline are added as "original" and
            "every channel at its mean" (the latter only with ``means``).
        means: from :func:`unweave.collect_means` on calibration data.

    Returns:
        name -> :class:`Faithfulness`.

    Raises:
        EmptyDataError: no position is left in the scope.

    Cost:
        One forward pass per graph; memory a few numbers per sequence.

    Exact?
        Means are; the 99% and 99.9% quantiles are read off a histogram whose bins are 1.2% wide.
    """
    scope = scope or Scope()
    every = {"original": original, **graphs}
    if means is not None:
        every["every channel at its mean"] = mean_ablated(original, means)
    tallies = {name: _Tally() for name in every}
    total = -(-len(data) // batch_size)
    for batch in track(data.batches(batch_size), "comparing with the model", total, show=progress):
        reference = batch_trace(original, batch).output
        for name, graph in every.items():
            logits = reference if name == "original" else batch_trace(graph, batch).output
            _count(tallies[name], scope, batch, reference, logits, n_worst)
    sums = {name: np.concatenate(t.per_sequence) for name, t in tallies.items()}
    if sums["original"][:, 1].sum() == 0:
        raise EmptyDataError("the scope selects no position of the held-out data")
    floor = sums.get("every channel at its mean")
    return {name: _summary(sums[name], sums["original"], floor, t, seed) for name, t in tallies.items()}


def mean_ablated(graph: Graph, means: Means) -> Graph:
    """The graph in which no channel says anything but its mean: only embeddings reach the output."""
    channels = {n for s in graph.stages if s.kind in CHANNEL_KINDS for n in s.nodes}
    keep = graph.edge_matrix & torch.tensor([w not in channels for w in graph.writers])
    return graph.restrict(keep, means=means)


def _count(t: _Tally, scope: Scope, batch: Batch, reference: Tensor, logits: Tensor, n_worst: int) -> None:
    mask = position_mask(scope, batch).to(logits.device)
    kl = divergence(scope, reference, logits, batch)
    same = agreement(reference, logits) & mask
    # reals, or tokens that are no outputs: the network does not say what comes next
    if batch.inputs.is_floating_point() or int(batch.inputs.max()) >= logits.shape[-1]:
        cross, real = torch.full_like(kl, torch.nan), mask
    else:
        cross, real = loss(logits, batch)
        real = real & mask
        cross = torch.where(real, cross, 0.0)
    columns = [kl.sum(1), mask.sum(1), same.sum(1), cross.sum(1), real.sum(1)]
    t.per_sequence.append(torch.stack([c.double() for c in columns], 1).cpu().numpy())
    values = kl[mask].cpu().numpy()
    t.counts += np.bincount(np.searchsorted(BINS, values), minlength=len(BINS) + 1)
    t.top = max(t.top, float(values.max(initial=0.0)))
    _keep_worst(t, batch, kl, reference, logits, n_worst)


def _keep_worst(t: _Tally, batch: Batch, kl: Tensor, reference: Tensor, logits: Tensor, n: int) -> None:
    if batch.inputs.is_floating_point() or n == 0:
        return
    top = kl.flatten().topk(min(n, kl.numel()))
    for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        row, pos = divmod(place, kl.shape[1])
        context = tuple(batch.inputs[row, max(0, pos - 24) : pos + 1].tolist())
        guesses = int(reference[row, pos].argmax()), int(logits[row, pos].argmax())
        item = (value, int(batch.index[row]), pos, context, *guesses)
        if len(t.worst) < n:
            heapq.heappush(t.worst, item)
        else:
            heapq.heappushpop(t.worst, item)


def _summary(sums: np.ndarray, best: np.ndarray, floor: np.ndarray | None, t: _Tally, seed: int) -> Faithfulness:
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(sums), len(sums)) for _ in range(500)]

    def ratio(top: int, bottom: int, table: np.ndarray, rows: Any = slice(None)) -> float:
        return float(table[rows, top].sum() / max(table[rows, bottom].sum(), 1e-12))

    def estimate(top: int, bottom: int) -> Estimate:
        values = [ratio(top, bottom, sums, rows) for rows in draws]
        return Estimate(ratio(top, bottom, sums), *_interval(values))

    def recovered(rows: Any = slice(None)) -> float:
        assert floor is not None
        worst, perfect = ratio(3, 4, floor, rows), ratio(3, 4, best, rows)
        return (worst - ratio(3, 4, sums, rows)) / (worst - perfect) if worst > perfect else float("nan")

    recovery = Estimate(float("nan"), float("nan"), float("nan"))
    if floor is not None:
        recovery = Estimate(recovered(), *_interval([recovered(rows) for rows in draws]))
    return Faithfulness(
        estimate(0, 1),
        estimate(3, 4),
        estimate(2, 1),
        recovery,
        _quantile(t, 0.99),
        _quantile(t, 0.999),
        t.top,
        tuple(sorted(t.worst, reverse=True)),
        len(sums),
        int(sums[:, 1].sum()),
    )


def _interval(values: list[float]) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _quantile(t: _Tally, q: float) -> float:
    place = int(np.searchsorted(t.counts.cumsum(), q * t.counts.sum()))
    return min(float(BINS[min(place, len(BINS) - 1)]), t.top) if place else 0.0
