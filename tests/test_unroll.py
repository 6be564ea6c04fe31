"""The unroll verb: nodes apart by position, edges between positions, circuits that are positional."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from families import CONFIGS, random_model

import unweave
from unweave.capture import capture
from unweave.circuits import find_circuit, prove
from unweave.data import from_tensor
from unweave.errors import InputError
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.scoring import measure_edges, score_edges
from unweave.statistics import collect_means, replacement
from unweave.storage import load_graph, save_graph
from unweave.tasks import make_task

unroll = inspect.unwrap(Graph.unroll)  # without the type checks that the tests run under
TOKENS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
GROUPS = {"first": [0], "middle": [2, 3]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_unrolled_graphs_compute_what_the_model_computes(name, groups):
    graph = capture(random_model(name), verify=False)
    unrolled = graph.unroll(7, groups)
    assert unrolled.n_parameters == graph.n_parameters
    torch.testing.assert_close(run(unrolled, TOKENS).logits, run(graph, TOKENS).logits, atol=1e-5, rtol=1e-4)
    shorter = TOKENS[:, :4]
    torch.testing.assert_close(run(unrolled, shorter).logits, run(graph, shorter).logits, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(random_model("llama-tied-biased"), verify=False)


@pytest.fixture(scope="module")
def unrolled(graph) -> Graph:
    return graph.unroll(7)


def at(position: int, new: torch.Tensor | float):
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, position] = new[:, position] if isinstance(new, torch.Tensor) else new
        return value

    return change


def brute(graph: Graph, src: str, p: int, dst: str, port: str, q: int) -> torch.Tensor:
    """Logits when what ``dst`` does at q no longer hears what ``src`` writes at p: two runs of the graph as it was."""
    record = f"{dst}.code"
    changed = run(graph, TOKENS, record=[record], patch={f"{src}->{dst}.{port}": at(p, 0.0)}).values[record]
    return run(graph, TOKENS, patch={record: at(q, changed)}).logits


@pytest.mark.parametrize(
    ("src", "p", "dst", "port", "q"),
    [
        ("embed", 2, "blocks.0.attn.head.1", "v", 5),
        ("embed", 4, "blocks.0.attn.head.0", "k", 4),
        ("blocks.0.mlp", 1, "blocks.1.attn.head.3", "v", 6),
        ("blocks.0.attn.head.2", 3, "blocks.1.attn.head.0", "q", 3),
        ("blocks.0.attn.head.2", 5, "blocks.1.mlp", "in", 5),
    ],
)
def test_an_edge_leads_from_one_position_to_another(graph, unrolled, src, p, dst, port, q):
    edge = f"{src}@{p}->{dst}@{q}.{port}"
    keep = unrolled.edge_matrix & ~unrolled.mark_edges([edge])
    got = run(unrolled.restrict(keep, ablation="zero"), TOKENS).logits
    expected = brute(graph, src, p, dst, port, q)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (expected - run(graph, TOKENS).logits).abs().max() > 1e-4
    assert (expected[:, :q] - run(graph, TOKENS).logits[:, :q]).abs().max() < 1e-5


def test_only_edges_that_can_carry_something_exist(unrolled):
    there = {str(e) for e in unrolled.edges}
    for p, q in itertools.product(range(7), repeat=2):
        for port, possible in {"q": p == q, "k": p <= q, "v": p <= q}.items():
            assert (f"embed@{p}->blocks.0.attn.head.0@{q}.{port}" in there) == possible
        assert (f"embed@{p}->blocks.0.mlp@{q}.in" in there) == (p == q)
    assert not unrolled.is_cut
    assert all(f"embed@{p}->unembed.in" in there for p in range(7))


def test_a_window_bounds_how_far_edges_reach():
    unrolled = capture(random_model("mistral-window"), verify=False).unroll(7)
    window = unrolled.find("blocks.0.attn.head.0@0")[0].core.window
    there = {str(e) for e in unrolled.edges}
    assert window < 7
    for p in range(7):
        assert (f"embed@{p}->blocks.0.attn.head.0@6.v" in there) == (6 - p < window)


def test_groups_reach_as_far_as_their_last_position(graph):
    there = {str(e) for e in graph.unroll(7, GROUPS).edges}
    assert "embed@first->blocks.0.attn.head.0@middle.v" in there
    assert "embed@middle->blocks.0.attn.head.0@first.v" not in there
    assert "embed@middle->blocks.0.attn.head.0@rest.k" in there
    assert "embed@rest->blocks.0.mlp@middle.in" not in there


def test_means_are_taken_where_a_node_writes(graph, unrolled):
    data = from_tensor(TOKENS, vocabulary=50)
    by_position = collect_means(graph, data, per_position=True)
    for name, value in collect_means(unrolled, data).items():
        node, _, place = name.partition("@")
        expected = torch.zeros_like(by_position[node])
        expected[int(place)] = by_position[node][int(place)]
        torch.testing.assert_close(value, expected)
    overall = collect_means(graph, data)
    grouped = collect_means(graph.unroll(7, {"all": range(7)}), data)
    torch.testing.assert_close(grouped["blocks.0.mlp@all"], overall["blocks.0.mlp"].expand(7, -1))


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_scores_of_edges_between_positions_are_their_effects(graph, ablation):
    unrolled = graph.unroll(7, {"early": [0, 1, 2, 3]})
    data = from_tensor(TOKENS.repeat(2, 1).roll(1, 1), vocabulary=50)
    instead, paired = replacement(unrolled, data, ablation)
    marked = unrolled.mark_edges(
        [
            "embed@early->blocks.0.attn.head.1@rest.v",
            "blocks.0.mlp@rest->blocks.1.mlp@rest.in",
            "embed@early->unembed.in",
        ]
    )
    measured = measure_edges(unrolled, paired, Scope(), marked, instead).nats
    for j, i in marked.nonzero().tolist():
        keep = unrolled.edge_matrix.clone()
        keep[j, i] = False
        cut = instead.cut(unrolled, keep)
        found = unweave.evaluate({"cut": cut}, unrolled, paired)["cut"]
        assert found.kl_nats.value == pytest.approx(float(measured[j, i]), rel=1e-3)


def test_fisher_scores_rank_positional_edges(graph):
    unrolled = graph.unroll(7, {"early": [0, 1, 2], "end": [6]})
    tokens = torch.randint(0, 50, (24, 7), generator=torch.Generator().manual_seed(1))
    data = from_tensor(tokens, vocabulary=50)
    exact = score_edges(unrolled, data, method="exact")
    fisher = score_edges(unrolled, data, samples=4)
    there = unrolled.edge_matrix & (exact.nats.nan_to_num() > 1e-9)
    order = [torch.argsort(torch.argsort(s.nats[there])).double() for s in (exact, fisher)]
    assert int(there.sum()) > 100
    assert float(torch.corrcoef(torch.stack(order))[0, 1]) > 0.85  # as of the whole graph: 0.83


def test_a_positional_circuit_is_found_proved_and_stored(tmp_path):
    graph = unweave.capture("zoo:induction")
    task = make_task("induction", vocabulary=48, n=48, length=10, first=0)
    n = task.data.tokens.shape[1]
    search, test = task.split(0.5)
    unrolled = graph.unroll(n)
    options = {"ablation": "counterfactual", "faithfulness": 0.9}
    circuit = find_circuit(unrolled, search.paired, task.scope, **options)
    proof = prove(circuit, test.paired, n_random=5, n_subsets=2)
    assert proof.faithfulness.value > 0.8
    assert circuit.n_edges < 0.05 * unrolled.n_edges
    # the answer is read at the last position, whatever else the circuit needs
    into = {e.src for e in circuit.edges if e.dst == "unembed"}
    assert into
    assert all(src.endswith(f"@{n - 1}") for src in into)
    save_graph(circuit.graph, tmp_path / "circuit")
    loaded = load_graph(tmp_path / "circuit")
    assert loaded.edges == circuit.graph.edges
    other = test.corrupted.tokens
    a, b = (run(g, test.data.tokens, counterfactual=other).logits for g in (loaded, circuit.graph))
    assert torch.equal(a, b)


def test_parts_and_modules_go_along(graph):
    finer = graph.quotient({"m": ["blocks.0.mlp"]}).unroll(7, GROUPS).refine({"blocks.0.mlp@first": 2})
    assert finer.modules["blocks.0.mlp@first.part.1"] == "m"
    torch.testing.assert_close(run(finer, TOKENS).logits, run(graph, TOKENS).logits, atol=1e-5, rtol=1e-4)
    parts = graph.refine({"blocks.0.mlp": 2}).unroll(7, GROUPS)
    assert "blocks.0.mlp.part.0@first" in parts.nodes
    torch.testing.assert_close(run(parts, TOKENS).logits, run(graph, TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_cut_graphs_keep_their_cuts(graph):
    data = from_tensor(TOKENS, vocabulary=50)
    means = collect_means(graph, data)
    keep = graph.edge_matrix & (torch.rand(graph.edge_matrix.shape, generator=torch.Generator().manual_seed(1)) < 0.6)
    cut = graph.restrict(keep, means=means)
    unrolled = cut.unroll(7, GROUPS)
    assert unrolled.is_cut
    torch.testing.assert_close(run(unrolled, TOKENS).logits, run(cut, TOKENS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("n_pos", "groups", "what"),
    [
        (0, None, "n_pos must be a positive number"),
        (-1, None, "n_pos must be a positive number"),
        (7, {"a": [0, 7]}, "must hold positions from 0 to 6"),
        (7, {"a": []}, "must hold positions"),
        (7, {"a": [1], "b": [1, 2]}, "position 1 is in two groups"),
        (7, {"a.b": [1]}, "name must have none of"),
        (7, {"rest": [1]}, "not be 'rest'"),
        (10**6, None, "the model's context"),
    ],
)
def test_bad_groups_are_refused(graph, n_pos, groups, what):
    with pytest.raises(InputError, match=what):
        unroll(graph, n_pos, groups)


def test_unrolling_twice_long_inputs_and_dead_edges_are_refused(unrolled):
    with pytest.raises(InputError, match="unrolled already"):
        unrolled.unroll(7)
    with pytest.raises(InputError, match="longer than the context of 7"):
        run(unrolled, torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(InputError, match="never listens where embed@3 writes"):
        unrolled.mark_edges(["embed@3->blocks.0.attn.head.0@2.v"])
