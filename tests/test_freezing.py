"""Scores with parts held, against autograd through a plain forward in float64 with ``.detach()`` on these parts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import random_model
from oracles import _code, _rotate

import unweave
from unweave.capture import capture
from unweave.data import from_tensor
from unweave.errors import InputError, UnsupportedModelError
from unweave.execution import stages
from unweave.export.attribution import Prompt, to_attribution_graph
from unweave.freezing import FROZEN, stop_gradients
from unweave.ops import Attention, LayerNorm
from unweave.paths import path_effect
from unweave.scope import Scope, divergence, fisher_cotangent, metric
from unweave.scoring import measure_edges, score_edges
from unweave.statistics import collect_means, replacement

NAMES = ["gpt2", "gpt_neox-sequential", "llama-tied-biased", "qwen3"]


def plain(graph, tokens, frozen="none", embed=None, held=None, ablate=None):
    """(logits, what is written, what is heard, values held), one node after the other.

    Parts that are frozen are detached, or taken from ``held``: the values of another run.
    """
    written, heard, kept, logits = {}, {}, {}, None
    for s, stage in enumerate(graph.stages):
        names = graph.writers[graph.visible_writers(s)]
        biases = [graph.stages[i].bias for i in range(*stage.visible) if graph.stages[i].bias is not None]
        for i, node in enumerate(stage.nodes):
            reads = []
            for port in stage.ports:
                name = f"{node}.{port.name}"
                mine = [w for w in names if port.edges is None or bool(port.edges[i, names.index(w)])]
                x = torch.zeros(*tokens.shape, port.reads[0].map.d_in, dtype=torch.float64, requires_grad=True)
                x = x + sum(written[w] for w in mine) + sum(biases)
                x = x if port.offset is None else x + port.offset[i]
                if ablate is not None and ablate[0] == name:
                    x = x - written[ablate[1]] + ablate[2]
                heard[name] = x
                reads += plain_reads(stage, port, i, x, name, frozen == "patterns and norms", held, kept)
            code = plain_code(stage, i, node, reads, tokens, frozen != "none", held, kept)
            if stage.write is None:
                logits = code
                continue
            start = sum(stage.code_widths[:i])
            y = code @ stage.write.dense()[:, start : start + stage.code_widths[i]].T.to(code)
            written[node] = embed(y).detach().requires_grad_() if embed is not None and s == 0 else y
            if s == 0 and embed is None:
                written[node] = y.detach().requires_grad_()
    return logits, written, heard, kept


def plain_reads(stage, port, i, x, name, hold_scale, held, kept):
    if port.norm is not None:
        centred = x - x.mean(-1, keepdim=True) if isinstance(port.norm, LayerNorm) else x
        inverse = (centred.pow(2).mean(-1, keepdim=True) + port.norm.eps).rsqrt()
        inverse = inverse.detach() if hold_scale else inverse
        kept[name] = inverse
        inverse = held[name] if held is not None and hold_scale else inverse
        x = centred * inverse * port.norm.gain
        x = x + port.norm.bias if getattr(port.norm, "bias", None) is not None else x
    out = []
    for read in port.reads:
        block = i // (len(stage.nodes) // len(read.widths))
        rows = slice(sum(read.widths[:block]), sum(read.widths[: block + 1]))
        a = x @ read.map.dense()[rows].T
        out.append(a if read.bias is None else a + read.bias[rows])
    return out


def plain_code(stage, i, node, reads, tokens, hold_pattern, held, kept):
    core = stage.core
    if not isinstance(core, Attention):
        return _code(stage, i, reads, tokens, torch.ones_like(tokens, dtype=torch.bool))
    q, k, v = reads
    q, k = (x if n is None else n.apply(x) for x, n in ((q, core.q_norm), (k, core.k_norm)))
    q, k = (x if core.rotary is None else _rotate(core, x) for x in (q, k))
    scores = q @ k.transpose(-1, -2) * core.scale
    pattern = scores.masked_fill(~torch.ones_like(scores[0]).bool().tril(), -math.inf).softmax(-1)
    pattern = pattern.detach() if hold_pattern else pattern
    kept[node] = pattern
    return (held[node] if held is not None and hold_pattern else pattern) @ v


def setup(name, pos=4, cut=False):
    graph = capture(random_model(name), verify=False).to(dtype=torch.float64)
    tokens = torch.randint(50, (3, pos), generator=torch.Generator().manual_seed(2))
    labels = {"correct": torch.tensor([1, 2, 3]), "wrong": torch.tensor([4, 5, 6])}
    data = from_tensor(tokens, labels=labels)
    means = {n: m.double() for n, m in collect_means(graph, data).items()}
    if cut:
        keep = torch.rand(graph.possible_edges.shape, generator=torch.Generator().manual_seed(1)) < 0.8
        graph = graph.restrict(keep, means=means)
    return graph, data, means, next(data.batches(3))


def products(graph, written, heard, means, value, cotangent=None):
    """sum over positions of g_j . (y_i - m_i), edge by edge."""
    grads = torch.autograd.grad(value, list(heard.values()), cotangent, retain_graph=True, allow_unused=True)
    grads = dict(zip(heard, grads, strict=True))
    out = torch.zeros(3, *graph.edge_matrix.shape, dtype=torch.float64)
    for j, i in graph.edge_matrix.nonzero().tolist():
        g, w = grads[graph.ports[j]], graph.writers[i]
        if g is not None:
            out[:, j, i] = (g * (written[w].detach() - means[w])).sum((1, 2))
    return out


def same(got, truth, graph):
    edges = graph.edge_matrix
    return torch.allclose(got[edges].double(), truth[edges], rtol=1e-3, atol=1e-4 * float(truth[edges].abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", FROZEN)
def test_fisher_scores_are_those_of_a_detached_forward(name, frozen):
    graph, data, means, batch = setup(name, cut=name == "llama-tied-biased")
    got = score_edges(graph, data, frozen=frozen, means=means, samples=2, seed=5)
    logits, written, heard, _ = plain(graph, batch.inputs, frozen)
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    total = 0
    for _ in range(2):
        cotangent = fisher_cotangent(Scope(), logits.detach(), batch, generator)
        total = total + 0.5 * products(graph, written, heard, means, logits, cotangent).square().sum(0) / 2
    assert same(got.nats, total / batch.mask.sum(), graph)
    assert got.frozen == frozen
    assert f"frozen: {frozen})" in repr(got)
    assert {row["frozen"] for row in got.table(3)} == {frozen}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("kind", ["kl", "logit_difference"])
def test_gradient_scores_are_those_of_a_detached_forward(method, frozen, kind):
    graph, data, means, batch = setup("gpt2", pos=5)
    scope = Scope("last" if kind == "logit_difference" else "all", divergence=kind)
    got = score_edges(graph, data, scope, method=method, frozen=frozen, means=means, steps=2)
    clean, written, _, _ = plain(graph, batch.inputs)
    mean, total = means[graph.writers[0]], 0
    shares = [0.5, 1.0] if method == "eap-ig" else [float(kind == "logit_difference")]
    for share in shares:
        logits, _, heard, _ = plain(graph, batch.inputs, frozen, lambda y, a=share: mean + a * (y - mean))
        value = metric(scope, logits, batch) if kind != "kl" else -divergence(scope, clean.detach(), logits, batch)
        total = total + products(graph, written, heard, means, value.sum()).sum(0) / len(shares)
    tokens = 3 if kind == "logit_difference" else 15
    assert same(got.nats, total / tokens, graph)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("frozen", ["patterns", "patterns and norms"])
def test_effects_keep_the_values_of_the_clean_run(name, cut, frozen):
    graph, data, means, batch = setup(name, cut=cut)
    exact = score_edges(graph, data, method="exact", frozen=frozen, means=means)
    assert exact.frozen == frozen
    clean, _, _, kept = plain(graph, batch.inputs)
    held = {key: value.detach() for key, value in kept.items()}
    pairs = graph.edge_matrix.nonzero()
    for j, i in pairs[torch.randperm(len(pairs))[:20]].tolist():
        ablate = (graph.ports[j], graph.writers[i], means[graph.writers[i]])
        logits, *_ = plain(graph, batch.inputs, frozen, held=held, ablate=ablate)
        truth = float(divergence(Scope(), clean, logits, batch).mean().detach())
        assert math.isclose(float(exact.nats[j, i]), truth, rel_tol=1e-3, abs_tol=1e-9)
    (edge,) = graph.name_edges(torch.zeros_like(graph.edge_matrix).index_put(tuple(pairs[-1]), torch.tensor(True)))
    again = path_effect(graph, data, [edge], means, frozen=frozen).nats
    assert math.isclose(again, float(exact.nats[tuple(pairs[-1])]), rel_tol=1e-3, abs_tol=1e-9)


@pytest.mark.parametrize("method", ["fisher", "eap", "eap-ig", "exact"])
def test_what_only_moves_patterns_is_worth_nothing_when_they_are_frozen(induction, induction_data, method):
    data, scope = induction_data.select(slice(0, 8)), Scope("answered")
    options = {"method": method, "measure_top": 5} if method == "fisher" else {"method": method}
    free, held = (score_edges(induction, data, scope, frozen=f, **options) for f in ("none", "patterns"))
    looks = torch.tensor([port.endswith((".q", ".k")) for port in induction.ports])[:, None] & induction.edge_matrix
    assert float(held.nats[looks].abs().max()) < 1e-9
    # the key of the induction head hears the head before: the circuit's heart, which patterns hide
    ((j, i),) = induction.mark_edges(["blocks.0.attn.head.0->blocks.1.attn.head.1.k"]).nonzero().tolist()
    assert abs(float(free.nats[j, i])) > 1e-2
    if method == "fisher":
        assert int(held.measured.sum()) == 5
        assert not held.measured[looks].any()


def test_holding_changes_no_value_and_costs_no_pass(monkeypatch):
    graph, data, means, batch = setup("llama-tied-biased")
    counts, stage_of = {}, stages._run_stage
    for frozen in FROZEN:
        held = stop_gradients(graph, frozen)
        assert torch.allclose(
            unweave.run(held, batch.inputs).logits, unweave.run(graph, batch.inputs).logits, atol=1e-12
        )
        for method in ("fisher", "eap-ig"):
            ran = []
            monkeypatch.setattr(stages, "_run_stage", lambda t, s, h, ran=ran: (ran.append(s), stage_of(t, s, h))[1])
            score_edges(graph, data, method=method, frozen=frozen, means=means)
            counts.setdefault(method, set()).add(len(ran))
    assert all(len(numbers) == 1 for numbers in counts.values())


def test_circuits_carry_what_was_held_and_their_error_is_measured(induction, induction_data):
    data, scope = induction_data.select(slice(0, 6)), Scope("answered")
    options = {"faithfulness": 0.9, "max_trials": 25}
    found = unweave.find_circuit(induction, data, scope, method="fisher", frozen="patterns", **options)
    assert found.scores.frozen == "patterns"
    truth = unweave.evaluate({"circuit": found.graph}, induction, data, scope)["circuit"].kl_nats.value
    assert math.isclose(found.nats, truth, rel_tol=1e-3)
    assert found.faithfulness >= 0.9
    again = unweave.find_circuit(induction, data, scope, scores=found.scores, **options)
    assert torch.equal(again.kept, found.kept)
    with pytest.raises(InputError, match="does not fit the scores given"):
        unweave.find_circuit(induction, data, scope, scores=found.scores, frozen="patterns and norms", **options)


def test_attribution_graphs_say_what_was_held(induction, induction_data, tmp_path):
    scores = score_edges(induction, induction_data.select(slice(0, 4)), frozen="patterns")
    file = to_attribution_graph(induction, tmp_path / "a.json", scores, description="all of it")
    said = json.loads(file.read_text())["metadata"]["info"]["description"]
    assert said == "all of it; method: fisher; frozen: patterns"
    prompt = Prompt(["a"], scores.nats[None], frozen="patterns and norms")
    file = to_attribution_graph(induction, tmp_path / "b.json", prompt)
    assert json.loads(file.read_text())["metadata"]["info"]["description"] == "frozen: patterns and norms"


def test_words_that_say_nothing_and_norms_that_cannot_be_held_are_refused(induction, induction_data):
    with pytest.raises(InputError, match="frozen must be"):
        score_edges(induction, induction_data, frozen="norms")
    with pytest.raises(InputError, match="frozen must be"):
        unweave.find_circuit(induction, induction_data, kl_nats=0.1, frozen="all")
    instead, _ = replacement(induction, induction_data, "zero")
    with pytest.raises(InputError, match="frozen must be"):
        measure_edges(induction, induction_data, Scope(), induction.edge_matrix, instead, frozen="everything")
    gemma = capture(random_model("gemma2"), verify=False)
    data = from_tensor(torch.randint(50, (2, 5)))
    with pytest.raises(UnsupportedModelError, match="another norm"):
        score_edges(gemma, data, frozen="patterns and norms")
    held = score_edges(gemma, data, frozen="patterns")
    looks = torch.tensor([port.endswith((".q", ".k")) for port in gemma.ports])
    assert float(held.nats[looks].nan_to_num().abs().max()) == 0 < float(held.nats[~looks].nan_to_num().abs().max())
