"""What a probe is asked for: a label at every position, and the control task that has the same labels at random."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError

__all__ = ["CONTROLS", "Concept", "control_task", "label_concept", "token_concept"]

CONTROLS = ("token", "token at position")
# ids are only looked at, no graph is run
ROWS = 256
# of labels of which all tokens got the same
REDRAWS = 100


@dataclass(frozen=True)
class Concept:
    """Something that may be readable at a position.

    Attributes:
        name: for tables.
        label: a batch -> ``[batch pos]``: whole numbers from 0 (the class), or reals (a number). -1 or NaN where the
            concept says nothing.
        classes: how many classes; 0 for a number.
        offset: which token it is about, for its control task: the one just read (0), the one before (-1), the next (1).

    Raises:
        InputError: one class, or a negative number of them.

    Example:
        >>> import unweave
        >>> data = unweave.load_data("zoo:induction", limit=2)
        >>> parity = Concept("parity of the token", lambda batch: batch.inputs % 2, classes=2)
        >>> parity.values(next(data.batches(2)))[0].shape
        torch.Size([2, 48])
    """

    name: str
    label: Callable[[Batch], Tensor]
    classes: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        if self.classes < 0 or self.classes == 1:
            raise InputError(f"the concept {self.name!r} needs at least 2 classes, or 0 for a number: {self.classes}")

    def values(self, batch: Batch) -> tuple[Tensor, Bool[Tensor, "batch pos"]]:
        """(labels, where there is one); where there is none, the label is 0.

        Raises:
            ShapeError: not ``[batch pos]``.
            InputError: reals for classes or the reverse, or a class out of range.
        """
        value = self.label(batch)
        if not isinstance(value, Tensor) or value.shape != batch.mask.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"labels of {self.name!r} must have shape {tuple(batch.mask.shape)}, got {got}")
        if value.is_floating_point() == bool(self.classes):
            wanted = "whole numbers (its classes)" if self.classes else "reals"
            raise InputError(f"labels of {self.name!r} must be {wanted}, got {value.dtype}")
        said = (~value.isnan() if not self.classes else value >= 0) & batch.mask.to(value.device)
        value = torch.where(said, value, torch.zeros_like(value))
        if self.classes and int(value.max()) >= self.classes:
            raise InputError(f"{self.name!r} has {self.classes} classes, got the label {int(value.max())}")
        if not self.classes and not bool(value.isfinite().all()):
            raise InputError(f"{self.name!r} has an infinite label")
        return value, said

    def columns(self, batch: Batch) -> tuple[Float[Tensor, "batch pos k"], Bool[Tensor, "batch pos"]]:
        """(labels as columns: one per class, or the number itself; where there is one), float64."""
        value, said = self.values(batch)
        wide = value.double()[..., None]
        if self.classes:
            wide = torch.nn.functional.one_hot(value.long(), self.classes).double()
        return wide * said[..., None], said


def control_task(concept: Concept, data: TokenData, by: str = "token", seed: int = 0) -> Concept:
    """The same labels dealt out at random, one for each type of token for ever: what a probe learns by heart.

    A probe that is as good at it as at the concept says nothing of the network. Classes are dealt again where all types
    of the data got the same.

    Args:
        data: whose labels are drawn from (classes as often as there; numbers from a normal distribution).
        by: a type is a "token", or a "token at position": for vocabularies so small that whatever tells the tokens
            apart does a control task by token.
        seed: of the labels.

    Raises:
        InputError: no such type, inputs that are no tokens, or so few types that all get the same class.
        EmptyDataError: the concept says nothing on these data.

    Source:
        Hewitt and Liang 2019, "Designing and Interpreting Probes with Control Tasks".
    """
    if by not in CONTROLS:
        raise InputError(f"control must be one of {', '.join(map(repr, CONTROLS))}, got {by!r}")
    if data.tokens.is_floating_point():
        raise InputError("a control task deals labels out to tokens; these inputs are reals: pass control=None")
    n_pos, vocabulary = data.tokens.shape[1], data.vocabulary_size or 0
    vocabulary = max(vocabulary, int(data.tokens.max()) + 1)

    def types_of(batch: Batch) -> Int[Tensor, "batch pos"]:
        types = batch.inputs % vocabulary
        if by == "token at position":
            types = types + vocabulary * (torch.arange(types.shape[1], device=types.device) % n_pos)
        return types.roll(-concept.offset, 1)  # what comes around the end is not said

    def label(batch: Batch) -> Tensor:
        said, types = _said(concept, batch), types_of(batch)
        dealt = table.to(types.device)[types]
        return torch.where(said.to(types.device), dealt, -1 if concept.classes else torch.nan)

    n_types = vocabulary * (n_pos if by == "token at position" else 1)
    table = _deal(concept, data, types_of, n_types, torch.Generator().manual_seed(seed))
    return Concept(f"control of {concept.name}", label, concept.classes)


def _said(concept: Concept, batch: Batch) -> Bool[Tensor, "batch pos"]:
    return concept.values(batch)[1] & within(batch, concept.offset)


def _deal(
    concept: Concept, data: TokenData, types_of: Callable[[Batch], Tensor], n_types: int, generator: torch.Generator
) -> Tensor:
    """A label for each type: classes as often as in the data, of which at least two come, or normal numbers."""
    if not concept.classes:
        return torch.randn(n_types, generator=generator, dtype=torch.float64)
    seen = torch.zeros(n_types, dtype=torch.bool)
    for batch in data.batches(ROWS):
        seen[types_of(batch)[_said(concept, batch)].cpu()] = True
    frequencies = _frequencies(concept, data)
    for _ in range(REDRAWS):
        table = torch.multinomial(frequencies, n_types, replacement=True, generator=generator)
        if len(table[seen].unique()) > 1:
            return table
    raise InputError(
        f"{concept.name!r} is so rare, or tokens so few, that all get the same random label; "
        "take the control 'token at position', or none"
    )


def token_concept(name: str, ids: Collection[int], vocabulary: int, offset: int = 0) -> Concept:
    """Whether a token is one of some: the one just read, or the one ``offset`` places on (-1: the one before it).

    Args:
        ids: the tokens, below ``vocabulary``.

    Raises:
        InputError: no token, or one outside the vocabulary.

    Example:
        >>> import unweave
        >>> data = unweave.load_data("zoo:induction", limit=2)
        >>> values, said = token_concept("low", range(8), 64, offset=-1).values(next(data.batches(2)))
        >>> said[:, :2].tolist()
        [[False, True], [False, True]]
    """
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise InputError(f"{name!r} needs tokens, each below the vocabulary's {vocabulary}, got {len(ids)} of them")
    members = torch.zeros(vocabulary, dtype=torch.long)
    members[list(ids)] = 1

    def label(batch: Batch) -> Tensor:
        value = members.to(batch.inputs.device)[batch.inputs].roll(-offset, 1)
        return torch.where(within(batch, offset), value, -1)

    return Concept(name, label, 2, offset)


def label_concept(name: str, data: TokenData) -> Concept:
    """A label of the data: classes where it holds whole numbers or yes and no, else a number.

    Args:
        data: its label is per sequence ``[n]`` (said of every token) or per token ``[n pos]``.

    Raises:
        UnknownNameError: no such label.
        ShapeError: of another shape.

    Example:
        >>> import unweave
        >>> label_concept("task", unweave.load_data("zoo:three_tasks", limit=8)).classes
        3
    """
    if name not in data.labels:
        raise UnknownNameError("label of the data", name, data.labels)
    known = data.labels[name]
    if known.ndim > 1 and known.shape != data.mask.shape:
        raise ShapeError(f"the label {name!r} must be per sequence or per token, got {tuple(known.shape)}")
    classes = 0 if known.is_floating_point() else 2 if known.dtype == torch.bool else int(known.max()) + 1

    def label(batch: Batch) -> Tensor:
        value = batch.labels[name] if classes == 0 else batch.labels[name].long()
        # a batch is as wide as its longest sequence, a label as wide as the data set's
        return value[:, : batch.mask.shape[1]] if value.ndim > 1 else value[:, None].expand(batch.mask.shape)

    return Concept(name, label, classes)


def within(batch: Batch, offset: int) -> Bool[Tensor, "batch pos"]:
    """Where there is a real token ``offset`` places on."""
    position = torch.arange(batch.mask.shape[1], device=batch.mask.device) + offset
    return batch.mask & (position >= 0) & (position < batch.mask.sum(1, keepdim=True))


def _frequencies(concept: Concept, data: TokenData) -> Float[Tensor, " classes"]:
    counts = torch.zeros(concept.classes, dtype=torch.float64)
    for batch in data.batches(ROWS):
        value, said = concept.values(batch)
        counts += torch.bincount(value[said].cpu().long(), minlength=concept.classes)
    if not bool(counts.any()):
        raise EmptyDataError(f"{concept.name!r} says nothing at any position of the data")
    return counts
