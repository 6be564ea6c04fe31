"""Superposition of single features: the loss in closed form, the polygons' coefficients, and the packing's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from unweave.retrodiction import PHENOMENA, packing, polygons
from unweave.retrodiction.polygons import Polygon, loss_of_single_features, single_features, trained_polygons


def regular(corners, features, length, low, rest):
    """W and b of a polygon in the first columns; the other features have W_i = 0 and this bias."""
    angles = 2 * math.pi * torch.arange(corners, dtype=torch.float64) / corners
    w = torch.zeros(2, features, dtype=torch.float64)
    w[:, :corners] = length * torch.stack([angles.cos(), angles.sin()])
    b = torch.full((features,), rest, dtype=torch.float64)
    b[:corners] = low
    return w, b


def rising(w, b):
    """How many eigenvalues of the loss's Hessian are positive, and whether any is negative."""
    point = torch.cat([w.flatten(), b])
    values = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(
            lambda v: loss_of_single_features(v[: w.numel()].view(w.shape), v[w.numel() :]), point
        )
    )
    return int((values > 1e-5).sum()), bool((values < -1e-5).any())


def test_the_loss_is_that_of_plain_sums_over_a_grid():
    generator = torch.Generator().manual_seed(0)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for _ in range(6):
        w = 0.8 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
        b = 0.4 * torch.randn(4, generator=generator, dtype=torch.float64)
        total = 0.0
        for i in range(4):
            for j in range(4):
                out = (grid * (w[:, i] @ w[:, j]) + b[j]).clamp(min=0)
                total += float(((grid if i == j else 0 * grid) - out).square().mean()) / 8
        assert float(loss_of_single_features(w, b)) == pytest.approx(total, rel=1e-6)


def test_the_loss_and_its_gradient_are_finite_where_columns_are_zero():
    for bias in (-0.1, 0.0, 0.1):
        w = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
        b = torch.full((5,), bias, dtype=torch.float64, requires_grad=True)
        loss = loss_of_single_features(w, b)
        loss.backward()
        # 1/2 E (x - b)^2 for the feature that is on, b^2 for each of the four others
        c = max(bias, 0.0)
        assert float(loss.detach()) == pytest.approx((1 / 3 - c + 5 * c * c) / 2)
        assert bool(torch.isfinite(w.grad).all() & torch.isfinite(b.grad).all())


def test_inputs_have_one_feature_uniform_and_the_loss_is_their_mean():
    x = single_features(200_000, 5, seed=0)
    assert bool(((x > 0).sum(1) <= 1).all())
    assert (x > 0).double().mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.005)
    w, b = regular(5, 5, 1.17, -0.28, 0.0)
    mean = float((x - (x @ w.T @ w + b).relu()).square().sum(1).mean() / 2)
    assert float(loss_of_single_features(w, b)) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("features", [5, 6])
def test_training_comes_to_polygons_whose_coefficient_is_half_the_hessians_rank(features):
    found = {}
    for w, b in zip(*trained_polygons(features, seed=50, starts=20, steps=900), strict=True):
        polygon = Polygon.of(w, b)
        if polygon is not None and polygon.corners >= 5:
            found[str(polygon)] = (polygon.coefficient, rising(w, b))
    assert str(features) in found
    for coefficient, (rank, falls) in found.values():
        assert not falls
        assert coefficient == rank / 2


def test_a_square_is_a_minimum_whose_loss_rises_like_degree_two():
    generator = torch.Generator().manual_seed(1)
    for name, rest, free in (("4+", 0.1, []), ("4 and 1 dead", -0.3, [14])):
        w, b = regular(4, 5, 1.0, 0.0, rest)
        polygon = Polygon.of(w, b)
        assert str(polygon) == name
        point = torch.cat([w.flatten(), b])
        base = float(loss_of_single_features(w, b))

        def rise(direction, t, point=point, base=base):
            moved = point + t * direction
            return float(loss_of_single_features(moved[:10].view(2, 5), moved[10:])) - base

        turn = torch.cat([torch.stack([-w[1], w[0]]).flatten(), torch.zeros(5)])
        still = torch.stack([turn / turn.norm(), *torch.eye(15, dtype=torch.float64)[free]])
        assert polygon.coefficient == (15 - len(still)) / 2
        for row in still:
            assert abs(rise(row, 1e-3)) < 1e-9
        for _ in range(200):
            direction = torch.randn(15, generator=generator, dtype=torch.float64)
            direction -= still.T @ (still @ direction)
            small, large = rise(direction, 1e-4), rise(direction, 2e-4)
            assert small > 0
            assert large / small == pytest.approx(4, rel=0.02)


def test_kinds_and_what_is_no_polygon():
    w, b = regular(5, 6, 1.17, -0.28, 0.08)
    assert str(Polygon.of(w, b)) == "5+"
    assert Polygon.of(w, b).coefficient == 8.5
    w[0, 0] += 0.01
    assert Polygon.of(w, b) is None
    assert Polygon.of(0 * w, b) is None


def test_estimates_are_held_against_what_is_known(monkeypatch):
    small = {"STARTS": 4, "STEPS": 700, "CHAINS": 64, "BURN_IN": 200, "DRAWS": 16, "KINDS": ((5, "5"),)}
    for name, value in (small | {"BY_BATCHES": ((5, "5"),), "EXAMPLES": 2000, "BATCH": 256}).items():
        monkeypatch.setattr(polygons, name, value)
    exact, by_batches = PHENOMENA["polygons"].measure([0])
    assert exact.value == pytest.approx(1, abs=0.15)
    # few draws of 16 chains, and hotter than they should be
    assert by_batches.value == pytest.approx(1.1, abs=0.4)


# ---- packing ---------------------------------------------------------------------------------------------


def test_sticking_is_the_worst_of_the_best_span():
    inverse = packing.INVERSE_DENSITIES
    assert packing._sticks([0.5 if 2.2 <= v <= 4.4 else 1.0 for v in inverse]) == 0
    assert packing._sticks([0.5 + 0.1 * (v != 2.2) for v in inverse]) == pytest.approx(0.1)


def test_steepness_compares_the_plateau_with_its_sides():
    power = [v**-0.7 for v in packing.INVERSE_DENSITIES]
    assert packing._steepness(power) == pytest.approx(1)
    level = [v**-0.7 if v != 3.6 else 2.8**-0.7 for v in packing.INVERSE_DENSITIES]
    assert packing._steepness(level) == 0


def test_shares_are_of_the_features_seen():
    found = torch.tensor([0.5, 0.49, 0.6, 0.1, 0.0], dtype=torch.float64)
    assert packing._near(found, (0.5,)) == pytest.approx(2 / 3)
    assert math.isnan(packing._near(torch.zeros(3), (0.5,)))


def test_packing_gives_a_quantity_for_every_claim(monkeypatch):
    for name, value in {"STEPS": 150, "FEATURES": 12, "HIDDEN": 3}.items():
        monkeypatch.setattr(packing, name, value)
    quantities = PHENOMENA["packing"].measure([0])
    assert [q.what for q in quantities] == [claim.what for claim in packing.CLAIMS.values()]
    assert quantities[0].value == pytest.approx(1, abs=0.2)
