"""Pairs of sequences, base and source, and what a hypothesis and a network say when variables are swapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import InputError, ShapeError
from unweave.execution import run
from unweave.graph import Graph
from unweave.hypotheses.alignment import Location, match_positions
from unweave.hypotheses.causal_model import CausalModel
from unweave.scope import Scope, position_mask

__all__ = [
    "Answers",
    "Homes",
    "PairBatch",
    "Pairs",
    "Verdict",
    "draw_pairs",
    "judge",
    "predicted",
    "record",
    "swapped_logits",
]

Homes = Mapping[str, tuple[Location, ...]]
Recorded = Mapping[str, Mapping[str, Tensor]]
Patch = Callable[[Tensor], Tensor]


class PairBatch(NamedTuple):
    """A batch of pairs.

    Attributes:
        base: where variables are swapped.
        sources: variable -> the sequences that its value comes from.
        others: as ``sources``, but drawn apart from them: for answers that are wrong on purpose.
    """

    base: Batch
    sources: dict[str, Batch]
    others: dict[str, Batch]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Bases, and for every variable the sequences that its value comes from.

    Attributes:
        base, sources, others: see :class:`PairBatch`; pair i is number i of all of them.
        rows: which sequence of the data each base is.
    """

    base: TokenData
    sources: Mapping[str, TokenData]
    others: Mapping[str, TokenData]
    rows: Int[Tensor, " pairs"]

    def __len__(self) -> int:
        return len(self.base)

    def batches(self, batch_size: int) -> Iterator[PairBatch]:
        """The pairs, in order."""
        parts = [{name: d.batches(batch_size) for name, d in m.items()} for m in (self.sources, self.others)]
        for base in self.base.batches(batch_size):
            yield PairBatch(base, *({name: next(batches) for name, batches in part.items()} for part in parts))


def draw_pairs(data: TokenData, names: Collection[str], n_pairs: int | None = None, seed: int = 0) -> Pairs:
    """Random pairs of different sequences; each base is used equally often, each variable has a source of its own.

    Raises:
        InputError: fewer than two sequences, or ``n_pairs`` below 1.
    """
    n, count = len(data), len(data) if n_pairs is None else n_pairs
    if n < 2 or count < 1:
        raise InputError(f"pairs need at least 2 sequences and n_pairs at least 1, got {n} sequences and {count} pairs")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator).repeat(-(-count // n))[:count]

    def drawn() -> dict[str, TokenData]:
        shifts = {name: torch.randint(1, n, (count,), generator=generator) for name in names}
        return {name: data.select((rows + shift) % n) for name, shift in shifts.items()}

    return Pairs(data.select(rows), drawn(), drawn(), rows)


@dataclass(frozen=True, eq=False)
class Answers:
    """How answers of a hypothesis and outputs of a network are compared.

    Attributes:
        tolerance: how far a real output may be from the answer to be the same.
    """

    scope: Scope
    tolerance: float

    def given(self, answer: Tensor) -> Bool[Tensor, "batch pos"]:
        """Where a hypothesis says anything."""
        return ~answer.isnan() if answer.is_floating_point() else answer >= 0

    def only(self, answer: Tensor, asked: Bool[Tensor, "batch pos"]) -> Tensor:
        """Answers where they are asked for, and none elsewhere."""
        return torch.where(asked, answer, math.nan if answer.is_floating_point() else -1)

    def differ(self, a: Float[Tensor, "batch pos"] | Int[Tensor, "batch pos"], b: Tensor) -> Bool[Tensor, "batch pos"]:
        """Where two answers are not the same."""
        return (a - b).abs() > self.tolerance if a.is_floating_point() else a != b

    def compare(
        self, logits: Float[Tensor, "batch pos d_out"], answer: Float[Tensor, "batch pos"] | Int[Tensor, "batch pos"]
    ) -> tuple[Bool[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
        """(whether the network gives the answer, the nats by which it does not).

        Nats are -log p(answer), or half the squared difference of a real output; anything where no answer is given.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        answer = answer.to(logits.device)
        if answer.is_floating_point():
            if logits.shape[-1] != 1:
                raise InputError(
                    f"the hypothesis answers with reals and the network has {logits.shape[-1]} outputs; make the "
                    "output variable whole numbers, the ids of outputs"
                )
            distance = wide[..., 0] - answer.nan_to_num()
            return distance.abs() <= self.tolerance, distance.square() / 2
        quotient = self.scope.quotient
        log_probs = wide.log_softmax(-1) if quotient is None else quotient.log_probs(logits)
        if int(answer.max()) >= log_probs.shape[-1]:
            raise InputError(f"the hypothesis answers {int(answer.max())}, outside the {log_probs.shape[-1]} outputs")
        nats = -log_probs.gather(-1, answer.clamp(min=0)[..., None])[..., 0]
        return log_probs.argmax(-1) == answer, nats


class Verdict(NamedTuple):
    """What a hypothesis says of a batch of pairs.

    Attributes:
        answer: with the variables swapped: whole numbers or reals ``[batch pos]``.
        effective: in the scope, and the swap changes the answer.
        unchanged: in the scope, and it does not.
    """

    answer: Tensor
    effective: Bool[Tensor, "batch pos"]
    unchanged: Bool[Tensor, "batch pos"]


def predicted(model: CausalModel, batch: Batch, patch: Mapping[str, Patch] | None = None) -> Tensor:
    """A hypothesis' answer at every position; one per sequence stands at each of its positions."""
    if batch.inputs.is_floating_point():
        raise ShapeError("hypotheses are about networks that read tokens; this data holds reals")
    answer = model.intervene(batch.inputs, patch or {}, batch.mask)[model.output]
    return answer if answer.ndim == 2 else answer[:, None].expand(batch.mask.shape)


def judge(model: CausalModel, homes: Homes, base: Batch, sources: Mapping[str, Batch], answers: Answers) -> Verdict:
    """What the hypothesis says when each variable named in ``sources`` has its value there."""
    patch = {}
    for name, source in sources.items():
        swap = match_positions(homes[name][0].positions, base, source)
        patch[name] = _setter(swap.apply, model.run(source.inputs, source.mask)[name])
    before, after = predicted(model, base), predicted(model, base, patch)
    asked = position_mask(answers.scope, base) & answers.given(before) & answers.given(after)
    changed = answers.differ(before, after)
    return Verdict(answers.only(after, asked), asked & changed, asked & ~changed)


def _setter(apply: Callable[[Tensor, Tensor], Tensor], source: Tensor) -> Patch:
    return lambda value: apply(value, source)


def record(graph: Graph, batch: Batch, locations: Iterable[Location]) -> Mapping[str, Tensor]:
    """The values at some locations' places."""
    return run(graph, batch.inputs, batch.mask, record={location.place for location in locations}).values


def swapped_logits(
    graph: Graph, homes: Homes, base: Batch, sources: Mapping[str, Batch], recorded: Recorded
) -> Float[Tensor, "batch pos d_out"]:
    """The network's output when each variable's locations hold what they hold on its source.

    Args:
        recorded: by variable and place, from :func:`record` on its source.
    """
    patch: dict[str, Patch] = {}
    for name, source in sources.items():
        swap = match_positions(homes[name][0].positions, base, source)
        for location in homes[name]:
            change = location.patch(swap, recorded[name][location.place])
            patch[location.place] = _after(patch[location.place], change) if location.place in patch else change
    return run(graph, base.inputs, base.mask, patch=patch).logits


def _after(first: Patch, then: Patch) -> Patch:
    return lambda value: then(first(value))
