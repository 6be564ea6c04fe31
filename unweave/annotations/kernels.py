"""The kernels of edges between feature maps, as numbers that a page can draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unweave.graph import Graph, Stage
from unweave.kernels import kernels_between
from unweave.ops import BlockMap

__all__ = ["page_kind", "with_kernels"]

# rows and columns of a picture in a cell, and weights of all pictures together (2 MB as text)
LARGEST, MOST_WEIGHTS = 32, 250_000


def page_kind(stage: Stage) -> str:
    """What a page calls the nodes of a stage: its kind, or "map" where they are feature maps."""
    convolves = any(isinstance(read.map, BlockMap) for port in stage.ports for read in port.reads)
    return "map" if convolves and stage.kind == "mlp" else stage.kind


def with_kernels(graph: Graph, edges: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a report, those between feature maps with the "kernel" that the edge is: rows of weights.

    Left out are kernels above 32 x 32, those that only carry a map on unchanged, and whatever would be more than
    250,000 weights in all; nodes that are no longer whole maps have none.

    Args:
        edges: rows of a report, the strongest first.

    Exact?
        To four digits; a batch norm behind the convolution is in them.

    Example:
        >>> import unweave
        >>> rows = with_kernels(unweave.capture("zoo:oriented_shapes"), [{"src": 0, "dst": 1, "port": "in"}])
        >>> len(rows[0]["kernel"]), len(rows[0]["kernel"][0])
        (5, 5)
    """
    kernels, left, out = kernels_between(graph), MOST_WEIGHTS, []
    for row in edges:
        (writer, i), (reader, j) = (graph.where[graph.nodes[row[end]]] for end in ("src", "dst"))
        table = kernels.get((writer, reader))
        if table is not None and max(table.shape[2:]) <= LARGEST and table[j, i].numel() <= left:
            left -= table[j, i].numel()
            row = row | {"kernel": [[float(f"{w:.4g}") for w in line] for line in table[j, i].tolist()]}
        out.append(row)
    return out
