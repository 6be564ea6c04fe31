"""A graph for general graph tools: networkx, GraphML and DOT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import torch
from torch import Tensor

from unweave.errors import InputError
from unweave.export.grid import Scores, score_matrix
from unweave.files import write_text
from unweave.graph import Graph

__all__ = ["to_dot", "to_graphml", "to_networkx"]

# what XML 1.0 can hold
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
PEN_WIDTHS = (0.5, 5.0)
N_COLOURS = 12  # of Graphviz's scheme set312


def to_networkx(graph: Graph, scores: Scores | None = None) -> nx.MultiDiGraph:
    """The graph as a ``networkx.MultiDiGraph``, one edge per port, keyed by the port's name.

    Nodes carry ``kind``, ``layer``, ``stage`` and, where they have one, ``module``; edges carry ``port`` and, where
    they have a score, ``score`` (nats per token for scores of unweave) and ``strength``, its absolute value.

    Raises:
        ShapeError: the scores are of another graph.

    Example:
        >>> import unweave
        >>> network = to_networkx(unweave.capture("zoo:induction"))
        >>> network.has_edge("blocks.0.attn.head.0", "blocks.1.attn.head.0", key="k")
        True
    """
    network = nx.MultiDiGraph(name=str(graph.info.get("name", "graph")))
    for s, stage in enumerate(graph.stages):
        for name in stage.nodes:
            module = {"module": graph.modules[name]} if name in graph.modules else {}
            network.add_node(name, kind=stage.kind, layer=stage.layer, stage=s, **module)
    for src, dst, port, score in _edges(graph, score_matrix(graph, scores)):
        known = {} if math.isnan(score) else {"score": score, "strength": abs(score)}
        network.add_edge(src, dst, key=port, port=port, **known)
    return network


def _edges(graph: Graph, values: Tensor, kept: Tensor | None = None) -> Iterator[tuple[str, str, str, float]]:
    """(source, node, port, score) of the edges, ordered as in :attr:`Graph.edges`."""
    kept = graph.edge_matrix if kept is None else kept
    for edge, score in zip(graph.name_edges(kept), values[kept].tolist(), strict=True):
        yield edge.src, edge.dst, edge.port, score


def to_graphml(graph: Graph, path: str | Path, scores: Scores | None = None) -> Path:
    """Write the graph as GraphML (Gephi, Cytoscape, igraph), with what :func:`to_networkx` gives its nodes and edges.

    Returns:
        The path.

    Raises:
        InputError: a name holds a character that XML cannot.
        ShapeError: the scores are of another graph.
        StorageError: it could not be written.

    Example:
        >>> import tempfile, unweave
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_graphml(unweave.capture("zoo:induction"), folder + "/graph.graphml").name
        'graph.graphml'
    """
    names = [*graph.nodes, *graph.modules.values(), str(graph.info.get("name", "graph"))]
    names += [port.name for stage in graph.stages for port in stage.ports]
    for name in names:
        if NOT_XML.search(name):
            raise InputError(f"the name {name!r} holds a character that XML cannot; rename it, or use to_dot")
    lines = nx.generate_graphml(to_networkx(graph, scores), named_key_ids=True)
    write_text(path, "\n".join(lines) + "\n")
    return Path(path)


def to_dot(graph: Graph, path: str | Path, scores: Scores | None = None, *, max_edges: int | None = None) -> Path:
    """Write the graph in DOT, Graphviz's language: one row per stage, edges as wide as they are strong.

    Nodes are called n0, n1, ... with their names as labels, so that no name can be taken for code; nodes of one module
    share a colour; blue edges have positive scores, red ones negative.

    Args:
        scores: of the edges; all are equally wide without.
        max_edges: draw only the strongest so many (the first ones where there are no scores). Beyond a few hundred
            Graphviz gets slow and the picture black.

    Returns:
        The path.

    Raises:
        ShapeError: the scores are of another graph.
        InputError: a nonsensical number of edges.
        StorageError: it could not be written.

    Exact?
        Control characters in names become U+FFFD.

    Example:
        >>> import tempfile, unweave
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = to_dot(unweave.capture("zoo:induction"), folder + "/graph.dot", max_edges=10)
        ...     path.read_text().count("->")
        10
    """
    if max_edges is not None and max_edges < 0:
        raise InputError(f"max_edges must be at least 0, got {max_edges}")
    values = score_matrix(graph, scores)
    kept = graph.edge_matrix if max_edges is None else _strongest(graph, values, max_edges)
    number = {name: f"n{i}" for i, name in enumerate(graph.nodes)}
    lines = ["digraph unweave {", "  rankdir=BT;", f"  label={quoted(str(graph.info.get('name', 'graph')))};"]
    lines.append("  node [shape=box, style=filled, fillcolor=white];")
    lines += [f"  {number[name]} [{_node_style(graph, name)}];" for name in graph.nodes]
    lines += [f"  {{rank=same; {' '.join(number[name] + ';' for name in stage.nodes)}}}" for stage in graph.stages]
    strongest = float(values[kept].nan_to_num().abs().max()) if bool(kept.any()) else 0.0
    for src, dst, port, score in _edges(graph, values, kept):
        lines.append(f"  {number[src]} -> {number[dst]} [{_edge_style(port, score, strongest)}];")
    write_text(path, "\n".join([*lines, "}"]) + "\n")
    return Path(path)


def _strongest(graph: Graph, values: Tensor, k: int) -> Tensor:
    pairs = graph.edge_matrix.nonzero()
    strength = values[graph.edge_matrix].nan_to_num().abs()
    best = pairs[strength.argsort(descending=True, stable=True)[:k]]
    out = torch.zeros_like(graph.edge_matrix)
    out[best[:, 0], best[:, 1]] = True
    return out


def _node_style(graph: Graph, name: str) -> str:
    style = f"label={quoted(name)}"
    if name not in graph.modules:
        return style
    modules = list(dict.fromkeys(graph.modules.values()))
    colour = 1 + modules.index(graph.modules[name]) % N_COLOURS
    return f'{style}, tooltip={quoted(graph.modules[name])}, fillcolor="/set312/{colour}"'


def _edge_style(port: str, score: float, strongest: float) -> str:
    if math.isnan(score):
        return f"label={quoted(port)}"
    low, high = PEN_WIDTHS
    width = low + (high - low) * (abs(score) / strongest if strongest else 0.0)
    colour = "blue" if score >= 0 else "red"
    return f'label={quoted(port)}, tooltip="{score:.6g}", penwidth={width:.3f}, color={colour}'


def quoted(text: str) -> str:
    r"""Text as a quoted string of DOT that is shown as it stands: no escapes of labels, no entities.

    Example:
        >>> print(quoted('say "\\N" & go'))
        "say \"\\N\" &amp; go"
    """
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "\ufffd", text)
    text = text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
