"""Circuits: known ones are found, what is stated is what is measured, and proofs can fail."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import numpy as np
import pytest
import torch
from families import random_model

from unweave.ablation import CORRUPTED, KINDS, batch_trace
from unweave.capture import capture
from unweave.circuits import SHARES, connected, distance, faithfulness_curve, find_circuit, narrow_circuit, prove
from unweave.circuits.curve import faithfulness_of
from unweave.circuits.distance import Prompts, per_prompt
from unweave.circuits.sizes import edge_numbers
from unweave.data import TokenData, from_tensor, load_data
from unweave.errors import EmptyDataError, InputError
from unweave.evaluation import evaluate
from unweave.execution import run
from unweave.graph import Edge, Graph
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import collect_means
from unweave.storage import load_graph, save_graph
from unweave.tasks import make_task
from unweave.zoo.tracr import tracr_examples, true_edges

SCOPE = Scope(positions="answered")
# what the bundled model is known to do: a previous-token head feeding the keys of an induction head
KNOWN = {
    "pos_embed->blocks.0.attn.head.0.q",
    "pos_embed->blocks.0.attn.head.0.k",
    "embed->blocks.0.attn.head.0.v",
    "embed->blocks.1.attn.head.1.q",
    "blocks.0.attn.head.0->blocks.1.attn.head.1.k",
    "embed->blocks.1.attn.head.1.v",
    "blocks.1.attn.head.1->unembed.in",
}
find = inspect.unwrap(find_circuit)


@pytest.fixture(scope="module")
def induction() -> Graph:
    return capture("zoo:induction")


@pytest.fixture(scope="module")
def halves(induction_data) -> tuple[TokenData, TokenData]:
    return induction_data.split(held_out=0.5)


@pytest.fixture(scope="module")
def small() -> Graph:
    return capture(random_model("llama-tied-biased"), verify=False)


@pytest.fixture(scope="module")
def pairs() -> TokenData:
    tokens = [torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    return from_tensor(tokens[0], labels={CORRUPTED: tokens[1]})


def kl(graph: Graph, other: Graph, data: TokenData, mask: torch.Tensor) -> float:
    total, count = 0.0, 0
    for batch in data.batches(5):
        p, q = (batch_trace(g, batch).output.double().log_softmax(-1) for g in (graph, other))
        here = mask[batch.index][:, : p.shape[1]]
        total += float((p.exp() * (p - q)).sum(-1)[here].sum())
        count += int(here.sum())
    return total / count


# ---- paths ----------------------------------------------------------------------------------------------------


def test_connected_edges_are_those_on_a_path_by_enumeration(small):
    generator = torch.Generator().manual_seed(0)
    for density in (0.05, 0.1, 0.2, 0.5):
        keep = small.edge_matrix & (torch.rand(small.edge_matrix.shape, generator=generator) < density)
        edges = small.name_edges(keep)
        forward, backward = {"embed"}, {"unembed"}
        for _ in small.nodes:
            forward |= {e.dst for e in edges if e.src in forward}
            backward |= {e.src for e in edges if e.dst in backward}
        expected = {e for e in edges if e.src in forward and e.dst in backward}
        assert set(small.name_edges(connected(small, keep))) == expected
        assert set(small.name_edges(connected(small, keep, fed=False))) == {e for e in edges if e.dst in backward}


# ---- known circuits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"faithfulness": 0.9}, {"edges": 7}, {"kl_nats": 0.5}])
def test_the_induction_circuit_is_found_and_nothing_else(induction, halves, budget):
    circuit = find_circuit(induction, halves[0], SCOPE, **budget)
    assert {str(e) for e in circuit.edges} == KNOWN
    assert circuit.nodes == ("embed", "pos_embed", "blocks.0.attn.head.0", "blocks.1.attn.head.1", "unembed")


def test_nodes_are_chosen_whole(induction, halves):
    circuit = find_circuit(induction, halves[0], SCOPE, faithfulness=0.9, level="node")
    assert set(circuit.nodes) == {
        n for e in map(str, KNOWN) for n in (e.split("->")[0], e.split("->")[1][: e.split("->")[1].rindex(".")])
    }
    inside = [e for e in induction.edges if e.src in circuit.nodes and e.dst in circuit.nodes]
    assert set(circuit.edges) == set(inside)


def test_the_templates_circuit_is_found_by_counterfactuals(induction):
    task = make_task("induction", vocabulary=48, first=0, n=48, length=16)
    circuit = find_circuit(induction, task.paired, task.scope, faithfulness=0.9, ablation="counterfactual")
    # the swap of two tokens leaves where the head looks as it was: only what it moves has to come from the clean prompt
    assert {str(e) for e in circuit.edges} == {
        "embed->blocks.1.attn.head.1.v",
        "blocks.1.attn.head.1->unembed.in",
    }


@pytest.mark.parametrize("name", ["frac_prevs", "hist", "pair_balance", "reverse", "sort_unique"])
@pytest.mark.parametrize("ablation", ["mean", "resample", "zero"])
def test_compiled_circuits_are_found_exactly(shared, name, ablation):
    folder = shared / "models" / "tracr" / name
    graph = capture(folder)
    tokens, mask, outputs = tracr_examples(folder)
    data = from_tensor(tokens, mask, labels={"answered": ~outputs.isnan()})
    scope = Scope(positions="answered", divergence="gaussian" if graph.info["d_out"] == 1 else "kl")
    truth = graph.mark_edges(true_edges(folder))
    effect = score_edges(graph, data, scope, method="exact", ablation=ablation).nats.nan_to_num(0.0)
    assert not bool((effect[~truth] > 1e-9).any())  # what the compiler did not join has no effect
    circuit = find_circuit(graph, data, scope, kl_nats=1e-8, ablation=ablation)
    assert circuit.nats <= 1e-8
    # edges below what the budget allows may go; all others are there, and nothing else
    missing = truth & (effect > 1e-8) & ~circuit.kept
    assert not bool((circuit.kept & ~truth).any())
    if (name, ablation) == ("reverse", "mean"):
        # a head whose queries and keys are both at their means looks where it looked: cut together, nothing is lost
        assert [str(e) for e in graph.name_edges(missing)] == ["embed->blocks.0.attn.head.0.q"]
    else:
        assert not bool(missing.any())


# ---- subspaces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"faithfulness": 0.9}, {"edges": 8}])
def test_an_edge_may_keep_some_dimensions(induction, halves, options):
    circuit = find_circuit(induction, halves[0], SCOPE, level="subspace", **options)
    whole_edges = find_circuit(induction, halves[0], SCOPE, **options)
    assert circuit.n_numbers < whole_edges.n_numbers / 2
    assert circuit.n_dimensions < whole_edges.n_dimensions / 2
    assert circuit.graph.edges == circuit.edges
    if "faithfulness" in options:
        assert circuit.faithfulness >= 0.9
        assert prove(circuit, halves[1], n_random=3, n_subsets=2).faithfulness.value > 0.85


def test_what_a_narrow_circuit_states_isof_graphd(induction, halves):
    whole_edges = find_circuit(induction, halves[0], SCOPE, faithfulness=0.97)
    circuit = narrow_circuit(whole_edges, halves[0], kl_nats=0.1 * whole_edges.empty_nats)
    measured = evaluate({"c": circuit.graph}, induction, halves[0], SCOPE)["c"].kl_nats.value
    assert measured == pytest.approx(circuit.nats, rel=1e-4)
    assert circuit.nats <= 0.1 * whole_edges.empty_nats
    narrow = circuit.graph.dimensions
    sizes = [narrow[e] * (a + b) if e in narrow else a * b for e in circuit.edges for a, b in [sides(induction, e)]]
    assert circuit.n_numbers == sum(sizes)
    assert any(narrow.values())


def sides(graph: Graph, edge: Edge) -> tuple[int, int]:
    """Dimensions written and read, for the zoo's transformer: width 64, heads of 32, 48 tokens."""
    writes = 32 if "head" in edge.src else 64
    return writes, 48 if edge.dst == "unembed" else 32


def test_directions_are_those_that_matter():
    # the output hears coordinate 0 best, and coordinate 1 varies a hundred times as much
    generator = torch.Generator().manual_seed(0)
    first, last = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(8))
        last.weight.zero_()
        last.weight[:2, 0] = torch.tensor([3.0, -3.0])
        last.weight[2, 1] = 0.001
    graph = capture(torch.nn.Sequential(first, torch.nn.ReLU(), last))
    x = torch.randn(64, 1, 8, generator=generator).abs() * torch.tensor([1.0, 100.0, *[1.0] * 6])
    data = TokenData(x, torch.ones(64, 1, dtype=torch.bool))
    circuit = find_circuit(graph, data, kl_nats=1e-6)
    narrow = narrow_circuit(circuit, data, kl_nats=0.5 * circuit.empty_nats)
    by_variance = narrow_circuit(circuit, data, kl_nats=0.5 * circuit.empty_nats, directions="variance")
    assert narrow.n_numbers < by_variance.n_numbers
    for stage in narrow.graph.stages:
        for port in stage.ports:
            if port.wires is not None:
                matrix = port.wires.left[0] @ port.wires.right[0]
                assert abs(float(matrix[0, 0]) - 1) < 0.05


def test_edges_of_a_perceptron_narrow_each_in_its_own_width():
    graph, data = capture("zoo:two_tasks"), load_data("zoo:two_tasks", limit=16)
    means = collect_means(graph, data)
    eye = {w: torch.eye(w) for w in (10, 32)}
    for edge, width, kept in (("input->layers.0.in", 10, 3), ("layers.0->layers.1.in", 32, 5)):
        whole = graph.narrow({edge: (eye[width], eye[width])}, means=means)
        some = graph.narrow({edge: (eye[width][:, :kept], eye[width][:kept])}, means=means)
        x, writer = data.tokens, edge.partition("->")[0]
        torch.testing.assert_close(run(whole, x).logits, run(graph, x).logits)
        # the oracle: the writer's other dimensions are at their mean
        cut = run(
            graph,
            x,
            patch={
                writer: lambda y, w=writer, k=kept: torch.cat([y[..., :k], means[w][0, k:].expand_as(y[..., k:])], -1)
            },
        )
        torch.testing.assert_close(run(some, x).logits, cut.logits)


def test_narrowing_is_refused_where_it_makes_no_sense(induction, halves):
    circuit = find_circuit(induction, halves[0], SCOPE, faithfulness=0.9)
    with pytest.raises(InputError, match="above the"):
        narrow_circuit(circuit, halves[0], kl_nats=circuit.nats / 2)
    with pytest.raises(InputError, match="directions must be one of"):
        narrow_circuit(circuit, halves[0], directions="random")
    narrow = narrow_circuit(circuit, halves[0])
    with pytest.raises(InputError, match="a circuit of whole edges"):
        narrow_circuit(narrow, halves[0])


def test_numbers_of_edges_are_dimensions_written_times_read(small):
    edges = [Edge.parse(t) for t in ("embed->blocks.0.attn.head.1.q", "blocks.0.attn.head.1->blocks.0.mlp.in")]
    assert edge_numbers(small, tuple(edges)) == 32 * 8 + 8 * 32  # a gated MLP reads all 32 dimensions of the stream


# ---- what is stated is measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", KINDS)
def test_stated_nats_are_those_of_the_graph_it_returns(small, pairs, ablation):
    circuit = find_circuit(small, pairs, faithfulness=0.6, ablation=ablation, batch_size=3, max_trials=60)
    if ablation == "resample":
        return  # its partners are drawn inside
    everywhere = torch.ones(8, 6, dtype=torch.bool)
    assert circuit.nats == pytest.approx(kl(small, circuit.graph, pairs, everywhere), rel=1e-4)
    assert circuit.nats <= 0.4 * circuit.empty_nats
    assert circuit.graph.n_edges == circuit.n_edges == int(circuit.kept.sum()) < small.n_edges
    empty = circuit.instead.cut(small, torch.zeros_like(small.edge_matrix))
    assert circuit.empty_nats == pytest.approx(kl(small, empty, pairs, everywhere), rel=1e-4)


def test_no_single_edge_of_a_circuit_can_go(small, pairs):
    circuit = find_circuit(small, pairs, kl_nats=0.02)
    everywhere = torch.ones(8, 6, dtype=torch.bool)
    for port, writer in circuit.kept.nonzero().tolist():
        less = circuit.kept.clone()
        less[port, writer] = False
        cut = circuit.instead.cut(small, less)
        assert kl(small, cut, pairs, everywhere) > 0.02


def test_a_small_graphs_circuit_is_close_to_the_best_by_brute_force(induction, halves):
    # all circuits of seven edges out of the ten most valuable
    data = halves[0].select(slice(0, 8))
    found = find_circuit(induction, data, SCOPE, edges=7)
    ten = [tuple(p) for p in found.scores.ranked()[:10].tolist()]
    mask = data.labels["answered"]
    best = float("inf")
    for chosen in itertools.combinations(ten, 7):
        keep = torch.zeros_like(found.kept)
        keep[tuple(zip(*chosen, strict=True))] = True
        best = min(best, kl(induction, found.instead.cut(induction, keep), data, mask))
    assert found.nats <= best * 1.001


def test_a_circuit_runs_and_is_stored(induction, halves, tmp_path):
    circuit = find_circuit(induction, halves[0], SCOPE, faithfulness=0.9)
    loaded = load_graph(save_graph(circuit.graph, tmp_path / "c"))
    tokens = halves[1].tokens[:2].long()
    assert torch.equal(run(loaded, tokens).logits, run(circuit.graph, tokens).logits)
    assert loaded.edges == circuit.edges


def test_more_edges_are_never_worse_and_the_same_seed_gives_the_same(small, pairs):
    nats = [find_circuit(small, pairs, edges=n, max_trials=80).nats for n in (15, 40, 80)]
    assert nats == sorted(nats, reverse=True)
    again = find_circuit(small, pairs, edges=40, max_trials=80)
    assert again.nats == nats[1]


def test_a_killed_search_resumes_without_measuring_again(small, pairs, tmp_path, monkeypatch):
    path = tmp_path / "search.safetensors"
    options = {"edges": 20, "max_trials": 30, "checkpoint": path}
    expected = find_circuit(small, pairs, edges=20, max_trials=30)
    monkeypatch.setattr(distance, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    measure, done = distance.Distance.of_graph, []

    def killed(self, keep):
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(1)
        return measure(self, keep)

    monkeypatch.setattr(distance.Distance, "of_graph", killed)
    with pytest.raises(KeyboardInterrupt):
        find_circuit(small, pairs, **options)
    assert path.exists()
    again = []
    monkeypatch.setattr(distance.Distance, "of_graph", lambda self, keep: again.append(1) or measure(self, keep))
    resumed = find_circuit(small, pairs, **options)
    assert torch.equal(resumed.kept, expected.kept)
    assert resumed.trials == expected.trials
    assert len(again) == len(expected.trials) - 12
    assert not path.exists()


def test_a_checkpoint_of_another_search_is_refused(small, pairs, tmp_path, monkeypatch):
    path = tmp_path / "search.safetensors"
    monkeypatch.setattr(distance, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(distance.Distance, "done", lambda self: None)
    find_circuit(small, pairs, edges=20, max_trials=5, checkpoint=path)
    with pytest.raises(InputError, match="another pass or other data"):
        find_circuit(small, pairs.select(slice(0, 4)), edges=20, max_trials=5, checkpoint=path)


# ---- proofs ---------------------------------------------------------------------------------------------------


def test_the_induction_circuit_is_proved(induction, halves):
    circuit = find_circuit(induction, halves[0], SCOPE, kl_nats=0.01)
    proof = prove(circuit, halves[1])
    assert proof.faithfulness.value > 0.99
    assert proof.faithfulness.low <= proof.faithfulness.value <= proof.faithfulness.high
    assert proof.agreement.value > 0.99
    assert proof.p_random == pytest.approx(1 / 21)
    own = proof.own_effects.nats[circuit.kept]
    assert bool((own > 0.1).all())
    mask = halves[1].labels["answered"]
    assert proof.nats.value == pytest.approx(kl(induction, circuit.graph, halves[1], mask), rel=1e-3, abs=1e-6)
    assert {row["what"] for row in proof.table()} >= {"faithfulness", "incompleteness, mean"}


def test_a_wrong_circuit_is_not(induction, halves):
    circuit = find_circuit(induction, halves[0], SCOPE, faithfulness=0.9)
    # as many edges, but another head reads what the induction head should
    wrong = connected(induction, induction.edge_matrix & ~circuit.kept)
    fake = dataclasses.replace(circuit, kept=wrong, graph=circuit.instead.cut(induction, wrong))
    proof = prove(fake, halves[1], n_random=5, n_subsets=3)
    assert proof.faithfulness.high < 0.3


def test_own_effects_areof_graphd_inside_the_circuit(small, pairs):
    circuit = find_circuit(small, pairs, edges=25, max_trials=40)
    proof = prove(circuit, pairs, n_random=2, n_subsets=2)
    everywhere = torch.ones(8, 6, dtype=torch.bool)
    for port, writer in circuit.kept.nonzero()[::6].tolist():
        less = circuit.kept.clone()
        less[port, writer] = False
        expected = kl(circuit.graph, circuit.instead.cut(small, less), pairs, everywhere)
        assert float(proof.own_effects.nats[port, writer]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


# ---- faithfulness by size -------------------------------------------------------------------------------------


def test_the_curve_is_that_of_the_definition(induction):
    task = make_task("induction", vocabulary=48, first=0, n=24, length=16, metric="logit_difference")
    data, scope = task.paired, task.scope
    scores = score_edges(induction, data, scope, ablation="counterfactual")
    circuit = find_circuit(induction, data, scope, faithfulness=0.5, ablation="counterfactual")
    curve = faithfulness_curve(scores, induction, data, scope, circuit.instead)
    assert curve.shares == SHARES
    (batch,) = data.batches(24)

    def metric(graph: Graph) -> float:
        logits = batch_trace(graph, batch).output[batch.labels["end"]]
        rows = torch.arange(24)
        return float((logits[rows, batch.labels["correct"].long()] - logits[rows, batch.labels["wrong"].long()]).mean())

    full, empty = metric(induction), metric(circuit.instead.cut(induction, torch.zeros_like(circuit.kept)))
    f = []
    for share, estimate in zip(SHARES, curve.faithfulness, strict=True):
        keep = scores.top(round(share * induction.n_edges)) if share < 1 else induction.edge_matrix
        value = metric(circuit.instead.cut(induction, connected(induction, keep) if share < 1 else keep))
        f.append((value - empty) / (full - empty))
        assert estimate.value == pytest.approx(f[-1], abs=1e-4)
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(SHARES, SHARES[1:], f, f[1:], strict=False))
    gap = [abs(1 - x) for x in f]
    missing = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(SHARES, SHARES[1:], gap, gap[1:], strict=False))
    assert curve.cpr == pytest.approx(area, abs=1e-3)
    assert curve.cmd == pytest.approx(missing, abs=1e-3)
    assert curve.faithfulness[-1].value == pytest.approx(1.0)


def test_intervals_hold_what_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        nats = rng.exponential(0.1, 200)
        ones = np.ones(200)
        circuit, empty = Prompts(nats, ones, ones, ones), Prompts(ones, ones, ones, ones)
        estimate = faithfulness_of(empty, circuit, empty, Scope(), seed)
        inside += estimate.low <= 0.9 <= estimate.high
    assert inside >= 51  # 95% of 60 is 57


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget"),
        ({"edges": 5, "kl_nats": 0.1}, "exactly one budget"),
        ({"edges": 0}, "between 1 and the graph's 110"),
        ({"edges": 111}, "between 1 and the graph's 110"),
        ({"kl_nats": float("nan")}, "kl_nats must be at least 0"),
        ({"faithfulness": 1.5}, "faithfulness must be above 0"),
        ({"edges": 5, "level": "neuron"}, "level must be one of edge, node, subspace"),
        ({"edges": 5, "ablation": "median"}, "unknown ablation 'median'"),
        ({"edges": 5, "method": "magic"}, "unknown method 'magic'"),
        ({"edges": 1}, "no circuit of 1 edges was found|1"),
    ],
)
def test_bad_questions_are_refused(small, pairs, options, message):
    if options == {"edges": 1}:
        # one edge is a path: the embedding straight to the output
        assert find(small, pairs, **options).n_edges <= 1
        return
    with pytest.raises(InputError, match=message):
        find(small, pairs, **options)


def test_unusable_data_is_refused(small, pairs, induction, halves):
    with pytest.raises(InputError, match="needs another input"):
        find_circuit(small, from_tensor(pairs.tokens), edges=5, ablation="counterfactual")
    nowhere = from_tensor(pairs.tokens, labels={"end": torch.zeros(8, 6, dtype=torch.bool)})
    with pytest.raises(EmptyDataError, match="selects no position"):
        find_circuit(small, nowhere, Scope(positions="end"), edges=5)
    circuit = find_circuit(induction, halves[0], SCOPE, faithfulness=0.9)
    with pytest.raises(InputError, match="cut edges already"):
        find_circuit(circuit.graph, halves[0], SCOPE, edges=3)
    with pytest.raises(InputError, match="shares must rise"):
        faithfulness_curve(circuit.scores, induction, halves[1], SCOPE, circuit.instead, shares=(0.5, 0.1))
    empty = dataclasses.replace(circuit, kept=torch.zeros_like(circuit.kept))
    with pytest.raises(InputError, match="nothing to prove"):
        prove(empty, halves[1])


def testof_graphments_do_not_depend_on_batching(small, pairs):
    circuit = find_circuit(small, pairs, edges=20, max_trials=20)
    a, b = (per_prompt({"c": circuit.graph}, small, pairs, Scope(), batch_size=n)["c"] for n in (3, 8))
    np.testing.assert_allclose(a.nats, b.nats, rtol=1e-4)
