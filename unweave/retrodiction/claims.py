"""A published claim beside what a fresh run gives: quantity, agreed range, our interval, verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from unweave.errors import InputError
from unweave.intervals import divide, interval_of, resample

__all__ = ["Claim", "Phenomenon", "Quantity", "over_claims", "over_pairs", "over_seeds", "pair_interval"]

DRAWS = 10_000


@dataclass(frozen=True)
class Quantity:
    """One published figure, the range of ours that agrees with it (said before it is measured), and ours.

    Attributes:
        what: the quantity, with its unit.
        published: the figure as the source gives it, in words.
        agrees: (low, high): values that agree with the claim; infinite where one-sided.
        value, low, high: our figure and its interval; all three are the same where nothing is random.
        n: how many runs, seeds or samples the interval is over.
        note: what a reader must know to read the figure.
    """

    what: str
    published: str
    agrees: tuple[float, float]
    value: float
    low: float
    high: float
    n: int = 1
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "agrees" if the whole interval lies in the range, "differs" if none of it does, else "unclear".

        Example:
            >>> Quantity("share", "about 0.9", (0.8, 1.0), value=0.85, low=0.75, high=0.95).verdict
            'unclear'
        """
        if any(map(math.isnan, (self.value, self.low, self.high))):
            return "unclear"
        if self.agrees[0] <= self.low and self.high <= self.agrees[1]:
            return "agrees"
        return "differs" if self.high < self.agrees[0] or self.low > self.agrees[1] else "unclear"


def over_seeds(
    what: str, published: str, agrees: tuple[float, float], values: Sequence[float], note: str = ""
) -> Quantity:
    """A quantity measured once per seed: the mean, with the 95% interval of a bootstrap over seeds.

    Args:
        values: one per seed. With fewer than three, the interval is their range.

    Raises:
        InputError: there are no values.

    Exact?
        The bootstrap is too narrow for few seeds; ``n`` says how many there were.
    """
    if not values:
        raise InputError(f"{what}: no values were measured")
    found = np.asarray(values, dtype=float)
    if len(found) < 3:
        low, high = found.min(), found.max()
    else:
        _, low, high = interval_of([float(found[rows].mean()) for rows in resample(len(found), draws=DRAWS)])
    return Quantity(what, published, agrees, float(found.mean()), float(low), float(high), len(found), note)


class Claim(NamedTuple):
    """A quantity, what is published of it, and what agrees with that; written down before anything was measured."""

    what: str
    published: str
    agrees: tuple[float, float]
    note: str = ""


def over_claims(claims: Mapping[str, Claim], found: Sequence[Mapping[str, float]]) -> list[Quantity]:
    """A quantity for each claim, see :func:`over_seeds`.

    Args:
        claims: by the name of the figure.
        found: the figures of every seed.
    """
    return [over_seeds(c.what, c.published, c.agrees, [f[name] for f in found], c.note) for name, c in claims.items()]


def over_pairs(
    what: str, published: str, agrees: tuple[float, float], values: Float[np.ndarray, "seeds seeds"], note: str = ""
) -> Quantity:
    """A quantity measured once per pair of seeds: the mean, with the 95% interval of :func:`pair_interval`.

    Args:
        values: NaN where a pair was not measured; the diagonal does not count. ``n`` of the quantity counts the rest.
    """
    value, low, high = pair_interval(values)
    apart = ~np.eye(len(values), dtype=bool)
    return Quantity(what, published, agrees, value, low, high, int((~np.isnan(values) & apart).sum()), note)


def pair_interval(values: Float[np.ndarray, "seeds seeds"]) -> tuple[float, float, float]:
    """(mean over pairs, 2.5%, 97.5%) by a bootstrap over seeds: pairs that share a network are not independent.

    Seeds are drawn with replacement, a pair counts as often as both its seeds are drawn together, and never with
    itself.

    Args:
        values: for each ordered pair; NaN where it was not measured.

    Returns:
        NaN three times where no pair was measured.

    Exact?
        Too narrow for few seeds, as every bootstrap.

    Example:
        >>> pair_interval(np.array([[np.nan, 1.0], [0.5, np.nan]]))
        (0.75, 0.75, 0.75)

    Source:
        Snijders & Borgatti 1999, "Non-parametric standard errors and tests for network statistics".
    """
    measured = ~np.isnan(values) & ~np.eye(len(values), dtype=bool)
    if not measured.any():
        return (math.nan,) * 3
    known = np.where(measured, values, 0.0)
    n = len(values)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
    count = np.einsum("di,ij,dj->d", times, measured.astype(float), times, optimize=True)
    total = np.einsum("di,ij,dj->d", times, known, times, optimize=True)
    value, low, high = interval_of([values[measured].mean(), *divide(total, count)])
    return value, low, high


@dataclass(frozen=True)
class Phenomenon:
    """Something known about networks that a fresh training run is to show again.

    Attributes:
        title: in a few words.
        source: the paper that published it.
        measure: seeds -> quantities; trains what it needs, from nothing.
        minutes: how long it takes on two cores, about.
        seeds: how many seeds by default.
    """

    title: str
    source: str
    measure: Callable[[Sequence[int]], list[Quantity]]
    minutes: float
    seeds: int = 3
