"""What drives a node: examples of its code, tokens it reads and writes, what holding it does, descriptions with scores."""

from unweave.drivers.descriptions import Describer, Description, Descriptions, Evidence, Proposal, describe
from unweave.drivers.directions import BASES, Directions, code_directions
from unweave.drivers.examples import KINDS, Examples, Picked, collect_examples
from unweave.drivers.rules import CLASSES, Rule, Texts, ready_rules

__all__ = [
    "BASES",
    "CLASSES",
    "KINDS",
    "Describer",
    "Description",
    "Descriptions",
    "Directions",
    "Evidence",
    "Examples",
    "Picked",
    "Proposal",
    "Rule",
    "Texts",
    "code_directions",
    "collect_examples",
    "describe",
    "ready_rules",
]
