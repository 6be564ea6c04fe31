"""What compression has to know about each channel: second moments of what it reads, and of what the output feels.

For a read a = W n: the centred second moment A of n, its mean, and the second moment G of the gradient at a under
the Fisher information of the output. To second order, replacing W by W + D costs 1/2 tr(G D A D^T) nats per token.
For the codes c of a stage and what it writes y = W c: the moments of c, and those of the gradient at y.
Source: Martens & Grosse 2015 (Kronecker-factored curvature), used here for compression instead of optimisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from unweave.ablation import Means, Replacement
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError
from unweave.execution import Trace
from unweave.graph import CHANNEL_KINDS, Graph
from unweave.ops import BlockMap
from unweave.scope import Scope, position_mask
from unweave.scoring import EdgeMeasure, EdgeScores, scores_from
from unweave.statistics import FisherPass, Gradients, Sums, Tally, accumulate

__all__ = ["ChannelMoments", "channel_moments", "moments_from", "survey"]


@dataclass(frozen=True)
class ChannelMoments:
    """Moments of one channel stage, float64.

    Attributes:
        inputs: by port, the mean ``[d]`` of the normalised input.
        inputs2: by port, its centred second moment ``[d d]``.
        reads2: by (port, number), the uncentred second moment of the read's outputs ``[outputs outputs]``.
        gradients2: by (port, number), the second moment of the gradient there ``[outputs outputs]``.
        code: the mean of the codes ``[codes]``.
        code2: their centred second moment ``[codes codes]``.
        written2: the second moment of the gradient at what the stage writes ``[d_model d_model]``.
    """

    inputs: dict[str, Tensor]
    inputs2: dict[str, Tensor]
    reads2: dict[tuple[str, int], Tensor]
    gradients2: dict[tuple[str, int], Tensor]
    code: Tensor
    code2: Tensor
    written2: Tensor


def channel_moments(
    graph: Graph,
    data: TokenData,
    scope: Scope,
    *,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> dict[int, ChannelMoments]:
    """The moments of every channel stage.

    Raises:
        InputError: edges are cut or nodes are split: compress first, restrict and refine the compressed graph.
        EmptyDataError: the scope selects no position.

    Cost:
        One forward and ``samples`` backward passes; memory O(d_model^2 + d_mlp^2) per layer.
    """
    check_compressible(graph)
    step = FisherPass(graph, scope, samples, seed, (MomentMeasure(scope),))
    sums = accumulate(
        data,
        step,
        batch_size=batch_size,
        description="second moments",
        checkpoint=checkpoint,
        identity=("moments", samples, seed, graph, scope),
        progress=progress,
    )
    return moments_from(graph, sums, samples)


def survey(
    graph: Graph,
    data: TokenData,
    scope: Scope,
    means: Means,
    *,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> tuple[EdgeScores, dict[int, ChannelMoments]]:
    """Fisher edge scores and channel moments from one pass: the same numbers as apart, at two thirds of the cost.

    Raises:
        InputError: edges are cut, or nodes are split.
        EmptyDataError: the scope selects no position.

    Cost:
        One forward and ``samples`` backward passes.
    """
    check_compressible(graph)
    instead = Replacement("mean", means)
    step = FisherPass(graph, scope, samples, seed, (EdgeMeasure(scope, instead), MomentMeasure(scope)))
    sums = accumulate(
        data,
        step,
        batch_size=batch_size,
        description="scores and second moments",
        checkpoint=checkpoint,
        identity=("survey", samples, seed, graph, scope, instead),
        progress=progress,
    )
    return scores_from(graph, sums, "fisher", len(data)), moments_from(graph, sums, samples)


def check_matrices(graph: Graph) -> None:
    """Refuse graphs that read through convolutions.

    Raises:
        InputError: they do.
    """
    if any(isinstance(read.map, BlockMap) for s in graph.stages for p in s.ports for read in p.reads):
        raise InputError(
            "this graph reads through convolutions, whose kernels are stored once for all pixels: matrices of fewer "
            "numbers would store more; cut edges between maps instead (find_circuit, or 'unweave circuit')"
        )


def check_compressible(graph: Graph) -> None:
    """Refuse graphs whose channels are not whole.

    Raises:
        InputError: edges are cut, nodes are split, or channels are feature maps.
    """
    check_matrices(graph)
    if graph.is_cut:
        raise InputError("this graph has cut edges; compress the whole graph first and restrict it afterwards")
    for stage in graph.stages:
        parts = len(stage.nodes) // len(stage.ports[0].reads[0].widths) if stage.kind == "attn" else len(stage.nodes)
        if stage.kind in CHANNEL_KINDS and parts > 1:
            raise InputError(f"{stage.nodes[0]} is a part of a channel; compress first and refine the smaller graph")


@dataclass(frozen=True)
class MomentMeasure:
    """The moments of all channels as a measure of a :class:`FisherPass`."""

    scope: Scope

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        real = batch.mask.to(t.graph.device)
        sums: Sums = {"real_tokens": real.sum().double(), "scoped": position_mask(self.scope, batch).sum().double()}
        for s in t.graph.channels:
            sums |= _forward_sums(t, s, real)
        return _MomentTally(t, sums)


@dataclass
class _MomentTally:
    t: Trace
    gathered: Sums

    def add(self, gradients: Gradients) -> None:
        for name, g in self._by_name(gradients):
            second = (g.T @ g).double()
            self.gathered[name] = self.gathered[name] + second if name in self.gathered else second

    def _by_name(self, gradients: Gradients) -> Iterator[tuple[str, Tensor]]:
        for s, total in gradients.totals.items():
            yield f"{s}.yy", rearrange(total, "b t d -> (b t) d")
            for port in self.t.plan.stages[s].ports:
                grads = gradients.reads[s, port.port.name]
                for r, (read, g) in enumerate(zip(port.reads, grads, strict=True)):
                    # heads that share keys and values feel the sum of their gradients
                    g = reduce(g, "b (n k) t w -> b n t w", "sum", k=read.copies) if read.copies > 1 else g
                    yield f"{s}.{port.port.name}.{r}.gg", rearrange(g, "b n t w -> (b t) (n w)")

    def sums(self) -> Sums:
        return self.gathered


@torch.no_grad()
def _forward_sums(t: Trace, s: int, real: Tensor) -> Sums:
    out: Sums = {}
    inputs: dict[int, tuple[Tensor, Tensor]] = {}  # ports that hear and normalise alike share their moments
    for port in t.plan.stages[s].ports:
        name = port.port.name
        normed = t.normed[s, name]
        if id(normed) not in inputs:
            n = normed[:, 0][real].detach()
            inputs[id(normed)] = n.double().sum(0), (n.T @ n).double()
        out[f"{s}.{name}.n"], out[f"{s}.{name}.nn"] = inputs[id(normed)]
        for r, read in enumerate(port.reads):
            a = _flat(t.reads[s, name][r][:, :: read.copies], real)
            out[f"{s}.{name}.{r}.aa"] = (a.T @ a).double()
    c = _flat(t.codes[s], real)
    out[f"{s}.c"], out[f"{s}.cc"] = c.double().sum(0), (c.T @ c).double()
    return out


def _flat(x: Float[Tensor, "batch node pos width"], real: Tensor) -> Float[Tensor, "tokens codes"]:
    return rearrange(x.detach(), "b n t w -> b t (n w)")[real]


def moments_from(graph: Graph, sums: Sums, samples: int) -> dict[int, ChannelMoments]:
    """The moments of every channel in the sums of a pass with so many cotangents per sequence.

    Raises:
        EmptyDataError: the scope selected no position.
    """
    if float(sums["scoped"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    return {s: _finish(sums, s, graph, samples) for s in graph.channels}


def _finish(sums: Sums, s: int, graph: Graph, samples: int) -> ChannelMoments:
    n, scoped, stage = sums["real_tokens"], sums["scoped"] * samples, graph.stages[s]
    ports = stage.ports
    inputs = {p.name: sums[f"{s}.{p.name}.n"] / n for p in ports}
    reads = {(p.name, r): _unpadded(read.widths) for p in ports for r, read in enumerate(p.reads)}
    own = _unpadded(stage.code_widths)
    code = sums[f"{s}.c"][own] / n

    def centred(second: Tensor, mean: Tensor) -> Tensor:
        return second / n - torch.outer(mean, mean)

    return ChannelMoments(
        inputs,
        {p.name: centred(sums[f"{s}.{p.name}.nn"], inputs[p.name]) for p in ports},
        {(p, r): sums[f"{s}.{p}.{r}.aa"][i][:, i] / n for (p, r), i in reads.items()},
        {(p, r): sums[f"{s}.{p}.{r}.gg"][i][:, i] / scoped for (p, r), i in reads.items()},
        code,
        centred(sums[f"{s}.cc"][own][:, own], code),
        sums[f"{s}.yy"] / scoped,
    )


def _unpadded(widths: Sequence[int]) -> Int[Tensor, " outputs"]:
    """Where blocks of unequal widths lie once all are padded to the widest."""
    return torch.cat([b * max(widths) + torch.arange(w) for b, w in enumerate(widths)])
