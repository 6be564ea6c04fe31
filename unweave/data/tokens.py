"""Token sequences and batches of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unweave.errors import EmptyDataError, InputError, ShapeError

__all__ = ["Batch", "TokenData", "check_ids", "float_data", "from_tensor", "refuse_below", "repeat_rows"]

# rows checked or hashed at once, so that a memory-mapped data set is never read as a whole
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """A few sequences, padded on the right.

    Attributes:
        inputs: token ids ``[batch pos]`` (int64), or reals ``[batch pos features]``.
        mask: True where a token is real.
        labels: anything known per sequence, batch first.
        index: each sequence's number in the data set.
    """

    inputs: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos features"]
    mask: Bool[Tensor, "batch pos"]
    labels: Mapping[str, Tensor]
    index: Int[Tensor, " batch"]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        labels = {name: value.to(device) for name, value in self.labels.items()}
        return Batch(self.inputs.to(device), self.mask.to(device), labels, self.index.to(device))

    def repeat(self, copies: int) -> Batch:
        """The batch several times, one after the other."""
        labels = {name: repeat_rows(value, copies) for name, value in self.labels.items()}
        inputs, mask, index = (repeat_rows(x, copies) for x in (self.inputs, self.mask, self.index))
        return Batch(inputs, mask, labels, index)


def repeat_rows(x: Shaped[Tensor, "n *rest"], copies: int) -> Shaped[Tensor, "repeated *rest"]:
    """All rows, several times, one after the other."""
    return x.repeat(copies, *([1] * (x.ndim - 1)))


@dataclass(frozen=True, eq=False)
class TokenData:
    """Sequences of one data set: ids of at most 64 bits, in memory (32 bits) or mapped from a .npy file.

    Attributes:
        tokens: ids ``[n pos]`` padded on the right with 0 (or reals ``[n pos features]``).
        mask: True where a token is real; each row is True, then False.
        labels: anything known per sequence.
        documents: which document each sequence was cut from.
        source: where it came from, for people.
        dropped: how many documents were too short to use.
        vocabulary_size: what the ids were checked against, if anything.

    Raises:
        ShapeError: mask, labels and documents do not fit the tokens.
        InputError: the padding is not on the right.
    """

    tokens: Int[Tensor, "n pos"] | Float[Tensor, "n pos features"]
    mask: Bool[Tensor, "n pos"]
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Int[Tensor, " n"] | None = None
    source: str = ""
    dropped: int = 0
    vocabulary_size: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape[:2] != self.mask.shape:
            raise ShapeError(f"mask must have shape {tuple(self.tokens.shape[:2])}, got {tuple(self.mask.shape)}")
        for name, value in self.labels.items():
            if value.shape[:1] != self.tokens.shape[:1]:
                raise ShapeError(f"label {name!r} has shape {tuple(value.shape)} for {len(self.tokens)} sequences")
        if self.documents is not None and self.documents.shape != self.tokens.shape[:1]:
            raise ShapeError(f"documents must name one for each of {len(self.tokens)} sequences")
        for start, rows in _row_blocks(self.mask):
            gap = (rows[:, 1:] & ~rows[:, :-1]).any(1)
            if bool(gap.any()):
                row = start + int(gap.nonzero()[0, 0])
                raise InputError(f"sequence {row} has a real token after padding; move its padding to the right")

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        what = "tokens" if self.tokens.ndim == 2 else f"vectors of {self.tokens.shape[2]} numbers"
        labels = f", labels {', '.join(self.labels)}" if self.labels else ""
        source = f" from {self.source}" if self.source else ""
        return f"TokenData({len(self)} sequences of up to {self.tokens.shape[1]} {what}{source}{labels})"

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """How many real tokens each sequence has."""
        return self.mask.sum(1)

    @property
    def n_tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.mask.sum())

    def batches(self, batch_size: int = 16, *, start: int = 0, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Batches in order, or shuffled; ``start`` skips that many batches (to resume).

        A batch is as wide as its longest sequence.

        Raises:
            InputError: ``batch_size`` below 1 or ``start`` below 0.
        """
        refuse_below("batch_size", batch_size, 1)
        refuse_below("start", start, 0)
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            order = order[torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))]
        for rows in order.split(batch_size)[start:] if len(self) else ():
            longest = max(int(self.mask[rows].sum(1).max()), 1)
            inputs = self.tokens[rows, :longest]
            inputs = inputs if inputs.is_floating_point() else inputs.long()
            labels = {name: value[rows] for name, value in self.labels.items()}
            yield Batch(inputs, self.mask[rows, :longest], labels, rows)

    def select(self, which: Tensor | Sequence[int] | slice | Callable[[Batch], Tensor]) -> TokenData:
        """Some of the sequences: by number, boolean mask, slice, or a function of a batch that marks sequences.

        Raises:
            InputError: a number is outside the data set, or a mask has the wrong length.

        Example:
            >>> data = from_tensor(torch.tensor([[1, 2], [3, 4]]))
            >>> data.select(lambda batch: batch.inputs[:, 0] > 2).tokens.tolist()
            [[3, 4]]
        """
        if callable(which):
            marks = [which(batch).bool() for batch in self.batches(ROWS_AT_ONCE)]
            which = torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)
        if isinstance(which, slice):
            rows = torch.arange(len(self))[which]
        else:
            which = which if isinstance(which, Tensor) else torch.tensor(list(which), dtype=_index_dtype(which))
            rows = _row_numbers(which, len(self))
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            labels={name: value[rows] for name, value in self.labels.items()},
            documents=None if self.documents is None else self.documents[rows],
        )

    def split(self, held_out: float | int = 0.1, seed: int = 0) -> tuple[TokenData, TokenData]:
        """(calibration, held out), disjoint; no document is on both sides. The same for the same seed.

        Args:
            held_out: a share of the documents (a float between 0 and 1), or a number of sequences (an int):
                whole documents are drawn until there are that many.
            seed: which documents are drawn.

        Raises:
            InputError: the share is not between 0 and 1, or the number is below 1.
            EmptyDataError: too few documents for two parts.
        """
        if isinstance(held_out, int):
            refuse_below("held_out", held_out, 1)
        elif not 0 < held_out < 1:
            raise InputError(f"held_out must be between 0 and 1, got {held_out}")
        documents = self.documents if self.documents is not None else torch.arange(len(self))
        names, sizes = documents.unique(return_counts=True)
        if len(names) < 2:
            raise EmptyDataError(
                f"{self.source or 'the data'} holds {len(names)} document(s) and a held-out split needs 2; give more "
                "documents (two blank lines between them in .txt, one per line in .jsonl, one per row in .npy)"
            )
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        if isinstance(held_out, int):
            cut = int((sizes[order].cumsum(0) < held_out).sum()) + 1
            if cut >= len(names):
                raise EmptyDataError(f"{held_out} sequences held out of {len(self)} would leave none; hold out fewer")
        else:
            cut = min(max(1, round(held_out * len(names))), len(names) - 1)
        held = torch.isin(documents, names[order[:cut]])
        return self.select(~held), self.select(held)

    def fingerprint(self) -> str:
        """A hash of tokens, mask and labels, to tell whether a checkpoint belongs to them."""
        digest = hashlib.sha256()
        for name, value in {"": self.tokens, " mask": self.mask, **dict(sorted(self.labels.items()))}.items():
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            for _, rows in _row_blocks(value):
                # bytes, since numpy has no bfloat16
                flat = rows.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _row_blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), ROWS_AT_ONCE):
        yield start, x[start : start + ROWS_AT_ONCE]


def refuse_below(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def _index_dtype(which: Sequence[int]) -> torch.dtype:
    return torch.bool if len(which) and all(isinstance(i, (bool, np.bool_)) for i in which) else torch.int64


def _row_numbers(which: Tensor, n: int) -> Int[Tensor, " rows"]:
    """Row numbers from numbers (negative ones from the end) or a boolean mask."""
    which = which.cpu()
    if which.dtype == torch.bool:
        if which.shape != (n,):
            raise InputError(f"a boolean mask over {n} sequences must have shape ({n},), got {tuple(which.shape)}")
        return which.nonzero()[:, 0]
    if which.ndim != 1 or which.is_floating_point():
        raise InputError(f"sequences are chosen by integers [n], got {which.dtype} {tuple(which.shape)}")
    outside = which[(which < -n) | (which >= n)]
    if len(outside):
        raise InputError(f"there is no sequence {int(outside[0])}: the data set holds {n}")
    return which.long() % max(n, 1)


def from_tensor(
    tokens: Tensor,
    mask: Tensor | None = None,
    labels: Mapping[str, Tensor] | None = None,
    source: str = "tensor",
    vocabulary: int | None = None,
) -> TokenData:
    """Token ids ``[n pos]`` as a data set.

    Args:
        mask: nonzero where a token is real, padding on the right; all of them when missing.
        labels: anything known per sequence, sequences first.
        vocabulary: ids must be below it.

    Raises:
        ShapeError: not integers ``[n pos]``, or mask or labels do not fit.
        InputError: an id is negative or outside the vocabulary, or padding is not on the right.

    Example:
        >>> from_tensor(torch.tensor([[1, 2, 3]])).n_tokens
        3
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ShapeError(f"token ids must be integers [n, pos], got {tokens.dtype} {tuple(tokens.shape)}")
    tokens = tokens.detach().cpu()
    mask = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    if mask.shape != tokens.shape:
        raise ShapeError(f"mask must have shape {tuple(tokens.shape)}, got {tuple(mask.shape)}")
    # what stands in the padding means nothing (-100 is common) and must not reach an embedding
    tokens = tokens.masked_fill(~mask, 0)
    check_ids(tokens.numpy(), vocabulary, source)
    return TokenData(tokens.to(torch.int32), mask, dict(labels or {}), source=source, vocabulary_size=vocabulary)


def float_data(x: Float[Tensor, "n features"], labels: Mapping[str, Tensor] | None = None) -> TokenData:
    """Real vectors as a data set of sequences of one position, for plain MLPs.

    Raises:
        ShapeError: not reals ``[n features]``.
        InputError: NaN or inf.

    Example:
        >>> next(float_data(torch.zeros(3, 5)).batches(2)).inputs.shape
        torch.Size([2, 1, 5])
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ShapeError(f"inputs must be reals [n, features], got {x.dtype} {tuple(x.shape)}")
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        raise InputError(f"input {int((~finite).nonzero()[0, 0])} holds NaN or inf; drop it or mend it")
    return TokenData(x[:, None], torch.ones(len(x), 1, dtype=torch.bool), dict(labels or {}), source="reals")


def check_ids(rows: np.ndarray, vocabulary: int | None, source: str, first_row: int = 0) -> None:
    top = 2**31 if vocabulary is None else vocabulary
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        bad = np.argwhere((block < 0) | (block >= top))
        if len(bad):
            row, pos = bad[0]
            raise InputError(
                f"{source}: sequence {first_row + start + row} holds token id {block[row, pos]} at position {pos}, "
                f"outside the vocabulary of {top}; was it made with another tokenizer?"
            )
