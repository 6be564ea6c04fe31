"""Choosing the ranks of matrices, and storing them as two factors."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.compression.factors import (
    Spectrum,
    to_map,
)
from unweave.graph import Read, Stage
from unweave.ops import Dense, LinearMap

__all__ = ["add_bias", "best_rank", "fill_ranks", "low_rank_numbers", "replace_read", "truncate"]


def _tails(nats: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_one"]:
    """Nats lost when only the first r directions are kept, r = 0 .. k."""
    return torch.cat([nats.flip(0).cumsum(0).flip(0), nats.new_zeros(1)])


def best_rank(nats: Float[Tensor, " k"], numbers: Float[Tensor, " k_plus_one"], price: float) -> tuple[int, int, float]:
    """(rank, numbers, nats lost) that minimise nats + price * numbers."""
    tails = _tails(nats)
    r = int((tails + price * numbers.to(tails)).argmin())
    return r, int(numbers[r]), float(tails[r])


Curve = tuple[Float[Tensor, " k"], Float[Tensor, " k_plus_one"]]


def fill_ranks(curves: list[Curve], limit: float) -> tuple[list[int], int, float]:
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


def low_rank_numbers(d_out: int, d_in: int) -> Float[Tensor, " ranks"]:
    """Numbers of a pivoted rank-r matrix, r = 0 .. full."""
    r = torch.arange(min(d_out, d_in) + 1)
    return (r * (d_out + d_in - r)).double()


def truncate(
    weight: Float[Tensor, "out in"], seen: Spectrum, rank: int, mean: Float[Tensor, " in"]
) -> tuple[LinearMap, Float[Tensor, " out"] | None]:
    """(the rank-r map, the constant W mean that it no longer gives); the original map at full rank."""
    if rank >= min(weight.shape):
        return Dense(weight), None
    cut = to_map(seen.left[:, :rank], seen.right[:rank], weight.dtype)
    return cut, (weight.double() - cut.dense().double()) @ mean


def add_bias(bias: Tensor | None, constant: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias and a constant, either of which may be missing."""
    if constant is None:
        return bias
    return (constant if bias is None else bias.double() + constant).to(like)


def replace_read(stage: Stage, port: int, number: int, read: Read) -> Stage:
    """The stage with another read in one place of a port."""
    ports, reads = list(stage.ports), list(stage.ports[port].reads)
    reads[number] = read
    ports[port] = dataclasses.replace(ports[port], reads=tuple(reads))
    return dataclasses.replace(stage, ports=tuple(ports))
