"""The bootstrap against plain loops, and what it does with what is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unweave.intervals import UNKNOWN, bootstrap, bootstrap_ratio, divide, interval_of, resample, resampled_sums

NAN = float("nan")


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(5).normal(2.0, 1.0, (17, 3))


def plain_quantile(values: list[float], q: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def test_bootstrap_is_the_plain_loop(table):
    rng, drawn = np.random.default_rng(3), []
    for _ in range(40):
        rows = [table[i] for i in rng.integers(0, 17, 17)]
        drawn.append(sum(r[0] for r in rows) / sum(r[1] for r in rows))
    expected = (table[:, 0].sum() / table[:, 1].sum(), plain_quantile(drawn, 0.025), plain_quantile(drawn, 0.975))
    columns = {"a": table[:, 0], "b": table[:, 1]}
    assert bootstrap(columns, lambda a, b: a / b, seed=3, draws=40) == pytest.approx(expected)
    assert bootstrap_ratio(table[:, 0], table[:, 1], seed=3, draws=40) == pytest.approx(expected)
    sums = resampled_sums(table, seed=3, draws=40)
    assert interval_of(sums[:, 0] / sums[:, 1]) == pytest.approx(expected)


def test_draws_are_the_same_for_every_table_of_a_seed(table):
    both = np.hstack([table, table[:, :1] * 10])
    assert resampled_sums(both)[:, 3] == pytest.approx(10 * resampled_sums(table)[:, 0])
    assert not np.array_equal(resampled_sums(table), resampled_sums(table, seed=1))


def test_a_generator_goes_on_from_where_it_is():
    rng = np.random.default_rng(4)
    first, second = (np.stack(list(resample(9, rng, 5))) for _ in range(2))
    assert (first[0] == np.arange(9)).all()
    assert (second[0] == np.arange(9)).all()
    assert np.array_equal(np.concatenate([first[1:], second[1:]]), list(resample(9, 4, 10))[1:])


def test_undefined_draws_are_left_out():
    drawn = [1.0, NAN, 3.0, 2.0, NAN]
    assert interval_of([9.0, *drawn]) == pytest.approx((9.0, plain_quantile([1, 3, 2], 0.025), plain_quantile([1, 3, 2], 0.975)))  # fmt: skip
    # one row of two has nothing to divide by: draws of it alone are undefined, all others are 1/2
    assert bootstrap_ratio(np.array([0.0, 2.0]), np.array([0.0, 4.0])) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[NAN, NAN, NAN], [NAN, 1.0, 2.0]])
def test_what_is_undefined_on_the_data_has_no_interval(values):
    assert np.isnan(interval_of(values)).all()
    assert np.isnan(bootstrap_ratio(np.zeros(3), np.zeros(3))).all()
    assert np.isnan(UNKNOWN).all()


def test_a_value_without_a_defined_draw_has_no_interval():
    value, low, high = interval_of([1.0, NAN, NAN])
    assert value == 1.0
    assert np.isnan([low, high]).all()


def test_an_end_among_infinite_draws_is_undefined():
    value, low, high = interval_of([1.0, *[0.0] * 30, math.inf, math.inf])
    assert (value, low) == (1.0, 0.0)
    assert math.isnan(high)


def test_divide_leaves_zero_denominators_undefined():
    assert divide(6.0, 3.0) == 2.0
    assert np.isnan(divide(1.0, 0.0))
    assert divide([[1.0], [2.0]], [1.0, 0.0]) == pytest.approx(np.array([[1.0, NAN], [2.0, NAN]]), nan_ok=True)
