"""The format of a page's data: plain dicts, typed.

A field marked ``NotRequired`` may be left out and a number may be None (or NaN, which becomes None): the page then says
"n/a". Fields that are not listed are kept and ignored.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from unweave.report.checks import ChecksFacts
from unweave.report.figures import Interval, Number
from unweave.report.modules import ModulesFacts
from unweave.report.nodes import DriverFacts, EdgeFacts, KindFacts, NodeFacts

__all__ = [
    "Curve",
    "CurvePoint",
    "FaithfulnessRow",
    "ModelFacts",
    "PredictionPoint",
    "ProofRow",
    "ReportData",
    "ScopeFacts",
    "WorstToken",
]


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
