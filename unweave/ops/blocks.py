"""Linear maps of codes that are made of blocks, such as maps of pixels."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave import tree
from unweave.errors import ShapeError
from unweave.ops.linear import Dense, LinearMap

__all__ = ["BlockMap", "DenseBlocks", "Joined", "Pair", "Places"]

Pair = tuple[int, int]
# (start, width) of what each writer adds to a stream, where each has a place of its own
Places = tuple[Pair, ...]


class BlockMap(LinearMap):
    """A linear map between blocks: maps of pixels, each written by a node of its own and read by others.

    Outputs come in equal blocks, one per reader. What is known of single blocks is computed without dense matrices.
    """

    @property
    @abstractmethod
    def blocks(self) -> int:
        """How many blocks come out."""

    @property
    def shares_pixels(self) -> bool:
        """Whether a block is a map whose pixels are all made alike."""
        return False

    @abstractmethod
    def apply_blocks(self, x: Float[Tensor, "... row d_in"], blocks: Int[Tensor, " row"]) -> Tensor:
        """Output block ``blocks[r]`` of row r: ``[... row width]``."""

    @abstractmethod
    def pull(self, g: Float[Tensor, "... row width"], blocks: Int[Tensor, " row"]) -> Tensor:
        """The transpose of :meth:`apply_blocks`: gradients at blocks, back at what rows heard ``[... row d_in]``."""

    @abstractmethod
    def mask(self, table: Bool[Tensor, "blocks writers"], places: Places) -> BlockMap | None:
        """The map without the pairs of (output block, writer) that are False; None where writers are not its blocks."""

    @abstractmethod
    def pair_products(
        self, g: Float[Tensor, "n blocks width"], x: Float[Tensor, "n d_in"], places: Places
    ) -> Float[Tensor, "n blocks writers"] | None:
        """g_j . (what writer i alone makes of block j), for each pair; None where writers are not its blocks."""

    @property
    def is_structured(self) -> bool:
        return True


@tree.register
@dataclass(frozen=True, eq=False)
class DenseBlocks(BlockMap):
    """A matrix whose rows are ``n_blocks`` equal blocks: what a linear layer reads from maps."""

    weight: Float[Tensor, "d_out d_in"]
    n_blocks: int = 1

    @property
    def blocks(self) -> int:
        return self.n_blocks

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    @property
    def _by_block(self) -> Float[Tensor, "blocks width d_in"]:
        return rearrange(self.weight, "(b w) d -> b w d", b=self.n_blocks)

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.weight)

    def apply_blocks(self, x: Float[Tensor, "... row d_in"], blocks: Int[Tensor, " row"]) -> Tensor:
        return torch.einsum("...rd,rwd->...rw", x, self._by_block[blocks])

    def pull(self, g: Float[Tensor, "... row width"], blocks: Int[Tensor, " row"]) -> Tensor:
        return torch.einsum("...rw,rwd->...rd", g, self._by_block[blocks])

    def mask(self, table: Bool[Tensor, "blocks writers"], places: Places) -> DenseBlocks | None:
        if len(table) != self.n_blocks or not _cover(places, self.d_in):
            return None
        widths = torch.tensor([width for _, width in places], device=self.weight.device)
        kept = table.to(self.weight.device).repeat_interleave(widths, 1)
        kept = kept.repeat_interleave(self.d_out // self.n_blocks, 0)
        return dataclasses.replace(self, weight=self.weight * kept.to(self.weight))

    def pair_products(
        self, g: Float[Tensor, "n blocks width"], x: Float[Tensor, "n d_in"], places: Places
    ) -> Float[Tensor, "n blocks writers"] | None:
        if g.shape[1] != self.n_blocks or not _cover(places, self.d_in):
            return None
        products = self.pull(g, torch.arange(self.n_blocks, device=g.device)) * x[:, None]
        return torch.stack([part.sum(-1) for part in products.split([width for _, width in places], dim=-1)], dim=-1)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.weight

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(self.weight).select_outputs(index)

    @property
    def n_parameters(self) -> int:
        return self.weight.numel()


@tree.register
@dataclass(frozen=True, eq=False)
class Joined(BlockMap):
    """Maps of consecutive coordinates, added up: out = sum over k of maps[k](x from starts[k] on).

    Attributes:
        starts: where in the input each map begins to read; what none reads is not used.
        size: the length of the input.
    """

    maps: tuple[BlockMap, ...]
    starts: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        if len({m.d_out for m in self.maps}) != 1 or len(self.maps) != len(self.starts):
            raise ShapeError(f"joined maps must make as many numbers each, got {[m.d_out for m in self.maps]}")
        if any(not 0 <= a <= self.size - m.d_in for m, a in self._parts):
            raise ShapeError(f"joined maps read beyond an input of {self.size} numbers")

    @property
    def blocks(self) -> int:
        return self.maps[0].blocks

    @property
    def shares_pixels(self) -> bool:
        return all(m.shares_pixels for m in self.maps)

    @property
    def _parts(self) -> tuple[tuple[BlockMap, int], ...]:
        return tuple(zip(self.maps, self.starts, strict=True))

    def _own(self, k: int, places: Places) -> tuple[list[int], Places]:
        """The writers that map k reads, and their places in what it reads."""
        lo, hi = self.starts[k], self.starts[k] + self.maps[k].d_in
        inside = [i for i, (start, width) in enumerate(places) if start < hi and start + width > lo]
        return inside, tuple((places[i][0] - lo, places[i][1]) for i in inside)

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.maps[0].d_out

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        found = [m.apply(x[..., a : a + m.d_in]) for m, a in self._parts]
        return functools.reduce(torch.add, found)

    def apply_blocks(self, x: Float[Tensor, "... row d_in"], blocks: Int[Tensor, " row"]) -> Tensor:
        found = [m.apply_blocks(x[..., a : a + m.d_in], blocks) for m, a in self._parts]
        return functools.reduce(torch.add, found)

    def pull(self, g: Float[Tensor, "... row width"], blocks: Int[Tensor, " row"]) -> Tensor:
        out = g.new_zeros(*g.shape[:-1], self.size)
        for m, a in self._parts:
            out[..., a : a + m.d_in] += m.pull(g, blocks)
        return out

    def mask(self, table: Bool[Tensor, "blocks writers"], places: Places) -> Joined | None:
        masked = []
        for k, m in enumerate(self.maps):
            inside, own = self._own(k, places)
            masked.append(m.mask(table[:, inside], own))
        maps = tuple(m for m in masked if m is not None)
        return Joined(maps, self.starts, self.size) if len(maps) == len(masked) else None

    def pair_products(
        self, g: Float[Tensor, "n blocks width"], x: Float[Tensor, "n d_in"], places: Places
    ) -> Float[Tensor, "n blocks writers"] | None:
        out = g.new_zeros(*g.shape[:2], len(places))
        for k, (m, a) in enumerate(self._parts):
            inside, own = self._own(k, places)
            pairs = m.pair_products(g, x[:, a : a + m.d_in], own)
            if pairs is None:
                return None
            out[:, :, inside] += pairs
        return out

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        first = self.maps[0].dense()
        out = first.new_zeros(self.d_out, self.size)
        for m, a in self._parts:
            out[:, a : a + m.d_in] += m.dense()
        return out

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(self.dense()).select_outputs(index)

    @property
    def n_parameters(self) -> int:
        return sum(m.n_parameters for m in self.maps)

    @property
    def n_multiplications(self) -> int:
        return sum(m.n_multiplications for m in self.maps)


def _cover(places: Places, size: int) -> bool:
    """Whether the writers' places are all of an input, in order."""
    ends = [0, *(start + width for start, width in places)]
    return ends[-1] == size and all(start == end for (start, _), end in zip(places, ends[:-1], strict=True))
