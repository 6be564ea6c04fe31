"""Pooling of maps of pixels, and cores one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from unweave import tree
from unweave.errors import InputError, ShapeError
from unweave.ops.blocks import Pair
from unweave.ops.convolution import slid_size
from unweave.ops.cores import Context, Core

__all__ = ["Chain", "Pool"]

POOLS = ("average", "max")


@tree.register
@dataclass(frozen=True, eq=False)
class Pool(Core):
    """The largest value, or the mean, of each window of a map.

    Attributes:
        kind: "max" or "average" (padding counts as zeros, as PyTorch counts it by default).
        size: rows and columns of the maps read.
        kernel, stride, padding: in rows and columns.
    """

    kind: str
    size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)

    def __post_init__(self) -> None:
        if self.kind not in POOLS:
            raise InputError(f"unknown pooling {self.kind!r}; known: {', '.join(POOLS)}")
        if min(self.out_size) < 1:
            raise ShapeError(f"windows of {self.kernel} do not fit on maps of {self.size}")

    @property
    def out_size(self) -> Pair:
        """Rows and columns of the maps made."""
        return slid_size(self.size, self.kernel, self.stride, self.padding)

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        (x,) = reads
        maps = rearrange(x, "b n t (h w) -> (b n t) 1 h w", h=self.size[0])
        pool: Any = F.max_pool2d if self.kind == "max" else F.avg_pool2d
        pooled = pool(maps, self.kernel, self.stride, self.padding)
        return rearrange(pooled, "(b n t) 1 h w -> b n t (h w)", b=x.shape[0], n=x.shape[1])


@tree.register
@dataclass(frozen=True, eq=False)
class Chain(Core):
    """One core after another, each node apart: what stands between a convolution and what its maps write."""

    steps: tuple[Core, ...]

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        for step in self.steps:
            reads = (step.forward(reads, context),)
        return reads[0]

    @property
    def n_parameters(self) -> int:
        return sum(step.n_parameters for step in self.steps)
