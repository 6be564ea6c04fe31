"""The modules that a search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unweave.errors import InputError
from unweave.graph import Graph
from unweave.modules.communication import Communication
from unweave.modules.criterion import Criterion, Description
from unweave.modules.partition import Partition, between_blocks
from unweave.modules.significance import NullTest

__all__ = ["Modules"]


@dataclass(frozen=True, eq=False)
class Modules:
    """The partition of a graph's nodes that describes its communication best, and whether it means anything.

    Ask :meth:`significant` before calling a block a module.

    Attributes:
        graph: its nodes grouped (:meth:`unweave.Graph.quotient`); None where only the communication was given.
        communication: of the graph.
        partition: the one chosen; idle nodes, which no edge worth its bits joins to any other, stay on their own.
        hierarchy: by number of blocks, the best partition of the nodes that are not idle; one block among them.
        criterion: what chose; holds the relative communication between the nodes that are not idle.
        tests: every statistic against every null.
        level: of the tests.
    """

    graph: Graph | None
    communication: Communication
    partition: Partition
    hierarchy: tuple[Partition, ...]
    criterion: Criterion
    tests: tuple[NullTest, ...]
    level: float

    @cached_property
    def description(self) -> Description:
        """The chosen partition's bits, part by part."""
        return self.criterion.describe(self.active_partition)

    @cached_property
    def active_partition(self) -> Partition:
        """The chosen partition without idle nodes."""
        return self.partition.restricted(self.criterion.communication.nodes)

    @property
    def idle(self) -> tuple[str, ...]:
        """The nodes that no edge worth its bits joins to another."""
        active = set(self.criterion.communication.nodes)
        return tuple(node for node in self.communication.nodes if node not in active)

    @property
    def modularity(self) -> float:
        """Q of the chosen partition, on relative nats."""
        return self.active_partition.modularity(self.criterion.communication.symmetric())

    @property
    def n_cut(self) -> float:
        """The normalised cut of the chosen partition, on relative nats."""
        return self.active_partition.n_cut(self.criterion.communication.symmetric())

    @property
    def z(self) -> Mapping[tuple[str, str], float]:
        """z by (null, statistic)."""
        return {(t.null, t.statistic): t.z for t in self.tests}

    @property
    def p(self) -> Mapping[tuple[str, str], float]:
        """p by (null, statistic)."""
        return {(t.null, t.statistic): t.p for t in self.tests}

    def significant(self, level: float | None = None) -> bool:
        """Whether there are modules at all, at a level of significance.

        Yes where the partition chosen is not one block, and saves more bits than the same search saves on graphs
        without modules, for every null. Modularity and n-cut are tested for comparison with the literature; a few
        outliers among the weights make both large by chance, so they may miss modules; and they see ones that the
        criterion does not count because every edge between them is worth its bits, too: look at their z, and ask for a
        description that serves fewer ``tokens``.

        Raises:
            InputError: no null was drawn.
        """
        tests = [t for t in self.tests if t.statistic == "saved_bits"]
        if not tests:
            raise InputError("nothing was held against a null; name one in nulls=...")
        level = self.level if level is None else level
        return not self.active_partition.is_trivial and all(t.p <= level for t in tests)

    def curve(self) -> list[dict[str, Any]]:
        """One plain row per partition of the hierarchy: its bits by part, modularity and n-cut."""
        weights = self.criterion.communication.symmetric()
        rows = self.criterion.table(self.hierarchy)
        return [
            row | {"modularity": p.modularity(weights), "n_cut": p.n_cut(weights)}
            for row, p in zip(rows, self.hierarchy, strict=True)
        ]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per block: its nodes, and the nats per token it keeps inside, hears and sends."""
        between = between_blocks(self.communication.nats, self.partition)
        inside, heard, sent = between.diagonal(), between.sum(1), between.sum(0)
        return [
            {
                "module": name,
                "nodes": list(nodes),
                "inside_nats": float(inside[b]),
                "heard_nats": float(heard[b] - inside[b]),
                "sent_nats": float(sent[b] - inside[b]),
            }
            for b, (name, nodes) in enumerate(self.partition.blocks.items())
        ]
