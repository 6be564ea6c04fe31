"""Which other input stands in for an input, where the two agree in a key."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch
from unweave.errors import InputError, ShapeError

__all__ = ["Key", "Partners", "draw_partners", "gather", "group_by_key"]

# what a value may depend on: [batch] or [batch pos], or several of these that have to agree together
Key: TypeAlias = Callable[[Batch], Tensor | tuple[Tensor, ...]]


def group_by_key(name: str, key: Key, batch: Batch) -> Int[np.ndarray, " batch"] | Int[np.ndarray, "batch pos"]:
    """A number per sequence, or per sequence and position, that is the same exactly where the key is the same.

    Args:
        name: of what the key is for, for the error.

    Raises:
        ShapeError: the key is not ``[batch]`` or ``[batch pos]``, or a tuple of such tensors.
    """
    given = key(batch)
    parts = given if isinstance(given, tuple) else (given,)
    shape = tuple(batch.mask.shape)
    for part in parts:
        if not isinstance(part, Tensor) or tuple(part.shape) not in (shape, shape[:1]):
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ShapeError(
                f"the key of {name} must be a tensor {shape[:1]} or {shape}, or a tuple of those, got {got}"
            )
    wide = any(part.ndim == 2 for part in parts)
    group = np.zeros(shape if wide else shape[:1], dtype=np.int64)
    for part in parts:
        values = part[:, None].expand(shape) if wide and part.ndim == 1 else part
        plain = values.double() if values.is_floating_point() else values  # numpy has no bfloat16
        _, number = np.unique(plain.cpu().numpy(), return_inverse=True)
        # numbered again at every part, so that they stay small
        joined = group * (int(number.max(initial=0)) + 1) + number.reshape(group.shape)
        group = np.unique(joined, return_inverse=True)[1].reshape(group.shape)
    return group


def draw_partners(
    group: Int[np.ndarray, " items"], length: Int[np.ndarray, " items"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " items"], Bool[np.ndarray, " items"]]:
    """For every item, another of its group that is at least as long, all of them equally likely.

    Returns:
        (the partners, where there was no other: such an item is its own partner).

    Example:
        >>> group, length = np.array([0, 1, 0, 1, 2]), np.ones(5, dtype=np.int64)
        >>> partner, alone = draw_partners(group, length, np.random.default_rng(0))
        >>> partner.tolist(), alone.tolist()
        ([2, 3, 0, 1, 4], [False, False, False, False, True])
    """
    order = np.lexsort((-length, group))
    g, n = group[order], length[order]
    place = np.arange(len(order))
    start = np.searchsorted(g, g)
    # longest first, so that those at least as long stand from the group's start to the end of the equally long
    ends = np.flatnonzero(np.append((np.diff(g) != 0) | (np.diff(n) != 0), True))
    count = ends[np.searchsorted(ends, place)] + 1 - start
    step = rng.integers(1, np.maximum(count, 2))
    partner, alone = np.empty_like(order), np.empty(len(order), dtype=bool)
    partner[order] = order[start + (place - start + step) % count]
    alone[order] = count == 1
    return partner, alone


class Partners:
    """The partners of a batch's sequences, drawn once for every name that asks, the same for the same seed."""

    def __init__(self, batch: Batch, seed: tuple[int, ...]) -> None:
        self.batch, self.seed = batch, seed
        self.alone: dict[str, tuple[int, int]] = {}
        self._mask = batch.mask.cpu().numpy()
        self._known: dict[str, Int[Tensor, "batch pos"]] = {}
        self._groups: dict[str, np.ndarray] = {}

    def anywhere(self, name: str) -> Int[Tensor, "batch pos"]:
        """Another sequence for each, whatever it is."""
        return self.of(name, "what does not matter", lambda batch: torch.zeros(len(batch.mask)))

    def of(self, name: str, subject: str, key: Key | None) -> Int[Tensor, "batch pos"]:
        """The sequence that stands in at every position; at padding, and where there is no key, each its own.

        Args:
            name: what the draw is for: another name, another draw.
            subject: whose key it is.
        """
        if key is None:
            return torch.arange(len(self._mask))[:, None].expand(self._mask.shape)
        if name not in self._known:
            if subject not in self._groups:
                self._groups[subject] = group_by_key(subject, key, self.batch)
            rng = np.random.default_rng([*self.seed, zlib.crc32(name.encode())])
            rows, alone = self._draw(self._groups[subject], rng)
            self._count(subject, alone)
            self._known[name] = torch.from_numpy(rows)
        return self._known[name]

    def _draw(self, group: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        mask = self._mask
        if group.ndim == 1:
            partner, alone = draw_partners(group, mask.sum(1), rng)
            return np.repeat(partner[:, None], mask.shape[1], axis=1), alone
        rows = np.repeat(np.arange(len(mask))[:, None], mask.shape[1], axis=1)
        sequence, position = np.nonzero(mask)
        here = group[mask] * mask.shape[1] + position  # a position only ever swaps with the same one elsewhere
        partner, alone = draw_partners(here, np.zeros_like(here), rng)
        rows[mask] = sequence[partner]
        return rows, alone

    def _count(self, subject: str, alone: np.ndarray) -> None:
        if bool(alone.all()):
            raise InputError(
                f"no two of the {len(self._mask)} sequences of a batch agree in the key of {subject}, so it is never "
                "resampled and nothing is tested; use a coarser key, more data or a larger batch_size"
            )
        before = self.alone.get(subject, (0, 0))
        self.alone[subject] = (before[0] + int(alone.sum()), before[1] + alone.size)


def gather(value: Float[Tensor, "batch pos d"], rows: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d"]:
    """At every position, the value that another sequence has there."""
    rows = rows.to(value.device)
    return value[rows, torch.arange(value.shape[1], device=value.device)]
