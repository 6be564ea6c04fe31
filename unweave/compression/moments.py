"""What compression has to know about each channel: second moments of what it reads, and of what the output feels.

For a read a = W n: the centred second moment A of n, its mean, and the second moment G of the gradient at a under
the Fisher information of the output. To second order, replacing W by W + D costs 1/2 tr(G D A D^T) nats per token.
For the codes c of a stage and what it writes y = W c: the moments of c, and those of the gradient at y.
Source: Martens & Grosse 2015 (Kronecker-factored curvature), used here for compression instead of optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError
from unweave.execution import Trace, check_inputs, trace
from unweave.graph import CHANNEL_KINDS, Graph
from unweave.scope import Scope, fisher_cotangent, position_mask
from unweave.statistics import Sums, accumulate, check_finite

__all__ = ["ChannelMoments", "channel_moments"]


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
        InputError: edges are cut: compress first, restrict the compressed graph afterwards.
        EmptyDataError: the scope selects no position.

    Cost:
        One forward and ``samples`` backward passes; memory O(d_model^2 + d_mlp^2) per layer.
    """
    if graph.n_edges < int(graph.possible_edges.sum()):
        raise InputError("this graph has cut edges; compress the whole graph first and restrict it afterwards")
    step = _MomentStep(graph, scope, samples, seed)
    sums = accumulate(
        data,
        step,
        batch_size=batch_size,
        description="second moments",
        checkpoint=checkpoint,
        fingerprint=f"moments-{samples}-{seed}",
        progress=progress,
    )
    if float(sums["scoped"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    return {s: _finish(sums, s, graph, samples) for s in step.stages}


@dataclass(frozen=True)
class _MomentStep:
    graph: Graph
    scope: Scope
    samples: int
    seed: int

    @property
    def stages(self) -> list[int]:
        return [
            s for s, stage in enumerate(self.graph.stages) if stage.kind in CHANNEL_KINDS and stage.write is not None
        ]

    def __call__(self, batch: Batch) -> Sums:
        first = self.graph.writers[0]
        context = check_inputs(self.graph, batch.inputs, batch.mask)
        with torch.enable_grad():
            t = trace(self.graph, context, keep=True, patch={first: lambda y: y.detach().requires_grad_()})
        check_finite(t, batch)
        real = batch.mask.to(self.graph.device)
        out: Sums = {"tokens": real.sum().double(), "scoped": position_mask(self.scope, batch).sum().double()}
        for s in self.stages:
            out |= self._forward_sums(t, s, real)
        generator = torch.Generator(self.graph.device).manual_seed(self.seed * 1_000_003 + int(batch.index[0]))
        for sample in range(self.samples):
            cotangent = fisher_cotangent(self.scope, t.output.detach(), batch, generator)
            for name, value in self._gradient_sums(t, cotangent, sample < self.samples - 1).items():
                out[name] = out[name] + value if name in out else value
        return out

    @torch.no_grad()
    def _forward_sums(self, t: Trace, s: int, real: Tensor) -> Sums:
        out: Sums = {}
        for port in t.plan.stages[s].ports:
            name = port.port.name
            n = t.normed[s, name][:, 0][real].detach()
            out[f"{s}.{name}.n"], out[f"{s}.{name}.nn"] = n.double().sum(0), (n.T @ n).double()
            for r, read in enumerate(port.reads):
                a = _flat(t.reads[s, name][r][:, :: read.copies], real)
                out[f"{s}.{name}.{r}.aa"] = (a.T @ a).double()
        c = _flat(t.codes[s], real)
        out[f"{s}.c"], out[f"{s}.cc"] = c.double().sum(0), (c.T @ c).double()
        return out

    def _gradient_sums(self, t: Trace, cotangent: Tensor, retain: bool) -> Sums:
        names, wanted, copies = [], [], []
        for s in self.stages:
            for port in t.plan.stages[s].ports:
                for r, read in enumerate(port.reads):
                    names.append(f"{s}.{port.port.name}.{r}.gg")
                    wanted.append(t.reads[s, port.port.name][r])
                    copies.append(read.copies)
            names.append(f"{s}.yy")
            wanted.append(t.total[s])
            copies.append(1)
        grads = torch.autograd.grad(t.output, wanted, cotangent, retain_graph=retain)
        out: Sums = {}
        for name, g, k in zip(names, grads, copies, strict=True):
            if g.ndim == 4:  # heads that share keys and values feel the sum of their gradients
                g = rearrange(reduce(g, "b (n k) t w -> b n t w", "sum", k=k), "b n t w -> (b t) (n w)")
            else:
                g = rearrange(g, "b t d -> (b t) d")
            out[name] = (g.T @ g).double()
        return out


def _flat(x: Float[Tensor, "batch node pos width"], real: Tensor) -> Float[Tensor, "tokens codes"]:
    return rearrange(x.detach(), "b n t w -> b t (n w)")[real]


def _finish(sums: Sums, s: int, graph: Graph, samples: int) -> ChannelMoments:
    n, scoped = sums["tokens"], sums["scoped"] * samples
    ports = graph.stages[s].ports
    inputs = {p.name: sums[f"{s}.{p.name}.n"] / n for p in ports}
    reads = [(p.name, r) for p in ports for r in range(len(p.reads))]
    code = sums[f"{s}.c"] / n

    def centred(second: Tensor, mean: Tensor) -> Tensor:
        return second / n - torch.outer(mean, mean)

    return ChannelMoments(
        inputs,
        {p.name: centred(sums[f"{s}.{p.name}.nn"], inputs[p.name]) for p in ports},
        {(p, r): sums[f"{s}.{p}.{r}.aa"] / n for p, r in reads},
        {(p, r): sums[f"{s}.{p}.{r}.gg"] / scoped for p, r in reads},
        code,
        centred(sums[f"{s}.cc"], code),
        sums[f"{s}.yy"] / scoped,
    )
