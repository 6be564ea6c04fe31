"""Masked matrices: closed forms against brute force, budgets, constants, the sweep, peers, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import CONFIGS, random_model
from oracles import naive_run
from safetensors.torch import load_file, save_file
from torch import nn

import unweave
from unweave.capture import capture
from unweave.compression import channel_moments, compensation, refine_factors
from unweave.compression.allocation import mean_divergence
from unweave.compression.baselines import magnitude, sparse_regression, wanda
from unweave.compression.compensation import sweep
from unweave.compression.masks import Metric, solve, sparsify
from unweave.compression.matrices import channel_matrices, matrix_moments
from unweave.compression.refinement import trainable
from unweave.data import TokenData, from_tensor
from unweave.errors import CorruptFileError, InputError, NonFiniteError
from unweave.execution import run
from unweave.ops import Masked
from unweave.scope import Scope
from unweave.storage import load_graph, save_graph
from unweave.tree import replace_tensors, tensors

pytestmark = pytest.mark.filterwarnings("ignore")
SCOPE = Scope("answered")


def psd(n):
    x = torch.randn(n, 2 * n).double()
    scale = torch.rand(n).double() + 0.2
    return x @ x.T / n * scale[:, None] * scale


def random_problem(out=2, into=3, dtype=torch.float64):
    """(W, damped A, damped G, the metric), with correlations that matter."""
    w, a, g = torch.randn(out, into).double(), psd(into), psd(out)

    def damped(m):
        return m + 1e-2 * torch.diag(m.diagonal() + 1e-6 * m.diagonal().mean())

    return w, damped(a), damped(g), Metric.of(w, a, g, 1e-2, dtype)


def cost(w, new, a, g):
    return float(0.5 * torch.trace(g @ (w - new) @ a @ (w - new).T))


def exact_values(w, mask, a, g):
    """The constrained minimum over matrices that vanish outside the mask, as one linear system."""
    hessian = torch.kron(g, a)  # of the matrix read row by row
    kept = mask.flatten()
    new = torch.zeros_like(w).flatten()
    new[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ w.flatten())[kept])
    return new.reshape(w.shape)


# ---- the closed form ------------------------------------------------------------------------------------


def test_nats_and_the_step_towards_the_matrix_are_what_they_say():
    w, a, g, metric = random_problem(4, 5)
    other = torch.randn(4, 5).double()
    assert metric.nats(other) == pytest.approx(cost(w, metric.weight(other), a, g), rel=1e-4)
    assert torch.allclose(metric.weight(metric.goal), w)
    step = metric.nearest(other, 0.7)

    def objective(v):
        return metric.nats(v) + 0.35 * float((v - other).square().sum())

    for _ in range(20):
        assert objective(step + 0.02 * torch.randn(4, 5).double()) > objective(step)


def test_values_for_given_masks_converge_to_the_constrained_minimum():
    w, a, g, metric = random_problem(4, 5)
    (v,), (mask,) = solve([metric], 9, polish=3000)
    assert int(mask.sum()) == 9
    assert torch.equal(v != 0, mask)
    assert torch.allclose(metric.weight(v), exact_values(w, mask, a, g), atol=1e-5)


def test_masks_are_no_worse_than_thresholds_and_close_to_brute_force():
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        w, a, g, metric = random_problem()
        (v,), (mask,) = solve([metric], 3, polish=60)
        found = cost(w, metric.weight(v), a, g)
        threshold = torch.zeros(6, dtype=torch.bool)
        threshold[metric.goal.abs().flatten().topk(3).indices] = True
        assert found <= cost(w, w * threshold.reshape(2, 3), a, g) * (1 + 1e-6)
        every = []
        for kept in itertools.combinations(range(6), 3):
            one = torch.zeros(6, dtype=torch.bool)
            one[list(kept)] = True
            every.append(cost(w, exact_values(w, one.reshape(2, 3), a, g), a, g))
        assert found >= min(every) * (1 - 1e-6)
        assert found < sorted(every)[len(every) // 2]
        ratios.append(found / min(every))
    assert sorted(ratios)[6] < 1.05  # half of them find the best mask of all


def test_all_matrices_share_one_threshold():
    w, a, g, large = random_problem(4, 5)
    small = Metric.of(1e-3 * w, a, g, dtype=torch.float64)
    _, masks = solve([large, small], 20)
    assert [int(m.sum()) for m in masks] == [20, 0]


def test_what_is_never_used_or_felt_gives_no_nan():
    for a, g in [(torch.zeros(5, 5), psd(4)), (psd(5), torch.zeros(4, 4)), (torch.zeros(5, 5), torch.zeros(4, 4))]:
        metric = Metric.of(torch.randn(4, 5), a, g)
        for count in (0, 7, 20):
            (v,), (mask,) = solve([metric], count)
            assert torch.isfinite(metric.weight(v)).all()
            assert int(mask.sum()) <= count


# ---- graphs ---------------------------------------------------------------------------------------------


def setup(name, dtype=torch.float32):
    graph = capture(random_model(name, dtype), verify=False)
    data = from_tensor(torch.randint(50, (8, 10), generator=torch.Generator().manual_seed(2)))
    return graph, data, channel_moments(graph, data, Scope(), samples=1)


def masks_of(graph):
    return {path: t for path, t in tensors(graph.stages).items() if path.endswith(".mask")}


@pytest.mark.parametrize("name", CONFIGS)
def test_budgets_are_kept_in_every_family_and_folders_bring_masks_back(name, tmp_path):
    graph, data, moments = setup(name)
    small = sparsify(graph, moments, 0.55)
    n = graph.n_channel_parameters
    assert 0.55 * n - 3 <= small.n_channel_parameters <= 0.55 * n
    assert all(isinstance(m.map, Masked) for m in channel_matrices(small).values())
    swept = sweep(small, graph, data.select(slice(0, 2)), moments)
    assert swept.n_channel_parameters == small.n_channel_parameters
    assert swept.n_edges == graph.n_edges
    x = data.tokens[:2, :7].long()
    assert torch.allclose(run(swept, x).logits, naive_run(swept, x)[0], atol=1e-4)
    back = load_graph(save_graph(swept, tmp_path / "g"))
    assert torch.equal(run(back, x).logits, run(swept, x).logits)
    pairs = zip(tensors(swept.stages).items(), tensors(back.stages).items(), strict=True)
    assert all(p == q and a.dtype == b.dtype and torch.equal(a, b) for (p, a), (q, b) in pairs)


def test_a_file_whose_values_do_not_fit_its_mask_is_refused(induction, induction_data, tmp_path):
    small = unweave.compress(induction, induction_data, SCOPE, size=0.5, form="sparse")
    path = save_graph(small, tmp_path / "g") / "weights.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith(".mask"))
    weights[name] = ~weights[name]
    save_file(weights, path)
    with pytest.raises(CorruptFileError, match="as many values"):
        load_graph(tmp_path / "g")


def test_bits_are_counted_as_stored(induction, induction_data):
    small = sparsify(induction, channel_moments(induction, induction_data, SCOPE), 0.5)
    maps = [m.map for m in channel_matrices(small).values()]
    stored = sum(t.numel() * (1 if t.dtype == torch.bool else 32) for m in maps for t in tensors(m).values())
    assert 0 <= 32 * sum(m.n_parameters for m in maps) - stored < 32 * len(maps)
    rest = [t for p, t in tensors(small.stages).items() if not p.endswith((".mask", ".values"))]
    assert small.size_bits == stored + sum(t.numel() * 8 * t.element_size() for t in rest)


def test_constants_stand_in_for_the_mean_of_what_is_left_out():
    graph, _, moments = setup("llama")
    small = sparsify(graph, moments, 0.5)
    new = channel_matrices(small)
    for place, (map_, bias) in channel_matrices(graph).items():
        mean = matrix_moments(graph, moments, place).mean.float()
        before = map_.dense() @ mean + (0 if bias is None else bias)
        assert torch.allclose(new[place].map.dense() @ mean + new[place].bias, before, atol=1e-4)


def test_a_norm_behind_the_write_is_taken_as_its_average_factor():
    graph, _, moments = setup("gemma2")
    for s, m in moments.items():
        stage, got = graph.stages[s], matrix_moments(graph, moments, (s, "write", 0))
        uncentred = m.code2 + torch.outer(m.code, m.code)
        w, gain = stage.write.dense().double(), stage.post.gain.double()
        power = torch.trace(w @ uncentred @ w.T) / len(w)
        assert torch.allclose(got.inputs2, uncentred)
        assert torch.allclose(got.felt2, torch.diag(gain) @ m.written2 @ torch.diag(gain) / power)
        assert torch.equal(got.mean, torch.zeros_like(m.code))
    assert all(stage.bias is None for stage in sparsify(graph, moments, 0.6).stages)


def test_other_precisions_keep_theirs():
    graph, data, moments = setup("llama", torch.bfloat16)
    small = sweep(sparsify(graph, moments, 0.6), graph, data, moments)
    assert all(m.map.values.dtype == torch.bfloat16 == m.bias.dtype for m in channel_matrices(small).values())
    assert torch.isfinite(run(small, data.tokens[:2].long()).logits).all()


def test_refinement_trains_the_kept_values_and_nothing_else(induction, induction_data):
    moments = channel_moments(induction, induction_data, SCOPE)
    small = sparsify(induction, moments, 0.2)
    assert {p for p in trainable(small) if "map" in p or "write" in p} == {
        p.replace(".mask", ".values") for p in masks_of(small)
    }
    better = refine_factors(small, induction, induction_data, SCOPE, steps=6, batch_size=8, learning_rate=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(masks_of(small).values(), masks_of(better).values(), strict=True))
    assert better.n_parameters == small.n_parameters
    for new in channel_matrices(better).values():
        assert not new.map.dense()[~new.map.mask].any()
    before = mean_divergence(induction, small, induction_data, SCOPE)
    assert mean_divergence(induction, better, induction_data, SCOPE) < before


def test_splitting_nodes_keeps_masks(induction, induction_data):
    small = sparsify(induction, channel_moments(induction, induction_data, SCOPE), 0.4)
    heads = [n for n in small.nodes if "head" in n]
    finer = small.refine(dict.fromkeys(heads, 2))
    assert len(finer.nodes) == len(small.nodes) + len(heads)
    assert abs(finer.n_channel_parameters - small.n_channel_parameters) <= len(masks_of(small))
    x = induction_data.tokens[:2].long()
    assert torch.allclose(run(finer, x).logits, run(small, x).logits, atol=1e-4)


# ---- the sweep ------------------------------------------------------------------------------------------


def heard_and_codes(graph, tokens, stage):
    """(what the stage reads after its norm, its codes, what all stages before have written), tokens in one row."""
    part = graph.stages[stage]
    _, written, heard = naive_run(graph, tokens)
    port = part.ports[0]
    x = heard[f"{part.nodes[0]}.{port.name}"]
    n = x if port.norm is None else port.norm.apply(x)
    codes = run(graph, tokens, record=[f"{node}.code" for node in part.nodes]).values
    before = sum(y for name, y in written.items() if graph.where[name][0] < stage)
    before = before + sum(s.bias for s in graph.stages[:stage] if s.bias is not None)
    flat = torch.cat([codes[f"{node}.code"] for node in part.nodes], -1)
    return n.flatten(0, 1).double(), flat.flatten(0, 1).double(), before.flatten(0, 1).double()


@pytest.mark.parametrize("number", [2, 3])  # attention and MLP of the second layer, parallel in gpt_neox
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_each_matrix_is_aimed_at_the_regression_on_what_it_really_reads(name, number):
    graph, data, moments = setup(name)
    small = sparsify(graph, moments, 0.5)
    s = sorted(moments)[number]
    tokens = data.tokens[:3].long()
    reads, writes, streams = zip(*(heard_and_codes(g, tokens, s) for g in (graph, small)), strict=True)
    matrices = channel_matrices(graph)
    for place, (x, y) in [((s, graph.stages[s].ports[0].name, 0), reads), ((s, "write", 0), writes)]:
        step = compensation._Step(graph, small, s, [place])
        sums = unweave.statistics.accumulate(data.select(slice(0, 3)), step, batch_size=2)
        seen = compensation._finish(sums, graph, place)
        w = matrices[place].map.dense().double()
        owed = streams[0] - streams[1] if place[1] == "write" and graph.stages[s].post is None else 0.0
        goal = x @ w.T + owed
        if graph.stages[s].post is None or place[1] != "write":
            goal, y = goal - goal.mean(0), y - y.mean(0)
        ridge = (0.1 * y.square().mean()) ** 0.5 * torch.eye(y.shape[1]).double()
        rows, answers = torch.cat([y / len(y) ** 0.5, ridge]), torch.cat([goal / len(y) ** 0.5, ridge @ w.T])
        truth = torch.linalg.lstsq(rows, answers).solution.T
        assert torch.allclose(compensation._goal(w, w, seen), truth, atol=2e-3 * float(truth.abs().max()))


def test_a_chain_of_layers_owes_nothing_and_can_be_masked():
    graph = capture(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)))
    data = TokenData(torch.randn(20, 4, 6), torch.ones(20, 4, dtype=torch.bool))
    assert compensation._Step(graph, graph, 2, [(2, "in", 0)]).heard_from == 2
    small = unweave.compress(graph, data, size=0.6, form="sparse")
    assert 0.6 * graph.n_channel_parameters - 1 <= small.n_channel_parameters <= 0.6 * graph.n_channel_parameters
    nothing = unweave.compress(graph, data, size=0.11, form="sparse")
    assert mean_divergence(graph, small, data, Scope()) < 0.1 * mean_divergence(graph, nothing, data, Scope())


def test_padding_does_not_count():
    graph, _, moments = setup("llama")
    small = sparsify(graph, moments, 0.5)
    tokens, s = torch.randint(1, 50, (2, 9)), sorted(moments)[1]
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    padded = TokenData(tokens.int() * mask, mask)
    for place in [(s, "in", 0), (s, "write", 0)]:
        step = compensation._Step(graph, small, s, [place])
        sums = unweave.statistics.accumulate(padded, step, batch_size=2)
        apart = [unweave.statistics.accumulate(from_tensor(t), step) for t in (tokens[:1], tokens[1:, :5])]
        assert int(sums["tokens"]) == 14
        assert all(torch.allclose(sums[k], apart[0][k] + apart[1][k], atol=1e-3) for k in sums)


def test_the_sweep_brings_the_zoo_closer_and_smaller_is_further(induction, induction_data):
    moments = channel_moments(induction, induction_data, SCOPE)
    far = []
    for size in (0.25, 0.15, 0.1):
        small = sparsify(induction, moments, size)
        swept = sweep(small, induction, induction_data, moments)
        before, after = (mean_divergence(induction, g, induction_data, SCOPE) for g in (small, swept))
        assert after < before
        assert swept.n_channel_parameters == small.n_channel_parameters
        far.append(after)
    assert far == sorted(far)


def test_what_is_not_finite_is_refused_with_its_place(induction, induction_data):
    moments = channel_moments(induction, induction_data, SCOPE)
    small = sparsify(induction, moments, 0.5)
    bad = {"0.core.table": torch.full_like(tensors(induction.stages)["0.core.table"], torch.nan)}
    broken = unweave.Graph(replace_tensors(induction.stages, bad), induction.info)
    with pytest.raises(NonFiniteError, match=r"blocks\.0"):
        sweep(small, broken, induction_data, moments)


# ---- budgets, peers, refusals ---------------------------------------------------------------------------


def test_both_forms_take_both_budgets(induction, induction_data):
    induction_data = induction_data.select(slice(0, 8))
    small = unweave.compress(induction, induction_data, SCOPE, kl_nats=0.05, form="sparse")
    assert mean_divergence(induction, small, induction_data, SCOPE) <= 0.05
    assert small.n_channel_parameters < 0.5 * induction.n_channel_parameters
    assert masks_of(small)
    assert not masks_of(unweave.compress(induction, induction_data, SCOPE, size=0.5))
    assert unweave.compress(induction, induction_data, SCOPE, size=1.0, form="sparse") is induction


def test_peers_keep_what_they_say_and_we_lose_less_than_those_that_adjust_nothing(induction, induction_data):
    moments = channel_moments(induction, induction_data, SCOPE)
    size, n = 0.3, induction.n_channel_parameters
    rivals = [magnitude(induction, size), wanda(induction, size, moments), sparse_regression(induction, size, moments)]
    assert all(0.25 * n < r.n_channel_parameters <= size * n for r in rivals)
    large, by_row, regressed = (channel_matrices(r) for r in rivals)
    for place, (map_, _) in channel_matrices(induction).items():
        w, mean = map_.dense(), moments[place[0]].code if place[1] == "write" else moments[place[0]].inputs[place[1]]
        kept = large[place].map
        assert w[kept.mask].abs().min() >= w[~kept.mask].abs().max()
        assert torch.equal(kept.values, w[kept.mask])
        a = matrix_moments(induction, moments, place).inputs2 + torch.outer(mean, mean)
        worth, mask = w.double().abs() * a.diagonal().sqrt(), by_row[place].map.mask
        assert len(set(mask.sum(1).tolist())) == 1
        for row, marks in zip(worth, mask, strict=True):
            assert row[marks].min() >= row[~marks].max() * (1 - 1e-5)
        errors = [w.double() - other[place].map.dense().double() for other in (large, by_row, regressed)]
        lost = [float(torch.trace(d @ a @ d.T)) for d in errors]
        assert lost[2] <= min(lost[:2]) * 1.05 + 1e-9
    ours = unweave.compress(induction, induction_data, SCOPE, size=size, form="sparse", moments=moments)
    ours = mean_divergence(induction, ours, induction_data, SCOPE)
    assert ours < 0.1 * min(mean_divergence(induction, r, induction_data, SCOPE) for r in rivals[:2])


@pytest.mark.parametrize("size", [0.0, -0.1, 1.2, 0.001, float("nan")])
def test_bad_sizes_are_refused(induction, induction_data, size):
    with pytest.raises(InputError, match="size"):
        sparsify(induction, channel_moments(induction, induction_data.select(slice(0, 2)), SCOPE), size)


def test_other_misuse_is_refused(induction, induction_data):
    moments = channel_moments(induction, induction_data, SCOPE)
    with pytest.raises(InputError, match="unknown form 'thin'; known: low-rank, sparse"):
        unweave.compress(induction, induction_data, size=0.5, form="thin")
    with pytest.raises(InputError, match="cut edges"):
        sparsify(induction.restrict(induction.edges[1:], ablation="zero"), moments, 0.5)
    with pytest.raises(InputError, match="no masks"):
        sweep(induction, induction, induction_data, moments)
    other, _, others = setup("llama")
    with pytest.raises(InputError, match="no moments"):
        sparsify(induction, others, 0.5)
    narrow = unweave.compress(induction, induction_data, SCOPE, size=0.12)
    with pytest.raises(InputError, match="take them from this very graph"):
        sparsify(narrow, moments, 0.5)
    with pytest.raises(InputError, match="no masks, or others"):
        sweep(sparsify(other, others, 0.5), induction, induction_data, moments)
    for peer in (magnitude, lambda g, size: wanda(g, size, moments)):
        with pytest.raises(InputError, match="masks, biases and norms"):
            peer(induction, 0.01)
