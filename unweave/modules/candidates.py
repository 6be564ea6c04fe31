"""The partitions that methods propose, improved step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unweave.errors import InputError
from unweave.modules.criterion import Criterion
from unweave.modules.nulls import expected_nats
from unweave.modules.partition import Partition
from unweave.modules.partitioners import PARTITIONERS

__all__ = ["Search", "most_blocks", "without_idle"]

MOST_BLOCKS = 12
# fewer cannot be grouped but trivially
LEAST_NODES = 3
# so many of the proposed partitions are improved step by step
IMPROVED = 2


@dataclass(frozen=True)
class Search:
    """What is done to the graph and to every null sample alike."""

    methods: tuple[str, ...]
    max_blocks: int
    seed: int

    def candidates(self, criterion: Criterion) -> tuple[Partition, ...]:
        """What the methods propose, with one block, and the best few improved step by step."""
        c = criterion.communication
        nodes = c.nodes
        weights = c.symmetric().detach().cpu().to(torch.float64)
        found: dict[Partition, None] = {}
        for method in self.methods:
            options: dict[str, Any] = {}
            if method == "sbm":
                expected = expected_nats(c, criterion.possible)
                options["expected"] = expected + expected.T
            found |= dict.fromkeys(
                PARTITIONERS[method](nodes, weights, min(self.max_blocks, len(nodes)), self.seed, **options)
            )
        bits = self.bits(criterion, tuple(found))
        best = sorted(found, key=lambda partition: bits[partition])[:IMPROVED]
        found |= dict.fromkeys(criterion.improve(partition) for partition in best)
        found[Partition(nodes, (0,) * len(nodes))] = None
        return tuple(found)

    def bits(self, criterion: Criterion, partitions: tuple[Partition, ...]) -> dict[Partition, float]:
        """The description length of each."""
        if not partitions:
            return {}
        found = criterion.bits(torch.tensor([partition.labels for partition in partitions]))
        return dict(zip(partitions, found.tolist(), strict=True))

    def best(self, criterion: Criterion, candidates: tuple[Partition, ...]) -> dict[str, float]:
        """The best of each statistic over the search."""
        bits = self.bits(criterion, candidates)
        plain = next(bits[partition] for partition in candidates if partition.n_blocks == 1)
        weights = criterion.communication.symmetric().detach().cpu().to(torch.float64)
        return {
            "modularity": max(partition.modularity(weights) for partition in candidates),
            "n_cut": min(partition.relative_n_cut(weights) for partition in candidates),
            "saved_bits": plain - min(bits.values()),
        }


def most_blocks(max_blocks: int | None, n_nodes: int) -> int:
    """How many blocks a partition may have; a third of the nodes, at most 12, where nothing is asked for."""
    if n_nodes < LEAST_NODES:
        raise InputError(f"a graph of {n_nodes} nodes has no modules to look for; refine it first")
    if max_blocks is None:
        return min(MOST_BLOCKS, max(2, n_nodes // 3))
    if not 2 <= max_blocks < n_nodes:
        raise InputError(f"max_blocks must be from 2 to {n_nodes - 1} for {n_nodes} nodes, got {max_blocks}")
    return max_blocks


def without_idle(criterion: Criterion) -> Criterion:
    """Of the nodes that some edge worth its bits joins to another; of all where there are too few to group."""
    return criterion.restricted(criterion.active) if len(criterion.active) >= LEAST_NODES else criterion
