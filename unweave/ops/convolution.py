"""Kernels slid over maps of pixels. A map is a code of height * width numbers, row by row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave import tree
from unweave.errors import ShapeError
from unweave.ops.blocks import BlockMap, Pair, Places
from unweave.ops.linear import Dense, LinearMap

__all__ = ["Convolution", "slid_size"]


def slid_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> Pair:
    """How many places a window takes on a padded map: rows and columns of what comes out.

    Example:
        >>> slid_size((16, 16), kernel=(5, 5), stride=(2, 2), padding=(2, 2))
        (8, 8)
    """
    rows, columns = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return rows, columns


@tree.register
@dataclass(frozen=True, eq=False)
class Convolution(BlockMap):
    """The linear map of ``nn.Conv2d``: out[o] = sum over i of kernel[o, i] slid over map i (cross-correlation).

    Attributes:
        kernels: of every map made and every map of its group that is read.
        size: rows and columns of the maps read.
        stride, padding, dilation: in rows and columns; padding is with zeros.
        groups: maps come in so many groups, each read and made apart; as many as maps: depthwise.
    """

    kernels: Float[Tensor, "maps_out maps_in height width"]
    size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.out_size) < 1:
            raise ShapeError(f"kernels of {tuple(self.kernels.shape[2:])} do not fit on maps of {self.size}")
        if self.groups < 1 or self.kernels.shape[0] % self.groups:
            raise ShapeError(f"{self.kernels.shape[0]} maps do not come in {self.groups} groups")

    @property
    def blocks(self) -> int:
        return len(self.kernels)

    @property
    def shares_pixels(self) -> bool:
        return True

    @property
    def maps_in(self) -> int:
        """How many maps are read."""
        return self.kernels.shape[1] * self.groups

    @property
    def out_size(self) -> Pair:
        """Rows and columns of the maps made."""
        height, width = self.kernels.shape[2:]
        return slid_size(self.size, (height, width), self.stride, self.padding, self.dilation)

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.maps_in * self.size[0] * self.size[1]

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.kernels.shape[0] * self.out_size[0] * self.out_size[1]

    @property
    def group_maps(self) -> Int[Tensor, "maps_out maps_in"]:
        """Which maps each kernel of each map made slides over."""
        n_out, n_in = self.kernels.shape[:2]
        group = torch.arange(n_out, device=self.kernels.device) // (n_out // self.groups)
        return group[:, None] * n_in + torch.arange(n_in, device=self.kernels.device)

    def ungrouped(self) -> Float[Tensor, "maps_out all_maps_in height width"]:
        """A kernel for every pair of maps, zero between groups."""
        if self.groups == 1:
            return self.kernels
        n_out, n_in, *window = self.kernels.shape
        index = repeat(self.group_maps, "o i -> o i h w", h=window[0], w=window[1])
        return self.kernels.new_zeros(n_out, n_in * self.groups, *window).scatter(1, index, self.kernels)

    @property
    def _scales(self) -> bool:
        """Whether each map is the one in its place times a number."""
        alone = self.kernels.shape[1:] == (1, 1, 1) and len(self.kernels) == self.groups
        return alone and self.stride == (1, 1) and self.padding == (0, 0)

    def _slid(self, maps: Tensor, kernels: Tensor, groups: int) -> Tensor:
        return F.conv2d(maps, kernels, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=groups)

    def apply(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        maps = x.reshape(-1, self.maps_in, *self.size)
        # what a skip connection does: no convolution is as fast
        out = maps * self.kernels[:, 0] if self._scales else self._slid(maps, self.kernels, self.groups)
        return out.reshape(*x.shape[:-1], self.d_out)

    def apply_blocks(self, x: Float[Tensor, "... row d_in"], blocks: Int[Tensor, " row"]) -> Tensor:
        rows = len(blocks)
        maps = x.reshape(-1, rows, self.maps_in, *self.size)
        if self.groups > 1:
            maps = maps[:, torch.arange(rows, device=x.device)[:, None], self.group_maps[blocks]]
        out = self._slid(rearrange(maps, "n r c h w -> n (r c) h w"), self.kernels[blocks], rows)
        return out.reshape(*x.shape[:-1], -1)

    def pull(self, g: Float[Tensor, "... row width"], blocks: Int[Tensor, " row"]) -> Tensor:
        rows, window = len(blocks), self.kernels.shape[2:]
        maps = g.reshape(-1, rows, *self.out_size)
        # pixels at the far border that no window reached
        short = tuple(
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (window[i] - 1) - 1) % self.stride[i]
            for i in range(2)
        )
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        back = F.conv_transpose2d(maps, self.kernels[blocks], groups=rows, output_padding=short, **options)
        back = rearrange(back, "n (r c) h w -> n r c (h w)", r=rows)
        if self.groups > 1:
            index = repeat(self.group_maps[blocks], "r c -> n r c p", n=len(back), p=back.shape[-1])
            back = back.new_zeros(len(back), rows, self.maps_in, back.shape[-1]).scatter(2, index, back)
        return back.reshape(*g.shape[:-1], self.d_in)

    def _fits(self, places: Places) -> bool:
        """Whether the writers are its maps, one after the other."""
        pixels = self.size[0] * self.size[1]
        return places == tuple((i * pixels, pixels) for i in range(self.maps_in))

    def mask(self, table: Bool[Tensor, "blocks writers"], places: Places) -> Convolution | None:
        if not self._fits(places) or len(table) != len(self.kernels):
            return None
        kept = table.to(self.kernels.device).gather(1, self.group_maps)
        return dataclasses.replace(self, kernels=self.kernels * kept.to(self.kernels)[:, :, None, None])

    def pair_products(
        self, g: Float[Tensor, "n blocks width"], x: Float[Tensor, "n d_in"], places: Places
    ) -> Float[Tensor, "n blocks writers"] | None:
        """By the gradient of every kernel, sequence by sequence: sum over its window of kernel times gradient."""
        if not self._fits(places) or g.shape[1] != len(self.kernels):
            return None
        maps = x.reshape(-1, self.maps_in, *self.size)
        height, width = self.kernels.shape[2:]
        unfolded = F.unfold(maps, (height, width), self.dilation, self.padding, self.stride)
        windows = rearrange(unfolded, "n (g i) p -> n g p i", g=self.groups)
        at_kernels = rearrange(g, "n (g o) p -> n g o p", g=self.groups) @ windows
        found = rearrange(at_kernels, "n g o (i h w) -> n (g o) i h w", h=height, w=width)
        pairs = (found * self.kernels).sum((-2, -1))
        if self.groups == 1:
            return pairs
        index = self.group_maps.expand(len(pairs), -1, -1)
        return pairs.new_zeros(len(pairs), len(self.kernels), self.maps_in).scatter(2, index, pairs)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        eye = torch.eye(self.d_in, dtype=self.kernels.dtype, device=self.kernels.device)
        return self.apply(eye).T.contiguous()

    def select_outputs(self, index: Int[Tensor, " n"]) -> LinearMap:
        """Still a convolution where whole maps are picked."""
        pixels = self.out_size[0] * self.out_size[1]
        if len(index) % pixels == 0:
            blocks = index.reshape(-1, pixels)
            whole = blocks[:, :1] + torch.arange(pixels, device=index.device)
            if bool((blocks == whole).all() and (blocks[:, 0] % pixels == 0).all() and (index >= 0).all()):
                kernels = self.ungrouped()[blocks[:, 0] // pixels]
                return dataclasses.replace(self, kernels=kernels, groups=1)
        return Dense(self.dense()).select_outputs(index)

    @property
    def n_parameters(self) -> int:
        return self.kernels.numel()

    @property
    def n_multiplications(self) -> int:
        return self.kernels.numel() * self.out_size[0] * self.out_size[1]
