"""What directions were found to say, each with the score of its text on tokens that played no part in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.errors import UnknownNameError

__all__ = ["Description", "Descriptions"]


@dataclass(frozen=True)
class Description:
    """One direction's description.

    Attributes:
        node, direction: which.
        text: what was proposed; None where nothing was.
        label: the text where its score is above the null's, else None.
        rules: the names of the rules it is made of.
        score: held-out R^2; NaN where it cannot be scored.
        auroc: held-out, of the tokens in the top tenth of the code.
        random_score, random_auroc: means over random descriptions.
        note: why there is no label.
    """

    node: str
    direction: int
    text: str | None
    label: str | None
    rules: tuple[str, ...]
    score: float
    auroc: float
    random_score: float
    random_auroc: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class Descriptions:
    """Descriptions of all directions, with their null.

    Attributes:
        items: one for each direction.
        null: held-out scores of the same search on shifted codes, all directions and shifts.
        threshold: the null's 95th percentile, at least 0: what a label has to exceed.
        n_tokens, n_held_out: how many tokens were fitted and scored on.
    """

    items: tuple[Description, ...]
    null: Float[Tensor, " draws"]
    threshold: float
    n_tokens: int
    n_held_out: int

    def find(self, node: str, direction: int) -> Description:
        """The description of one direction.

        Raises:
            UnknownNameError: there is none.
        """
        for item in self.items:
            if (item.node, item.direction) == (node, direction):
                return item
        raise UnknownNameError("direction", f"{node} {direction}", [f"{i.node} {i.direction}" for i in self.items])

    def table(self) -> list[dict[str, Any]]:
        """Plain rows, one for each direction."""
        return [vars(item) | {"rules": list(item.rules), "null_95": self.threshold} for item in self.items]

    def summary(self) -> list[dict[str, Any]]:
        """One plain row per node: how many directions have a label, and mean scores against both baselines.

        Directions that are constant on the held-out text count nowhere but in ``directions``. ``described`` counts
        rows with a score; one that was given no text scores what predicting the mean scores.
        """
        out = []
        for node in dict.fromkeys(item.node for item in self.items):
            mine = [item for item in self.items if item.node == node]
            scored = [item for item in mine if item.score == item.score]
            row: dict[str, Any] = {"node": node, "directions": len(mine), "scored": len(scored)}
            row["labelled"] = sum(item.label is not None for item in mine)
            for name in ("score", "auroc", "random_score", "random_auroc"):
                found = torch.tensor([getattr(item, name) for item in scored], dtype=torch.float64)
                row[name] = float(found.nanmean()) if len(found) else float("nan")
            out.append(row)
        return out
