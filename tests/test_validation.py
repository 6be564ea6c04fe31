"""The table of validation against plain arithmetic, its baselines against their definitions, and refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import unweave
from unweave.data import TokenData, from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.evaluation import evaluate, evaluate_parts, mean_ablated
from unweave.execution import run
from unweave.falsification import validate
from unweave.falsification.validation import mark_tokens
from unweave.scope import Scope, divergence, loss, position_mask

ANSWERED = Scope("answered")


@pytest.fixture(scope="module")
def graph() -> unweave.Graph:
    return unweave.capture("zoo:induction")


@pytest.fixture(scope="module")
def data() -> TokenData:
    return unweave.load_data("zoo:induction", limit=48)


@pytest.fixture(scope="module")
def small(graph, data) -> unweave.Graph:
    return unweave.compress(graph, data, size=0.4)


def scrambled(n=20, seed=1):
    """Other texts: nothing repeats."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 49, (n,), generator=g)
    return from_tensor(torch.randint(1, 48, (n, 48), generator=g), torch.arange(48) < lengths[:, None])


def test_every_row_is_plain_arithmetic(graph, data, small):
    sets = {"in": data, "out": scrambled()}
    types = {
        "low": {1, 2, 3, 4, 5, 6, 7, 8},
        "late": lambda b: (torch.arange(b.mask.shape[1]) > 30).expand(b.mask.shape),
    }
    report = validate(small, graph, sets, types=types, baselines=[], calibration=data, batch_size=7)
    means = unweave.collect_means(graph, data)
    for name, some in sets.items():
        batch = next(some.batches(len(some)))
        reference = run(graph, batch.inputs, batch.mask).logits
        kinds = {
            "all": batch.mask,
            "low": batch.mask & (batch.inputs >= 1) & (batch.inputs <= 8),
            "late": batch.mask & (torch.arange(batch.mask.shape[1]) > 30),
        }
        for kind, mask in kinds.items():
            row = report.rows[name][kind]["candidate"]
            losses = {}
            for who, other in {"small": small, "original": graph, "floor": mean_ablated(graph, means)}.items():
                cross, real = loss(run(other, batch.inputs, batch.mask).logits, batch)
                losses[who] = float(cross[real & mask].double().mean())
            logits = run(small, batch.inputs, batch.mask).logits
            kl = divergence(Scope(), reference, logits, batch)[mask]
            assert row.kl_nats.value == pytest.approx(float(kl.double().mean()), rel=1e-5)
            assert row.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
            for q, got in ((0.99, row.kl_p99), (0.999, row.kl_p999)):
                assert got == pytest.approx(float(np.quantile(kl.numpy(), q, method="inverted_cdf")), rel=0.02)
            same = (reference.argmax(-1) == logits.argmax(-1))[mask].double().mean()
            assert row.top1_agreement.value == pytest.approx(float(same))
            if losses["floor"] > losses["original"]:
                share = (losses["floor"] - losses["small"]) / (losses["floor"] - losses["original"])
                assert row.loss_recovered.value == pytest.approx(share, rel=1e-3)
            else:  # where nothing repeats the network is no better than its means
                assert name == "out"
                assert np.isnan(row.loss_recovered.value)
            assert (row.n_tokens, row.n_sequences) == (int(mask.sum()), len(some))
            assert row.kl_nats.low <= row.kl_nats.value <= row.kl_nats.high


def test_the_interval_is_that_of_resampled_sequences(graph, data, small):
    row = evaluate({"small": small}, graph, data, ANSWERED, seed=4)["small"]
    batch = next(data.batches(len(data)))
    kl = divergence(ANSWERED, *(run(g, batch.inputs).logits for g in (graph, small)), batch).sum(1).double().numpy()
    tokens = position_mask(ANSWERED, batch).sum(1).numpy()
    rng = np.random.default_rng(4)
    values = []
    for _ in range(500):
        rows = rng.integers(0, len(kl), len(kl))
        values.append(kl[rows].sum() / tokens[rows].sum())
    assert row.kl_nats[1:] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), rel=1e-5)


def test_a_part_is_what_the_scope_alone_would_give(graph, data, small):
    marks, means = mark_tokens("answered", "answered"), unweave.collect_means(graph, data)
    parts = evaluate_parts({"small": small}, graph, data, None, {"answered": marks}, means=means)
    assert parts["answered"] == evaluate({"small": small}, graph, data, ANSWERED, means=means)
    assert parts["all"] == evaluate({"small": small}, graph, data, means=means) != parts["answered"]


def test_labels_of_sequences_are_types_and_those_without_tokens_are_left_out(graph, data, small):
    first = torch.arange(len(data)) < 5
    labelled = dataclasses.replace(data, labels={**data.labels, "first": first})
    other = dataclasses.replace(scrambled(), labels={"first": torch.zeros(20, dtype=torch.bool)})
    report = validate(small, graph, {"a": labelled, "b": other}, types={"first": "first"}, baselines=[])
    assert report.rows["a"]["first"]["candidate"].n_tokens == int(data.mask[first].sum())
    assert list(report.rows["b"]) == ["all"]


def test_the_worst_tokens_come_as_texts(graph, data, small):
    report = validate(small, graph, data, baselines=[], n_worst=3)
    worst = report.worst(lambda ids: " ".join(map(str, ids)), n=2)
    batch = next(data.batches(len(data)))
    reference, logits = (run(g, batch.inputs).logits for g in (graph, small))
    kl = divergence(Scope(), reference, logits, batch)
    values, places = kl.flatten().topk(2)
    for row, value, place in zip(worst, values.tolist(), places.tolist(), strict=True):
        i, t = divmod(place, kl.shape[1])
        assert (row["sequence"], row["position"]) == (i, t)
        assert row["nats"] == pytest.approx(value, rel=1e-4)
        assert row["text"] == " ".join(map(str, batch.inputs[i, max(0, t - 24) : t + 1].tolist()))
        assert row["network"] == str(int(reference[i, t].argmax()))
        assert row["graph"] == str(int(logits[i, t].argmax()))
    with pytest.raises(UnknownNameError, match="closest: candidate"):
        report.worst(str, graph="candidat")


def test_a_circuit_is_compared_with_random_ones_of_its_size(graph, data):
    found, held = data.split(held_out=0.5)
    for ablation in ("mean", "resample"):
        circuit = unweave.find_circuit(graph, found, ANSWERED, faithfulness=0.9, ablation=ablation)
        report = validate(circuit, None, held)
        rows = report.rows["data"]["all"]
        assert [name for name in rows if name.startswith("random")] == [f"random {i}" for i in range(5)]
        assert all(report.beats("data", f"random {i}") for i in range(5))
        assert rows["candidate"].n_tokens == int(held.labels["answered"].sum())  # the circuit's own scope
        assert {row["graph"] for row in report.table()} == set(rows)
        assert rows["every channel at its mean"].loss_recovered.value == 0
        assert rows["original"].loss_recovered.value == 1


def test_published_compressors_have_the_candidates_size(graph, data, small):
    names = ["plain SVD", "magnitude", "activation SVD", "Wanda", "SparseGPT-like"]
    found, held = data.split(held_out=0.5)
    report = validate(small, graph, held, baselines=names, calibration=found)
    assert [name for name in report.rows["data"]["all"] if name in names] == names
    assert report.left_out == {}
    assert report.beats("data", "plain SVD")
    assert list(validate(small, graph, held).rows["data"]["all"]) == [
        "original",
        "candidate",
        "plain SVD",
        "magnitude",
        "every channel at its mean",
    ]
    tiny = unweave.compress(graph, found, size=0.03)
    too_small = validate(tiny, graph, held)
    assert "magnitude" in too_small.left_out


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"baselines": ["magnitud"]}, UnknownNameError, "closest: magnitude"),
        ({"baselines": ["Wanda"]}, InputError, "calibration="),
        ({"baselines": ["random"]}, InputError, "for circuits"),
        ({"types": {"x": "answerd"}}, UnknownNameError, "closest: answered"),
        ({"types": {"x": lambda b: b.inputs[:, :3] > 0}}, ShapeError, "type 'x' must mark"),
        ({"types": {"x": {99}}}, EmptyDataError, "type 'x' has no token"),
        ({"scope": Scope(lambda b: torch.zeros_like(b.mask))}, EmptyDataError, "no position"),
    ],
)
def test_unusable_requests_are_refused(graph, data, small, options, error, match):
    with pytest.raises(error, match=match):
        validate(small, graph, data, **options)


def test_candidates_without_a_network_or_of_another_are_refused(graph, data, small):
    with pytest.raises(InputError, match="original="):
        validate(small, None, data)
    with pytest.raises(InputError, match="another network"):
        validate(small, "zoo:modular_addition", data)
    with pytest.raises(InputError, match="no data set"):
        validate(small, graph, {})
    with pytest.raises(InputError, match="stores as many"):
        validate(graph, graph, data, baselines=["magnitude"])
    report = validate(graph, graph, data)
    assert report.rows["data"]["all"]["candidate"].kl_nats.value == 0
    for name in (("dat", "original"), ("data", "origina")):
        with pytest.raises(UnknownNameError):
            report.beats(*name)
