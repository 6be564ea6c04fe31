"""Two networks compared: dense oracles, copies in other coordinates, true heads of other sizes, refusals."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import unweave
from unweave import zoo
from unweave.capture import capture
from unweave.data import TokenData, from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import check_inputs, run, trace
from unweave.features import collect_activations, find_basis
from unweave.graph import Graph
from unweave.modules.nulls import NETWORK_NULLS
from unweave.retrodiction import head_matching
from unweave.retrodiction.claims import over_pairs, pair_interval
from unweave.retrodiction.induction import _chance, _right, phase_window
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import collect_means
from unweave.universality import (
    align_tokens,
    compare_edges,
    cross_moments,
    fit_stitch,
    linear_cka,
    load_aligned,
    match,
    match_features,
    mean_max_cosine,
    principal_cosines,
    procrustes,
    similarities,
    stitch,
    svcca,
)
from unweave.universality.aligning import Units
from unweave.universality.matching import BY, assign
from unweave.zoo.toy import ToyConfig, ToyTransformer

CONFIG = ToyConfig(2, 3, 16, 4, 0, d_vocab=11, d_out=11, n_ctx=12)
PREVIOUS, INDUCTION = "blocks.0.attn.head.0", "blocks.1.attn.head.1"


def ragged(n: int = 7, seed: int = 0, vocabulary: int = 11) -> TokenData:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (n, 12), generator=generator)
    mask = torch.arange(12) < torch.randint(4, 13, (n, 1), generator=generator)
    return from_tensor(tokens, mask)


def toy(seed: int = 0, config: ToyConfig = CONFIG) -> ToyTransformer:
    torch.manual_seed(seed)
    return ToyTransformer(config).eval()


@torch.no_grad()
def in_other_coordinates(model: ToyTransformer, order: list[list[int]], seed: int = 0) -> ToyTransformer:
    """The same function: the stream rotated, the heads of each layer in another order, values in another basis."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(c.d_model, c.d_model, generator=generator)).Q
    turn = torch.linalg.qr(torch.randn(c.d_head, c.d_head, generator=generator)).Q
    out = ToyTransformer(c)
    out.load_state_dict(model.state_dict())
    for name in ("W_E", "W_pos"):
        getattr(out, name).copy_(getattr(model, name) @ q)
    out.W_U.copy_(q.T @ model.W_U)
    for block, places in zip(out.blocks, order, strict=True):
        for name in ("W_Q", "W_K", "W_V"):
            getattr(block, name).copy_((q.T @ getattr(block, name))[places])
        for name in ("b_Q", "b_K", "b_V"):
            getattr(block, name).copy_(getattr(block, name)[places])
        block.W_O.copy_((block.W_O @ q)[places])
        block.b_O.copy_(block.b_O @ q)
        block.W_V.copy_(block.W_V @ turn)
        block.b_V.copy_(block.b_V @ turn)
        block.W_O.copy_(turn.T @ block.W_O)
    return out.eval()


def written(graph: Graph, data: TokenData, node: str) -> np.ndarray:
    """What a node writes at all real tokens, centred, float64."""
    batch = next(data.batches(len(data)))
    x = run(graph, batch.inputs, batch.mask, record=[node]).values[node][batch.mask].double().detach().numpy()
    return x - x.mean(0)


# ---- similarity: dense oracles ----------------------------------------------------------------------------


def dense_cka(x: np.ndarray, y: np.ndarray) -> float:
    a, b = x @ x.T, y @ y.T
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def dense_svcca(x: np.ndarray, y: np.ndarray) -> float:
    bases = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(z, full_matrices=False)
        share = (s**2).cumsum() / (s**2).sum()
        bases.append(u[:, : int((share < 0.99).sum()) + 1])
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return rho.mean()


def dense_procrustes(x: np.ndarray, y: np.ndarray) -> float:
    return np.linalg.norm(x.T @ y, "nuc") / (np.linalg.norm(x) * np.linalg.norm(y))


@pytest.mark.parametrize(
    ("function", "oracle"), [(linear_cka, dense_cka), (svcca, dense_svcca), (procrustes, dense_procrustes)]
)
def test_similarity_is_the_dense_one(function, oracle) -> None:
    a, b = capture(toy(0)), capture(toy(1, dataclasses.replace(CONFIG, n_heads=2, d_model=20, d_head=5)))
    data = ragged()
    moments = cross_moments(a, b, data, kinds=["attn"], batch_size=3)["attn"]
    found = function(moments)
    assert found.shape == (6, 4)
    for (i, n), (j, m) in itertools.product(enumerate(moments.nodes_a), enumerate(moments.nodes_b)):
        assert float(found[i, j]) == pytest.approx(oracle(written(a, data, n), written(b, data, m)), abs=1e-5)


def test_a_node_that_writes_a_constant_is_like_nothing() -> None:
    model = toy(0)
    with torch.no_grad():
        model.blocks[0].W_O[1] = 0
    graph = capture(model)
    for by in BY:
        found = similarities(graph, graph, ragged(), by=by)["attn"]
        assert bool(torch.isfinite(found).all())
        if by != "patterns":
            others = [i for i in range(6) if i != 1]
            assert float(found[1, others].abs().max()) < (0.7 if by == "behaviour" else 1e-6), by


def test_patterns_and_effects_by_plain_code() -> None:
    a, b, data = capture(toy(0)), capture(toy(1)), ragged()
    heads = [n for n in a.nodes if "head" in n]
    patterns = {}
    effects = {}
    for name, graph in (("a", a), ("b", b)):
        means = collect_means(graph, data)
        for head in heads:
            found, lost = [], []
            for row in range(len(data)):
                n = int(data.lengths[row])
                tokens = data.tokens[row : row + 1, :n].long()
                out = run(graph, tokens, record=[f"{head}.pattern"])
                even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
                found.append((out.values[f"{head}.pattern"][0] - even).flatten())
                p = out.logits[0].double().log_softmax(-1)
                q = run(graph, tokens, patch={head: means[head]}).logits[0].double().log_softmax(-1)
                lost.append(p.exp().sqrt() * (p - q))
            patterns[name, head] = torch.cat(found).detach().double().numpy()
            centred = torch.cat(lost).detach()
            effects[name, head] = (centred - centred.mean(0)).flatten().numpy()
    for by, values in (("patterns", patterns), ("effects", effects)):
        got = similarities(a, b, data, by=by, batch_size=2)["attn"].numpy()
        wanted = [[np.corrcoef(values["a", n], values["b", m])[0, 1] for m in heads] for n in heads]
        # effects are centred output by output, and then have mean 0: a correlation is their cosine
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_effects_count_where_the_scope_looks() -> None:
    a, b, data = capture(toy(0)), capture(toy(1)), ragged()
    marks = data.mask & (torch.arange(12) % 3 == 1)
    marked = dataclasses.replace(data, labels={"answered": marks})
    heads = [n for n in a.nodes if "head" in n]
    lost = {}
    for name, graph in (("a", a), ("b", b)):
        means = collect_means(graph, data)
        batch = next(data.batches(len(data)))
        p = run(graph, batch.inputs, batch.mask).logits.detach().double().log_softmax(-1)
        for head in heads:
            out = run(graph, batch.inputs, batch.mask, patch={head: means[head]}).logits.detach().double()
            found = (p.exp().sqrt() * (p - out.log_softmax(-1)))[marks[:, : p.shape[1]]]
            lost[name, head] = (found - found.mean(0)).flatten().numpy()
    wanted = [[np.corrcoef(lost["a", n], lost["b", m])[0, 1] for m in heads] for n in heads]
    scope = Scope(positions="answered")
    got = similarities(a, b, marked, by="effects", scope=scope, batch_size=3)["attn"].numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    everywhere = similarities(a, b, marked, by="effects")["attn"].numpy()
    assert np.abs(everywhere - wanted).max() > 0.05
    # where heads look, and what they write, counts everywhere
    for by in ("patterns", "cka"):
        torch.testing.assert_close(similarities(a, b, marked, by=by, scope=scope), similarities(a, b, data, by=by))


# ---- invariance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", BY)
def test_coordinates_and_order_change_nothing(by: str) -> None:
    model, other, data = toy(0), capture(toy(1)), ragged()
    order = [[2, 0, 1], [1, 2, 0]]
    turned = capture(in_other_coordinates(model, order))
    places = [*order[0], *(3 + i for i in order[1])]
    before, after = (similarities(g, other, data, by=by)["attn"] for g in (capture(model), turned))
    torch.testing.assert_close(after, before[places], atol=1e-5, rtol=0)
    matched = match(turned, capture(model), data, by=by, edges=False).of
    heads = [n for n in turned.nodes if "head" in n]
    assert matched == {heads[i]: heads[j] for i, j in enumerate(places)}


def test_edges_map_in_other_coordinates() -> None:
    model, data = zoo.load("induction"), unweave.load_data("zoo:induction", limit=16)
    assert isinstance(model, ToyTransformer)
    turned = capture(in_other_coordinates(model, [[1, 0], [1, 0]]))
    found = match(capture(model), turned, data, nulls=3, seed=1)
    assert found.of[PREVIOUS] == "blocks.0.attn.head.1"
    assert found.of[INDUCTION] == "blocks.1.attn.head.0"
    assert found.edges is not None
    assert found.edges.correlation > 0.95
    assert found.edges.p <= 0.1
    assert max(found.null) < 0.5 * found.score
    assert found.p == 0.25
    assert [row["b"] for row in found.table()] == list(found.of.values())


def test_p_of_a_pair_counts_matches_with_noise_of_its_kind() -> None:
    model, data = zoo.load("induction"), unweave.load_data("zoo:induction", limit=8)
    assert isinstance(model, ToyTransformer)
    graph = capture(model)
    found = match(graph, graph, data, nulls=3, seed=1, edges=False, by="patterns")
    generator, drawn = torch.Generator().manual_seed(1), []
    for _ in range(3):
        noise = NETWORK_NULLS["shuffled"](graph, generator)
        s = similarities(graph, noise, data, by="patterns")["attn"].tolist()
        pairs = max(
            (list(enumerate(order)) for order in itertools.permutations(range(4))),
            key=lambda chosen: sum(s[i][j] for i, j in chosen),
        )
        drawn += [s[i][j] for i, j in pairs]
    assert found.null_pairs["attn"] == pytest.approx(drawn)
    for pair in (*found.pairs, found.pairs[0]._replace(similarity=sorted(drawn)[3] - 1e-6)):
        assert found.p_of(pair) == (1 + sum(value >= pair.similarity for value in drawn)) / 13
    without = match(graph, graph, data, edges=False, by="patterns")
    assert np.isnan(without.p_of(without.pairs[0]))


def test_neurons_in_another_order() -> None:
    model = zoo.load("two_tasks")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    other = zoo.load("two_tasks")
    with torch.no_grad():
        other[0].weight.copy_(other[0].weight[order])
        other[0].bias.copy_(other[0].bias[order])
        other[2].weight.copy_(other[2].weight[:, order])
    data = unweave.load_data("zoo:two_tasks", limit=64)
    a, b = (capture(m).refine({"layers.0": 8}) for m in (model, model))
    assert match(a, b, data, by="effects", edges=False).of == {n: n for n in a.nodes if n.startswith("layers")}
    singles = [[[int(i)] for i in range(32)], [[int(i)] for i in range(32)]]
    a, b = (capture(m).refine({"layers.0": s}) for m, s in zip((model, other), singles, strict=True))
    found = match(a, b, data, by="effects", edges=False)
    # neurons that are dead, or never active alone, are alike; those that matter must be found
    similarity = found.similarity["mlp"]
    sure = [p for p in found.pairs if p.margin > 1e-3 and p.a.startswith("layers.0")]
    assert len(sure) >= 8
    names = found.nodes_b["mlp"]
    place = {n: i for i, n in enumerate(found.nodes_a["mlp"])}
    for pair in sure:
        assert int(order[names.index(pair.b)]) == place[pair.a]
    assert float(similarity.max()) <= 1 + 1e-9


# ---- matching ---------------------------------------------------------------------------------------------


def test_the_assignment_is_the_best_of_all() -> None:
    values = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = max(sum(float(values[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(5), 4))
    pairs = assign(values, tuple("abcd"), tuple("vwxyz"), None)
    assert sum(p.similarity for p in pairs) == pytest.approx(best)
    i, j = "abcd".index(pairs[0].a), "vwxyz".index(pairs[0].b)
    others = max(*(float(values[i, k]) for k in range(5) if k != j), *(float(values[k, j]) for k in range(4) if k != i))
    assert pairs[0].margin == pytest.approx(float(values[i, j]) - others)
    least = assign(values, tuple("abcd"), tuple("vwxyz"), 0.9)
    assert least == [p for p in pairs if p.similarity >= 0.9]


def test_the_nearest_is_the_largest_of_each_row() -> None:
    values = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.7, 0.0]], dtype=torch.float64)
    nearest = assign(values, ("a", "b"), ("x", "y", "z"), None, one_to_one=False)
    assert [(p.a, p.b, p.similarity) for p in nearest] == [("a", "x", 0.9), ("b", "x", 0.8)]
    assert [p.margin for p in nearest] == pytest.approx([0.6, 0.1])
    assert [p.b for p in assign(values, ("a", "b"), ("x", "y", "z"), None)] == ["x", "y"]


def test_two_heads_that_share_the_work_of_one() -> None:
    model, data = zoo.load("induction"), unweave.load_data("zoo:induction", limit=16)
    assert isinstance(model, ToyTransformer)
    split = ToyTransformer(dataclasses.replace(model.config, n_heads=3)).eval()
    weights = model.state_dict()
    for name in weights:  # a second copy of the first head; in layer 0 each of the two does half
        if name.startswith("blocks") and not name.endswith("b_O"):
            weights[name] = torch.cat([weights[name], weights[name][:1]])
    weights["blocks.0.W_O"][[0, 2]] *= 0.5
    split.load_state_dict(weights)
    several = match(capture(split), capture(model), data, edges=False, one_to_one=False)
    assert several.of["blocks.0.attn.head.0"] == several.of["blocks.0.attn.head.2"] == PREVIOUS
    assert several.of[INDUCTION] == INDUCTION
    one = match(capture(split), capture(model), data, edges=False)
    assert len(set(one.of.values())) == len(one.pairs) == 4


def test_a_smaller_network_leaves_idle_heads_unmatched() -> None:
    model, data = zoo.load("induction"), unweave.load_data("zoo:induction", limit=16)
    assert isinstance(model, ToyTransformer)
    small = ToyTransformer(dataclasses.replace(model.config, n_heads=1))
    kept = [0, 1]  # the previous-token head of layer 0, the induction head of layer 1
    weights = model.state_dict()
    for name in weights:
        part = name.rsplit(".", 1)[-1]
        if name.startswith("blocks") and part != "b_O":
            head = kept[int(name.split(".")[1])]
            weights[name] = weights[name][head : head + 1]
    small.load_state_dict(weights)
    found = match(capture(model), capture(small.eval()), data)
    assert found.of == {PREVIOUS: "blocks.0.attn.head.0", INDUCTION: "blocks.1.attn.head.0"}
    assert found.unmatched == (("blocks.0.attn.head.1", "blocks.1.attn.head.0"), ())
    assert found.edges is not None
    assert found.edges.correlation > 0.8


def test_edges_are_compared_by_rank() -> None:
    a, b, data = capture(toy(0)), capture(toy(1)), ragged()
    scores = [score_edges(g, data, samples=1) for g in (a, b)]
    heads = [n for n in a.nodes if "head" in n]
    rng = np.random.default_rng(0)
    of = dict(zip(heads, rng.permutation(heads).tolist(), strict=True))
    nats = [{str(e): float(s.nats[tuple(k)]) for e, k in zip(g.edges, g.edge_matrix.nonzero().tolist(), strict=True)}
            for g, s in zip((a, b), scores, strict=True)]  # fmt: skip
    left, right = [], []
    for edge in a.edges:
        name = f"{of.get(edge.src, edge.src)}->{of.get(edge.dst, edge.dst)}.{edge.port}"
        left.append(nats[0][str(edge)])
        right.append(nats[1].get(name, 0.0))
    found = compare_edges(*scores, of, permutations=20)
    assert found.n_edges == len(a.edges)
    assert found.correlation == pytest.approx(spearmanr(left, right).statistic)
    assert 1 / 21 <= found.p <= 1
    same = compare_edges(scores[0], scores[0], {n: n for n in heads}, permutations=99)
    assert same.correlation == pytest.approx(1.0)
    assert same.p == 0.01
    # what kinds alone say: the mean over every way to permute six heads, against a sample of them
    ways = [
        dict(zip(heads, order, strict=True)) for order in itertools.islice(itertools.permutations(heads), 0, 720, 9)
    ]
    every = [compare_edges(scores[0], scores[0], way, permutations=1).correlation for way in ways]
    assert same.permuted == pytest.approx(float(np.mean(every)), abs=4 * np.std(every) / np.sqrt(80))
    assert same.permuted < 0.95


# ---- two tokenizers ---------------------------------------------------------------------------------------


def two_tokenizations() -> tuple[TokenData, TokenData]:
    """Texts of letters: one token a letter, or one for each "ab" and else for the letter."""
    texts = ["abcab", "cab", "abab", "bcabc"]
    letters = [[(i, i + 1) for i in range(len(t))] for t in texts]
    pairs = []
    for text in texts:
        spans, i = [], 0
        while i < len(text):
            spans.append((i, i + (2 if text.startswith("ab", i) else 1)))
            i = spans[-1][1]
        pairs.append(spans)
    names = {"a": 0, "b": 1, "c": 2, "ab": 3}

    def data(spans: list[list[tuple[int, int]]]) -> TokenData:
        ids = [[names[t[s:e]] for s, e in row] for t, row in zip(texts, spans, strict=True)]
        width = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        return from_tensor(tokens, torch.arange(width) < torch.tensor([len(r) for r in ids])[:, None])

    return align_tokens(data(letters), letters, data(pairs), pairs)


def letters_and_pairs() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """One tokenizer of single letters, one that also has "ab"."""
    letters = {"a": 0, "b": 1, "c": 2}
    made = (BPE(letters, []), BPE({**letters, "ab": 3}, [("a", "b")]))
    return tuple(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)) for model in made)  # type: ignore[return-value]


def test_texts_are_cut_by_one_tokenizer_and_aligned_with_the_other(tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = ["abcab", "ccabc", "b", "ca", "abc"]
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    one, two = letters_and_pairs()
    a, b = load_aligned(file, one, two, context=4, limit=3)
    assert a.tokens.tolist() == [[0, 1, 2, 0], [2, 2, 0, 1], [2, 0, 0, 0]]  # "b" and what is left of a text is dropped
    assert a.mask.sum(1).tolist() == [4, 4, 2]
    assert b.tokens.tolist() == [[3, 2, 0], [2, 2, 3], [2, 0, 0]]
    assert a.labels["unit"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 2], [0, 1, -1, -1]]
    assert b.labels["unit"].tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, -1]]
    a, b = load_aligned(file, two, one, context=2, context_b=2, limit=2)
    assert a.tokens.tolist() == [[3, 2], [2, 2]]
    assert b.tokens.tolist() == [[0, 1], [2, 2]]  # of "abc" what B's context holds
    assert a.labels["unit"].tolist() == [[0, -1], [0, 1]]
    with pytest.raises(InputError, match="fast tokenizer"):
        load_aligned(file, one, object(), context=4, limit=3)
    with pytest.raises(EmptyDataError, match="no text of two tokens"):
        (tmp_path / "short.txt").write_text("a")
        load_aligned(tmp_path / "short.txt", one, two, context=4, limit=3)
    (tmp_path / "ids.jsonl").write_text('{"tokens": [0, 1]}\n')
    with pytest.raises(InputError, match="holds token ids"):
        load_aligned(tmp_path / "ids.jsonl", one, two, context=4, limit=3)


def test_units_of_two_tokenizers() -> None:
    letters, pairs = two_tokenizations()
    assert letters.labels["unit"][0].tolist() == [0, 0, 1, 2, 2]
    assert pairs.labels["unit"][0].tolist() == [0, 1, 2, -1]
    batch = next(letters.batches(4))
    units = Units.of(batch, True, torch.device("cpu"))
    values = torch.randn(4, 2, 5, 3)
    pattern = torch.rand(4, 2, 5, 5)
    at, between = units.at(values), units.between(pattern)
    for row, unit in itertools.product(range(4), range(int(batch.labels["unit"].max()) + 1)):
        members = [t for t in range(5) if batch.labels["unit"][row, t] == unit]
        assert bool(units.mask[row, unit]) == bool(members)
        if members:
            torch.testing.assert_close(at[row, :, unit], values[row, :, members[-1]])
            for query in [t for t in range(5) if bool(units.mask[row, int(batch.labels["unit"][row, t])])]:
                q = int(batch.labels["unit"][row, query])
                if q >= 0 and int(units.last[row, q]) == query:  # type: ignore[index]
                    torch.testing.assert_close(between[row, :, q, unit], pattern[row, :, query, members].sum(-1))


def test_networks_of_two_tokenizers_are_compared() -> None:
    letters, pairs = two_tokenizations()
    a = capture(toy(0, dataclasses.replace(CONFIG, d_vocab=3, d_out=3)))
    b = capture(toy(1, dataclasses.replace(CONFIG, d_vocab=4, d_out=4)))
    for by in BY:
        found = match(a, b, letters, pairs, by=by, edges=by == "cka")
        assert len(found.pairs) == 6
        assert all(-1 <= p.similarity <= 1 + 1e-9 for p in found.pairs)
    moments = cross_moments(a, b, letters, pairs)["attn"]
    # the oracle: each network's state at the last token of every unit, picked by hand
    picked = []
    for graph, data in ((a, letters), (b, pairs)):
        rows = []
        for row in range(len(data)):
            n = int(data.lengths[row])
            value = run(graph, data.tokens[row : row + 1, :n].long(), record=[PREVIOUS]).values[PREVIOUS][0]
            unit = data.labels["unit"][row, :n].tolist()
            rows += [value[max(t for t in range(n) if unit[t] == u)] for u in range(max(unit) + 1)]
        x = torch.stack(rows).double().detach().numpy()
        picked.append(x - x.mean(0))
    assert float(linear_cka(moments)[0, 0]) == pytest.approx(dense_cka(*picked), abs=1e-5)


def test_tokens_aligned_with_themselves_change_nothing() -> None:
    a, b, data = capture(toy(0)), capture(toy(1)), ragged()
    spans = [[(i, i + 1) for i in range(int(n))] for n in data.lengths]
    left, right = align_tokens(data, spans, data, spans)
    for by in ("patterns", "cka"):
        got = similarities(a, b, left, right, by=by)["attn"]
        torch.testing.assert_close(got, similarities(a, b, data, by=by)["attn"], atol=1e-9, rtol=0)


# ---- stitching --------------------------------------------------------------------------------------------


def test_a_stitched_node_does_the_work_and_another_does_not() -> None:
    model = zoo.load("induction")
    assert isinstance(model, ToyTransformer)
    a, b = capture(model), capture(in_other_coordinates(model, [[1, 0], [1, 0]]))
    fit, held_out = unweave.load_data("zoo:induction", limit=96).split(held_out=0.25)
    found = stitch(a, INDUCTION, b, "blocks.1.attn.head.0", fit, held_out, Scope(positions="answered"))
    assert found.loss.explained.value > 0.99
    assert found.loss.ablated_nats.value > 1
    assert found.control is not None
    assert found.control_node != "blocks.1.attn.head.0"
    assert found.control.explained.value < 0.5
    assert found.n_numbers == 3 * 65 * 64 + 65 * 64
    assert len(found.table()) == 6


def test_maps_of_a_stitch_are_least_squares() -> None:
    a, b, data = capture(toy(0)), capture(toy(1, dataclasses.replace(CONFIG, d_model=12))), ragged(40)
    made = fit_stitch(a, PREVIOUS, b, INDUCTION, data, batch_size=7)
    batch = next(data.batches(40))
    heard = {}
    for name, graph, node in (("a", a, PREVIOUS), ("b", b, INDUCTION)):
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), record=frozenset([f"{node}.q", node]))
        heard[name] = t.values[f"{node}.q"][batch.mask].double().detach()
        heard[f"{name} out"] = t.values[node][batch.mask].double().detach()
    x = torch.cat([heard["a"], torch.ones(len(heard["a"]), 1)], dim=1)
    wanted = x @ torch.linalg.lstsq(x, heard["b"]).solution
    torch.testing.assert_close((x.float() @ made.inward["q"]).double(), wanted, atol=2e-3, rtol=0)
    full = {p: run(a, batch.inputs, batch.mask, record=[f"{PREVIOUS}.{p}"]).values[f"{PREVIOUS}.{p}"] for p in "qkv"}
    inner = made.inner(full, batch.inputs, batch.mask)[batch.mask].double().detach()
    z = torch.cat([inner, torch.ones(len(inner), 1)], dim=1)
    wanted = z @ torch.linalg.lstsq(z, heard["a out"], rcond=1e-4, driver="gelsd").solution
    assert made.outward is not None
    torch.testing.assert_close(z @ made.outward.double(), wanted, atol=2e-3, rtol=0)


# ---- subspaces and features -------------------------------------------------------------------------------


def test_principal_cosines_by_plain_code() -> None:
    a, b, data = capture(toy(0)), capture(toy(1)), ragged(40)
    u, v = torch.randn(3, 16), torch.randn(2, 16)
    x, y = (collect_activations(g, "before unembed", data).double() for g in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    carried = torch.linalg.lstsq(x, y).solution.T @ u.double().T
    q, r = torch.linalg.qr(carried).Q, torch.linalg.qr(v.double().T).Q
    wanted = torch.linalg.svdvals(q.T @ r)
    got = principal_cosines(a, "before unembed", u, b, "before unembed", v, data, batch_size=9)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)


def test_a_subspace_is_found_in_other_coordinates() -> None:
    model, data = toy(0), ragged(60)
    turned = in_other_coordinates(model, [[0, 1, 2], [0, 1, 2]])
    rows = torch.cat([model.W_E, model.W_pos])
    q = torch.linalg.lstsq(rows, torch.cat([turned.W_E, turned.W_pos])).solution.detach()
    directions = torch.randn(2, 16)
    place = "before unembed"
    got = principal_cosines(capture(model), place, directions, capture(turned), place, directions @ q, data)
    assert float(got.min()) > 0.999


def test_features_in_another_order_are_found() -> None:
    a, data = capture(toy(0)), ragged(40)
    place = "blocks.0.attn"
    basis = find_basis(a, place, data, "principal")
    order = torch.randperm(basis.n_latents, generator=torch.Generator().manual_seed(1))
    other = dataclasses.replace(
        basis, encoder=basis.encoder[order], encoder_bias=basis.encoder_bias[order], decoder=basis.decoder[:, order]
    )
    found = match_features(a, place, basis, a, place, other, data, batch_size=9)
    latents = basis.encode(collect_activations(a, place, data)).double().numpy()
    lively = [i for i in range(basis.n_latents) if latents[:, i].var() > 1e-6 * latents.var(0).max()]
    assert {p for p in found.pairs if p[0] in lively} == {(i, int((order == i).nonzero())) for i in lively}
    wanted = np.corrcoef(latents[:, lively], latents[:, order][:, [int((order == i).nonzero()) for i in lively]],
                         rowvar=False)[: len(lively), len(lively) :].max(1)  # fmt: skip
    np.testing.assert_allclose(found.best[lively].numpy(), wanted, atol=1e-6)
    assert mean_max_cosine(basis, other) == pytest.approx(1.0)
    turned = find_basis(a, place, data, "random")
    cosines = torch.nn.functional.normalize(basis.decoder, dim=0).T @ torch.nn.functional.normalize(
        turned.decoder, dim=0
    )
    assert mean_max_cosine(basis, turned) == pytest.approx(float(cosines.max(1).values.mean()), abs=1e-5)


# ---- the phenomenon ---------------------------------------------------------------------------------------


def test_what_counts_as_right_and_what_chance_gets() -> None:
    known = {"previous_token_heads": [PREVIOUS], "induction_heads": [INDUCTION]}
    shared = {**known, "induction_heads": ["blocks.1.attn.head.0", INDUCTION]}
    graph, data = capture(zoo.load("induction")), unweave.load_data("zoo:induction", limit=8)
    found = match(graph, graph, data, by="patterns", edges=False)
    assert _right(found, known, known) == 1.0
    assert _right(found, known, {**known, "induction_heads": [PREVIOUS]}) == 0.5
    assert _chance(known, known) == 0.25
    assert _chance(known, shared) == 0.375
    nobody = {**known, "induction_heads": []}
    assert _right(found, known, nobody) == 0.5
    assert np.isnan(_right(found, nobody, known))
    assert np.isnan(_chance(nobody, known))


def test_heads_of_four_by_role() -> None:
    a = {"previous_token": ["p", "q"], "induction": ["i"]}
    b = {"previous_token": ["r"], "induction": ["s", "t"]}
    assert head_matching.right({"p": "r", "q": "s", "i": "t"}, a, b) == pytest.approx(2 / 3)
    assert head_matching.chance(a, b, 8) == pytest.approx((1 / 8 + 1 / 8 + 2 / 8) / 3)
    nobody = {"previous_token": [], "induction": ["s"]}
    assert np.isnan(head_matching.right({"p": "r"}, a, nobody))
    assert np.isnan(head_matching.chance(nobody, b, 8))
    model = ToyTransformer(head_matching.CONFIG)
    with torch.no_grad():
        block = model.blocks[0]  # positions alone decide, and every one of head 2 looks for the one before it
        model.W_E.zero_()
        model.W_pos.copy_(torch.eye(24, 64))
        block.W_Q.zero_(), block.W_K.zero_()
        waves = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        block.W_K[2, :24] = waves * 20 / waves.norm(dim=1, keepdim=True)
        block.W_Q[2, 1:24] = block.W_K[2, :23]
    assert head_matching.roles(model.eval()) == {"previous_token": ("blocks.0.attn.head.2",), "induction": ()}


def test_pairs_share_networks() -> None:
    values = np.random.default_rng(0).random((9, 9))
    mean, low, high = pair_interval(values)
    apart = ~np.eye(9, dtype=bool)
    assert mean == pytest.approx(values[apart].mean())
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(4000):
        seeds = rng.integers(9, size=9)
        found = [values[i, j] for i in seeds for j in seeds if i != j]
        drawn.append(np.mean(found) if found else np.nan)
    wanted = np.nanquantile(drawn, (0.025, 0.975))
    np.testing.assert_allclose([low, high], wanted, atol=0.02)
    # one seed unlike the others moves all its pairs: as wide as if there were few values
    odd = np.zeros((5, 5))
    odd[0] = odd[:, 0] = 1
    assert pair_interval(odd)[2] >= 0.7
    quantity = over_pairs("x", "none", (0.0, 1.0), np.where(apart, values, np.nan))
    assert (quantity.n, quantity.value, quantity.verdict) == (72, mean, "agrees")
    assert all(map(np.isnan, pair_interval(np.full((3, 3), np.nan))))


def test_a_phase_that_never_comes() -> None:
    start, end = phase_window([1, 2, 3], [0.0, 0.2, 0.3])
    assert start == 1.5
    assert np.isnan(end)


# ---- refusals ---------------------------------------------------------------------------------------------


def test_refusals() -> None:
    a, mlp, data = capture(toy(0)), capture(zoo.load("two_tasks")), ragged()
    with pytest.raises(UnknownNameError, match="patterns"):
        match(a, a, data, by="pattern")
    with pytest.raises(UnknownNameError, match="shuffled"):
        match(a, a, data, null="shuffle")
    with pytest.raises(InputError, match="at least 0"):
        match(a, a, data, nulls=-1)
    with pytest.raises(InputError, match="no kind of node"):
        match(a, mlp, data)
    with pytest.raises(InputError, match="compare by 'effects'"):
        match(mlp, mlp, unweave.load_data("zoo:two_tasks", limit=4), by="patterns")
    with pytest.raises(InputError, match="align_tokens"):
        cross_moments(a, a, data, data)
    scores = score_edges(a, data, samples=1)
    with pytest.raises(UnknownNameError, match="head"):
        compare_edges(scores, scores, {"blocks.0.attn.head.9": PREVIOUS})


def test_refusals_of_alignment() -> None:
    one = from_tensor(torch.tensor([[1, 2]]))
    with pytest.raises(InputError, match="same texts"):
        align_tokens(one, [[(0, 1), (1, 2)]], one, [])
    with pytest.raises(InputError, match="text 0"):
        align_tokens(one, [[(0, 1)]], one, [[(0, 1), (1, 2)]])
    with pytest.raises(EmptyDataError, match="same texts"):
        align_tokens(one, [[(0, 1), (1, 2)]], one, [[(0, 3), (3, 4)]])


def test_refusals_of_stitches_and_spaces() -> None:
    a, data = capture(toy(0)), ragged()
    b = capture(toy(0, dataclasses.replace(CONFIG, d_mlp=8)))
    with pytest.raises(InputError, match="one kind"):
        fit_stitch(a, PREVIOUS, b, "blocks.0.mlp", data)
    with pytest.raises(InputError, match="hears nothing"):
        fit_stitch(a, "embed", b, "embed", data)
    with pytest.raises(InputError, match="output"):
        fit_stitch(a, "unembed", b, "unembed", data)
    with pytest.raises(UnknownNameError, match="head"):
        fit_stitch(a, "blocks.0.attn.head.7", b, PREVIOUS, data)
    axes: Tensor = torch.eye(15)[:2]
    with pytest.raises(ShapeError, match="16 dimensions"):
        principal_cosines(a, "before unembed", axes, a, "before unembed", axes, data)
    small = capture(toy(0, dataclasses.replace(CONFIG, d_model=12)))
    bases = [find_basis(g, "blocks.0.attn", data, "principal") for g in (a, small)]
    with pytest.raises(InputError, match="share no space"):
        mean_max_cosine(*bases)
