"""Anomaly scores that know no explanation: distance of activations from clean ones, and the model's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import InputError
from unweave.execution import BEFORE, run
from unweave.graph import Graph
from unweave.scope import Scope, loss, position_mask
from unweave.statistics import Sums, accumulate

__all__ = ["ActivationDistance", "text_losses"]

# added to the variances, as a share of their mean, so that the covariance can be inverted
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class ActivationDistance:
    """Mahalanobis distance of the residual stream: sqrt((x - mu)^T S^-1 (x - mu)), by place in the network.

    Attributes:
        graph: the model.
        scope: the tokens that count.
        means, precisions: by "before NODE", mu and S^-1 of clean tokens.
    """

    graph: Graph
    scope: Scope
    means: Mapping[str, Float[Tensor, " d"]]
    precisions: Mapping[str, Float[Tensor, "d d"]]

    @classmethod
    def fit(
        cls, graph: Graph, data: TokenData, scope: Scope | None = None, *, batch_size: int = 64
    ) -> ActivationDistance:
        """Means and covariances over clean tokens, before every layer and the output.

        Raises:
            EmptyDataError: no data.

        Cost:
            One pass over the data; d^2 numbers per place.

        Example:
            >>> import unweave
            >>> graph = unweave.capture("zoo:induction")
            >>> data = unweave.load_data("zoo:induction", limit=16)
            >>> sorted(ActivationDistance.fit(graph, data).score_data(data))[-1]
            'before unembed'

        Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples".
        """
        scope = scope or Scope()
        places = [f"{BEFORE}{s.nodes[0]}" for s in graph.stages if s.visible[1] > s.visible[0]]

        @torch.no_grad()
        def step(batch: Batch) -> Sums:
            marked = position_mask(scope, batch)
            values = run(graph, batch.inputs, batch.mask, record=places).values
            out: Sums = {"tokens": marked.sum()}
            for place in places:
                x = values[place].double().cpu()[marked.cpu()]
                out |= {f"sum {place}": x.sum(0), f"square {place}": x.mT @ x}
            return out

        sums = accumulate(data, step, batch_size=batch_size, progress=False)
        n = sums["tokens"]
        means = {place: sums[f"sum {place}"] / n for place in places}
        precisions = {
            place: _precision(sums[f"square {place}"] / n - means[place].outer(means[place])) for place in places
        }
        return cls(graph, scope, means, precisions)

    @torch.no_grad()
    def score_data(self, data: TokenData, *, batch_size: int = 64) -> dict[str, Float[Tensor, " n"]]:
        """By place, the largest distance of any token of each text."""
        scores: dict[str, list[Tensor]] = {place: [] for place in self.means}
        for batch in data.batches(batch_size):
            marked = position_mask(self.scope, batch).cpu()
            values = run(self.graph, batch.inputs, batch.mask, record=list(scores)).values
            for place, precision in self.precisions.items():
                x = values[place].double().cpu() - self.means[place]
                distance = ((x @ precision) * x).sum(-1).clamp(min=0).sqrt()
                scores[place].append(distance.masked_fill(~marked, -torch.inf).amax(1))
        return {place: torch.cat(parts) for place, parts in scores.items()}


def _precision(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))


@torch.no_grad()
def text_losses(
    graph: Graph, data: TokenData, scope: Scope | None = None, *, batch_size: int = 64
) -> dict[str, Float[Tensor, " n"]]:
    """The model's next-token loss on each text, in nats: "largest" over its tokens in the scope, and "mean".

    Raises:
        InputError: inputs that are no tokens.

    Example:
        >>> import unweave
        >>> losses = text_losses(unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=4))
        >>> bool((losses["largest"] >= losses["mean"]).all())
        True
    """
    scope = scope or Scope()
    out: dict[str, list[Tensor]] = {"largest": [], "mean": []}
    for batch in data.batches(batch_size):
        nats, told = loss(run(graph, batch.inputs, batch.mask).logits, batch)
        counted: Bool[Tensor, "batch pos"] = told.cpu() & position_mask(scope, batch).cpu()
        if not bool(counted.any(1).all()):
            raise InputError("a text has no token with a next one in the scope; select those that do")
        nats = nats.double().cpu().masked_fill(~counted, 0.0)
        out["largest"].append(nats.amax(1))
        out["mean"].append(nats.sum(1) / counted.sum(1))
    return {name: torch.cat(parts) for name, parts in out.items()}
