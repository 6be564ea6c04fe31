"""Closed forms against brute force; budgets are kept; structure survives."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import random_model
from oracles import naive_run

import unweave
from unweave.capture import capture
from unweave.compression import channel_moments, refine_factors
from unweave.compression.allocation import Budgeter, compress, mean_divergence
from unweave.compression.baselines import activation_svd, fisher_rows, pca_slicing, plain_svd, row_fisher_svd
from unweave.compression.factors import compensated_write, eliminate_neurons, pivot, root, spectrum, to_map, worth
from unweave.compression.head_parts import QueryKeyPart, ValueOutputPart
from unweave.data import float_data, from_tensor
from unweave.errors import InputError, NonFiniteError
from unweave.execution import run
from unweave.scope import Scope
from unweave.storage import load_graph, save_graph
from unweave.subspaces import node_subspaces

pytestmark = pytest.mark.filterwarnings("ignore")


def psd(n, rank=None):
    x = torch.randn(n, rank or 2 * n).double()
    return x @ x.T / n


def test_the_spectrum_is_the_best_low_rank_matrix_in_its_metric():
    w, a, g = torch.randn(5, 7).double(), psd(7), psd(5)
    seen = spectrum(w, a, g)

    def cost(other):
        d = w - other
        return 0.5 * torch.trace(g @ d @ a @ d.T)

    for r in range(6):
        best = seen.left[:, :r] @ seen.right[:r]
        assert torch.allclose(cost(best), seen.nats[r:].sum(), rtol=1e-4)
        for _ in range(20):
            nudged = (seen.left[:, :r] + 0.02 * torch.randn(5, r).double()) @ (
                seen.right[:r] + 0.02 * torch.randn(r, 7).double()
            )
            assert cost(nudged) >= cost(best) - 1e-9


def test_a_singular_moment_is_no_trouble():
    half, inverse = root(psd(6, 2))
    assert torch.isfinite(half).all()
    assert torch.isfinite(inverse).all()
    assert torch.isfinite(root(torch.zeros(3, 3))[1]).all()


def test_pivoting_stores_the_same_matrix_in_fewer_numbers():
    left, right = torch.randn(6, 3).double(), torch.randn(3, 8).double()
    basis, pivoted = pivot(right)
    assert torch.allclose(basis @ pivoted.dense(), right)
    cut = to_map(left, right, torch.float64)
    assert torch.allclose(cut.dense(), left @ right)
    assert cut.n_parameters == 3 * (6 + 8 - 3)
    assert to_map(left[:, :0], right[:0], torch.float64).dense().abs().max() == 0


def test_the_first_neuron_given_up_is_the_cheapest_and_its_price_is_right():
    write, code2, felt = torch.randn(4, 5).double(), psd(5), psd(4)
    plan = eliminate_neurons(write, code2, felt)

    def lost(kept):
        kept = torch.tensor(kept)
        new = torch.zeros_like(write)
        new[:, kept] = compensated_write(write, code2, kept)
        d = write - new
        return float(0.5 * torch.trace(felt @ d @ code2 @ d.T))

    truth = {tuple(sorted(set(range(5)) - {j})): lost([i for i in range(5) if i != j]) for j in range(5)}
    best = min(truth, key=truth.get)
    assert int(plan.order[0]) not in best
    assert plan.nats[1] == pytest.approx(truth[best], rel=1e-2)
    pairs = [lost(list(kept)) for kept in itertools.combinations(range(5), 3)]
    assert min(pairs) * 0.98 <= float(plan.nats[2]) <= max(pairs)


FAMILIES = ["gpt2", "gpt_neox", "llama-tied-biased", "qwen3", "gemma2"]


def setup(name):
    graph = capture(random_model(name), verify=False)
    data = from_tensor(torch.randint(50, (24, 12), generator=torch.Generator().manual_seed(2)))
    return graph, data, channel_moments(graph, data, Scope(), samples=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_equal_those_of_the_plainest_executor(name):
    graph, data, moments = setup(name)
    small = data.select(slice(0, 2))
    m = channel_moments(graph, small, Scope())[len([s for s in graph.stages if s.kind == "embed"])]
    stage = next(s for s in graph.stages if s.kind == "attn")
    _, _, heard = naive_run(graph, small.tokens.long())
    x = heard[f"{stage.nodes[0]}.q"].flatten(0, 1)
    n = stage.ports[0].norm.apply(x).double()
    assert torch.allclose(m.inputs["q"], n.mean(0), atol=1e-5)
    assert torch.allclose(m.inputs2["q"], torch.cov(n.T, correction=0), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_lost_where_nothing_is_dropped(name):
    graph, data, moments = setup(name)
    full = Budgeter(graph, moments).lossless()
    x = data.tokens[:4].long()
    assert torch.allclose(run(full, x).logits, run(graph, x).logits, atol=2e-3)
    assert full.n_channel_parameters <= graph.n_channel_parameters * 1.05


def with_keys_and_values_of_rank_one():
    """A GPT-2, random biases and all, in which one dimension of every head's keys and values says everything."""
    model = random_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            maps, d = block.attn.c_attn, block.attn.embed_dim
            maps.bias.normal_()
            for start in range(d, 3 * d, d // block.attn.num_heads):
                head = maps.weight[:, start : start + d // block.attn.num_heads]
                u, s, v = torch.linalg.svd(head, full_matrices=False)
                head.copy_(s[0] * torch.outer(u[:, 0], v[0]))
    return capture(model, verify=False)


@pytest.mark.parametrize("part_of", [ValueOutputPart, QueryKeyPart])
def test_more_dimensions_than_a_head_has_do_no_harm(part_of):
    graph = with_keys_and_values_of_rank_one()
    data = from_tensor(torch.randint(50, (24, 12), generator=torch.Generator().manual_seed(2)))
    moments = channel_moments(graph, data, Scope())
    far = []
    for rank in range(5):
        stages = list(graph.stages)
        for s, m in moments.items():
            if stages[s].kind == "attn":
                part = part_of(stages[s], m)
                choice = part.choose(0.0)
                stages[s] = part.apply(stages[s], choice._replace(ranks=(rank,) * len(choice.ranks)))
        small = unweave.Graph(tuple(stages), graph.info)
        far.append(mean_divergence(graph, small, data, Scope()))
    assert far[0] > 1e-4
    assert max(far[1:]) < 1e-6


def test_pivots_stay_small_where_rows_depend_on_each_other():
    right = torch.randn(4, 1).double() @ torch.randn(1, 9).double() + 1e-8 * torch.randn(4, 9).double()
    basis, pivoted = pivot(right)
    assert float(pivoted.rest.abs().max()) < 10
    assert torch.allclose(basis @ pivoted.dense(), right, atol=1e-12)


def test_directions_that_are_rounding_are_worth_nothing():
    seen = spectrum(torch.randn(5, 2).double() @ torch.randn(2, 6).double(), psd(6), psd(5))
    assert int((seen.nats > 0).sum()) == 2
    assert torch.equal(worth(torch.tensor([3.0, 1.0, 1e-6])), torch.tensor([4.5, 0.5, 0.0]))


def test_numbers_that_gain_nothing_are_not_stored(induction, induction_data):
    """All sizes above what it takes to lose nothing give the same graph."""
    moments = channel_moments(induction, induction_data, Scope("answered"))
    budgeter = Budgeter(induction, moments)
    stored = {budgeter.at_size(size).n_channel_parameters for size in (0.999, 0.8, 0.6)}
    assert len(stored) == 1
    assert max(stored) <= budgeter.lossless().n_channel_parameters < 0.6 * induction.n_channel_parameters
    assert mean_divergence(induction, budgeter.at_size(0.8), induction_data, Scope("answered")) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [0.7, 0.45])
def test_budgets_are_kept_and_the_graph_still_runs_everywhere(name, size, tmp_path):
    graph, data, moments = setup(name)
    small = unweave.compress(graph, data, size=size, moments=moments)
    assert small.n_channel_parameters <= size * graph.n_channel_parameters
    assert small.n_channel_parameters >= (size - 0.12) * graph.n_channel_parameters
    assert small.n_edges == graph.n_edges
    x = data.tokens[:2, :7].long()
    assert torch.allclose(run(small, x).logits, naive_run(small, x)[0], atol=1e-4)
    means = unweave.collect_means(small, data)
    cut = small.restrict(small.possible_edges & (torch.rand(small.possible_edges.shape) < 0.6), means=means)
    assert torch.allclose(run(cut, x).logits, naive_run(cut, x)[0], atol=1e-4)
    back = load_graph(save_graph(cut, tmp_path / "g"))
    assert torch.equal(run(back, x).logits, run(cut, x).logits)
    exact = unweave.score_edges(small, data.select(slice(0, 2)), method="exact", means=means)
    assert torch.isfinite(exact.nats[small.edge_matrix]).all()


def test_smaller_is_further_and_we_beat_the_baselines_on_the_zoo(induction, induction_data):
    data, scope = induction_data, Scope("answered")
    moments = channel_moments(induction, data, scope)
    far = [
        mean_divergence(induction, unweave.compress(induction, data, scope, size=s, moments=moments), data, scope)
        for s in (0.15, 0.12, 0.1)
    ]
    assert far == sorted(far)
    rows = fisher_rows(induction, data)
    rivals = [
        plain_svd(induction, 0.5),
        activation_svd(induction, 0.5, moments),
        row_fisher_svd(induction, 0.5, rows),
        pca_slicing(induction, 0.5, moments)[0],
    ]
    ours = mean_divergence(induction, unweave.compress(induction, data, scope, size=0.5, moments=moments), data, scope)
    assert ours < 0.2 * min(mean_divergence(induction, r, data, scope) for r in rivals)


def test_baselines_are_what_they_say(induction, induction_data):
    moments = channel_moments(induction, induction_data, Scope("answered"))
    plain = plain_svd(induction, 0.5)
    w = induction.stages[2].write.dense()
    got = plain.stages[2].write
    u, s, v = torch.linalg.svd(w)
    r = got.left.shape[1]
    assert torch.allclose(got.dense(), (u[:, :r] * s[:r]) @ v[:r], atol=1e-5)
    assert plain.n_channel_parameters <= 0.5 * induction.n_channel_parameters
    a = moments[2].code2 + torch.outer(moments[2].code, moments[2].code)
    white = activation_svd(induction, 0.5, moments).stages[2].write.dense().double()
    best = torch.trace((w.double() - white) @ a @ (w.double() - white).T)
    assert best <= torch.trace((w.double() - got.dense().double()) @ a @ (w.double() - got.dense().double()).T)
    sliced, paths, numbers = pca_slicing(induction, 0.5, moments)
    assert numbers <= 0.5 * induction.n_channel_parameters
    assert len(paths) == 2 * 4


def test_a_budget_in_nats_is_kept(induction, induction_data):
    scope = Scope("answered")
    small = unweave.compress(induction, induction_data, scope, kl_nats=0.05)
    assert mean_divergence(induction, small, induction_data, scope) <= 0.05
    assert small.n_channel_parameters < 0.7 * induction.n_channel_parameters


def test_refinement_brings_the_graph_closer_and_resumes(induction, induction_data, tmp_path, monkeypatch):
    scope = Scope("answered")
    small = unweave.compress(induction, induction_data, scope, size=0.12)
    before = mean_divergence(induction, small, induction_data, scope)
    options = {"steps": 12, "batch_size": 8, "learning_rate": 3e-3}
    better = refine_factors(small, induction, induction_data, scope, **options)
    assert mean_divergence(induction, better, induction_data, scope) < before
    assert better.n_parameters == small.n_parameters
    import unweave.compression.refinement as module

    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 5)
    real, calls = module._loss, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_loss", dying)
    path = tmp_path / "refine.safetensors"
    with pytest.raises(KeyboardInterrupt):
        refine_factors(small, induction, induction_data, scope, checkpoint=path, **options)
    resumed = refine_factors(small, induction, induction_data, scope, checkpoint=path, **options)
    x = induction_data.tokens[:2].long()
    assert torch.allclose(run(resumed, x).logits, run(better, x).logits, atol=1e-3)
    with pytest.raises(NonFiniteError, match="diverged"):
        monkeypatch.setattr(module, "_loss", lambda *a: torch.tensor(torch.nan, requires_grad=True))
        refine_factors(small, induction, induction_data, scope, steps=1)


def test_subspaces_are_ordered_and_as_wide_as_the_rank(induction, induction_data):
    scope = Scope("answered")
    small = unweave.compress(induction, induction_data, scope, size=0.5)
    spaces = node_subspaces(small, channel_moments(small, induction_data, scope))
    for s in (2, 3):
        for i, node in enumerate(small.stages[s].nodes):
            for space in spaces[node].values():
                assert (space.nats.diff() <= 1e-9).all()
            assert len(spaces[node]["write"].nats) == small.stages[s].code_widths[i]


@pytest.mark.parametrize(
    "budget", [{}, {"size": 0.5, "kl_nats": 0.1}, {"size": 0.0}, {"size": 1.5}, {"kl_nats": -1.0}, {"size": 0.001}]
)
def test_bad_budgets_are_refused(induction, induction_data, budget):
    with pytest.raises(InputError):
        unweave.compress(induction, induction_data, **budget)


def test_a_cut_graph_is_refused(induction, induction_data):
    with pytest.raises(InputError, match="cut edges"):
        unweave.compress(induction.restrict(induction.edges[1:], ablation="zero"), induction_data, size=0.5)


def test_a_plain_mlp_is_compressed(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 21), torch.nn.ReLU(), torch.nn.Linear(21, 21), torch.nn.Tanh(), torch.nn.Linear(21, 3)
    )
    graph, data = capture(model), float_data(torch.randn(64, 7))
    scope = Scope(divergence="gaussian")
    errors = []
    for size in (0.9, 0.6, 0.4):
        small = compress(graph, data, scope, size=size)
        assert small.n_channel_parameters <= size * graph.n_channel_parameters
        errors.append(mean_divergence(graph, small, data, scope))
    assert errors[0] < 0.3 * errors[2]
    assert errors == sorted(errors)


def test_moments_of_heads_of_unequal_widths_are_those_of_their_own_codes(induction_data):
    graph, data = capture("zoo:induction"), induction_data
    small = compress(graph, data, size=0.2)
    widths = [stage.code_widths for stage in small.stages if stage.kind == "attn"]
    assert any(len(set(w)) > 1 for w in widths)
    for s, m in channel_moments(small, data, Scope()).items():
        (batch,) = data.batches(len(data))
        codes = [run(small, batch.inputs, record=[f"{n}.code"]).values[f"{n}.code"] for n in small.stages[s].nodes]
        own = torch.cat([c[..., :w] for c, w in zip(codes, small.stages[s].code_widths, strict=True)], -1)
        flat = own[batch.mask].double()
        torch.testing.assert_close(m.code, flat.mean(0))
        torch.testing.assert_close(m.code2, torch.cov(flat.T, correction=0), atol=1e-6, rtol=1e-5)
