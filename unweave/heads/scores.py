"""The result: scores of all heads by all detectors, their nulls, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.heads.detectors import DETECTORS
from unweave.statistics import Sums

__all__ = ["HeadScores", "holm", "summarise"]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of all heads by all detectors; NaN where the data hold no query for it (or attention is even: R^2).

    Attributes:
        heads, detectors: columns and rows.
        score: mean attention mass (R^2 for "positional").
        null: the mean score under the null.
        null_sd: its standard error over sequences.
        z: (score - null) / the standard error over sequences of that difference.
        p: one-sided, of z, adjusted by Holm over all heads and detectors.
        least: the smallest excess over the null that counts, by detector.
        alpha: the level.
        n_sequences, n_tokens: on how much data.
    """

    heads: tuple[str, ...]
    detectors: tuple[str, ...]
    score: Float[Tensor, "detectors heads"]
    null: Float[Tensor, "detectors heads"]
    null_sd: Float[Tensor, "detectors heads"]
    z: Float[Tensor, "detectors heads"]
    p: Float[Tensor, "detectors heads"]
    least: Float[Tensor, " detectors"]
    alpha: float
    n_sequences: int
    n_tokens: int

    @property
    def verdict(self) -> Bool[Tensor, "detectors heads"]:
        """Which heads are of which kind, by :attr:`rule`."""
        return (self.p <= self.alpha) & (self.score - self.null >= self.least[:, None])

    @property
    def rule(self) -> str:
        """The rule of :attr:`verdict`, in words."""
        least = ", ".join(f"{d} {x:.2g}" for d, x in zip(self.detectors, self.least.tolist(), strict=True))
        return (
            f"p <= {self.alpha:g} after Holm's correction over {int((~self.p.isnan()).sum())} tests, and score above "
            f"its null by at least: {least}"
        )

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The heads that are of some kind, and of which."""
        found = self.verdict
        kinds = {h: tuple(d for k, d in enumerate(self.detectors) if found[k, i]) for i, h in enumerate(self.heads)}
        return {head: labels for head, labels in kinds.items() if labels}

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: head, detector, score, null, null_sd, z, p, verdict; the largest excess over the null first."""
        columns = {"score": self.score, "null": self.null, "null_sd": self.null_sd, "z": self.z, "p": self.p}
        order = (self.score - self.null).nan_to_num(-torch.inf).flatten().argsort(descending=True)
        verdict = self.verdict
        rows = []
        for place in order.tolist():
            d, h = divmod(place, len(self.heads))
            values = {name: float(values[d, h]) for name, values in columns.items()}
            rows.append(
                {"head": self.heads[h], "detector": self.detectors[d], **values, "verdict": bool(verdict[d, h])}
            )
        return rows


def summarise(sums: Sums, heads: tuple[str, ...], names: tuple[str, ...], alpha: float, n: int) -> HeadScores:
    """The scores in the sums of a pass over n sequences."""
    tested = [_tested(sums[name], sums[f"{name} products"], n) for name in names]
    score, null, null_sd, z = (torch.stack(values).cpu() for values in zip(*tested, strict=True))
    p = holm(0.5 * torch.erfc(z / 2**0.5))
    least = torch.tensor([DETECTORS[name].least for name in names])
    return HeadScores(
        heads,
        names,
        score.float(),
        null.float(),
        null_sd.float(),
        z.float(),
        p.float(),
        least,
        alpha,
        n,
        int(sums["tokens"]),
    )


def _tested(
    sums: Float[Tensor, "head 4"], products: Float[Tensor, "head 4 4"], n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(score, null, standard error of the null, z of the difference), by linearisation over sequences."""
    mass, queries, null_mass, null_queries = sums.unbind(-1)
    score, null, zero = mass / queries, null_mass / null_queries, torch.zeros_like(mass)
    of_score = torch.stack([1 / queries, -score / queries, zero, zero], -1)
    of_null = torch.stack([zero, zero, 1 / null_queries, -null / null_queries], -1)

    def error(of: Float[Tensor, "head 4"]) -> Float[Tensor, " head"]:
        variance = torch.einsum("hi,hij,hj->h", of, products, of)
        return (variance.clamp(min=0) * n / (n - 1)).sqrt()

    difference, spread = score - null, error(of_score - of_null)
    z = torch.where(difference.abs() < 1e-6, 0 * difference, difference / spread)  # an idle head: 0 / 0
    return score, null, error(of_null), z


def holm(p: Float[Tensor, "detectors heads"]) -> Float[Tensor, "detectors heads"]:
    """p values adjusted for how many there are: the running maximum of (m - i) p_(i), ascending, at most 1."""
    flat = p.flatten()
    order = flat.argsort()  # NaN comes last
    known = int((~flat.isnan()).sum())
    factor = torch.arange(known, 0, -1, dtype=p.dtype, device=p.device)
    adjusted = (flat[order[:known]] * factor).cummax(0).values.clamp(max=1)
    return flat.index_put((order[:known],), adjusted).reshape(p.shape)
