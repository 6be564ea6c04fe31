"""The format of what a page shows of nodes, edges and the directions between them."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from unweave.report.figures import Number

__all__ = [
    "DescriptionFacts",
    "DirectionFacts",
    "DriverFacts",
    "EdgeFacts",
    "ExampleFacts",
    "KindFacts",
    "NodeFacts",
    "PatternFacts",
    "ReadDirection",
    "WriteDirection",
]


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
