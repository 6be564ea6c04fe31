"""The narrow verb: edges that carry a few dimensions."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from families import CONFIGS, random_model

from unweave.ablation import Replacement, pair_at_random
from unweave.capture import capture
from unweave.data import from_tensor
from unweave.errors import GraphError, InputError, ShapeError
from unweave.execution import run, uncut
from unweave.graph import Graph
from unweave.scope import Scope, divergence
from unweave.scoring import measure_edges, score_edges
from unweave.statistics import collect_means
from unweave.storage import load_graph, save_graph

narrow = inspect.unwrap(Graph.narrow)  # without the type checks that the tests run under
TOKENS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))
OTHERS = TOKENS.roll(1, 0)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection(d: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    left = rand(d, k, seed=seed)
    return left, torch.linalg.pinv(left)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(random_model("llama-tied-biased"), verify=False)


EDGES = (
    "embed->blocks.0.attn.head.1.v",
    "blocks.0.mlp->blocks.1.attn.head.3.q",
    "blocks.0.attn.head.2->blocks.1.mlp.in",
    "blocks.0.mlp->blocks.1.mlp.in",
    "embed->unembed.in",
)


def by_hand(graph: Graph, projections, replaced) -> torch.Tensor:
    """Every narrow edge patched: r + L R (y - r)."""

    def patch(src, left, right):
        r = replaced(src)
        return lambda y: r + (y - r) @ right.T @ left.T

    return run(graph, TOKENS, patch={e: patch(e.split("->")[0], *f) for e, f in projections.items()}).logits


@pytest.mark.parametrize("name", [n for n in CONFIGS if "neox" not in n][:6])
def test_every_family_runs_narrow_edges(name):
    graph = capture(random_model(name), verify=False)
    d = graph.info["d_model"]
    edge = str(graph.edges[-1])
    projections = {edge: projection(d, 5, 0)}
    got = run(graph.narrow(projections, ablation="zero"), TOKENS).logits
    expected = by_hand(graph, projections, lambda src: torch.zeros(d))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (got - run(graph, TOKENS).logits).abs().max() > 1e-4


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean per position", "resample"])
def test_narrow_edges_carry_projections_of_what_differs(graph, ablation):
    projections = {e: projection(32, 1 + i, i) for i, e in enumerate(EDGES)}
    data = from_tensor(TOKENS, vocabulary=50)
    if ablation == "resample":
        other = run(graph, OTHERS, record=graph.writers).values
        got = run(graph.narrow(projections, ablation="resample"), TOKENS, counterfactual=OTHERS).logits
        expected = by_hand(graph, projections, lambda src: other[src])
    elif ablation == "zero":
        got = run(graph.narrow(projections, ablation="zero"), TOKENS).logits
        expected = by_hand(graph, projections, lambda src: torch.zeros(32))
    else:
        means = collect_means(graph, data, per_position=ablation != "mean")
        got = run(graph.narrow(projections, means=means), TOKENS).logits
        expected = by_hand(graph, projections, lambda src: means[src])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_all_dimensions_are_the_whole_edge_and_none_the_cut_one(graph):
    means = collect_means(graph, from_tensor(TOKENS, vocabulary=50))
    eye, nothing = torch.eye(32), (torch.zeros(32, 0), torch.zeros(0, 32))
    whole = graph.narrow({e: (eye, eye) for e in EDGES}, means=means)
    torch.testing.assert_close(run(whole, TOKENS).logits, run(graph, TOKENS).logits, atol=1e-5, rtol=1e-4)
    none = graph.narrow({e: nothing for e in EDGES}, means=means)
    cut = graph.restrict(graph.edge_matrix & ~graph.mark_edges(EDGES), means=means)
    torch.testing.assert_close(run(none, TOKENS).logits, run(cut, TOKENS).logits)
    assert whole.n_edges == none.n_edges == graph.n_edges
    assert whole.is_cut
    assert uncut(whole).n_edges == graph.n_edges
    torch.testing.assert_close(run(uncut(whole), TOKENS).logits, run(graph, TOKENS).logits)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_a_narrow_edge_can_be_cut_and_others_narrowed_later(graph, ablation):
    means = collect_means(graph, from_tensor(TOKENS, vocabulary=50)) if ablation == "mean" else None
    options = {"ablation": ablation, "means": means}
    other = OTHERS if ablation == "resample" else None
    projections = {e: projection(32, 2 + i, i) for i, e in enumerate(EDGES)}
    late = {e: projections[e] for e in EDGES[2:]}
    both = graph.narrow({e: projections[e] for e in EDGES[:2]}, **options).narrow(late, **options)
    expected = graph.narrow(projections, **options)
    a, b = (run(g, TOKENS, counterfactual=other).logits for g in (both, expected))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    gone = graph.mark_edges([EDGES[1], EDGES[3]])
    fewer = expected.restrict(expected.edge_matrix & ~gone, **options)
    left = {e: projections[e] for e in (EDGES[0], EDGES[2], EDGES[4])}
    same = graph.restrict(graph.edge_matrix & ~gone, **options).narrow(left, **options)
    a, b = (run(g, TOKENS, counterfactual=other).logits for g in (fewer, same))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert fewer.n_edges == graph.n_edges - 2


def test_effects_of_narrow_edges_are_measured(graph):
    data = from_tensor(TOKENS, vocabulary=50)
    means = collect_means(graph, data)
    projections = {e: projection(32, 2, i) for i, e in enumerate(EDGES)}
    narrowed = graph.narrow(projections, means=means)
    marked = graph.mark_edges([*EDGES[:3], "embed->blocks.1.mlp.in"])
    found = measure_edges(narrowed, data, Scope(), marked, Replacement("mean", means)).nats
    batch = next(data.batches(8))
    for j, i in marked.nonzero().tolist():
        keep = narrowed.edge_matrix.clone()
        keep[j, i] = False
        cut = run(narrowed.restrict(keep, means=means), TOKENS).logits
        expected = float(divergence(Scope(), run(narrowed, TOKENS).logits, cut, batch).mean())
        assert float(found[j, i]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_narrow_graphs_are_stored_and_move(graph, tmp_path):
    projections = {e: projection(32, 1 + i, i) for i, e in enumerate(EDGES)}
    narrowed = graph.narrow(projections, ablation="resample")
    save_graph(narrowed, tmp_path / "g")
    loaded = load_graph(tmp_path / "g")
    assert loaded.edges == narrowed.edges
    a, b = (run(g, TOKENS, counterfactual=OTHERS).logits for g in (loaded, narrowed))
    assert torch.equal(a, b)
    double = narrowed.to(dtype=torch.float64)
    torch.testing.assert_close(run(double, TOKENS, counterfactual=OTHERS).logits, b.double(), atol=1e-4, rtol=1e-3)
    assert narrowed.n_parameters == graph.n_parameters + sum(
        w.left.numel() + w.right.numel() for s in narrowed.stages for p in s.ports if (w := p.wires) is not None
    )
    counts = [int(n) for s in narrowed.stages for p in s.ports if p.wires for n in p.wires.n_dimensions]
    assert sorted(counts) == [1, 2, 3, 4, 5]


def test_what_cannot_be_is_refused(graph):
    good = projection(32, 2, 0)
    with pytest.raises(ShapeError, match="must be \\[32, k\\]"):
        narrow(graph, {EDGES[0]: (good[0][:5], good[1])}, ablation="zero")
    with pytest.raises(InputError, match="not finite"):
        narrow(graph, {EDGES[0]: (good[0] * torch.nan, good[1])}, ablation="zero")
    with pytest.raises(InputError, match="mean ablation needs means"):
        narrow(graph, {EDGES[0]: good})
    once = graph.narrow({EDGES[0]: good}, ablation="zero")
    with pytest.raises(InputError, match="is narrow already"):
        once.narrow({EDGES[0]: good}, ablation="zero")
    cut = graph.restrict(graph.edge_matrix & ~graph.mark_edges([EDGES[1]]), ablation="zero")
    with pytest.raises(InputError, match="is cut and carries nothing"):
        cut.narrow({EDGES[1]: good}, ablation="zero")
    for verb in (lambda: once.unroll(7), lambda: once.refine({"blocks.0.mlp": 2})):
        with pytest.raises(InputError, match="only some dimensions"):
            verb()
    with pytest.raises(InputError, match='method="exact"'):
        score_edges(once, pair_at_random(from_tensor(TOKENS, vocabulary=50)))
    (s, p) = next((s, p) for s, st in enumerate(once.stages) for p, port in enumerate(st.ports) if port.wires)
    port = once.stages[s].ports[p]
    for broken in (
        dataclasses.replace(port.wires, nodes=port.wires.nodes + 99),
        dataclasses.replace(port.wires, writers=port.wires.writers - 99),
    ):
        ports = list(once.stages[s].ports)
        ports[p] = dataclasses.replace(port, wires=broken)
        stages = list(once.stages)
        stages[s] = dataclasses.replace(stages[s], ports=tuple(ports))
        with pytest.raises(GraphError, match="wires"):
            dataclasses.replace(once, stages=tuple(stages))
