"""Discard: what leaving out all that a graph does not explain costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from unweave.ablation import batch_trace
from unweave.data import TokenData
from unweave.errors import EmptyDataError
from unweave.graph import Graph
from unweave.intervals import Estimate, divide, interval_of, resampled_sums
from unweave.scope import Scope, divergence, loss, position_mask

__all__ = ["DiscardCost", "discard_cost"]

DRAWS = 1000


@dataclass(frozen=True)
class DiscardCost:
    """What is lost when only the explained part is kept.

    Attributes:
        kl_nats: divergence of the part's output from the model's, nats per token of the scope.
        loss_nats, model_loss_nats: next-token losses of the part and of the model.
        cost_nats: their difference, with the interval of the difference.
        numbers: the part's numbers as a share of the model's, embeddings included.
        n_sequences, n_tokens: on how much data.
    """

    kl_nats: Estimate
    loss_nats: Estimate
    model_loss_nats: Estimate
    cost_nats: Estimate
    numbers: float
    n_sequences: int
    n_tokens: int

    def table(self) -> list[dict[str, Any]]:
        """One plain row: every figure with its interval, and on how much."""
        row: dict[str, Any] = {}
        for name in ("kl_nats", "loss_nats", "model_loss_nats", "cost_nats"):
            row |= getattr(self, name).columns(name)
        row["numbers_share"] = self.numbers
        return [row | {"n_sequences": self.n_sequences, "n_tokens": self.n_tokens}]


@torch.no_grad()
def discard_cost(
    graph: Graph, original: Graph, data: TokenData, scope: Scope | None = None, *, batch_size: int = 16, seed: int = 0
) -> DiscardCost:
    """What discarding all that a graph does not explain costs, on data that played no part in making it.

    Args:
        graph: the explained part, which :func:`unweave.falsification.rebuild` writes out.
        original: the captured model.

    Returns:
        A :class:`DiscardCost`; intervals are 95%, by bootstrap over sequences.

    Raises:
        EmptyDataError: the scope selects no position, or none with a next token.

    Cost:
        One forward pass of each.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=32)
        >>> cost = discard_cost(unweave.compress(graph, data, size=0.5), graph, data, unweave.Scope("answered"))
        >>> cost.kl_nats.value < 0.1
        True
    """
    scope = scope or Scope()
    rows: list[Tensor] = []
    for batch in data.batches(batch_size):
        truth, ours = (batch_trace(g, batch).output for g in (original, graph))
        here: Bool[Tensor, "batch pos"] = position_mask(scope, batch).to(ours.device)
        losses, real = zip(*(loss(logits, batch) for logits in (ours, truth)), strict=True)
        counted = real[0] & here
        columns = [
            divergence(scope, truth, ours, batch),
            here,
            *(torch.where(counted, x, 0.0) for x in losses),
            counted,
        ]
        rows.append(torch.stack([c.double().sum(1) for c in columns], 1).cpu())
    sums = torch.cat(rows).numpy() if rows else np.zeros((0, 5))
    if not sums[:, 1].sum() or not sums[:, 4].sum():
        raise EmptyDataError("the scope selects no position, or none with a next token, in the data")
    kl, positions, ours, models, counted = resampled_sums(sums, seed, DRAWS).T
    return DiscardCost(
        kl_nats=interval_of(divide(kl, positions)),
        loss_nats=interval_of(divide(ours, counted)),
        model_loss_nats=interval_of(divide(models, counted)),
        cost_nats=interval_of(divide(ours, counted) - divide(models, counted)),
        numbers=graph.n_parameters / original.n_parameters,
        n_sequences=len(sums),
        n_tokens=int(sums[:, 1].sum()),
    )
