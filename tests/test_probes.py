"""Linear probes: against scikit-learn on dense matrices, planted concepts, control tasks, and what erasing costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score

import unweave
from unweave.data import from_tensor
from unweave.errors import EmptyDataError, InputError, NonFiniteError, ShapeError, UnknownNameError
from unweave.probes import (
    Concept,
    control_task,
    fit_logistic,
    fit_probe,
    logistic_probe,
    online_code,
    probe_effect,
    probe_sums,
    probe_table,
    stream_places,
)
from unweave.probes.coding import SHARES
from unweave.probes.effects import eraser
from unweave.probes.logistic import PENALTIES, choose_penalty
from unweave.zoo import brackets

HALF = Concept("low half", lambda batch: (batch.inputs < 16).long(), classes=2)
NUMBER = Concept("token", lambda batch: batch.inputs.double())
LAST = "before unembed"


@pytest.fixture(scope="module")
def dyck():
    graph = unweave.capture("zoo:brackets")
    return (
        graph,
        unweave.load_data("zoo:brackets", limit=192),
        unweave.load_data("zoo:brackets", limit=96, split="test"),
    )


def elevation(batch):
    return torch.where(batch.inputs != brackets.START, brackets.elevation(batch.inputs).double(), torch.nan)


ELEVATION = Concept("elevation", elevation)


def activations(graph, data, place):
    return unweave.run(graph, data.tokens.long(), data.mask, record=[place]).values[place]


# ---- fitting ----------------------------------------------------------------------------------------------


def drawn(classes=0):
    generator = torch.Generator().manual_seed(3)
    x = (
        torch.randn(40, 6, 5, generator=generator, dtype=torch.float64)
        @ torch.randn(5, 5, generator=generator).double()
    )
    said = torch.rand(40, 6, generator=generator) < 0.8
    if not classes:
        return x, (x @ torch.arange(5.0).double() + torch.randn(40, 6, generator=generator))[..., None], said
    noisy = x[..., 0] + 0.5 * torch.randn(40, 6, generator=generator)
    y = torch.bucketize(noisy, torch.tensor([-1.0, 1.0]).double())
    return x, torch.nn.functional.one_hot(y, classes).double(), said


def added(parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_a_number_is_ridge_regression(ridge):
    x, y, said = drawn()
    probe = fit_probe(added([probe_sums(x[i::3], y[i::3], said[i::3]) for i in range(3)]), 0, ridge)
    dense, target = x[said].numpy(), y[said][:, 0].numpy()
    alpha = ridge * len(dense) * np.cov(dense.T, bias=True).trace() / 5
    oracle = Ridge(alpha=alpha).fit(dense, target)
    np.testing.assert_allclose(probe.weight[0], oracle.coef_, rtol=1e-8)
    np.testing.assert_allclose(probe.predict(x[said]), oracle.predict(dense), rtol=1e-7, atol=1e-9)


def test_classes_are_linear_discriminants():
    x, y, said = drawn(3)
    probe = fit_probe(added([probe_sums(x[i::2], y[i::2], said[i::2]) for i in range(2)]), 3, 1e-10)
    dense, target = x[said].numpy(), y[said].argmax(-1).numpy()
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(dense, target)
    theirs = torch.from_numpy(oracle.predict_log_proba(dense))
    torch.testing.assert_close(probe.outputs(x[said]).log_softmax(-1), theirs, rtol=1e-5, atol=1e-5)
    assert len(probe.directions()) == 2


def test_a_class_that_never_came_is_never_said():
    x, y, said = drawn(3)
    wide = torch.nn.functional.pad(y, (0, 1))
    probe = fit_probe(probe_sums(x, wide, said), 4)
    assert int(probe.predict(x).max()) == 2
    assert len(probe.directions()) == 2
    assert bool(probe.directions().isfinite().all())


def test_sums_that_cannot_be_fitted():
    x, y, said = drawn(3)
    sums = probe_sums(x, y, said)
    with pytest.raises(InputError, match="ridge"):
        fit_probe(sums, 3, 0.0)
    with pytest.raises(ShapeError, match="3 columns"):
        fit_probe(sums, 2)
    with pytest.raises(EmptyDataError):
        fit_probe(probe_sums(x, y, said & False), 3)
    with pytest.raises(EmptyDataError):
        fit_probe(probe_sums(x, torch.ones_like(y) * torch.tensor([1.0, 0, 0]), said), 3)
    with pytest.raises(NonFiniteError):
        probe_sums(x * torch.inf, y, said)
    with pytest.raises(InputError, match="rank"):
        fit_probe(sums, 3).directions(0)


# ---- logistic probes and description length ---------------------------------------------------------------


def labelled(n=300, classes=3, noise=0.7, seed=0):
    """Activations of unequal scale away from 0, and classes that a noisy linear map of them gives."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g).double() * torch.tensor([1.0, 5.0, 0.3, 2.0]) + 3.0
    scores = (x - 3.0) @ torch.randn(4, classes, generator=g).double()
    return x, (scores + noise * torch.randn(n, classes, generator=g) * scores.std()).argmax(1)


def standardised(x):
    wide = x.double()
    z = (wide - wide.mean(0)) / (wide - wide.mean(0)).square().mean().sqrt()
    return torch.cat([z, torch.ones(len(z), 1).double()], 1)


@pytest.mark.parametrize("penalty", [0.1, 1e-3])
def test_classes_are_logistic_regression(penalty):
    x, label = labelled()
    weight, bias, _ = fit_logistic(x, label, 3, penalty)
    z = standardised(x).numpy()
    oracle = LogisticRegression(C=1 / (len(x) * penalty), fit_intercept=False, tol=1e-9, max_iter=5000).fit(z, label)
    theirs = torch.from_numpy(oracle.predict_log_proba(z))
    torch.testing.assert_close((x @ weight.T + bias).log_softmax(-1), theirs, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_the_one_of_the_best_held_out_likelihood():
    x, label = labelled(60, noise=2.0)
    losses = []
    for penalty in PENALTIES:
        weight, bias, _ = fit_logistic(x[:48], label[:48], 3, penalty)
        logs = (x[48:] @ weight.T + bias).log_softmax(-1)
        losses.append(-float(logs[torch.arange(12), label[48:]].sum()))
    assert choose_penalty(x, label, 3) == PENALTIES[int(np.argmin(losses))]
    assert choose_penalty(x[:1], label[:1], 3) == PENALTIES[0]
    probe = logistic_probe(x, label, 3)
    weight, bias, _ = fit_logistic(x, label, 3, choose_penalty(x, label, 3))
    torch.testing.assert_close(probe.outputs(x), x @ weight.T + bias)
    torch.testing.assert_close(probe.covariance, torch.from_numpy(np.cov(x.numpy().T, bias=True)))
    assert probe.label_mean.tolist() == pytest.approx([float((label == c).double().mean()) for c in range(3)])


def plain_probabilities(x, label, classes, penalty, fresh):
    """What a penalised softmax regression says of fresh rows: Newton's method on the whole Hessian."""
    wide = x.double()
    mean, scale = wide.mean(0), float((wide - wide.mean(0)).square().mean().sqrt()) or 1.0

    def rows(t):
        return torch.cat([(t.double() - mean) / scale, torch.ones(len(t), 1).double()], 1)

    def loss(flat):
        logs = (rows(x) @ flat.reshape(classes, -1).T).log_softmax(-1)
        return -logs[torch.arange(len(x)), label].mean() + penalty / 2 * flat @ flat

    flat = torch.zeros(classes * (x.shape[1] + 1), dtype=torch.float64)
    for _ in range(60):
        slope = torch.autograd.functional.jacobian(loss, flat)
        move = torch.linalg.solve(torch.autograd.functional.hessian(loss, flat), slope)
        size = 1.0
        while loss(flat - size * move) > loss(flat) and size > 1e-6:
            size /= 2
        flat = flat - size * move
    return (rows(fresh) @ flat.reshape(classes, -1).T).softmax(-1)


def test_the_online_code_is_its_definition():
    """Label by label, of 2 classes in the first pieces of which one has not come."""
    x, label = labelled(64, 2, noise=0.3, seed=2)
    label = label.sort().values[
        torch.cat([torch.arange(2), 2 + torch.randperm(62, generator=torch.Generator().manual_seed(0))])
    ]
    found = online_code(x, label, 2)
    ends = sorted({math.ceil(share * 64) for share in SHARES} | {64})
    bits = 0.0
    for j in range(64):
        sent = max((e for e in ends if e <= j), default=0)
        if not sent:
            bits += 1.0
            continue
        if j == sent:
            penalty = choose_penalty(x[:sent], label[:sent], 2)
            told = plain_probabilities(x[:sent], label[:sent], 2, penalty, x[sent:])
        bits -= math.log2(float(told[j - sent, label[j]]))
    assert found.bits == pytest.approx(bits, rel=1e-4)
    assert found.uniform_bits == 64.0
    assert found.bits_per_label == pytest.approx(bits / 64, rel=1e-4)
    assert found.compression == pytest.approx(64 / bits, rel=1e-4)
    frequent = -sum(math.log2((label == value).double().mean()) for value in label.tolist())
    assert found.frequency_bits == pytest.approx(frequent)
    assert found.saved == pytest.approx(1 - bits / frequent, rel=1e-4)
    assert math.isnan(online_code(x, torch.zeros(64, dtype=torch.long), 2).saved)


def test_labels_at_random_are_not_compressed_and_clear_ones_are():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=g)
    assert online_code(x, torch.randint(0, 4, (2000,), generator=g), 4).compression == pytest.approx(1, abs=0.05)
    assert online_code(x, (x[:, 2] > 0).long(), 2).compression > 10
    # rarer classes cost less than a uniform code, even where nothing can be read
    assert online_code(x, (torch.rand(2000, generator=g) < 0.1).long(), 2).compression == pytest.approx(2.13, abs=0.3)


def test_probes_that_cannot_be_logistic():
    x, label = labelled(20)
    with pytest.raises(InputError, match="classes"):
        fit_logistic(x, label, 1, 0.1)
    with pytest.raises(InputError, match="penalty"):
        fit_logistic(x, label, 3, 0.0)
    with pytest.raises(InputError, match="labels must be"):
        fit_logistic(x, label, 2, 0.1)
    with pytest.raises(EmptyDataError):
        online_code(x[:0], label[:0], 3)
    with pytest.raises(NonFiniteError):
        online_code(x * torch.inf, label, 3)


# ---- concepts and control tasks ---------------------------------------------------------------------------


def test_labels_that_make_no_concept(induction_data):
    batch = next(induction_data.batches(2))
    with pytest.raises(InputError, match="at least 2"):
        Concept("one", lambda b: b.inputs, classes=1)
    for concept, error in [
        (Concept("row", lambda b: b.inputs[0], classes=2), ShapeError),
        (Concept("reals", lambda b: b.inputs.double(), classes=2), InputError),
        (Concept("ids", lambda b: b.inputs), InputError),
        (Concept("many", lambda b: b.inputs, classes=2), InputError),
        (Concept("endless", lambda b: b.inputs.double() + torch.inf), InputError),
    ]:
        with pytest.raises(error, match=concept.name):
            concept.values(batch)


@pytest.mark.parametrize("by", ["token", "token at position"])
def test_a_control_task_is_one_label_for_each_type(induction_data, by):
    control = control_task(HALF, induction_data, by)
    batch = next(induction_data.batches(24))
    value, said = control.values(batch)
    assert torch.equal(said, HALF.values(batch)[1])
    kind = batch.inputs * 1000 + (torch.arange(batch.inputs.shape[1]) if by == "token at position" else 0)
    seen = {}
    for k, v in zip(kind.flatten().tolist(), value.flatten().tolist(), strict=True):
        assert seen.setdefault(k, v) == v
    share = float(HALF.values(batch)[0].double().mean())
    assert np.mean(list(seen.values())) == pytest.approx(share, abs=4 * 0.5 / math.sqrt(len(seen)))
    if by == "token at position":
        assert len({(k // 1000, v) for k, v in seen.items()}) > len({k // 1000 for k in seen})


def test_controls_that_cannot_be(induction_data):
    with pytest.raises(InputError, match="control must be"):
        control_task(HALF, induction_data, "bigram")
    with pytest.raises(InputError, match="reals"):
        control_task(HALF, unweave.load_data("zoo:two_tasks", limit=4))
    silent = Concept("silent", lambda b: torch.full_like(b.inputs, -1), classes=2)
    with pytest.raises(EmptyDataError, match="silent"):
        control_task(silent, induction_data)


# ---- tables -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_dense_matrix(dyck):
    graph, train, held = dyck
    deep = Concept(
        "depth", lambda b: torch.where(b.inputs < 2, brackets.elevation(b.inputs).clamp(0, 3), -1), classes=4
    )
    found = probe_table(graph, [ELEVATION, deep], train, held, places=[LAST], control=None, batch_size=7)
    x, said = activations(graph, held, LAST), held.tokens < 2
    truth = brackets.elevation(held.tokens.long())
    row = found.find("elevation", LAST)
    assert row.score.value == pytest.approx(r2_score(truth[said], row.probe.predict(x)[said]), abs=1e-9)
    assert row.score.low < row.score.value < row.score.high
    assert abs(row.baseline) < 0.05
    assert math.isnan(row.control)
    row = found.find("depth", LAST)
    clipped = truth.clamp(0, 3)
    right = row.probe.predict(x) == clipped
    assert row.score.value == pytest.approx(float(right[said].double().mean()))
    commonest = brackets.elevation(train.tokens.long()).clamp(0, 3)[train.tokens < 2].mode().values
    assert row.baseline == pytest.approx(float((clipped == commonest)[said].double().mean()))


def test_padding_and_batches_change_nothing(dyck):
    graph, train, held = dyck
    short = torch.where(torch.arange(17) < 11, train.tokens, 0)
    mask = (torch.arange(17) < 11).expand(len(train), -1)
    padded = from_tensor(short.long(), mask)
    cut = from_tensor(train.tokens[:, :11].long())
    both = [
        probe_table(graph, [ELEVATION], data, held, places=[LAST], control=None, batch_size=size).rows[0]
        for data, size in [(padded, 5), (cut, 192)]
    ]
    torch.testing.assert_close(both[0].probe.weight, both[1].probe.weight, rtol=1e-5, atol=1e-7)


def test_a_probe_of_tokens_is_perfect_and_so_is_its_control(induction, induction_data):
    train, held = induction_data.split(0.5)
    place = stream_places(induction)[0]
    row = probe_table(induction, [HALF], train, held, places=[place]).rows[0]
    # the tokens can be told apart, but classes of single points are not normal
    assert row.score.value > 0.9
    assert row.control > 0.9
    assert abs(row.selectivity) < 0.1


def test_brokenness_comes_with_depth_and_training(dyck):
    """Not the elevation: attention that looks everywhere alike counts brackets before any training."""
    graph, train, held = dyck
    torch.manual_seed(0)
    raw = unweave.capture(unweave.zoo.untrained("brackets"))
    broken = Concept("broken", lambda b: torch.where(b.inputs < 2, (brackets.status(b.inputs) == 0).long(), -1), 2)
    found = probe_table({0: raw, 2000: graph}, [ELEVATION, broken], train, held, control="token at position")
    first, last = stream_places(graph)[0], LAST
    assert found.find("broken", last).score.value > 0.99
    assert found.find("broken", last, 0).score.high < 0.98
    assert found.find("broken", first).score.high < 0.95
    assert found.find("elevation", last, 0).score.value > 0.7
    with pytest.raises(UnknownNameError):
        found.find("broken", last, 7)
    assert {"concept", "step", "layer", "score_low", "selectivity"} <= set(found.table()[0])


def test_gains_are_shares_of_the_errors_of_saying_the_commonest(induction, induction_data):
    train, held = induction_data.split(0.5)
    rare = Concept("rare", lambda batch: (batch.inputs < 4).long(), classes=2)
    row = probe_table(induction, [rare], train, held, places=["blocks.0.attn"]).rows[0]
    control = control_task(rare, train)
    for concept, score, gain in ((rare, row.score.value, row.gain), (control, row.control, row.control_gain)):
        values = [concept.values(next(data.batches(len(data)))) for data in (train, held)]
        (label, said), (asked, real) = values
        commonest = int(label[said].double().mean() > 0.5)
        wrong = float((asked[real] != commonest).double().mean())
        assert gain == pytest.approx(1 - (1 - score) / wrong)
    assert row.control_baseline == pytest.approx(1 - wrong)
    assert row.control_baseline != pytest.approx(row.baseline)
    (plain,) = probe_table(induction, [rare], train, held, places=["blocks.0.attn"], control=None).table()
    assert plain["gain"] == pytest.approx(row.gain)
    assert math.isnan(plain["control_gain"])
    assert math.isnan(plain["control_baseline"])


def test_labels_are_dealt_again_where_all_tokens_got_the_same():
    data = from_tensor(torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]]))
    zero = Concept("zero", lambda batch: (batch.inputs == 0).long(), classes=2)
    for seed in range(8):
        value, _ = control_task(zero, data, seed=seed).values(next(data.batches(2)))
        assert len(value.unique()) == 2
    with pytest.raises(InputError, match="the same random label"):
        control_task(Concept("one", lambda batch: torch.where(batch.inputs == 0, 0, -1), classes=2), data)


def test_tables_with_logistic_probes_and_codes(dyck):
    graph, train, held = dyck
    train = train.select(slice(0, 60))
    broken = Concept("broken", lambda b: torch.where(b.inputs < 2, (brackets.status(b.inputs) == 0).long(), -1), 2)
    options = {"places": [LAST], "method": "logistic", "code": True, "control": "token at position"}
    found = probe_table(graph, [broken, ELEVATION], train, held, **options)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = train.select(order)
    x, said = activations(graph, shuffled, LAST), shuffled.tokens < 2
    label = (brackets.status(shuffled.tokens.long()) == 0).long()
    row = found.find("broken", LAST)
    assert row.code.bits == pytest.approx(online_code(x[said], label[said], 2).bits, rel=1e-3)
    wanted = logistic_probe(x[said], label[said], 2)
    torch.testing.assert_close(row.probe.outputs(x), wanted.outputs(x), atol=1e-2, rtol=1e-2)
    assert row.score.value > 0.97
    plain = found.table()
    assert plain[0]["compression"] > plain[0]["control_compression"] > 1
    assert plain[0]["bits_per_label"] == pytest.approx(row.code.bits / int(said.sum()))
    assert math.isnan(plain[1]["compression"])  # a number has no code
    assert found.find("elevation", LAST).score.value > 0.5
    few = probe_table(graph, [broken], train, held, places=[LAST], code=True, control=None, limit=100).rows[0]
    assert 0 < few.code.n <= 100
    assert few.control_code is None


def test_sweeps_of_nothing(dyck):
    graph, train, held = dyck
    with pytest.raises(InputError, match="method"):
        probe_table(graph, [ELEVATION], train, held, method="forest")
    with pytest.raises(InputError, match="at least one graph"):
        probe_table({}, [ELEVATION], train, held)
    with pytest.raises(InputError, match="different names"):
        probe_table(graph, [ELEVATION, ELEVATION], train, held)
    with pytest.raises(UnknownNameError):
        probe_table(graph, [ELEVATION], train, held, places=["before nothing"])


# ---- causal checks ----------------------------------------------------------------------------------------


def test_an_eraser_leaves_nothing_to_read():
    x, y, said = drawn(3)
    probe = fit_probe(probe_sums(x, y, said), 3, 1e-9)
    rows, columns = x[said], y[said]
    for how in ("orthogonal", "oblique"):
        p = eraser(probe.directions(), probe.covariance, how)
        torch.testing.assert_close(p @ p, p)
        left = rows - (rows - probe.mean) @ p.T
        apart = (probe.outputs(left) - probe.outputs(probe.mean)).diff(dim=-1)
        assert float(apart.abs().max()) < 1e-6
    # only the oblique one leaves no covariance with any class, that is nothing for any linear probe
    shared = (left - left.mean(0)).T @ (columns - columns.mean(0)) / len(left)
    assert float(shared.abs().max()) < 1e-6
    with pytest.raises(InputError, match="erasure"):
        eraser(probe.directions(), probe.covariance, "sideways")


def test_effects_are_those_of_the_patched_run(dyck):
    graph, train, held = dyck
    place = "before blocks.1.attn.head.0"
    row = probe_table(graph, [ELEVATION], train, held, places=[place], control=None).rows[0]

    def right(logits, batch):
        return (logits.argmax(-1) == brackets.status(batch.inputs)).double()

    scope = unweave.Scope(positions="answered")
    options = {"erasure": "orthogonal", "draws": 2, "batch_size": 10}
    found = probe_effect(graph, row.probe, place, held, scope, behaviour=right, **options)
    w = row.probe.weight[0] / row.probe.weight[0].norm()
    x = activations(graph, held, place).double()
    patched = x - ((x - row.probe.mean) @ w)[..., None] * w
    said = held.labels["answered"]
    whole = unweave.run(graph, held.tokens.long()).logits.double().log_softmax(-1)
    out = unweave.run(graph, held.tokens.long(), patch={place: patched.float()}).logits.double().log_softmax(-1)
    kl = (whole.exp() * (whole - out)).sum(-1)
    assert found.kl_nats.value == pytest.approx(float(kl[said].mean()), rel=1e-3, abs=1e-6)
    truth = brackets.status(held.tokens.long())
    assert found.erased_behaviour.value == pytest.approx(
        float((out.argmax(-1) == truth)[said].double().mean()), abs=2e-3
    )
    assert found.behaviour.value == pytest.approx(float((whole.argmax(-1) == truth)[said].double().mean()))
    assert found.share == pytest.approx(float(w @ row.probe.covariance @ w / row.probe.covariance.trace()), rel=1e-6)
    assert found.rank == 1
    assert found.columns()["is_used"] == found.is_used


def test_what_is_read_by_nobody_is_not_used(dyck):
    """A direction in the null space of the readout."""
    graph, train, held = dyck
    place = "before unembed"
    row = probe_table(graph, [ELEVATION], train, held, places=[place], control=None).rows[0]
    unread = torch.linalg.svd(graph.stages[-1].ports[0].reads[0].map.dense().double()).Vh[-1:]
    probe = type(row.probe)(unread, row.probe.bias, 0, row.probe.mean, row.probe.covariance, row.probe.label_mean)
    found = probe_effect(graph, probe, place, held, erasure="orthogonal", draws=2)
    assert found.kl_nats.value < 1e-9
    assert not found.is_used
    assert math.isnan(found.behaviour.value)


def test_effects_that_cannot_be(dyck):
    graph, train, held = dyck
    probe = probe_table(graph, [ELEVATION], train, held, places=["blocks.0.attn"], control=None).rows[0].probe
    with pytest.raises(InputError, match="whole layer"):
        probe_effect(graph, probe, "blocks.0.attn", held)
    with pytest.raises(InputError, match="numbers per position"):
        probe_effect(graph, probe, "blocks.0.mlp.code", held)
    with pytest.raises(InputError, match="draws"):
        probe_effect(graph, probe, LAST, held, draws=0)
    with pytest.raises(ShapeError, match="behaviour"):
        probe_effect(graph, probe, LAST, held, behaviour=lambda logits, batch: logits)
    with pytest.raises(EmptyDataError):
        probe_effect(graph, probe, LAST, held, unweave.Scope(positions=lambda b: b.mask & False))
    silent = fit_probe(probe_sums(torch.ones(2, 2, 32), torch.ones(2, 2, 1), torch.ones(2, 2, dtype=torch.bool)), 0)
    with pytest.raises(InputError, match="reads nothing"):
        probe_effect(graph, silent, LAST, held)
