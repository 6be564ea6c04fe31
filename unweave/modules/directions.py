"""What every cell writes and reads as a cloud of directions of the stream, weighted by data and by the Fisher.

For a cell i that writes y_i: A_i with A_i A_i^T = Cov(y_i) over real tokens. For a cell j, g_j the gradient at what it
hears (all ports together, under a cotangent with the Fisher information of the output): B_j with B_j^T B_j = sum over
positions of g_j g_j^T per token of the scope. |B_j A_i|^2 / 2 is then the loss of nats per token if j hears the mean of
i instead of i, were g and y independent; the singular values of B_j A_i tell it apart direction by direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch
from unweave.execution import Trace
from unweave.graph import Graph
from unweave.modules.cells import felt_values, read_maps, written_maps, written_values
from unweave.scope import Scope, position_mask
from unweave.statistics import Gradients, Sums, Tally

__all__ = ["DirectionMeasure", "Directions", "directions_from", "shared_dimensions", "stage_pairs"]


class Directions(NamedTuple):
    """Written and felt directions, by stage, float64.

    Attributes:
        written: by stage, A of every cell; None for the output.
        felt: by stage, B of every cell; None for stages that read nothing.
    """

    written: list[Float[Tensor, "cell d_model width"] | None]
    felt: list[Float[Tensor, "cell width d_model"] | None]


@dataclass(frozen=True)
class DirectionMeasure:
    """The second moments behind :class:`Directions`, as a measure of a :class:`unweave.statistics.FisherPass`."""

    scope: Scope
    level: str

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        real = batch.mask.to(t.graph.device).float()
        sums: Sums = {"real": real.sum(), "scoped": position_mask(self.scope, batch).sum()}
        for s in range(len(t.graph.stages) - 1):
            values = written_values(t, s, self.level) * real[:, None, :, None]
            sums[f"{s}.c"] = values.double().sum((0, 2))
            sums[f"{s}.cc"] = torch.einsum("bntw,bntv->nwv", values, values).double()
        return _DirectionTally(t, self.level, sums)


@dataclass
class _DirectionTally:
    t: Trace
    level: str
    gathered: Sums
    samples: int = 0
    felt: Sums = field(default_factory=dict)

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        self.samples += 1
        for s, stage in enumerate(self.t.graph.stages):
            if not stage.ports:
                continue
            felt = torch.cat([a for _, a in felt_values(self.t, s, gradients, self.level)], -1)
            second = torch.einsum("bntw,bntv->nwv", felt, felt).double()
            name = f"{s}.gg"
            self.felt[name] = self.felt[name] + second if name in self.felt else second

    def sums(self) -> Sums:
        return self.gathered | {name: value / self.samples for name, value in self.felt.items()}


def directions_from(graph: Graph, sums: Sums, level: str) -> Directions:
    """The directions in the sums of a pass with a :class:`DirectionMeasure`."""
    written: list[Tensor | None] = []
    felt: list[Tensor | None] = []
    for s, stage in enumerate(graph.stages):
        known = f"{s}.cc" in sums
        mean = sums[f"{s}.c"] / sums["real"] if known else None
        written.append(None)
        if mean is not None:
            covariance = sums[f"{s}.cc"] / sums["real"] - mean[:, :, None] * mean[:, None]
            written[s] = written_maps(graph, s, level).double().transpose(1, 2) @ _roots(covariance)
        felt.append(None)
        if stage.ports:
            maps = torch.cat(read_maps(graph, s, level), 1).double()
            felt[s] = _roots(sums[f"{s}.gg"] / sums["scoped"]) @ maps
    return Directions(written, felt)


def _roots(matrices: Float[Tensor, "cell n n"]) -> Float[Tensor, "cell n n"]:
    """M^1/2 of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.transpose(1, 2)


def stage_pairs(graph: Graph) -> Iterator[tuple[int, int]]:
    """(reader, writer) of every pair of stages that may talk."""
    for s, stage in enumerate(graph.stages):
        yield from ((s, z) for z in range(*stage.visible) if graph.stages[z].write is not None)


def shared_dimensions(
    a: Float[Tensor, "writer d_model width"], b: Float[Tensor, "reader read d_model"]
) -> Float[Tensor, "reader writer"]:
    """The participation ratio (sum of s^2)^2 / (sum of s^4) of the singular values of every B_j A_i; 0 where B A = 0.

    Source:
        The participation ratio as a dimension: Gao & Ganguli 2015, "On simplicity and complexity in the brave new
        world of large-scale neuroscience".
    """
    both = b[:, None] @ a[None]
    gram = both.transpose(2, 3) @ both if both.shape[3] < both.shape[2] else both @ both.transpose(2, 3)
    size = both.square().sum((2, 3))
    ratio = size.square() / gram.square().sum((2, 3)).clamp(min=torch.finfo(size.dtype).tiny)
    return torch.where(size > 0, ratio, 0.0)
