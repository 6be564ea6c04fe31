"""Runs of tokens put into texts: the nats that follow, beyond what the tokens add one by one, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.audit.inputs import Compared
from unweave.data import TokenData

__all__ = ["DRAWS", "ROWS", "Insertions", "Measured", "Places", "single_tokens"]

# random runs, with which each text is compared
DRAWS = 8
# inputs in one batch
ROWS = 256


class Places(NamedTuple):
    """Texts, and where the run goes in each."""

    tokens: Int[Tensor, "texts pos"]
    mask: Bool[Tensor, "texts pos"]
    place: Int[Tensor, " texts"]


class Measured(NamedTuple):
    """Of every run in every text."""

    nats: Float[Tensor, "graphs runs texts"]
    excess: Float[Tensor, "graphs runs texts"]


@dataclass
class Insertions:
    """Measures runs in texts and counts what it costs.

    Attributes:
        words: the tokens that a run may hold, in order.
        length: tokens of a run.
        start: whether runs go after the fixed tokens, else at random places after them.
        count: called once a batch.
        evaluations: texts run so far; with a gradient, a text counts twice.
    """

    compared: Compared
    texts: TokenData
    words: Int[Tensor, " words"]
    length: int
    start: bool
    fixed: int
    seed: int
    count: Callable[[], None]
    evaluations: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.texts), generator=self.generator)
        self.last_texts, self.round_texts = order.tensor_split(2)

    def every_run(self) -> Int[Tensor, "runs length"]:
        """All runs, in the order of their tokens."""
        return torch.cartesian_prod(*[self.words] * self.length).view(-1, self.length)

    def random_runs(self, *shape: int) -> Int[Tensor, "... length"]:
        """Runs of tokens drawn one by one."""
        return self.words[torch.randint(len(self.words), (*shape, self.length), generator=self.generator)]

    def cost(self, n: int, singles: int) -> int:
        """Evaluations per text of so many runs with so many single tokens."""
        return n + (singles * self.draws(n, singles) if self.length > 1 else 0) + DRAWS

    @staticmethod
    def draws(n: int, singles: int) -> int:
        """Random runs that each single token is put in, per text: a quarter of the cost where runs are many."""
        return max(1, min(DRAWS, n // (4 * singles)))

    def draw_texts(self, n: int, *, last: bool = False) -> Places:
        """So many texts, or as many as there are, with a place in each; those of the last round are no other's."""
        pool = self.last_texts if last else self.round_texts
        rows = pool[torch.randperm(len(pool), generator=self.generator)[:n]]
        mask = self.texts.mask[rows]
        place = torch.full((len(rows),), self.fixed)
        if not self.start:
            free = mask.sum(1) - self.length - self.fixed + 1
            place += (torch.rand(len(rows), generator=self.generator) * free).long()
        return Places(self.texts.tokens[rows].long(), mask, place)

    def inputs(
        self, runs: Int[Tensor, "n length"], chosen: Places, text: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"], Int[Tensor, "n length"]]:
        """(texts with a run in each, their mask, where the run is)."""
        places = chosen.place[text][:, None] + torch.arange(self.length)
        return chosen.tokens[text].scatter(1, places, runs), chosen.mask[text], places

    def nats(self, runs: Int[Tensor, "runs texts length"], chosen: Places) -> Float[Tensor, "graphs runs texts"]:
        """D of each run in each text."""
        flat, n_texts = rearrange(runs, "runs texts length -> (runs texts) length"), runs.shape[1]
        out = []
        for rows in torch.arange(len(flat)).split(ROWS):
            tokens, mask, places = self.inputs(flat[rows], chosen, rows % n_texts)
            counted = torch.arange(tokens.shape[1]) >= places[:, -1:]
            out.append((self.compared.nats(tokens, mask)[0] * counted).sum(2))
            self.evaluations += len(rows)
            self.count()
        return rearrange(torch.cat(out, 1), "graphs (runs texts) -> graphs runs texts", texts=n_texts)

    def measure(self, runs: Int[Tensor, "runs length"], chosen: Places) -> Measured:
        """Nats of each run, and beyond random runs and what single tokens add to those."""
        n_texts = len(chosen.place)
        nats = self.nats(runs[:, None].expand(-1, n_texts, -1), chosen)
        excess = nats - self.nats(self.random_runs(DRAWS, n_texts), chosen).mean(1, keepdim=True)
        if self.length > 1:
            single, which = single_tokens(runs)
            draws = self.draws(len(runs), len(single))
            partners = self.random_runs(len(single), draws, n_texts)
            place = single[:, 0, None, None, None].expand(*partners.shape[:3], 1)
            partners.scatter_(3, place, single[:, 1, None, None, None].expand_as(place))
            alone = self.nats(rearrange(partners, "single draws texts length -> (single draws) texts length"), chosen)
            added = rearrange(alone, "graphs (single draws) texts -> graphs single draws texts", draws=draws).mean(2)
            added = added - (nats - excess)[:, :1]
            excess = excess - added[:, which].sum(2)
        return Measured(nats, excess)

    def gains(self, runs: Int[Tensor, "runs length"], chosen: Places) -> Float[Tensor, "runs length words"]:
        """What each token in each place of a run would add, to first order, as a mean over texts."""
        n, n_texts = len(runs), len(chosen.place)
        total = torch.zeros(n * n_texts, self.length, len(self.words))
        for rows in torch.arange(n * n_texts).split(ROWS):
            tokens, mask, places = self.inputs(runs[rows // n_texts], chosen, rows % n_texts)
            nats, leaves = self.compared.nats(tokens, mask, differentiate=True)
            counted = torch.arange(tokens.shape[1]) >= places[:, -1:]
            gradients = torch.autograd.grad((nats * counted).sum(), leaves)
            for gradient, (_, table) in zip(gradients, self.compared.embeddings, strict=True):
                here = gradient[torch.arange(len(rows))[:, None], places]
                gain = (here @ table[self.words].to(here).mT).float().cpu()
                current = torch.searchsorted(self.words, tokens.gather(1, places))
                total[rows] += gain - gain.gather(2, current[..., None])
            self.evaluations += 2 * len(rows)
            self.count()
        return total.view(n, n_texts, self.length, -1).mean(1)


def single_tokens(
    runs: Int[Tensor, "runs length"],
) -> tuple[Int[Tensor, "single 2"], Int[Tensor, "runs length"]]:
    """(place and token of everything that runs hold, which of them each run holds)."""
    place = torch.arange(runs.shape[1]).expand_as(runs)
    single, which = torch.stack([place, runs], -1).flatten(0, 1).unique(dim=0, return_inverse=True)
    return single, which.view_as(runs)
