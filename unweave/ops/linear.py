"""Linear maps x -> x W^T, dense or cheaper, behind one interface.

A new kind of map is one dataclass with three methods (``apply``, ``dense``, ``select_outputs``); it then
inherits the test battery that compares it with its dense form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unweave import tree
from unweave.errors import ShapeError

__all__ = [
    "Dense",
    "Identity",
    "LinearMap",
    "LowRank",
    "Masked",
    "Pivoted",
    "Placed",
    "Repeated",
    "Stacked",
    "mask_numbers",
]

BITS_PER_NUMBER = 32


class LinearMap(ABC):
    """A linear map from ``d_in`` to ``d_out`` dimensions."""

    d_in: int
    d_out: int

    @abstractmethod
    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The image of x."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix W of the map: the oracle of ``apply``."""

    @abstractmethod
    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        """The map followed by picking output coordinates; index -1 gives a coordinate that is always 0."""

    @property
    @abstractmethod
    def n_parameters(self) -> int:
        """How many real numbers have to be stored; which positions of a matrix are kept takes 1/32 number each."""

    @property
    def n_multiplications(self) -> int:
        """Multiply-adds per application to one vector; the stored numbers, unless a map says otherwise."""
        return self.n_parameters

    @property
    def keeps_blocks(self) -> bool:
        """Whether what comes out is the sum of the blocks of inputs as they are."""
        return False

    @property
    def is_structured(self) -> bool:
        """Whether applying it is cheaper than a product with its dense matrix."""
        return False


def _pick_rows(weight: Shaped[Tensor, "rows cols"], index: Int[Tensor, " n"]) -> Shaped[Tensor, "n cols"]:
    picked = weight[index.clamp(min=0)]
    return picked * (index >= 0).to(weight.dtype)[:, None] if bool((index < 0).any()) else picked


@tree.register
@dataclass(frozen=True, eq=False)
class Dense(LinearMap):
    """W stored as it is."""

    weight: Float[Tensor, "d_out d_in"]

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.weight)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.weight

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(_pick_rows(self.weight, index))

    @property
    def n_parameters(self) -> int:
        return self.weight.numel()


@tree.register
@dataclass(frozen=True, eq=False)
class Identity(LinearMap):
    """W = I: the code of the node is what it writes."""

    size: int

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.size

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return x

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return torch.eye(self.size)

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(_pick_rows(torch.eye(self.size, device=index.device), index))

    @property
    def n_parameters(self) -> int:
        return 0

    @property
    def keeps_blocks(self) -> bool:
        return True


@tree.register
@dataclass(frozen=True, eq=False)
class Placed(Identity):
    """Each of several nodes writes to a place of its own: their codes, one after the other, from ``start`` on.

    Attributes:
        start: where in the stream the first code stands.
        width: of the stream; None where the codes fill it.
    """

    start: int = 0
    width: int | None = None

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.size if self.width is None else self.width

    @property
    def _around(self) -> tuple[int, int]:
        return self.start, self.d_out - self.start - self.size

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return x if self.d_out == self.size else F.pad(x, self._around)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return F.pad(torch.eye(self.size), (0, 0, *self._around))

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(_pick_rows(self.dense().to(index.device), index))

    @property
    def keeps_blocks(self) -> bool:
        return False

    @property
    def is_structured(self) -> bool:
        return True


@tree.register
@dataclass(frozen=True, eq=False)
class Pivoted(LinearMap):
    """A rank-r read in the basis in which r of its columns are the identity: code = x_J + T x_rest.

    Every r x d matrix of full row rank spans the same row space as one of this form, which needs
    r (d - r) numbers instead of r d. Source: Zhao et al. 2025, "Pivoting Factorization" (PIFA).
    """

    rest: Float[Tensor, "rank others"]
    pivots: Int[Tensor, " rank"]
    others: Int[Tensor, " others"]

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.rest.shape[0] + self.rest.shape[1]

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.rest.shape[0]

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        # One product with the materialised matrix beats a gather and a smaller product on every device tried.
        return F.linear(x, self.dense())

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        eye = torch.eye(self.d_out, dtype=self.rest.dtype, device=self.rest.device)
        order = torch.argsort(torch.cat([self.pivots, self.others]))
        return torch.cat([eye, self.rest], dim=1)[:, order]

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(_pick_rows(self.dense(), index))

    @property
    def n_parameters(self) -> int:
        return self.rest.numel()


@tree.register
@dataclass(frozen=True, eq=False)
class LowRank(LinearMap):
    """W = left @ right with a narrow middle: the code between them is the subspace that is read."""

    left: Float[Tensor, "d_out rank"]
    right: LinearMap

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.right.d_in

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.left.shape[0]

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(self.right.apply(x), self.left)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.left @ self.right.dense()

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return LowRank(_pick_rows(self.left, index), self.right)

    @property
    def n_parameters(self) -> int:
        return self.left.numel() + self.right.n_parameters


def mask_numbers(d_out: int, d_in: int) -> int:
    """What one bit per position of a matrix takes, in numbers of 32 bits, rounded up."""
    return -(-d_out * d_in // BITS_PER_NUMBER)


@tree.register
@dataclass(frozen=True, eq=False)
class Masked(LinearMap):
    """W with single numbers kept and zeros elsewhere: the kept values, row by row, and one bit per position.

    It runs as one dense matrix, which beats sparse products at these densities; its multiply-adds are nominal.
    """

    values: Float[Tensor, " kept"]
    mask: Bool[Tensor, "d_out d_in"]

    def __post_init__(self) -> None:
        marked = int(self.mask.sum())
        if marked != len(self.values):
            raise ShapeError(f"a mask that keeps {marked} positions needs as many values, got {len(self.values)}")

    @classmethod
    def keep(cls, weight: Float[Tensor, "d_out d_in"], mask: Bool[Tensor, "d_out d_in"]) -> Masked:
        """The entries of a matrix that a mask marks."""
        return cls(weight[mask], mask)

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.mask.shape[1]

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.mask.shape[0]

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.dense())

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.values.new_zeros(self.mask.shape).masked_scatter(self.mask, self.values)

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Masked.keep(_pick_rows(self.dense(), index), _pick_rows(self.mask, index))

    def select_inputs(self, index: Int[Tensor, " n"]) -> Masked:
        """The map of the input coordinates at ``index`` alone."""
        return Masked.keep(self.dense()[:, index], self.mask[:, index])

    @property
    def n_parameters(self) -> int:
        return len(self.values) + mask_numbers(self.d_out, self.d_in)

    @property
    def n_multiplications(self) -> int:
        return len(self.values)


@tree.register
@dataclass(frozen=True, eq=False)
class Stacked(LinearMap):
    """Several maps of the same input, their outputs one after the other."""

    maps: tuple[LinearMap, ...]

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.maps[0].d_in

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return sum(m.d_out for m in self.maps)

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.dense())

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return torch.cat([m.dense() for m in self.maps])

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Dense(_pick_rows(self.dense(), index))

    @property
    def n_parameters(self) -> int:
        return sum(m.n_parameters for m in self.maps)


@tree.register
@dataclass(frozen=True, eq=False)
class Repeated(LinearMap):
    """The map of sums: each block of its inputs comes ``times`` times, one copy after the other, and copies add up."""

    map: LinearMap
    widths: tuple[int, ...]
    times: int

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.map.d_in * self.times

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.map.d_out

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        blocks = x.split([w * self.times for w in self.widths], dim=-1)
        sums = [b.unflatten(-1, (self.times, -1)).sum(-2) for b in blocks]
        return self.map.apply(torch.cat(sums, dim=-1))

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        blocks = self.map.dense().split(list(self.widths), dim=1)
        return torch.cat([b.repeat(1, self.times) for b in blocks], dim=1)

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        return Repeated(self.map.select_outputs(index), self.widths, self.times)

    @property
    def n_parameters(self) -> int:
        return self.map.n_parameters

    @property
    def keeps_blocks(self) -> bool:
        return self.map.keeps_blocks and len(self.widths) == 1
