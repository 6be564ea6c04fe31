"""The format of what a page shows of modules."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from unweave.report.figures import Interval, Number

__all__ = [
    "InterfaceDirection",
    "InterfaceRow",
    "ModuleBand",
    "ModuleEffectRow",
    "ModulesFacts",
    "NullFigure",
    "NullTestRow",
    "PartitionFacts",
    "TokenInContext",
    "TrafficFacts",
]


class ModuleBand(TypedDict):
    """What one block says to another: blocks by their number among the labels, nats per token (second order)."""

    src: int
    dst: int
    nats: Number


class PartitionFacts(TypedDict):
    """One partition of the nodes: the block of each, numbered from 0, and what describing it takes.

    ``inside``, ``heard`` and ``sent`` are the nats that each block keeps to itself, hears and sends; ``bands`` are the
    strongest between blocks.
    """

    labels: list[int]
    bits: Number
    modularity: Number
    n_cut: Number
    inside: list[Number]
    heard: list[Number]
    sent: list[Number]
    bands: list[ModuleBand]


class NullTestRow(TypedDict):
    """A statistic of the search against the same search on graphs without modules."""

    null: str
    statistic: str
    value: Number
    null_mean: Number
    null_sd: Number
    z: Number
    percentile: Number
    p: Number
    n_null: int


class TokenInContext(TypedDict):
    """A token, the text before it, and its coordinate along a direction."""

    context: str
    token: str
    coordinate: Number


class InterfaceDirection(TypedDict):
    """One direction that crosses between blocks, with the tokens at its two ends."""

    nats: Number
    highest: list[TokenInContext]
    lowest: list[TokenInContext]


class InterfaceRow(TypedDict):
    """An interface of the measured partition: second-order nats, measured effect, dimensions for 95% of each."""

    src: int
    dst: int
    edges: int
    nats: Number
    se: Number
    measured: Interval | None
    dimensions: int | None
    measured_dimensions: int | None
    directions: list[InterfaceDirection]


class ModuleEffectRow(TypedDict):
    """One or two blocks ablated: the effect, its percentile among random sets of nodes and the median of those."""

    blocks: list[int]
    nats: Interval
    n_random: int
    random: Number
    percentile: Number
    interaction: Interval | None
    interaction_percentile: Number


class NullFigure(TypedDict):
    """A figure beside its null."""

    value: Number
    null_mean: Number
    null_sd: Number
    z: Number
    percentile: Number


class TrafficFacts(TypedDict):
    """How central the communication is; ``busiest`` holds (node, traffic in nats, betweenness)."""

    gini: NullFigure
    hub: NullFigure
    busiest: list[tuple[str, Number, Number]]


class ModulesFacts(TypedDict):
    """The search for modules. ``chosen`` and ``measured`` are places in ``hierarchy``, by number of blocks.

    ``interfaces`` and ``effects`` belong to the partition measured. ``significant`` is None if no null was drawn.
    ``idle`` nodes, by place, say and hear nothing; together they are one more block of every partition, not counted.
    """

    significant: bool | None
    level: Number
    tokens: Number
    chosen: int
    measured: int | None
    hierarchy: list[PartitionFacts]
    tests: list[NullTestRow]
    interfaces: list[InterfaceRow]
    effects: list[ModuleEffectRow]
    traffic: NotRequired[TrafficFacts]
    idle: NotRequired[list[int]]
