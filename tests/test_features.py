"""Features: dictionaries and bases compute what plain code computes, refined graphs what the graph computed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, random_model
from safetensors.torch import save_file

import unweave
from unweave.capture import capture
from unweave.compression.moments import channel_moments
from unweave.errors import (
    CorruptFileError,
    InputError,
    NonFiniteError,
    ShapeError,
    StorageError,
    UnknownNameError,
    UnsupportedModelError,
)
from unweave.execution import check_inputs, run, trace
from unweave.features import (
    ActivationStream,
    Dictionary,
    Recipe,
    collect_activations,
    compare_features,
    describe_latents,
    find_basis,
    find_site,
    fit_dictionary,
    hook_of,
    load_dictionary,
    measure_privilege,
    place_of,
    refine_basis,
    refine_features,
    rotate_sparse,
    save_dictionary,
    train_dictionary,
)
from unweave.features.losses import first_weights, jump, loss_of, step
from unweave.freezing import freeze
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import collect_means
from unweave.storage import load_graph, save_graph

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
HEAD = "blocks.0.attn.head.0"


def random_dictionary(
    d_in: int, n: int, activation: str = "relu", d_out: int | None = None, seed: int = 0
) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    d_out = d_in if d_out is None else d_out
    extra = {"topk": {"k": 3}, "jumprelu": {"threshold": torch.rand(n, generator=g)}}.get(activation, {})
    tensors = [0.4 * torch.randn(s, generator=g) for s in ((n, d_in), (n,), (d_out, n), (d_out,))]
    return Dictionary(*tensors, activation, **extra, is_transcoder=d_out != d_in)


def plain_encode(d: Dictionary, x: np.ndarray) -> np.ndarray:
    """Latents of one vector, by loops in float64."""
    before = [
        float(np.dot(row, x)) + float(b) for row, b in zip(d.encoder.double().numpy(), d.encoder_bias, strict=True)
    ]
    if d.activation == "identity":
        return np.array(before)
    if d.activation == "topk":
        best = sorted(range(len(before)), key=lambda i: -before[i])[: d.k]
        return np.array([max(z, 0.0) if i in best else 0.0 for i, z in enumerate(before)])
    if d.activation == "jumprelu":
        return np.array([z if z > float(t) else 0.0 for z, t in zip(before, d.threshold, strict=True)])
    return np.array([max(z, 0.0) for z in before])


@pytest.fixture(scope="module")
def llama():
    return capture(random_model("llama-tied-biased"), verify=False)


# ---- dictionaries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "identity"])
def test_dictionaries_encode_and_decode_as_plain_loops_do(activation):
    d, x = random_dictionary(5, 7, activation), torch.randn(4, 3, 5)
    latents, said = d.encode(x), d.decode(d.encode(x))
    for i in range(4):
        for j in range(3):
            f = plain_encode(d, x[i, j].double().numpy())
            np.testing.assert_allclose(latents[i, j].numpy(), f, atol=1e-5)
            expected = d.decoder.double().numpy() @ f + d.decoder_bias.double().numpy()
            np.testing.assert_allclose(said[i, j].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"activation": "tanh"}, InputError),
        ({"activation": "topk"}, InputError),
        ({"activation": "topk", "k": 8}, InputError),
        ({"k": 2}, InputError),
        ({"activation": "jumprelu"}, InputError),
        ({"activation": "jumprelu", "threshold": torch.zeros(3)}, InputError),
        ({"decoder": torch.zeros(5, 6)}, ShapeError),
        ({"decoder_bias": torch.zeros(4)}, ShapeError),
    ],
)
def test_dictionaries_that_do_not_fit_are_refused(change, error):
    good = {f.name: getattr(random_dictionary(5, 7), f.name) for f in dataclasses.fields(Dictionary)}
    plain = Dictionary.__new__  # the type checks of the tests would refuse shapes before the class does
    made = plain(Dictionary)
    for name, value in (good | change).items():
        object.__setattr__(made, name, value)
    with pytest.raises(error):
        made.__post_init__()


# ---- refined graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_refined_graphs_compute_what_the_model_computes(name):
    graph = capture(random_model(name), verify=False)
    chosen, groups = {}, {}
    for stage in graph.stages:
        if stage.kind in ("attn", "mlp"):
            stem = stage.nodes[0].split(".head.")[0]
            kinds = ("relu", "topk", "jumprelu", "identity")
            where = stem if stage.layer % 2 == 0 or stage.post is not None else f"{stem}.code"
            chosen[where] = random_dictionary(
                find_site(graph, where).width, 11, kinds[len(chosen) % 4], seed=len(chosen)
            )
            groups[where] = [[3], [0, 5, 7]]
    finer = refine_features(graph, chosen, groups)
    assert len(finer.nodes) > len(chosen) * 4
    expected = run(graph, TOKENS).logits
    torch.testing.assert_close(run(finer, TOKENS).logits, expected, atol=2e-4, rtol=1e-4)
    bare = run(refine_features(graph, chosen, error=False), TOKENS).logits
    assert not torch.allclose(bare, expected, atol=1e-2)


def test_parts_write_their_latents_and_what_is_left_over(llama):
    d = random_dictionary(32, 11, "topk")
    finer = refine_features(llama, {"blocks.0.mlp": d}, {"blocks.0.mlp": [[4], [2, 9]]})
    names = [f"blocks.0.mlp.{p}" for p in ("latent.4", "latents.1", "latents.rest", "error")]
    assert [n for n in finer.nodes if "0.mlp" in n] == names
    stage = llama.find("blocks.0.mlp")[0]
    x = run(llama, TOKENS, record=["blocks.0.mlp"]).values["blocks.0.mlp"] + stage.bias
    written = run(finer, TOKENS, record=names).values
    flat = x.reshape(-1, 32).double().numpy()
    f = np.stack([plain_encode(d, row) for row in flat])
    decoder, rest = d.decoder.double().numpy(), [0, 1, 3, 5, 6, 7, 8, 10]
    for name, group in zip(names, ([4], [2, 9], rest), strict=False):
        np.testing.assert_allclose(written[name].reshape(-1, 32).numpy(), f[:, group] @ decoder[:, group].T, atol=1e-5)
    error = flat - f @ decoder.T - d.decoder_bias.double().numpy()
    np.testing.assert_allclose(written["blocks.0.mlp.error"].reshape(-1, 32).numpy(), error, atol=1e-5)


def test_without_its_error_a_node_is_its_reconstruction(induction):
    d, tokens = random_dictionary(64, 20, "jumprelu"), unweave.load_data("zoo:induction", limit=2).tokens.long()
    expected = run(induction, tokens, patch={HEAD: lambda y: d.decode(d.encode(y))}).logits
    torch.testing.assert_close(
        run(refine_features(induction, {HEAD: d}, error=False), tokens).logits, expected, atol=1e-4, rtol=1e-4
    )


def test_a_transcoder_reads_what_the_mlp_reads(llama):
    d = random_dictionary(32, 11, "relu")
    d = dataclasses.replace(d, is_transcoder=True)
    finer = refine_features(llama, {"blocks.1.mlp": d})
    torch.testing.assert_close(run(finer, TOKENS).logits, run(llama, TOKENS).logits, atol=1e-5, rtol=1e-4)
    heard = run(llama, TOKENS, record=["blocks.1.mlp.in"]).values["blocks.1.mlp.in"]
    norm = llama.find("blocks.1.mlp")[0].ports[0].norm
    latents = run(finer, TOKENS, record=["blocks.1.mlp.latents.0.code"]).values["blocks.1.mlp.latents.0.code"]
    torch.testing.assert_close(latents[..., :11], d.encode(norm.apply(heard)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", [HEAD, "blocks.0.attn", "blocks.0.attn.code", "blocks.0.mlp", "blocks.0.mlp.code"])
def test_cutting_one_edge_changes_one_part_alone(llama, where):
    """Against the whole layer run apart on the input without the edge."""
    d = random_dictionary(find_site(llama, where).width, 9, "topk")
    finer = refine_features(llama, {where: d}, {where: [[4], [2, 3]]})
    part = f"{find_site(llama, where).stem}.latents.1"
    port = finer.find(part)[0].ports[-1].name
    cut = finer.restrict([e for e in finer.edges if (e.src, e.dst, e.port) != ("embed", part, port)], ablation="zero")
    names = [n for n in finer.nodes if n.startswith(find_site(llama, where).stem + ".lat")]
    whole = run(finer, TOKENS, record=names).values
    got = run(cut, TOKENS, record=names).values
    # the same edge cut for the whole layer
    alone = llama.restrict(
        [
            e
            for e in llama.edges
            if (e.src, e.port) != ("embed", port) or not e.dst.startswith(f"blocks.0.{where.split('.')[2]}")
        ],
        ablation="zero",
    )
    stage = llama.find(HEAD if "attn" in where else "blocks.0.mlp")[0]
    wanted = run(alone, TOKENS, record=[r for n in stage.nodes for r in (n, f"{n}.code")]).values
    if where.endswith("code"):
        x = torch.cat([wanted[f"{n}.code"][..., :w] for n, w in zip(stage.nodes, stage.code_widths, strict=True)], -1)
        columns = stage.write.dense() @ d.decoder
    else:
        x = wanted[HEAD] if where == HEAD else sum(wanted[n] for n in stage.nodes)
        x = x if where == HEAD or stage.bias is None else x + stage.bias
        columns = d.decoder
    expected = d.encode(x)[..., [2, 3]] @ columns[:, [2, 3]].T
    torch.testing.assert_close(got[part], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole[part], expected, atol=1e-3)
    for name in set(names) - {part}:
        torch.testing.assert_close(got[name], whole[name], atol=1e-5, rtol=1e-4)


def test_a_circuit_over_features_is_faithful_on_held_out_texts(induction):
    data = unweave.load_data("zoo:induction", limit=48)
    found, held = data.split(held_out=0.5)
    scope = Scope(positions="answered")
    recipe = Recipe(96, k=8, steps=150, tokens=256, learning_rate=1e-2)
    finer = refine_features(induction, {HEAD: train_dictionary(induction, HEAD, found, recipe, buffer=1024)}, {HEAD: 2})
    circuit = unweave.find_circuit(finer, found, scope, faithfulness=0.9, max_trials=60, batch_size=24)
    proof = unweave.prove(circuit, held, n_random=2, n_subsets=2, batch_size=24)
    assert proof.faithfulness.value > 0.8
    assert circuit.graph.n_edges < finer.n_edges / 2


def test_scores_of_edges_into_parts_agree_with_measured_effects(induction, induction_data):
    data = induction_data.select(slice(0, 12))
    finer = refine_features(induction, {HEAD: find_basis(induction, HEAD, data, "principal")}, {HEAD: [[0], [1]]})
    means, scope = collect_means(finer, data), Scope(positions="answered")
    guessed = score_edges(finer, data, scope, means=means).nats[finer.edge_matrix]
    exact = score_edges(finer, data, scope, means=means, method="exact").nats[finer.edge_matrix]
    ranks = [t.argsort().argsort().double() for t in (guessed, exact)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7


def test_refined_graphs_are_stored_bit_for_bit(llama, tmp_path):
    chosen = {
        "blocks.0.mlp": random_dictionary(32, 9, "topk"),
        "blocks.1.attn.code": random_dictionary(32, 9, "jumprelu"),
    }
    finer = refine_features(llama.quotient({"first": ["blocks.0.mlp"]}), chosen)
    loaded = load_graph(save_graph(finer, tmp_path / "g"))
    assert loaded.nodes == finer.nodes
    assert dict(loaded.modules) == {"blocks.0.mlp.latents.0": "first", "blocks.0.mlp.error": "first"}
    assert torch.equal(run(loaded, TOKENS).logits, run(finer, TOKENS).logits)


def test_masks_and_bfloat16(llama):
    finer = refine_features(
        llama, {"blocks.0.attn": random_dictionary(32, 9), "blocks.1.mlp": random_dictionary(32, 9)}
    )
    mask = torch.ones_like(TOKENS)
    mask[0, 5:] = 0
    got, expected = (run(g, TOKENS, mask).logits[0, :5] for g in (finer, llama))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    rounded = llama.to(dtype=torch.bfloat16)
    half = refine_features(rounded, {"blocks.1.mlp": random_dictionary(32, 9)})
    assert half.find("blocks.1.mlp.error")[0].core.dictionaries[0].encoder.dtype == torch.bfloat16
    torch.testing.assert_close(run(half, TOKENS).logits, run(rounded, TOKENS).logits, atol=0.05, rtol=0.05)
    rotary = finer.to(dtype=torch.bfloat16).find("blocks.0.attn.error")[0].core.inner.rotary
    assert rotary.inv_freq.dtype == torch.float32


def test_gradients_stop_at_the_patterns_of_refined_heads(induction, induction_data):
    data, scope = induction_data.select(slice(0, 8)), Scope(positions="answered")
    finer = refine_features(induction, {"blocks.1.attn": random_dictionary(64, 9)})
    means = collect_means(finer, data)
    nats = score_edges(finer, data, scope, means=means, method="fisher", frozen="patterns").nats
    rows = {
        p: nats[[i for i, n in enumerate(finer.ports) if n == f"blocks.1.attn.error.{p}"]].nan_to_num() for p in "qkv"
    }
    assert not bool(rows["q"].any() or rows["k"].any())
    assert bool(rows["v"].any())
    t = trace(finer, check_inputs(finer, data.tokens.long()), keep=True)
    with pytest.raises(UnsupportedModelError, match="refined"):
        freeze(t, "patterns")


def test_refusals_of_refining(llama, induction):
    d32, d64 = random_dictionary(32, 9), random_dictionary(64, 9)
    for chosen, groups, error in [
        ({"blocks.0.mpl": d32}, None, UnknownNameError),
        ({"blocks.0.mlp": d64}, None, InputError),
        ({"before blocks.0.mlp": d32}, None, InputError),
        ({"unembed": d32}, None, InputError),
        ({"blocks.0.mlp": d32}, {"blocks.0.mlp": 10}, InputError),
        ({"blocks.0.mlp": d32}, {"blocks.0.mlp": [[1], [1, 2]]}, InputError),
        ({"blocks.0.mlp": d32}, {"blocks.0.mlp": [[9]]}, InputError),
        ({"blocks.0.mlp": d32}, {"blocks.1.mlp": 2}, UnknownNameError),
        ({HEAD: d32, "blocks.0.attn": d32}, None, InputError),
        ({HEAD: dataclasses.replace(d32, is_transcoder=True)}, None, InputError),
    ]:
        with pytest.raises(error):
            refine_features(llama, chosen, groups)
    with pytest.raises(InputError, match="cut"):
        refine_features(induction.restrict(induction.edges[1:], ablation="zero"), {HEAD: d64})
    with pytest.raises(InputError, match="identity"):
        refine_basis(llama, "blocks.0.mlp", d32, 2)


# ---- training -----------------------------------------------------------------------------------------------


def planted(n_features: int, d: int, active: float, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(vectors, unit features): each feature is there with a small probability, at 0.5 to 1.5 times its length."""
    g = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(n_features, d, generator=g), dim=1)
    there = torch.rand(n, n_features, generator=g) < active / n_features
    return (there * (0.5 + torch.rand(n, n_features, generator=g))) @ features, features


def similarity(d: Dictionary, features: torch.Tensor) -> float:
    """Mean over features of the largest cosine with a column of the decoder."""
    return float((features @ F.normalize(d.decoder, dim=0)).amax(1).mean())


def test_planted_features_are_found():
    x, features = planted(24, 16, 2.0, 20_000, seed=0)
    random = random_dictionary(16, 36)
    found = fit_dictionary(x, Recipe(36, k=2, steps=1000, tokens=128, learning_rate=1e-2))
    assert similarity(found, features) > 0.98 > similarity(random, features)
    torch.testing.assert_close(found.decoder.norm(dim=0), torch.ones(36))


@pytest.mark.parametrize(("z", "t"), [(0.52, 0.5), (0.48, 0.5), (0.7, 0.5), (0.2, 0.5), (-0.1, 0.03)])
def test_gradients_of_jumprelu_are_the_papers(z, t):
    """Rajamanoharan et al. 2024, equations 11 and 12, with the box of height 1 and a bandwidth of 0.1."""
    before = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([t], dtype=torch.float64, requires_grad=True)
    box = 1.0 if abs((z - t) / 0.1) < 0.5 else 0.0
    out = jump(before, threshold, 0.1)
    assert float(out.detach()) == (z if z > t else 0.0)
    got = torch.autograd.grad(3.0 * out.sum(), (before, threshold))
    assert float(got[0]) == (3.0 if z > t else 0.0)
    assert float(got[1]) == pytest.approx(-3.0 * t / 0.1 * box)
    count = step(before, threshold, 0.1)
    assert float(count.detach()) == (1.0 if z > t else 0.0)
    (slope,) = torch.autograd.grad(count.sum(), threshold)
    assert float(slope) == pytest.approx(-box / 0.1)


def test_training_steps_are_those_of_plain_code():
    """Top-1 of a small transcoder, three steps of Adam, gradients by hand in float64."""
    recipe = Recipe(4, k=1, steps=3, tokens=6, learning_rate=0.01, seed=5)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 3, generator=g), torch.randn(6, 2, generator=g)
    got = fit_dictionary(x, recipe, target=y)
    means = [t.double().mean(0).numpy() for t in (x, y)]
    scales = [math.sqrt(((t.double().numpy() - mean) ** 2).mean()) for t, mean in zip((x, y), means, strict=True)]
    inputs, targets = ((t.double().numpy() - m) / s for t, m, s in zip((x, y), means, scales, strict=True))
    w = {name: t.double().numpy() for name, t in first_weights(recipe, 3, 2, torch.device("cpu")).items()}
    m, v = ({n: np.zeros_like(t) for n, t in w.items()} for _ in range(2))
    for number in range(3):
        grads = {n: np.zeros_like(t) for n, t in w.items()}
        for row, target in zip(inputs, targets, strict=True):
            before = w["encoder"] @ row + w["encoder_bias"]
            i = int(before.argmax())
            f = max(before[i], 0.0)
            error = w["decoder"][:, i] * f + w["decoder_bias"] - target
            slope = 2 * error / targets.size
            grads["decoder"][:, i] += slope * f
            grads["decoder_bias"] += slope
            back = float(slope @ w["decoder"][:, i]) if f > 0 else 0.0
            grads["encoder"][i] += back * row
            grads["encoder_bias"][i] += back
        grads["decoder"] -= w["decoder"] * (w["decoder"] * grads["decoder"]).sum(0)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, 1 / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            size = np.sqrt(v[name] / (1 - 0.999 ** (number + 1))) + 1e-8
            w[name] = w[name] - 0.01 * m[name] / (1 - 0.9 ** (number + 1)) / size
        w["decoder"] = w["decoder"] / np.linalg.norm(w["decoder"], axis=0)
    encoder = w["encoder"] / scales[0]
    np.testing.assert_allclose(got.decoder.numpy(), w["decoder"], atol=1e-4)
    np.testing.assert_allclose(got.encoder.numpy(), encoder * scales[1], atol=1e-4)
    np.testing.assert_allclose(got.decoder_bias.numpy(), w["decoder_bias"] * scales[1] + means[1], atol=1e-4)
    bias = (w["encoder_bias"] - encoder @ means[0]) * scales[1]
    np.testing.assert_allclose(got.encoder_bias.numpy(), bias, atol=1e-4)


def test_dead_latents_learn_what_is_left_over():
    x, _ = planted(8, 6, 2.0, 64, seed=3)
    recipe = Recipe(10, k=1)
    weights = {n: w.requires_grad_() for n, w in first_weights(recipe, 6, 6, x.device).items()}
    dead = torch.zeros(10, dtype=torch.bool)
    dead[7:] = True
    with torch.no_grad():
        weights["encoder_bias"][7:] = -100.0  # they never win
    value, fired = loss_of(weights, x, x, recipe, 1.0, dead)
    without, _ = loss_of(weights, x, x, recipe, 1.0, torch.zeros_like(dead))
    assert not bool(fired[7:].any())
    assert float((value - without).detach()) == pytest.approx(
        1 / 32 * 1.0, rel=0.6
    )  # they say nothing yet: all is left over
    with torch.no_grad():
        weights["encoder_bias"][7:] = -0.2
    value, _ = loss_of(weights, x, x, recipe, 1.0, dead)
    (grad,) = torch.autograd.grad(value, weights["encoder"])
    assert bool((grad[7:].abs().sum(1) > 0).any())


def test_batch_topk_keeps_the_largest_of_a_batch_and_then_what_exceeds_their_mean_minimum(monkeypatch):
    """The loss against loops; the threshold against the minima over the pieces that follow."""
    x, _ = planted(8, 6, 2.0, 40, seed=3)
    recipe = Recipe(10, "batchtopk", k=2, steps=3, tokens=20)
    w = first_weights(recipe, 6, 6, x.device)
    value, fired = loss_of(w, x, x, recipe, 1.0, torch.zeros(10, dtype=torch.bool))
    before = (x.double() @ w["encoder"].T.double()).numpy()
    kept = sorted(range(before.size), key=lambda i: -before.flat[i])[: 2 * len(x)]
    f = np.zeros_like(before)
    f.flat[kept] = before.flat[kept].clip(0)
    left = x.double().numpy() - f @ w["decoder"].T.double().numpy()
    assert float(value) == pytest.approx((left**2).mean(), rel=1e-5)
    assert fired.tolist() == (f > 0).any(0).tolist()
    # of as many tokens per piece as there are, every piece is the same set
    monkeypatch.setattr("unweave.features.training.THRESHOLD_PIECES", 3)
    d = fit_dictionary(x, dataclasses.replace(recipe, tokens=40, learning_rate=1e-2))
    assert d.activation == "jumprelu"
    inner = F.linear(x, d.encoder, d.encoder_bias).flatten().sort(descending=True).values
    torch.testing.assert_close(d.threshold, inner[2 * 40 - 1].expand(10))
    assert int((d.encode(x) > 0).sum()) in (2 * 40 - 1, 2 * 40)


def test_the_penalty_rises_as_long_as_the_recipe_says(monkeypatch):
    x, _ = planted(8, 6, 2.0, 40, seed=3)
    seen = []

    def noted(weights, a, b, recipe, rise, dead):
        seen.append(rise)
        return loss_of(weights, a, b, recipe, rise, dead)

    monkeypatch.setattr("unweave.features.training.loss_of", noted)
    fit_dictionary(x, Recipe(10, "jumprelu", penalty=0.1, rise=0.5, steps=8, tokens=20))
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_killed_training_resumes_with_the_same_weights(induction, tmp_path, monkeypatch):
    data = unweave.load_data("zoo:induction", limit=20)
    recipe = Recipe(20, "jumprelu", penalty=0.01, steps=12, tokens=200)
    options = {"buffer": 500, "batch_size": 4}
    expected = train_dictionary(induction, HEAD, data, recipe, **options)
    monkeypatch.setattr("unweave.features.training.CHECKPOINT_EVERY", 5)
    file = tmp_path / "state.safetensors"
    calls = []

    def killed(*args):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss_of(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("unweave.features.training.loss_of", killed)
        train_dictionary(induction, HEAD, data, recipe, checkpoint=file, **options)
    assert file.exists()
    with pytest.raises(InputError, match="another"):
        train_dictionary(induction, HEAD, data, dataclasses.replace(recipe, seed=1), checkpoint=file, **options)
    got = train_dictionary(induction, HEAD, data, recipe, checkpoint=file, **options)
    assert not file.exists()
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_the_stream_gives_every_token_once_an_epoch(induction, induction_data):
    site = find_site(induction, "before blocks.1.attn")
    data = induction_data.select(slice(0, 8))
    stream = ActivationStream(induction, site, data, tokens=data.n_tokens // 4, buffer=data.n_tokens, batch_size=4)
    pieces = stream.pieces()
    seen = torch.cat([next(pieces)[0] for _ in range(4)])
    every = collect_activations(induction, site.name, data)
    assert seen.shape == every.shape
    torch.testing.assert_close(seen[seen[:, 0].argsort()], every[every[:, 0].argsort()], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen, every)
    again = stream.pieces(2)
    third = stream.pieces()
    skipped = [next(third) for _ in range(3)]
    assert torch.equal(next(again)[0], skipped[2][0])
    expected = run(induction, data.tokens.long(), record=["before blocks.1.attn.head.0"]).values
    torch.testing.assert_close(every, expected["before blocks.1.attn.head.0"][data.mask])


def test_a_transcoder_is_trained(llama):
    data = unweave.data.from_tensor(torch.randint(0, 50, (8, 9), generator=torch.Generator().manual_seed(4)))
    recipe = Recipe(24, "relu", penalty=0.001, steps=80, tokens=36, learning_rate=1e-2)
    d = train_dictionary(llama, "blocks.0.mlp", data, recipe, transcoder=True, buffer=72)
    row = compare_features(llama, "blocks.0.mlp", {"t": d, "no": random_dictionary(32, 24)}, data)
    assert d.is_transcoder
    assert row["t"].variance_explained > 0.6 > row["no"].variance_explained


def test_refusals_of_training(induction, induction_data):
    for options in [
        {"kind": "gated"},
        {"k": None},
        {"k": 9},
        {"penalty": 0.1},
        {"kind": "relu"},
        {"steps": 0},
        {"learning_rate": 0.0},
    ]:
        with pytest.raises(InputError):
            Recipe(**({"width": 8, "k": 2} | options))
    x, recipe = torch.randn(20, 4), Recipe(8, k=2, steps=2)
    with pytest.raises(ShapeError):
        inspect.unwrap(fit_dictionary)(x, recipe, target=x[:3])
    with pytest.raises(NonFiniteError):
        fit_dictionary(torch.full((20, 4), torch.nan), recipe)
    with pytest.raises(InputError, match="constant"):
        fit_dictionary(torch.ones(20, 4), recipe)
    with pytest.raises(UnknownNameError):
        train_dictionary(induction, "blocks.7.attn", induction_data, recipe)
    with pytest.raises(InputError, match="transcoder"):
        train_dictionary(induction, HEAD, induction_data, recipe, transcoder=True)


# ---- bases --------------------------------------------------------------------------------------------------


def test_sparse_rotations_and_independent_components_find_planted_directions():
    g = torch.Generator().manual_seed(2)
    sources = torch.randn(4000, 5, generator=g).double() * (torch.rand(4000, 5, generator=g) < 0.1)
    directions = torch.linalg.qr(torch.randn(5, 5, generator=g).double())[0]
    found = rotate_sparse(sources @ directions)
    assert bool(((directions @ found).abs().amax(1) > 0.99).all())
    torch.testing.assert_close(found.T @ found, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["neuron", "random", "principal", "fisher", "independent", "sparse"])
def test_bases_lose_nothing_and_refine_exactly(induction, induction_data, kind):
    where = f"{HEAD}.code"
    moments = channel_moments(induction, induction_data, Scope(positions="answered"), samples=1)
    basis = find_basis(induction, where, induction_data, kind, moments=moments, limit=600)
    x = collect_activations(induction, where, induction_data)
    if kind != "fisher":
        torch.testing.assert_close(basis.decode(basis.encode(x)), x, atol=2e-3, rtol=1e-3)
        assert basis.n_latents == 32
    finer = refine_basis(induction, where, basis, [[0], [1, 2]])
    tokens = induction_data.tokens.long()[:4]
    torch.testing.assert_close(run(finer, tokens).logits, run(induction, tokens).logits, atol=2e-3, rtol=1e-3)


def test_independent_components_are_found_in_a_graph(llama, monkeypatch):
    """The activations of the site replaced by a planted mixture that is not orthogonal."""
    g = torch.Generator().manual_seed(7)
    sources = (torch.rand(5000, 4, generator=g) < 0.1) * torch.rand(5000, 4, generator=g)
    mix = torch.randn(4, 32, generator=g)
    monkeypatch.setattr("unweave.features.bases.collect_activations", lambda *a, **k: sources @ mix + 1.0)
    basis = find_basis(llama, "blocks.0.mlp", unweave.data.from_tensor(TOKENS), "independent")
    assert basis.n_latents == 4
    assert float((F.normalize(mix, dim=1) @ F.normalize(basis.decoder, dim=0)).abs().amax(1).min()) > 0.99


def test_the_fisher_basis_is_ordered_by_nats_and_regresses(induction, induction_data):
    scope = Scope(positions="answered")
    moments = channel_moments(induction, induction_data, scope)
    basis = find_basis(induction, HEAD, induction_data, "fisher", moments=moments)
    s = induction.where[HEAD][0]
    weight = induction.stages[s].write.dense().double()[:, :32]
    code2 = moments[s].code2[:32, :32]
    cov = weight @ code2 @ weight.T
    r = basis.encoder.double()
    variance = r @ cov @ r.T
    off = variance - torch.diag(variance.diagonal())
    assert float(off.abs().max()) < 1e-4 * float(variance.max())
    assert bool((variance.diagonal().diff() <= 1e-6 * variance.max()).all())
    torch.testing.assert_close(basis.decoder.double(), cov @ r.T @ torch.linalg.pinv(variance), atol=1e-3, rtol=1e-2)
    gradient = moments[s].written2
    nats = 0.5 * torch.trace(gradient @ cov)
    assert float(0.5 * variance.diagonal().sum()) == pytest.approx(float(nats), rel=1e-3)


def test_refusals_of_bases(induction, induction_data):
    for where, kind, error in [
        (HEAD, "wavelet", InputError),
        (HEAD, "fisher", InputError),
        ("before blocks.1.attn", "fisher", InputError),
        ("unembed", "random", InputError),
        ("before embed", "random", InputError),
        ("blocks.0.atn", "random", UnknownNameError),
    ]:
        with pytest.raises(error):
            find_basis(induction, where, induction_data, kind, limit=50)


# ---- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [HEAD, "blocks.0.attn.code", "before blocks.1.attn.head.0"])
def test_the_table_is_what_plain_code_finds(induction, induction_data, where):
    data, scope = induction_data.select(slice(0, 6)), Scope(positions="answered")
    d = random_dictionary(64, 30, "topk", seed=3)
    row = compare_features(induction, where, {"d": d}, data, scope, batch_size=4)["d"]
    tokens, mask = data.tokens.long(), data.labels["answered"].bool()
    heads = [HEAD, "blocks.0.attn.head.1"]
    names = {HEAD: [HEAD], "blocks.0.attn.code": [f"{h}.code" for h in heads]}.get(where, [where])
    clean = run(induction, tokens, record=names)
    x = torch.cat([clean.values[n] for n in names], -1)
    said = d.decode(d.encode(x))
    mean = x[mask].mean(0).expand_as(x)

    def patched(value):
        return run(
            induction,
            tokens,
            patch=dict(zip(names, value.split([clean.values[n].shape[-1] for n in names], -1), strict=True)),
        ).logits

    def losses(logits):
        p, q = (torch.log_softmax(z.double(), -1) for z in (clean.logits, logits))
        kl = (p.exp() * (p - q)).sum(-1)[mask].mean()
        next_token = torch.cat([tokens[:, 1:], torch.zeros(len(tokens), 1).long()], 1)
        cross = -q.gather(-1, next_token[..., None])[..., 0][mask].mean()
        return float(kl), float(cross)

    got, worst, best = losses(patched(said)), losses(patched(mean)), losses(clean.logits)
    assert row.kl_nats.value == pytest.approx(got[0], rel=1e-3)
    assert row.loss_nats.value == pytest.approx(got[1], rel=1e-3)
    assert row.loss_recovered.value == pytest.approx((worst[1] - got[1]) / (worst[1] - best[1]), rel=1e-2, abs=1e-3)
    assert row.kl_recovered.value == pytest.approx(1 - got[0] / worst[0], rel=1e-2, abs=1e-3)
    f, xs = d.encode(x)[mask].double(), x[mask].double()
    left = (xs - said[mask].double()).square().sum() / (xs - xs.mean(0)).square().sum()
    assert row.variance_explained == pytest.approx(1 - float(left), rel=1e-3, abs=1e-3)
    assert row.l0 == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert row.dead == pytest.approx(float((f == 0).all(0).double().mean()))
    hoyer = [(30**0.5 - float(r.sum() / r.norm())) / (30**0.5 - 1) for r in f if float(r.norm()) > 0]
    assert row.hoyer == pytest.approx(sum(hoyer) / len(hoyer), rel=1e-4)
    c = f[:, f.std(0) > 0] - f[:, f.std(0) > 0].mean(0)
    assert row.kurtosis == pytest.approx(float((c.pow(4).mean(0) / c.square().mean(0).square() - 3).mean()), rel=1e-3)


def test_a_privileged_basis_is_told_from_another(monkeypatch, induction, induction_data):
    g = torch.Generator().manual_seed(0)
    sparse = torch.randn(3000, 12, generator=g) * (torch.rand(3000, 12, generator=g) < 0.1)
    for x, special in [(sparse, True), (sparse @ torch.linalg.qr(torch.randn(12, 12, generator=g))[0], False)]:
        monkeypatch.setattr("unweave.features.comparison.collect_activations", lambda *a, x=x, **k: x)
        found = measure_privilege(induction, HEAD, induction_data, rotations=30)
        assert (found.z > 8 and found.percentile == 1.0) if special else abs(found.z) < 4
    centred = (x - x.mean(0)).double()
    expected = float((centred.pow(4).mean(0) / centred.square().mean(0).square() - 3).mean())
    assert found.kurtosis == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError):
        measure_privilege(induction, HEAD, induction_data, rotations=1)


def test_latents_are_described_by_what_drives_them(induction):
    """Latents that are the tokens themselves, as the embedding writes them."""
    data, held = unweave.load_data("zoo:induction", limit=48).split(held_out=0.5)
    table = induction.stages[0].core.table
    reader = torch.linalg.pinv(table.T).float()
    d = Dictionary(reader, torch.zeros(len(reader)), reader.T, torch.zeros(64))
    rows = describe_latents(induction, "embed", d, [5, 9], data, held, shifts=2, draws=2)
    assert [row["node"] for row in rows] == ["embed.latent.5", "embed.latent.9"]
    assert all(row["score"] > 0.9 and row["label"] for row in rows)


def test_refusals_of_the_table(induction, induction_data):
    for chosen in ({}, {"original": random_dictionary(64, 9)}, {"d": random_dictionary(32, 9)}):
        with pytest.raises(InputError):
            compare_features(induction, HEAD, chosen, induction_data)


# ---- folders of other tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("d_out", [None, 6])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, activation, d_out):
    d = random_dictionary(5, 7, activation, d_out)
    if activation == "topk" and d_out:
        with pytest.raises(InputError, match="topk"):
            save_dictionary(d, tmp_path / "d")
        return
    folder = save_dictionary(d, tmp_path / "d", hook_name="blocks.3.hook_mlp_out", model_name="some")
    found = load_dictionary(folder)
    assert found.where == "blocks.3.mlp"
    assert (found.dictionary.activation, found.dictionary.k) == (d.activation, d.k)
    assert found.dictionary.is_transcoder == d.is_transcoder
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold"):
        a, b = getattr(found.dictionary, name), getattr(d, name)
        assert (a is None and b is None) or torch.equal(a, b)


def write_saelens(folder, weights, **config):
    folder.mkdir()
    save_file({n: w.contiguous() for n, w in weights.items()}, str(folder / "sae_weights.safetensors"))
    (folder / "cfg.json").write_text(json.dumps({"d_in": 5, "d_sae": 7} | config))
    return folder


def raw_weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (5, 7), "b_enc": (7,), "W_dec": (7, 5), "b_dec": (5,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.parametrize("centred", [True, False, None])
@pytest.mark.parametrize("kind", ["standard", "topk", "topk, old", "jumprelu"])
def test_saelens_folders_compute_what_saelens_computes(tmp_path, kind, centred):
    """Their forward pass (SAELens 6, sae_lens/saes), written again from its description."""
    w, x = raw_weights(), torch.randn(40, 5)
    architecture = kind.split(",")[0]
    config = {"architecture": architecture} | ({} if centred is None else {"apply_b_dec_to_input": centred})
    if kind == "topk":
        config |= {"k": 2, "rescale_acts_by_decoder_norm": True, "metadata": {"hook_name": "blocks.1.hook_resid_post"}}
    if kind == "topk, old":
        config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
        config |= {"hook_name": "blocks.1.hook_resid_post"}
    if kind == "jumprelu":
        w["threshold"] = torch.tensor([0.5, 0.1, -0.3, 0.0, 1.0, 0.2, 0.4])
    found = load_dictionary(write_saelens(tmp_path / "s", w, **config), n_layers=2)
    norm = w["W_dec"].norm(dim=1) if kind == "topk" else torch.ones(7)
    before = ((x - w["b_dec"] * (centred is not False)) @ w["W_enc"] + w["b_enc"]) * norm
    if architecture == "topk":
        top = before.topk(2, dim=-1)
        f = torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())
    else:
        f = before.relu() * (before > w["threshold"].relu() if kind == "jumprelu" else 1)
    torch.testing.assert_close(found.dictionary.encode(x), f, atol=1e-4, rtol=1e-4)
    expected = (f / norm) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(found.dictionary.decode(found.dictionary.encode(x)), expected, atol=1e-4, rtol=1e-4)
    assert found.where == ("before unembed" if architecture == "topk" else None)


def test_scaled_activations_of_saelens(tmp_path):
    w, x = raw_weights(), torch.randn(9, 5)
    folder = write_saelens(
        tmp_path / "s", w, normalize_activations="expected_average_only_in", apply_b_dec_to_input=True
    )
    with pytest.raises(InputError, match="scale="):
        load_dictionary(folder)
    d = load_dictionary(folder, scale=1.7).dictionary
    f = ((1.7 * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(d.encode(x), f, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.decode(f), (f @ w["W_dec"] + w["b_dec"]) / 1.7)


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "JumpReluAutoEncoder",
        "MatryoshkaBatchTopKSAE",
    ],
)
def test_folders_of_dictionary_learning_compute_what_it_computes(tmp_path, name):
    """Their encode and decode (dictionary.py and trainers/), written again from their description."""
    w, x = raw_weights(), torch.randn(40, 5)
    stored = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    stored |= {bias: w["b_dec"], "k": torch.tensor(2), "threshold": torch.tensor(0.4)}
    before = (x - (0 if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else w["b_dec"])) @ w["W_enc"] + w["b_enc"]
    f = before.relu()
    if name == "AutoEncoderTopK":
        top = f.topk(2, dim=-1)
        f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        f = f * (f > 0.4)
    if name == "MatryoshkaBatchTopKSAE":
        stored = w | {"threshold": torch.tensor(0.4), "group_sizes": torch.tensor([3, 4])}
    scale = torch.ones(7)
    if name == "JumpReluAutoEncoder":
        stored = w | {"threshold": torch.full((7,), 0.3)}
        scale = w["W_dec"].norm(dim=1)
        f = before * (before > 0.3) * scale
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}}))
    (tmp_path / "ae.pt").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="weights_only=True"):
        load_dictionary(tmp_path)
    save_file({n: t.contiguous() for n, t in stored.items()}, str(tmp_path / "ae.safetensors"))
    d = load_dictionary(tmp_path).dictionary
    torch.testing.assert_close(d.encode(x), f, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.decode(d.encode(x)), (f / scale) @ w["W_dec"] + w["b_dec"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "change", "error"),
    [
        ({"architecture": "gated"}, {}, InputError),
        ({"normalize_activations": "layer_norm"}, {}, InputError),
        ({"architecture": "topk"}, {}, CorruptFileError),
        ({"architecture": "topk", "k": 99}, {}, CorruptFileError),
        ({"architecture": "jumprelu"}, {}, CorruptFileError),
        ({"apply_b_dec_to_input": "yes"}, {}, CorruptFileError),
        ({}, {"W_enc": torch.zeros(7, 5)}, CorruptFileError),
        ({}, {"b_enc": torch.full((7,), torch.nan)}, CorruptFileError),
    ],
)
def test_broken_folders_are_refused(tmp_path, config, change, error):
    with pytest.raises(error):
        load_dictionary(write_saelens(tmp_path / "s", raw_weights() | change, **config))


def test_other_refusals_of_folders(tmp_path):
    with pytest.raises(StorageError):
        load_dictionary(tmp_path)
    folder = write_saelens(tmp_path / "s", {"W_enc": torch.zeros(5, 7)})
    with pytest.raises(CorruptFileError, match="lacks"):
        load_dictionary(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(CorruptFileError, match="object"):
        load_dictionary(folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="class None"):
        load_dictionary(tmp_path)
    basis = Dictionary(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), "identity")
    with pytest.raises(InputError, match="identity"):
        save_dictionary(basis, tmp_path / "d")


@pytest.mark.parametrize("where", ["blocks.3.mlp", "blocks.12.attn", "blocks.0.attn.code", "before blocks.2.mlp"])
def test_hooks_and_places_are_names_of_the_same(where):
    assert place_of(hook_of(where)) == where
    assert hook_of("embed") is None
    assert place_of("hook_embed") is None
