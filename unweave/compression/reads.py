"""A read matrix on its own: fewer ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from unweave.compression.factors import (
    Spectrum,
    spectrum,
)
from unweave.compression.moments import ChannelMoments
from unweave.compression.parts import Choice, Part
from unweave.compression.ranks import add_bias, best_rank, fill_ranks, low_rank_numbers, replace_read, truncate
from unweave.graph import Stage

__all__ = ["ReadPart"]


@dataclass(frozen=True)
class ReadPart(Part):
    """One read of an attention stage, all heads stacked: rank r costs r (out + in - r) numbers."""

    stage: Stage
    moments: ChannelMoments
    port: int

    @cached_property
    def weight(self) -> Tensor:
        return self.stage.ports[self.port].reads[0].map.dense()

    @cached_property
    def seen(self) -> Spectrum:
        name = self.stage.ports[self.port].name
        return spectrum(self.weight, self.moments.inputs2[name], self.moments.gradients2[name, 0])

    def choose(self, price: float) -> Choice:
        r, numbers, nats = best_rank(self.seen.nats, low_rank_numbers(*self.weight.shape), price)
        biased = r < min(self.weight.shape) or self.stage.ports[self.port].reads[0].bias is not None
        return Choice(numbers + biased * self.weight.shape[0], nats, (r,))

    def within(self, limit: float) -> Choice:
        curve = (self.seen.nats, low_rank_numbers(*self.weight.shape))
        (r,), numbers, nats = fill_ranks([curve], limit - self.weight.shape[0])
        return Choice(numbers + self.weight.shape[0], nats, (r,))

    def apply(self, stage: Stage, choice: Choice) -> Stage:
        read, mean = stage.ports[self.port].reads[0], self.moments.inputs[stage.ports[self.port].name]
        cut, constant = truncate(self.weight, self.seen, choice.ranks[0], mean)
        bias = add_bias(read.bias, constant, self.weight)
        return replace_read(stage, self.port, 0, dataclasses.replace(read, map=cut, bias=bias))
