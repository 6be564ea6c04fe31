"""Penalties against plain loops in float64, their gradients against finite differences, and what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from unweave import penalty
from unweave.errors import InputError, NonFiniteError, ShapeError, UnknownNameError
from unweave.penalty import cut_penalty, edge_nats, edge_nats_penalty, rank_penalty
from unweave.zoo import ToyConfig, ToyTransformer, mlp

unchecked = {f.__name__: inspect.unwrap(f) for f in (edge_nats, edge_nats_penalty, cut_penalty, rank_penalty)}


def small_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def small_transformer() -> ToyTransformer:
    return ToyTransformer(ToyConfig(1, 2, 4, 2, 5, d_vocab=6, d_out=3, n_ctx=4)).double()


# ---- nats ------------------------------------------------------------------------------------------------


def one_by_one(model, inputs, labels, where=None):
    """A backward pass per sequence."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for b in range(len(inputs)):
        log_p = model(inputs[b : b + 1])[0].log_softmax(-1)
        told = log_p.gather(-1, labels[b][..., None])[..., 0]
        value = told.sum() if where is None else told[where[b]].sum()
        for (name, p), g in zip(
            model.named_parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True
        ):
            total[name] += 0.5 * (p.detach() * g) ** 2 / len(inputs)
    return total


def test_edge_nats_are_one_backward_pass_per_sequence():
    model, x, y = small_mlp(), torch.randn(5, 3, dtype=torch.double), torch.tensor([0, 2, 1, 1, 0])
    got, wanted = edge_nats(model, x, labels=y), one_by_one(model, x, y)
    assert list(got) == ["0.weight", "2.weight"]  # biases are left out
    for name, nats in got.items():
        torch.testing.assert_close(nats, wanted[name])
    (bias,) = edge_nats(model, x, labels=y, names=["0.bias"]).values()
    torch.testing.assert_close(bias, wanted["0.bias"])


def test_edge_nats_of_sequences_count_only_the_positions_asked_for():
    model, x, y = small_transformer(), torch.randint(6, (3, 4)), torch.randint(3, (3, 4))
    where = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    for marks in (None, where):
        got, wanted = edge_nats(model, x, labels=y, where=marks), one_by_one(model, x, y, marks)
        assert "blocks.0.W_Q" in got
        for name, nats in got.items():
            torch.testing.assert_close(nats, wanted[name])


def test_edge_nats_are_the_second_order_of_cutting_a_weight():
    """All labels weighted by their probability instead of drawn; weights small enough for the second order."""
    model, x = small_mlp(), torch.randn(6, 3, dtype=torch.double)
    with torch.no_grad():
        model[2].weight *= 1e-2
        clean = model(x).log_softmax(-1)
    expected = torch.zeros(3, 4, dtype=torch.double)
    for b in range(6):
        for y in range(3):
            nats = edge_nats(model, x[b : b + 1], labels=torch.tensor([y]))["2.weight"].detach()
            expected += clean[b, y].exp() * nats / 6
    for i in range(3):
        for j in range(4):
            other = small_mlp()
            other.load_state_dict(model.state_dict())
            with torch.no_grad():
                other[2].weight[i, j] = 0.0
                kl = (clean.exp() * (clean - other(x).log_softmax(-1))).sum(-1).mean()
            assert float(kl) == pytest.approx(float(expected[i, j]), rel=0.03)


def test_labels_are_drawn_from_the_model():
    model, x = nn.Linear(1, 2, bias=False).double(), torch.ones(40000, 1, dtype=torch.double)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-0.5]]))
    p = model(x[:1]).softmax(-1)[0]
    nats = edge_nats(model, x, generator=torch.Generator().manual_seed(0))["weight"][:, 0]
    wanted = 0.5 * model.weight[:, 0] ** 2 * p * (1 - p)  # the Fisher information of two classes
    torch.testing.assert_close(nats, wanted, rtol=0.03, atol=0.0)
    again = edge_nats(model, x, generator=torch.Generator().manual_seed(0))["weight"][:, 0]
    assert torch.equal(again, nats)


def test_the_penalty_is_a_soft_count():
    model, x, y = small_mlp(), torch.randn(5, 3, dtype=torch.double), torch.zeros(5, dtype=torch.long)
    nats = torch.cat([n.flatten() for n in edge_nats(model, x, labels=y).values()])
    wanted = sum(torch.log1p(n / 0.02) for n in nats)
    torch.testing.assert_close(edge_nats_penalty(model, x, labels=y, floor=0.02), wanted)
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
    assert float(edge_nats_penalty(model, x, labels=y).detach()) == 0.0


def finite_differences(value, parameters, step=1e-6):
    out = []
    for p in parameters:
        slope = torch.zeros_like(p)
        for i in range(p.numel()):
            with torch.no_grad():
                flat, old = p.view(-1), float(p.view(-1)[i])
                flat[i] = old + step
                up = float(value())
                flat[i] = old - step
                down = float(value())
                flat[i] = old
            slope.view(-1)[i] = (up - down) / (2 * step)
        out.append(slope)
    return out


@pytest.mark.parametrize("make", [small_mlp, small_transformer])
def test_the_gradient_of_edge_nats_is_right(make):
    model = make()
    x = torch.randn(3, 3, dtype=torch.double) if make is small_mlp else torch.randint(6, (2, 3))
    y = torch.randint(3, x.shape[:1] if make is small_mlp else x.shape)

    def value():
        return edge_nats_penalty(model, x, labels=y, floor=0.05)

    parameters = list(model.parameters())
    got = torch.autograd.grad(value(), parameters, allow_unused=True, materialize_grads=True)
    for ours, plain in zip(got, finite_differences(value, parameters), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_half_precision_and_outputs_with_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x):
            return type("Output", (), {"logits": self.inner(x)})()

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    model = Wrapped()
    full = edge_nats(model, x, labels=y)["inner.weight"]
    torch.testing.assert_close(full, edge_nats(model.inner, x, labels=y)["weight"])
    half = edge_nats(model.to(torch.bfloat16), x.to(torch.bfloat16), labels=y)["inner.weight"]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=1e-3)


# ---- cuts ------------------------------------------------------------------------------------------------


def test_cuts_are_sums_over_pairs():
    torch.manual_seed(1)
    weights = [torch.randn(4, 3, dtype=torch.double), torch.randn(2, 4, dtype=torch.double)]
    places = [torch.rand(n, 2, dtype=torch.double) for n in (3, 4, 2)]
    cut = mass = 0.0
    for k, w in enumerate(weights):
        for i in range(len(w)):
            for j in range(w.shape[1]):
                far = 0.5 * sum(abs(float(a - b)) for a, b in zip(places[k + 1][i], places[k][j], strict=True))
                cut += abs(float(w[i, j])) * far
                mass += abs(float(w[i, j]))
    assert float(cut_penalty(weights, places)) == pytest.approx(cut)
    assert float(cut_penalty(weights, places, normalised=True)) == pytest.approx(cut / mass)
    shrunk = [0.1 * w for w in weights]
    assert float(cut_penalty(shrunk, places, normalised=True)) == pytest.approx(cut / mass)


def test_groups_give_the_mass_between_them():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    sides = torch.eye(2)
    assert float(cut_penalty([weight], [sides, sides])) == 5.0
    assert float(cut_penalty([weight], [sides, sides], normalised=True)) == pytest.approx(0.5)
    assert float(cut_penalty([torch.zeros(2, 2)], [sides, sides], normalised=True)) == 0.0


@pytest.mark.parametrize("normalised", [False, True])
def test_the_gradient_of_cuts_is_right(normalised):
    weights = [torch.randn(4, 3, dtype=torch.double, requires_grad=True)]
    places = [torch.rand(n, 2, dtype=torch.double, requires_grad=True) for n in (3, 4)]
    assert torch.autograd.gradcheck(
        lambda w, a, b: cut_penalty([w], [a, b], normalised=normalised), (weights[0], *places)
    )


# ---- ranks -----------------------------------------------------------------------------------------------


def test_ranks_are_sums_over_singular_values():
    matrices = [torch.randn(5, 3, dtype=torch.double), torch.randn(2, 3, 4, dtype=torch.double)]
    each = [matrices[0], *matrices[1]]
    roots = [torch.linalg.eigvalsh(m.T @ m).clamp(min=0).sqrt() for m in each]
    nuclear = sum(float(s.sum()) for s in roots)
    counted = sum(float(torch.log(1 + (s / 0.3) ** 2).sum()) for s in roots)
    assert float(rank_penalty(matrices, kind="nuclear")) == pytest.approx(nuclear)
    assert float(rank_penalty(matrices, floor=0.3)) == pytest.approx(counted)


def test_fewer_directions_cost_less_whatever_the_basis():
    one = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])).double()
    two = torch.eye(2).double() * 5 / 2**0.5  # of the same Frobenius norm
    turn = torch.linalg.qr(torch.randn(2, 2).double()).Q
    for kind in penalty.SPECTRAL_KINDS:
        assert float(rank_penalty([one], kind=kind)) < 0.8 * float(rank_penalty([two], kind=kind))
        turned = float(rank_penalty([turn @ one], kind=kind))
        assert turned == pytest.approx(float(rank_penalty([one], kind=kind)))


@pytest.mark.parametrize("kind", penalty.SPECTRAL_KINDS)
def test_the_gradient_of_ranks_is_right(kind):
    stack = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: rank_penalty([w], kind=kind, floor=0.5), stack)


def test_log_det_has_a_gradient_where_nothing_is_left():
    weight = torch.zeros(3, 3, requires_grad=True)
    rank_penalty([weight, torch.ones(2, 4)]).backward()
    assert float(weight.grad.abs().max()) == 0.0
    assert bool(torch.isfinite(rank_penalty([torch.randn(3, 3).to(torch.bfloat16)])))


# ---- all of them in a loop, and refusals -----------------------------------------------------------------


def sides(model):
    """The first half of every layer, and the rest."""
    layers = mlp.linear_layers(model)
    return [
        torch.eye(2)[(torch.arange(n) >= n // 2).long()]
        for n in (layers[0].in_features, *(x.out_features for x in layers))
    ]


LOOPS = {
    "nats": lambda model, x: edge_nats_penalty(model, x, generator=torch.Generator().manual_seed(0)),
    "cut": lambda model, x: cut_penalty([layer.weight for layer in mlp.linear_layers(model)], sides(model)),
    "rank": lambda model, x: rank_penalty([layer.weight for layer in mlp.linear_layers(model)]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_descending_a_penalty_lowers_it(name):
    model, x = mlp.make_mlp(mlp.MlpConfig((4, 8, 4))), torch.randn(16, 4)
    optimiser, values = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(60):
        optimiser.zero_grad()
        value = LOOPS[name](model, x)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.7 * values[0]


LINE = [torch.zeros(2, 1), torch.zeros(3, 1)]
REFUSALS = {
    "no floor": (InputError, "floor", lambda m, x: edge_nats_penalty(m, x, floor=0.0)),
    "nan floor": (InputError, "floor", lambda m, x: rank_penalty([torch.eye(2)], floor=float("nan"))),
    "unknown parameter": (UnknownNameError, "closest: weight", lambda m, x: edge_nats(m, x, names=["wieght"])),
    "nothing to score": (InputError, "names=", lambda m, x: edge_nats(m, x, names=[])),
    "no sequence": (ShapeError, "no sequence", lambda m, x: edge_nats(m, x[:0])),
    "labels too few": (ShapeError, "labels", lambda m, x: edge_nats(m, x, labels=torch.zeros(3, dtype=torch.long))),
    "labels of reals": (ShapeError, "labels", lambda m, x: unchecked["edge_nats"](m, x, labels=torch.zeros(5))),
    "where too many": (ShapeError, "where", lambda m, x: edge_nats(m, x, where=torch.ones(5, 2, dtype=torch.bool))),
    "no logits": (InputError, "logits", lambda m, x: edge_nats(nn.LSTM(3, 2), x)),
    "infinite": (NonFiniteError, "NaN or inf", lambda m, x: edge_nats(m, x * torch.inf)),
    "places too few": (ShapeError, "places for 2", lambda m, x: cut_penalty([m.weight], LINE[:1])),
    "places turned": (ShapeError, r"\[out, in\]", lambda m, x: cut_penalty([m.weight], [LINE[0], LINE[1]])),
    "no matrices": (InputError, "at least one", lambda m, x: rank_penalty([])),
    "a bias": (ShapeError, "biases", lambda m, x: rank_penalty([m.bias])),
    "unknown kind": (InputError, "known: log-det, nuclear", lambda m, x: rank_penalty([m.weight], kind="trace")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(name):
    error, message, call = REFUSALS[name]
    with pytest.raises(error, match=message):
        call(nn.Linear(3, 2), torch.randn(5, 3))
