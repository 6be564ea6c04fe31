"""The format of a page's data: plain dicts, typed.

A field marked ``NotRequired`` may be left out and a number may be None (or NaN, which becomes None): the page then says
"n/a". Fields that are not listed are kept and ignored.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from unweave.report.checks import ChecksFacts

__all__ = [
    "Curve",
    "CurvePoint",
    "DescriptionFacts",
    "DirectionFacts",
    "DriverFacts",
    "EdgeFacts",
    "ExampleFacts",
    "FaithfulnessRow",
    "InterfaceDirection",
    "InterfaceRow",
    "Interval",
    "KindFacts",
    "ModelFacts",
    "ModuleBand",
    "ModuleEffectRow",
    "ModulesFacts",
    "NodeFacts",
    "NullFigure",
    "NullTestRow",
    "Number",
    "PartitionFacts",
    "PatternFacts",
    "PredictionPoint",
    "ProofRow",
    "ReadDirection",
    "ReportData",
    "ScopeFacts",
    "TokenInContext",
    "TrafficFacts",
    "WorstToken",
    "WriteDirection",
]

Number = float | None


class Interval(TypedDict):
    """A mean over held-out data with its 95% interval."""

    value: Number
    low: Number
    high: Number


class ModelFacts(TypedDict):
    """The model that was decompiled."""

    name: str
    family: str
    n_layers: Number
    n_heads: Number
    d_model: Number
    d_vocab: NotRequired[Number]
    n_parameters: Number


class ScopeFacts(TypedDict):
    """What was explained, and on how much data."""

    description: str
    divergence: str
    n_tokens_calibration: Number
    n_tokens_held_out: Number
    n_sequences_calibration: NotRequired[Number]
    n_sequences_held_out: NotRequired[Number]


class FaithfulnessRow(TypedDict):
    """One graph or baseline against the model; the row named "original" is the model itself.

    ``size`` is the share of the channels' numbers that is stored, 1 for the model.
    """

    name: str
    baseline: bool
    kl_nats: Interval
    top1_agreement: Interval
    loss_nats: NotRequired[Interval]
    loss_recovered: NotRequired[Interval]
    kl_p99: NotRequired[Number]
    kl_p999: NotRequired[Number]
    kl_max: NotRequired[Number]
    size: NotRequired[Number]
    n_parameters: NotRequired[Number]
    flops_per_token: NotRequired[Number]
    size_bits: NotRequired[Number]


class WorstToken(TypedDict):
    """A held-out token where graph and model part: the text before it, itself, and what each predicts next."""

    context: str
    token: str
    kl_nats: Number
    model_prediction: str
    graph_prediction: str


class CurvePoint(TypedDict):
    """Divergence at one size."""

    size: float
    kl_nats: Number
    low: Number
    high: Number


class Curve(TypedDict):
    """Divergence against size for one method; without ``baseline`` the first curve is ours."""

    name: str
    baseline: NotRequired[bool]
    points: list[CurvePoint]


class WriteDirection(TypedDict):
    """A direction that a node writes, and the outputs it raises and lowers most."""

    dimension: int
    nats: Number
    promotes: list[tuple[str, Number]]
    suppresses: list[tuple[str, Number]]


class ReadDirection(TypedDict):
    """A direction that a port reads, and the input tokens that lie furthest along it."""

    port: str
    dimension: int
    nats: Number
    tokens: list[tuple[str, Number]]


class NodeFacts(TypedDict):
    """One node; ``layer`` is -1 for embeddings and n_layers for the output.

    ``spectra`` and ``ranks`` have the keys "write" and "read.<port>"; a spectrum is nats per direction, largest first.
    """

    name: str
    kind: Literal["embed", "attn", "head", "mlp", "map", "unembed", "other"]
    layer: int
    ports: list[str]
    score_nats: Number
    score_se: Number
    n_parameters: NotRequired[Number]
    ranks: NotRequired[dict[str, int]]
    spectra: NotRequired[dict[str, list[Number]]]
    writes: NotRequired[list[WriteDirection]]
    reads: NotRequired[list[ReadDirection]]


class EdgeFacts(TypedDict):
    """One edge: nodes by their place in ``nodes``; ``kept`` is true unless said otherwise.

    ``pairs`` says how its nats divide among leading directions, in thousandths: rows are what the port reads, columns
    what the writer writes, signed by the virtual weight. ``kernel`` is an edge between feature maps itself, as rows of
    weights, at most 32 x 32.
    """

    src: int
    dst: int
    port: str
    nats: Number
    se: Number
    measured: bool
    kept: NotRequired[bool]
    pairs: NotRequired[list[list[int]]]
    kernel: NotRequired[list[list[Number]]]


class ExampleFacts(TypedDict):
    """A token at which a direction was looked at: ``position`` in ``texts[text]``, with its value there.

    ``around`` are the values at the tokens from ``start`` on, in hundredths of the direction's largest.
    """

    kind: Literal["top", "quantile", "bottom", "random"]
    quantile: NotRequired[Number]
    text: int
    position: int
    start: int
    value: Number
    around: list[int]


class DescriptionFacts(TypedDict):
    """A description with its held-out score, R^2; no label where it explains no more than chance (``note`` says why).

    ``random_score`` is that of other directions' descriptions, ``null_score`` what a label has to exceed.
    """

    label: str | None
    score: Number
    random_score: Number
    null_score: Number
    note: str


class DirectionFacts(TypedDict):
    """Examples of one write direction of one node, and what drives it in words."""

    node: int
    dimension: int
    largest: Number
    mean: Number
    std: Number
    examples: list[ExampleFacts]
    description: NotRequired[DescriptionFacts]


class PatternFacts(TypedDict):
    """Where a head looks around one token: a row of characters per query, from ``start`` on.

    A character is 63rds of all attention, A-Z a-z 0-9 + / in this order; the first of a row is what goes to tokens
    outside the window, the others to its tokens.
    """

    node: int
    text: int
    position: int
    start: int
    rows: list[str]


class DriverFacts(TypedDict):
    """What drives the nodes. A text is the places of its tokens in ``strings``; nodes are places in ``nodes``."""

    strings: list[str]
    texts: list[list[int]]
    directions: list[DirectionFacts]
    patterns: list[PatternFacts]
    n_tokens: Number
    n_held_out: Number


class KindFacts(TypedDict):
    """A kind of data: its share of the tokens, words that are typical of it, and the nats per token of its tokens that
    every node and every edge is worth, in the order of ``nodes`` and ``edges``.
    """

    name: str
    share: Number
    words: list[str]
    nodes: list[Number]
    edges: list[Number]


class ProofRow(TypedDict):
    """One thing that a circuit had to show."""

    what: str
    value: Number
    low: Number
    high: Number


class PredictionPoint(TypedDict):
    """One edge ablated alone: what was attributed to it, and what was measured, in nats per token."""

    edge: str
    attributed: Number
    measured: Number
    kept: bool


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


class ReportData(TypedDict):
    """Everything the page shows. At least one row of ``faithfulness`` is neither a baseline nor "original"; where there
    are ``modules``, it may be empty: nodes that are only grouped compute what they did.

    ``size_of`` says what sizes are shares of: the channels' numbers (a compressed graph), or edges (a circuit, with
    its ``proof``). ``drivers`` is what node pages show beside spectra, ``kinds`` are what edges can be filtered by.
    """

    format: Literal["unweave-report"]
    version: Literal[1]
    title: str
    model: ModelFacts
    scope: ScopeFacts
    faithfulness: list[FaithfulnessRow]
    worst_tokens: list[WorstToken]
    rate_distortion: list[Curve]
    size_of: NotRequired[Literal["numbers", "edges"]]
    proof: NotRequired[list[ProofRow]]
    predictions: NotRequired[list[PredictionPoint]]
    modules: NotRequired[ModulesFacts]
    checks: NotRequired[ChecksFacts]
    nodes: list[NodeFacts]
    edges: list[EdgeFacts]
    drivers: NotRequired[DriverFacts]
    kinds: NotRequired[list[KindFacts]]
    provenance: NotRequired[dict[str, Any]]
