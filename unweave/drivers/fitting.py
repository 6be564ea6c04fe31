"""Which rule predicts a number best: means by category, chosen by their leave-one-out error, and how well they do.

For values v of tokens in categories c, centred, a rule predicts m_c = sum of v in c / (n_c + 1): a ridge regression
on the categories. Its leave-one-out error is exact in closed form, sum (v - m_c)^2 / (1 - 1 / (n_c + 1))^2, so that
tables with many categories do not win by fitting noise. A rule with k categories also offers k questions, "is it
category x?", each the same regression on two categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

__all__ = ["Fit", "Table", "auroc", "explained", "fit_rules", "rescale"]

RIDGE = 1.0
# a simpler rule is taken if it explains this share of what the best one does
SIMPLER = 0.95
# a second rule is taken if it explains so much of the variance on top
LEAST_GAIN = 0.01


class Table(NamedTuple):
    """What one rule predicts for the directions that have it.

    Attributes:
        rule: its number.
        rows: the directions.
        values: what is predicted for each category.
        category: by direction, the category that is told apart from all others; -1 for all of them.
    """

    rule: int
    rows: Int[Tensor, " rows"]
    values: Float[Tensor, "category rows"]
    category: Int[Tensor, " rows"]


@dataclass(frozen=True, eq=False)
class Fit:
    """The rules fitted to every direction, one after the other on what the former leave.

    Attributes:
        mean: of every direction on the training text.
        tables: one for each step and rule; what a direction's tables say adds up.
    """

    mean: Float[Tensor, " direction"]
    tables: tuple[Table, ...]

    def predict(self, categories: Sequence[Int[Tensor, " token"]]) -> Float[Tensor, "token direction"]:
        """The predictions, given the category of every token under every rule."""
        out = self.mean.expand(len(categories[0]), -1).clone()
        for table in self.tables:
            out[:, table.rows] += table.values[categories[table.rule]]
        return out


class _Sums(NamedTuple):
    n: Float[Tensor, "category 1"]
    first: Float[Tensor, "category direction"]
    second: Float[Tensor, "category direction"]

    def error(self) -> Float[Tensor, "category direction"]:
        """The leave-one-out error of each category's mean."""
        share = 1 / (self.n + RIDGE)
        mean = self.first * share
        within = self.second - 2 * mean * self.first + self.n * mean.square()
        return within.clamp(min=0) / (1 - share).clamp(min=1e-12).square() * (self.n > 0)

    def others(self) -> _Sums:
        """The same of all categories but each."""
        return _Sums(*(x.sum(0, keepdim=True) - x for x in self))


def _sums(values: Tensor, squares: Tensor, category: Tensor, count: int) -> _Sums:
    zeros = values.new_zeros(count, values.shape[1])
    n = category.bincount(minlength=count).to(values)[:, None]
    return _Sums(n, zeros.index_add(0, category, values), zeros.index_add(0, category, squares))


def fit_rules(
    values: Float[Tensor, "token direction"], categories: Sequence[Int[Tensor, " token"]], counts: Sequence[int]
) -> Fit:
    """The best one or two rules for every direction.

    Args:
        categories: by rule, the category of every token.
        counts: by rule, how many categories there are.

    Cost:
        Per rule and step, two sums of tokens x directions by category.
    """
    mean = values.mean(0)
    rest = values - mean
    total = rest.square().sum(0)
    first = _best(rest, categories, counts, total)
    rest = rest - Fit(torch.zeros_like(mean), first).predict(categories)
    second = _best(rest, categories, counts, rest.square().sum(0) - LEAST_GAIN * total)
    return Fit(mean, first + second)


def _best(
    values: Float[Tensor, "token direction"],
    categories: Sequence[Int[Tensor, " token"]],
    counts: Sequence[int],
    to_beat: Float[Tensor, " direction"],
) -> tuple[Table, ...]:
    """The rule of each direction for which one has an error below ``to_beat``."""
    squares = values.square()
    errors, sizes, singles = [], [], []
    for category, count in zip(categories, counts, strict=True):
        sums = _sums(values, squares, category, count)
        apart, others = sums.error(), sums.others().error()
        single = (apart + others).min(0)
        errors += [apart.sum(0), single.values]
        sizes += [float((sums.n > 0).sum()), 2.0]
        singles.append(single.indices)
    gained = to_beat - torch.stack(errors)
    best = gained.max(0).values
    # of those that gain nearly as much, the simplest; of equals, the first that gains most
    rank = torch.tensor(sizes).to(values)[:, None] - gained / best.clamp(min=1e-30)
    chosen = torch.where((gained >= SIMPLER * best) & (gained > 0), rank, torch.inf).argmin(0)
    found = best > 0
    return tuple(
        _table(values, k, (found & (chosen == k)).nonzero()[:, 0], categories, counts, singles)
        for k in chosen[found].unique().tolist()
    )


def _table(
    values: Tensor, k: int, rows: Tensor, categories: Sequence[Tensor], counts: Sequence[int], singles: Sequence[Tensor]
) -> Table:
    rule, is_single = divmod(k, 2)
    mine = values[:, rows]
    sums = _sums(mine, mine.square(), categories[rule], counts[rule])
    whole = sums.first / (sums.n + RIDGE)
    if not is_single:
        return Table(rule, rows, whole, torch.full_like(rows, -1))
    category = singles[rule][rows]
    others = sums.others()
    apart = (others.first / (others.n + RIDGE)).gather(0, category[None])
    here = torch.arange(counts[rule], device=rows.device)[:, None] == category
    return Table(rule, rows, torch.where(here, whole, apart), category)


# ---- how well a prediction does -------------------------------------------------------------------------


def explained(
    predicted: Float[Tensor, "token direction"], values: Float[Tensor, "token direction"]
) -> Float[Tensor, " direction"]:
    """R^2 = 1 - sum (v - p)^2 / sum (v - mean v)^2; NaN where v does not vary."""
    spread = (values - values.mean(0)).double().square().sum(0)
    # rounding alone is no spread
    varies = spread > 1e-10 * values.double().square().sum(0)
    error = (values - predicted).double().square().sum(0)
    return torch.where(varies, 1 - error / spread.clamp(min=1e-300), torch.nan).float()


def rescale(
    predicted: Float[Tensor, "token direction"], values: Float[Tensor, "token direction"]
) -> tuple[Float[Tensor, " direction"], Float[Tensor, " direction"]]:
    """(slope, offset) of the least-squares line from a prediction to the values."""
    p, v = predicted - predicted.mean(0), values - values.mean(0)
    spread = p.square().sum(0)
    slope = torch.where(spread > 0, (p * v).sum(0) / spread.clamp(min=1e-30), 0.0)
    return slope, values.mean(0) - slope * predicted.mean(0)


def auroc(
    predicted: Float[Tensor, "token direction"], values: Float[Tensor, "token direction"], top: float = 0.1
) -> Float[Tensor, " direction"]:
    """How likely a token of the top tenth of the values is predicted above another (1/2 for equal predictions).

    Returns:
        NaN where no token is above the (1 - top) quantile: the values are too often equal.
    """
    # numpy: torch.quantile refuses more than 2^24 numbers
    v = values.cpu().numpy()
    positive = v > np.quantile(v, 1 - top, axis=0)
    n = positive.sum(0)
    ranks = rankdata(predicted.cpu().numpy(), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = ((ranks * positive).sum(0) - n * (n + 1) / 2) / (n * (len(v) - n))
    return torch.from_numpy(np.asarray(area)).float()
