"""A figure with its 95% interval: the bootstrap that the whole library uses.

What is undefined (NaN, as 0 / 0) in some draws is left out of the interval; what is undefined in all of them, or on the
data itself, has no interval. An end that lies among infinite draws is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

__all__ = [
    "UNKNOWN",
    "Estimate",
    "bootstrap",
    "bootstrap_ratio",
    "divide",
    "interval_of",
    "resample",
    "resampled_sums",
]

DRAWS = 500


class Estimate(NamedTuple):
    """A mean with its 95% interval (bootstrap over sequences)."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """Three columns of a table: the name alone for the value, with ``_low`` and ``_high`` for the ends."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


# of a figure that is undefined
UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


def resample(n: int, seed: int | np.random.Generator = 0, draws: int = DRAWS) -> Iterator[Int[np.ndarray, " n"]]:
    """All of n rows once, in their order, and then as many with replacement, draw by draw.

    Args:
        seed: a generator goes on from where it is.

    Example:
        >>> [rows.tolist() for rows in resample(3, draws=2)]
        [[0, 1, 2], [2, 1, 1], [0, 0, 0]]
    """
    rng = np.random.default_rng(seed)
    yield np.arange(n)
    for _ in range(draws):
        yield rng.integers(0, n, n)


def resampled_sums(
    table: Float[np.ndarray, "n columns"], seed: int = 0, draws: int = DRAWS
) -> Float[np.ndarray, "draws columns"]:
    """Column sums over all rows, then over every draw of :func:`resample`: the same draws for every table of a seed."""
    return np.stack([table[rows].sum(0) for rows in resample(len(table), seed, draws)])


def interval_of(values: Sequence[float] | Float[np.ndarray, " draws"]) -> Estimate:
    """The first value, which is that of all the data, with the 2.5% and 97.5% quantiles of the others.

    Example:
        >>> interval_of([2.0, 1.0, float("nan"), 3.0])
        Estimate(value=2.0, low=1.05, high=2.95)
    """
    value, drawn = float(values[0]), np.asarray(values[1:], dtype=np.float64)
    known = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(known):
        return Estimate(value, *UNKNOWN[1:])
    with np.errstate(invalid="ignore"):  # among infinite values
        low, high = np.quantile(known, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def bootstrap(
    columns: Mapping[str, np.ndarray], function: Callable[..., Any], seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """A function of sums over rows (sequences, prompts), with its 95% interval over resampled rows.

    Args:
        columns: arrays ``[n]`` by name; the function takes their sums by name.

    Exact?
        Too narrow for few rows, as every bootstrap.

    Example:
        >>> bootstrap({"lost": np.array([1.0, 3.0]), "all": np.array([4.0, 4.0])}, lambda **s: s["lost"] / s["all"])
        Estimate(value=0.5, low=0.25, high=0.75)

    Source:
        Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    n = len(next(iter(columns.values())))
    drawn = resample(n, seed, draws)
    return interval_of([float(function(**{name: c[rows].sum() for name, c in columns.items()})) for rows in drawn])


def bootstrap_ratio(
    top: Float[np.ndarray, " n"], bottom: Float[np.ndarray, " n"], seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """sum(top) / sum(bottom) with its 95% interval over resampled rows: what counts per token, from sums per sequence.

    Example:
        >>> bootstrap_ratio(np.array([1.0, 3.0]), np.array([4.0, 4.0])).value
        0.5
    """
    return bootstrap({"top": top, "bottom": bottom}, divide, seed, draws)


def divide(top: Any, bottom: Any) -> Float[np.ndarray, "*shape"]:
    """top / bottom, NaN where the bottom is 0.

    Example:
        >>> divide([1.0, 1.0], [2.0, 0.0])
        array([0.5, nan])
    """
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    return np.divide(top, bottom, out=np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan), where=bottom != 0)
