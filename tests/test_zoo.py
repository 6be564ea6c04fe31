"""The zoo: models whose mechanism is known, and the mechanism found in their graphs."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

import unweave
from unweave import zoo
from unweave.errors import CorruptFileError, InputError, NonFiniteError, UnknownNameError
from unweave.execution import run
from unweave.statistics import collect_means
from unweave.zoo import induction as room
from unweave.zoo import modular_addition as modular
from unweave.zoo.toy import ToyConfig, ToyTransformer
from unweave.zoo.tracr import load_tracr, tracr_examples, true_edges

TRACR = ["frac_prevs", "hist", "pair_balance", "reverse", "sort_unique"]


def accuracy(graph, tokens, repeated):
    logits = run(graph, tokens).logits[:, :-1]
    return float((logits.argmax(-1) == tokens[:, 1:])[repeated[:, :-1]].float().mean())


def test_the_induction_circuit_is_in_the_graph(induction):
    tokens, repeated = room.data(64, seed=5)
    assert accuracy(induction, tokens, repeated) > 0.97
    heads = [n for n in induction.nodes if ".attn." in n]
    patterns = run(induction, tokens, record=[h + ".pattern" for h in heads]).values
    n = tokens.shape[1]
    before = torch.arange(n - 1)
    to_previous = {h: float(patterns[h + ".pattern"][:, before + 1, before].mean()) for h in heads}
    assert max(to_previous, key=to_previous.get).startswith("blocks.0.")
    assert max(to_previous.values()) > 0.85
    # an induction head attends from the second copy of a token to what came after the first
    same = (tokens[:, :, None] == tokens[:, None, :]) & (torch.arange(n)[:, None] > torch.arange(n))
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    for h in heads:
        if h.startswith("blocks.1."):
            assert float((patterns[h + ".pattern"] * after).sum(-1)[repeated].mean()) > 0.9


def test_the_first_layer_reaches_the_induction_heads_through_their_keys(induction):
    tokens, repeated = room.data(64, seed=5)
    means = collect_means(induction, unweave.load_data("zoo:induction", limit=64))

    def without(port):
        cut = [
            e
            for e in induction.edges
            if e.src.startswith("blocks.0") and e.dst.startswith("blocks.1") and e.port == port
        ]
        assert len(cut) == 4
        return accuracy(induction.restrict([e for e in induction.edges if e not in cut], means=means), tokens, repeated)

    assert without("k") < 0.3
    assert without("v") > 0.95
    assert without("q") > 0.8


@pytest.fixture(scope="module")
def addition():
    return unweave.capture("zoo:modular_addition")


def test_modular_addition_is_solved(addition):
    tokens, answers = modular.all_pairs()
    logits = run(addition, tokens).logits[:, -1]
    assert float((logits.argmax(-1) == answers).float().mean()) >= 0.999


def test_a_few_frequencies_carry_modular_addition(addition):
    """Found from the graph's own tensors: the embedding it reads, and the logits it gives."""
    table = addition.stages[0].core.table[: modular.MODULUS]
    power = modular.fourier_power(table)
    key = (power > 4 / len(power)).nonzero()[:, 0] + 1
    assert 2 <= len(key) <= 10
    assert float(power[key - 1].sum()) > 0.6
    # the share of the logits' variance in cos and sin of w (a + b - c)
    tokens, _ = modular.all_pairs()
    logits = run(addition, tokens).logits[:, -1].double()
    logits = logits - logits.mean(1, keepdim=True)
    c = torch.arange(modular.MODULUS)
    phase = (tokens[:, :1] + tokens[:, 1:2] - c) * (2 * math.pi / modular.MODULUS)
    explained = torch.zeros_like(logits)
    for k in key.tolist():
        wave = torch.cos(k * phase.double())
        wave = wave / wave.norm()
        explained += wave * (wave * logits).sum()
    assert float(1 - (logits - explained).square().sum() / logits.square().sum()) > 0.7


@pytest.mark.parametrize("name", TRACR)
def test_compiled_models_compute_their_program(shared, name):
    folder = shared / "models" / "tracr" / name
    tokens, mask, outputs = tracr_examples(folder)
    graph = unweave.capture(folder)
    assert len(tokens) == 256
    logits = run(graph, tokens, mask).logits
    known = ~outputs.isnan()
    got = logits[..., 0] if logits.shape[-1] == 1 else logits.argmax(-1).float()
    assert torch.allclose(got[known], outputs[known], atol=1e-3)
    possible = graph.mark_edges(true_edges(folder))
    assert possible.sum() == len(set(true_edges(folder)))


def test_cutting_what_the_compiler_did_not_connect_changes_nothing(shared):
    for name in TRACR:
        folder = shared / "models" / "tracr" / name
        tokens, mask, _ = tracr_examples(folder)
        graph = unweave.capture(folder)
        true = graph.restrict(true_edges(folder), ablation="zero")
        whole, circuit = run(graph, tokens, mask).logits, run(true, tokens, mask).logits
        assert torch.allclose(whole[mask], circuit[mask], atol=1e-3), name


def test_toys_are_saved_whole_and_refused_when_broken(tmp_path):
    config = ToyConfig(1, 2, 8, 4, 6, 10, 10, 5)
    model = ToyTransformer(config)
    model.save(tmp_path / "a")
    back = ToyTransformer.load(tmp_path / "a")
    x = torch.randint(10, (2, 5))
    assert torch.equal(back(x), model(x))
    assert unweave.capture(tmp_path / "a").info["d_model"] == 8
    with torch.no_grad():
        model.W_E[0, 0] = torch.nan
    model.save(tmp_path / "b")
    with pytest.raises(NonFiniteError, match="W_E"):
        ToyTransformer.load(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    text = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(text | {"d_model": 9}))
    with pytest.raises(CorruptFileError, match="do not fit"):
        ToyTransformer.load(tmp_path / "c")
    with pytest.raises(InputError, match="positive integers"):
        ToyConfig(0, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(UnknownNameError, match="induction"):
        zoo.load("inductoin")


def test_a_broken_compiled_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"residual_labels": [], "true_edges": []}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError):
        load_tracr(tmp_path)


@pytest.mark.parametrize("name", sorted(zoo.ROOMS))
def test_rooms_can_be_trained(name):
    losses = [loss for _, loss, _ in zoo.room(name).train(0, 200)]
    assert losses[-1] < losses[0] + 5
    assert len(losses) == 2
