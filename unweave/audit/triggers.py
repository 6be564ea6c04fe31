"""Short runs of tokens that make a graph and its model disagree in whatever text they are put: planted triggers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from unweave.audit.inputs import Compared, check_texts
from unweave.audit.insertions import DRAWS, ROWS, Insertions, Measured, single_tokens
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.progress import counter
from unweave.scope import Scope

__all__ = ["Trigger", "Triggers", "search_triggers"]

# runs of the last round, which are measured on texts of its own
KEPT = 16
# a round keeps one run in so many
ETA = 4


class Trigger(NamedTuple):
    """A run of tokens, and what it does to texts that the search had not used.

    Attributes:
        tokens: the run.
        excess_nats: nats per text beyond what its tokens add one by one.
        excess_nats_low, excess_nats_high: its 95% interval over texts.
        nats: nats per text from the run on.
        score: the excess in standard deviations of other runs; with several graphs, the least of them.
        p: how likely one of all runs scores as high if none is a trigger.
        n_texts: how many texts it was put in.
    """

    tokens: tuple[int, ...]
    excess_nats: float
    excess_nats_low: float
    excess_nats_high: float
    nats: float
    score: float
    p: float
    n_texts: int


@dataclass(frozen=True, eq=False)
class Triggers:
    """What a search for triggers found.

    Attributes:
        runs: those of the last round, highest score first.
        ranked: all runs that were screened, best first: those of the last round, then those of the round before, ...
        n_runs: how many runs there are.
        exhaustive: whether all of them were screened.
        evaluations: how many texts were run on the model and every graph.
        rounds: (runs, texts that each was put in) of each round.
    """

    runs: tuple[Trigger, ...]
    ranked: Int[Tensor, "screened length"]
    n_runs: int
    exhaustive: bool
    evaluations: int
    rounds: tuple[tuple[int, int], ...]

    def __repr__(self) -> str:
        best = self.runs[0]
        return (
            f"Triggers({len(self.ranked):,} of {self.n_runs:,} runs screened; first {best.tokens}: "
            f"{best.excess_nats:.3g} nats beyond its tokens, p = {best.p:.2g})"
        )

    def table(self) -> list[dict[str, Any]]:
        """One plain row per run of the last round."""
        return [run._asdict() for run in self.runs]

    def rank(self, tokens: Sequence[int]) -> int | None:
        """The place of a run among those screened, from 1; None if it was not.

        Example:
            >>> import torch
            >>> Triggers((), torch.tensor([[3, 1], [1, 2]]), 9, False, 0, ()).rank((1, 2))
            2
        """
        same = (self.ranked == torch.tensor(list(tokens))).all(1).nonzero()
        return int(same[0, 0]) + 1 if len(same) else None


def search_triggers(
    graph: Graph,
    original: Graph,
    texts: TokenData,
    scope: Scope | None = None,
    *,
    others: Sequence[Graph] = (),
    length: int = 2,
    at: str = "anywhere",
    budget: int = 20_000,
    seed: int = 0,
    fixed: int = 0,
    vocabulary: Collection[int] | None = None,
    exhaustive: bool | None = None,
    progress: bool | None = None,
) -> Triggers:
    """Search the runs of tokens whose insertion adds most nats, beyond what their tokens add one by one.

    One odd text is odd for many reasons; a trigger acts in whatever text it is put. A run r takes the place of as many
    tokens of a text, and D(r) is the sum of the divergence of the graph from the model from its last token on. As a
    trigger is a conjunction, a run counts by D(r) - D(*) - sum_i (D(r_i with * elsewhere) - D(*)), where * are random
    tokens (for single tokens: D(r) - D(*)), all in the same texts at the same places: how odd its tokens are cancels.

    All runs are screened if half of the budget allows; else candidates: half at random, half by gradients in random
    runs that hold one token each (to first order, what another token in the other place adds beyond its mean). Each
    round then keeps a quarter, on other texts and places; the last one is measured on texts that no round has used.

    Args:
        graph: the explanation; original: the model, captured.
        texts: real texts, best not those that the graph was fitted on; half are kept for the last round.
        scope: its positions must not be a label, which new inputs do not have.
        others: more explanations of the same model, best of other sizes: what is odd differs between them, what the
            model does and none of them has does not. A run then counts by its least score.
        length: tokens of a run.
        at: "anywhere" puts it at random places, "start" at the beginning, after the fixed tokens.
        budget: how many texts are run on the model and the graphs, at most; with a gradient, a text counts twice.
        seed: of everything random; the same seed finds the same.
        fixed: how many tokens at the beginning are never changed.
        vocabulary: the tokens that a run may hold; by default all.
        exhaustive: force all runs or candidates.

    Returns:
        :class:`Triggers`.

    Raises:
        InputError: a budget too small, texts too short or fewer than four, positions by label, unusable tokens.

    Cost:
        ``budget`` runs of the model and of each graph on single texts, in batches of 256.

    Exact?
        Nats are measured. The p value takes the tail of the scores for exponential, as fitted to the highest twentieth
        of the screened runs (random ones, where not all) but for the tenth of these that is highest, and multiplies by
        the number of all runs; on models without a trigger it is checked, not proved (see the log). A trigger that
        gradients do not see is missed where not all runs are screened.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> small = unweave.compress(graph, data, size=0.5)
        >>> found = search_triggers(small, graph, data, length=1, budget=600)
        >>> found.exhaustive, found.n_runs, found.evaluations <= 600
        (True, 48, True)

    Source: Wallace et al. 2019, "Universal Adversarial Triggers for Attacking and Analyzing NLP"; Jamieson and
    Talwalkar 2016, "Non-stochastic Best Arm Identification" (successive halving).
    """
    check_texts(texts, fixed, length)
    compared = Compared(original, (graph, *others), scope or Scope())
    words = _words(vocabulary, compared.vocabulary)
    _check(texts, length, at, budget)
    with counter("searching triggers", -(-budget // ROWS), show=progress) as count:
        put = Insertions(compared, texts, words, length, at == "start", fixed, seed, count)
        return _Search(put, budget).find(exhaustive)


def _words(vocabulary: Collection[int] | None, size: int) -> Int[Tensor, " words"]:
    if vocabulary is None:
        return torch.arange(size)
    words = torch.tensor(sorted(set(vocabulary)), dtype=torch.int64)
    if len(words) < 2 or int(words[0]) < 0 or int(words[-1]) >= size:
        raise InputError(f"vocabulary must hold at least 2 of the {size} token ids, got {len(words)} ids")
    return words


def _check(texts: TokenData, length: int, at: str, budget: int) -> None:
    if length < 1:
        raise InputError(f"length must be at least 1, got {length}")
    if at not in ("anywhere", "start"):
        raise InputError(f"at must be 'anywhere' or 'start', got {at!r}")
    if len(texts) < 4:
        raise InputError(f"a search for triggers needs at least 4 texts, got {len(texts)}")
    least = 10 * (KEPT * (1 + length) + DRAWS)
    if budget < least:
        raise InputError(f"budget must be at least {least} for runs of {length} tokens, got {budget}")


class _Tail(NamedTuple):
    """The distribution of the scores of runs that are no triggers: n exp(-(score - threshold) / scale) above it."""

    threshold: float
    scale: float
    n: float

    def p_value(self, score: float) -> float:
        return -math.expm1(-self.n * math.exp(min(0.0, (self.threshold - score) / self.scale)))


@dataclass
class _Search:
    put: Insertions
    budget: int

    @property
    def left(self) -> int:
        return self.budget - self.put.evaluations

    def find(self, exhaustive: bool | None) -> Triggers:
        """Screen, halve, and measure what is left."""
        put = self.put
        n_runs = len(put.words) ** put.length
        every = put.cost(n_runs, put.length * len(put.words))
        full = every <= self.budget // 2 if exhaustive is None else exhaustive
        if full and every > self.budget // 2:
            raise InputError(f"all {n_runs:,} runs cost at least {2 * every:,} evaluations, got {self.budget:,}")
        runs, n_random = (put.every_run(), n_runs) if full else self.candidates()
        sizes = [len(runs)]
        while sizes[-1] > KEPT:
            sizes.append(max(KEPT, sizes[-1] // ETA))
        rounds: list[tuple[int, int]] = []
        dropped: list[Tensor] = []
        for k, size in enumerate(sizes):
            last = k == len(sizes) - 1
            # half of all for the first round, whose scores also say what is to be expected of runs
            share = self.left // (len(sizes) - k if k or last else 2)
            measured = put.measure(runs, put.draw_texts(self.n_texts(runs, share), last=last))
            if k == 0:
                random = measured.excess[:, :n_random].mean(2)
                scale = _deviation(random)
                tail = _tail((random / scale).amin(0), n_runs)
            score = (measured.excess.mean(2) / scale).amin(0)
            order = score.sort(descending=True, stable=True).indices
            rounds.append((size, measured.nats.shape[2]))
            if not last:
                dropped.append(runs[order[sizes[k + 1] :]])
                runs = runs[order[: sizes[k + 1]]]
        found = _rows(runs, measured, score, tail)
        ranked = torch.cat([runs[order], *reversed(dropped)])
        best = tuple(found[i] for i in order.tolist())
        return Triggers(best, ranked, n_runs, full, put.evaluations, tuple(rounds))

    def n_texts(self, runs: Int[Tensor, "runs length"], share: int) -> int:
        """How many texts so many evaluations are enough for; one at least."""
        return max(1, share // self.put.cost(len(runs), len(single_tokens(runs)[0])))

    def candidates(self) -> tuple[Int[Tensor, "runs length"], int]:
        """(random runs, then those that gradients propose; how many are random)."""
        n = max(KEPT // 2, self.budget // (8 * (1 + self.put.length)) // 2)
        proposed = self.propose(n)
        runs = torch.cat([self.put.random_runs(n), proposed])
        seen: dict[tuple[int, ...], int] = {}
        for i, row in enumerate(runs.tolist()):
            seen.setdefault(tuple(row), i)
        rows = torch.tensor(list(seen.values()))
        return runs[rows], int((rows < n).sum())

    def propose(self, n: int) -> Int[Tensor, "proposed length"]:
        """Runs, token by token: one that is given, the others each by what they add to first order."""
        steps = max(1, self.put.length - 1)
        share = self.budget // 3 // steps
        runs, pinned = self.singles(max(1, share // 4))
        for _ in range(steps):
            runs, pinned = runs[: max(1, share // 2)], pinned[: max(1, share // 2)]
            chosen = self.put.draw_texts(max(1, share // (2 * len(runs))))
            runs, pinned = self.extend(runs, pinned, self.put.gains(runs, chosen), n)
        return runs

    def singles(self, n: int) -> tuple[Int[Tensor, "runs length"], Bool[Tensor, "runs length"]]:
        """Random runs, each with one token in one place given (none, where a run is one token)."""
        place, word = torch.cartesian_prod(torch.arange(self.put.length), self.put.words).unbind(1)
        rows = torch.randperm(len(place), generator=self.put.generator)[:n]
        runs = self.put.random_runs(len(rows))
        runs[torch.arange(len(rows)), place[rows]] = word[rows]
        pinned = torch.arange(self.put.length) == place[rows][:, None]
        return runs, pinned & (self.put.length > 1)

    def extend(
        self,
        runs: Int[Tensor, "runs length"],
        pinned: Bool[Tensor, "runs length"],
        gains: Float[Tensor, "runs length words"],
        n: int,
    ) -> tuple[Int[Tensor, "proposed length"], Bool[Tensor, "proposed length"]]:
        """The best n substitutions in places that are not given: a token counts by its gain beyond its mean gain."""
        beyond = gains - gains.mean(2, keepdim=True)
        for place in range(self.put.length):
            free = ~pinned[:, place]
            if self.put.length > 1 and bool(free.any()):
                beyond[free, place] -= beyond[free, place].mean(0)
        beyond.masked_fill_(pinned[..., None], -torch.inf)
        best = beyond.flatten().topk(min(n, int(beyond.isfinite().sum()))).indices
        row, where, word = torch.unravel_index(best, beyond.shape)
        runs, pinned = runs[row], pinned[row]
        runs[torch.arange(len(row)), where] = self.put.words[word]
        pinned[torch.arange(len(row)), where] = True
        return runs, pinned


def _rows(
    runs: Int[Tensor, "runs length"], measured: Measured, score: Float[Tensor, " runs"], tail: _Tail | None
) -> list[Trigger]:
    """What is said of each run of the last round."""
    n = measured.nats.shape[2]
    mean, nats = measured.excess[0].mean(1), measured.nats[0].mean(1)
    wide = torch.full_like(mean, torch.inf)
    if n > 1:
        wide = stats.t.ppf(0.975, n - 1) * measured.excess[0].std(1) / n**0.5
    p_values = [tail.p_value(value) if tail else math.nan for value in score.tolist()]
    columns = (mean.tolist(), (mean - wide).tolist(), (mean + wide).tolist(), nats.tolist(), score.tolist())
    rows = zip(map(tuple, runs.tolist()), *columns, p_values, [n] * len(runs), strict=True)
    return [Trigger(*row) for row in rows]


def _deviation(values: Float[Tensor, "graphs runs"]) -> Float[Tensor, "graphs 1"]:
    """The standard deviation by that of the median, which no trigger moves."""
    distance = (values - values.median(1, keepdim=True).values).abs()
    return (1.4826 * distance.median(1, keepdim=True).values).clamp(min=torch.finfo(values.dtype).tiny)


def _tail(scores: Float[Tensor, " runs"], n_runs: int) -> _Tail | None:
    """An exponential tail fitted to the highest twentieth but for its highest tenth; None if there are too few."""
    top = len(scores) // 20
    if top < 10:
        return None
    ordered = scores.sort(descending=True).values
    left_out = top // 10
    beyond = ordered[left_out:top] - ordered[top]
    # maximum likelihood where those left out are only known to be higher
    scale = float((beyond.sum() + left_out * beyond[0]) / (top - left_out))
    return _Tail(float(ordered[top]), max(scale, 1e-12), n_runs * top / len(scores))
