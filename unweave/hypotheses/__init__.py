"""Hypotheses: small causal models, where their variables live in a network, and whether it implements them."""

from unweave.hypotheses.alignment import Alignment, Location, one_at_random
from unweave.hypotheses.causal_model import CausalModel
from unweave.hypotheses.interchange import Accuracy, Interchange, interchange_accuracy
from unweave.hypotheses.search import AlignmentSearch, Candidate, find_alignment

__all__ = [
    "Accuracy",
    "Alignment",
    "AlignmentSearch",
    "Candidate",
    "CausalModel",
    "Interchange",
    "Location",
    "find_alignment",
    "interchange_accuracy",
    "one_at_random",
]
