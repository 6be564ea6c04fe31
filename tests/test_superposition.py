"""Toy models of superposition: training, rooms, known geometry, parts of matrices, the retrodiction's arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import unweave
from unweave import zoo
from unweave.errors import CorruptFileError, InputError, ShapeError, UnknownNameError
from unweave.execution import run
from unweave.features import Components, dimensionality, find_components, node_components, recovery
from unweave.features.components import sparse_readings
from unweave.retrodiction import PHENOMENA
from unweave.retrodiction import superposition as phenomenon
from unweave.scope import Scope
from unweave.zoo import mlp
from unweave.zoo import superposition as toy
from unweave.zoo.train import train_room

ROOMS = sorted(toy.ROOMS)
GAUSSIAN = Scope(divergence="gaussian")


def sparse(n, d, density=0.1, seed=0):
    return toy.features(n, torch.tensor([density]), d, torch.Generator().manual_seed(seed))[0]


def turned(d, seed=0):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


# ---- models and rooms ------------------------------------------------------------------------------------


def test_features_are_uniform_where_active_and_independent():
    x = toy.features(40_000, torch.tensor([0.2, 1.0]), 3, torch.Generator().manual_seed(0))
    for values, p in zip(x, (0.2, 1.0), strict=True):
        active = values > 0
        assert float(active.float().mean()) == pytest.approx(p, abs=0.01)
        assert float(values[active].mean()) == pytest.approx(0.5, abs=0.01)
        assert float(values[active].var()) == pytest.approx(1 / 12, abs=0.003)
        both = (active[:, 0] & active[:, 1]).float().mean()
        assert float(both) == pytest.approx(p * p, abs=0.01)


def test_outputs_losses_and_perceptron_are_the_formula():
    generator = torch.Generator().manual_seed(3)
    w, b = torch.randn(2, 2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    x, importance = torch.rand(2, 6, 4, generator=generator), torch.tensor([1.0, 0.5, 0.2, 0.1])
    models = toy.Instances(w, b)
    found = toy.losses(models, x, importance)
    for i in range(2):
        total = 0.0
        for row in x[i].double().numpy():
            hidden = w[i].double().numpy() @ row
            out = np.maximum(w[i].double().numpy().T @ hidden + b[i].double().numpy(), 0)
            total += 0.5 * float((importance.double().numpy() * (row - out) ** 2).sum())
        assert float(found[i]) == pytest.approx(total / 6, rel=1e-5)
        model = toy.as_model(w[i], b[i])
        torch.testing.assert_close(model(x[i]), models.outputs(x)[i])
        graph = unweave.capture(model)
        torch.testing.assert_close(run(graph, x[i][:, None]).logits[:, 0], models.outputs(x)[i])


def test_instances_are_trained_as_one_by_one():
    p, importance = torch.tensor([0.3]), torch.tensor([1.0, 0.7, 0.5])
    *_, (_, losses, models) = toy.train_instances(p, importance, 2, steps=5, seed=4, batch=16)
    generator = torch.Generator().manual_seed(4)
    w = (torch.randn(1, 2, 3, generator=generator) * (2 / 5) ** 0.5)[0].requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([w, b], lr=toy.RATE)
    for step in range(5):
        adam.param_groups[0]["lr"] = toy.RATE * (1 - 0.99 * step / 5)
        x = toy.features(16, p, 3, generator)[0]
        loss = 0.5 * ((torch.relu(x @ w.T @ w + b) - x) ** 2 * importance).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(models.weights[0], w.detach())
    torch.testing.assert_close(models.biases[0], b.detach())
    assert float(losses[0]) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("density", [[], [0.0], [1.1]])
def test_impossible_densities_are_refused(density):
    with pytest.raises(InputError, match="densities"):
        next(toy.train_instances(torch.tensor(density), torch.ones(3), 2, steps=3))


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_are_captured_with_their_data(name):
    graph, data = unweave.capture(f"zoo:{name}"), unweave.load_data(f"zoo:{name}", limit=50)
    room, model = zoo.room(name), zoo.load(name)
    assert data.tokens.shape == (50, 1, room.n_features)
    torch.testing.assert_close(run(graph, data.tokens).logits[:, 0], model(data.tokens[:, 0]))
    recorded = zoo.known(name)
    assert recorded == json.loads(json.dumps(room.known(model)))
    # the loss of leaving everything out is what the model must beat by far
    nothing = 0.5 * float((data.tokens[:, 0].square() * room.importance).sum(1).mean())
    assert recorded["loss_nats"] < 0.3 * nothing


def test_five_sparse_features_make_a_pentagon():
    degrees = sorted(zoo.known("superposition")["degrees"])
    gaps = np.diff([*degrees, degrees[0] + 360])
    assert np.abs(gaps - 72).max() < 2
    w = zoo.load("superposition")[0].weight.detach()
    np.testing.assert_allclose(dimensionality(w), 0.4, atol=0.01)


def test_the_important_features_are_represented():
    represented = zoo.known("superposition_by_importance")["represented"]
    assert represented == list(range(len(represented)))
    assert 5 < len(represented) < 20


def test_a_room_is_trained_saved_and_loaded(tmp_path):
    model = train_room("superposition", tmp_path, seed=3, steps=2)
    back = zoo.load_folder(tmp_path)
    assert [type(layer) for layer in back] == [nn.Linear, nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    path = tmp_path / "config.json"
    for linear in ("0", [7], [-1]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"linear": linear}))
        with pytest.raises(CorruptFileError, match="linear"):
            zoo.load_folder(tmp_path)
    with pytest.raises(InputError, match="no ReLU"):
        mlp.neuron_effects(model, torch.rand(4, 5), {"a": torch.arange(5)})


# ---- parts of a matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "density"), [(1, 0.5), (5, 0.05), (5, 0.3), (20, 0.1)])
def test_planted_bases_are_found(d, density):
    skewed = turned(d, 1) @ torch.diag(torch.linspace(0.5, 2, d)) @ (torch.eye(d) + 0.2 * turned(d, 2))
    s = sparse(1500, d, density)
    read, basis = sparse_readings(s @ skewed.T)
    cosines = (basis / basis.norm(dim=0)).T @ (skewed / skewed.norm(dim=0)).double()
    assert float(cosines.amax(0).min()) > 0.9999
    torch.testing.assert_close(read @ basis, torch.eye(d, dtype=torch.float64), atol=1e-6, rtol=0)
    found = (s @ skewed.T).double() @ read.T
    torch.testing.assert_close(found.square().mean(0), torch.ones(d, dtype=torch.float64))
    assert bool((found.mean(0) >= 0).all())


def test_parts_of_the_model_are_its_columns_in_any_basis():
    graph = unweave.capture("zoo:superposition")
    w = graph.stages[1].ports[0].reads[0].map.dense()
    x = unweave.load_data("zoo:superposition", limit=1500).tokens[:, 0]
    for turn in (torch.eye(5), turned(5)):
        match = recovery(found := find_components(w @ turn.T, x @ turn.T), w @ turn.T, turn)
        assert match.n_components == 5
        assert match.mmcs > 0.9999
        assert match.ml2r == pytest.approx(1, abs=1e-4)
        assert found.used == pytest.approx(float((x != 0).sum(1).float().mean()), abs=1e-9)
        torch.testing.assert_close(found.total, (w @ turn.T).double())
    # what does not look for sparse inputs does not find them: the singular vectors, and the coordinates
    u, s, v = torch.linalg.svd((w @ turn.T).double(), full_matrices=False)
    none = torch.zeros_like(w, dtype=torch.float64)
    singular = Components(v, u * s, none, s, 0.0)
    coordinates = Components(torch.eye(5, dtype=torch.float64), (w @ turn.T).double(), none, torch.ones(5), 0.0)
    assert abs(recovery(singular, w @ turn.T, turn).ml2r - 1) > 0.1
    assert abs(recovery(coordinates, w @ turn.T, turn).ml2r - 1) > 0.1


def test_nats_of_parts_are_those_of_plain_loops():
    graph, data = unweave.capture("zoo:superposition"), unweave.load_data("zoo:superposition", limit=600)
    found = node_components(graph, "layers.0", data, scope=GAUSSIAN, progress=False, batch_size=64)
    model = zoo.load("superposition").double()
    x = data.tokens[:, 0].double()
    wanted = torch.zeros(5, dtype=torch.float64)
    for row in x:  # the Fisher information of a Gaussian output is J^T J
        hidden = row @ model[0].weight.T
        jacobian = torch.autograd.functional.jacobian(lambda h: model[1:](h), hidden)
        for c in range(5):
            moved = jacobian @ found.written[:, c] * (found.read[c] @ row)
            wanted[c] += 0.5 * float(moved.square().sum()) / len(x)
    np.testing.assert_allclose(found.nats, wanted, rtol=0.2)
    assert float(found.nats.sum()) == pytest.approx(float(wanted.sum()), rel=0.1)
    assert found.nats.tolist() == sorted(found.nats.tolist(), reverse=True)


def test_dimensions_that_inputs_lack_and_parts_without_worth_are_the_rest():
    w = torch.randn(3, 6)
    w[:, 2] = 0  # reads nothing
    x = sparse(1000, 6)
    x[:, 5] = 0  # never there
    found = find_components(w, x)
    assert len(found.read) == 4
    torch.testing.assert_close(found.total, w.double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.rest[:, :5], torch.zeros(3, 5, dtype=torch.float64), atol=1e-6, rtol=0)
    assert bool(found.nats.isnan().all())


def test_recovery_against_loops():
    generator = torch.Generator().manual_seed(0)
    w, basis = torch.randn(3, 4, generator=generator), turned(4, 5)
    parts = Components(
        torch.randn(6, 4, generator=generator).double(),
        torch.randn(3, 6, generator=generator).double(),
        torch.zeros(3, 4, dtype=torch.float64),
        torch.ones(6),
        0.0,
    )
    best, ratios = [], []
    for j in range(4):
        true = (w @ basis[:, j]).double()
        columns = [parts.written[:, c] * float(parts.read[c] @ basis[:, j].double()) for c in range(6)]
        cosines = [float(torch.cosine_similarity(column, true, dim=0)) for column in columns]
        best.append(max(cosines))
        ratios.append(float(columns[int(np.argmax(cosines))].norm() / true.norm()))
    match = recovery(parts, w, basis)
    assert match.mmcs == pytest.approx(np.mean(best), rel=1e-6)
    assert match.ml2r == pytest.approx(np.mean(ratios), rel=1e-6)


def test_bad_matrices_and_nodes_are_refused(induction, induction_data):
    with pytest.raises(ShapeError, match="fit"):
        find_components(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(ShapeError, match="fit"):
        find_components(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4, 2))
    with pytest.raises(InputError, match="zero"):
        sparse_readings(torch.zeros(4, 3))
    with pytest.raises(UnknownNameError, match="port"):
        node_components(induction, "blocks.0.attn.head.0", induction_data, port="in")
    with pytest.raises(InputError, match="shares"):
        node_components(induction, "blocks.0.attn.head.0", induction_data, port="q")


# ---- the phenomenon --------------------------------------------------------------------------------------


def test_the_closed_form_of_the_phase_change_is_that_of_brute_force():
    x = torch.rand(400_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for r in (0.5, 1.0):
        p = phenomenon.phase_border(r)
        active = torch.rand(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) < p
        s = x * active
        importance = torch.tensor([1.0, r], dtype=torch.float64)
        difference = s[:, :1] - s[:, 1:]
        shared = torch.cat([difference, -difference], 1).relu()
        owned = torch.stack([s[:, 0], torch.full_like(s[:, 1], p / 2)], 1)
        costs = [float(((out - s).square() * importance).sum(1).mean()) for out in (shared, owned)]
        assert costs[0] == pytest.approx(costs[1], rel=0.02)


def test_the_phenomenon_gives_a_quantity_for_every_claim(monkeypatch):
    for name, value in {"STEPS": 2, "STARTS": 2, "FRESH": 50}.items():
        monkeypatch.setattr(phenomenon, name, value)
    quantities = PHENOMENA["superposition"].measure([0])
    assert [q.what for q in quantities] == [claim.what for claim in phenomenon.CLAIMS.values()]
    by_name = dict(zip(phenomenon.CLAIMS, quantities, strict=True))
    # parts are found whatever the network has learnt
    assert by_name["5-2 MMCS"].value > 0.99
    assert by_name["40-10 ML2R"].value == pytest.approx(1, abs=0.01)
