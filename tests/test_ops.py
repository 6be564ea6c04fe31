"""Each op against the plainest code for the same thing."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from families import CONFIGS, random_model
from naive_executor import PLAIN_ACTIVATIONS, naive_norm, naive_pattern, naive_rotary, naive_visible
from torch import Tensor

from unweave.capture import capture
from unweave.errors import InputError, ShapeError
from unweave.ops import (
    ACTIVATIONS,
    Activation,
    Attention,
    Context,
    Convolution,
    Dense,
    FloatInput,
    Identity,
    LayerNorm,
    LinearMap,
    Lookup,
    LowRank,
    Masked,
    Pivoted,
    Placed,
    Readout,
    Repeated,
    RMSNorm,
    Rotary,
    Stacked,
)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def context(n_pos: int, batch: int = 2, mask: Tensor | None = None) -> Context:
    return Context(torch.zeros(batch, n_pos, dtype=torch.long), mask)


# ---- linear maps ---------------------------------------------------------------------------------------------


def pivoted(rank: int = 3, d: int = 7) -> Pivoted:
    order = torch.randperm(d)
    return Pivoted(rand(rank, d - rank), order[:rank], order[rank:])


LINEAR_MAPS = {
    "dense": (lambda: Dense(rand(5, 7)), 35),
    "convolution": (lambda: Convolution(rand(3, 2, 2, 2), (3, 3), padding=(1, 0)), 3 * 2 * 2 * 2),
    "identity": (lambda: Identity(7), 0),
    "placed": (lambda: Placed(6), 0),
    "placed-apart": (lambda: Placed(6, 2, 9), 0),
    "low-rank": (lambda: LowRank(rand(5, 2), Dense(rand(2, 7))), 10 + 14),
    "low-rank-zero": (lambda: LowRank(rand(5, 0), Dense(rand(0, 7))), 0),
    "pivoted": (lambda: pivoted(), 3 * 4),
    "pivoted-full": (lambda: pivoted(7), 0),
    "low-rank-pivoted": (lambda: LowRank(rand(5, 3), pivoted()), 15 + 12),
    "repeated": (lambda: Repeated(Dense(rand(5, 7)), (3, 4), 2), 35),
    "repeated-identity": (lambda: Repeated(Identity(6), (6,), 3), 0),
    "stacked": (
        lambda: Stacked((Dense(rand(2, 7)), pivoted(), LowRank(rand(4, 1), Dense(rand(1, 7))))),
        14 + 12 + 11,
    ),
    "masked": (lambda: Masked.keep(rand(5, 7), torch.arange(35).reshape(5, 7) % 3 == 0), 12 + 2),
    "masked-empty": (lambda: Masked.keep(rand(5, 7), torch.zeros(5, 7, dtype=torch.bool)), 2),
    "masked-full": (lambda: Masked.keep(rand(4, 8), torch.ones(4, 8, dtype=torch.bool)), 32 + 1),
}


@pytest.fixture(params=sorted(LINEAR_MAPS))
def linear(request) -> LinearMap:
    return LINEAR_MAPS[request.param][0]()


def matrix_of(linear: LinearMap) -> Tensor:
    """Column by column: the images of the basis vectors."""
    return torch.stack([linear.apply(e) for e in torch.eye(linear.d_in, dtype=torch.float64)], dim=1)


def test_apply_is_the_product_with_the_dense_matrix(linear):
    dense = linear.dense().double()
    assert dense.shape == (linear.d_out, linear.d_in)
    assert torch.allclose(matrix_of(linear), dense, atol=1e-12)
    x = rand(2, 3, linear.d_in)
    assert torch.allclose(linear.apply(x), torch.einsum("oi,bti->bto", dense, x), atol=1e-12)


def test_select_outputs_picks_rows_and_minus_one_is_a_row_of_zeros(linear):
    n = linear.d_out
    index = torch.tensor([n - 1, -1, 0, 0, -1])
    dense = linear.dense().double()
    rows = [dense[i] if i >= 0 else torch.zeros(linear.d_in).double() for i in index.tolist()]
    picked = linear.select_outputs(index)
    assert picked.d_out == 5
    assert torch.allclose(picked.dense().double(), torch.stack(rows), atol=1e-12)
    everything = linear.select_outputs(torch.arange(n))
    assert torch.allclose(everything.dense().double(), dense, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LINEAR_MAPS))
def test_a_map_counts_the_numbers_it_stores(name):
    make, expected = LINEAR_MAPS[name]
    linear = make()
    assert linear.n_parameters == expected
    places = 4 * 2 if isinstance(linear, Convolution) else 1
    assert linear.n_multiplications == (len(linear.values) if isinstance(linear, Masked) else expected * places)


def test_a_masked_map_stays_one_when_outputs_or_inputs_are_picked():
    linear = LINEAR_MAPS["masked"][0]()
    rows = linear.select_outputs(torch.tensor([4, -1, 0]))
    assert isinstance(rows, Masked)
    assert len(rows.values) == int(linear.mask[[4, 0]].sum())
    columns = linear.select_inputs(torch.tensor([6, 0, 1]))
    assert torch.equal(columns.dense(), linear.dense()[:, [6, 0, 1]])
    assert len(columns.values) == int(linear.mask[:, [6, 0, 1]].sum())


def test_a_masked_map_needs_one_value_per_kept_position():
    with pytest.raises(ShapeError, match="keeps 12 positions"):
        Masked(rand(11), torch.arange(35).reshape(5, 7) % 3 == 0)


def test_pivoted_has_the_identity_at_its_pivots():
    linear = pivoted()
    assert torch.equal(linear.dense()[:, linear.pivots], torch.eye(3, dtype=torch.float64))
    assert torch.equal(linear.dense()[:, linear.others], linear.rest)


# ---- norms -----------------------------------------------------------------------------------------------------

NORMS = {
    "rms": lambda: RMSNorm(rand(6), 1e-3),
    "rms-wide": lambda: RMSNorm(rand(6), 1e-3, True),
    "layer": lambda: LayerNorm(rand(6), rand(6), 1e-3),
    "layer-no-bias": lambda: LayerNorm(rand(6), None, 1e-3),
}


@pytest.fixture(params=sorted(NORMS))
def norm(request) -> RMSNorm | LayerNorm:
    return NORMS[request.param]()


def test_norms_follow_their_formula(norm):
    x = rand(2, 3, 6) * 4
    assert torch.allclose(norm.apply(x), naive_norm(norm, x), atol=1e-12)
    low = norm.apply(x.to(torch.bfloat16)) if isinstance(norm, RMSNorm) else None
    if low is not None:  # gains of another precision do not decide the precision of the result
        narrow = dataclasses.replace(norm, gain=norm.gain.float())
        assert narrow.scale(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_closed_vjp_is_autograds(norm):
    x, g = rand(2, 3, 6).requires_grad_(), rand(2, 3, 6)
    (truth,) = torch.autograd.grad(norm.apply(x), x, g)
    assert torch.allclose(norm.vjp(x.detach(), g), truth, atol=1e-12)


def test_the_jacobian_of_a_read_is_what_fold_and_standardise_say(norm):
    x, weight = rand(6).requires_grad_(), rand(4, 6)
    truth = torch.autograd.functional.jacobian(lambda x: weight @ norm.apply(x), x)
    n, s = norm.standardise(x.detach())
    assert torch.allclose(s * norm.fold(weight) @ (torch.eye(6).double() - torch.outer(n, n) / 6), truth, atol=1e-12)


def test_standardised_vectors_have_unit_size():
    x = rand(3, 6) * 100
    for make in NORMS.values():
        n, s = make().standardise(x)
        assert torch.allclose(n.pow(2).mean(-1), torch.ones(3).double(), atol=1e-5)
        assert bool((s > 0).all())


def test_scale_is_the_factor_of_rms_norm():
    norm, x = RMSNorm(rand(6), 1e-3), rand(3, 6)
    assert torch.allclose(x * norm.scale(x), norm.apply(x), atol=1e-12)


def test_norms_count_their_parameters():
    assert [NORMS[name]().n_parameters for name in ("rms", "layer", "layer-no-bias")] == [6, 12, 6]


# ---- pointwise cores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_follow_their_formula(name):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).reshape(1, 1, 41, 1)
    up = rand(1, 1, 41, 1)
    plain = PLAIN_ACTIVATIONS[name](x)
    assert torch.allclose(Activation(name).forward((x,), context(41, 1)), plain, atol=1e-12)
    assert torch.allclose(Activation(name).forward((x, up), context(41, 1)), plain * up, atol=1e-12)


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(InputError, match="unknown activation 'gleu'; known:"):
        Activation("gleu")


def test_readout_scales_and_caps():
    a = rand(2, 1, 3, 5) * 9
    assert torch.equal(Readout().forward((a,), context(3)), a)
    capped = Readout(softcap=2.0, scale=0.5).forward((a,), context(3))
    assert torch.allclose(capped, 2 * torch.tanh(a / 4), atol=1e-12)
    assert float(capped.abs().max()) <= 2


def test_lookup_reads_the_row_of_the_token_or_of_the_position():
    table, tokens = rand(9, 4), torch.tensor([[3, 3, 8], [0, 1, 2]])
    by_token = Lookup(table, "token", 2.0).forward((), Context(tokens))
    by_position = Lookup(table, "position").forward((), Context(tokens))
    for b in range(2):
        for t in range(3):
            assert torch.equal(by_token[b, 0, t], 2 * table[tokens[b, t]])
            assert torch.equal(by_position[b, 0, t], table[t])
    assert Lookup(table).n_parameters == 36


def test_float_input_is_the_input_and_refuses_others():
    x = torch.randn(2, 3, 4)
    assert torch.equal(FloatInput(4).forward((), Context(x)), x[:, None])
    with pytest.raises(InputError, match="reads real vectors"):
        FloatInput(5).forward((), Context(x))
    with pytest.raises(InputError, match="reads real vectors"):
        FloatInput(4).forward((), context(3))


# ---- attention -------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "full": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1]],
    "nothing": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 9])
def test_attention_sees_what_a_brute_force_mask_says(mask, causal, window):
    rows = MASKS[mask]
    m = None if rows is None else torch.tensor(rows, dtype=torch.bool)
    core = Attention(2, 2, 0.7, causal, window)
    q, k, v = rand(2, 2, 6, 3), rand(2, 2, 6, 3), rand(2, 2, 6, 4)
    pattern = core.pattern(q, k, context(6, mask=m))
    truth = torch.stack([naive_pattern(core, q[:, h], k[:, h], m) for h in range(2)], dim=1)
    assert torch.allclose(pattern, truth, atol=1e-12)
    assert torch.equal(pattern > 0, naive_visible(core, 2, 6, m)[:, None].expand(-1, 2, -1, -1) > 0)
    assert torch.allclose(core.forward((q, k, v), context(6, mask=m)), truth @ v, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_grouped_capped_normed_turned_attention_is_the_naive_one(kv_heads, softcap):
    rotary = Rotary(torch.tensor([1.0, 0.1]), 1.3)
    norms = {"q_norm": RMSNorm(rand(6), 1e-5), "k_norm": RMSNorm(rand(6), 1e-5)}
    core = Attention(4, kv_heads, 0.9, softcap=softcap, rotary=rotary, **norms)
    q, k, v = rand(2, 4, 5, 6), rand(2, kv_heads, 5, 6), rand(2, kv_heads, 5, 3)
    codes = core.forward((q, k, v), context(5))
    for h in range(4):
        group = h * kv_heads // 4
        truth = naive_pattern(core, q[:, h], k[:, group]) @ v[:, group]
        assert torch.allclose(codes[:, h], truth, atol=1e-12)
    assert core.n_parameters == 12


def test_attention_for_picked_nodes_has_a_key_for_each():
    core = Attention(4, 2, 1.0).for_nodes(torch.tensor([3, 3, 0]))
    assert (core.n_heads, core.n_kv_heads) == (3, 3)


@pytest.mark.parametrize("name", [n for n, make in CONFIGS.items() if hasattr(make(), "rope_parameters")])
def test_rotary_is_the_hugging_face_modules(name):
    model, n_pos = random_model(name), 20
    graph = capture(model, verify=False)
    body = model.gpt_neox if hasattr(model, "gpt_neox") else model.model
    modeling = importlib.import_module(type(model).__module__)
    for layer, stage in enumerate(s for s in graph.stages if s.kind == "attn"):
        core = stage.core
        assert isinstance(core, Attention)
        assert core.rotary is not None
        x = torch.randn(2, 4, n_pos, stage.ports[0].reads[0].widths[0])
        positions = torch.arange(n_pos)[None]
        nested = any(isinstance(v, dict) for v in model.config.rope_parameters.values())
        extra = (model.config.layer_types[layer],) if nested else ()
        truth, _ = modeling.apply_rotary_pos_emb(x, x, *body.rotary_emb(x, positions, *extra))
        assert torch.allclose(core.rotary.turn(x, context(n_pos)), truth, atol=1e-6)
        assert torch.allclose(naive_rotary(core.rotary, x[:, 0]), truth[:, 0], atol=1e-6)


def test_rotary_keeps_lengths_and_depends_on_distances_only():
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.01]))
    q, k = rand(1, 1, 1, 8).expand(1, 1, 6, 8), rand(1, 1, 1, 8).expand(1, 1, 6, 8)
    a, b = rotary.turn(q, context(6, 1)), rotary.turn(k, context(6, 1))
    assert torch.allclose(a.norm(dim=-1), q.norm(dim=-1))
    scores = (a @ b.transpose(-1, -2))[0, 0]
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-6)
    assert torch.equal(a[..., 6:], q[..., 6:])


def test_tables_are_made_once_per_run():
    rotary, here = Rotary(torch.ones(2)), context(4)
    assert rotary.tables(here, torch.float32)[0] is rotary.tables(here, torch.float32)[0]
    assert rotary.tables(here, torch.float64)[0].dtype == torch.float64
    assert math.isclose(float(rotary.tables(here, torch.float64)[1][1, 0]), math.sin(1.0), abs_tol=1e-7)


def test_a_context_repeated_is_copy_major():
    mask = torch.tensor([[True, True], [True, False]])
    bigger = Context(torch.tensor([[1, 2], [3, 4]]), mask).expand(2)
    assert bigger.inputs.tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert bigger.mask is not None
    assert bigger.mask.tolist() == [[True, True], [True, False]] * 2
