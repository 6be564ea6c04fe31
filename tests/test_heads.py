"""Detectors against loops over sequences, heads, queries and keys; heads of known models; heads that do nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from families import random_model

import unweave
from unweave.capture import capture
from unweave.data import from_tensor
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import run
from unweave.heads import DETECTORS, View, score_heads
from unweave.heads.scores import holm
from unweave.paths import ov_circuit
from unweave.zoo import ToyConfig, ToyTransformer
from unweave.zoo.induction import CONFIG
from unweave.zoo.tracr import tracr_examples

B, H, T, V, R = 3, 2, 6, 5, 2


def random_view(seed=0, causal=True):
    g = torch.Generator().manual_seed(seed)
    real = torch.arange(T) < torch.tensor([[6], [4], [5]])
    seen = torch.ones(T, T, dtype=torch.bool)
    visible = (seen.tril() if causal else seen) & real[:, :, None] & real[:, None]
    scores = torch.randn(B, H, T, T, generator=g).masked_fill(
        ~(visible | torch.eye(T, dtype=torch.bool))[:, None], -1e9
    )
    pos = torch.arange(T)
    others_real = torch.arange(T) < torch.tensor([[[5], [6], [6]], [[6], [3], [6]]])
    return View(
        pattern=scores.softmax(-1),
        tokens=torch.randint(V, (B, T), generator=g),
        visible=visible,
        distance=pos[:, None] - pos,
        others=torch.randint(V, (R, B, T), generator=g),
        others_real=others_real,
        delimiters=torch.tensor([True, False, True, False, False]),
        lowered=torch.rand(H, V, generator=g) < 0.6,
        predicted=torch.randint(V, (B, T), generator=g),
        profile=torch.rand(H, 2 * 8 - 1, generator=g),
    )


# which keys s a query t should look at, in the plainest words
PLACES = {
    "previous-token": lambda v, b, h, x, t, s: s == t - 1,
    "duplicate-token": lambda v, b, h, x, t, s: s != t and x[s] == x[t],
    "induction": lambda v, b, h, x, t, s: 0 < s <= t and x[s - 1] == x[t],
    "copy-suppression": lambda v, b, h, x, t, s: x[s] == v.predicted[b, t] and bool(v.lowered[h, x[s]]),
    "delimiter": lambda v, b, h, x, t, s: bool(v.delimiters[x[s]]),
}


def brute_force(view, place, b, h, tokens, real):
    """(mass, queries, mass of even attention) of one head on one sequence."""
    mass, queries, even = 0.0, 0, 0.0
    for t in range(T):
        seen = [s for s in range(T) if view.visible[b, t, s]]
        keys = [s for s in seen if real[t] and real[s] and place(view, b, h, tokens, t, s)]
        mass += sum(float(view.pattern[b, h, t, s]) for s in keys)
        even += len(keys) / len(seen) if keys else 0.0
        queries += bool(keys)
    return mass, queries, even


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_detectors_are_sums_over_the_keys_they_name(name, causal):
    view, place = random_view(1, causal), PLACES[name]
    got = DETECTORS[name].measure(view)
    always = torch.ones(T, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            mass, queries, even = brute_force(view, place, b, h, view.tokens[b].tolist(), always)
            if DETECTORS[name].null == "uniform":
                null = (even, queries)
            else:
                parts = [
                    brute_force(view, place, b, h, view.others[r, b].tolist(), view.others_real[r, b]) for r in range(R)
                ]
                null = (sum(m for m, _, _ in parts), sum(q for _, q, _ in parts))
            expected = torch.tensor([mass, queries, *null])
            assert torch.allclose(torch.stack([x[b, h] for x in got]), expected.float(), atol=1e-5)


def test_every_detector_has_its_oracle():
    assert set(DETECTORS) == {*PLACES, "positional"}


def test_positional_is_the_share_explained_by_distance():
    view = random_view(2)
    got = DETECTORS["positional"].measure(view)
    for b in range(B):
        for h in range(H):
            total = left = 0.0
            for t in range(T):
                seen = [s for s in range(T) if view.visible[b, t, s]]
                whole = sum(float(view.profile[h, 7 + t - s]) for s in seen)
                for s in seen:
                    a = float(view.pattern[b, h, t, s])
                    total += (a - 1 / len(seen)) ** 2
                    left += (a - float(view.profile[h, 7 + t - s]) / whole) ** 2
            assert math.isclose(float(got.mass[b, h]), total - left, rel_tol=1e-4)
            assert math.isclose(float(got.queries[b, h]), total, rel_tol=1e-4)
    assert not got.null_mass.any()


def test_what_distance_alone_explains_and_what_is_even():
    """A pattern made of distances is explained whole; one that is nearly even is not counted."""
    view = random_view(3)
    weight = torch.tensor([1.0, 5.0, 2.0, 0.5, 0.1, 3.0])[view.distance.clamp(min=0)] * view.visible[:, None]
    pattern = (weight / weight.sum(-1, keepdim=True).clamp(min=1e-9)).expand(-1, H, -1, -1)
    profile = torch.cat([torch.zeros(7), torch.tensor([1.0, 5.0, 2.0, 0.5, 0.1, 3.0, 0, 0])]).expand(H, -1)
    got = DETECTORS["positional"].measure(dataclasses.replace(view, pattern=pattern, profile=profile))
    assert torch.allclose(got.mass, got.queries, atol=1e-5)
    assert (got.queries > 0.1).all()
    even = view.visible / view.visible.sum(-1, keepdim=True).clamp(min=1)
    near = 0.97 * even[:, None] + 0.03 * pattern
    got = DETECTORS["positional"].measure(dataclasses.replace(view, pattern=near, profile=profile))
    assert not got.queries.any()


def padded_data(n=10, pos=7, vocabulary=50):
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, pos + 1, (n, 1), generator=g)
    return from_tensor(torch.randint(vocabulary, (n, pos), generator=g) // 5, mask=torch.arange(pos) < lengths)


@pytest.mark.parametrize("name", ["mistral-window", "gemma2"])
def test_scores_of_a_padded_data_set(name):
    """The whole pass against one sequence at a time: score, null, z, for masks, windows, caps and grouped keys."""
    graph, data = capture(random_model(name), verify=False), padded_data()
    names = ["previous-token", "duplicate-token"]
    got = score_heads(graph, data, names, shuffles=3, batch_size=4, seed=5)
    shifts = (torch.randperm(9, generator=torch.Generator().manual_seed(5))[:3] + 1).tolist()
    rows = {name: torch.zeros(10, 8, 4, dtype=torch.float64) for name in names}
    for b in range(10):
        n = int(data.lengths[b])
        tokens = data.tokens[b, :n].long()
        patterns = run(graph, tokens[None], record=[h + ".pattern" for h in got.heads]).values
        for h, head in enumerate(got.heads):
            a = patterns[head + ".pattern"][0]
            window = graph.find(head)[0].core.window or 99
            for t in range(1, n):
                seen = [s for s in range(t + 1) if t - s < window]
                rows["previous-token"][b, h] += torch.tensor([float(a[t, t - 1]), 1, 1 / len(seen), 1])
            for k, shift in enumerate([0, *shifts]):
                other = data.tokens[(b + shift) % 10]
                for t in range(min(n, int(data.lengths[(b + shift) % 10]))):
                    keys = [s for s in range(t) if t - s < window and other[s] == other[t]]
                    put = torch.tensor([float(a[t, keys].sum()), float(bool(keys))], dtype=torch.float64)
                    rows["duplicate-token"][b, h, slice(0, 2) if k == 0 else slice(2, 4)] += put
    for d, name in enumerate(names):
        m, q, m0, q0 = rows[name].unbind(-1)
        score, null = m.sum(0) / q.sum(0), m0.sum(0) / q0.sum(0)
        e, e0 = (m - score * q) / q.sum(0), (m0 - null * q0) / q0.sum(0)
        z = (score - null) / ((e - e0).square().sum(0) * 10 / 9).sqrt()
        assert torch.allclose(got.score[d].double(), score, atol=1e-5)
        assert torch.allclose(got.null[d].double(), null, atol=1e-5)
        assert torch.allclose(got.null_sd[d].double(), (e0.square().sum(0) * 10 / 9).sqrt(), rtol=1e-3, atol=1e-6)
        assert torch.allclose(got.z[d].double(), z, rtol=1e-2)
    assert got.n_tokens == int(data.mask.sum())


def test_the_profile_and_what_copy_suppression_looks_at(monkeypatch):
    """What the pass hands to detectors: logit lens, lowered tokens, mean attention by distance."""
    graph, data = capture(random_model("gpt2"), verify=False), padded_data()
    views = []
    measure = DETECTORS["copy-suppression"].measure
    spy = lambda view: views.append(view) or measure(view)  # noqa: E731
    monkeypatch.setitem(DETECTORS, "copy-suppression", type(DETECTORS["induction"])(spy, 0.3, "other tokens", ""))
    got = score_heads(graph, data, ["copy-suppression", "positional"], batch_size=10)
    batch = next(data.batches(10))
    out = run(graph, batch.inputs, batch.mask, record=["blocks.1.attn.head.0.q", "blocks.1.attn.head.2.pattern"])
    last = graph.stages[-1].ports[0]
    lens = last.norm.apply(out.values["blocks.1.attn.head.0.q"]) @ last.reads[0].map.dense().T
    view = views[1]
    assert torch.equal(view.predicted[batch.mask], lens.argmax(-1)[batch.mask])
    table = ov_circuit(graph, "blocks.1.attn.head.2").token_logits()
    assert torch.equal(view.lowered[2], table.diagonal() < table.mean(1))
    pattern = out.values["blocks.1.attn.head.2.pattern"]
    pairs = [(b, t, t - 2) for b in range(10) for t in range(2, int(data.lengths[b]))]
    mean = sum(float(pattern[b, t, s]) * (t + 1) for b, t, s in pairs) / len(pairs)
    assert math.isclose(float(view.profile[2, 6 + 2]), mean, rel_tol=1e-4)
    assert got.score.shape == (2, 8)


def test_scores_do_not_depend_on_batching(induction, induction_data):
    a, b = (score_heads(induction, induction_data, delimiters=[0], batch_size=size) for size in (5, 24))
    for name in ("score", "null", "null_sd"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-5, equal_nan=True)


def testholm():
    p = torch.tensor([[0.01, 0.04, torch.nan], [0.03, 0.005, 0.9]], dtype=torch.float64)
    expected = torch.tensor([[0.04, 0.09, torch.nan], [0.09, 0.025, 0.9]], dtype=torch.float64)
    assert torch.allclose(holm(p), expected, equal_nan=True)


# ---- known models ---------------------------------------------------------------------------------------


def test_the_heads_of_the_induction_model_are_found_and_no_other(induction):
    data = unweave.load_data("zoo:induction", limit=48)
    found = score_heads(induction, data)
    known = unweave.zoo.known("induction")
    (before,), (head,) = known["previous_token_heads"], known["induction_heads"]
    assert found.labels == {before: ("previous-token", "positional"), head: ("induction",)}
    rows = {(r["head"], r["detector"]): r for r in found.table()}
    assert rows[head, "induction"]["score"] > 0.9
    assert rows[head, "induction"]["verdict"]
    assert rows[before, "previous-token"]["z"] > 20
    assert "Holm" in found.rule
    # 4 heads x 5 detectors, but 2 idle heads attend evenly and the copying head lowers no token
    assert "17 tests" in found.rule


def test_an_induction_head_rests_on_the_first_token(induction, induction_data):
    (head,) = unweave.zoo.known("induction")["induction_heads"]
    strings = ["<bos>"] + [f"w{i}" for i in range(47)]
    by_id = score_heads(induction, induction_data, ["delimiter"], delimiters=[0])
    by_name = score_heads(induction, induction_data, ["delimiter"], delimiters="^<", token_strings=strings)
    assert by_id.labels == {head: ("delimiter",)}
    assert torch.equal(by_id.score, by_name.score)


@pytest.mark.parametrize("kind", ["untrained", "shuffled", "large"])
def test_random_weights_get_no_label(induction, kind):
    """Fresh weights; the trained ones with their entries in random order; and fresh ones that attend sharply."""
    torch.manual_seed(3)
    model = ToyTransformer(CONFIG)
    if kind == "shuffled":
        model = unweave.zoo.load("induction")
    with torch.no_grad():
        for p in model.parameters():
            if kind == "shuffled":
                p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
            if kind == "large":
                p.mul_(3)
    data = unweave.load_data("zoo:induction", limit=48)
    assert score_heads(capture(model, verify=False), data, delimiters=[0]).labels == {}


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_head_built_to_suppress_copies(sign):
    """One-hot tokens, a readout that predicts x + 1, a head that looks for what is predicted and lowers (raises) it."""
    n = 12
    model = ToyTransformer(ToyConfig(1, 1, n, n, 0, d_vocab=n, d_out=n, n_ctx=40))
    eye, next_one = torch.eye(n), torch.eye(n).roll(1, 1)  # row x: x + 1
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.W_E.copy_(eye)
        model.W_U.copy_(next_one)
        block = model.blocks[0]
        block.W_Q.copy_(30 * next_one[None])
        block.W_K.copy_(eye[None])
        block.W_V.copy_(eye[None])
        block.W_O.copy_(sign * next_one.T[None])  # after the readout: the token itself
    data = from_tensor(torch.randint(n, (12, 40), generator=torch.Generator().manual_seed(0)))
    found = score_heads(capture(model, verify=False), data)
    kind = {"blocks.0.attn.head.0": ("copy-suppression",)}
    assert found.labels == (kind if sign < 0 else {})


def test_half_precision_finds_the_same_heads(induction):
    data = unweave.load_data("zoo:induction", limit=16)
    whole = score_heads(induction, data)
    half = score_heads(induction.to(dtype=torch.bfloat16), data)
    assert half.labels == whole.labels
    assert half.score.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("hist", {"blocks.0.attn.head.0": ("duplicate-token",)}),
        ("frac_prevs", {"blocks.1.attn.head.0": ("positional",)}),
        ("sort_unique", {}),
    ],
)
def test_compiled_heads(shared, name, labels):
    """hist counts a token's copies; frac_prevs averages over what came before; sort_unique compares values."""
    folder = shared / "models" / "tracr" / name
    tokens, mask, _ = tracr_examples(folder)
    found = score_heads(capture(folder), from_tensor(tokens, mask))
    assert found.labels == labels
    assert "copy-suppression" not in found.detectors


def test_even_attention_and_absent_queries_are_nan_not_labels(shared):
    folder = shared / "models" / "tracr" / "sort_unique"
    tokens, mask, _ = tracr_examples(folder)
    found = score_heads(capture(folder), from_tensor(tokens, mask), ["duplicate-token", "positional"])
    assert found.score[0].isnan().all()  # no token comes twice
    assert not found.verdict[0].any()
    folder = shared / "models" / "tracr" / "frac_prevs"
    tokens, mask, _ = tracr_examples(folder)
    even = score_heads(capture(folder), from_tensor(tokens, mask), ["positional"])
    assert even.score[0, 0].isnan()
    assert math.isclose(float(even.p[0, 1]), 0.0, abs_tol=1e-12)


# ---- refusals -------------------------------------------------------------------------------------------


def test_nonsense_is_refused(induction, induction_data, shared):
    with pytest.raises(UnknownNameError, match="detector"):
        score_heads(induction, induction_data, ["inducton"])
    with pytest.raises(InputError, match="no detector"):
        score_heads(induction, induction_data, [])
    with pytest.raises(InputError, match="needs delimiters"):
        score_heads(induction, induction_data, ["delimiter"])
    with pytest.raises(InputError, match="token_strings"):
        score_heads(induction, induction_data, delimiters=r"\.")
    with pytest.raises(InputError, match="regular expression"):
        score_heads(induction, induction_data, delimiters="(", token_strings=["a"] * 48)
    for ids in ([48], [], "x"):
        with pytest.raises(InputError, match="from 0 to 47"):
            score_heads(induction, induction_data, delimiters=ids, token_strings=["a"] * 48)
    for options in ({"alpha": 0.0}, {"shuffles": 0}):
        with pytest.raises(InputError, match="alpha must be"):
            score_heads(induction, induction_data, **options)
    with pytest.raises(EmptyDataError, match="too few"):
        score_heads(induction, induction_data.select(slice(0, 7)))
    with pytest.raises(InputError, match="another input"):
        score_heads(induction.restrict(induction.edges[1:], ablation="resample"), induction_data)
    with pytest.raises(InputError, match="no attention heads"):
        score_heads(capture(torch.nn.Sequential(torch.nn.Linear(2, 2))), induction_data)
    with pytest.raises(InputError, match="outputs are its tokens"):
        score_heads(capture(shared / "models" / "tracr" / "hist"), induction_data, ["copy-suppression"])
