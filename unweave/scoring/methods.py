"""``score_edges`` and the steps that its methods take over a batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import Means, Replacement, batch_trace
from unweave.data import Batch, TokenData
from unweave.errors import InputError
from unweave.execution import Trace
from unweave.freezing import stop_gradients
from unweave.graph import Graph
from unweave.scope import Scope, divergence, metric
from unweave.scoring.effects import calibrate, measure_edges
from unweave.scoring.products import BLOCK, Products
from unweave.scoring.results import EdgeScores, scores_from, sequence_moments
from unweave.statistics import (
    FisherPass,
    Gradients,
    Sums,
    Tally,
    accumulate,
    differentiable_trace,
    gradients_of,
    replacement,
)

__all__ = ["EdgeMeasure", "METHODS", "score_edges"]

METHODS = ("fisher", "eap", "eap-ig", "exact")


def score_edges(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    method: str = "fisher",
    frozen: str = "none",
    ablation: str = "mean",
    means: Means | None = None,
    samples: int = 2,
    steps: int = 5,
    measure_top: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> EdgeScores:
    """Score every edge of a graph, ports q, k and v apart, in nats per token.

    Args:
        graph: captured, cut or compressed.
        data: token sequences.
        scope: which signal counts; by default the KL at all positions.
        method: "fisher", "eap", "eap-ig" or "exact" (see the module's text).
        frozen: "none", "patterns" or "patterns and norms" (see the module's text).
        ablation: what an ablated edge carries, see :class:`Replacement`. "counterfactual" takes it from the label
            "corrupted" of the data: ids of the same shape.
        means: for the ablations that need them; collected here (one more forward pass) when missing.
        samples: cotangents per sequence (fisher).
        steps: integration steps (eap-ig).
        measure_top: calibration: the effects of so many edges with the largest attributions are measured,
            replace them and are marked as measured.
        batch_size: sequences per pass.
        seed: of the random cotangents.

    Returns:
        :class:`EdgeScores`.

    Raises:
        InputError: an unknown method, an unknown word for what is frozen or a nonsensical number.
        UnsupportedModelError: norms are to be frozen and a layer's writes pass another one (Gemma).
        EmptyDataError: no position is left in the scope.

    Cost:
        fisher: one forward and ``samples`` backward passes, no weight gradients, plus one product
        of ports x (positions d_model) x writers per sequence. exact: (edges / 2) forward passes, batched.

    Exact?
        fisher is the second-order term: good for small effects (Spearman about 0.98 on stories260K), too small
        for the few largest, which is what ``measure_top`` is for.

    Example:
        >>> import unweave
        >>> from unweave.zoo import induction
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> scores = unweave.score_edges(graph, data, samples=2)
        >>> len(scores.table(3))
        3
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if graph.is_narrow and method != "exact":
        raise InputError('edges of this graph carry only some dimensions: measure them with method="exact"')
    if samples < 1 or steps < 1 or measure_top < 0:
        raise InputError("samples and steps must be at least 1 and measure_top at least 0")
    scope, held = scope or Scope(), stop_gradients(graph, frozen)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    instead, data = replacement(graph, data, ablation, means=means, seed=seed, **options)
    options["checkpoint"] = checkpoint
    if method == "exact":
        return measure_edges(graph, data, scope, graph.edge_matrix, instead, frozen=frozen, **options)
    step: FisherPass | _GradientStep
    if method == "fisher":
        step = FisherPass(held, scope, samples, seed, (EdgeMeasure(scope, instead),))
    else:
        step = _GradientStep(held, scope, instead, steps if method == "eap-ig" else 0)
    identity = (method, samples, steps, seed, frozen, graph, scope, instead)
    sums = accumulate(data, step, description=f"scoring edges ({method})", identity=identity, **options)
    scores = dataclasses.replace(scores_from(graph, sums, method, len(data)), frozen=frozen)
    return calibrate(scores, data, scope, instead, measure_top, **options) if measure_top else scores


@dataclass(frozen=True)
class EdgeMeasure:
    """Method "fisher" as a measure of a :class:`FisherPass`."""

    scope: Scope
    instead: Replacement

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        # what writes at one position only has no products between blocks to leave out
        block = t.context.n_pos if t.graph.is_unrolled else BLOCK
        return _EdgeTally(self.scope, batch, Products(t, self.instead.sent(t.graph, batch, t.counterfactual), block))


@dataclass
class _EdgeTally:
    scope: Scope
    batch: Batch
    products: Products
    gathered: dict[str, list[Tensor]] = field(default_factory=lambda: {"edge": [], "block": [], "node": []})

    def add(self, gradients: Gradients) -> None:
        by_block = self.products(gradients)
        whole = by_block.sum(1)
        self.gathered["edge"].append(0.5 * whole.square())
        self.gathered["block"].append(0.5 * by_block.square().sum(1))
        self.gathered["node"].append(0.5 * whole.sum(1).square())

    def sums(self) -> Sums:
        mean = {name: torch.stack(values).mean(0) for name, values in self.gathered.items()}
        return sequence_moments(mean, self.scope, self.batch)


@dataclass(frozen=True)
class _GradientStep:
    """Sums over a batch for methods "eap" (no steps) and "eap-ig"."""

    graph: Graph
    scope: Scope
    instead: Replacement
    steps: int

    def __call__(self, batch: Batch) -> Sums:
        with torch.no_grad():
            clean = batch_trace(self.graph, batch, keep=True)
            sent = self.instead.sent(self.graph, batch, clean.counterfactual)
        n_pos = clean.context.n_pos
        differences = Products(clean, sent, n_pos)
        signed = self.scope.divergence == "logit_difference"
        # the KL is flat at the network itself: without steps, its gradient is taken at the mean embedding
        shares = [k / self.steps for k in range(1, self.steps + 1)] if self.steps else [1.0 if signed else 0.0]
        total = []
        for share in shares:
            t = differentiable_trace(self.graph, batch, self._mixed_embedding(share, sent[0]))
            if signed:
                value = metric(self.scope, t.output, batch).sum()
            else:
                value = -divergence(self.scope, clean.output, t.output, batch).sum()
            total.append(Products(t, sent, n_pos, differences)(gradients_of(t, value)).sum(1))
        edges = torch.stack(total).mean(0)
        return sequence_moments({"edge": edges, "node": edges.sum(1)}, self.scope, batch)

    def _mixed_embedding(self, share: float, sent: Float[Tensor, "node #batch #pos d"]) -> Any:
        """The embedding on its way from what is sent instead to what it is (its copies, if it is unrolled, alike)."""
        nodes = self.graph.stages[0].nodes
        return {n: lambda y, other=other: other + share * (y - other) for n, other in zip(nodes, sent, strict=True)}
