"""Exports, read back by other means: the formats' rules, written down here once more, and brute force."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import networkx
import pytest
import torch
from families import random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import unweave
from unweave.capture import capture
from unweave.data import from_tensor
from unweave.errors import (
    CorruptFileError,
    InputError,
    ShapeError,
    StorageError,
    UnknownNameError,
    UnweaveError,
)
from unweave.execution import run
from unweave.export import (
    MibEntry,
    Prompt,
    check_mib,
    from_eap_json,
    to_attribution_graph,
    to_dot,
    to_eap_json,
    to_graphml,
    to_mib,
    to_networkx,
)
from unweave.export.grid import Grid, layout_of
from unweave.export.mib import PERCENTAGES
from unweave.statistics import collect_means
from unweave.zoo import known

NAMES = ["gpt2", "gpt_neox", "gpt_neox-sequential", "llama"]


@pytest.fixture(scope="module")
def graphs() -> dict[str, unweave.Graph]:
    found = {name: capture(random_model(name), verify=False) for name in NAMES}
    return found | {"zoo:induction": unweave.capture("zoo:induction")}


@pytest.fixture(scope="module")
def scored() -> unweave.EdgeScores:
    graph = unweave.capture("zoo:induction")
    return unweave.score_edges(graph, unweave.load_data("zoo:induction", limit=8))


def random_scores(graph: unweave.Graph) -> torch.Tensor:
    """Numbers on the edges there are, with holes."""
    values = torch.randn(graph.possible_edges.shape)
    return values.masked_fill(~graph.edge_matrix | (torch.rand(values.shape) < 0.1), torch.nan)


def eap_name(node: str, port: str = "") -> str:
    """The name in EAP's format, written down by hand."""
    if node in ("embed", "pos_embed"):
        return "input"
    if node == "unembed":
        return "logits"
    parts = node.split(".")
    return f"m{parts[1]}" if parts[2] == "mlp" else f"a{parts[1]}.h{parts[4]}" + (f"<{port}>" if port else "")


def eap_edges(n_layers: int, n_heads: int, parallel: bool) -> set[str]:
    """All edges of the format, by the loops of its definition."""
    before, edges = ["input"], set()
    for i in range(n_layers):
        heads = [f"a{i}.h{h}" for h in range(n_heads)]
        edges |= {f"{src}->{head}<{x}>" for src in before for head in heads for x in "qkv"}
        edges |= {f"{src}->m{i}" for src in (before if parallel else before + heads)}
        before += [*heads, f"m{i}"]
    return edges | {f"{src}->logits" for src in before}


# ---- EAP's JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "heads", "parallel"), [(1, 1, False), (2, 3, False), (3, 2, True), (12, 12, False)])
def test_the_grid_has_the_edges_of_the_format(layers, heads, parallel):
    grid = Grid(layers, heads, 8, parallel)
    names = grid.name_edges(grid.real)
    assert set(names) == eap_edges(layers, heads, parallel)
    assert len(names) == len(set(names)) == grid.n_edges
    if layers == 12:  # GPT-2: the numbers that the authors give
        assert (len(grid.sources) + 1, grid.n_edges) == (158, 32491)


@pytest.mark.parametrize("name", [*NAMES, "zoo:induction"])
def test_a_circuit_goes_there_and_back(graphs, name, tmp_path):
    graph = graphs[name]
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.6)
    data = from_tensor(torch.randint(40, (4, 9)))
    means = collect_means(graph, data)
    cut = graph.restrict(keep, means=means)
    scores = random_scores(cut)
    path = to_eap_json(cut, tmp_path / "circuit.json", scores)
    again, in_graph = from_eap_json(path, graph)
    assert torch.equal(in_graph, cut.edge_matrix)
    assert torch.equal(again.isnan(), scores.isnan())
    assert torch.equal(again.nan_to_num(), scores.nan_to_num())
    tokens = next(data.batches(4)).inputs
    rebuilt = graph.restrict(in_graph, means=means)
    assert torch.equal(run(rebuilt, tokens).logits, run(cut, tokens).logits)
    assert not torch.equal(run(rebuilt, tokens).logits, run(graph, tokens).logits)


@pytest.mark.parametrize("name", [*NAMES, "zoo:induction"])
def test_the_file_says_what_the_graph_says(graphs, name, tmp_path):
    graph = graphs[name]
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.5)
    scores = random_scores(graph)
    file = json.loads(to_eap_json(graph, tmp_path / "g.json", scores, keep).read_text())
    cfg = file["cfg"]
    info = graph.info
    assert cfg == {
        "n_layers": info["n_layers"],
        "n_heads": info["n_heads"],
        "d_model": info["d_model"],
        "parallel_attn_mlp": name == "gpt_neox",
    }
    assert set(file["edges"]) == eap_edges(cfg["n_layers"], cfg["n_heads"], cfg["parallel_attn_mlp"])
    expected: dict[str, list[float]] = {edge: [0.0, False] for edge in file["edges"]}
    ports = [port.rsplit(".", 1) for port in graph.ports]
    for j, i in graph.possible_edges.nonzero().tolist():
        entry = expected[f"{eap_name(graph.writers[i])}->{eap_name(*ports[j])}"]
        entry[0] += 0.0 if scores[j, i].isnan() else float(scores[j, i])
        entry[1] = entry[1] or bool(keep[j, i])
    for edge, (score, member) in expected.items():
        assert math.isclose(file["edges"][edge]["score"], score, rel_tol=1e-12)
        assert file["edges"][edge]["in_graph"] is member
    touched = {end for edge, (_, member) in expected.items() if member for end in edge.split("<")[0].split("->")}
    nodes = {name for name, node in file["nodes"].items() if node["in_graph"]}
    assert nodes == touched | {"input", "logits"}


def test_the_known_circuit_is_in_the_file(scored, tmp_path):
    graph = scored.graph
    path = to_eap_json(graph, tmp_path / "g.json", scored, scored.top(12))
    file = json.loads(path.read_text())
    for edge in map(unweave.Edge.parse, known("induction")["edges"]):
        assert file["edges"][f"{eap_name(edge.src)}->{eap_name(edge.dst, edge.port)}"]["in_graph"]
    # an attention-only model: the MLPs of the format are listed and empty
    assert not any(edge["in_graph"] for name, edge in file["edges"].items() if "m0" in name or "m1" in name)
    assert file["nodes"]["m0"] == {"in_graph": False}
    assert math.isclose(
        file["unweave"]["node_scores"]["input"], float(scored.node_nats[:2].double().sum()), rel_tol=1e-9
    )
    values, in_graph = from_eap_json(path, graph)
    assert torch.equal(in_graph, scored.top(12))
    assert torch.equal(values.nan_to_num(-1), scored.nats.nan_to_num(-1))


def test_a_file_of_other_programs_is_read(graphs, tmp_path):
    graph = graphs["gpt2"]
    path = to_eap_json(graph, tmp_path / "g.json", random_scores(graph).nan_to_num())
    file = json.loads(path.read_text())
    del file["unweave"]
    file["cfg"]["device"] = "cuda"  # a config may say more
    file["nodes"]["m0"] |= {"score": 1.5, "neurons": [True] * 32, "neurons_scores": [0.0] * 32}
    file["edges"]["input->m1"] = {"score": 3, "in_graph": False}
    path.write_text(json.dumps(file))
    scores, in_graph = from_eap_json(path, graph)
    row, first = graph.ports.index("blocks.1.mlp.in"), graph.writers.index("embed")
    assert graph.writers[first + 1] == "pos_embed"
    assert float(scores[row, first]) == 3.0
    assert scores[:, first + 1].isnan().all()
    assert in_graph[row].tolist() == [False, False, *in_graph[row, 2:].tolist()]
    rest = graph.possible_edges.clone()
    rest[row, :2] = False
    assert torch.equal(in_graph, rest)


def edited(change: Any) -> Any:
    """A test of one change to a good file, which must be refused."""
    return pytest.param(change, id=change.__name__)


def unknown_key(f):
    f["pickle"] = {}


def unknown_edge(f):
    f["edges"]["m1->a0.h0<q>"] = f["edges"].pop("input->m0")


def missing_edge(f):
    del f["edges"]["input->m0"]


def missing_node(f):
    del f["nodes"]["m0"]


def renamed_node(f):
    f["nodes"]["m7"] = f["nodes"].pop("m0")


def node_without_membership(f):
    f["nodes"]["m0"] = {}


def single_neurons(f):
    f["nodes"]["m0"]["neurons"] = [True, False]


def unknown_field(f):
    f["edges"]["input->m0"]["weight"] = 1


def text_as_score(f):
    f["edges"]["input->m0"]["score"] = "1"


def truth_as_score(f):
    f["edges"]["input->m0"]["score"] = True


def huge_score(f):
    f["edges"]["input->m0"]["score"] = 10**400


def number_as_membership(f):
    f["edges"]["input->m0"]["in_graph"] = 1


def huge_model(f):
    f["cfg"]["n_layers"] = 1 << 20


def absurd_model(f):
    f["cfg"]["n_heads"] = 10**30


def negative_model(f):
    f["cfg"]["n_layers"] = -1


def number_as_parallel(f):
    f["cfg"]["parallel_attn_mlp"] = 0


def list_of_edges(f):
    f["edges"] = []


def newer_version(f):
    f["unweave"]["version"] = 2


def odd_unscored(f):
    f["unweave"]["unscored"] = ["m1->m0"]


def unscored_not_listed(f):
    f["unweave"]["unscored"] = 5


def edited_input(f):
    f["edges"]["input->m0"]["score"] += 1.0


def edited_membership(f):
    f["edges"]["input->m0"]["in_graph"] = not f["edges"]["input->m0"]["in_graph"]


def input_half_there(f):
    del f["unweave"]["input"]["pos_embed"]


def input_of_text(f):
    f["unweave"]["input"]["embed"]["m0"] = ["1", True]


BREAKS = [
    unknown_key, unknown_edge, missing_edge, missing_node, renamed_node, node_without_membership, single_neurons,
    unknown_field, text_as_score, truth_as_score, huge_score, number_as_membership, huge_model, absurd_model,
    negative_model, number_as_parallel, list_of_edges, newer_version, odd_unscored, unscored_not_listed, edited_input, edited_membership,
    input_half_there, input_of_text,
]  # fmt: skip


@pytest.mark.parametrize("change", [edited(change) for change in BREAKS])
def test_broken_files_are_refused(graphs, tmp_path, change):
    path = to_eap_json(graphs["gpt2"], tmp_path / "g.json", random_scores(graphs["gpt2"]))
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(CorruptFileError, match=r"g\.json"):
        from_eap_json(path, graphs["gpt2"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"cfg": {}, "nodes": {}, "edges": NaN}', "[" * 1000, '{"cfg": {}}'])
def test_what_is_not_such_json_is_refused(graphs, tmp_path, text):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(CorruptFileError):
        from_eap_json(tmp_path / "g.json", graphs["gpt2"])
    with pytest.raises(StorageError):
        from_eap_json(tmp_path / "absent.json", graphs["gpt2"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_edit_is_refused_or_harmless(graphs, tmp_path, data):
    graph = graphs["zoo:induction"]
    path = to_eap_json(graph, tmp_path / "g.json")
    file = json.loads(path.read_text())
    junk = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({})
    where = file
    while isinstance(where, dict) and where and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(where)))
        parent, where = where, where[key]
    if where is not file:
        parent[key] = data.draw(junk)
    path.write_text(json.dumps(file))
    try:
        scores, in_graph = from_eap_json(path, graph)
    except UnweaveError:
        return
    assert in_graph.shape == scores.shape == graph.possible_edges.shape
    assert not bool((in_graph & ~graph.possible_edges).any())
    assert not scores.isinf().any()


def test_what_the_format_cannot_hold_is_refused(graphs, tmp_path):
    path = tmp_path / "g.json"
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.part\.0"):
        to_eap_json(graphs["gpt2"].refine({"blocks.0.mlp": 3}), path)
    parts = {f"blocks.1.attn.head.{h}": 2 for h in range(4)}
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.head\.0\.part\.0"):
        to_eap_json(graphs["gpt2"].refine(parts), path)
    plain = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="transformers"):
        to_eap_json(plain, path)
    renamed = [dataclasses.replace(s, layer=10**9) if s.kind == "mlp" else s for s in graphs["gpt2"].stages]
    with pytest.raises(InputError, match="layer 1000000000"):
        layout_of(dataclasses.replace(graphs["gpt2"], stages=tuple(renamed)))
    assert not path.exists()


def test_scores_and_circuits_of_another_graph_are_refused(graphs, scored, tmp_path):
    graph, path = graphs["gpt2"], tmp_path / "g.json"
    with pytest.raises(ShapeError, match="whose nodes are not those"):
        to_eap_json(graph, path, scored)
    with pytest.raises(ShapeError, match="ports x writers"):
        to_eap_json(graph, path, torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="booleans"):
        to_eap_json(graph, path, in_graph=torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(InputError, match="cannot hear"):
        to_eap_json(graph, path, in_graph=torch.ones_like(graph.edge_matrix))
    with pytest.raises(InputError, match="infinite"):
        to_eap_json(graph, path, torch.full(graph.edge_matrix.shape, torch.inf))
    to_eap_json(graphs["llama"], path)
    with pytest.raises(InputError, match="parallel=False"):
        from_eap_json(path, graphs["gpt_neox"])


def test_scores_in_half_precision_stay_what_they_are(graphs, tmp_path):
    graph = graphs["llama"]
    scores = torch.randn(graph.edge_matrix.shape).bfloat16().masked_fill(~graph.edge_matrix, torch.nan)
    again, _ = from_eap_json(to_eap_json(graph, tmp_path / "g.json", scores), graph)
    assert torch.equal(again.nan_to_num(), scores.float().nan_to_num())


# ---- MIB -------------------------------------------------------------------------------------------------


def circuits(graph: unweave.Graph) -> dict[float, torch.Tensor]:
    """The most edges of one writer to one target that each percentage allows."""
    total = layout_of(graph).grid.n_edges
    places = graph.possible_edges.nonzero()
    places = places[places[:, 1] != 1]  # of the two embeddings, which are one node there, only the first
    out = {}
    for percentage in PERCENTAGES:
        chosen = places[: int(percentage / 100 * total)]
        out[percentage] = torch.zeros_like(graph.possible_edges)
        out[percentage][chosen[:, 0], chosen[:, 1]] = True
    return out


def test_a_submission_of_both_kinds(graphs, tmp_path):
    graph = graphs["gpt2"]
    ranked, members = MibEntry(graph, scores=random_scores(graph)), MibEntry(graph, circuits=circuits(graph))
    folder = to_mib(tmp_path / "ours", {"ioi_gpt2": ranked, "arithmetic-addition_llama3": members})
    assert check_mib(folder) == {"ioi_gpt2": "importances", "arithmetic-addition_llama3": "circuits"}
    assert {p.name for p in folder.iterdir()} == {"ioi_gpt2", "arithmetic-addition_llama3"}
    names = {p.name for p in (folder / "arithmetic-addition_llama3").iterdir()}
    assert names == {f"{p}.json" for p in ("0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50")}
    file = json.loads((folder / "arithmetic-addition_llama3" / "10.json").read_text())
    share = sum(edge["in_graph"] for edge in file["edges"].values()) / len(file["edges"])
    assert 0.09 < share <= 0.1
    with pytest.raises(StorageError, match="exists"):
        to_mib(folder, {"ioi_gpt2": ranked, "arithmetic-addition_llama3": members})


def test_submissions_that_break_a_rule_are_refused(graphs, tmp_path):
    graph, other = graphs["gpt2"], graphs["zoo:induction"]
    good, kept = MibEntry(graph, scores=random_scores(graph)), circuits(graph)
    wide = kept | {50.0: graph.possible_edges}
    for entries, match in (
        ({"ioi_gpt2": good, "mcqa_gpt2": good}, "two models"),
        ({"ioi_gpt2": good, "ioi_llama3": good}, "two tasks"),
        ({}, "two tasks are needed, got none"),
        ({"ioi_gpt3": good}, "gpt2"),
        ({"iou_gpt2": good}, "ioi"),
        ({"ioi_gpt2": MibEntry(graph)}, "either scores or circuits"),
        ({"ioi_gpt2": MibEntry(graph, random_scores(graph), kept)}, "either scores or circuits"),
        ({"ioi_gpt2": MibEntry(graph, circuits={0.1: kept[0.1]})}, "circuits are needed at"),
        ({"ioi_gpt2": MibEntry(graph, circuits=wide), "mcqa_llama3": good}, r"ioi_gpt2: the circuit for 50% has"),
        ({"ioi_gpt2": MibEntry(graph, torch.zeros(graph.edge_matrix.shape)), "mcqa_llama3": good}, "ranks nothing"),
        ({"ioi_gpt2": good, "mcqa_gpt2": MibEntry(other, random_scores(other)), "mcqa_llama3": good}, "another folder"),
    ):
        with pytest.raises(InputError, match=match):
            to_mib(tmp_path / "ours", entries)
        assert not list(tmp_path.iterdir())


def test_the_checker_refuses_folders_made_by_hand(graphs, tmp_path):
    graph = graphs["gpt2"]
    good = MibEntry(graph, scores=random_scores(graph))
    folder = to_mib(tmp_path / "ours", {"ioi_gpt2": good, "mcqa_llama3": good})
    (folder / "README.md").write_text("ours")
    assert len(check_mib(folder)) == 2
    place = folder / "ioi_gpt2"
    (place / "notes.txt").write_text("x")
    with pytest.raises(CorruptFileError, match=r"notes\.txt"):
        check_mib(folder)
    (place / "notes.txt").unlink()
    (place / "second.json").write_text((place / "importances.json").read_text())
    with pytest.raises(CorruptFileError, match="2 files"):
        check_mib(folder)
    (place / "second.json").unlink()
    (folder / "something").mkdir()
    with pytest.raises(CorruptFileError, match="something"):
        check_mib(folder)
    with pytest.raises(StorageError, match="no folder"):
        check_mib(tmp_path / "absent")


# ---- attribution graphs ----------------------------------------------------------------------------------

TEXT, WHOLE, NUMBER = (str,), (int,), (int, float)
GRAPH_SCHEMA: dict[str, Any] = {
    "metadata": {"slug": TEXT, "scan": TEXT, "prompt_tokens": [TEXT], "prompt": TEXT, "schema_version?": WHOLE,
                 "info?": {"description?": TEXT, "generator?": {"name?": TEXT, "version?": TEXT}}},
    "qParams": {"pinnedIds?": [TEXT], "supernodes?": [[TEXT]], "linkType?": TEXT, "clickedId?": TEXT, "sg_pos?": TEXT},
    "nodes": [{"node_id": TEXT, "feature": (int, type(None)), "layer": (str, int), "ctx_idx": WHOLE,
               "feature_type": TEXT, "jsNodeId": TEXT, "clerp": TEXT, "influence?": (int, float, type(None)),
               "token_prob?": NUMBER, "is_target_logit?": (bool,)}],
    "links": [{"source": TEXT, "target": TEXT, "weight": NUMBER}],
}  # fmt: skip
FEATURE_TYPES = {
    "cross layer transcoder", "mlp reconstruction error", "embedding", "logit", "lorsa", "lorsa error", "bias",
    "unexplored node", "unknown",
}  # fmt: skip


def hold_against(schema: Any, value: Any, where: str = "") -> None:
    """A plain checker: objects with (optional?) fields and no others, lists of one kind, and types."""
    if isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            hold_against(schema[0], item, where + "[]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert set(value) <= {key.rstrip("?") for key in schema}, where
        for key, inner in schema.items():
            assert key.endswith("?") or key in value, f"{where}.{key}"
            if key.rstrip("?") in value:
                hold_against(inner, value[key.rstrip("?")], f"{where}.{key}")
    else:
        assert isinstance(value, schema), (where, value)
        assert bool in schema or not isinstance(value, bool), (where, value)


def check_attribution_graph(file: Any) -> None:
    hold_against(GRAPH_SCHEMA, file)
    ids = [node["node_id"] for node in file["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({node["jsNodeId"] for node in file["nodes"]}) == len(ids)
    assert {node["feature_type"] for node in file["nodes"]} <= FEATURE_TYPES
    assert {end for link in file["links"] for end in (link["source"], link["target"])} == set(ids)
    assert {i for group in file["qParams"]["supernodes"] for i in group[1:]} <= set(ids)
    assert all(0 <= node["ctx_idx"] < len(file["metadata"]["prompt_tokens"]) for node in file["nodes"])
    assert all(0 < node["influence"] <= 1 for node in file["nodes"])
    assert len(file["links"]) <= 50_000


def test_an_attribution_graph_without_positions(scored, tmp_path):
    circuit = known("induction")
    ends = [circuit["previous_token_heads"][0], circuit["induction_heads"][0]]
    graph = scored.graph.quotient({"the circuit": ends})
    path = to_attribution_graph(graph, tmp_path / "g.json", scored, slug="x", labels={ends[0]: "looks back"})
    file = json.loads(path.read_text())
    check_attribution_graph(file)
    assert len(file["metadata"]["prompt_tokens"]) == 1
    label = {node["clerp"]: node["node_id"] for node in file["nodes"]}
    (supernode,) = file["qParams"]["supernodes"]
    assert supernode == ["the circuit", label["looks back"], label[ends[1]]]
    kinds = {node["clerp"]: node["feature_type"] for node in file["nodes"]}
    assert kinds["embed"] == "embedding"
    assert kinds[ends[1]] == "lorsa"
    assert kinds['Output "unembed" (p=1.000)'] == "logit"
    layer, head = (int(x) for x in label["looks back"].split("_")[:2])
    feature = next(node["feature"] for node in file["nodes"] if node["clerp"] == "looks back")
    assert feature == (layer + head) * (layer + head + 1) // 2 + head
    weights = {(link["source"], link["target"]): link["weight"] for link in file["links"]}
    total = sum(
        float(scored.nats[graph.ports.index(f"{ends[1]}.{port}"), graph.writers.index(ends[0])]) for port in "qkv"
    )
    assert math.isclose(weights[label["looks back"], label[ends[1]]], total, rel_tol=1e-6)
    strength = [abs(link["weight"]) for link in file["links"]]
    assert strength == sorted(strength, reverse=True)
    assert to_attribution_graph(graph, tmp_path / "few.json", scored, max_links=3).exists()
    few = json.loads((tmp_path / "few.json").read_text())
    check_attribution_graph(few)
    assert few["links"] == file["links"][:3]


@pytest.mark.parametrize("carried", [False, True])
def test_an_attribution_graph_of_a_prompt(graphs, tmp_path, carried):
    graph, tokens = graphs["gpt2"], [" the", "\n", "</script>"]
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.5)
    graph = graph.restrict(keep, ablation="zero")
    values = torch.randn(*([3] * (1 + carried)), *keep.shape).masked_fill(torch.rand(keep.shape) < 0.1, torch.nan)
    file = json.loads(to_attribution_graph(graph, tmp_path / "g.json", Prompt(tokens, values)).read_text())
    check_attribution_graph(file)
    assert file["metadata"]["prompt_tokens"] == tokens
    expected: dict[tuple[str, int, str, int], float] = {}
    for j, i in keep.nonzero().tolist():
        for t in range(3):
            for s in range(3) if carried else [t]:
                value = float(values[t, s, j, i] if carried else values[t, j, i])
                key = (graph.writers[i], s, graph.ports[j].rsplit(".", 1)[0], t)
                expected[key] = expected.get(key, 0.0) + (0.0 if math.isnan(value) else value)
    expected = {key: value for key, value in expected.items() if value}
    where = {node["node_id"]: (node["clerp"], node["ctx_idx"]) for node in file["nodes"]}
    named = {name: name for name in graph.nodes} | {'Output "unembed" (p=1.000)': "unembed"}
    got = {}
    for link in file["links"]:
        (src, s), (dst, t) = where[link["source"]], where[link["target"]]
        got[named[src], s, named[dst], t] = link["weight"]
    assert got.keys() == expected.keys()
    assert all(math.isclose(got[key], expected[key], rel_tol=1e-6, abs_tol=1e-9) for key in got)


def test_at_most_so_many_links(graphs, tmp_path):
    graph = graphs["llama"]
    values = torch.randn(32, 32, *graph.edge_matrix.shape)
    file = json.loads(to_attribution_graph(graph, tmp_path / "g.json", Prompt(["x"] * 32, values)).read_text())
    check_attribution_graph(file)
    assert len(file["links"]) == 50_000


def test_a_refined_graph_has_unique_ids_too(graphs, tmp_path):
    fine = graphs["gpt2"].refine({"blocks.0.mlp": 5} | {f"blocks.0.attn.head.{h}": 2 for h in range(4)})
    file = json.loads(to_attribution_graph(fine, tmp_path / "g.json", fine.edge_matrix.float()).read_text())
    check_attribution_graph(file)
    assert len(file["nodes"]) == len(fine.nodes)


def test_nonsense_for_attribution_graphs_is_refused(graphs, scored, tmp_path):
    graph, path = graphs["gpt2"], tmp_path / "g.json"
    with pytest.raises(ShapeError, match="2 tokens"):
        to_attribution_graph(graph, path, Prompt(["a", "b"], torch.zeros(3, *graph.edge_matrix.shape)))
    with pytest.raises(InputError, match="infinite"):
        to_attribution_graph(graph, path, Prompt(["a"], torch.full((1, *graph.edge_matrix.shape), torch.inf)))
    with pytest.raises(InputError, match="max_links"):
        to_attribution_graph(graph, path, graph.edge_matrix.float(), max_links=50_001)
    with pytest.raises(UnknownNameError, match="unembed"):
        to_attribution_graph(graph, path, graph.edge_matrix.float(), labels={"unembd": "x"})
    with pytest.raises(ShapeError, match="whose nodes"):
        to_attribution_graph(graph, path, scored)
    assert not path.exists()


# ---- networkx, GraphML, DOT ------------------------------------------------------------------------------


def expected_edges(graph: unweave.Graph, scores: torch.Tensor) -> dict[tuple[str, str, str], float]:
    marked = graph.mark_edges
    return {(e.src, e.dst, e.port): float(scores[marked([e])][0]) for e in graph.edges}


def test_networkx_has_every_edge_with_its_score(scored):
    graph = scored.graph.restrict(scored.top(20), ablation="zero").quotient({"both": ["embed", "unembed"]})
    network = to_networkx(graph, scored.nats)
    got = {(src, dst, port): data["score"] for src, dst, port, data in network.edges(keys=True, data=True)}
    assert got == expected_edges(graph, scored.nats)
    assert list(network.nodes) == list(graph.nodes)
    assert {n for n, d in network.nodes(data=True) if d.get("module") == "both"} == {"embed", "unembed"}
    bare = to_networkx(graph)
    assert not any("score" in data for _, _, data in bare.edges(data=True))
    assert networkx.is_directed_acyclic_graph(bare)
    assert [network.nodes[n]["layer"] for n in ("embed", "unembed")] == [-1, 2]


def test_graphml_is_read_back_the_same(scored, tmp_path):
    graph = scored.graph.quotient({'a "<&>" module': ["embed"]})
    path = to_graphml(graph, tmp_path / "g.graphml", scored)
    again = networkx.read_graphml(path, force_multigraph=True)
    got = {(src, dst, data["port"]): data["score"] for src, dst, data in again.edges(data=True)}
    expected = expected_edges(graph, scored.nats)
    assert got == pytest.approx(expected)
    assert again.nodes["embed"]["module"] == 'a "<&>" module'
    ElementTree.parse(path)


def dot_tokens(text: str) -> list[str]:
    """A scanner for the DOT we write: quoted strings (in which only \\" is special), words, arrows, punctuation."""
    out, i = [], 0
    while i < len(text):
        if text[i].isspace():
            i += 1
        elif text[i] == '"':
            end = i + 1
            while text[end] != '"':
                end += 2 if text[end] == "\\" else 1
            out.append(text[i : end + 1])
            i = end + 1
        elif text.startswith("->", i):
            out.append("->")
            i += 2
        elif text[i] in "{}[]=;,":
            out.append(text[i])
            i += 1
        else:
            end = i
            while text[end].isalnum() or text[end] in "_.-":
                end += 1
            assert end > i, f"a stray {text[i]!r}"
            out.append(text[i:end])
            i = end
    return out


def shown(quoted: str) -> str:
    """What Graphviz shows for a quoted label."""
    text, out, i = quoted[1:-1], "", 0
    while i < len(text):
        if text[i] == "\\":
            assert text[i + 1] in '\\"n', "an escape that means something else"
            out += "\n" if text[i + 1] == "n" else text[i + 1]
            i += 2
        else:
            out += text[i]
            i += 1
    return out.replace("&amp;", "&")


def parse_dot(text: str) -> tuple[dict[str, dict[str, str]], list[tuple[str, str, dict[str, str]]], list[list[str]]]:
    """(nodes, edges, rows of equal rank) of a DOT file, by id."""
    tokens = dot_tokens(text)
    assert tokens[:3] == ["digraph", "unweave", "{"]
    assert tokens[-1] == "}"
    nodes, edges, ranks = {}, [], []
    statement: list[str] = []
    depth = 0
    for token in tokens[3:-1]:
        depth += (token in "{[") - (token in "}]")
        statement.append(token)
        if depth or token not in ";}":
            continue
        if statement[0] == "{":
            assert statement[1:5] == ["rank", "=", "same", ";"]
            ranks.append([t for t in statement[5:-1] if t != ";"])
        elif "[" in statement:
            start = statement.index("[")
            inner = [t for t in statement[start + 1 : statement.index("]", start)] if t != ","]
            assert inner[1::3] == ["="] * (len(inner) // 3)
            style = dict(zip(inner[0::3], inner[2::3], strict=True))
            if start == 1:
                nodes[statement[0]] = style
            else:
                assert statement[1] == "->"
                edges.append((statement[0], statement[2], style))
        statement = []
    assert not statement
    return nodes, edges, ranks


def test_dot_says_what_the_graph_says(scored, tmp_path):
    graph = scored.graph.restrict(scored.top(30), ablation="zero").quotient({"both": ["embed", "unembed"]})
    nodes, edges, ranks = parse_dot(to_dot(graph, tmp_path / "g.dot", scored.nats).read_text())
    style = nodes.pop("node")
    assert style["shape"] == "box"
    names = {number: shown(style["label"]) for number, style in nodes.items()}
    assert list(names.values()) == list(graph.nodes)
    assert [[names[n] for n in row] for row in ranks] == [list(stage.nodes) for stage in graph.stages]
    got = {(names[a], names[b], shown(s["label"])): float(shown(s["tooltip"])) for a, b, s in edges}
    assert got == pytest.approx(expected_edges(graph, scored.nats), rel=1e-4)
    widths = sorted((abs(float(shown(s["tooltip"]))), float(s["penwidth"])) for _, _, s in edges)
    assert [w for _, w in widths] == sorted(w for _, w in widths)
    assert widths[-1][1] == 5.0
    coloured = [n for n, s in nodes.items() if "fillcolor" in s]
    assert [names[n] for n in coloured] == ["embed", "unembed"]
    _, few, _ = parse_dot(to_dot(graph, tmp_path / "few.dot", scored.nats, max_edges=4).read_text())
    assert {(names[a], names[b], shown(s["label"])) for a, b, s in few} == {
        (e.src, e.dst, e.port) for e in graph.name_edges(scored.top(4))
    }
    negative = to_dot(graph, tmp_path / "minus.dot", -scored.nats).read_text()
    assert negative.count("color=red") == 30
    with pytest.raises(InputError, match="max_edges"):
        to_dot(graph, tmp_path / "x.dot", max_edges=-1)


HOSTILE = ['"]; evil [label="', "a\\", '\\"', "<b>x</b>", "\\N", "&lt;", "a\nb", "\x00", "}", "n1", "->", "é\u202e", ""]


def renamed(graph: unweave.Graph, names: list[str], module: str) -> unweave.Graph:
    """The graph with its nodes renamed."""
    left = iter(names)
    stages = [dataclasses.replace(s, nodes=tuple(next(left) for _ in s.nodes)) for s in graph.stages]
    return dataclasses.replace(graph, stages=tuple(stages), modules={names[0]: module}, info={"name": module})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(max_size=12) | st.sampled_from(HOSTILE), min_size=7, max_size=7, unique=True),
    st.text(max_size=8) | st.sampled_from(HOSTILE),
)
def test_hostile_names_stay_names(graphs, tmp_path, names, module):
    graph = renamed(graphs["zoo:induction"], names, module)
    nodes, edges, _ = parse_dot(to_dot(graph, tmp_path / "g.dot").read_text(encoding="utf-8"))
    del nodes["node"]

    def visible(name: str) -> str:
        return "".join("\ufffd" if (c < " " and c != "\n") or c == "\x7f" else c for c in name)

    assert [shown(style["label"]) for style in nodes.values()] == [visible(name) for name in names]
    assert len(edges) == graph.n_edges
    assert shown(nodes["n0"]["tooltip"]) == visible(module)
    file = to_attribution_graph(graph, tmp_path / "g.json", graph.edge_matrix.float())
    check_attribution_graph(json.loads(file.read_text(encoding="utf-8")))
    with pytest.raises(InputError, match="EAP"):
        to_eap_json(graph, tmp_path / "eap.json")
    if is_xml("".join([*names, module])):
        root = ElementTree.parse(to_graphml(graph, tmp_path / "g.graphml")).getroot()
        read = [node.get("id") for node in root.iter("{http://graphml.graphdrawing.org/xmlns}node")]
        assert read == names
    else:
        with pytest.raises(InputError, match="XML"):
            to_graphml(graph, tmp_path / "g.graphml")


def is_xml(text: str) -> bool:
    try:
        ElementTree.fromstring(f"<a>{escape(text)}</a>")
    except ElementTree.ParseError:
        return False
    return True


def test_files_are_replaced_whole_or_not_at_all(graphs, scored, tmp_path, monkeypatch):
    graph, path = scored.graph, tmp_path / "out"
    exports = {
        "eap": lambda: to_eap_json(graph, path, scored),
        "attribution": lambda: to_attribution_graph(graph, path, scored),
        "dot": lambda: to_dot(graph, path, scored),
        "graphml": lambda: to_graphml(graph, path, scored),
    }
    replace, failing = Path.chmod, True

    def chmod(self: Path, mode: int) -> None:
        if failing:
            raise OSError("the disk is full")
        replace(self, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    for name, export in exports.items():
        path.write_text("old")
        failing = True
        with pytest.raises(StorageError, match="disk is full"):
            export()
        assert path.read_text() == "old", name
        failing = False
        assert export() == path
        assert path.read_text() != "old", name
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
