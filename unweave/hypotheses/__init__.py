"""Hypotheses: small causal models, where their variables live in a network, and whether it implements them."""

from unweave.hypotheses.alignment import Alignment, Site, one_at_random
from unweave.hypotheses.causal_model import CausalModel
from unweave.hypotheses.interchange import Accuracy, Interchange, interchange_accuracy

__all__ = [
    "Accuracy",
    "Alignment",
    "CausalModel",
    "Interchange",
    "Site",
    "interchange_accuracy",
    "one_at_random",
]
