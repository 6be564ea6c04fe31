"""How far a graph is from the network: one table, on held-out data, with intervals and the tail."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unweave.ablation import Means, batch_trace, counterfactual_trace
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError
from unweave.graph import CHANNEL_KINDS, Graph
from unweave.intervals import Estimate, divide, interval_of, resampled_sums
from unweave.progress import track
from unweave.scope import Scope, divergence, loss, position_mask

__all__ = ["ALL", "FLOOR", "Faithfulness", "evaluate", "evaluate_parts", "mean_ablated"]

# the part that is every position of the scope, and the graph that recovers none of the loss
ALL = "all"
FLOOR = "every channel at its mean"

# per-token divergences are counted in bins of equal width on a log scale: quantiles good to 1%, memory flat
BINS = np.logspace(-9, 3, 2401)


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

    def table(self) -> list[dict[str, Any]]:
        """One plain row: divergence, loss, agreement and loss recovered with intervals, the tail, on how much."""
        intervals = (
            self.kl_nats.columns("kl_nats"),
            self.loss_nats.columns("loss_nats"),
            self.top1_agreement.columns("top1_agreement"),
            self.loss_recovered.columns("loss_recovered"),
        )
        row: dict[str, Any] = {name: value for columns in intervals for name, value in columns.items()}
        row |= {"kl_p99_nats": self.kl_p99, "kl_p999_nats": self.kl_p999, "kl_max_nats": self.kl_max}
        return [row | {"n_sequences": self.n_sequences, "n_tokens": self.n_tokens}]


@dataclass
class _Tally:
    """Per-sequence sums, a histogram and the worst tokens of one graph."""

    per_sequence: list[np.ndarray] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(BINS) + 1, dtype=np.int64))
    top: float = 0.0
    worst: list[tuple[float, int, int, tuple[int, ...], int, int]] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """How many positions were counted."""
        return int(self.counts.sum())


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
    options: dict[str, Any] = {"batch_size": batch_size, "n_worst": n_worst, "seed": seed, "progress": progress}
    return evaluate_parts(graphs, original, data, scope, {}, means=means, **options)[ALL]


@torch.no_grad()
def evaluate_parts(
    graphs: Mapping[str, Graph],
    original: Graph,
    data: TokenData,
    scope: Scope | None,
    parts: Mapping[str, Callable[[Batch], Tensor]],
    *,
    means: Means | None = None,
    batch_size: int = 16,
    n_worst: int = 20,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, dict[str, Faithfulness]]:
    """:func:`evaluate` on all positions of the scope and on parts of them, in the same pass.

    Args:
        parts: by name, a function of a batch that marks positions ``[batch pos]``.

    Returns:
        name of the part -> name of the graph -> :class:`Faithfulness`; "all" first, parts without a position left out.

    Raises:
        EmptyDataError: no position is left in the scope.
    """
    scope = scope or Scope()
    every = {"original": original, **graphs}
    if means is not None:
        every[FLOOR] = mean_ablated(original, means)
    # the partners' run is shared by graphs of the same nodes; one divided by position makes its own
    sharing = {name for name, graph in every.items() if graph.resample and graph.writers == original.writers}
    tallies = {part: {name: _Tally() for name in every} for part in (ALL, *parts)}
    total = -(-len(data) // batch_size)
    for batch in track(data.batches(batch_size), "comparing with the model", total, show=progress):
        reference = batch_trace(original, batch).output
        other = counterfactual_trace(original, batch) if sharing else None
        inside = position_mask(scope, batch)
        masks = {ALL: inside} | {name: inside & part(batch).to(inside.device) for name, part in parts.items()}
        for name, graph in every.items():
            shared = other if name in sharing else None
            logits = reference if name == "original" else batch_trace(graph, batch, other=shared).output
            tokens = _compare(scope, batch, reference, logits)
            for part, mask in masks.items():
                _count(tallies[part][name], batch, tokens, mask.to(logits.device), n_worst)
    found = {part: _summaries(rows, seed) for part, rows in tallies.items() if rows["original"].n_tokens > 0}
    if ALL not in found:
        raise EmptyDataError("the scope selects no position of the held-out data")
    return found


def _summaries(tallies: Mapping[str, _Tally], seed: int) -> dict[str, Faithfulness]:
    totals = {name: resampled_sums(np.concatenate(t.per_sequence), seed) for name, t in tallies.items()}
    return {name: _summary(totals[name], totals["original"], totals.get(FLOOR), t) for name, t in tallies.items()}


def mean_ablated(graph: Graph, means: Means) -> Graph:
    """The graph in which no channel says anything but its mean: only embeddings reach the output."""
    channels = {n for s in graph.stages if s.kind in CHANNEL_KINDS for n in s.nodes}
    keep = graph.edge_matrix & torch.tensor([w not in channels for w in graph.writers])
    return graph.restrict(keep, means=means)


class _Tokens(NamedTuple):
    """One graph on one batch, by position: divergence, next-token loss and where there is one, both outputs' firsts."""

    kl: Tensor
    cross: Tensor
    real: Tensor
    expected: Tensor
    said: Tensor


def _compare(scope: Scope, batch: Batch, reference: Tensor, logits: Tensor) -> _Tokens:
    kl = divergence(scope, reference, logits, batch)
    # reals, or tokens that are no outputs: the network does not say what comes next
    if batch.inputs.is_floating_point() or int(batch.inputs.max()) >= logits.shape[-1]:
        cross, real = torch.full_like(kl, torch.nan), torch.ones_like(kl, dtype=torch.bool)
    else:
        cross, real = loss(logits, batch)
    return _Tokens(kl, cross, real, reference.argmax(-1), logits.argmax(-1))


def _count(t: _Tally, batch: Batch, tokens: _Tokens, mask: Tensor, n_worst: int) -> None:
    kl = torch.where(mask, tokens.kl, 0.0)
    same = (tokens.expected == tokens.said) & mask
    real = tokens.real & mask
    columns = [kl.sum(1), mask.sum(1), same.sum(1), torch.where(real, tokens.cross, 0.0).sum(1), real.sum(1)]
    t.per_sequence.append(torch.stack([c.double() for c in columns], 1).cpu().numpy())
    values = kl[mask].cpu().numpy()
    t.counts += np.bincount(np.searchsorted(BINS, values), minlength=len(BINS) + 1)
    t.top = max(t.top, float(values.max(initial=0.0)))
    _keep_worst(t, batch, tokens, torch.where(mask, tokens.kl, -1.0), n_worst)


def _keep_worst(t: _Tally, batch: Batch, tokens: _Tokens, kl: Tensor, n: int) -> None:
    """Keep the n worst tokens; ``kl`` is negative where a token does not count."""
    if batch.inputs.is_floating_point() or n == 0:
        return
    top = kl.flatten().topk(min(n, int((kl >= 0).sum())))
    for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        row, pos = divmod(place, kl.shape[1])
        context = tuple(batch.inputs[row, max(0, pos - 24) : pos + 1].tolist())
        guesses = int(tokens.expected[row, pos]), int(tokens.said[row, pos])
        item = (value, int(batch.index[row]), pos, context, *guesses)
        if len(t.worst) < n:
            heapq.heappush(t.worst, item)
        else:
            heapq.heappushpop(t.worst, item)


def _summary(sums: np.ndarray, best: np.ndarray, floor: np.ndarray | None, t: _Tally) -> Faithfulness:
    def ratio(top: int, bottom: int, table: np.ndarray = sums) -> np.ndarray:
        return divide(table[:, top], table[:, bottom])

    recovered = np.full(len(sums), np.nan)
    if floor is not None:
        worst, perfect = ratio(3, 4, floor), ratio(3, 4, best)
        recovered = divide(worst - ratio(3, 4), np.maximum(worst - perfect, 0))
    return Faithfulness(
        interval_of(ratio(0, 1)),
        interval_of(ratio(3, 4)),
        interval_of(ratio(2, 1)),
        interval_of(recovered),
        _quantile(t, 0.99),
        _quantile(t, 0.999),
        t.top,
        tuple(sorted(t.worst, reverse=True)),
        sum(len(rows) for rows in t.per_sequence),
        t.n_tokens,
    )


def _quantile(t: _Tally, q: float) -> float:
    place = int(np.searchsorted(t.counts.cumsum(), q * t.counts.sum()))
    return min(float(BINS[min(place, len(BINS) - 1)]), t.top) if place else 0.0
