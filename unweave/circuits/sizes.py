"""How large the edges of a circuit are: as dimensions, and as numbers of their virtual weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from unweave.graph import Edge, Graph, Stage
from unweave.ops import Attention

__all__ = ["edge_numbers", "edge_sides", "whole"]


def whole(node: str) -> str:
    """The node that a part is a part of."""
    return node.partition(".part.")[0]


def edge_numbers(graph: Graph, edges: Iterable[Edge], narrow: Mapping[Edge, int] | None = None) -> int:
    """How many numbers a set of edges takes as virtual weights: dimensions written times dimensions read, for each.

    An edge into several parts of one node counts once. A port reads no more dimensions than the stream has.

    Args:
        narrow: how many dimensions k an edge keeps, where it does not keep all; it takes k (written + read) numbers.
    """
    narrow = narrow or {}
    written, read = edge_sides(graph)
    pairs = {(e.src, whole(e.dst), e.port) for e in edges if e not in narrow}
    total = sum(written[src] * read[dst, port] for src, dst, port in pairs)
    return total + sum(k * (written[e.src] + read[e.dst, e.port]) for e, k in narrow.items())


def edge_sides(graph: Graph) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """(dimensions that each node writes, dimensions that each (node, port) reads), none more than the stream has."""
    written = {
        n: min(w, _width(s)) for s in graph.stages if s.write for n, w in zip(s.nodes, s.code_widths, strict=True)
    }
    read: dict[tuple[str, str], int] = {}
    for stage in graph.stages:
        for port in stage.ports:
            for i, node in enumerate(stage.nodes):
                widths = sum(r.widths[i * len(r.widths) // len(stage.nodes)] for r in port.reads)
                key = (whole(node), port.name)
                # parts of a head share queries and keys, and have values of their own
                shared = key in read and isinstance(stage.core, Attention) and port.name != "v"
                read[key] = widths if shared else read.get(key, 0) + widths
    d = max(_width(s) for s in graph.stages if s.write)
    return written, {key: min(width, d) for key, width in read.items()}


def _width(stage: Stage) -> int:
    assert stage.write is not None
    return stage.write.d_out
