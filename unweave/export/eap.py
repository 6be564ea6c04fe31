"""Circuits in the JSON of EAP-IG and MIB: scores and membership of every edge.

All edges of the format are listed, those that a graph lacks (an MLP in an attention-only model) with score 0 and
outside the circuit. The token and position embeddings are one node there, ``input``: its edge carries the sum of
their scores, and is in the circuit if one of theirs is. The sum is exact for "eap" and "eap-ig", which are linear in
what is written; for "fisher" and "exact" it is the score of both together as far as they are uncorrelated. What the
format has no room for is kept under the key "unweave", which other programs ignore.

Source: Hanna et al. 2024, "Have Faith in Faithfulness"; Mueller et al. 2025, "MIB".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave import __version__
from unweave.errors import CorruptFileError, InputError, ShapeError
from unweave.export.grid import Grid, Layout, Scores, layout_of, score_matrix
from unweave.files import read_json, write_json
from unweave.graph import Graph
from unweave.scoring import EdgeScores

__all__ = ["EapFile", "from_eap_json", "read_eap_json", "to_eap_json"]

VERSION = 1
SIZES = ("n_layers", "n_heads", "d_model")
MAX_SIZE = 1 << 20
MAX_SCORE = 3e38  # what a 32-bit float holds


# ---- writing -------------------------------------------------------------------------------------------


def to_eap_json(
    graph: Graph,
    path: str | Path,
    scores: Scores | None = None,
    in_graph: Bool[Tensor, "ports writers"] | None = None,
) -> Path:
    """Write a circuit as EAP's graph JSON, which EAP-IG's and MIB's programs load.

    Args:
        graph: a captured, cut or compressed transformer whose nodes are whole.
        path: the file to write.
        scores: of the edges, in nats per token or any unit; NaN where there is none (0 in the file).
        in_graph: which edges are in the circuit; by default those of ``graph``.

    Returns:
        The path.

    Raises:
        InputError: the format has no place for a node (a refined part, a model that is no transformer) or the
            circuit has an edge that the graph cannot have.
        ShapeError: the scores or the circuit are of another graph.
        StorageError: it could not be written.

    Cost:
        About 80 bytes per edge: 3 MB for GPT-2, 130 MB for a Llama of 32 layers of 32 heads, which is more than
        :func:`from_eap_json` reads.

    Exact?
        :func:`from_eap_json` gives back every number and every edge. Not stored are weights, and what
        ablated edges send: restrict the same model with the same means.

    Example:
        >>> import tempfile, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = to_eap_json(graph, Path(folder) / "circuit.json")
        ...     scores, in_graph = from_eap_json(path, graph)
        >>> bool((in_graph == graph.edge_matrix).all())
        True
    """
    layout, values = layout_of(graph), score_matrix(graph, scores)
    kept = _check_circuit(graph, graph.edge_matrix if in_graph is None else in_graph)
    grid = layout.grid
    merged = layout.merge(values.nan_to_num())
    members = layout.merge(kept.double()) > 0
    scored = layout.merge((~values.isnan()).double()) > 0
    names, real = grid.name_edges(grid.real), grid.real
    rows = zip(names, merged[real].tolist(), members[real].tolist(), strict=True)
    extras: dict[str, Any] = {
        "version": VERSION,
        "unweave": __version__,
        "name": str(graph.info.get("name", "graph")),
        "unscored": grid.name_edges(real & ~scored),
        # not with the nodes, where the format has a place for them: eap 2.0.0 cannot save what it so loaded
        "node_scores": _node_scores(layout, scores),
    }
    if len(layout.inputs) > 1:
        extras["input"] = _split_input(graph, layout, values, kept)
    data = {
        "cfg": {name: getattr(grid, name) for name in SIZES} | {"parallel_attn_mlp": grid.parallel},
        "nodes": _nodes(grid, members),
        "edges": {name: {"score": score, "in_graph": member} for name, score, member in rows},
        "unweave": extras,
    }
    write_json(path, data)
    return Path(path)


def _check_circuit(graph: Graph, in_graph: Tensor) -> Bool[Tensor, "ports writers"]:
    expected = graph.possible_edges.shape
    if in_graph.shape != expected or in_graph.dtype != torch.bool:
        got = f"{tuple(in_graph.shape)} of {in_graph.dtype}"
        raise ShapeError(f"in_graph must be {tuple(expected)} (ports x writers) of booleans, got {got}")
    wrong = in_graph.cpu() & ~graph.possible_edges
    if bool(wrong.any()):
        edge = graph.name_edges(wrong)[0]
        raise InputError(f"in_graph marks {edge}, but {edge.dst} cannot hear {edge.src}")
    return in_graph.cpu()


def _nodes(grid: Grid, members: Tensor) -> dict[str, dict[str, bool]]:
    """A node is in the circuit if an edge into or out of it is; so are input and logits, always."""
    touched = {grid.sources[i] for i in members.any(1).nonzero()[:, 0].tolist()}
    touched |= {grid.targets[j].partition("<")[0] for j in members.any(0).nonzero()[:, 0].tolist()}
    touched |= {"input", "logits"}
    return {name: {"in_graph": name in touched} for name in (*grid.sources, "logits")}


def _node_scores(layout: Layout, scores: Scores | None) -> dict[str, float]:
    if not isinstance(scores, EdgeScores):
        return {}
    nats = scores.node_nats.detach().cpu().double()
    known = nats.isfinite()
    n = len(layout.grid.sources)
    total = nats.new_zeros(n).index_add_(0, layout.source_of[known], nats[known])
    there = torch.zeros(n, dtype=torch.bool)
    there[layout.source_of[known]] = True
    return {layout.grid.sources[i]: float(total[i]) for i in there.nonzero()[:, 0].tolist()}


def _split_input(graph: Graph, layout: Layout, values: Tensor, kept: Tensor) -> dict[str, Any]:
    """What was merged: by embedding and target, its score (null: none) and whether it is in the circuit."""
    targets = [layout.grid.targets[j] for j in layout.target_of.tolist()]
    out = {}
    for i in layout.inputs:
        rows = zip(targets, values[:, i].tolist(), kept[:, i].tolist(), strict=True)
        out[graph.writers[i]] = {t: [None if math.isnan(score) else score, member] for t, score, member in rows}
    return out


# ---- reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EapFile:
    """The checked content of one file, on the grid.

    Attributes:
        extras: what stands under "unweave", unchecked.
    """

    grid: Grid
    scores: Float[Tensor, "sources targets"]
    in_graph: Bool[Tensor, "sources targets"]
    extras: Mapping[str, Any]


def from_eap_json(
    path: str | Path, graph: Graph
) -> tuple[Float[Tensor, "ports writers"], Bool[Tensor, "ports writers"]]:
    """Read a circuit of this graph from EAP's graph JSON; the file need not be trusted.

    Edges decide, as in EAP's own evaluation; whether the file calls a node part of the circuit does not. In a file
    that does not come from unweave, the token embedding gets the score of ``input``, a table of
    positions beside it gets none (NaN), and both are in the circuit where ``input`` is.

    Returns:
        (scores, in_graph): NaN where there is no score; hand ``in_graph`` to :meth:`unweave.Graph.restrict`.

    Raises:
        InputError: the file is of a model of another size, or the graph has no place in the format.
        StorageError: the file cannot be read.
        CorruptFileError: it breaks the format, is larger than 64 MiB, or holds a circuit of single neurons.

    Example:
        See :func:`to_eap_json`.
    """
    layout, file = layout_of(graph), read_eap_json(path)
    if file.grid != layout.grid:
        raise InputError(f"{path} is of {file.grid}, but this graph is of {layout.grid}")
    values, kept = layout.spread(file.scores), layout.spread(file.in_graph)
    unscored = torch.zeros_like(file.in_graph)
    unscored[_places(path, file)] = True
    values = values.masked_fill(layout.spread(unscored), torch.nan)
    if len(layout.inputs) > 1:
        values, kept = _join_input(path, graph, layout, file, values, kept)
    return values.masked_fill(~graph.possible_edges, torch.nan).float(), kept & graph.possible_edges


def _places(path: str | Path, file: EapFile) -> tuple[Tensor, Tensor]:
    """Where the edges listed as unscored are in the grid."""
    listed, real = file.extras.get("unscored", []), file.grid.real
    known = dict(zip(file.grid.name_edges(real), real.nonzero().tolist(), strict=True))
    if not isinstance(listed, list) or not all(isinstance(n, str) and n in known for n in listed):
        raise CorruptFileError(f"{path}: unweave.unscored must list edges")
    at = torch.tensor([known[n] for n in listed], dtype=torch.long).reshape(-1, 2)
    return at[:, 0], at[:, 1]


def _join_input(
    path: str | Path, graph: Graph, layout: Layout, file: EapFile, values: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """The columns of the embeddings, told apart as the file does, or by the rule for files of others."""
    names = [graph.writers[i] for i in layout.inputs]
    values, kept = values.clone(), kept.clone()
    if "input" not in file.extras:
        values[:, layout.inputs[1:]] = torch.nan
        return values, kept
    targets = [layout.grid.targets[j] for j in layout.target_of.tolist()]
    split = file.extras["input"]
    rows = [[_cell(path, split, name, target) for name in names] for target in targets]
    own = torch.tensor([[cell[0] for cell in row] for row in rows], dtype=torch.float64)
    member = torch.tensor([[cell[1] for cell in row] for row in rows])
    merged, marked = file.scores[0, layout.target_of], file.in_graph[0, layout.target_of]
    off = (own.nan_to_num().sum(1) - merged).abs() > 1e-9 * own.nan_to_num().abs().sum(1)
    if bool(off.any()) or not torch.equal(member.any(1), marked):
        raise CorruptFileError(f"{path}: 'unweave.input' is not what the edges say; if they were edited, remove it")
    values[:, layout.inputs], kept[:, layout.inputs] = own, member
    return values, kept


def _cell(path: str | Path, split: Any, name: str, target: str) -> tuple[float, bool]:
    row = split.get(name) if isinstance(split, dict) else None
    cell = row.get(target) if isinstance(row, dict) else None
    if isinstance(cell, list) and len(cell) == 2 and type(cell[1]) is bool:
        if cell[0] is None:
            return math.nan, cell[1]
        if _is_number(cell[0]):
            return float(cell[0]), cell[1]
    raise CorruptFileError(f"{path}: unweave.input.{name}.{target} must be [score or null, true or false], got {cell}")


def read_eap_json(path: str | Path) -> EapFile:
    """Read and check a file on its own, without the graph it is of.

    Raises:
        StorageError: it cannot be read.
        CorruptFileError: it breaks the format; says where.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not {"cfg", "nodes", "edges"} <= set(data):
        raise CorruptFileError(f"{path} is not EAP's graph JSON: it needs the keys cfg, nodes and edges")
    _refuse_keys(path, "it", data, {"cfg", "nodes", "edges", "unweave"})
    for key, value in data.items():
        if not isinstance(value, dict):
            raise CorruptFileError(f"{path}: {key!r} must be an object, got {type(value).__name__}")
    grid = _read_grid(path, data["cfg"], len(data["nodes"]), len(data["edges"]))
    _check_nodes(path, grid, data["nodes"])
    scores, in_graph = _read_edges(path, grid, data["edges"])
    extras = data.get("unweave", {})
    if extras and (extras.get("version") != VERSION or type(extras["version"]) is not int):
        got = f"{extras.get('version')!r}; this unweave ({__version__}) reads {VERSION}"
        raise CorruptFileError(f"{path}: unweave.version is {got}")
    return EapFile(grid, scores, in_graph, extras)


def _refuse_keys(path: str | Path, where: str, given: Mapping[str, Any], known: set[str]) -> None:
    odd = sorted(set(given) - known)
    if odd:
        raise CorruptFileError(f"{path}: {where} has the unknown key {odd[0]!r}; known: {', '.join(sorted(known))}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_SCORE


def _read_grid(path: str | Path, cfg: dict[str, Any], n_nodes: int, n_edges: int) -> Grid:
    """The grid of a config, made only if the file has as many nodes and edges: its size is then that of the file."""
    for name in SIZES:
        size = cfg.get(name)
        if type(size) is not int or not 0 <= size <= MAX_SIZE:
            raise CorruptFileError(f"{path}: cfg.{name} must be a whole number up to {MAX_SIZE}, got {size!r}")
    if type(cfg.get("parallel_attn_mlp")) is not bool:
        raise CorruptFileError(f"{path}: cfg.parallel_attn_mlp must be true or false")
    grid = Grid(cfg["n_layers"], cfg["n_heads"], cfg["d_model"], cfg["parallel_attn_mlp"])
    expected = 2 + grid.n_layers * (grid.n_heads + 1)
    if n_nodes != expected:
        raise CorruptFileError(f"{path}: a model of {grid} has {expected} nodes, but the file lists {n_nodes}")
    if n_edges != grid.n_edges:
        raise CorruptFileError(
            f"{path}: a model of {grid} has {grid.n_edges} edges, all to be listed, but the file lists {n_edges}"
        )
    return grid


def _check_nodes(path: str | Path, grid: Grid, nodes: dict[str, Any]) -> None:
    for name in (*grid.sources, "logits"):
        node = nodes.get(name)
        if not isinstance(node, dict) or type(node.get("in_graph")) is not bool:
            raise CorruptFileError(f"{path}: node {name!r} must be an object with in_graph, true or false")
        _refuse_keys(path, f"node {name!r}", node, {"in_graph", "score", "neurons", "neurons_scores"})
        if "score" in node and not _is_number(node["score"]):
            raise CorruptFileError(f"{path}: the score of node {name!r} must be a number")
        neurons = node.get("neurons", [])
        if not isinstance(neurons, list) or not all(neuron is True for neuron in neurons):
            raise CorruptFileError(f"{path}: only some neurons of {name!r} are in this circuit; edges cannot say that")


def _read_edges(path: str | Path, grid: Grid, edges: dict[str, Any]) -> tuple[Tensor, Tensor]:
    scores, members = [], []
    for name in grid.name_edges(grid.real):
        edge = edges.get(name)
        if not isinstance(edge, dict) or set(edge) != {"score", "in_graph"}:
            raise CorruptFileError(f"{path}: edge {name!r} must be an object with score and in_graph")
        if not _is_number(edge["score"]) or type(edge["in_graph"]) is not bool:
            raise CorruptFileError(f"{path}: edge {name!r} needs a number as score, and in_graph true or false")
        scores.append(float(edge["score"]))
        members.append(edge["in_graph"])
    table = torch.zeros(grid.real.shape, dtype=torch.float64)
    table[grid.real] = torch.tensor(scores, dtype=torch.float64)
    marked = torch.zeros_like(grid.real)
    marked[grid.real] = torch.tensor(members)
    return table, marked
