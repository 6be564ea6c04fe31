"""The choices that compression has for one channel, priced in stored numbers and in nats.

A *part* is something that can be made smaller on its own: a read matrix, the values of a key-value head with
its output matrix, an MLP. For a price per number it answers with its best choice; the global allocation is one
price for all parts, which is what reverse water-filling comes to.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
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
    pivot,
    root,
    spectrum,
    to_map,
    worth,
)
from unweave.compression.moments import ChannelMoments
from unweave.graph import Port, Read, Stage
from unweave.ops import Attention, Dense, Identity, LinearMap, Pivoted, Stacked

__all__ = ["Choice", "Part", "channel_parts"]

NEURON_SHARES = tuple(k / 20 for k in range(20, 0, -1))


class Choice(NamedTuple):
    """What a part would be made into: how many numbers it stores, the nats lost, and how (its ranks)."""

    numbers: int
    nats: float
    ranks: tuple[int, ...]


class Part(ABC):
    """Something in a stage that can be made smaller on its own."""

    @abstractmethod
    def choose(self, price: float) -> Choice:
        """The choice that minimises nats + price * numbers."""

    @abstractmethod
    def within(self, limit: float) -> Choice:
        """A choice of at most ``limit`` numbers that loses little: what fills a budget where prices leave gaps.

        (Storage is concave in the rank, so one price for all reaches only some of the sizes.)
        """

    @abstractmethod
    def apply(self, stage: Stage, choice: Choice) -> Stage:
        """The stage with this part made into the choice."""


def channel_parts(stage: Stage, moments: ChannelMoments) -> list[Part]:
    """The parts of an attention or MLP stage."""
    if isinstance(stage.write, Identity):  # its neurons are the stream of the next layer: none can go
        return [ReadPart(stage, moments, 0)]
    if not isinstance(stage.core, Attention):
        return [MlpPart(stage, moments)]
    core = stage.core
    parts: list[Part] = []
    product = core.rotary is None and core.q_norm is None and core.k_norm is None and core.softcap is None
    if product:
        parts.append(QueryKeyPart(stage, moments))
    else:
        parts += [ReadPart(stage, moments, 0), ReadPart(stage, moments, 1)]
    parts.append(ValueOutputPart(stage, moments))
    return parts


# ---- choosing a rank ------------------------------------------------------------------------------------


def _tails(nats: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_one"]:
    """Nats lost when only the first r directions are kept, r = 0 .. k."""
    return torch.cat([nats.flip(0).cumsum(0).flip(0), nats.new_zeros(1)])


def _best_rank(
    nats: Float[Tensor, " k"], numbers: Float[Tensor, " k_plus_one"], price: float
) -> tuple[int, int, float]:
    """(rank, numbers, nats lost) that minimise nats + price * numbers."""
    tails = _tails(nats)
    r = int((tails + price * numbers.to(tails)).argmin())
    return r, int(numbers[r]), float(tails[r])


Curve = tuple[Float[Tensor, " k"], Float[Tensor, " k_plus_one"]]


def _fill(curves: list[Curve], limit: float) -> tuple[list[int], int, float]:
    """(ranks, numbers, nats lost) within a limit: the step of the most nats per number, while one fits."""
    tails = [_tails(nats) for nats, _ in curves]
    costs = [numbers.to(tail) for (_, numbers), tail in zip(curves, tails, strict=True)]
    ranks = [0] * len(curves)
    spent = sum(float(c[0]) for c in costs)
    while True:
        best: tuple[float, int, int] | None = None
        for i, (tail, cost) in enumerate(zip(tails, costs, strict=True)):
            more = cost[ranks[i] + 1 :] - cost[ranks[i]]
            if not len(more):
                continue
            worth = (tail[ranks[i]] - tail[ranks[i] + 1 :]) / more.clamp(min=1.0)
            worth = torch.where(more <= limit - spent, worth, -1.0)
            j = int(worth.argmax())
            if float(worth[j]) > 0 and (best is None or float(worth[j]) > best[0]):
                best = (float(worth[j]), i, ranks[i] + 1 + j)
        if best is None:
            break
        _, i, rank = best
        spent += float(costs[i][rank] - costs[i][ranks[i]])
        ranks[i] = rank
    return ranks, int(spent), sum(float(t[r]) for t, r in zip(tails, ranks, strict=True))


def _low_rank_numbers(d_out: int, d_in: int) -> Float[Tensor, " ranks"]:
    """Numbers of a pivoted rank-r matrix, r = 0 .. full."""
    r = torch.arange(min(d_out, d_in) + 1)
    return (r * (d_out + d_in - r)).double()


def _truncate(
    weight: Float[Tensor, "out in"], seen: Spectrum, rank: int, mean: Float[Tensor, " in"]
) -> tuple[LinearMap, Float[Tensor, " out"] | None]:
    """(the rank-r map, the constant W mean that it no longer gives); the original map at full rank."""
    if rank >= min(weight.shape):
        return Dense(weight), None
    cut = to_map(seen.left[:, :rank], seen.right[:rank], weight.dtype)
    return cut, (weight.double() - cut.dense().double()) @ mean


def _plus(bias: Tensor | None, constant: Tensor | None, like: Tensor) -> Tensor | None:
    if constant is None:
        return bias
    return (constant if bias is None else bias.double() + constant).to(like)


def _replace_read(stage: Stage, port: int, number: int, read: Read) -> Stage:
    ports, reads = list(stage.ports), list(stage.ports[port].reads)
    reads[number] = read
    ports[port] = dataclasses.replace(ports[port], reads=tuple(reads))
    return dataclasses.replace(stage, ports=tuple(ports))


# ---- reads on their own ---------------------------------------------------------------------------------


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
        r, numbers, nats = _best_rank(self.seen.nats, _low_rank_numbers(*self.weight.shape), price)
        biased = r < min(self.weight.shape) or self.stage.ports[self.port].reads[0].bias is not None
        return Choice(numbers + biased * self.weight.shape[0], nats, (r,))

    def within(self, limit: float) -> Choice:
        curve = (self.seen.nats, _low_rank_numbers(*self.weight.shape))
        (r,), numbers, nats = _fill([curve], limit - self.weight.shape[0])
        return Choice(numbers + self.weight.shape[0], nats, (r,))

    def apply(self, stage: Stage, choice: Choice) -> Stage:
        read, mean = stage.ports[self.port].reads[0], self.moments.inputs[stage.ports[self.port].name]
        cut, constant = _truncate(self.weight, self.seen, choice.ranks[0], mean)
        bias = _plus(read.bias, constant, self.weight)
        return _replace_read(stage, self.port, 0, dataclasses.replace(read, map=cut, bias=bias))


# ---- products of two matrices: fewer dimensions per head ------------------------------------------------


def _group_projectors(
    seen: list[Float[Tensor, "w w"]], felt: list[Float[Tensor, "w w"]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each group, (L, R, nats): the code c becomes L R c with fewer dimensions between L and R."""
    out = []
    for second, gradient in zip(seen, felt, strict=True):
        half, inverse = root(gradient)
        u, s, _ = torch.linalg.svd(half @ root(second, 0.0)[0])
        out.append((inverse @ u, u.T @ half, worth(s)))
    return out


@dataclass(frozen=True)
class ValueOutputPart(Part):
    """Values and outputs of the heads: y_h = O_h V n needs as many dimensions as the product has.

    Heads that share a value matrix share its directions. Rank r of a group of g heads costs
    r (d + g d) - r^2 numbers: the values are stored pivoted.
    """

    stage: Stage
    moments: ChannelMoments

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """(groups, heads per group, width of a head)."""
        groups, heads = len(self.stage.ports[2].reads[0].widths), len(self.stage.nodes)
        return groups, heads // groups, self.stage.code_widths[0]

    @cached_property
    def outputs(self) -> list[Float[Tensor, "d width"]]:
        assert self.stage.write is not None
        return list(self.stage.write.dense().double().split(list(self.stage.code_widths), dim=1))

    @cached_property
    def projectors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        groups, per_group, w = self.sizes
        seen, felt = [], []
        for group in range(groups):
            heads = range(group * per_group, (group + 1) * per_group)
            seen.append(sum(self.moments.code2[h * w : (h + 1) * w, h * w : (h + 1) * w] for h in heads))
            felt.append(sum(self.outputs[h].T @ self.moments.written2 @ self.outputs[h] for h in heads))
        return _group_projectors(seen, felt)  # type: ignore[arg-type]

    @cached_property
    def numbers(self) -> Float[Tensor, " ranks"]:
        _, per_group, w = self.sizes
        d, r = self.outputs[0].shape[0], torch.arange(w + 1)
        return (r * (d + per_group * d) - r * r).double()

    def choose(self, price: float) -> Choice:
        picked = [_best_rank(nats, self.numbers, price) for _, _, nats in self.projectors]
        d = self.outputs[0].shape[0]
        return Choice(sum(p[1] for p in picked) + d, sum(p[2] for p in picked), tuple(p[0] for p in picked))

    def within(self, limit: float) -> Choice:
        d = self.outputs[0].shape[0]
        ranks, numbers, nats = _fill([(p[2], self.numbers) for p in self.projectors], limit - d)
        return Choice(numbers + d, nats, tuple(ranks))

    def apply(self, stage: Stage, choice: Choice) -> Stage:
        groups, per_group, w = self.sizes
        read = stage.ports[2].reads[0]
        values = read.map.dense().double().split(w)
        dtype = read.map.dense().dtype
        constant = torch.zeros_like(self.outputs[0][:, 0])
        maps: list[LinearMap] = []
        columns: list[Tensor] = []
        for group in range(groups):
            left, right, _ = self.projectors[group]
            r = choice.ranks[group]
            basis, pivoted = pivot(right[:r] @ values[group])
            maps.append(Pivoted(pivoted.rest.to(dtype), pivoted.pivots, pivoted.others))
            for h in range(group * per_group, (group + 1) * per_group):
                columns.append(self.outputs[h] @ left[:, :r] @ basis)
                mean = self.moments.code[h * w : (h + 1) * w]
                biased = torch.zeros_like(mean) if read.bias is None else read.bias.double().split(w)[group]
                kept = left[:, :r] @ right[:r] @ (mean - biased)
                constant = constant + self.outputs[h] @ (mean - kept)
        ranks = tuple(choice.ranks)
        read = Read(Stacked(tuple(maps)), ranks, None)
        stage = _replace_read(stage, 2, 0, read)
        widths = tuple(ranks[h // per_group] for h in range(len(stage.nodes)))
        bias = _plus(stage.bias, constant, self.outputs[0].to(dtype))
        return dataclasses.replace(stage, write=Dense(torch.cat(columns, 1).to(dtype)), code_widths=widths, bias=bias)


@dataclass(frozen=True)
class QueryKeyPart(Part):
    """Queries and keys where nothing stands between them: the score q . k needs only the product W_Q^T W_K.

    Rank r of a group of g heads costs r (d + g d) - r^2 numbers: the keys are stored pivoted. Biases of queries are
    taken along, so means need no constants; those of keys add the same to all scores of a query and are left out.
    """

    stage: Stage
    moments: ChannelMoments

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        groups, heads = len(self.stage.ports[1].reads[0].widths), len(self.stage.nodes)
        return groups, heads // groups, self.stage.ports[0].reads[0].widths[0]

    @cached_property
    def projectors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        groups, per_group, w = self.sizes

        def blocks(matrix: Tensor, group: int) -> Tensor:
            heads = range(group * per_group, (group + 1) * per_group)
            return sum(matrix[h * w : (h + 1) * w, h * w : (h + 1) * w] for h in heads)  # type: ignore[return-value]

        seen = [blocks(self.moments.reads2["q", 0], g) for g in range(groups)]
        return _group_projectors(seen, [blocks(self.moments.gradients2["q", 0], g) for g in range(groups)])

    @cached_property
    def numbers(self) -> Float[Tensor, " ranks"]:
        _, per_group, w = self.sizes
        d, r = self.stage.ports[0].reads[0].map.d_in, torch.arange(w + 1)
        biases = per_group * r if self.stage.ports[0].reads[0].bias is not None else 0 * r
        return (r * (d + per_group * d) - r * r + biases).double()

    def choose(self, price: float) -> Choice:
        picked = [_best_rank(nats, self.numbers, price) for _, _, nats in self.projectors]
        return Choice(sum(p[1] for p in picked), sum(p[2] for p in picked), tuple(p[0] for p in picked))

    def within(self, limit: float) -> Choice:
        ranks, numbers, nats = _fill([(p[2], self.numbers) for p in self.projectors], limit)
        return Choice(numbers, nats, tuple(ranks))

    def apply(self, stage: Stage, choice: Choice) -> Stage:
        groups, per_group, w = self.sizes
        q, k = stage.ports[0].reads[0], stage.ports[1].reads[0]
        queries, keys = q.map.dense().double().split(w), k.map.dense().double().split(w)
        new_q: list[Tensor] = []
        new_k: list[LinearMap] = []
        bias_q: list[Tensor] = []
        dtype = q.map.dense().dtype
        for group in range(groups):
            left, right, _ = self.projectors[group]
            r = choice.ranks[group]
            # q . k becomes (R q) . (L^T k); storing L^T W_K = B P pivoted moves B to the queries
            basis, pivoted = pivot(left[:, :r].T @ keys[group])
            new_k.append(Pivoted(pivoted.rest.to(dtype), pivoted.pivots, pivoted.others))
            for h in range(group * per_group, (group + 1) * per_group):
                new_q.append(basis.T @ right[:r] @ queries[h])
                if q.bias is not None:
                    bias_q.append(basis.T @ right[:r] @ q.bias.double().split(w)[h])
        widths = tuple(choice.ranks[h // per_group] for h in range(len(stage.nodes)))
        heads = Read(Dense(torch.cat(new_q).to(dtype)), widths, torch.cat(bias_q).to(dtype) if bias_q else None)
        shared = Read(Stacked(tuple(new_k)), tuple(choice.ranks), None)
        return _replace_read(_replace_read(stage, 0, 0, heads), 1, 0, shared)


# ---- MLPs: neurons and ranks together -------------------------------------------------------------------


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
        curves = [(s.nats, _low_rank_numbers(count, d)) for s in neurons.seen]
        ranks, numbers, nats = _fill(curves, limit - biases)
        return Choice(numbers + biases, neurons.nats + nats, (count, *ranks))

    def _choose_ranks(self, count: int, price: float) -> Choice:
        neurons = self.neurons(count)
        d = self.weights[-1].shape[0]
        picked = [_best_rank(s.nats, _low_rank_numbers(count, d), price) for s in neurons.seen]
        biased = [p[0] < min(count, d) or r.bias is not None for p, r in zip(picked[:-1], self.port.reads, strict=True)]
        numbers = sum(p[1] for p in picked) + count * sum(biased) + d
        return Choice(numbers, neurons.nats + sum(p[2] for p in picked), (count, *(p[0] for p in picked)))

    def apply(self, stage: Stage, choice: Choice) -> Stage:
        count, *ranks = choice.ranks
        neurons, m, mean = self.neurons(count), self.moments, self.moments.inputs[self.port.name]
        for r, read in enumerate(self.port.reads):
            cut, constant = _truncate(self.weights[r][neurons.kept], neurons.seen[r], ranks[r], mean)
            bias = None if read.bias is None else read.bias[neurons.kept]
            new = Read(cut, (count,), _plus(bias, constant, self.weights[r]))
            stage = _replace_read(stage, 0, r, new)
        write = neurons.write.to(self.weights[-1])
        code = m.code[neurons.kept]
        cut, constant = _truncate(write, neurons.seen[-1], ranks[-1], code)
        lost = self.weights[-1].double() @ m.code - write.double() @ code
        constant = lost if constant is None else lost + constant
        return dataclasses.replace(
            stage, write=cut, code_widths=(count,), bias=_plus(stage.bias, constant, self.weights[-1])
        )
