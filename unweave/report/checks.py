"""The format of what ``unweave validate``, ``scrub`` and ``audit`` leave in a folder, and what the page shows.

A number may be None. Token strings come from strangers and are only ever text.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

__all__ = [
    "AlarmFacts",
    "AuditCluster",
    "AuditFacts",
    "AuditPart",
    "AuditText",
    "AuditToken",
    "ChecksFacts",
    "EditPoint",
    "EditRow",
    "EditsFacts",
    "ScrubbingFacts",
    "ScrubbingRow",
    "ValidationFacts",
    "ValidationRow",
    "ValidationWorst",
    "ValueInRange",
]

Number = float | None


class ValueInRange(TypedDict):
    """A figure with its 95% interval."""

    value: Number
    low: Number
    high: Number


class ValidationRow(TypedDict):
    """One graph on one kind of token of one data set, against the network."""

    data: str
    type: str
    graph: str
    kl_nats: ValueInRange
    agreement: ValueInRange
    loss_recovered: ValueInRange
    kl_p99: Number
    kl_p999: Number
    kl_max: Number
    n_sequences: int
    n_tokens: int


class ValidationWorst(TypedDict):
    """A token where the candidate is furthest from the network, with what either says next."""

    data: str
    nats: Number
    sequence: int
    position: int
    text: str
    network: str
    graph: str


class ValidationFacts(TypedDict):
    """A validation: ``candidate`` is the name of the graph of the folder; baselines are as large as it.

    ``left_out`` says why there is no baseline of that name.
    """

    candidate: str
    size: Number
    rows: list[ValidationRow]
    worst: list[ValidationWorst]
    left_out: dict[str, str]


class ScrubbingRow(TypedDict):
    """One hypothesis: ``alone`` is, by key, the share of draws in which nothing was swapped."""

    name: str
    description: str
    keys: list[str]
    graph: str
    form: str
    loss_recovered: ValueInRange
    recovered: ValueInRange
    alone: dict[str, Number]
    n_samples: int
    n_sequences: int
    n_tokens: int


class ScrubbingFacts(TypedDict):
    """Causal scrubbing, the hypothesis tested last at the end."""

    hypotheses: list[ScrubbingRow]


class EditRow(TypedDict):
    """How well a predictor called the edits of one size ("all" for all)."""

    size: str
    predictor: str
    correlation: ValueInRange
    r2: ValueInRange
    slope: ValueInRange
    top_token: ValueInRange
    sign: ValueInRange
    mean_change: Number
    n: int


class EditPoint(TypedDict):
    """One edit: the change of the loss, by the model and as predicted, nats per token."""

    size: str
    edit: str
    true: Number
    graph: Number
    gradient: Number
    second_order: NotRequired[Number]


class EditsFacts(TypedDict):
    """Edits predicted by the graph of the folder, and what they do to the network."""

    rows: list[EditRow]
    points: list[EditPoint]


class AuditToken(TypedDict):
    """A token where graph and model part; tokens are ids, spelled out in ``words``."""

    nats: Number
    sequence: int
    position: int
    context: list[int]
    model_says: int
    graph_says: int
    cluster: int


class AuditText(TypedDict):
    """A text, by its worst token."""

    nats: Number
    sequence: int
    position: int
    mean_nats: Number


class AuditCluster(TypedDict):
    """Tokens at which the outputs differ alike; ``shared`` is (places back, token, share of the contexts)."""

    mean_nats: Number
    n_tokens: int
    raised: list[tuple[int, Number]]
    lowered: list[tuple[int, Number]]
    shared: list[tuple[int, int, Number]]


class AuditPart(TypedDict):
    """A node or port, and the nats at the worst tokens that its value in the model takes away."""

    name: str
    restored_nats: Number
    left_nats: Number


class AlarmFacts(TypedDict):
    """A calibrated alarm: ``alarms`` of the ``n_texts`` audited score above ``threshold``."""

    threshold: Number
    false_alarms: Number
    n_clean: int
    n_texts: int
    alarms: int


class TriggerRow(TypedDict):
    """A run of tokens: what it adds to a text beyond its tokens, and how likely the best of all runs adds as much."""

    tokens: list[int]
    excess_nats: Number
    excess_nats_low: Number
    excess_nats_high: Number
    nats: Number
    score: Number
    p: Number
    n_texts: int


class TriggersFacts(TypedDict):
    """A search for triggers that stand anywhere in a text, or at its start."""

    at: str
    n_runs: int
    n_screened: int
    evaluations: int
    runs: list[TriggerRow]


class AuditFacts(TypedDict):
    """An audit: the tables of :class:`unweave.audit.Audit`, and the text of every token in them."""

    kl_nats: Number
    n_tokens: int
    n_sequences: int
    tokens: list[AuditToken]
    texts: list[AuditText]
    clusters: list[AuditCluster]
    writers: list[AuditPart]
    readers: list[AuditPart]
    words: dict[str, str]
    anomaly: NotRequired[AlarmFacts]
    triggers: NotRequired[list[TriggersFacts]]


class ChecksFacts(TypedDict):
    """What was tested, by command; only what was."""

    validation: NotRequired[ValidationFacts]
    scrubbing: NotRequired[ScrubbingFacts]
    edits: NotRequired[EditsFacts]
    audit: NotRequired[AuditFacts]
