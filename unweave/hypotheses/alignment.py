"""Where in a network a variable is said to live, and how its value is carried from one run to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch
from unweave.errors import InputError, ShapeError
from unweave.scope import Positions, Scope, position_mask

__all__ = ["Alignment", "Location", "Locations", "Swap", "match_positions", "one_at_random", "locations_of"]

# large odd numbers, so that neighbouring sequences and positions get unrelated ranks
MIX = (2654435761, 40503, 97531)


@dataclass(frozen=True, eq=False)
class Location:
    """A place in a network, or a subspace of it, that is said to hold a variable.

    Attributes:
        place: as in :func:`unweave.run`: a node (``"blocks.0.mlp"``: what it writes), its code
            (``"blocks.0.mlp.code"``), a port (``"blocks.1.attn.head.0.k"``: what it hears), or the residual stream
            (``"before blocks.1.mlp"``).
        basis: orthonormal columns ``[d k]`` that span the subspace; None for all of it. A matrix of some
            coordinates' unit vectors picks these coordinates.
        positions: where, as in :class:`unweave.Scope`: "all", "last", numbers, a boolean label's name or a function
            of the batch. Evaluated on base and source apart: the i-th marked position of the one gets the value of
            the i-th of the other, and those without a partner are left alone.

    Raises:
        ShapeError: the basis is not ``[d k]`` with 1 <= k <= d.
        InputError: its columns are not orthonormal, the place is an attention pattern, or unusable positions.
    """

    place: str
    basis: Float[Tensor, "d k"] | None = None
    positions: Positions = "all"

    def __post_init__(self) -> None:
        Scope(positions=self.positions)
        if self.place.endswith(".pattern") or "->" in self.place:
            raise InputError(f"no variable can live at {self.place!r}: give a node, its code, a port or 'before NODE'")
        if self.basis is None:
            return
        if self.basis.ndim != 2 or not 1 <= self.basis.shape[1] <= self.basis.shape[0]:
            raise ShapeError(f"a basis has columns [d k] with 1 <= k <= d, got {tuple(self.basis.shape)}")
        wide = self.basis.detach().double()
        if not torch.allclose(wide.T @ wide, torch.eye(wide.shape[1]).to(wide), atol=1e-3):
            raise InputError(f"the basis of {self.place} is not orthonormal; use torch.linalg.qr(basis).Q")

    @property
    def dimension(self) -> int | None:
        """How many coordinates are swapped; None for all of the place."""
        return None if self.basis is None else self.basis.shape[1]

    def patch(self, swap: Swap, source: Float[Tensor, "batch pos_source d"]) -> Callable[[Tensor], Tensor]:
        """The function of this place's value that swaps in the source's: v + B B^T (v_source - v)."""

        def swapped(value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
            if self.basis is None:
                return swap.apply(value, source)
            if self.basis.shape[0] != value.shape[-1]:
                raise ShapeError(f"{self.place} has {value.shape[-1]} coordinates and its basis {self.basis.shape[0]}")
            basis = self.basis.to(value.device)
            change = (swap.apply(value, source) - value).to(basis.dtype)
            return value + (change @ basis @ basis.T).to(value.dtype)

        return swapped


Locations = Location | str | Sequence[Location | str]
Alignment = Mapping[str, Locations]


def locations_of(locations: Locations) -> tuple[Location, ...]:
    """The locations of one variable; a name alone stands for the whole of that place at all positions.

    Raises:
        InputError: none, or they differ in positions.

    Example:
        >>> [location.place for location in locations_of(["blocks.0.mlp", Location("blocks.1.mlp")])]
        ['blocks.0.mlp', 'blocks.1.mlp']
    """
    several = [locations] if isinstance(locations, Location | str) else list(locations)
    found = tuple(Location(location) if isinstance(location, str) else location for location in several)
    if not found:
        raise InputError("a variable needs at least one location")
    if any(location.positions != found[0].positions for location in found):
        raise InputError(
            f"the locations of one variable must have the same positions, got {[s.positions for s in found]}"
        )
    return found


class Swap(NamedTuple):
    """Which positions of a base get which positions of its source.

    Attributes:
        where: the base's positions that get something.
        of: the source's position that each gets.
    """

    where: Bool[Tensor, "batch pos"]
    of: Int[Tensor, "batch pos"]

    def apply(self, value: Tensor, source: Tensor) -> Tensor:
        """The value with the source's swapped in: ``[batch]``, ``[batch pos]`` or ``[batch pos d]``.

        A value per sequence is swapped when any position is.
        """
        where, of = self.where.to(value.device), self.of.to(value.device)
        if value.ndim == 1:
            return torch.where(where.any(1), source, value)
        if value.ndim == 2:
            return torch.where(where, source.gather(1, of), value)
        moved = source.gather(1, rearrange(of, "b t -> b t 1").expand(-1, -1, source.shape[2]))
        return torch.where(rearrange(where, "b t -> b t 1"), moved, value)


def match_positions(positions: Positions, base: Batch, source: Batch) -> Swap:
    """The i-th marked position of each base gets the i-th marked position of its source.

    Example:
        >>> from unweave.data import from_tensor
        >>> base, source = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3, 4, 5]])
        >>> batches = [next(from_tensor(tokens).batches()) for tokens in (base, source)]
        >>> match_positions("last", *batches).of[0, -1]
        tensor(4)
    """
    scope = Scope(positions=positions)
    to, from_ = position_mask(scope, base), position_mask(scope, source)
    rank = to.long().cumsum(1) - 1
    order = from_.int().argsort(dim=1, descending=True, stable=True)
    return Swap(to & (rank < from_.sum(1, keepdim=True)), order.gather(1, rank.clamp(0, from_.shape[1] - 1)))


def one_at_random(among: Positions = "all", seed: int = 0) -> Callable[[Batch], Tensor]:
    """Positions for a :class:`Location`: one per sequence, drawn from those marked.

    Base and source draw apart, so that a value goes from one position to another: it has to mean the same there.

    Example:
        >>> from unweave.data import from_tensor
        >>> batch = next(from_tensor(torch.ones(4, 9, dtype=torch.int64)).batches())
        >>> one_at_random()(batch).sum(1)
        tensor([1, 1, 1, 1])
    """

    def marks(batch: Batch) -> Bool[Tensor, "batch pos"]:
        allowed = position_mask(Scope(positions=among), batch)
        pos = torch.arange(allowed.shape[1], device=allowed.device)
        # contents differ between a base and its source, and so do the draws
        content = (batch.inputs.double() * (pos + 1).view(1, -1, *[1] * (batch.inputs.ndim - 2))).flatten(1).sum(1)
        mixed = batch.index.to(allowed.device) * MIX[0] + content.long() * MIX[1] + seed * MIX[2]
        rank = (mixed[:, None] * (pos + 1) * MIX[0] + pos * MIX[1]) % 1000003
        best = torch.where(allowed, rank, -1).argmax(1)
        return allowed & (pos == best[:, None])

    return marks
