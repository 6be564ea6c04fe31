"""The same text cut into tokens in two ways: units that both have in common.

Two tokenizers agree on some places between characters. A *unit* is what lies between two neighbouring ones: one or
more tokens of either. A network's state is compared where it has read the whole unit, at its last token; what a query
spends on a unit is the sum over its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch, TokenData, from_tensor
from unweave.data.reading import pieces
from unweave.errors import EmptyDataError, InputError

__all__ = ["UNITS", "Units", "align_tokens", "check_pairs", "load_aligned", "paired_batch"]

# the label that says which unit each token belongs to
UNITS = "unit"
Offsets = Sequence[Sequence[tuple[int, int]]]


def align_tokens(
    data_a: TokenData, offsets_a: Offsets, data_b: TokenData, offsets_b: Offsets
) -> tuple[TokenData, TokenData]:
    """Two tokenizations of the same texts, each token labelled with its unit.

    Args:
        offsets_a, offsets_b: by text, the (start, end) characters of every real token, as fast tokenizers give them.
            A token without characters counts as what comes after it.

    Returns:
        The data with the label "unit" ``[n pos]``; -1 for padding and what lies behind the last common end.

    Raises:
        InputError: they do not hold the same number of texts, or offsets do not fit the tokens.
        EmptyDataError: no text has an end in common.

    Example:
        >>> import torch
        >>> from unweave.data import from_tensor
        >>> whole, letters = from_tensor(torch.tensor([[7, 8]])), from_tensor(torch.tensor([[1, 2, 3]]))
        >>> a, b = align_tokens(whole, [[(0, 2), (2, 3)]], letters, [[(0, 1), (1, 2), (2, 3)]])
        >>> a.labels["unit"].tolist(), b.labels["unit"].tolist()
        ([[0, 1]], [[0, 0, 1]])
    """
    if not len(data_a) == len(data_b) == len(offsets_a) == len(offsets_b):
        sizes = [len(x) for x in (data_a, data_b, offsets_a, offsets_b)]
        raise InputError(f"the two tokenizations must be of the same texts, got {sizes} of them")
    units_a, units_b = [], []
    for row, (a, b) in enumerate(zip(offsets_a, offsets_b, strict=True)):
        if len(a) != int(data_a.mask[row].sum()) or len(b) != int(data_b.mask[row].sum()):
            raise InputError(f"text {row}: there must be one (start, end) for each of its tokens")
        ends_a, ends_b = torch.tensor([e for _, e in a]), torch.tensor([e for _, e in b])
        common = ends_a[torch.isin(ends_a, ends_b) & (ends_a > 0)].unique()
        units_a.append(_units_of(ends_a, common, data_a.mask.shape[1]))
        units_b.append(_units_of(ends_b, common, data_b.mask.shape[1]))
    if all(int(u.max()) < 0 for u in units_a):
        raise EmptyDataError("no token of one tokenization ends where one of the other does; are these the same texts?")
    return _labelled(data_a, torch.stack(units_a)), _labelled(data_b, torch.stack(units_b))


def load_aligned(
    source: str | Path,
    tokenizer_a: Any,
    tokenizer_b: Any,
    *,
    context: int,
    limit: int,
    context_b: int | None = None,
    text_field: str = "text",
    split: str = "train",
) -> tuple[TokenData, TokenData]:
    """The same texts as tokens of two tokenizers, aligned: A's windows, and the text of each as B's tokens.

    Args:
        source: text, as :func:`unweave.load_data` reads it.
        tokenizer_a, tokenizer_b: fast ones, which know what characters a token stands for.
        context: the longest sequence of A; ``context_b`` that of B, the same by default.
        limit: stop after so many sequences.

    Returns:
        The data with the label "unit", see :func:`align_tokens`.

    Raises:
        InputError: a tokenizer that is not fast, or token ids in place of text.
        EmptyDataError: nothing to read, or no ends in common.
        StorageError: no such file.
    """
    for name, tokenizer in (("tokenizer_a", tokenizer_a), ("tokenizer_b", tokenizer_b)):
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{name} does not say which characters its tokens stand for; give a fast tokenizer")

    def spelled(tokenizer: Any, text: str) -> Spelling:
        out = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        return list(zip(out["input_ids"], out["offset_mapping"], strict=True))

    def windows() -> Iterator[tuple[Spelling, Spelling]]:
        for _, text in pieces(str(source), text_field, {}, split):
            if not isinstance(text, str):
                raise InputError(f"{source} holds token ids; two tokenizers need text to be aligned by")
            whole = spelled(tokenizer_a, text)
            for start in range(0, len(whole), context):
                a = whole[start : start + context]
                low = next((first for _, (first, last) in a if last > first), 0)
                b = spelled(tokenizer_b, text[low : a[-1][1][1]])[: context_b or context]
                if len(a) > 1 and len(b) > 1:
                    yield a, [(i, (first + low, last + low) if last else (0, 0)) for i, (first, last) in b]

    found = list(islice(windows(), limit))
    if not found:
        raise EmptyDataError(f"{source}: no text of two tokens or more")
    sides = [[pair[side] for pair in found] for side in (0, 1)]
    data = [_packed(rows, str(source)) for rows in sides]
    offsets = [[[span for _, span in row] for row in rows] for rows in sides]
    return align_tokens(data[0], offsets[0], data[1], offsets[1])


Spelling = list[tuple[int, tuple[int, int]]]
"""(id, (start, end) in the text) of each token."""


def _packed(rows: list[Spelling], source: str) -> TokenData:
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([[i for i, _ in row] + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return from_tensor(tokens, mask, source=source)


def _units_of(ends: Int[Tensor, " tokens"], common: Int[Tensor, " units"], width: int) -> Int[Tensor, " width"]:
    unit = torch.searchsorted(common, ends)
    return F.pad(torch.where(unit < len(common), unit, -1), (0, width - len(ends)), value=-1)


def _labelled(data: TokenData, units: Int[Tensor, "n pos"]) -> TokenData:
    return dataclasses.replace(data, labels={**data.labels, UNITS: units})


@dataclass(frozen=True, eq=False)
class Units:
    """What is compared of one batch: its tokens, or its units of several tokens.

    Attributes:
        mask: which units are real.
        last: the last token of each; None where tokens are compared one by one.
        member: which token belongs to which.
    """

    mask: Bool[Tensor, "batch unit"]
    last: Int[Tensor, "batch unit"] | None = None
    member: Float[Tensor, "batch pos unit"] | None = None

    @classmethod
    def of(cls, batch: Batch, by_unit: bool, device: torch.device) -> Units:
        """The units of a batch, by its label or one per token."""
        if not by_unit:
            return cls(batch.mask.to(device))
        unit = batch.labels[UNITS][:, : batch.mask.shape[1]].to(device)
        member = F.one_hot(unit.clamp(min=0), int(unit.max()) + 1 if int(unit.max()) >= 0 else 1)
        member = member * (unit >= 0)[..., None]
        position = torch.arange(unit.shape[1], device=device)[:, None]
        return cls(member.any(1), (member * position).amax(1), member.float())

    def at(self, values: Float[Tensor, "batch node pos width"]) -> Float[Tensor, "batch node unit width"]:
        """Values where a whole unit was read."""
        if self.last is None:
            return values
        index = self.last[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        return values.gather(2, index)

    def where(self, marks: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch unit"]:
        """The real units at whose last token there is a mark."""
        marked = self.at(marks.to(self.mask.device).float()[:, None, :, None])[:, 0, :, 0].bool()
        return self.mask & marked

    def between(self, pattern: Float[Tensor, "batch node query key"]) -> Float[Tensor, "batch node unit unit2"]:
        """What the last token of each unit spends on every unit."""
        if self.member is None:
            return pattern
        return self.at(pattern) @ self.member[:, None].to(pattern)


def check_pairs(data: TokenData, data_b: TokenData | None) -> None:
    """Refuse two data sets that say not unit by unit what belongs together.

    Raises:
        InputError: they do not.
    """
    if data_b is None:
        return
    for name, given in (("data", data), ("data_b", data_b)):
        if UNITS not in given.labels:
            raise InputError(
                f"{name} lacks the label {UNITS!r}: make it with align_tokens(...), from offsets in the text"
            )
    last_a, last_b = (d.labels[UNITS].amax(1) for d in (data, data_b))
    if last_a.shape != last_b.shape or not bool((last_a == last_b).all()):
        raise InputError("data and data_b have not the same units in every text; align them with each other")


def paired_batch(batch: Batch, data_b: TokenData | None) -> Batch:
    """The same texts for the other network."""
    if data_b is None:
        return batch
    return next(data_b.select(batch.index).batches(len(batch.index)))
