"""Products of two matrices: fewer dimensions per head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.compression.factors import (
    pivot,
    root,
    worth,
)
from unweave.compression.moments import ChannelMoments
from unweave.compression.parts import Choice, Part
from unweave.compression.ranks import add_bias, best_rank, fill_ranks, replace_read
from unweave.graph import Read, Stage
from unweave.ops import Dense, LinearMap, Pivoted, Stacked

__all__ = ["QueryKeyPart", "ValueOutputPart"]


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
        picked = [best_rank(nats, self.numbers, price) for _, _, nats in self.projectors]
        d = self.outputs[0].shape[0]
        return Choice(sum(p[1] for p in picked) + d, sum(p[2] for p in picked), tuple(p[0] for p in picked))

    def within(self, limit: float) -> Choice:
        d = self.outputs[0].shape[0]
        ranks, numbers, nats = fill_ranks([(p[2], self.numbers) for p in self.projectors], limit - d)
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
        stage = replace_read(stage, 2, 0, read)
        widths = tuple(ranks[h // per_group] for h in range(len(stage.nodes)))
        bias = add_bias(stage.bias, constant, self.outputs[0].to(dtype))
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
        picked = [best_rank(nats, self.numbers, price) for _, _, nats in self.projectors]
        return Choice(sum(p[1] for p in picked), sum(p[2] for p in picked), tuple(p[0] for p in picked))

    def within(self, limit: float) -> Choice:
        ranks, numbers, nats = fill_ranks([(p[2], self.numbers) for p in self.projectors], limit)
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
        return replace_read(replace_read(stage, 0, 0, heads), 1, 0, shared)
