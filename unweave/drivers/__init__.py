"""What drives a node: examples of its code, tokens it reads and writes, what holding it does, scored descriptions."""

from unweave.drivers.describing import describe, describe_values
from unweave.drivers.descriptions import Description, Descriptions
from unweave.drivers.directions import BASES, Directions, code_directions
from unweave.drivers.evidence import Describer, Evidence, Proposal
from unweave.drivers.examples import KINDS, Examples, Picked, collect_examples
from unweave.drivers.holding import HeldEffect, hold, hold_patch
from unweave.drivers.rules import CLASSES, Rule, Texts, ready_rules
from unweave.drivers.vocabulary import (
    heard_tokens,
    later_readers,
    node_vocabulary,
    readout_jacobian,
    tokens_through,
    written_tokens,
)

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
    "HeldEffect",
    "Picked",
    "Proposal",
    "Rule",
    "Texts",
    "code_directions",
    "collect_examples",
    "describe",
    "describe_values",
    "heard_tokens",
    "hold",
    "hold_patch",
    "later_readers",
    "node_vocabulary",
    "ready_rules",
    "readout_jacobian",
    "tokens_through",
    "written_tokens",
]
