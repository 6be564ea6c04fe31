"""What usage measures at each token: of nodes, of edges and of the dimensions of codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import Means, Replacement
from unweave.data import Batch, TokenData
from unweave.errors import InputError, UnsupportedModelError
from unweave.execution import Trace, check_inputs, trace
from unweave.files import read_tensors, write_tensors
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.scoring import products_by_edge, products_by_token
from unweave.statistics import Gradients, Sums, Tally, accumulate, collect_means

__all__ = ["column_names", "measure_of"]


@runtime_checkable
class Measure(Protocol):
    """A measure of a :class:`FisherPass` whose tally holds one column per part."""

    def __call__(self, t: Trace, batch: Batch) -> Tally: ...


def column_names(graph: Graph, level: str) -> list[str]:
    """What the columns of usage at a level stand for."""
    if level == "node":
        return list(graph.writers)
    if level == "edge":
        return [str(edge) for edge in graph.edges]
    if graph.is_cut:
        raise InputError("dimensions are measured where nothing is cut; give the whole graph, or take level='edge'")
    if any(stage.post is not None for stage in graph.stages[:-1]):
        raise UnsupportedModelError("the writes of this model pass a norm of their own; take level='node' or 'edge'")
    widths = [(n, w) for stage in graph.stages[:-1] for n, w in zip(stage.nodes, stage.code_widths, strict=True)]
    return [f"{node}[{k}]" for node, width in widths for k in range(width)]


def measure_of(
    graph: Graph,
    data: TokenData,
    scope: Scope,
    folder: Path,
    level: str,
    means: Means | None,
    batch_size: int,
    progress: bool | None,
) -> Measure:
    """The measure of a level; the means that it needs are collected first, once per folder."""
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if level == "dimension":
        codes = _once(folder, lambda: _mean_codes(graph, data, **options))
        return _DimensionMeasure([codes[str(s)].to(graph.device) for s in range(len(graph.stages) - 1)])
    if means is None:
        means = _once(folder, lambda: collect_means(graph, data, **options))
    instead = Replacement("mean", {name: mean.to(graph.device) for name, mean in means.items()})
    if level == "edge" or graph.is_cut:
        return _EdgeMeasure(instead, by_node=level == "node")
    return _NodeMeasure(instead)


def _once(folder: Path, collect: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means, kept beside the parts so that a resumed pass uses the very same."""
    path = folder / "means.safetensors"
    if not path.exists():
        write_tensors(path, collect())
    return read_tensors(path)[0]


def _mean_codes(graph: Graph, data: TokenData, **options: Any) -> dict[str, Tensor]:
    """By stage, the mean code of its nodes ``[node width]``."""

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        weight = batch.mask.to(graph.device, torch.float64)
        sums = {
            str(s): torch.einsum("bntw,bt->nw", t.codes[s].double().expand(len(weight), -1, -1, -1), weight)
            for s in range(len(graph.stages) - 1)
        }
        return {**sums, "tokens": weight.sum()}

    sums = accumulate(data, step, description="mean codes", **options)
    tokens = sums.pop("tokens")
    return {name: (value / tokens).float() for name, value in sums.items()}


@dataclass
class _TokenTally:
    """1/2 of the mean square, over cotangents, of what ``products`` makes of their gradients."""

    products: Callable[[Gradients], Float[Tensor, "batch pos part"]]
    total: Tensor | None = None
    samples: int = 0

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        squares = self.products(gradients).square_()
        self.total = squares if self.total is None else self.total.add_(squares)
        self.samples += 1

    def sums(self) -> Sums:
        assert self.total is not None
        return {"usage": self.total.mul_(0.5 / self.samples)}


@dataclass(frozen=True)
class _NodeMeasure:
    """Level "node" where nothing is cut: the nodes of a stage share the gradient at what they write together."""

    instead: Replacement

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        with torch.no_grad():
            sent = self.instead.sent(t.graph, batch)
            moved = [
                t.node_writes(s).detach().float() - rearrange(other, "n b t d -> b n t d").float()
                for s, other in enumerate(sent)
            ]

        def products(gradients: Gradients) -> Tensor:
            totals = _totals(t.graph, gradients)
            got = [torch.einsum("btd,bntd->btn", g.float(), y) for g, y in zip(totals, moved, strict=True)]
            return torch.cat(got, dim=-1)

        return _TokenTally(products)


@dataclass(frozen=True)
class _DimensionMeasure:
    """Level "dimension"; ``means`` are those of the codes, by stage ``[node width]``."""

    means: list[Tensor]

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        stages = list(zip(t.plan.stages[:-1], self.means, strict=True))
        real = [torch.arange(m.shape[1]) < torch.tensor(p.stage.code_widths)[:, None] for p, m in stages]

        def products(gradients: Gradients) -> Tensor:
            out = []
            for s, (plan, mean) in enumerate(stages):
                g = _totals(t.graph, gradients)[s].float()
                at_code = torch.einsum("btd,nwd->btnw", g, plan.node_write.to(g))
                moved = rearrange(t.codes[s].detach().float() - mean[:, None], "b n t w -> b t n w")
                out.append((at_code * moved)[..., real[s].to(g.device)])
            return torch.cat(out, dim=-1)

        return _TokenTally(products)


@dataclass(frozen=True)
class _EdgeMeasure:
    """Level "edge"; summed over a writer's edges, level "node" of a cut graph."""

    instead: Replacement
    by_node: bool

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        sent = self.instead.sent(t.graph, batch)
        if not self.by_node:
            return _TokenTally(products_by_edge(t, sent))
        of_edges = products_by_token(t, sent)
        return _TokenTally(lambda gradients: of_edges(gradients).sum(2))


def _totals(graph: Graph, gradients: Gradients) -> list[Float[Tensor, "batch pos d_model"]]:
    """The gradient at what each stage writes; embeddings that the same stages hear share theirs."""

    def heard_by(s: int) -> list[bool]:
        return [stage.visible[0] <= s < stage.visible[1] for stage in graph.stages if stage.ports]

    known = {s: gradients.totals[s] for s in range(len(graph.stages) - 1) if s in gradients.totals}
    out = []
    for s in range(len(graph.stages) - 1):
        alike = s if s in known else next((k for k in known if heard_by(k) == heard_by(s)), None)
        if alike is None:
            raise UnsupportedModelError(f"no gradient reaches {graph.stages[s].nodes[0]}; take level='edge'")
        out.append(known[alike])
    return out
