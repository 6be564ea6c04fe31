"""A statistic of partitions beside its values on null models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["NullTest", "STATISTICS", "null_test"]

# -1 where little is good; modules are significant where the last one is
STATISTICS = {"modularity": 1.0, "n_cut": -1.0, "saved_bits": 1.0}


@dataclass(frozen=True)
class NullTest:
    """One statistic of the graph's search against the same search on graphs without modules.

    Attributes:
        null: "rewired", "shuffled", "reinitialised" or "untrained".
        statistic: "modularity"; "n_cut" (relative: (1 + n-cut) / B); or "saved_bits": by how much the best partition
            describes the communication in fewer bits than one block does, at least 0.
        value: the best that the search found on the graph.
        null_mean, null_sd: of the best that it found on each null sample.
        z: (value - null_mean) / null_sd; NaN where the null does not vary.
        percentile: share of null samples that are worse than the graph, in percent.
        p: (1 + how many null samples are as good or better) / (1 + how many there are).
        n_null: how many there are.
    """

    null: str
    statistic: str
    value: float
    null_mean: float
    null_sd: float
    z: float
    percentile: float
    p: float
    n_null: int


def null_test(null: str, statistic: str, value: float, found: list[float]) -> NullTest:
    """The value of a statistic beside those on samples of a null model."""
    there = torch.tensor(found, dtype=torch.float64)
    mean, sd = float(there.mean()), float(there.std()) if len(found) > 1 else 0.0
    as_good = int((STATISTICS[statistic] * there >= STATISTICS[statistic] * value - 1e-12).sum())
    # what rounding leaves is no variation
    z = (value - mean) / sd if sd > 1e-9 * (1 + abs(mean)) else math.nan
    percentile = 100 * (1 - as_good / len(found))
    return NullTest(null, statistic, value, mean, sd, z, percentile, (1 + as_good) / (1 + len(found)), len(found))
