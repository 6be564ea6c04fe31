"""Falsification: what would show that an explanation of a network is wrong, measured."""

from unweave.falsification.scrubbing import Hypothesis, Scrubbed, scrub
from unweave.falsification.validation import Validation, validate

__all__ = ["Hypothesis", "Scrubbed", "Validation", "scrub", "validate"]
