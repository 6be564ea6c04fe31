"""Inputs on which a graph and its model disagree most: gradient-guided substitution and mutation of real texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.audit.inputs import Compared, check_texts
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.scope import Scope

__all__ = ["Found", "Hit", "search_inputs"]

POPULATION = 32
# parents of a round, and candidates made of each
PARENTS = 8
CHILDREN = 16
# substitutions that a gradient proposes are drawn from so many best
PROPOSED = 64


class Hit(NamedTuple):
    """An input, the largest nats at any of its tokens, and where."""

    nats: float
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        hits: the inputs with most nats, best first, all different.
        start_nats: the largest among the start texts.
        evaluations: how many inputs were run on both graphs.
        history: (evaluations so far, largest nats so far) after each round.
    """

    hits: tuple[Hit, ...]
    start_nats: float
    evaluations: int
    history: tuple[tuple[int, float], ...]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per input: nats, position, tokens."""
        return [hit._asdict() for hit in self.hits]


def search_inputs(
    graph: Graph,
    original: Graph,
    start_texts: TokenData,
    scope: Scope | None = None,
    *,
    budget: int = 2000,
    seed: int = 0,
    fixed: int = 0,
    gradients: bool = True,
) -> Found:
    """Search inputs that maximise the largest divergence, over tokens, of a graph from its model.

    A round takes parents from the best inputs so far and from the start texts, makes candidates of each, and evaluates
    every candidate exactly. A candidate is a substitution of one token drawn from those that the gradient ranks first
    (gain = dD/dx_t . (e_v - e_current), summed over both graphs, which embed tokens each in their own way), a random
    substitution of one or two neighbouring tokens, or a splice: a piece of another text in its place.

    Args:
        start_texts: real texts; as many as a quarter of the budget allows are evaluated first.
        scope: its positions must not be a label, which new inputs do not have.
        budget: how many inputs are run on both graphs, at most; one whose gradient is taken counts once more.
        seed: of everything random; the same seed finds the same.
        fixed: how many tokens at the beginning are never changed.
        gradients: whether to propose by gradients; else all candidates are random.

    Returns:
        :class:`Found`.

    Raises:
        InputError: a budget below 4, graphs without token embeddings, positions by label, or nothing to change.

    Cost:
        ``budget`` runs of both graphs on single texts, in batches of up to 128.

    Exact?
        The nats of what is found are; nothing says that there is no worse input.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> small = unweave.compress(graph, data, size=0.5)
        >>> found = search_inputs(small, graph, data, budget=100, fixed=1)
        >>> found.hits[0].nats >= found.start_nats, found.evaluations <= 100
        (True, True)

    Source: Ebrahimi et al. 2018, "HotFlip"; Zou et al. 2023, "Universal and Transferable Adversarial Attacks".
    """
    search = _Search(graph, original, start_texts, scope or Scope(), budget, fixed, seed, gradients)
    search.begin()
    start = search.best
    while search.left > 0:
        search.round()
    return Found(search.hits(), start, search.evaluations, tuple(search.history))


@dataclass
class _Search:
    graph: Graph
    original: Graph
    texts: TokenData
    scope: Scope
    budget: int
    fixed: int
    seed: int
    gradients: bool
    evaluations: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.budget < 4:
            raise InputError(f"budget must be at least 4 evaluations, got {self.budget}")
        check_texts(self.texts, self.fixed)
        self.compared = Compared(self.original, (self.graph,), self.scope)
        self.generator = torch.Generator().manual_seed(self.seed)
        width = self.texts.tokens.shape[1]
        self.tokens = torch.zeros(0, width, dtype=torch.int64)
        self.mask = torch.zeros(0, width, dtype=torch.bool)
        self.nats, self.place = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)

    @property
    def left(self) -> int:
        return self.budget - self.evaluations

    @property
    def best(self) -> float:
        return float(self.nats[0])

    def hits(self) -> tuple[Hit, ...]:
        rows = zip(self.nats.tolist(), self.place.tolist(), self.tokens, self.mask, strict=True)
        return tuple(Hit(nats, place, tuple(t[m].tolist())) for nats, place, t, m in rows)

    def draw(self, high: int, n: int) -> Int[Tensor, " n"]:
        return torch.randint(high, (n,), generator=self.generator)

    def begin(self) -> None:
        """Evaluate start texts, in a random order."""
        order = torch.randperm(len(self.texts), generator=self.generator)[: max(1, self.budget // 4)]
        for rows in order.split(PARENTS * CHILDREN):
            self.take(self.texts.tokens[rows].long(), self.texts.mask[rows])

    def take(self, tokens: Int[Tensor, "n pos"], mask: Bool[Tensor, "n pos"]) -> None:
        """Evaluate candidates and keep the best of all."""
        tokens, mask = tokens[: self.left], mask[: self.left]
        nats = self.measure(tokens, mask)[0].detach()
        top, place = nats.max(1)
        self.evaluations += len(tokens)
        self.tokens, self.mask = torch.cat([self.tokens, tokens]), torch.cat([self.mask, mask])
        self.nats, self.place = torch.cat([self.nats, top]), torch.cat([self.place, place])
        order = self.nats.sort(descending=True, stable=True).indices
        first: dict[tuple[int, ...], int] = {}
        for i, text in zip(order.tolist(), self.tokens[order].tolist(), strict=True):
            first.setdefault(tuple(text), i)
        rows = torch.tensor(list(first.values())[:POPULATION])
        self.tokens, self.mask, self.nats, self.place = (
            x[rows] for x in (self.tokens, self.mask, self.nats, self.place)
        )
        self.history.append((self.evaluations, self.best))

    def measure(
        self, tokens: Int[Tensor, "n pos"], mask: Bool[Tensor, "n pos"], differentiate: bool = False
    ) -> tuple[Float[Tensor, "n pos"], list[Tensor]]:
        """(nats at every token, what each graph's embedding wrote, to differentiate by)."""
        nats, leaves = self.compared.nats(tokens, mask, differentiate=differentiate)
        return nats[0], leaves

    def gains(self, tokens: Int[Tensor, "n pos"], mask: Bool[Tensor, "n pos"]) -> Float[Tensor, "n pos vocabulary"]:
        """What substituting each token would add to the largest nats, to first order."""
        nats, leaves = self.measure(tokens, mask, differentiate=True)
        self.evaluations += len(tokens)
        gradients = torch.autograd.grad(nats.amax(1).sum(), leaves)
        total = torch.zeros(*tokens.shape, self.compared.vocabulary)
        for gradient, (_, table) in zip(gradients, self.compared.embeddings, strict=True):
            gain = (gradient @ table.to(gradient).mT).float().cpu()
            total += gain - gain.gather(2, tokens[..., None])
        total.scatter_(2, tokens[..., None], -torch.inf)
        total[:, : self.fixed] = -torch.inf
        return total.masked_fill(~mask[..., None], -torch.inf)

    def round(self) -> None:
        """One generation: half of the parents are the best, half are drawn from the best and the start texts."""
        best = self.draw(len(self.tokens), PARENTS // 2)
        best[: PARENTS // 4] = torch.arange(PARENTS // 4).clamp(max=len(self.tokens) - 1)
        real = self.draw(len(self.texts), PARENTS - PARENTS // 2)
        tokens = torch.cat([self.tokens[best], self.texts.tokens[real].long()])
        mask = torch.cat([self.mask[best], self.texts.mask[real]])
        tokens, mask = tokens[: self.left], mask[: self.left]
        n = CHILDREN // 2
        masks = mask.repeat_interleave(n, 0)
        children = (
            [self.guided(tokens, mask)] if self.gradients else [self.mutated(tokens.repeat_interleave(n, 0), masks)]
        )
        children.append(self.mutated(tokens.repeat_interleave(n, 0), masks))
        if self.left:
            order = torch.randperm(2 * len(masks), generator=self.generator)
            self.take(torch.cat(children)[order], masks.repeat(2, 1)[order])

    def guided(self, tokens: Int[Tensor, "n pos"], mask: Bool[Tensor, "n pos"]) -> Int[Tensor, "children pos"]:
        """Children of each text by a substitution that the gradient proposes."""
        gains = self.gains(tokens, mask).flatten(1)
        proposed = gains.topk(min(PROPOSED, gains.shape[1]), dim=1).indices
        n = CHILDREN // 2
        where = proposed.gather(1, torch.randint(proposed.shape[1], (len(tokens), n), generator=self.generator))
        # where too few may be changed, some proposals are none
        usable = gains.gather(1, where).isfinite().flatten()
        vocabulary = gains.shape[1] // tokens.shape[1]
        children = tokens.repeat_interleave(n, 0)
        row, place = torch.arange(len(children)), where.flatten() // vocabulary
        children[row, place] = torch.where(usable, where.flatten() % vocabulary, children[row, place])
        return children

    def mutated(self, tokens: Int[Tensor, "n pos"], mask: Bool[Tensor, "n pos"]) -> Int[Tensor, "n pos"]:
        """Each text with one or two neighbouring tokens drawn anew, or with a piece of a real text."""
        n, width = tokens.shape
        lengths = mask.sum(1)
        start = self.fixed + (torch.rand(n, generator=self.generator) * (lengths - self.fixed)).long()
        longest = torch.where(self.draw(2, n) == 0, 1 + self.draw(2, n), 1 + self.draw(max(1, width // 2), n))
        pos = torch.arange(width)
        changed = (pos >= start[:, None]) & (pos < (start + longest)[:, None]) & mask
        donor = self.texts.tokens[self.draw(len(self.texts), n)].long()
        anew = torch.randint(self.compared.vocabulary, (n, width), generator=self.generator)
        new = torch.where((longest <= 2)[:, None], anew, donor)
        return torch.where(changed, new, tokens)
