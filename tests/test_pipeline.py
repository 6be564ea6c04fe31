"""The account that comes with a graph: means, tails and intervals against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import unweave
from unweave.errors import EmptyDataError, InputError
from unweave.evaluation import evaluate, mean_ablated
from unweave.execution import run
from unweave.generation import generate
from unweave.scope import Scope, divergence, loss
from unweave.statistics import collect_means


def test_the_table_is_plain_arithmetic(induction, induction_data):
    means = collect_means(induction, induction_data)
    cut = induction.restrict(induction.edges[3:], means=means)
    row = evaluate({"cut": cut}, induction, induction_data, means=means, batch_size=5)["cut"]
    batch = next(induction_data.batches(len(induction_data)))
    a, b = run(induction, batch.inputs).logits, run(cut, batch.inputs).logits
    kl = divergence(Scope(), a, b, batch)
    assert row.kl_nats.value == pytest.approx(float(kl.mean()), rel=1e-5)
    assert row.kl_nats.low <= row.kl_nats.value <= row.kl_nats.high
    assert row.kl_max == pytest.approx(float(kl.max()))
    assert row.kl_p99 == pytest.approx(float(np.quantile(kl.numpy(), 0.99)), rel=0.05)
    assert row.top1_agreement.value == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    cross, real = loss(b, batch)
    assert row.loss_nats.value == pytest.approx(float(cross.sum() / real.sum()), rel=1e-5)
    floor, best = (
        loss(run(g, batch.inputs).logits, batch)[0].sum() / real.sum()
        for g in (mean_ablated(induction, means), induction)
    )
    recovered = (floor - row.loss_nats.value) / (floor - best)
    assert row.loss_recovered.value == pytest.approx(float(recovered), rel=1e-4)
    nats, sequence, pos, context, model_says, graph_says = row.worst[0]
    assert nats == pytest.approx(float(kl[sequence, pos]))
    assert context[-1] == int(batch.inputs[sequence, pos])
    assert (model_says, graph_says) == (int(a[sequence, pos].argmax()), int(b[sequence, pos].argmax()))


def test_the_original_is_no_distance_from_itself(induction, induction_data):
    row = evaluate({}, induction, induction_data, Scope("answered"))["original"]
    assert row.kl_nats.value == 0
    assert row.top1_agreement.value == 1
    with pytest.raises(EmptyDataError):
        evaluate({}, induction, induction_data, Scope(lambda b: torch.zeros_like(b.mask)))


def test_decompile_holds_out_what_it_reports(induction):
    result = unweave.decompile("zoo:induction", kl_nats=0.05, sequences=24, held_out=12, measure_top=4)
    ours, rivals = result.faithfulness["decompiled graph"], ("plain SVD", "activation-whitened SVD")
    assert ours.kl_nats.value < min(result.faithfulness[r].kl_nats.value for r in rivals)
    assert result.report["scope"]["n_sequences_held_out"] == 12
    assert int(result.scores.measured.sum()) == 4
    sizes = [size for size, _ in result.curve["unweave"]]
    assert sizes == sorted(sizes, reverse=True)
    tokens = torch.tensor([[0, 7, 3, 9, 2, 7, 3]])
    assert generate(result.graph, tokens, 2).tolist()[0][-2:] == [9, 2]


def test_decompile_refuses_nonsense(tmp_path):
    with pytest.raises(InputError, match="give data"):
        unweave.decompile(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="one budget"):
        unweave.decompile("zoo:induction", size=0.5, kl_nats=0.1)


def test_an_output_quotient_needs_less(induction, induction_data):
    """A coarser question costs fewer nats at the same size."""
    classes = unweave.Quotient.from_sets({"low": range(24)}, 48)
    fine, coarse = Scope("answered"), Scope("answered", classes)
    full, narrow = (unweave.compress(induction, induction_data, s, size=0.12) for s in (fine, coarse))
    results = evaluate({"full": full, "narrow": narrow}, induction, induction_data, coarse)
    assert (
        results["full"].kl_nats.value < evaluate({"full": full}, induction, induction_data, fine)["full"].kl_nats.value
    )
    assert np.isfinite(results["narrow"].kl_nats.value)


def test_generation_refuses_what_it_cannot_continue(induction):
    with pytest.raises(InputError, match="negative"):
        generate(induction, torch.tensor([[1]]), -1)
    mlp = unweave.capture(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    with pytest.raises(InputError, match="tokens"):
        generate(mlp, torch.tensor([[1]]), 1)
    long = generate(induction, torch.ones(1, 47, dtype=torch.long), 3, temperature=1.0)
    assert long.shape == (1, 50)
