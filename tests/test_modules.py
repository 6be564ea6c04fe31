"""Modules against brute force, against graphs without any, and on networks whose modules are known."""

from __future__ import annotations

import dataclasses
import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare
from sklearn.cluster import SpectralClustering
from torch import nn

import unweave
from unweave import tree
from unweave.capture import capture
from unweave.data import float_data
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.execution import run
from unweave.modules.communication import Communication, measure_communication
from unweave.modules.criterion import Criterion, possible_pairs
from unweave.modules.nulls import expected_nats, reinitialise, rewire, shuffle_weights
from unweave.modules.partition import Partition
from unweave.modules.partitioners import (
    _between,
    _gain,
    _join_costs,
    _moved,
    louvain_partitions,
    sbm_partitions,
    spectral_partitions,
)
from unweave.modules.search import find_modules, modules_of
from unweave.modules.significance import NullTest, null_test
from unweave.scope import Scope
from unweave.scoring import score_edges


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layered(n_layers, width, seed=0, within=1.0, between=1.0, blocks=2, chain=False, density=1.0):
    """A random communication in layers: (it, which pairs are possible, the blocks planted)."""
    g = generator(seed)
    layer = torch.arange(n_layers).repeat_interleave(width)
    n = len(layer)
    distance = layer[:, None] - layer
    possible = distance == 1 if chain else distance > 0
    block = torch.cat([torch.randperm(width, generator=g) % blocks for _ in range(n_layers)])
    scale = torch.where(block[:, None] == block, within, between)
    nats = 0.02 * torch.exp(torch.randn(n, n, generator=g, dtype=torch.float64)) * scale * possible
    nats = nats * torch.exp(0.5 * torch.randn(n, generator=g, dtype=torch.float64))
    nats = nats * (torch.rand(n, n, generator=g) < density)
    nodes = tuple(f"n{i}" for i in range(n))
    told = Communication(nodes, nats, torch.ones(n, n), tuple(layer.tolist()))
    return told, possible, Partition(nodes, tuple(block.tolist()))


def random_weights(n=9, seed=0):
    w = torch.rand(n, n, generator=generator(seed), dtype=torch.float64)
    w = w * (torch.rand(n, n, generator=generator(seed + 1)) < 0.6)
    return w.triu(1) + w.triu(1).T


def set_partitions(n):
    """Every partition of n things, as labels."""
    out = [(0,)]
    for _ in range(n - 1):
        out = [(*p, b) for p in out for b in range(max(p) + 2)]
    return out


# ---- partitions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [(0, 0, 1, 1, 2, 0, 2, 1, 3), (0,) * 9, tuple(range(9))])
def test_cut_and_modularity_are_those_of_plain_loops(labels):
    nodes, w = tuple("abcdefghi"), random_weights()
    partition = Partition(nodes, labels)
    degree = [sum(float(w[i, j]) for j in range(9)) for i in range(9)]
    cut, q, total = 0.0, 0.0, sum(degree)
    for b in set(labels):
        volume = sum(degree[i] for i in range(9) if labels[i] == b)
        leaving = sum(float(w[i, j]) for i in range(9) for j in range(9) if labels[i] == b != labels[j])
        cut += leaving / volume
    for i, j in itertools.product(range(9), repeat=2):
        if labels[i] == labels[j]:
            q += (float(w[i, j]) - degree[i] * degree[j] / total) / total
    assert math.isclose(partition.n_cut(w), cut, abs_tol=1e-12)
    assert math.isclose(partition.relative_n_cut(w), (1 + cut) / len(set(labels)), abs_tol=1e-12)
    assert math.isclose(partition.modularity(w), q, abs_tol=1e-12)
    blocks = [{i for i in range(9) if labels[i] == b} for b in set(labels)]
    theirs = nx.community.modularity(nx.from_numpy_array(w.numpy()), blocks, weight="weight")
    assert math.isclose(partition.modularity(w), theirs, abs_tol=1e-12)


def test_adjusted_rand_is_the_agreement_over_pairs_corrected_for_chance():
    g = generator()
    a, b = torch.randint(3, (10,), generator=g).tolist(), torch.randint(3, (10,), generator=g).tolist()
    names = tuple("abcdefghij")
    pairs = list(itertools.combinations(range(10), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = sum(a[i] == a[j] for i, j in pairs), sum(b[i] == b[j] for i, j in pairs)
    chance = in_a * in_b / len(pairs)
    truth = (both - chance) / ((in_a + in_b) / 2 - chance)
    other = Partition(names[::-1], tuple(b[::-1]))  # the order of the nodes must not matter
    assert math.isclose(Partition(names, tuple(a)).adjusted_rand(other), truth)


def test_a_partition_does_not_depend_on_how_blocks_are_numbered():
    a = Partition(("a", "b", "c", "d"), (9, 2, 9, 4))
    assert a == Partition(("a", "b", "c", "d"), (0, 1, 0, 2)) == Partition.from_blocks("abcd", [["c", "a"]])
    assert a.blocks == {"module.0": ("a", "c"), "module.1": ("b",), "module.2": ("d",)}
    assert (a["c"], a.n_blocks, len(a), a.is_trivial) == (0, 3, 4, True)
    coarse = Partition(a.nodes, (0, 1, 0, 1))
    assert not coarse.is_trivial
    assert a.within(coarse)
    assert not coarse.within(a)
    assert not a.within(Partition(a.nodes, (0, 0, 1, 1)))


def test_nonsensical_partitions_and_weights_are_refused():
    a = Partition(("a", "b", "c"), (0, 0, 1))
    w = torch.tensor([[0.0, 1, 0], [1, 0, 2], [0, 2, 0]])
    with pytest.raises(InputError, match="one label per node"):
        Partition(("a", "b"), (0,))
    with pytest.raises(InputError, match="'a' is in the partition twice"):
        Partition(("a", "a"), (0, 1))
    with pytest.raises(InputError, match="c is in two blocks"):
        Partition.from_blocks("abc", ["ac", "bc"])
    with pytest.raises(UnknownNameError, match="no node is named 'x'"):
        Partition.from_blocks("abc", ["ax"])
    with pytest.raises(UnknownNameError, match="no node is named 'x'"):
        a["x"]
    with pytest.raises(InputError, match="different nodes"):
        a.adjusted_rand(Partition(("a", "b", "d"), (0, 0, 1)))
    with pytest.raises(ShapeError, match=r"\[3, 3\]"):
        a.n_cut(torch.zeros(2, 2))
    with pytest.raises(InputError, match="not negative"):
        a.modularity(-w)
    with pytest.raises(InputError, match="finite"):
        a.modularity(w * math.nan)
    with pytest.raises(InputError, match="symmetric"):
        a.n_cut(w.tril())
    with pytest.raises(InputError, match="zero diagonal"):
        a.n_cut(w + torch.eye(3))


# ---- criterion ------------------------------------------------------------------------------------------


def plain_bits(told, possible, labels, tokens, by_dimension):
    """The description length by one loop over edges and counting every partition of the same sizes."""
    n = len(labels)
    sizes = sorted(labels.count(b) for b in set(labels))
    alike = [p for p in set_partitions(n) if sorted(p.count(b) for b in set(p)) == sizes]
    bits = math.log2(len({tuple(sorted(p.count(b) for b in set(p))) for p in set_partitions(n)}))
    bits += math.log2(len(alike))
    lists = {}
    for j, i in possible.nonzero().tolist():
        price = math.log2(tokens) / 2 * (max(1.0, float(told.dimensions[j, i])) if by_dimension else 1.0)
        said = tokens * float(told.nats[j, i]) / math.log(2)
        bits += min(price, said)
        lists.setdefault(tuple(sorted((labels[j], labels[i]))), []).append(said > price)
    bits += sum(math.log2(len(kept) + 1) + math.log2(math.comb(len(kept), sum(kept))) for kept in lists.values())
    inside = [k for pair, kept in lists.items() for k in kept if pair[0] == pair[1]]
    between = [k for pair, kept in lists.items() for k in kept if pair[0] != pair[1]]
    if inside and between and sum(inside) / len(inside) < sum(between) / len(between):
        return math.inf
    return bits


@pytest.mark.parametrize("by_dimension", [False, True])
def test_description_length_is_that_of_plain_loops(by_dimension):
    g = generator(3)
    possible = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    possible[2, 1] = False
    nats = 0.1 * torch.rand(5, 5, generator=g, dtype=torch.float64) ** 2 * possible
    nats[1, 0] = 0.0
    told = Communication(tuple("abcde"), nats, 3 * torch.rand(5, 5, generator=g), (0, 1, 1, 2, 3))
    criterion = Criterion(told, possible, 100, by_dimension)
    every = set_partitions(5)
    bits = criterion.bits(torch.tensor(every))
    infinite = 0
    for labels, found in zip(every, bits.tolist(), strict=True):
        truth = plain_bits(told, possible, labels, 100, by_dimension)
        described = criterion.describe(Partition(told.nodes, labels))
        infinite += math.isinf(truth)
        assert math.isclose(found, truth, rel_tol=1e-9)
        assert math.isclose(described.bits, truth, rel_tol=1e-9)
        n_inside = sum(labels[j] == labels[i] for j, i in possible.nonzero().tolist())
        assert (described.n_inner, described.n_between) == (n_inside, 9 - n_inside)
        assert described.n_kept_inside + described.n_kept == int(criterion.kept.sum())
    assert 0 < infinite < 40
    # small tables at a time, the same bits
    assert torch.equal(torch.cat([criterion.bits(torch.tensor([labels])) for labels in every]), bits)


def test_relative_nats_are_those_of_plain_loops():
    told, _, _ = layered(3, 3, density=0.7)
    found = told.relative().nats
    for j, i in itertools.product(range(9), repeat=2):
        x = float(told.nats[j, i])
        share = x / math.sqrt(float(told.nats[j].sum()) * float(told.nats[:, i].sum())) if x else 0.0
        assert math.isclose(float(found[j, i]), 0.5 * math.log(1 + share), rel_tol=1e-9)
    # a saturated network says the same, a node that says nothing but rounding is idle
    louder = dataclasses.replace(told, nats=1e-6 * told.nats)
    torch.testing.assert_close(louder.relative().nats, found)
    nats = torch.zeros(3, 3, dtype=torch.float64)
    nats[1, 0], nats[2, 1] = 1.0, 1e-12
    assert (
        dataclasses.replace(told, nodes=("a", "b", "c"), nats=nats, dimensions=nats, layer=(0, 1, 2))
        .relative()
        .nats.count_nonzero()
        == 1
    )


def test_idle_nodes_are_set_aside():
    told, possible, truth = layered(4, 3, seed=1, within=10.0, between=0.01)
    nats = told.nats.clone()
    nats[5], nats[:, 5] = 0.0, 0.0
    found = modules_of(dataclasses.replace(told, nats=nats), possible, tokens=300, n_null=19)
    assert "n5" not in found.criterion.communication.nodes
    assert ("n5",) in found.partition.blocks.values()
    assert found.active_partition == truth.restricted([n for n in told.nodes if n != "n5"])
    assert found.description.bits == found.criterion.describe(found.active_partition).bits
    silent = modules_of(dataclasses.replace(told, nats=0 * told.nats), possible, tokens=300, n_null=19)
    assert not silent.significant()
    assert silent.partition.n_blocks == 1


def test_steps_lead_to_a_partition_that_no_step_improves():
    told, possible, _ = layered(4, 3, within=5.0, between=0.1)
    criterion = Criterion(told, possible, 200)
    start = Partition(told.nodes, (0, 1, 2) * 4)
    end = criterion.improve(start)
    here = criterion.describe(end).bits
    assert here < criterion.describe(start).bits
    for node, block in itertools.product(range(12), range(end.n_blocks + 1)):
        step = Partition(told.nodes, (*end.labels[:node], block, *end.labels[node + 1 :]))
        assert criterion.describe(step).bits >= here - 1e-6
    for a, b in itertools.combinations(range(end.n_blocks), 2):
        joined = Partition(told.nodes, tuple(a if label == b else label for label in end.labels))
        assert criterion.describe(joined).bits >= here - 1e-6


def test_the_search_finds_the_best_of_all_partitions():
    told, possible, truth = layered(4, 2, seed=1, within=10.0, between=0.01)
    found = modules_of(told, possible, tokens=300, n_null=19)
    every = [Partition(told.nodes, labels) for labels in set_partitions(8)]
    bits = found.criterion.bits(torch.tensor([p.labels for p in every]))
    assert found.partition == every[int(bits.argmin())] == truth
    value = {t.statistic: t.value for t in found.tests}
    assert math.isclose(value["saved_bits"], float(bits[0] - bits.min()), rel_tol=1e-9)


def test_what_no_description_can_be_is_refused():
    told, possible, _ = layered(3, 2)
    with pytest.raises(InputError, match="at least 2 tokens"):
        Criterion(told, possible, 1)
    with pytest.raises(ShapeError, match=r"\[6, 6\]"):
        Criterion(told, possible[:5, :5], 100)
    with pytest.raises(InputError, match="execution order"):
        Criterion(told, possible & False, 100)
    with pytest.raises(InputError, match="not negative"):
        Criterion(Communication(told.nodes, -told.nats, told.dimensions, told.layer), possible, 100)
    with pytest.raises(InputError, match="other nodes"):
        Criterion(told, possible, 100).describe(Partition(("a",), (0,)))


def test_possible_pairs_are_those_of_the_edges(induction):
    possible = possible_pairs(induction)
    truth = {(edge.dst, edge.src) for edge in induction.edges}
    assert {(induction.nodes[j], induction.nodes[i]) for j, i in possible.nonzero().tolist()} == truth
    cut = induction.restrict([], ablation="zero")
    assert torch.equal(possible_pairs(cut), possible)


# ---- partitioners ---------------------------------------------------------------------------------------


def test_spectral_blocks_are_those_of_scikit_learn():
    for seed in range(3):
        told, _, _ = layered(4, 5, seed=seed, within=8.0)
        weights = told.symmetric()
        affinity = weights.numpy() + 1e-9
        for partition in spectral_partitions(told.nodes, weights, 5):
            k = partition.n_blocks
            model = SpectralClustering(k, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
            assert partition == Partition(told.nodes, tuple(model.fit_predict(affinity).tolist()))


def likelihood(labels, w, e):
    total = 0.0
    for r, s in itertools.product(set(labels), repeat=2):
        rows, columns = [i for i, b in enumerate(labels) if b == r], [i for i, b in enumerate(labels) if b == s]
        m = sum(float(w[i, j]) for i in rows for j in columns)
        expected = sum(float(e[i, j]) for i in rows for j in columns)
        total += 0.5 * m * math.log(m / expected) if m > 0 else 0.0
    return total


def test_joins_and_moves_cost_what_the_likelihood_says():
    w, e = random_weights(8, 4), torch.rand(8, 8, generator=generator(5), dtype=torch.float64)
    e = (e + e.T).fill_diagonal_(0)
    labels = [0, 1, 2, 0, 1, 3, 2, 0]
    here = likelihood(labels, w, e)
    costs = _join_costs(*_between(torch.tensor(labels), w, e))
    for a, b in itertools.combinations(range(4), 2):
        joined = [a if label == b else label for label in labels]
        assert math.isclose(float(costs[a, b]), here - likelihood(joined, w, e), abs_tol=1e-9)
    member = torch.nn.functional.one_hot(torch.tensor(labels)).double()
    rise = _gain(*(_moved(member, torch.tensor(labels), x) for x in (w, e))).sum((2, 3)) / 2
    for v, b in itertools.product(range(8), range(4)):
        moved = [*labels[:v], b, *labels[v + 1 :]]
        assert math.isclose(float(rise[v, b]), likelihood(moved, w, e), abs_tol=1e-9)


@pytest.mark.parametrize("method", [spectral_partitions, louvain_partitions, sbm_partitions])
def test_every_method_finds_blocks_that_are_clear(method):
    for seed in range(5):
        told, _, truth = layered(5, 6, seed=seed, within=1.0, between=0.01, blocks=3)
        proposed = method(told.nodes, told.symmetric(), 6)
        assert max(partition.adjusted_rand(truth) for partition in proposed) == 1.0
        assert all(1 < partition.n_blocks <= 6 for partition in proposed)
    assert method(("a", "b", "c"), torch.zeros(3, 3), 2) == []
    with pytest.raises(InputError, match="symmetric"):
        method(told.nodes, told.nats, 4)


# ---- nulls ----------------------------------------------------------------------------------------------


def test_rewiring_keeps_weights_order_and_degrees():
    told, possible, _ = layered(5, 4, density=0.7)
    kept = told.nats > 0.02
    place = torch.tensor(told.layer)
    drawn = rewire(told, possible, 4, generator(), kept)
    for sample in drawn:
        edge = sample.nats > 0.02
        assert torch.equal(sample.nats.flatten().sort()[0], told.nats.flatten().sort()[0])
        assert not bool(sample.nats[~possible].any())
        assert torch.equal(edge.sum(0), kept.sum(0))
        assert torch.equal(edge.sum(1), kept.sum(1))
        # what a reader hears is dealt to other writers
        assert torch.equal(sample.nats.sort(1)[0], told.nats.sort(1)[0])
        for a, b in itertools.combinations(range(5), 2):
            assert edge[place == b][:, place == a].sum() == kept[place == b][:, place == a].sum()
        assert (edge != kept).sum() > 0.3 * kept.sum()
    assert not torch.equal(drawn[0].nats, drawn[1].nats)
    assert torch.equal(rewire(told, possible, 4, generator(), kept)[3].nats, drawn[3].nats)
    # one who joins all has nothing to swap
    full = layered(2, 3)[0]
    assert torch.equal(rewire(full, full.nats > 0, 1, generator())[0].nats, full.nats)


def test_rewiring_makes_all_graphs_of_the_same_degrees_alike_often():
    """Three writers, three readers, one edge each: six graphs."""
    nats = torch.zeros(6, 6, dtype=torch.float64)
    nats[3, 0] = nats[4, 1] = nats[5, 2] = 1.0
    told = Communication(tuple("abcdef"), nats, torch.ones(6, 6), (0, 0, 0, 1, 1, 1))
    possible = torch.zeros(6, 6, dtype=torch.bool)
    possible[3:, :3] = True
    drawn = [tuple(x.nats[3:, :3].argmax(1).tolist()) for x in rewire(told, possible, 600, generator())]
    counts = [drawn.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 600
    assert chisquare(counts).pvalue > 1e-3


def test_expected_nats_have_the_sums_that_were_measured():
    told, possible, _ = layered(5, 3)
    expected = expected_nats(told, possible)
    assert torch.allclose(expected.sum(1), told.nats.sum(1), rtol=1e-2)
    assert torch.allclose(expected.sum(0), told.nats.sum(0), rtol=1e-2)
    assert not bool(expected[~possible].any())
    distance = torch.tensor(told.layer)[:, None] - torch.tensor(told.layer)
    for d in range(1, 5):
        assert math.isclose(expected[distance == d].sum(), told.nats[distance == d].sum(), rel_tol=1e-2)


@pytest.mark.parametrize("change", [shuffle_weights, reinitialise])
def test_networks_without_modules_keep_each_tensors_numbers_and_nothing_else(change, induction, induction_data):
    other = change(induction, generator())
    again = change(induction, generator())
    assert other.nodes == induction.nodes
    assert other.n_edges == induction.n_edges
    changed = 0
    for (path, a), (_, b), (_, c) in zip(*(tree.leaves(g.stages) for g in (induction, other, again)), strict=True):
        assert torch.equal(b, c), path
        if a.ndim < 2:
            assert torch.equal(a, b), path
            continue
        changed += not torch.equal(a, b)
        if change is shuffle_weights:
            assert torch.equal(a.flatten().sort()[0], b.flatten().sort()[0]), path
        else:
            assert abs(float(a.mean() - b.mean())) < 5 * float(a.std()) / a.numel() ** 0.5
            assert abs(float(b.std() / a.std()) - 1) < 5 / a.numel() ** 0.5
    assert changed >= 10
    assert bool(run(other, next(induction_data.batches(2)).inputs).logits.isfinite().all())


def test_p_and_z_are_those_of_counting():
    found = [0.1, 0.5, 0.3, 0.4]
    test = null_test("rewired", "modularity", 0.4, found)
    assert isinstance(test, NullTest)
    assert (test.p, test.percentile, test.n_null) == (3 / 5, 50.0, 4)
    assert math.isclose(test.z, (0.4 - np.mean(found)) / np.std(found, ddof=1))
    assert null_test("rewired", "n_cut", 0.1, found).p == 2 / 5  # there little is good
    assert math.isnan(null_test("rewired", "modularity", 0.4, [0.2, 0.2]).z)


@pytest.mark.parametrize("chain", [False, True])
def test_random_graphs_have_modules_no_more_often_than_the_level(chain):
    """Layers alone, readers and writers of unequal strength, heavy tails: none of it is a module."""
    # three nulls decide at a level of a quarter: as sharp a check of p as nineteen at a twentieth, at a fifth of the time
    n_graphs, level, false = 60, 0.25, {"saved_bits": 0, "modularity": 0, "n_cut": 0}
    for seed in range(n_graphs):
        told, possible, _ = layered(3, 3, seed=1000 + seed, chain=chain)
        options = {"tokens": 100, "n_null": 3, "level": level, "methods": ("spectral",), "max_blocks": 3}
        found = modules_of(told, possible, seed=seed, **options)
        for name in false:
            false[name] += found.p["rewired", name] <= level
    assert all(n <= binom.ppf(0.999, n_graphs, level) for n in false.values()), false


# ---- the search as a whole ------------------------------------------------------------------------------


def test_planted_blocks_are_found_and_weak_ones_less_and_less():
    mean = []
    for between in (0.01, 0.7, 5.0):
        agreement, yes = [], []
        for seed in range(5):
            told, possible, truth = layered(5, 4, seed=seed, within=5.0, between=between)
            # the nulls matter for the clear ones alone
            options = {"n_null": 19, "methods": ("spectral", "sbm")} if between == 0.01 else {"n_null": 1, "level": 0.5}
            found = modules_of(told, possible, tokens=300, seed=seed, **options)
            agreement.append(found.partition.adjusted_rand(truth))
            yes.append(found.significant())
        mean.append(sum(agreement) / 5)
        if between == 0.01:
            assert agreement == [1.0] * 5
            assert all(yes)
    assert mean[0] >= mean[1] > mean[2] + 0.2
    assert abs(mean[2]) < 0.2


def block_diagonal(seed, modular=True, width=6, depth=3, size=4):
    """A plain MLP of two that do not talk to each other, neurons shuffled: (graph of neurons, data, their blocks)."""
    g = generator(seed)
    sizes = (size, *[width] * depth, size)
    block = [(torch.arange(n) % 2)[torch.randperm(n, generator=g)] for n in sizes]
    layers = []
    for a, b in itertools.pairwise(block):
        layer = nn.Linear(len(a), len(b))
        weight = torch.rand(len(b), len(a), generator=g) + 0.3
        layer.weight.data = weight * (b[:, None] == a) if modular else weight / 2
        layer.bias.data = torch.zeros(len(b))
        layers += [layer, nn.ReLU()]
    graph = capture(nn.Sequential(*layers[:-1])).refine({f"layers.{i}": width for i in range(depth)})
    of = {f"layers.{i}.part.{k}": int(block[i + 1][k]) for i in range(depth) for k in range(width)}
    data = float_data(torch.rand(96, size, generator=g))
    return graph, data, Partition(tuple(of), tuple(of.values()))


GAUSSIAN = Scope(divergence="gaussian")


def test_neurons_of_two_networks_in_one_are_told_apart():
    for seed in range(5):
        graph, data, truth = block_diagonal(seed)
        nulls = ("rewired", "shuffled") if seed == 0 else ("rewired",)
        options = {"n_null": 19, "n_networks": 19, "batch_size": 96, "methods": ("spectral", "sbm")}
        found = find_modules(graph, data, GAUSSIAN, nulls=nulls, seed=seed, **options)
        assert found.partition.restricted(truth.nodes).adjusted_rand(truth) == 1.0
        assert found.significant()
    assert {null for null, _ in found.p} == {"rewired"}
    assert found.graph is not None
    assert set(found.graph.modules.values()) == set(found.partition.blocks)
    inputs = next(data.batches(8)).inputs
    assert torch.equal(run(found.graph, inputs).logits, run(graph, inputs).logits)


def test_a_plain_network_is_layered_and_not_modular():
    graph, data, _ = block_diagonal(0, modular=False)
    untrained = []

    def make(seed):
        untrained.append(seed)
        return block_diagonal(seed + 1, modular=False)[0]

    options = {"n_null": 19, "n_networks": 19, "batch_size": 96, "methods": ("spectral",)}
    found = find_modules(graph, data, GAUSSIAN, untrained=make, seed=4, **options)
    assert not found.significant()
    assert untrained == list(range(4, 23))
    assert {null for null, _ in found.z} == {"rewired", "untrained"}


def test_rows_are_plain_and_add_up():
    told, possible, _ = layered(4, 4, within=1.0, between=0.02)
    found = modules_of(told, possible, tokens=300, n_null=19)
    rows = found.table()
    inside = sum(row["inside_nats"] for row in rows)
    assert math.isclose(inside + sum(row["sent_nats"] for row in rows), float(told.nats.sum()))
    assert math.isclose(sum(r["heard_nats"] for r in rows), sum(r["sent_nats"] for r in rows))
    assert sorted(node for row in rows for node in row["nodes"]) == sorted(told.nodes)
    curve = found.curve()
    assert [row["blocks"] for row in curve] == sorted(row["blocks"] for row in curve)
    assert curve[0]["blocks"] == 1
    assert min(row["bits"] for row in curve) == found.description.bits
    parts = ("partition_bits", "inner_bits", "interface_bits", "lost_inside_bits", "lost_bits")
    assert all(math.isclose(row["bits"], sum(row[name] for name in parts)) for row in curve)
    assert found.modularity == found.partition.modularity(told.relative().symmetric())
    again = modules_of(told, possible, tokens=300, n_null=19)
    assert again.hierarchy == found.hierarchy
    assert again.tests == found.tests


def test_neurons_of_a_plain_layer_write_one_coordinate_each():
    """A refined layer without a write matrix of its own: edges are worth what cutting them costs."""
    graph, data, _ = block_diagonal(0)
    inputs = next(data.batches(4)).inputs
    names = [n for n in graph.nodes if n.startswith("layers.1.")]
    values = run(graph, inputs, record=names).values
    for k, name in enumerate(names):
        assert bool((values[name][..., [i for i in range(6) if i != k]] == 0).all())
    exact = score_edges(graph, data, GAUSSIAN, method="exact", batch_size=96)
    fisher = score_edges(graph, data, GAUSSIAN, samples=8, batch_size=96)
    edges = graph.edge_matrix
    assert torch.corrcoef(torch.stack([exact.nats[edges], fisher.nats[edges]]))[0, 1] > 0.9
    told = measure_communication(graph, data, GAUSSIAN)
    assert not bool(told.nats[~possible_pairs(graph)].any())


def test_nonsense_is_refused(induction, induction_data):
    told, possible, _ = layered(3, 2)
    with pytest.raises(UnknownNameError, match="no method is named 'leiden'"):
        modules_of(told, possible, tokens=100, methods=("leiden",))
    with pytest.raises(InputError, match="no method"):
        modules_of(told, possible, tokens=100, methods=())
    with pytest.raises(UnknownNameError, match="no null is named 'random'"):
        find_modules(induction, induction_data, nulls=("random",))
    with pytest.raises(InputError, match="n_null=18 null samples cannot reach the level 0.05; take at least 19"):
        modules_of(told, possible, tokens=100, n_null=18)
    with pytest.raises(InputError, match="n_networks=5"):
        find_modules(induction, induction_data, nulls=("shuffled",), n_networks=5)
    with pytest.raises(InputError, match="between 0 and 1"):
        modules_of(told, possible, tokens=100, level=5.0)
    with pytest.raises(InputError, match="max_blocks must be from 2 to 5"):
        modules_of(told, possible, tokens=100, max_blocks=6)
    with pytest.raises(InputError, match="nothing was held against a null"):
        find_modules(unweave.capture("zoo:induction"), induction_data, nulls=()).significant()
    with pytest.raises(InputError, match="untrained network has other nodes"):
        find_modules(induction, induction_data, untrained=lambda seed: block_diagonal(seed)[0])
    small = Communication(told.nodes[:2], told.nats[:2, :2], told.dimensions[:2, :2], told.layer[:2])
    with pytest.raises(InputError, match="no modules to look for"):
        modules_of(small, possible[:2, :2], tokens=100)
