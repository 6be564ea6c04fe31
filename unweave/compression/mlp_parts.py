"""MLPs: neurons and ranks together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.compression.factors import (
    Spectrum,
    compensated_write,
    eliminate_neurons,
    spectrum,
)
from unweave.compression.moments import ChannelMoments
from unweave.compression.parts import Choice, Part
from unweave.compression.ranks import add_bias, best_rank, fill_ranks, low_rank_numbers, replace_read, truncate
from unweave.graph import Port, Read, Stage

__all__ = ["MlpPart"]

NEURON_SHARES = tuple(k / 20 for k in range(20, 0, -1))


class _Neurons(NamedTuple):
    """An MLP with some neurons left: which, their write matrix, the nats lost so far, and the three spectra."""

    kept: Int[Tensor, " kept"]
    write: Float[Tensor, "d kept"]
    nats: float
    seen: tuple[Spectrum, ...]


@dataclass(frozen=True, eq=False)
class MlpPart(Part):
    """An MLP: how many neurons, and the rank of each of its matrices."""

    stage: Stage
    moments: ChannelMoments

    @property
    def port(self) -> Port:
        return self.stage.ports[0]

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        assert self.stage.write is not None
        return (*(read.map.dense() for read in self.port.reads), self.stage.write.dense())

    @cached_property
    def elimination(self) -> Any:
        return eliminate_neurons(self.weights[-1], self.moments.code2, self.moments.written2)

    @cached_property
    def counts(self) -> list[int]:
        n = self.weights[-1].shape[1]
        return sorted({max(1, round(share * n)) for share in NEURON_SHARES}, reverse=True)

    @cache  # noqa: B019 - lives as long as one compression
    def neurons(self, count: int) -> _Neurons:
        """The MLP with ``count`` neurons left."""
        m, n, name = self.moments, self.weights[-1].shape[1], self.port.name
        if count == n:
            kept, write, nats = torch.arange(n), self.weights[-1].double(), 0.0
        else:
            kept = self.elimination.order[n - count :].sort().values
            write = compensated_write(self.weights[-1], m.code2, kept)
            nats = float(self.elimination.nats[n - count])
        reads = [
            spectrum(self.weights[r][kept], m.inputs2[name], m.gradients2[name, r][kept][:, kept])
            for r in range(len(self.port.reads))
        ]
        return _Neurons(kept, write, nats, (*reads, spectrum(write, m.code2[kept][:, kept], m.written2)))

    def choose(self, price: float) -> Choice:
        return min((self._choose_ranks(n, price) for n in self.counts), key=lambda c: c.nats + price * c.numbers)

    def within(self, limit: float) -> Choice:
        return min((self._fill_ranks(n, limit) for n in self.counts), key=lambda c: (c.numbers > limit, c.nats))

    def _fill_ranks(self, count: int, limit: float) -> Choice:
        neurons, d = self.neurons(count), self.weights[-1].shape[0]
        biases = count * len(self.port.reads) + d
        curves = [(s.nats, low_rank_numbers(count, d)) for s in neurons.seen]
        ranks, numbers, nats = fill_ranks(curves, limit - biases)
        return Choice(numbers + biases, neurons.nats + nats, (count, *ranks))

    def _choose_ranks(self, count: int, price: float) -> Choice:
        neurons = self.neurons(count)
        d = self.weights[-1].shape[0]
        picked = [best_rank(s.nats, low_rank_numbers(count, d), price) for s in neurons.seen]
        biased = [p[0] < min(count, d) or r.bias is not None for p, r in zip(picked[:-1], self.port.reads, strict=True)]
        numbers = sum(p[1] for p in picked) + count * sum(biased) + d
        return Choice(numbers, neurons.nats + sum(p[2] for p in picked), (count, *(p[0] for p in picked)))

    def apply(self, stage: Stage, choice: Choice) -> Stage:
        count, *ranks = choice.ranks
        neurons, m, mean = self.neurons(count), self.moments, self.moments.inputs[self.port.name]
        for r, read in enumerate(self.port.reads):
            cut, constant = truncate(self.weights[r][neurons.kept], neurons.seen[r], ranks[r], mean)
            bias = None if read.bias is None else read.bias[neurons.kept]
            new = Read(cut, (count,), add_bias(bias, constant, self.weights[r]))
            stage = replace_read(stage, 0, r, new)
        write = neurons.write.to(self.weights[-1])
        code = m.code[neurons.kept]
        cut, constant = truncate(write, neurons.seen[-1], ranks[-1], code)
        lost = self.weights[-1].double() @ m.code - write.double() @ code
        constant = lost if constant is None else lost + constant
        return dataclasses.replace(
            stage, write=cut, code_widths=(count,), bias=add_bias(stage.bias, constant, self.weights[-1])
        )
