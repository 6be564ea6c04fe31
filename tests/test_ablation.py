"""What ablated edges carry: means, zeros, another sequence, a corrupted partner; effects against plain patching."""

from __future__ import annotations

import pytest
import torch
from families import random_model

from unweave.ablation import CORRUPTED, KINDS, batch_trace, pair_at_random
from unweave.capture import capture
from unweave.data import TokenData, from_tensor
from unweave.errors import InputError, ShapeError
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.scoring import METHODS, score_edges
from unweave.statistics import collect_means, replacement


def random_tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 50, (6, 7), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(random_model("llama-tied-biased"), verify=False)


@pytest.fixture(scope="module")
def data() -> TokenData:
    return from_tensor(random_tokens(0), labels={CORRUPTED: random_tokens(1)})


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def sent_by_hand(graph: Graph, data: TokenData, kind: str, writer: str) -> torch.Tensor:
    def written(tokens: torch.Tensor) -> torch.Tensor:
        return run(graph, tokens.long(), record=[writer]).values[writer]

    if kind == "zero":
        return torch.zeros(32)
    if kind == "counterfactual":
        return written(data.labels[CORRUPTED])
    if kind == "resample":
        return written(pair_at_random(data, 0).labels[CORRUPTED])
    mean = written(data.tokens)
    return mean.mean((0, 1)) if kind == "mean" else mean.mean(0)


EDGES = ["embed->blocks.0.attn.head.1.v", "blocks.0.attn.head.2->blocks.1.mlp.in", "blocks.1.mlp->unembed.in"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_effect_is_that_of_patching_the_edge_by_hand(graph, data, kind):
    scores = score_edges(graph, data, method="exact", ablation=kind, batch_size=4)
    clean = run(graph, data.tokens.long()).logits
    for edge in EDGES:
        patched = run(graph, data.tokens.long(), patch={edge: sent_by_hand(graph, data, kind, edge.split("->")[0])})
        port, writer = graph.mark_edges([edge]).nonzero()[0].tolist()
        assert float(scores.nats[port, writer]) == pytest.approx(kl(clean, patched.logits), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_one_partner_for_all_is_a_mean_per_position(graph, data, method):
    # where every sequence has the same partner, what it sends is a constant at each position
    other = data.labels[CORRUPTED][:1].repeat(6, 1)
    means = collect_means(graph, from_tensor(other), per_position=True)
    paired = from_tensor(data.tokens, labels={CORRUPTED: other})
    a = score_edges(graph, paired, method=method, ablation="counterfactual")
    b = score_edges(graph, data, method=method, ablation="mean per position", means=means)
    torch.testing.assert_close(a.nats, b.nats, atol=1e-6, rtol=1e-4, equal_nan=True)
    assert not torch.allclose(a.nats, score_edges(graph, data, method=method).nats, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_graph_carries_what_the_replacement_says(graph, data, kind):
    instead, paired = replacement(graph, data, kind)
    keep = graph.edge_matrix & ~graph.mark_edges(EDGES[2:])
    cut = instead.cut(graph, keep)
    (batch,) = paired.batches(6)
    patched = run(graph, data.tokens.long(), patch={EDGES[2]: sent_by_hand(graph, data, kind, "blocks.1.mlp")}).logits
    torch.testing.assert_close(batch_trace(cut, batch).output, patched, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mean", "counterfactual"])
def test_effects_inside_a_circuit_are_those_of_cutting_one_more_edge(graph, data, kind):
    instead, paired = replacement(graph, data, kind)
    generator = torch.Generator().manual_seed(5)
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape, generator=generator) < 0.7)
    circuit = instead.cut(graph, keep)
    scores = score_edges(circuit, paired, method="exact", ablation=kind, means=instead.means)
    (batch,) = paired.batches(6)
    before = batch_trace(circuit, batch).output
    for port, writer in circuit.edge_matrix.nonzero()[::17].tolist():
        less = keep.clone()
        less[port, writer] = False
        after = batch_trace(instead.cut(graph, less), batch).output
        assert float(scores.nats[port, writer]) == pytest.approx(kl(before, after), rel=1e-3, abs=1e-7)


def test_nobody_is_their_own_partner(data):
    many = from_tensor(torch.arange(40).reshape(20, 2))
    partner = pair_at_random(many, seed=3).labels[CORRUPTED]
    assert not bool((partner == many.tokens).all(1).any())
    assert sorted(partner[:, 0].tolist()) == many.tokens[:, 0].tolist()
    assert not torch.equal(partner, pair_at_random(many, seed=4).labels[CORRUPTED])


def test_padding_and_positions(graph):
    tokens, mask = random_tokens(0), torch.ones(6, 7, dtype=torch.bool)
    mask[2:, 5:] = False
    data = from_tensor(tokens, mask, labels={CORRUPTED: random_tokens(1)})
    scope = Scope(positions="last")
    alone = from_tensor(tokens[2:3, :5], labels={CORRUPTED: random_tokens(1)[2:3, :5]})
    padded = score_edges(graph, data.select([2]), scope, method="exact", ablation="counterfactual")
    torch.testing.assert_close(
        padded.nats, score_edges(graph, alone, scope, method="exact", ablation="counterfactual").nats, equal_nan=True
    )


def test_what_cannot_be_replaced_is_refused(graph, data):
    plain = from_tensor(random_tokens(0))
    with pytest.raises(InputError, match="needs another input for every sequence"):
        score_edges(graph, plain, ablation="counterfactual")
    with pytest.raises(InputError, match="at least two sequences"):
        score_edges(graph, plain.select([0]), ablation="resample")
    with pytest.raises(ShapeError, match=r"corrupted inputs must be \(6, 7\), got \(6, 3\)"):
        score_edges(
            graph, from_tensor(random_tokens(0), labels={CORRUPTED: random_tokens(1)[:, :3]}), ablation="counterfactual"
        )
    with pytest.raises(InputError, match="unknown ablation 'median'; choose one of mean"):
        replacement(graph, data, "median")


def test_means_given_are_means_used(graph, data):
    means = collect_means(graph, data.select(slice(0, 3)))
    given = score_edges(graph, data, means=means)
    assert not torch.allclose(given.nats, score_edges(graph, data).nats, equal_nan=True)


def test_means_per_position_do_not_depend_on_how_texts_are_batched(graph):
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2:, 5:], mask[4:, 3:] = False, False
    data = from_tensor(random_tokens(0), mask)
    together, apart = (collect_means(graph, data, per_position=True, batch_size=b) for b in (6, 2))
    by_hand = run(graph, random_tokens(0)[:2], record=["embed"]).values["embed"].mean(0)
    for writer in graph.writers:
        torch.testing.assert_close(together[writer], apart[writer])
    torch.testing.assert_close(together["embed"][5:], by_hand[5:])
