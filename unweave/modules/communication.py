"""Who talks to whom, in nats per token. A stand-in: the real one takes its place at the merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import TokenData
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.scoring import score_edges

__all__ = ["Communication", "communication"]


@dataclass(frozen=True, eq=False)
class Communication:
    """Nats and dimensions between every two nodes.

    Attributes:
        nodes: in execution order.
        nats: ``nats[j, i]``: nats per token of what i writes that j reads.
        dimensions: effective dimensions shared.
        layer: of each node.
    """

    nodes: tuple[str, ...]
    nats: Float[Tensor, "nodes nodes"]
    dimensions: Float[Tensor, "nodes nodes"]
    layer: tuple[int, ...]

    def symmetric(self) -> Float[Tensor, "nodes nodes"]:
        """Undirected weights: nats + nats^T with a zero diagonal."""
        both = self.nats + self.nats.T
        return both - both.diagonal().diag()


def communication(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> Communication:
    """Scores of edges summed over the ports of each reader."""
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "checkpoint": checkpoint}
    scores = score_edges(graph, data, scope, samples=samples, seed=seed, **options)
    place = {name: i for i, name in enumerate(graph.nodes)}
    rows = torch.tensor([place[port.rsplit(".", 1)[0]] for port in graph.ports])
    columns = torch.tensor([place[writer] for writer in graph.writers])
    by_reader = torch.zeros(len(place), len(columns), dtype=torch.float64)
    by_reader.index_add_(0, rows, scores.nats.nan_to_num(0.0).double().cpu())
    nats = torch.zeros(len(place), len(place), dtype=torch.float64)
    nats[:, columns] = by_reader
    layer = tuple(stage.layer for stage in graph.stages for _ in stage.nodes)
    return Communication(graph.nodes, nats, (nats > 0).double(), layer)
