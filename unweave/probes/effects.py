"""Is what a probe reads there used? Take it out of the activations and see what the network loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, ShapeError
from unweave.execution import run
from unweave.features import find_site
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap_ratio
from unweave.probes.fitting import LinearProbe
from unweave.scope import Scope, divergence, position_mask

__all__ = ["ERASURES", "ProbeEffect", "eraser", "probe_effect"]

ERASURES = ("oblique", "orthogonal")
Behaviour = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class ProbeEffect:
    """What a network loses without what a probe reads, beside what it loses without as much of anything else.

    Attributes:
        rank: of the subspace taken out.
        share: of the variance of the activations that is taken out (random subspaces are scaled to the same).
        kl_nats: divergence from the whole network, nats per position of the scope.
        random_kl_nats: the mean over random subspaces.
        behaviour, erased_behaviour, random_behaviour: of the whole network, without the subspace, without random ones;
            NaN where no behaviour was given.
    """

    rank: int
    share: float
    kl_nats: Estimate
    random_kl_nats: Estimate
    behaviour: Estimate
    erased_behaviour: Estimate
    random_behaviour: Estimate

    @property
    def is_used(self) -> bool:
        """Whether the loss lies above that of random subspaces, intervals apart."""
        return self.kl_nats.low > self.random_kl_nats.high

    def columns(self) -> dict[str, Any]:
        """One plain row: rank, share, is_used, and every figure with its interval."""
        fields = ("kl_nats", "random_kl_nats", "behaviour", "erased_behaviour", "random_behaviour")
        out: dict[str, Any] = {"rank": self.rank, "share": self.share, "is_used": self.is_used}
        for name in fields:
            out |= getattr(self, name).columns(name)
        return out


def eraser(
    directions: Float[Tensor, "rank width"], covariance: Float[Tensor, "width width"], how: str = "oblique"
) -> Float[Tensor, "width width"]:
    """The projection P so that x - P (x - mean) no longer varies along the directions.

    orthogonal: P = D^T D of orthonormal rows D. oblique: P = C D^T (D C D^T)^-1 D, with C the covariance: what varies
    together with what the probe reads goes as well, so that no linear probe can read it any more.

    Source:
        Belrose et al. 2023, "LEACE" (oblique, in its form for the directions of a linear probe).
    """
    if how not in ERASURES:
        raise InputError(f"erasure must be one of {', '.join(ERASURES)}, got {how!r}")
    if how == "orthogonal":
        basis = torch.linalg.qr(directions.T).Q
        return basis @ basis.T
    spread = covariance @ directions.T
    return spread @ torch.linalg.pinv(directions @ spread, hermitian=True) @ directions


def probe_effect(
    graph: Graph,
    probe: LinearProbe,
    place: str,
    data: TokenData,
    scope: Scope | None = None,
    *,
    behaviour: Behaviour | None = None,
    erasure: str = "oblique",
    rank: int | None = None,
    draws: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeEffect:
    """Take the directions that a probe reads out of the activations there, for all that hear them later.

    x becomes x - P (x - m): the subspace is set to its mean over the data that the probe was fitted on. Beside it,
    random subspaces of the same rank, drawn like the activations themselves and scaled to change them by as much:
    x - c P' (x - m) with c^2 tr(P' C P'^T) = tr(P C P^T).

    Args:
        place: where it was fitted: the residual stream ("before NODE"), a node or its code ("NODE.code").
        data: sequences that the probe was not fitted on.
        scope: positions that count; every real token by default.
        behaviour: (logits, batch) -> ``[batch pos]``: what depends on the concept, such as whether the answer is right.
        erasure: "oblique" or "orthogonal", see :func:`eraser`. Orthogonal takes out only the direction that the probe
            reads, along which activations often hardly vary (probes divide by the variance) and whose loss then says
            little.
        rank: the probe's strongest directions only.
        draws: random subspaces.

    Returns:
        :class:`ProbeEffect`.

    Raises:
        InputError: a place that cannot be patched, fewer than 1 draw, or a probe of another width.
        EmptyDataError: the scope looks at no position.

    Cost:
        draws + 2 forward passes over the data.

    Exact?
        Measured. A loss shows that something in the subspace is used, not that the concept is; no loss may also mean
        that the network reads it elsewhere.

    Example:
        >>> import unweave
        >>> from unweave.probes import Concept, probe_table
        >>> graph = unweave.capture("zoo:induction")
        >>> data, held_out = unweave.load_data("zoo:induction", limit=32).split(0.5)
        >>> token = Concept("token below 16", lambda batch: (batch.inputs < 16).long(), classes=2)
        >>> row = probe_table(graph, [token], data, held_out).rows[0]
        >>> probe_effect(graph, row.probe, row.place, held_out, draws=2).rank
        1

    Source:
        Elazar et al. 2021, "Amnesic Probing"; random directions as its control.
    """
    site = find_site(graph, place)
    if site.node < 0 and site.kind != "stream" and len(graph.stages[site.stage].nodes) > 1:
        raise InputError(f"{place} is a whole layer, which cannot be patched; probe one node or the stream after it")
    if site.width != probe.weight.shape[1]:
        raise InputError(f"{place} has {site.width} numbers per position, the probe reads {probe.weight.shape[1]}")
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    directions = probe.directions(rank)
    if len(directions) == 0:
        raise InputError("this probe reads nothing: all its weights are zero")
    own = eraser(directions, probe.covariance, erasure)
    removed = _removed(own, probe.covariance)
    generator = torch.Generator().manual_seed(seed)
    others = [_random_like(directions, probe.covariance, erasure, removed, generator) for _ in range(draws)]
    erasers = [None, own, *others]
    measure = _Measure(graph, probe, place, scope or Scope(), behaviour)
    tables = np.concatenate([measure(batch, erasers) for batch in data.batches(batch_size)], axis=2)
    if tables[0, 0].sum() == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    share = float(removed / probe.covariance.diagonal().sum().clamp(min=1e-300))
    parts = (tables[1], tables[2:].mean(0))
    nats = [bootstrap_ratio(table[1], table[0]) for table in parts]
    behaved = [bootstrap_ratio(table[2], table[0]) for table in (tables[0], *parts)]
    return ProbeEffect(len(directions), share, *nats, *behaved)


def _removed(p: Tensor, covariance: Tensor) -> Tensor:
    return (p @ covariance @ p.T).diagonal().sum()


def _random_like(
    directions: Tensor, covariance: Tensor, how: str, removed: Tensor, generator: torch.Generator
) -> Float[Tensor, "width width"]:
    """A random subspace of the same rank, drawn like the activations, scaled to take out as much."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(len(directions), len(covariance), generator=generator, dtype=torch.float64).to(covariance)
    p = eraser(noise @ root.T, covariance, how)
    return p * (removed / _removed(p, covariance).clamp(min=1e-300)).sqrt()


@dataclass(frozen=True)
class _Measure:
    graph: Graph
    probe: LinearProbe
    place: str
    scope: Scope
    behaviour: Behaviour | None

    @torch.no_grad()
    def __call__(self, batch: Batch, erasers: list[Tensor | None]) -> np.ndarray:
        """``[eraser 3 batch]``: positions, nats, behaviour, summed over each sequence's positions in the scope."""
        mask = position_mask(self.scope, batch).to(self.graph.device)
        whole = run(self.graph, batch.inputs, batch.mask).logits
        out = []
        for p in erasers:
            patch = {} if p is None else {self.place: self._without(p)}
            logits = whole if p is None else run(self.graph, batch.inputs, batch.mask, patch=patch).logits
            nats = divergence(self.scope, whole, logits, batch)
            shown = torch.full_like(nats, torch.nan) if self.behaviour is None else self.behaviour(logits, batch)
            if shown.shape != mask.shape:
                raise ShapeError(f"a behaviour must be {tuple(mask.shape)} here, got {tuple(shown.shape)}")
            shown = torch.where(mask, shown.double().to(mask.device), 0.0)
            out.append(torch.stack([mask.sum(1).double(), nats.double().sum(1), shown.sum(1)]).cpu().numpy())
        return np.stack(out)

    def _without(self, p: Tensor) -> Callable[[Tensor], Tensor]:
        def patch(x: Tensor) -> Tensor:
            off = x.double() - self.probe.mean.to(x.device)
            return (x.double() - off @ p.to(x.device).T).to(x.dtype)

        return patch
