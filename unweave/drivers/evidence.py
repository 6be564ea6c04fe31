"""What a describer is shown of a direction, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from unweave.drivers.rules import Texts

__all__ = ["Describer", "Evidence", "Predict", "Proposal"]

Predict = Callable[[Texts], Tensor]


@dataclass(frozen=True)
class Evidence:
    """What a describer is shown of one direction.

    Attributes:
        node, direction: which.
        examples: rows of :meth:`unweave.drivers.Examples.table`, of all kinds, from the training text.
        rules: the names of the ready-made rules.
    """

    node: str
    direction: int
    examples: tuple[Mapping[str, Any], ...]
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """A describer's answer.

    Attributes:
        text: for people.
        predict: texts -> one number per token ``[batch pos]``; only its shape matters, not its scale.
        rule: or the name of a ready-made rule, whose table is then fitted.
    """

    text: str
    predict: Predict | None = None
    rule: str | None = None


@runtime_checkable
class Describer(Protocol):
    """A user's own way to describe, for instance a language model's: evidence -> a text that can be scored."""

    def __call__(self, evidence: Evidence) -> Proposal: ...
