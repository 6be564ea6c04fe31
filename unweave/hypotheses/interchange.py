"""Interchange interventions: does the network do what the hypothesis says when a variable is swapped?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import run
from unweave.graph import Graph
from unweave.hypotheses.alignment import Alignment, Location, locations_of
from unweave.hypotheses.causal_model import CausalModel
from unweave.hypotheses.pairs import (
    Answers,
    Homes,
    PairBatch,
    Pairs,
    Verdict,
    draw_pairs,
    judge,
    predicted,
    record,
    swapped_logits,
)
from unweave.intervals import Estimate, bootstrap_ratio
from unweave.progress import track
from unweave.scope import Scope, position_mask

__all__ = ["Accuracy", "Interchange", "Tally", "homes_of", "interchange_accuracy", "random_homes"]


@dataclass(frozen=True)
class Accuracy:
    """How often a network, its variables swapped, gives the hypothesis' answer.

    Attributes:
        effective: share of the positions where the swap changes the hypothesis' answer; NaN where there are none.
        unchanged: share of those where it does not: an intervention that does nothing gets all of these right.
        nats: -log p(the hypothesis' answer), or half the squared difference of a real output, on effective positions.
        n_effective, n_unchanged: how many positions of either kind.
    """

    effective: Estimate
    unchanged: Estimate
    nats: Estimate
    n_effective: int
    n_unchanged: int


@dataclass(frozen=True, eq=False)
class Interchange:
    """Interchange-intervention accuracy of a hypothesis, by the set of variables swapped ("a", "a + b").

    Attributes:
        accuracy: by set of variables.
        elsewhere: the same swaps at other places: random subspaces of as many dimensions where locations are subspaces,
            else other nodes, whole; one that the variable is computed from may do as well. One accuracy per draw.
        mislabelled: the answers taken for another source than the one swapped in.
        agreement: how often network and hypothesis agree when nothing is swapped.
        n_pairs: how many pairs of sequences.
    """

    accuracy: Mapping[str, Accuracy]
    elsewhere: Mapping[str, tuple[Accuracy, ...]]
    mislabelled: Mapping[str, Accuracy]
    agreement: Estimate
    n_pairs: int

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: variables, iia on effective pairs with its interval, its controls, how many positions."""
        return [
            {
                "variables": name,
                **a.effective.columns("iia"),
                "unchanged": a.unchanged.value,
                "nats": a.nats.value,
                "elsewhere": float(np.mean([e.effective.value for e in self.elsewhere[name]] or [np.nan])),
                "mislabelled": self.mislabelled[name].effective.value,
                "n_effective": a.n_effective,
                "n_unchanged": a.n_unchanged,
            }
            for name, a in self.accuracy.items()
        ]


class Tally:
    """Sums per pair: positions, right answers and nats, effective and unchanged apart."""

    def __init__(self) -> None:
        self.rows: list[Float[Tensor, "batch 5"]] = []

    def add(self, verdict: Verdict, logits: Float[Tensor, "batch pos d_out"], answers: Answers) -> None:
        """Count one batch."""
        right, nats = (x.cpu() for x in answers.compare(logits, verdict.answer))
        effective, unchanged = verdict.effective, verdict.unchanged
        columns = [effective, right & effective, torch.where(effective, nats, 0.0), unchanged, right & unchanged]
        self.rows.append(torch.stack([column.double().sum(1) for column in columns], dim=1))

    def accuracy(self, pairs: Pairs, seed: int = 0) -> Accuracy:
        """Shares with intervals over base sequences: pairs that share a base are drawn together."""
        table = _by_base(torch.cat(self.rows), pairs)
        counts = (int(table[:, 0].sum()), int(table[:, 3].sum()))
        return Accuracy(_share(table, 1, 0, seed), _share(table, 4, 3, seed), _share(table, 2, 0, seed), *counts)

    @property
    def n_answers(self) -> int:
        """How many positions were counted."""
        return int(sum(float(row[:, [0, 3]].sum()) for row in self.rows))


def _by_base(sums: Float[Tensor, "pairs columns"], pairs: Pairs) -> np.ndarray:
    """Sums per base sequence."""
    bases, base_of = pairs.rows.unique(return_inverse=True)
    table = torch.zeros(len(bases), sums.shape[1], dtype=sums.dtype).index_add(0, base_of, sums)
    return np.asarray(table.numpy())


def _share(table: np.ndarray, top: int, bottom: int, seed: int) -> Estimate:
    return bootstrap_ratio(table[:, top], table[:, bottom], seed)


def homes_of(model: CausalModel, alignment: Alignment) -> Homes:
    """The locations of every variable.

    Raises:
        InputError: no variable, or unusable locations.
        UnknownNameError: the hypothesis has no such variable.
    """
    if not alignment:
        raise InputError("the alignment is empty: say where at least one variable lives")
    model.require(alignment)
    return {name: locations_of(locations) for name, locations in alignment.items()}


def random_homes(graph: Graph, homes: Homes, generator: torch.Generator) -> Homes:
    """A random subspace of as many dimensions for each location that is one, another node for each that is whole."""
    taken = {location.place for locations in homes.values() for location in locations}
    others = [node for node in graph.writers if node not in taken] or list(graph.writers)

    def moved(location: Location) -> Location:
        if location.basis is None:
            return Location(
                others[int(torch.randint(len(others), (1,), generator=generator))], None, location.positions
            )
        shape = location.basis.shape
        return Location(location.place, torch.linalg.qr(torch.randn(shape, generator=generator)).Q, location.positions)

    return {name: tuple(moved(location) for location in locations) for name, locations in homes.items()}


@torch.no_grad()
def interchange_accuracy(
    graph: Graph,
    model: CausalModel,
    alignment: Alignment,
    data: TokenData,
    scope: Scope | None = None,
    *,
    together: Sequence[Iterable[str]] | None = None,
    n_pairs: int | None = None,
    n_random: int = 3,
    tolerance: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Interchange:
    """How often a network does what a hypothesis says when variables are set to their values on other sequences.

    For a pair (base b, source s) and a variable V that lives at H: run the network on b with H as it is on s, and the
    hypothesis on b with V as it is on s. Interchange-intervention accuracy (IIA) is the share of positions where
    both give the same output,

        IIA = E_(b, s) [ N_{H <- N_H(s)}(b) = M_{V <- M_V(s)}(b) ].

    Only positions where the swap changes the hypothesis' answer tell anything; the others are counted apart.

    Args:
        graph: uncut, or with edges cut to constants (then no location can be a residual stream).
        alignment: variable -> a place, a :class:`Location` or several. What is not in it is not tested.
        data: the sequences to pair; use some that no search has seen.
        scope: which positions count; its quotient makes the answers classes.
        together: sets of variables swapped at once, each variable from a source of its own; by default each
            variable alone, and all together.
        n_pairs: as many as sequences by default.
        n_random: how many random places to compare with.
        tolerance: how far a real output may be from the answer.

    Returns:
        :class:`Interchange`.

    Raises:
        UnknownNameError: an unknown variable or place.
        InputError: an empty alignment, unusable locations or answers, a graph whose cut edges are resampled.
        EmptyDataError: the hypothesis answers nowhere in the scope.

    Cost:
        Per pair: 1 + (variables) + (1 + n_random) (sets) forward passes; memory of one batch.

    Exact?
        Yes for these pairs. An interval is a bootstrap over base sequences, [1, 1] where all is right. A subspace can
        pass by waking a path that the network does not use (Makelov et al. 2023): compare with the node whole.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:modular_addition"), unweave.load_data("zoo:modular_addition", limit=64)
        >>> model = CausalModel(
        ...     {"sum": lambda tokens: (tokens[:, 0] + tokens[:, 1]) % 113, "answer": lambda sum: sum}, "answer"
        ... )
        >>> home = Location("blocks.0.mlp", positions="last")
        >>> result = interchange_accuracy(graph, model, {"sum": home}, data, unweave.Scope(positions="last"))
        >>> result.accuracy["sum"].effective.value > 0.9
        True

    Source:
        Geiger et al. 2021, "Causal Abstractions of Neural Networks".
    """
    homes = homes_of(model, alignment)
    sets = _sets(homes, together)
    answers = Answers(scope or Scope(), tolerance)
    pairs = draw_pairs(data, homes, n_pairs, seed)
    generator = torch.Generator().manual_seed(seed)
    there = [random_homes(graph, homes, generator) for _ in range(n_random)]
    tallies = {name: _SetTally(n_random) for name in sets}
    agreement: list[Tensor] = []
    total = -(-len(pairs) // batch_size)
    for batch in track(pairs.batches(batch_size), "interchanges", total, show=progress):
        agreement.append(_agreement(graph, model, batch.base, answers))
        places = [location for some in (homes, *there) for locations in some.values() for location in locations]
        recorded = {name: record(graph, source, places) for name, source in batch.sources.items()}
        for name, members in sets.items():
            tallies[name].add(graph, model, [homes, *there], _only(batch, members), recorded, answers)
    if all(t.here.n_answers == 0 for t in tallies.values()):
        raise EmptyDataError("the hypothesis answers at no position of the scope: there is nothing to compare")
    return Interchange(
        {name: t.here.accuracy(pairs, seed) for name, t in tallies.items()},
        {name: tuple(e.accuracy(pairs, seed) for e in t.elsewhere) for name, t in tallies.items()},
        {name: t.mislabelled.accuracy(pairs, seed) for name, t in tallies.items()},
        _share(_by_base(torch.cat(agreement), pairs), 1, 0, seed),
        len(pairs),
    )


class _SetTally:
    """What is counted for one set of variables."""

    def __init__(self, n_random: int) -> None:
        self.here, self.mislabelled = Tally(), Tally()
        self.elsewhere = [Tally() for _ in range(n_random)]

    def add(
        self,
        graph: Graph,
        model: CausalModel,
        homes: list[Homes],
        batch: PairBatch,
        recorded: Mapping[str, Mapping[str, Tensor]],
        answers: Answers,
    ) -> None:
        """Count one batch; the first of ``homes`` is the alignment, the others are random."""
        here, *there = homes
        verdict = judge(model, here, batch.base, batch.sources, answers)
        logits = swapped_logits(graph, here, batch.base, batch.sources, recorded)
        self.here.add(verdict, logits, answers)
        self.mislabelled.add(judge(model, here, batch.base, batch.others, answers), logits, answers)
        for tally, home in zip(self.elsewhere, there, strict=True):
            tally.add(verdict, swapped_logits(graph, home, batch.base, batch.sources, recorded), answers)


def _only(batch: PairBatch, members: Iterable[str]) -> PairBatch:
    return PairBatch(batch.base, *({v: part[v] for v in members} for part in (batch.sources, batch.others)))


def _sets(homes: Homes, together: Sequence[Iterable[str]] | None) -> dict[str, tuple[str, ...]]:
    """The sets of variables to swap, by name."""
    alone: list[Iterable[str]] = [[name] for name in homes]
    asked = [tuple(s) for s in (alone + [homes] * (len(homes) > 1) if together is None else together)]
    for name in (name for members in asked for name in members):
        if name not in homes:
            raise UnknownNameError("aligned variable", name, homes)
    if not asked or not all(asked):
        raise InputError("together= holds no set of variables, or an empty one; leave it out for each alone and all")
    return {" + ".join(members): members for members in asked}


def _agreement(graph: Graph, model: CausalModel, base: Batch, answers: Answers) -> Float[Tensor, "batch 2"]:
    """Per sequence, positions answered and those where the network gives that answer, nothing swapped."""
    answer = predicted(model, base)
    asked = position_mask(answers.scope, base) & answers.given(answer)
    logits = run(graph, base.inputs, base.mask).logits
    right = answers.compare(logits, answers.only(answer, asked))[0].cpu()
    return torch.stack([asked.double().sum(1), (right & asked).double().sum(1)], dim=1)
