"""What can be made smaller on its own, and the choice that it has at a price."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from unweave.graph import Stage

__all__ = ["Choice", "Part"]


class Choice(NamedTuple):
    """What a part would be made into: how many numbers it stores, the nats lost, and how (its ranks)."""

    numbers: int
    nats: float
    ranks: tuple[int, ...]


class Part(ABC):
    """Something in a stage that can be made smaller on its own."""

    @abstractmethod
    def choose(self, price: float) -> Choice:
        """The choice that minimises nats + price * numbers."""

    @abstractmethod
    def within(self, limit: float) -> Choice:
        """A choice of at most ``limit`` numbers that loses little: what fills a budget where prices leave gaps.

        (Storage is concave in the rank, so one price for all reaches only some of the sizes.)
        """

    @abstractmethod
    def apply(self, stage: Stage, choice: Choice) -> Stage:
        """The stage with this part made into the choice."""
