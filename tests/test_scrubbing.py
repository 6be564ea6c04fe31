"""Causal scrubbing against a recursion in plain Python, and on networks whose mechanism is known."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from families import random_model
from oracles import _code, _reads, naive_run

import unweave
from unweave.data import float_data, from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.falsification import Hypothesis, scrub
from unweave.falsification.resampling import Partners, draw_partners, group_by_key
from unweave.falsification.scrubbing import scrubbed_logits
from unweave.graph import Edge
from unweave.scope import Scope, divergence, loss
from unweave.zoo.tracr import tracr_examples, true_edges

ANSWERED = Scope("answered")
PREVIOUS, INDUCTION = "blocks.0.attn.head.0", "blocks.1.attn.head.1"


def one_batch(data):
    return next(data.batches(len(data)))


def padded(n=10, longest=4, vocabulary=6, least=2):
    lengths = torch.randint(least, longest + 1, (n,))
    lengths[:2] = longest
    return from_tensor(torch.randint(vocabulary, (n, longest)), torch.arange(longest) < lengths[:, None])


def token(offset):
    """The token so many places on; -1 past the ends."""

    def key(batch):
        shifted = batch.inputs.roll(-offset, 1)
        place = torch.arange(shifted.shape[1]) + offset
        return shifted.where((place >= 0) & (place < shifted.shape[1]), torch.tensor(-1))

    return key


def first_token(batch):
    return batch.inputs[:, 0]


def parity(batch):
    return batch.inputs % 2


# ---- partners -------------------------------------------------------------------------------------------


def test_partners_agree_are_long_enough_and_are_all_equally_likely():
    rng = np.random.default_rng(0)
    group, length = rng.integers(0, 4, 30), rng.integers(1, 4, 30)
    candidates = {
        i: [j for j in range(30) if j != i and group[i] == group[j] and length[j] >= length[i]] for i in range(30)
    }
    draws = [draw_partners(group, length, rng) for _ in range(3000)]
    for i, others in candidates.items():
        counts = np.bincount([partner[i] for partner, _ in draws], minlength=30)
        assert {bool(alone[i]) for _, alone in draws} == {not others}
        assert set(np.flatnonzero(counts)) == set(others or [i])
        expected = 3000 / max(len(others), 1)
        assert np.abs(counts[counts > 0] - expected).max() < 6 * expected**0.5 + 1e-9


def test_a_key_of_parts_is_the_same_where_all_parts_are():
    batch = one_batch(padded(12))
    group = group_by_key("node", lambda b: (first_token(b), parity(b)), batch)
    plain = [
        [(int(batch.inputs[i, 0]), int(batch.inputs[i, t]) % 2) for t in range(batch.inputs.shape[1])]
        for i in range(12)
    ]
    flat_group, flat_plain = group.flatten().tolist(), [pair for row in plain for pair in row]
    assert len(set(flat_group)) == len(set(flat_plain)) == len(set(zip(flat_group, flat_plain, strict=True)))


@pytest.mark.parametrize("key", [token(-1), first_token, lambda b: torch.zeros(len(b.mask))])
def test_partners_have_a_real_token_wherever_one_is_needed(key):
    batch = one_batch(padded(30))
    rows = Partners(batch, (0,)).of("place", "node", key)
    sequence, position = batch.mask.nonzero().T
    assert bool(batch.mask[rows[batch.mask], position].all())
    keys = key(batch)
    keys = keys[:, None].expand(batch.mask.shape) if keys.ndim == 1 else keys
    assert torch.equal(keys[rows[batch.mask], position], keys[batch.mask])
    assert bool((rows[batch.mask] != sequence).any())
    other = Partners(batch, (0,)).of("another place", "node", key)
    assert not torch.equal(rows, other)


# ---- against a recursion in plain Python ----------------------------------------------------------------


def brute_force(graph, batch, hypothesis, form, seed):
    """The scrubbed logits by the definition: one node, one sequence and one position at a time, in float64."""
    graph = graph.to(dtype=torch.float64)
    clean = naive_run(graph, batch.inputs, batch.mask)[1]
    partners, keys = Partners(batch, seed), hypothesis.keys

    def rest_of(path):
        return partners.anywhere(f"{path} <- the rest" if form == "tree" else "the rest")

    def heard(node, path, x, port):
        stage, i = graph.find(node)
        names = graph.writers[graph.visible_writers(graph.where[node][0])]
        out = []
        for t in range(batch.inputs.shape[1]):
            total = torch.zeros(port.reads[0].map.d_in, dtype=torch.float64)
            for before in graph.stages[slice(*stage.visible)]:
                total = total if before.bias is None else total + before.bias
            for w, name in enumerate(names):
                edge = str(Edge(name, node, port.name))
                subject = edge if edge in keys else name if name in keys else None
                if port.edges is not None and not port.edges[i, w]:
                    continue
                if subject is None:
                    total = total + clean[name][int(rest_of(path)[x, t]), t]
                    continue
                place = f"{path} <- {edge}" if form == "tree" else subject
                other = int(partners.of(place, subject, keys[subject])[x, t])
                total = total + written(name, place if form == "tree" else name, other)[t]
            out.append(total if port.offset is None else total + port.offset[i][min(t, port.offset.shape[1] - 1)])
        return torch.stack(out)[None]

    @functools.cache
    def code(node, path, x):
        stage, i = graph.find(node)
        reads = [r for port in stage.ports for r in _reads(stage, port, i, heard(node, path, x, port))]
        return _code(stage, i, reads, batch.inputs[x : x + 1], batch.mask[x : x + 1])[0]

    def written(node, path, x):
        stage, i = graph.find(node)
        start = sum(stage.code_widths[:i])
        return code(node, path, x) @ stage.write.dense()[:, start : start + stage.code_widths[i]].to(torch.float64).T

    root = graph.nodes[-1]
    return torch.stack([code(root, root, x) for x in range(len(batch.inputs))])


NESTED = {
    "embed": token(0),
    "pos_embed": None,
    "blocks.0.attn.head.1": first_token,
    "blocks.0.attn.head.1->blocks.1.attn.head.0.k": token(-1),
    "blocks.0.mlp": parity,
    "blocks.1.attn.head.0": lambda b: (parity(b), first_token(b) % 2),
    "blocks.0.mlp->unembed.in": None,
}


@pytest.mark.parametrize("form", ["tree", "dag"])
@pytest.mark.parametrize("cut", [False, True])
def test_scrubbing_is_the_recursion_of_its_definition(form, cut):
    graph, batch = unweave.capture(random_model("gpt2")), one_batch(padded(8, 3))
    if cut:
        keep = graph.edge_matrix & (torch.rand(graph.edge_matrix.shape) < 0.7)
        heard = [f"{name}->unembed.in" for name in NESTED if "->" not in name]
        keep |= graph.mark_edges([*heard, *(name for name in NESTED if "->" in name)])
        means = unweave.collect_means(graph, padded())
        graph = graph.restrict(keep, means=means)
    hypothesis = Hypothesis(NESTED)
    got = scrubbed_logits(graph, batch, hypothesis, form=form, seed=(5,))
    expected = brute_force(graph, batch, hypothesis, form, (5,))
    assert torch.allclose(got.double()[batch.mask], expected[batch.mask], atol=1e-5)
    clean = unweave.run(graph, batch.inputs, batch.mask).logits
    assert not torch.allclose(got[batch.mask], clean[batch.mask], atol=1e-2)


def test_paths_draw_apart_in_a_tree_and_nodes_draw_once_in_a_dag(induction, induction_data):
    batch = one_batch(from_tensor(induction_data.tokens[:8, :6]))
    hypothesis = Hypothesis(dict.fromkeys(induction.writers, parity))
    tree, dag = (scrubbed_logits(induction, batch, hypothesis, form=form) for form in ("tree", "dag"))
    assert not torch.allclose(tree, dag, atol=1e-2)
    # in a dag with keys per sequence that all agree, whoever hears a node hears the same one of its runs
    alike = Hypothesis({"embed": lambda b: torch.zeros(len(b.mask)), PREVIOUS: None})
    got = scrubbed_logits(induction, batch, alike, form="dag")
    assert torch.allclose(got, brute_force(induction, batch, alike, "dag", (0,)).float(), atol=1e-4)


def test_keeping_all_is_the_model_and_keeping_nothing_is_another_input(induction, induction_data):
    everything = scrub(induction, induction_data, Hypothesis(dict.fromkeys(induction.writers)), form="dag")
    assert everything.recovered.value == pytest.approx(1, abs=1e-6)
    nothing = scrub(induction, induction_data, Hypothesis({}), samples=3)
    assert nothing.recovered == (0, 0, 0)
    assert nothing.nats.value > 1
    assert nothing.alone == {}


def test_the_figures_are_those_of_the_logits(induction, induction_data):
    hypothesis = Hypothesis({"embed": token(0), INDUCTION: parity})
    got = scrub(induction, induction_data, hypothesis, ANSWERED, form="dag", seed=3)
    batch = next(induction_data.batches(24, shuffle_seed=3))
    model = unweave.run(induction, batch.inputs).logits
    logits = {
        "scrubbed": scrubbed_logits(induction, batch, hypothesis, form="dag", seed=(3, 0, 0)),
        "random": scrubbed_logits(induction, batch, Hypothesis({}), form="dag", seed=(3, 0, 0)),
        "original": model,
    }
    marked = batch.labels["answered"]
    losses = {name: float(loss(x, batch)[0][marked].mean()) for name, x in logits.items()}
    nats = {name: float(divergence(ANSWERED, model, x, batch)[marked].mean()) for name, x in logits.items()}
    assert got.loss_nats.value == pytest.approx(losses["scrubbed"], rel=1e-4)
    assert got.random_loss_nats.value == pytest.approx(losses["random"], rel=1e-4)
    assert got.original_loss_nats.value == pytest.approx(losses["original"], abs=1e-5)
    share = (losses["scrubbed"] - losses["random"]) / (losses["original"] - losses["random"])
    assert got.loss_recovered.value == pytest.approx(share, rel=1e-4)
    assert got.loss_recovered.low <= got.loss_recovered.value <= got.loss_recovered.high
    assert got.recovered.value == pytest.approx(1 - nats["scrubbed"] / nats["random"], rel=1e-4)
    rows = {row["what"]: row["value"] for row in got.table()}
    assert rows["loss recovered"] == got.loss_recovered.value
    assert (got.n_sequences, got.n_tokens, got.n_samples) == (24, int(marked.sum()), 1)


# ---- networks whose mechanism is known ------------------------------------------------------------------


def answer(batch):
    """The token after the earlier copy of this one, or -1."""
    x = batch.inputs
    same = (x[:, :, None] == x[:, None, :]).tril(-1)
    after = (same * torch.arange(1, x.shape[1] + 1)).amax(2)
    return torch.where(after > 0, x.gather(1, after), -1)


def induction_hypothesis(offset=-1, copies=answer, early=PREVIOUS, late=INDUCTION):
    """An early head says which token came before; a late one finds its token there and copies what stands there."""
    return Hypothesis(
        {
            "pos_embed": None,
            f"embed->{early}.v": token(0),
            f"{early}->{late}.k": token(offset),
            f"embed->{late}.q": token(0),
            f"embed->{late}.v": token(0),
            late: copies,
        }
    )


@pytest.mark.parametrize("form", ["tree", "dag"])
def test_the_known_mechanism_of_induction_recovers_all_and_its_rivals_do_not(induction, form):
    data = unweave.load_data("zoo:induction", limit=384)
    true = scrub(induction, data, induction_hypothesis(), ANSWERED, form=form)
    assert true.loss_recovered.value > 0.99
    assert true.recovered.value > 0.99
    assert max(true.alone.values()) < 0.1
    rivals = {
        "the next token": induction_hypothesis(1),
        "two back": induction_hypothesis(-2),
        "its own token": induction_hypothesis(0),
        "another early head": induction_hypothesis(early="blocks.0.attn.head.1"),
        "another late head": induction_hypothesis(late="blocks.1.attn.head.0"),
        "copies the current token": induction_hypothesis(copies=token(0)),
    }
    got = {name: scrub(induction, data, h, ANSWERED, form=form).loss_recovered for name, h in rivals.items()}
    # the current token fixes the answer no better than chance
    assert max(e.high for e in got.values()) < 0.5, got


def so_far(token_id):
    """How many of a token there are up to each position."""
    return lambda batch: ((batch.inputs == token_id) & batch.mask).cumsum(1)


def length(batch):
    return batch.mask.sum(1)


def n_smaller(batch):
    """How many real tokens, BOS aside, are smaller than the one at each position."""
    real = batch.mask & (torch.arange(batch.inputs.shape[1]) > 0)
    return ((batch.inputs[:, None, :] < batch.inputs[:, :, None]) & real[:, None, :]).sum(2)


def sorted_tokens(batch):
    """BOS, then the other tokens in order."""
    worth = batch.inputs.masked_fill(~batch.mask, 99).index_fill(1, torch.tensor([0]), -1)
    return worth.sort(1).values


def reversed_tokens(batch):
    place = batch.mask.sum(1, keepdim=True) - torch.arange(batch.inputs.shape[1])
    return batch.inputs.gather(1, place.clamp(0, batch.inputs.shape[1] - 1))


def counts(batch):
    """How often each position's token is there."""
    return ((batch.inputs[:, :, None] == batch.inputs[:, None, :]) & batch.mask[:, None]).sum(2)


H, M = "blocks.{}.attn.head.0".format, "blocks.{}.mlp".format
# what every node of the compiled programs computes
PROGRAMS = {
    "hist": {H(0): counts, M(0): counts},
    "frac_prevs": {M(0): lambda b: b.inputs == 1, H(1): so_far(1)},
    "reverse": {H(0): length, M(0): length, M(1): length, M(2): length, H(3): reversed_tokens},
    "sort_unique": {H(0): n_smaller, M(0): n_smaller, H(1): sorted_tokens},
    "pair_balance": {
        M(0): token(0),
        H(1): so_far(0),
        "blocks.1.attn.head.1": so_far(1),
        M(1): lambda b: so_far(0)(b) - so_far(1)(b),
    },
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_compiled_program_computes_recovers_all_and_its_rivals_do_not(shared, name):
    folder = shared / "models/tracr" / name
    graph, numeric = unweave.capture(folder), json.loads((folder / "config.json").read_text())["outputs"] is None
    tokens, mask, _ = tracr_examples(folder)
    data = from_tensor(tokens, mask)
    scope = Scope(lambda b: b.mask & (torch.arange(b.mask.shape[1]) > 0), divergence="gaussian" if numeric else "kl")
    program = {"embed": token(0), "pos_embed": None, **PROGRAMS[name]}

    def recovered(keys, form="tree"):
        hypothesis = Hypothesis({str(edge): keys[edge.src] for edge in true_edges(folder)})
        return scrub(graph, data, hypothesis, scope, form=form).recovered

    assert recovered(program).low > 0.99
    assert recovered(program, "dag").low > 0.99
    for node in PROGRAMS[name]:
        for wrong in (lambda b: torch.zeros(len(b.mask)), token(-1)):
            assert recovered(program | {node: wrong}).high < 0.95, node


# ---- other inputs, and what is refused ------------------------------------------------------------------


def test_networks_that_read_reals_have_a_divergence_and_no_loss():
    graph = unweave.capture(torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
    data = float_data(torch.randn(40, 3).round())
    scope = Scope(divergence="gaussian")
    writers = graph.writers
    got = scrub(graph, data, Hypothesis(dict.fromkeys(writers, lambda b: b.inputs[:, 0, 0])), scope)
    assert 0 < got.recovered.value < 1
    assert np.isnan(got.loss_recovered.value)


def test_what_was_alone_is_counted(induction):
    tokens = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 5], [0, 6, 7]])
    got = scrub(induction, from_tensor(tokens), Hypothesis({"embed": lambda b: b.inputs[:, 1]}), samples=2)
    assert got.alone == {"embed": 0.5}


@pytest.mark.parametrize(
    ("keys", "options", "error", "match"),
    [
        ({"embd": None}, {}, UnknownNameError, "closest: embed"),
        ({"unembed": None}, {}, UnknownNameError, "no writer"),
        ({"embed->blocks.0.attn.head.0.z": None}, {}, UnknownNameError, "port"),
        ({"embed->blocks.0.attn.head.0.v": None}, {}, InputError, "no edge leads from it"),
        ({"embed": None}, {"form": "graph"}, InputError, "tree, dag"),
        ({"embed": None}, {"samples": 0}, InputError, "at least one sample"),
        (
            {"embed": lambda b: b.index},
            {},
            InputError,
            "no two of the 24 sequences of a batch agree in the key of embed",
        ),
        ({"embed": lambda b: b.inputs[:, :2]}, {}, ShapeError, "the key of embed must be a tensor"),
        ({"embed": lambda b: 3}, {}, ShapeError, "got int"),
        ({"embed": None}, {"scope": Scope(lambda b: torch.zeros_like(b.mask))}, EmptyDataError, "no position"),
    ],
)
def test_hypotheses_that_cannot_be_tested_are_refused(induction, induction_data, keys, options, error, match):
    with pytest.raises(error, match=match):
        scrub(induction, induction_data, Hypothesis(keys), **options)


def test_a_key_must_be_a_function_and_edges_must_be_there(induction, induction_data):
    with pytest.raises(InputError, match="must be a function"):
        Hypothesis({"embed": 3})
    cut = induction.restrict(~induction.mark_edges(["embed->unembed.in"]), ablation="zero")
    with pytest.raises(InputError, match="no edge leads from it"):
        scrub(cut, induction_data, Hypothesis({"embed->unembed.in": None}))
    resampled = induction.restrict(~induction.mark_edges(["embed->unembed.in"]), ablation="resample")
    with pytest.raises(InputError, match="cut to means or zero"):
        scrub(resampled, induction_data, Hypothesis({}))
    with pytest.raises(InputError, match="two sequences"):
        scrub(induction, induction_data.select([0]), Hypothesis({}))


def test_a_tree_of_too_many_paths_is_refused(monkeypatch):
    monkeypatch.setattr("unweave.falsification.scrubbing.MOST_PATHS", 100)
    graph = unweave.capture(random_model("gpt2"))
    deep = Hypothesis(dict.fromkeys(graph.writers))
    data = padded()
    with pytest.raises(InputError, match=r'paths to the output; use form="dag"'):
        scrub(graph, data, deep)
    assert scrub(graph, data, deep, form="dag").recovered.value == pytest.approx(1, abs=1e-5)
