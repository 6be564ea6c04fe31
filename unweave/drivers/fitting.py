"""Which rule predicts a number best: means by category, chosen by cross-validation, and how well they do.

For values v of tokens in categories c, centred, a rule predicts m_c = sum of v in c / (n_c + r): a ridge regression on
the categories. Its error is that on folds it was not fitted on, sum over folds f of sum (v - m_c without f)^2, which is
exact from sums by category and fold; folds are whole documents, since tokens of one text resemble each other. So tables
with many categories do not win by fitting noise. A rule with k categories also offers k questions, "is it category x?",
each the same regression on two categories.
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

RIDGES = (1.0, 8.0, 64.0)
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
    """Sums of 1, v and v^2 by fold and category."""

    n: Float[Tensor, "fold category 1"]
    first: Float[Tensor, "fold category direction"]
    second: Float[Tensor, "fold category direction"]

    def means(self, ridge: float) -> Float[Tensor, "category direction"]:
        """m of every category, from all folds."""
        return self.first.sum(0) / (self.n.sum(0) + ridge)

    def error(self, ridge: float) -> Float[Tensor, "category direction"]:
        """The cross-validated error in each category."""
        mean = (self.first.sum(0) - self.first) / (self.n.sum(0) - self.n + ridge)
        return (self.second - 2 * mean * self.first + self.n * mean.square()).sum(0)

    def others(self) -> _Sums:
        """The same of all categories but each."""
        return _Sums(*(x.sum(1, keepdim=True) - x for x in self))


def _sums(values: Tensor, category: Tensor, folds: Tensor, count: int) -> _Sums:
    n_folds = int(folds.max()) + 1
    place = folds * count + category

    def by_place(x: Tensor) -> Tensor:
        return x.new_zeros(n_folds * count, x.shape[1]).index_add(0, place, x).unflatten(0, (n_folds, count))

    return _Sums(by_place(torch.ones_like(values[:, :1])), by_place(values), by_place(values.square()))


def fit_rules(
    values: Float[Tensor, "token direction"],
    categories: Sequence[Int[Tensor, " token"]],
    counts: Sequence[int],
    folds: Int[Tensor, " token"],
) -> Fit:
    """The best one or two rules for every direction.

    Args:
        values: of about unit variance.
        categories: by rule, the category of every token.
        counts: by rule, how many categories there are.
        folds: which part of the text each token is in, from 0.

    Cost:
        Per rule and step, two sums of tokens x directions by category and fold.
    """
    mean = values.mean(0)
    rest = values - mean
    total = rest.square().sum(0)
    first = _best(rest, categories, counts, folds, total)
    rest = rest - Fit(torch.zeros_like(mean), first).predict(categories)
    second = _best(rest, categories, counts, folds, rest.square().sum(0) - LEAST_GAIN * total)
    return Fit(mean, first + second)


class _Candidate(NamedTuple):
    """A rule at one ridge, whole or (by direction) as the best question about one of its categories."""

    rule: int
    ridge: float
    size: float
    category: Int[Tensor, " direction"] | None


def _best(
    values: Float[Tensor, "token direction"],
    categories: Sequence[Int[Tensor, " token"]],
    counts: Sequence[int],
    folds: Int[Tensor, " token"],
    to_beat: Float[Tensor, " direction"],
) -> tuple[Table, ...]:
    """The rule of each direction for which one has an error below ``to_beat``."""
    errors: list[Tensor] = []
    candidates: list[_Candidate] = []
    for rule, (category, count) in enumerate(zip(categories, counts, strict=True)):
        sums = _sums(values, category, folds, count)
        others, used = sums.others(), float((sums.n.sum(0) > 0).sum())
        for ridge in RIDGES:
            apart = sums.error(ridge)
            errors.append(apart.sum(0))
            candidates.append(_Candidate(rule, ridge, used, None))
            if count > 2:
                single = (apart + others.error(ridge)).min(0)
                errors.append(single.values)
                candidates.append(_Candidate(rule, ridge, 2.0, single.indices))
    gained = to_beat - torch.stack(errors)
    best = gained.max(0).values
    # of those that gain nearly as much, the simplest; of equals, the one that gains most
    sizes = torch.tensor([c.size for c in candidates]).to(values)
    rank = sizes[:, None] - gained / best.clamp(min=1e-30)
    chosen = torch.where((gained >= SIMPLER * best) & (gained > 0), rank, torch.inf).argmin(0)
    found = best > 0
    return tuple(
        _table(values, candidates[k], (found & (chosen == k)).nonzero()[:, 0], categories, counts, folds)
        for k in chosen[found].unique().tolist()
    )


def _table(
    values: Tensor,
    chosen: _Candidate,
    rows: Tensor,
    categories: Sequence[Tensor],
    counts: Sequence[int],
    folds: Tensor,
) -> Table:
    rule, count = chosen.rule, counts[chosen.rule]
    sums = _sums(values[:, rows], categories[rule], folds, count)
    whole = sums.means(chosen.ridge)
    if chosen.category is None:
        return Table(rule, rows, whole, torch.full_like(rows, -1))
    category = chosen.category[rows]
    apart = sums.others().means(chosen.ridge).gather(0, category[None])
    here = torch.arange(count, device=rows.device)[:, None] == category
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
        NaN where all values are equal. The top tenth is what is above the (1 - top) quantile, or at it where nothing is
        above.
    """
    # numpy: torch.quantile refuses more than 2^24 numbers
    v = values.cpu().numpy()
    edge = np.quantile(v, 1 - top, axis=0)
    positive = np.where((v > edge).any(0), v > edge, v >= edge)
    n = positive.sum(0)
    ranks = rankdata(predicted.cpu().numpy(), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = ((ranks * positive).sum(0) - n * (n + 1) / 2) / (n * (len(v) - n))
    return torch.from_numpy(np.asarray(area)).float()
