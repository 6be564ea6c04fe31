"""How well changes of the loss were called: a table of what was predicted against what was true, edit by edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unweave.errors import InputError
from unweave.intervals import UNKNOWN, Estimate, divide, interval_of, resample

__all__ = ["EditChanges", "EditTable", "PredictionRow", "compare_changes"]

DRAWS = 1000


@dataclass(frozen=True, eq=False)
class EditChanges:
    """What edits change, or are said to, edit by edit.

    Attributes:
        loss: the mean change of the next-token loss, in nats.
        top: the output whose mean log probability moves most, plus 1, with the sign of its change; None if that is not
            predicted.
    """

    loss: NDArray[np.float64]
    top: NDArray[np.int64] | None = None

    def at(self, places: NDArray[np.int64]) -> EditChanges:
        """Those of some of the edits."""
        return EditChanges(self.loss[places], None if self.top is None else self.top[places])


@dataclass(frozen=True)
class PredictionRow:
    """How well one predictor called the effects of the edits of one size.

    Attributes:
        size: the name of the size; "all" for all edits together.
        predictor: "graph"; "gradient" (first order, on the model itself); "second order" (the gradient and half of the
            Fisher information's quadratic form); "permuted" (the graph's prediction of another edit of that size: what
            is right by chance).
        correlation: Pearson's, of predicted and true change of the loss.
        r2: 1 - sum (true - predicted)^2 / sum (true - mean true)^2: of the prediction as it is, not of a fit to it.
        slope: of the true change on the predicted, by least squares; 1 is right, above 1 the effect is understated.
        top_token: share of edits for which the output whose mean log probability changes most, and the sign of the
            change, were called right; NaN for the expansions, which predict the loss alone.
        sign: share of edits for which the sign of the change of the loss was called right.
        mean_change: mean absolute true change of the loss, in nats.
        n: how many edits.
    """

    size: str
    predictor: str
    correlation: Estimate
    r2: Estimate
    slope: Estimate
    top_token: Estimate
    sign: Estimate
    mean_change: float
    n: int

    def table(self) -> list[dict[str, Any]]:
        """One plain row: size, predictor, every figure with its interval, and on how many edits."""
        row: dict[str, Any] = {"size": self.size, "predictor": self.predictor}
        for name in ("correlation", "r2", "slope", "top_token", "sign"):
            row |= getattr(self, name).columns(name)
        return [row | {"mean_change_nats": self.mean_change, "n_edits": self.n}]


@dataclass(frozen=True, eq=False)
class EditTable:
    """Predicted and true effects of many edits.

    Attributes:
        rows: one for each size and predictor, then those of all sizes together.
        true, graph, gradient: the change of the loss in nats, by size, edit by edit.
        second_order: the same; empty where it was not asked for.
    """

    rows: tuple[PredictionRow, ...]
    true: Mapping[str, NDArray[np.float64]]
    graph: Mapping[str, NDArray[np.float64]]
    gradient: Mapping[str, NDArray[np.float64]]
    second_order: Mapping[str, NDArray[np.float64]]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per size and predictor, see :meth:`PredictionRow.table`."""
        return [row.table()[0] for row in self.rows]

    def row(self, size: str, predictor: str) -> PredictionRow:
        """One of the rows.

        Raises:
            InputError: there is none.
        """
        for row in self.rows:
            if (row.size, row.predictor) == (size, predictor):
                return row
        raise InputError(
            f"no row {size!r}, {predictor!r}; sizes {sorted(self.true)} and 'all'; "
            f"{', '.join(dict.fromkeys(row.predictor for row in self.rows))}"
        )


def compare_changes(
    true: EditChanges, predicted: Mapping[str, EditChanges], counts: Mapping[str, int], seed: int = 0
) -> EditTable:
    """A table of predictions against the truth; "permuted" is added to it.

    Args:
        true: with ``top``.
        predicted: by predictor, "graph" and "gradient" and perhaps "second order".
        counts: by size, how many edits; they stand one size after the other.

    Raises:
        InputError: the counts do not add up to the edits.

    Example:
        >>> true = EditChanges(np.array([0.1, 0.2, 0.4]), np.array([5, 5, -3]))
        >>> half = EditChanges(true.loss / 2, true.top)
        >>> compare_changes(true, {"graph": half, "gradient": half}, {"1": 3}).row("1", "graph").slope.value
        2.0
    """
    ends = np.cumsum(list(counts.values()))
    if not len(ends) or ends[-1] != len(true.loss):
        raise InputError(f"{dict(counts)} edits by size are not the {len(true.loss)} whose changes were given")
    places = {size: np.arange(end - counts[size], end) for size, end in zip(counts, ends, strict=True)}
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(at) for at in places.values()])
    called = {**predicted, "permuted": predicted["graph"].at(shuffled)}
    rows = [
        _row(size, name, true.at(at), changes.at(at), rng)
        for size, at in (places | {"all": np.arange(ends[-1])}).items()
        for name, changes in called.items()
    ]

    def by_size(changes: EditChanges | None) -> dict[str, NDArray[np.float64]]:
        return {} if changes is None else {size: changes.loss[at] for size, at in places.items()}

    named = (true, predicted["graph"], predicted["gradient"], predicted.get("second order"))
    return EditTable(tuple(rows), *map(by_size, named))


def _row(
    size: str,
    predictor: str,
    true: EditChanges,
    called: EditChanges,
    rng: np.random.Generator,
) -> PredictionRow:
    t, p = true.loss, called.loss
    draws = np.stack(list(resample(len(t), rng, DRAWS)))

    def estimate(statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]) -> Estimate:
        return interval_of(statistic(t[draws], p[draws]))

    def share(right: NDArray[np.bool_]) -> Estimate:
        return interval_of(right[draws].mean(-1))

    top = UNKNOWN if true.top is None or called.top is None else share(true.top == called.top)
    signs = share(np.sign(t) == np.sign(p))
    return PredictionRow(
        size,
        predictor,
        estimate(_correlation),
        estimate(_r2),
        estimate(_slope),
        top,
        signs,
        float(np.abs(t).mean()),
        len(t),
    )


def _products(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the products of deviations from the means, over the last axis."""
    return np.asarray(((a - a.mean(-1, keepdims=True)) * (b - b.mean(-1, keepdims=True))).sum(-1))


def _correlation(t: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return divide(_products(t, p), np.asarray(np.sqrt(_products(t, t) * _products(p, p))))


def _r2(t: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 - divide(np.asarray(np.square(t - p).sum(-1)), _products(t, t)))


def _slope(t: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return divide(_products(t, p), _products(p, p))
