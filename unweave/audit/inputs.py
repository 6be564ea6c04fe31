"""A graph and its model on inputs that a search makes: what can be searched, and the nats of each new input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.audit.disagreement import check_pair
from unweave.data import Batch, TokenData
from unweave.errors import InputError
from unweave.execution import plan_of, run
from unweave.graph import Graph
from unweave.ops import Lookup
from unweave.scope import Scope, divergence, position_mask

__all__ = ["Compared", "check_texts"]


def check_texts(texts: TokenData, fixed: int, changed: int = 1) -> None:
    """Refuse texts in which no token, or not so many neighbouring ones, can be changed after the fixed ones.

    Raises:
        InputError: reals, or texts too short.
    """
    if texts.tokens.is_floating_point():
        raise InputError("a search substitutes tokens; these texts are reals")
    shortest = int(texts.lengths.min()) if len(texts) else 0
    if not 0 <= fixed <= shortest - changed:
        left = "a token" if changed == 1 else f"{changed} tokens"
        raise InputError(f"fixed must leave {left} of every text to change, got {fixed} with texts of {shortest}")


@dataclass(frozen=True, eq=False)
class Compared:
    """A model and explanations of it, to be run on new inputs.

    Raises:
        InputError: graphs that cannot be compared, that embed no tokens, or positions by label.
    """

    original: Graph
    graphs: tuple[Graph, ...]
    scope: Scope

    def __post_init__(self) -> None:
        for graph in self.graphs:
            check_pair(graph, self.original)
        positions = self.scope.positions
        if isinstance(positions, str) and positions not in ("all", "last"):
            raise InputError(f"new inputs have no label {positions!r}; give positions by number or a function")
        _ = self.embeddings

    @cached_property
    def embeddings(self) -> list[tuple[str, Float[Tensor, "vocabulary d_model"]]]:
        """For the model and each graph, the node that looks tokens up, and what it writes for each."""
        return [_embedding(g) for g in (self.original, *self.graphs)]

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.embeddings[0][1])

    def nats(
        self, tokens: Int[Tensor, "n pos"], mask: Bool[Tensor, "n pos"], *, differentiate: bool = False
    ) -> tuple[Float[Tensor, "graphs n pos"], list[Tensor]]:
        """(nats at every token, 0 outside the scope; what each embedding wrote, to differentiate by)."""
        leaves: list[Tensor] = []

        def leaf(y: Tensor) -> Tensor:
            leaves.append(y.detach().requires_grad_())
            return leaves[-1]

        batch = Batch(tokens, mask, {}, torch.arange(len(tokens)))
        with torch.set_grad_enabled(differentiate):
            reference, *logits = (
                run(g, tokens, mask, patch={node: leaf} if differentiate else None).logits
                for g, (node, _) in zip((self.original, *self.graphs), self.embeddings, strict=True)
            )
            nats = torch.stack([divergence(self.scope, reference, x.to(reference.device), batch) for x in logits])
        marked = position_mask(self.scope, batch).to(nats.device)
        return nats.double().nan_to_num(nan=0.0).masked_fill(~marked, 0.0).cpu(), leaves


@torch.no_grad()
def _embedding(graph: Graph) -> tuple[str, Float[Tensor, "vocabulary d_model"]]:
    """The node that looks tokens up, and what it writes for each."""
    for s, stage in enumerate(graph.stages):
        core, write = stage.core, plan_of(graph).stages[s].write
        if isinstance(core, Lookup) and core.source == "token" and write is not None:
            return stage.nodes[0], write.apply(core.scale * core.table)
    raise InputError("a search needs a graph that embeds tokens; this one has no table of them")
