"""Scores against what they estimate: effects measured one by one, and the second order by brute force."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from families import random_model
from scipy.stats import spearmanr

import unweave
from unweave import tree
from unweave.capture import capture
from unweave.data import Batch, from_tensor
from unweave.errors import EmptyDataError, InputError, NonFiniteError
from unweave.execution import run
from unweave.scope import Quotient, Scope, divergence
from unweave.scoring import score_edges
from unweave.statistics import accumulate, collect_means, identify

pytestmark = pytest.mark.filterwarnings("ignore")


def setup(name="llama-tied-biased", n=6, pos=7):
    graph = capture(random_model(name), verify=False)
    data = from_tensor(torch.randint(50, (n, pos), generator=torch.Generator().manual_seed(2)))
    return graph, data, collect_means(graph, data)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("cut", [False, True])
def test_measured_effects_are_those_of_cutting_each_edge(name, cut):
    graph, data, means = setup(name)
    if cut:
        keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.7)
        graph = graph.restrict(keep, means=means)
    exact = score_edges(graph, data, method="exact", means=means, batch_size=4)
    batch = next(data.batches(6))
    reference = run(graph, batch.inputs).logits
    pairs = graph.edge_matrix.nonzero()
    for j, i in pairs[torch.randperm(len(pairs))[:12]]:
        keep = graph.edge_matrix.clone()
        keep[j, i] = False
        logits = run(graph.restrict(keep, means=means), batch.inputs).logits
        truth = divergence(Scope(), reference, logits, batch).mean()
        assert math.isclose(float(exact.nats[j, i]), float(truth), rel_tol=2e-2, abs_tol=2e-6)
    assert exact.measured[graph.edge_matrix].all()
    assert exact.nats[~graph.edge_matrix].isnan().all()


def test_fisher_is_the_second_order_of_the_kl():
    """With small steps away from each writer the KL is its second-order term: compare with that, exactly."""
    graph, data, means = setup(n=3, pos=5)
    near = {}
    for node in graph.writers:
        values = run(graph, next(data.batches(3)).inputs, record=[node]).values[node]
        near[node] = values.mean((0, 1))[None]
    scores = score_edges(graph, data, means=near, samples=400)
    batch = next(data.batches(3))
    wide = graph.to(dtype=torch.float64)
    reference = run(wide, batch.inputs).logits
    step = 1e-3
    pairs = graph.edge_matrix.nonzero()
    estimated, truth = [], []
    for j, i in pairs[torch.randperm(len(pairs))[:25]]:
        node, port = graph.writers[i], graph.ports[j]
        edge = f"{node}->{port}"
        logits = run(wide, batch.inputs, patch={edge: lambda y, m=near[node]: y + step * (m.double() - y)}).logits
        truth.append(float(divergence(Scope(), reference, logits, batch).mean()) / step**2)
        estimated.append(float(scores.nats[j, i]))
    logs = torch.tensor(estimated).log() - torch.tensor(truth).log()
    assert logs.abs().median() < 0.15
    assert spearmanr(estimated, truth)[0] > 0.97


def test_more_samples_and_calibration_help_on_a_real_model(shared):
    graph = unweave.capture(shared / "models" / "stories260K")
    tokenizer = unweave.load_tokenizer(shared / "models" / "stories260K")
    data = unweave.load_data(shared / "data" / "stories260K.jsonl", tokenizer, context=32, limit=8)
    scores = score_edges(graph, data, samples=2, measure_top=20, batch_size=8)
    assert int(scores.measured.sum()) == 20
    exact = score_edges(graph, data.select(slice(0, 8)), method="exact", means=None, batch_size=8)
    edges = graph.edge_matrix
    assert spearmanr(scores.nats[edges], exact.nats[edges])[0] > 0.93
    top = scores.top(10) & scores.measured
    assert torch.allclose(scores.nats[top], exact.nats[top], rtol=1e-3)


@pytest.mark.parametrize("method", ["fisher", "eap", "eap-ig"])
def test_attributions_do_not_depend_on_batching(method):
    graph, data, means = setup()
    if method == "fisher":  # random cotangents differ between batchings, their mean must not
        a, b = (score_edges(graph, data, means=means, samples=300, batch_size=size) for size in (2, 6))
        edges = graph.edge_matrix
        assert (a.nats[edges].log() - b.nats[edges].log()).abs().median() < 0.15
    else:
        a, b = (score_edges(graph, data, method=method, means=means, batch_size=size) for size in (2, 6))
        assert torch.allclose(a.nats, b.nats, rtol=1e-4, atol=1e-7, equal_nan=True)


def test_eap_ig_in_the_limit_sums_to_the_change_of_a_linear_metric():
    """For the logit difference of a network cut down to its direct path, attribution is exact: it is linear but for the norm."""
    graph = unweave.capture("zoo:induction")
    data = unweave.load_data("zoo:induction", limit=6)
    n = len(data)
    data = from_tensor(data.tokens.long(), labels={"correct": torch.arange(n) + 1, "wrong": torch.arange(n) + 9})
    direct = graph.restrict(["embed->unembed.in", "pos_embed->unembed.in"], ablation="zero")
    scope = Scope("last", divergence="logit_difference")
    means = collect_means(direct, data)
    scores = score_edges(direct, data, scope, method="eap", means=means)
    from unweave.scope import metric

    batch = next(data.batches(n))
    full = metric(scope, run(direct, batch.inputs).logits, batch)
    for edge in direct.edges:
        cut = direct.restrict([e for e in direct.edges if e != edge], means=means)
        change = (full - metric(scope, run(cut, batch.inputs).logits, batch)).mean()
        j, i = direct.mark_edges([edge]).nonzero()[0]
        assert math.isclose(float(scores.nats[j, i]), float(change), rel_tol=1e-4, abs_tol=1e-5)


def test_nonsense_is_refused(induction, induction_data):
    with pytest.raises(InputError, match="unknown method"):
        score_edges(induction, induction_data, method="magic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        score_edges(induction, induction_data, samples=0)
    empty = Scope(lambda b: torch.zeros_like(b.mask))
    with pytest.raises(EmptyDataError, match="no position"):
        score_edges(induction, induction_data, empty)
    # a copy: the graph is shared by all tests
    broken = dataclasses.replace(induction, stages=tree.map_tensors(induction.stages, torch.clone))
    broken.stages[3].write.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.attn"):
        score_edges(broken, induction_data)


def test_a_killed_pass_resumes_where_it_stopped(induction_data, tmp_path, monkeypatch):
    import unweave.statistics as module

    monkeypatch.setattr(module, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    path, seen = tmp_path / "sums.safetensors", []

    def step(batch: Batch, die_at: int | None = None):
        if die_at is not None and int(batch.index[0]) >= die_at:
            raise KeyboardInterrupt
        seen.append(int(batch.index[0]))
        return {"sum": batch.inputs.sum().double()}

    whole = accumulate(induction_data, step, batch_size=4)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        accumulate(induction_data, lambda b: step(b, 12), batch_size=4, checkpoint=path, identity=("x",))
    assert path.exists()
    with pytest.raises(InputError, match="another pass"):
        accumulate(induction_data, step, batch_size=4, checkpoint=path, identity=("y",))
    resumed = accumulate(induction_data, step, batch_size=4, checkpoint=path, identity=("x",))
    assert resumed["sum"] == whole["sum"]
    assert seen == [0, 4, 8, 12, 16, 20]
    assert not path.exists()


def test_a_checkpoint_belongs_to_graph_scope_and_data(induction, induction_data):
    base = identify(induction_data, induction, Scope())
    assert base == identify(induction_data, induction, Scope())
    ids = torch.arange(48)
    halves, thirds = (Quotient(ids * n // 48, tuple("abc"[:n])) for n in (2, 3))
    swapped = Quotient(1 - halves.classes, ("a", "b"))
    first, last = (lambda b: b.mask.cumsum(1) == 1), (lambda b: b.mask.cumsum(1) == 3)
    scopes = [Scope(quotient=q) for q in (halves, thirds, swapped)] + [
        Scope(positions=p) for p in (first, last, "last")
    ]
    cut = induction.restrict(list(induction.edges)[1:], ablation="zero")
    doubled = induction.to(dtype=torch.float64)
    seen = [identify(induction_data, induction, scope) for scope in scopes]
    seen += [identify(induction_data, g, Scope()) for g in (cut, cut.restrict(list(cut.edges)[1:], ablation="zero"))]
    seen += [identify(induction_data.select(slice(0, 4)), induction, Scope()), base]
    assert len(set(seen)) == len(seen)
    assert identify(induction_data, doubled, Scope())  # any precision
