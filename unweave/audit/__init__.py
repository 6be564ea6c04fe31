"""The audit of the rest: where an explanation and its model part ways, and inputs that make them."""

from unweave.audit.anomaly import AnomalyScore
from unweave.audit.baselines import ActivationDistance, text_losses
from unweave.audit.clusters import Cluster
from unweave.audit.disagreement import Audit, TextGap, TokenGap, audit
from unweave.audit.parts import Direction, Part
from unweave.audit.relearning import relearn
from unweave.audit.search import Found, search_inputs
from unweave.audit.triggers import Trigger, Triggers, search_triggers

__all__ = [
    "ActivationDistance",
    "AnomalyScore",
    "Audit",
    "Cluster",
    "Direction",
    "Found",
    "Part",
    "TextGap",
    "TokenGap",
    "Trigger",
    "Triggers",
    "audit",
    "relearn",
    "search_inputs",
    "search_triggers",
    "text_losses",
]
