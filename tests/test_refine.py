"""The refine verb: parts compute what the whole computed, and are nodes like any other."""

from __future__ import annotations

import inspect

import pytest
import torch
from families import CONFIGS, random_model
from torch import nn

from unweave.capture import capture
from unweave.data import float_data
from unweave.errors import InputError, UnknownNameError
from unweave.execution import run
from unweave.graph import Graph
from unweave.statistics import collect_means
from unweave.storage import load_graph, save_graph

refine = inspect.unwrap(Graph.refine)  # without the type checks that the tests run under
TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SHUFFLED = torch.randperm(48, generator=torch.Generator().manual_seed(1)).tolist()
NEURONS = [SHUFFLED[:1], SHUFFLED[1:20], SHUFFLED[20:]]


def split_everything(graph: Graph) -> Graph:
    """Every head in halves, every MLP in three uneven groups of neurons."""
    heads = {n: 2 for s in graph.stages if s.kind == "attn" for n in s.nodes}
    mlps = {}
    for stage in graph.stages:
        if stage.kind == "mlp":
            width = stage.code_widths[0]
            order = torch.randperm(width, generator=torch.Generator().manual_seed(2)).tolist()
            mlps[stage.nodes[0]] = [order[:1], order[1 : width // 3], order[width // 3 :]]
    return graph.refine(heads | mlps)


@pytest.mark.parametrize("name", CONFIGS)
def test_refined_graphs_compute_what_the_model_computes(name):
    graph = capture(random_model(name), verify=False)
    finer = split_everything(graph)
    assert len(finer.nodes) > 2 * len(graph.nodes) - 4
    torch.testing.assert_close(run(finer, TOKENS).logits, run(graph, TOKENS).logits, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(random_model("llama-tied-biased"), verify=False)


def test_parts_together_write_what_the_whole_wrote(graph):
    finer = graph.refine({"blocks.0.mlp": NEURONS})
    parts = [f"blocks.0.mlp.part.{k}" for k in range(3)]
    whole = run(graph, TOKENS, record=["blocks.0.mlp"]).values["blocks.0.mlp"]
    apart = run(finer, TOKENS, record=parts).values
    torch.testing.assert_close(sum(apart.values()), whole)
    assert not torch.allclose(apart[parts[1]], whole)


@pytest.mark.parametrize(
    ("node", "given", "part", "coordinates"),
    [
        ("blocks.0.mlp", NEURONS, 1, NEURONS[1]),
        ("blocks.1.attn.head.2", 4, 3, [6, 7]),
    ],
)
def test_cutting_a_part_silences_its_coordinates(graph, node, given, part, coordinates):
    siblings = [n for n in graph.nodes if n.rsplit(".", 1)[0] == node.rsplit(".", 1)[0]] if "head" in node else [node]
    finer = graph.refine({n: given for n in siblings})
    kept = [e for e in finer.edges if e.src != f"{node}.part.{part}"]

    def silence(code: torch.Tensor) -> torch.Tensor:
        code = code.clone()
        code[..., coordinates] = 0
        return code

    expected = run(graph, TOKENS, patch={f"{node}.code": silence}).logits
    torch.testing.assert_close(run(finer.restrict(kept, ablation="zero"), TOKENS).logits, expected)
    assert (expected - run(graph, TOKENS).logits).abs().max() > 1e-3


def test_refining_a_cut_graph_keeps_its_cuts(graph):
    means = {w: torch.randn(1, 32, generator=torch.Generator().manual_seed(i)) for i, w in enumerate(graph.writers)}
    generator = torch.Generator().manual_seed(3)
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape, generator=generator) < 0.6)
    cut = graph.restrict(keep, means=means)
    finer = split_everything(cut)
    torch.testing.assert_close(run(finer, TOKENS).logits, run(cut, TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_modules_keep_their_parts_and_graphs_are_stored(graph, tmp_path):
    finer = graph.quotient({"first": ["blocks.0.mlp"]}).refine({"blocks.0.mlp": 2})
    assert dict(finer.modules) == {"blocks.0.mlp.part.0": "first", "blocks.0.mlp.part.1": "first"}
    loaded = load_graph(save_graph(finer, tmp_path / "g"))
    assert loaded.nodes == finer.nodes
    assert torch.equal(run(loaded, TOKENS).logits, run(finer, TOKENS).logits)


@pytest.mark.parametrize("parts", [3, [[0, 1], [2, 3], [4, 5]], [[5, 0], [1, 4], [3, 2]]])
def test_layers_of_a_plain_network_are_split(parts):
    """Their codes are what they write, but the codes of their parts are not."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 1, 4)
    graph = capture(model, verify=False)
    finer = graph.refine({"layers.0": parts})
    torch.testing.assert_close(run(finer, x).logits, run(graph, x).logits)
    names = [f"layers.0.part.{k}" for k in range(3)]
    apart = run(finer, x, record=names).values
    torch.testing.assert_close(sum(apart.values()), torch.tanh(model[0](x)))
    means = collect_means(finer, float_data(x[:, 0]))
    torch.testing.assert_close(sum(means[n] for n in names)[0], torch.tanh(model[0](x)).mean((0, 1)))
    cut = finer.restrict([e for e in finer.edges if e.src != names[0]], means=means)
    expected = model[2](torch.tanh(model[0](x)) - apart[names[0]] + means[names[0]])
    torch.testing.assert_close(run(cut, x).logits, expected)


def test_one_part_is_the_node_itself(graph):
    assert graph.refine({"blocks.0.mlp": 1}).nodes == graph.nodes


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"blocks.0.mpl": 2}, UnknownNameError, "closest: blocks.0.mlp"),
        ({"blocks.0.mlp": 49}, InputError, "code of 48 numbers"),
        ({"blocks.0.mlp": 0}, InputError, "code of 48 numbers"),
        ({"blocks.0.mlp": [[0, 1], [1, 2]]}, InputError, "exactly once"),
        ({"blocks.0.mlp": [list(range(48)), []]}, InputError, "exactly once"),
        ({"embed": 2}, InputError, "cannot be split"),
        ({"unembed": 2}, InputError, "cannot be split"),
        ({"blocks.0.attn.head.0": 2}, InputError, r"equally many parts, got \[2, 1, 1, 1\]"),
    ],
)
def test_what_cannot_be_split_is_refused(graph, parts, error, message):
    with pytest.raises(error, match=message):
        refine(graph, parts)
