"""A behaviour as data: prompts, answers, corrupted twins, and the scope under which it is explained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unweave.ablation import CORRUPTED
from unweave.data import Batch, TokenData, from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.scope import Divergence, Scope, describe, position_mask

__all__ = ["ANSWERS", "Metric", "Task", "assemble"]

Metric = Literal["kl", "logit_difference"]
ANSWERS = ("correct", "wrong")


@dataclass(frozen=True, eq=False)
class Task:
    """A behaviour that a circuit can be searched for.

    Attributes:
        name: for people and reports.
        data: the clean prompts. Labels: "correct" and "wrong", ids ``[n]`` or sets of them ``[n k]`` padded with -1
            (both or neither), and named positions, booleans ``[n pos]`` ("end": whose next token is asked for).
        scope: where and how the behaviour is measured.
        corrupted: one prompt for each clean one, of the same shape and mask, in which what tells the answer is
            changed. It carries the labels of ``data``: answers are always the clean prompt's.
        chance: the accuracy of guessing.
        description: for people.

    Raises:
        EmptyDataError: no prompt.
        ShapeError: corrupted prompts or answers do not fit the clean prompts.
        InputError: one kind of answer without the other, a chance that is none, or a clean prompt that equals its
            corrupted one.
        UnknownNameError: the scope names positions that the data does not have.

    Example:
        >>> from unweave.tasks import make_task
        >>> task = make_task("induction", vocabulary=48, n=4, length=12)
        >>> task.data.tokens.shape, sorted(task.data.labels)
        (torch.Size([4, 12]), ['answer', 'correct', 'end', 'previous', 'swapped', 'wrong'])
        >>> int((task.data.tokens != task.corrupted.tokens).sum(1).max())
        2
    """

    name: str
    data: TokenData
    scope: Scope
    corrupted: TokenData | None = None
    chance: float = 0.5
    description: str = ""

    def __post_init__(self) -> None:
        if len(self.data) == 0:
            raise EmptyDataError(f"the task {self.name!r} holds no prompt")
        if not 0 <= self.chance <= 1:
            raise InputError(f"chance is the accuracy of guessing, between 0 and 1, got {self.chance}")
        self._check_answers()
        positions = self.scope.positions
        if isinstance(positions, str) and positions not in ("all", "last", *self.positions):
            raise UnknownNameError("label of positions", positions, ["all", "last", *self.positions])
        if self.corrupted is not None:
            self._check_pairs(self.corrupted)
            object.__setattr__(self, "corrupted", dataclasses.replace(self.corrupted, labels=self.data.labels))

    @property
    def paired(self) -> TokenData:
        """The clean prompts with their corrupted partners as a label, as counterfactual ablation wants them.

        Raises:
            InputError: the task has no corrupted prompts.
        """
        if self.corrupted is None:
            raise InputError(f"the task {self.name!r} has no corrupted prompts; ablate by mean, zero or resample")
        return dataclasses.replace(self.data, labels={**self.data.labels, CORRUPTED: self.corrupted.tokens})

    def _check_answers(self) -> None:
        there = [name for name in ANSWERS if name in self.data.labels]
        if len(there) == 1:
            raise InputError(f"the task {self.name!r} has {there[0]!r} answers only; label both correct and wrong ones")
        for name in there:
            ids = self.data.labels[name]
            if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
                raise ShapeError(f"label {name!r} must be ids [n] or [n k], got {ids.dtype} {tuple(ids.shape)}")
        if not there and self.metric == "logit_difference":
            raise InputError(
                f"the task {self.name!r} has no answers, which a logit difference needs: label the data with 'correct' "
                "and 'wrong' ids, or use the divergence 'kl'"
            )

    def _check_pairs(self, corrupted: TokenData) -> None:
        if corrupted.tokens.shape != self.data.tokens.shape or not torch.equal(corrupted.mask, self.data.mask):
            raise ShapeError(
                f"corrupted prompts must have the clean ones' shape and mask, {tuple(self.data.tokens.shape)}, got "
                f"{tuple(corrupted.tokens.shape)}; each pair must have one length"
            )
        same = (corrupted.tokens == self.data.tokens).flatten(1).all(1)
        if bool(same.any()):
            raise InputError(f"prompt {int(same.nonzero()[0, 0])} equals its corrupted one; change or drop it")

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        pairs = "" if self.corrupted is None else ", each with a corrupted partner"
        size = f"{len(self)} prompts of up to {self.data.tokens.shape[1]} tokens"
        return f"Task({self.name}: {size}{pairs}; {self.metric})"

    @property
    def metric(self) -> Divergence:
        """The scope's divergence: "kl" in nats, or "logit_difference"."""
        return self.scope.divergence

    @property
    def has_answers(self) -> bool:
        """Whether prompts are labelled with correct and wrong answers."""
        return "correct" in self.data.labels

    @property
    def positions(self) -> tuple[str, ...]:
        """The named positions."""
        return tuple(
            n for n, v in self.data.labels.items() if v.dtype == torch.bool and v.shape == self.data.mask.shape
        )

    def position_groups(self) -> dict[str, list[int]]:
        """The named positions that are the same in every prompt, for :meth:`Graph.unroll`; the first name counts.

        Raises:
            InputError: no name stands for the same positions in every prompt.

        Example:
            >>> from unweave.tasks import make_task
            >>> make_task("induction", vocabulary=48, n=4, length=12).position_groups()["end"]
            [11]
        """
        groups: dict[str, list[int]] = {}
        taken = torch.zeros(self.data.mask.shape[1], dtype=torch.bool)
        for name in self.positions:
            marks = self.data.labels[name]
            if bool((marks == marks[0]).all()) and bool((marks[0] & ~taken).any()):
                groups[name] = (marks[0] & ~taken).nonzero()[:, 0].tolist()
                taken |= marks[0]
        if not groups:
            raise InputError(
                f"no named position of the task {self.name!r} is the same in every prompt; unroll every position, or "
                "select prompts of one form"
            )
        return groups

    @property
    def changed(self) -> Bool[Tensor, "n pos"]:
        """Where clean and corrupted prompts differ: nowhere, if there are none."""
        if self.corrupted is None:
            return torch.zeros_like(self.data.mask)
        return self.data.tokens != self.corrupted.tokens

    def with_scope(self, scope: Scope) -> Task:
        """The same prompts under another scope."""
        return dataclasses.replace(self, scope=scope)

    def with_metric(self, metric: Metric) -> Task:
        """The same positions under the divergence "kl" or "logit_difference".

        Raises:
            InputError: a logit difference without answers, or with an output quotient.
        """
        return self.with_scope(dataclasses.replace(self.scope, divergence=metric))

    def select(self, which: Tensor | Sequence[int] | slice | Callable[[Batch], Tensor]) -> Task:
        """Some of the prompts with their corrupted ones; see :meth:`TokenData.select`."""
        if callable(which):
            which = torch.cat([which(batch).bool() for batch in self.data.batches(256)])
        corrupted = None if self.corrupted is None else self.corrupted.select(which)
        return dataclasses.replace(self, data=self.data.select(which), corrupted=corrupted)

    def split(self, held_out: float | int = 0.5, seed: int = 0) -> tuple[Task, Task]:
        """(for searching, held out), disjoint, pairs kept together; see :meth:`TokenData.split`.

        Example:
            >>> from unweave.tasks import make_task
            >>> search, test = make_task("induction", vocabulary=48, n=10).split(held_out=4)
            >>> len(search), len(test)
            (6, 4)
        """
        rows = TokenData(torch.arange(len(self))[:, None], torch.ones(len(self), 1, dtype=torch.bool))
        rows = dataclasses.replace(rows, documents=self.data.documents, source=self.data.source)
        search, test = rows.split(held_out, seed)
        return self.select(search.tokens[:, 0]), self.select(test.tokens[:, 0])

    def fingerprint(self) -> str:
        """A hash of prompts, answers, corrupted prompts and scope, to tell whether a result belongs to them.

        A scope whose positions are a function counts by the positions it marks.
        """
        scope = describe(self.scope) | {"chance": self.chance, "name": self.name}
        digest = hashlib.sha256(json.dumps(scope, sort_keys=True).encode())
        if self.scope.quotient is not None:
            digest.update(json.dumps(self.scope.quotient.classes.tolist()).encode())
        if callable(self.scope.positions):
            for batch in self.data.batches(256):
                digest.update(json.dumps(position_mask(self.scope, batch).nonzero().tolist()).encode())
        for data in (self.data, self.corrupted):
            digest.update((data.fingerprint() if data is not None else "none").encode())
        return digest.hexdigest()[:16]


def assemble(
    prompts: Sequence[Sequence[int]],
    corrupted: Sequence[Sequence[int]] | None,
    answers: Mapping[str, Sequence[Sequence[int]]],
    places: Mapping[str, Sequence[Sequence[int]]],
    *,
    name: str,
    metric: Metric = "kl",
    chance: float = 0.5,
    description: str = "",
    vocabulary: int | None = None,
) -> Task:
    """A task from plain lists: ids of each prompt, ids of each answer, and the positions that have a name.

    The position "end", each prompt's last token, is added; the scope looks at it alone.
    """
    tokens = _padded(prompts, 0)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(ids) for ids in prompts])[:, None]
    labels: dict[str, Tensor] = {}
    for kind, sets in answers.items():
        ids = _padded(sets, -1)
        labels[kind] = ids[:, 0] if ids.shape[1] == 1 else ids
    ends = [[len(ids) - 1] for ids in prompts]
    for label, chosen in {**places, "end": ends}.items():
        index = _padded(chosen, -1)
        labels[label] = (torch.arange(tokens.shape[1])[None, :, None] == index[:, None]).any(-1)
    data = from_tensor(tokens, mask, labels, name, vocabulary)
    twins = None if corrupted is None else from_tensor(_padded(corrupted, 0), mask, labels, name, vocabulary)
    scope = Scope(positions="end", divergence=metric, description=description)
    return Task(name, data, scope, twins, chance, description)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Int[Tensor, "n width"]:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.int64)
