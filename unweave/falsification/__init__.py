"""Falsification: what would show that an explanation of a network is wrong, measured."""

from unweave.falsification.scrubbing import Hypothesis, Scrubbed, scrub

__all__ = ["Hypothesis", "Scrubbed", "scrub"]
