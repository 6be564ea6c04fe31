"""Quantities of features against plain loops, and on models whose geometry is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import unweave
from unweave import zoo
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import run
from unweave.features import (
    Dictionary,
    collect_activations,
    dimensionality,
    feature_importance,
    features_per_dimension,
    interference,
    measure_activity,
    polysemanticity,
)
from unweave.features.activity import activity_from, activity_sums
from unweave.scope import Scope, divergence
from unweave.statistics import merge

GAUSSIAN = Scope(divergence="gaussian")
W2 = "blocks.0.attn.head.1"


def polygon(n):
    angles = torch.arange(n) * 2 * torch.pi / n
    return torch.stack([angles.cos(), angles.sin()])


def any_dictionary(width, n, activation="relu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dictionary(
        torch.randn(n, width, generator=g) / width**0.5,
        torch.randn(n, generator=g) * 0.1,
        torch.randn(width, n, generator=g) / n**0.5,
        torch.zeros(width),
        activation,
    )


# ---- geometry -------------------------------------------------------------------------------------------


def test_geometry_against_loops():
    w = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    w[:, 4] = 0
    columns = w.double().numpy().T
    for i, a in enumerate(columns):
        length = np.linalg.norm(a)
        row = [0.0 if length == 0 else float(a / length @ b) ** 2 for b in columns]
        wanted = 0.0 if length == 0 else length**2 / sum(row)
        assert float(dimensionality(w)[i]) == pytest.approx(wanted, rel=1e-9)
        row[i] = 0.0
        np.testing.assert_allclose(interference(w)[i], row, rtol=1e-9)
    assert features_per_dimension(w) == pytest.approx(float(np.square(columns).sum()) / 3, rel=1e-9)


@pytest.mark.parametrize(
    ("w", "share"),
    [
        (polygon(5), 2 / 5),
        (polygon(3), 2 / 3),
        (torch.eye(4), 1.0),
        (torch.cat([torch.eye(3), -torch.eye(3)], 1), 1 / 2),
        (torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]), 3 / 4),
    ],
)
def test_known_polytopes_have_their_dimensionality(w, share):
    np.testing.assert_allclose(dimensionality(3 * w.bfloat16() if share == 1 else 3 * w), share, rtol=1e-6)
    assert float(dimensionality(w).sum()) <= len(w) + 1e-6


# ---- activity -------------------------------------------------------------------------------------------


def test_activity_against_loops_in_any_batches():
    f = (torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) - 0.6).relu()
    f[:, 3] = 2.0  # never varies
    found = activity_from(merge(activity_sums(f[:77]), activity_sums(f[77:])))
    x = f.double().numpy()
    np.testing.assert_allclose(found.frequency, [np.mean([v != 0 for v in x[:, i]]) for i in range(4)])
    np.testing.assert_allclose(found.mean, x.mean(0))
    np.testing.assert_allclose(found.power, (x**2).mean(0))
    np.testing.assert_allclose(found.correlation[:3, :3], np.corrcoef(x[:, :3].T), atol=1e-12)
    assert bool(found.correlation[3].isnan().all())
    together = [[np.mean((x[:, i] != 0) & (x[:, j] != 0)) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(found.together, together)
    np.testing.assert_allclose(found.sparsity, 1 - x.mean(0) ** 2 / (x**2).mean(0))
    assert float(found.sparsity[3]) == 0
    with pytest.raises(EmptyDataError):
        activity_from(activity_sums(f[:0]))


def test_activity_in_a_graph_is_that_of_collected_activations(induction, induction_data):
    where = "blocks.0.attn.code"
    x = collect_activations(induction, where, induction_data)
    dictionary = any_dictionary(x.shape[1], 7)
    found = measure_activity(induction, where, dictionary, induction_data, batch_size=5)
    f = dictionary.encode(x)
    assert found.n_tokens == len(x)
    np.testing.assert_allclose(found.frequency, (f > 0).double().mean(0))
    np.testing.assert_allclose(found.correlation, np.corrcoef(f.double().numpy().T), atol=1e-5)
    answered = measure_activity(induction, where, dictionary, induction_data, scope=Scope(positions="answered"))
    assert answered.n_tokens == int(induction_data.labels["answered"].sum())


# ---- importance -----------------------------------------------------------------------------------------

SITES = ["before blocks.1.attn.head.0", f"{W2}.code", W2]


@pytest.mark.parametrize("where", SITES)
def test_exact_importance_is_that_of_one_run_per_latent(induction, induction_data, where):
    data = induction_data.select(torch.arange(5))
    scope = Scope(positions="answered")
    width = collect_activations(induction, where, data).shape[1]
    dictionary, held = any_dictionary(width, 4), torch.tensor([0.1, 0.0, 0.3, -0.2])
    found = feature_importance(
        induction, where, dictionary, data, scope=scope, method="exact", latents=[3, 1], instead=held, batch_size=2
    )
    (batch,) = data.batches(5)
    clean = run(induction, batch.inputs, batch.mask).logits
    for nats, i in zip(found.nats.tolist(), (3, 1), strict=True):

        def removed(x, i=i):
            x = x.clone()
            own = x[..., :width]
            change = held[i] - torch.relu(own @ dictionary.encoder[i] + dictionary.encoder_bias[i])
            x[..., :width] = own + change[..., None] * dictionary.decoder[:, i]
            return x

        logits = run(induction, batch.inputs, batch.mask, patch={where: removed}).logits
        wanted = divergence(scope, clean, logits, batch).sum() / data.labels["answered"].sum()
        assert nats == pytest.approx(float(wanted), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("where", SITES)
def test_second_order_importance_is_the_limit_of_the_exact_one(induction, induction_data, where):
    """For changes so small that nothing beyond the second order counts, many draws give what running gives."""
    data = induction_data.select(torch.arange(3))
    width = collect_activations(induction, where, data).shape[1]
    dictionary = any_dictionary(width, 3)
    small = dataclasses.replace(dictionary, decoder=dictionary.decoder * 0.05)
    options = {"scope": Scope(positions="answered"), "batch_size": 3}
    exact = feature_importance(induction.to(dtype=torch.float64), where, small, data, method="exact", **options)
    fisher = feature_importance(induction.to(dtype=torch.float64), where, small, data, samples=150, **options)
    np.testing.assert_allclose(fisher.nats, exact.nats, rtol=0.25, atol=1e-12)


def test_importance_of_the_toy_models_features_is_their_error():
    """In the toy model, removing feature i leaves x_i unexplained: brute force on its inputs."""
    graph, data = unweave.capture("zoo:superposition"), unweave.load_data("zoo:superposition", limit=150)
    eye, none = torch.eye(5), torch.zeros(5)
    coordinates = Dictionary(eye, none, eye, none, "identity")
    found = feature_importance(graph, "input", coordinates, data, scope=GAUSSIAN, method="exact")
    fisher = feature_importance(graph, "input", coordinates, data, scope=GAUSSIAN, samples=60)
    model, x = zoo.load("superposition").double(), data.tokens[:, 0].double()
    for i in range(5):
        without = x.clone()
        without[:, i] = 0
        wanted = 0.5 * (model(x) - model(without)).square().sum(1).mean()
        assert float(found.nats[i]) == pytest.approx(wanted.item(), rel=1e-4)
        # second order: the Jacobian's column times the feature; as outputs bend at 0, more than what removing it costs
        jacobian = torch.stack([torch.autograd.functional.jacobian(model, row)[:, i] for row in x])
        second = 0.5 * (jacobian * x[:, i, None]).square().sum(1).mean()
        assert float(fisher.nats[i]) == pytest.approx(second.item(), rel=0.15)
        assert second > wanted


def test_bad_requests_for_importance_are_refused(induction, induction_data):
    dictionary = any_dictionary(64, 4)
    ask = {"graph": induction, "where": "blocks.0.attn.code", "dictionary": dictionary, "data": induction_data}
    for wrong in ({"method": "eap"}, {"samples": 0}, {"latents": [4]}, {"latents": [-1]}, {"latents": []}):
        with pytest.raises(InputError):
            feature_importance(**ask, **wrong)
    with pytest.raises(ShapeError, match="instead"):
        feature_importance(**ask, instead=torch.zeros(3))
    with pytest.raises(InputError, match="nodes"):
        feature_importance(**ask, method="exact")
    with pytest.raises(UnknownNameError):
        feature_importance(**(ask | {"where": "blocks.0.atn"}))
    with pytest.raises(InputError, match="decodes"):
        feature_importance(**(ask | {"dictionary": any_dictionary(63, 4)}))


# ---- neurons and dictionary sizes -------------------------------------------------------------------------


def test_polysemanticity_against_loops_and_its_null():
    w = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    power = torch.rand(10, generator=torch.Generator().manual_seed(1))
    found = polysemanticity(w, power, rotations=60)
    for i in range(4):
        shares = [float(w[i, j].double()) ** 2 * float(power[j]) for j in range(10)]
        assert float(found.features[i]) == pytest.approx(sum(shares) ** 2 / sum(s * s for s in shares), rel=1e-5)
    assert bool((found.null.diff() >= 0).all())
    # neurons in random directions are like their own rotations; those of one feature each are like none
    assert 0.01 < found.percentile < 0.99
    single = polysemanticity(torch.eye(6), torch.ones(6), rotations=60)
    assert single.percentile == 0
    assert float(single.null[0]) > 1.5
    with pytest.raises(ShapeError, match="power"):
        polysemanticity(w, power[:3])


def test_neurons_of_the_pentagon_serve_many_features():
    w = zoo.load("superposition")[0].weight.detach()
    assert float(polysemanticity(w, torch.ones(5)).features.min()) > 2
