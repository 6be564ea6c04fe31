"""The central type: names, edges, rules, sizes, printing; what it computes is tested in test_execution."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CONFIGS, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unweave import tree
from unweave.capture import capture
from unweave.errors import GraphError, InputError, UnknownNameError
from unweave.graph import Edge, Graph, Port, Stage
from unweave.ops import Dense

# as users call it: without the type checks that the tests run under
restrict = inspect.unwrap(Graph.restrict)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(random_model("llama-tied-biased"), verify=False)


@pytest.fixture(scope="module")
def means(graph: Graph) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {writer: torch.randn(1, 32, generator=generator) for writer in graph.writers}


# ---- names and edges -------------------------------------------------------------------------------------------


def test_nodes_writers_and_ports_are_named_by_place(graph):
    heads = [[f"blocks.{layer}.attn.head.{h}" for h in range(4)] for layer in range(2)]
    expected = ("embed", *heads[0], "blocks.0.mlp", *heads[1], "blocks.1.mlp", "unembed")
    assert graph.nodes == expected
    assert graph.writers == expected[:-1]
    assert graph.ports[:5] == (*(f"{h}.q" for h in heads[0]), f"{heads[0][0]}.k")
    assert graph.ports[-1] == "unembed.in"
    for i, node in enumerate(graph.nodes):
        stage, place = graph.find(node)
        assert stage.nodes[place] == node
        assert graph.nodes[graph.nodes.index(stage.nodes[0]) + place] == graph.nodes[i]


def test_every_edge_comes_from_an_earlier_node(graph):
    position = {node: graph.where[node][0] for node in graph.nodes}
    plain = {
        (src, f"{dst}.{port.name}")
        for stage in graph.stages
        for dst in stage.nodes
        for port in stage.ports
        for src in graph.writers
        if position[src] < position[dst]
    }
    assert {(e.src, f"{e.dst}.{e.port}") for e in graph.edges} == plain
    assert graph.n_edges == len(plain) == 110
    assert torch.equal(graph.edge_matrix, graph.possible_edges)


def test_in_a_parallel_block_the_mlp_does_not_hear_its_own_layers_heads():
    graph = capture(random_model("gpt_neox"), verify=False)
    heard = {e.src for e in graph.edges if e.dst == "blocks.1.mlp"}
    assert heard == {"embed", "blocks.0.mlp", *(f"blocks.0.attn.head.{h}" for h in range(4))}


def test_an_unknown_node_is_refused_with_the_closest_names(graph):
    with pytest.raises(UnknownNameError, match=r"no node is named 'blocks.0.mpl'; the closest: blocks.0.mlp"):
        graph.find("blocks.0.mpl")


def test_an_edge_is_parsed_as_it_prints(graph):
    for edge in graph.edges:
        assert Edge.parse(str(edge)) == edge


@pytest.mark.parametrize(
    "text", ["", "embed", "embed->", "->a.b", "embed->unembed", "embed->.in", "embed->mlp.", "a.b"]
)
def test_what_is_not_an_edge_is_refused(text):
    with pytest.raises(InputError, match="an edge is written 'source->node.port'"):
        Edge.parse(text)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**20))
def test_naming_and_marking_edges_are_inverse(seed):
    graph = TINY
    generator = torch.Generator().manual_seed(seed)
    matrix = graph.possible_edges & (torch.rand(graph.possible_edges.shape, generator=generator) < 0.5)
    edges = graph.name_edges(matrix)
    assert len(edges) == int(matrix.sum())
    assert torch.equal(graph.mark_edges(edges), matrix)
    assert torch.equal(graph.mark_edges([str(e) for e in reversed(edges)]), matrix)


TINY = capture(random_model("gpt2"), verify=False)


@pytest.mark.parametrize(
    ("edge", "error", "message"),
    [
        ("embde->unembed.in", UnknownNameError, "no writer is named 'embde'; the closest: embed"),
        ("unembed->blocks.0.mlp.in", UnknownNameError, "no writer is named 'unembed'"),
        ("embed->unembed.out", UnknownNameError, "no port is named 'unembed.out'; the closest: unembed.in"),
        ("embed->blocks.0.mlp.q", UnknownNameError, "no port is named 'blocks.0.mlp.q'"),
        ("blocks.1.mlp->blocks.0.mlp.in", InputError, "blocks.0.mlp does not come after blocks.1.mlp"),
        ("blocks.0.mlp->blocks.0.mlp.in", InputError, "does not come after"),
    ],
)
def test_edges_that_cannot_be_are_refused(graph, edge, error, message):
    for act in (graph.mark_edges, lambda edges: graph.restrict(edges, ablation="zero")):
        with pytest.raises(error, match=message):
            act([edge])


# ---- restrict and quotient -------------------------------------------------------------------------------------


def test_restrict_takes_edges_names_or_a_matrix(graph):
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.5)
    edges = graph.name_edges(keep)
    ways = (keep, edges, [str(e) for e in edges])
    for cut in (graph.restrict(way, ablation="zero") for way in ways):
        assert torch.equal(cut.edge_matrix, keep)
        assert cut.edges == edges


def test_restricting_twice_keeps_the_edges_in_both(graph, means):
    a, b = (graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.6) for _ in range(2))
    for kind in ("mean", "zero", "resample"):
        extra = {"ablation": kind, "means": means if kind == "mean" else None}
        twice, once = graph.restrict(a, **extra).restrict(b, **extra), graph.restrict(a & b, **extra)
        assert torch.equal(twice.edge_matrix, a & b)
        assert torch.equal(once.edge_matrix, a & b)
        for (path, one), (other_path, other) in zip(tree.leaves(once.stages), tree.leaves(twice.stages), strict=True):
            assert path == other_path
            assert torch.allclose(one.double(), other.double(), atol=1e-5)


def test_restricting_to_everything_is_the_graph_itself(graph):
    assert graph.restrict(graph.edges) is graph
    assert graph.restrict(graph.possible_edges) is graph
    assert graph.restrict(torch.ones_like(graph.possible_edges)) is graph
    cut = graph.restrict([], ablation="zero")
    assert cut.restrict(cut.edges) is cut
    assert cut.n_edges == 0


def test_a_cut_edge_does_not_come_back(graph):
    cut = graph.restrict(graph.edges[1:], ablation="zero")
    assert graph.edges[0] not in cut.restrict(graph.edges, ablation="zero").edges


def test_the_constant_left_behind_is_the_mean_of_what_was_cut(graph, means):
    port, keep = "blocks.1.attn.head.2.k", graph.possible_edges.clone()
    row = graph.ports.index(port)
    keep[row, :3] = False
    offset = graph.restrict(keep, means=means).stages[3].ports[1].offset
    assert offset is not None
    assert torch.allclose(offset[2, 0], sum(means[w][0] for w in graph.writers[:3]), atol=1e-6)
    assert float(offset[[0, 1, 3]].abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ablation": "meen"}, "unknown ablation 'meen'; choose one of mean, zero, resample"),
        ({"means": None}, "mean ablation needs means="),
        ({"means": {}}, "no mean was given for embed"),
        ({"means": 1}, r"the mean of embed must be \[1, 32\] or \[pos, 32\], got \(32,\)"),
        ({"means": (1, 31)}, r"the mean of embed must be \[1, 32\] or \[pos, 32\], got \(1, 31\)"),
        ({"means": (2, 1, 32)}, r"the mean of embed must be .* got \(2, 1, 32\)"),
        (
            {"keep": torch.ones(3, 3, dtype=torch.bool)},
            r"keep must be \(27, 11\) \(ports x writers\), got \(3, 3\)",
        ),
        ({"keep": torch.ones(27, 11)}, "keep must be a boolean matrix"),
        ({"keep": torch.ones(27, 11, dtype=torch.long)}, "keep must be a boolean matrix"),
    ],
)
def test_restrict_refuses_what_it_cannot_do(graph, means, change, message):
    given: dict[str, Any] = {"keep": [], "means": means} | change
    if isinstance(given["means"], (int, tuple)):
        shape = (32,) if isinstance(given["means"], int) else given["means"]
        given["means"] = {writer: torch.zeros(shape) for writer in graph.writers}
    with pytest.raises(InputError, match=message):
        restrict(graph, given.pop("keep"), **given)


def test_kinds_of_ablation_that_do_not_mix_are_refused(graph, means):
    some = graph.edges[5:]
    with pytest.raises(InputError, match="cannot be mixed"):
        graph.restrict(some, ablation="zero").restrict([], ablation="resample")
    with pytest.raises(InputError, match="cannot be mixed"):
        graph.restrict(some, ablation="resample").restrict([], means=means)
    assert graph.restrict(some, ablation="zero").restrict([], means=means).n_edges == 0


def test_means_for_different_numbers_of_positions_are_refused(graph):
    def positions(n: Callable[[int], int]) -> dict[str, torch.Tensor]:
        return {writer: torch.randn(n(i), 32) for i, writer in enumerate(graph.writers)}

    with pytest.raises(InputError, match="the same number of positions for every writer"):
        graph.restrict([], means=positions(lambda i: 4 + i))
    four = graph.restrict(graph.edges[20:], means=positions(lambda i: 4))
    with pytest.raises(InputError, match="the same number of positions in every cut"):
        four.restrict([], means=positions(lambda i: 8))
    mixed = four.restrict([], means=positions(lambda i: 1 if i % 2 else 4))
    assert mixed.stages[1].ports[0].offset.shape == (4, 4, 32)


def test_quotient_names_the_module_of_each_node(graph):
    grouped = graph.quotient({"first": ["embed", "blocks.0.mlp"], "last": ["unembed"]})
    assert grouped.modules == {"embed": "first", "blocks.0.mlp": "first", "unembed": "last"}
    assert grouped.stages is graph.stages
    assert graph.modules == {}
    assert grouped.restrict([], ablation="zero").modules == grouped.modules
    with pytest.raises(InputError, match="embed is in two modules, 'a' and 'b'"):
        graph.quotient({"a": ["embed"], "b": ["embed"]})
    with pytest.raises(UnknownNameError, match="no node is named 'emebd'"):
        graph.quotient({"a": ["emebd"]})


# ---- immutability ------------------------------------------------------------------------------------------------


def test_nothing_in_a_graph_can_be_assigned(graph):
    stage = graph.stages[1]
    for thing in (
        graph,
        stage,
        stage.ports[0],
        stage.ports[0].reads[0],
        stage.core,
        stage.write,
        graph.edges[0],
    ):
        name = dataclasses.fields(thing)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)


def test_verbs_leave_the_graph_as_it_was(graph, means):
    before = {path: t.clone() for path, t in tree.tensors(graph.stages).items()}
    cut = graph.restrict([], means=means)
    cut.restrict([], ablation="zero").quotient({"m": ["embed"]}).to(dtype=torch.float64)
    assert graph.n_edges == 110
    after = tree.tensors(graph.stages)
    assert all(torch.equal(t, after[path]) for path, t in before.items())
    assert all(p.edges is None and p.offset is None for s in graph.stages for p in s.ports)
    assert cut.stages[1].write is graph.stages[1].write


def test_graphs_are_compared_by_identity(graph):
    assert graph == graph
    assert graph != dataclasses.replace(graph)
    assert len({graph, dataclasses.replace(graph)}) == 2


def test_to_changes_the_precision_of_all_but_integers_bits_and_frequencies(graph, means):
    cut = graph.restrict(graph.edges[::2], means=means)
    low = cut.to(dtype=torch.bfloat16)
    kinds = {path: t.dtype for path, t in tree.tensors(low.stages).items()}
    frequencies = {path for path in kinds if path.endswith("inv_freq")}
    edges = {path for path in kinds if path.endswith("edges")}
    assert len(frequencies) >= 1
    assert len(edges) >= 1
    for path, kind in kinds.items():
        expected = torch.float32 if path in frequencies else torch.bool if path in edges else torch.bfloat16
        assert kind == expected, path
    assert low.info["dtype"] == "bfloat16"
    assert graph.info["dtype"] == "float32"
    assert low.n_parameters == graph.n_parameters  # the tie of embedding and readout is kept
    assert torch.equal(low.edge_matrix, cut.edge_matrix)
    assert low.device == torch.device("cpu")


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_are_counted_as_hugging_face_counts_them(name):
    model = random_model(name)
    assert capture(model, verify=False).n_parameters == model.num_parameters()


def test_channel_parameters_are_those_of_heads_and_mlps(graph):
    model = random_model("llama-tied-biased")
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert graph.n_channel_parameters == layers


def test_constants_left_by_cuts_are_not_parameters_but_are_bits(graph, means):
    cut = graph.restrict([], means=means)
    assert cut.n_parameters == graph.n_parameters
    offsets = 32 * sum(p.offset.numel() for s in cut.stages for p in s.ports if p.offset is not None)
    edges = sum(p.edges.numel() for s in cut.stages for p in s.ports if p.edges is not None)
    assert cut.size_bits == graph.size_bits + offsets + edges
    assert edges == 110


def test_bits_follow_the_precision(graph):
    frequencies = 32 * 4  # one table of 4 rotary frequencies, shared by all layers or not
    tables = len({p for p in tree.tensors(graph.stages) if p.endswith("inv_freq")})
    assert graph.size_bits == 32 * graph.n_parameters + tables * frequencies
    assert graph.to(dtype=torch.bfloat16).size_bits == 16 * graph.n_parameters + tables * frequencies


@pytest.mark.parametrize("context", [1, 10])
def test_flops_are_two_per_weight_used_and_two_per_score_and_mix(context):
    graph = capture(random_model("llama"), verify=False)
    d, heads, kv_heads, d_head, d_mlp, vocabulary, layers = 32, 4, 2, 8, 48, 50, 2
    weights = d * heads * d_head * 2 + d * kv_heads * d_head * 2 + 3 * d * d_mlp
    attention = context * heads * d_head * 2
    assert graph.flops_per_token(context) == 2 * (layers * (weights + attention) + d * vocabulary)


# ---- printing ----------------------------------------------------------------------------------------------------


def test_a_graph_prints_what_it_holds(graph):
    cut = graph.restrict(graph.edges[2:], ablation="zero")
    assert repr(cut) == "Graph(llama: 12 nodes, 108 edges, 17,568 parameters)"
    lines = str(cut).splitlines()
    assert lines[0] == repr(cut)
    assert lines[1] == "  embed  1,600 parameters"
    assert lines[2].startswith("  blocks.0.attn.head.[0..3]  ")
    assert lines[3] == "    .q   hears 2 of 4 edges"
    assert lines[-1] == "    .in  hears 11 of 11 edges"


def test_a_graph_without_a_name_prints_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    assert str(Graph(capture(model).stages)).splitlines()[0] == "Graph(graph: 3 nodes, 2 edges, 13 parameters)"


# ---- the graph's own rules -----------------------------------------------------------------------------------------


def changed(s: int, **changes: Any) -> Callable[[tuple[Stage, ...]], tuple[Stage, ...]]:
    """Stages with one of them changed."""
    return lambda stages: (*stages[:s], dataclasses.replace(stages[s], **changes), *stages[s + 1 :])


def changed_port(s: int, **changes: Any) -> Callable[[tuple[Stage, ...]], tuple[Stage, ...]]:
    """Stages with the first port of one of them changed."""

    def change(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        first, *rest = stages[s].ports
        return changed(s, ports=(dataclasses.replace(first, **changes), *rest))(stages)

    return change


def read_of(stages: tuple[Stage, ...], **changes: Any) -> Any:
    return (dataclasses.replace(stages[1].ports[0].reads[0], **changes),)


HEADS = tuple(f"blocks.0.attn.head.{h}" for h in range(4))
BROKEN: dict[str, tuple[Callable[[tuple[Stage, ...]], tuple[Stage, ...]], str]] = {
    "no stages": (lambda s: (), "a graph needs stages"),
    "no output": (lambda s: s[:-1], "the last one must be an output that writes nothing"),
    "a name twice": (changed(2, nodes=("embed",)), "two nodes are named 'embed'"),
    "no nodes": (changed(1, nodes=()), r"stage 1 \(empty\): has no nodes"),
    "sees itself": (changed(2, visible=(0, 3)), r"stage 2 \(blocks.0.mlp\): sees stages 0..3"),
    "sees backwards": (changed(2, visible=(2, 1)), r"stage 2 \(blocks.0.mlp\): sees stages 2..1"),
    "sees before the start": (changed(2, visible=(-1, 1)), r"stage 2 \(blocks.0.mlp\): sees stages -1..1"),
    "ports that hear nothing": (
        changed(1, visible=(0, 0)),
        r"stage 1 \(blocks.0.attn.head.0\): must have ports",
    ),
    "hears without ports": (changed(2, ports=()), r"stage 2 \(blocks.0.mlp\): must have ports exactly if"),
    "a code width missing": (changed(1, code_widths=(16, 16)), r"stage 1 .*: needs one code width per node"),
    "codes that do not fit": (
        changed(1, code_widths=(8, 8, 8, 7)),
        r"stage 1 .*: its write map does not fit",
    ),
    "two outputs": (changed(2, write=None), r"stage 2 \(blocks.0.mlp\): writes nothing but is not the last"),
    "streams of two widths": (
        changed(2, write=Dense(torch.zeros(31, 48))),
        r"stage 3 .*different widths \[31, 32\]",
    ),
    "a read of another stream": (
        lambda s: changed_port(1, reads=read_of(s, map=Dense(torch.zeros(32, 31))))(s),
        r"stage 1 \(blocks.0.attn.head.0\): port q reads 31 dimensions of a stream of 32",
    ),
    "blocks that do not add up": (
        lambda s: changed_port(1, reads=read_of(s, widths=(8, 8, 8, 9)))(s),
        r"stage 1 .*: port q: block widths do not add up",
    ),
    "blocks that cannot be shared": (
        lambda s: changed_port(1, reads=read_of(s, widths=(16, 8, 8)))(s),
        r"stage 1 .*: port q: 4 nodes cannot share 3 blocks",
    ),
    "an edge table of another shape": (
        changed_port(1, edges=torch.ones(4, 2, dtype=torch.bool)),
        r"stage 1 .*: port q: the edge table has a wrong shape",
    ),
    "an offset of another width": (
        changed_port(1, offset=torch.zeros(4, 1, 31)),
        r"port q: a wrong offset shape",
    ),
    "an offset for other nodes": (
        changed_port(1, offset=torch.zeros(3, 1, 32)),
        r"port q: a wrong offset shape",
    ),
}


@pytest.mark.parametrize("rule", sorted(BROKEN))
def test_a_graph_that_breaks_a_rule_is_refused(graph, rule):
    change, message = BROKEN[rule]
    with pytest.raises(GraphError, match=message):
        Graph(change(graph.stages), graph.info)


def test_ports_are_ports(graph):
    assert [p.name for p in graph.stages[1].ports] == ["q", "k", "v"]
    assert all(isinstance(p, Port) for s in graph.stages for p in s.ports)
