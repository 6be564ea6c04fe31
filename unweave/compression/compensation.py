"""Masked matrices chosen again one after the other, each from what the compressed graph really feeds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from unweave.compression.masks import TINY, Metric, is_biased, solve
from unweave.compression.matrices import Matrix, Place, channel_matrices, matrix_moments, with_matrices
from unweave.compression.moments import ChannelMoments, check_compressible
from unweave.compression.neurons import Narrowing, give_up, kept_neurons
from unweave.data import Batch, TokenData
from unweave.errors import InputError, NonFiniteError
from unweave.execution import Trace, check_inputs, plan_of, run_stages
from unweave.graph import Graph
from unweave.ops import Masked
from unweave.progress import track
from unweave.statistics import Sums, accumulate

__all__ = ["sweep"]

RIDGE = 0.1
DAMPING = 0.1
ROUNDS, POLISH = 10, 10


class Refit(NamedTuple):
    """Moments of one input of the original (x), of the compressed graph (y), and of what the write should make up.

    Attributes:
        x, y, owed: means; ``owed`` is by how much the stream before the stage falls short, None where that is no sum.
        yy, xy, owed_y: second moments, centred where means are kept as constants.
    """

    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_left"]
    owed: Float[Tensor, " d_out"] | None
    yy: Float[Tensor, "d_left d_left"]
    xy: Float[Tensor, "d_in d_left"]
    owed_y: Float[Tensor, "d_out d_left"] | None


def sweep(
    graph: Graph,
    original: Graph,
    data: TokenData,
    moments: Mapping[int, ChannelMoments],
    *,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Graph:
    """A sparsified graph whose matrices are fitted again in execution order; each keeps as many numbers as it had.

    With x what a matrix W reads in the original and y what it reads in the compressed graph so far, the goal is the
    regression of W x on y, shrunk towards W::

        W* = W + (C - W A) (A + ridge * mean(diag A) I)^-1,   A = cov(y),   C = cov(W x + e, y)

    For a write, e is by how much the stream that the stage adds to falls short of the original's, so that later
    matrices make up for the errors of earlier ones (not where a norm follows the write). Then
    tr(G (W' - W*) A (W' - W*)^T) is minimised with a mask of the same number, and constants put the means right.

    Args:
        graph: from :func:`unweave.compression.masks.sparsify`.
        original: what it was made from.
        data: calibration data.
        moments: of the original; only the second moments of gradients are used.

    Returns:
        A graph of the same structure and the same numbers.

    Raises:
        InputError: the graph is not the original sparsified.
        NonFiniteError: an activation is NaN or infinite; names the stage.

    Cost:
        Two passes over the data per attention or MLP stage, each through both graphs up to that stage: in all about
        as many forward passes as there are such stages, twice over. Memory does not grow with the data.

    Exact?
        As :func:`unweave.compression.masks.sparsify`. One sweep is enough: a second gains 1% (docs/log.md).

    Source:
        Frantar & Alistarh 2023 ("SparseGPT") for matrices one after the other on compressed inputs; the goal is ours.
    """
    check_compressible(original)
    check_compressible(graph)
    masked = channel_matrices(graph)
    places = [place for place, matrix in masked.items() if isinstance(matrix.map, Masked)]
    if not places or list(masked) != list(channel_matrices(original)):
        raise InputError("sweep improves a graph that sparsify made from this original; it has no masks, or others")
    narrowed = give_up(original, moments, kept_neurons(graph, original))
    rows = list(_groups(places))
    for s, group in track(rows, "sweeping masks", len(rows), show=progress):
        step = _Step(original, graph, s, group)
        sums = accumulate(data, step, batch_size=batch_size, progress=False)
        if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
            raise NonFiniteError(f"{graph.stages[s].nodes[0]} hears NaN or inf; look at this data, or use float32")
        new = {place: _fit(original, graph, narrowed, place, _finish(sums, graph, place)) for place in group}
        graph = with_matrices(graph, new)
    return graph


def _groups(places: list[Place]) -> Iterator[tuple[int, list[Place]]]:
    """(stage, its reads), then (stage, its write): what can be fitted from one pass."""
    for s in sorted({place[0] for place in places}):
        for write in (False, True):
            group = [place for place in places if place[0] == s and (place[1] == "write") == write]
            if group:
                yield s, group


class _Step:
    """A step for :func:`accumulate`: sums over what one stage reads, or over its codes, in both graphs."""

    def __init__(self, original: Graph, graph: Graph, stage: int, group: list[Place]) -> None:
        self.graphs, self.stage = (original, graph), stage
        self.ports = list(dict.fromkeys(port for _, port, _ in group))
        readers = [r.visible[0] for r in graph.stages[stage + 1 :] if r.visible[0] <= stage < r.visible[1]]
        # what the next reader hears beside this stage: nothing where layers form a chain
        self.heard_from = readers[0] if readers else stage

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sums:
        x, y = (self._run(graph, batch) for graph in self.graphs)
        real = batch.mask.to(self.graphs[0].device)
        out: Sums = {"tokens": real.sum().double()}
        done: dict[tuple[int, int], Sums] = {}  # ports that hear and normalise alike share their sums
        for port in self.ports:
            a, b = self._inputs(x, port), self._inputs(y, port)
            key = id(a), id(b)
            if key not in done:
                done[key] = _sums(a[real].float(), b[real].float())
            out |= {f"{port}.{name}": value for name, value in done[key].items()}
        if self.ports == ["write"] and self.heard_from < self.stage:
            owed = x.stream(self.heard_from, self.stage) - y.stream(self.heard_from, self.stage)
            owed, codes = owed[real].float(), self._inputs(y, "write")[real].float()
            out |= {"owed": owed.sum(0).double(), "owed_y": (owed.T @ codes).double()}
        return out

    def _run(self, graph: Graph, batch: Batch) -> Trace:
        t = Trace(graph, plan_of(graph), check_inputs(graph, batch.inputs, batch.mask), keep=True)
        run_stages(t, 0, stop=self.stage + 1)
        return t

    def _inputs(self, t: Trace, port: str) -> Float[Tensor, "batch pos d_in"]:
        if port == "write":
            return rearrange(t.codes[self.stage], "b n t w -> b t (n w)")
        return t.normed[self.stage, port][:, 0]


def _sums(x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_left"]) -> Sums:
    return {"x": x.sum(0).double(), "y": y.sum(0).double(), "yy": (y.T @ y).double(), "xy": (x.T @ y).double()}


def _finish(sums: Sums, graph: Graph, place: Place) -> Refit:
    """The moments in the sums of a pass for one matrix."""
    n, port = sums["tokens"], place[1]
    x, y = sums[f"{port}.x"] / n, sums[f"{port}.y"] / n
    yy, xy = sums[f"{port}.yy"] / n, sums[f"{port}.xy"] / n
    if not is_biased(graph, place):  # a norm follows: no constant, and the stream is no sum of what this matrix gives
        return Refit(x, y, None, yy, xy, None)
    owed, owed_y = None, None
    if "owed" in sums:
        owed = sums["owed"] / n
        owed_y = sums["owed_y"] / n - torch.outer(owed, y)
    return Refit(x, y, owed, yy - torch.outer(y, y), xy - torch.outer(x, y), owed_y)


def _fit(original: Graph, graph: Graph, narrowed: Narrowing, place: Place, seen: Refit) -> Matrix:
    """The matrix that replaces one of the compressed graph: as many numbers, perhaps at other positions."""
    old, prior = channel_matrices(graph)[place].map, channel_matrices(narrowed.graph)[place].map.dense()
    assert isinstance(old, Masked)
    weight, bias = _rows_left(original, graph, place)
    goal = _goal(weight.double(), prior.double(), seen)
    metric = Metric.of(goal, seen.yy, matrix_moments(narrowed.graph, narrowed.moments, place).felt2, DAMPING)
    (values,), (mask,) = solve([metric], len(old.values), rounds=ROUNDS, polish=POLISH)
    new = Masked.keep(metric.weight(values).to(weight), mask)
    if is_biased(graph, place):
        constant = weight.double() @ seen.x - new.dense().double() @ seen.y
        constant = constant if seen.owed is None else constant + seen.owed
        bias = (constant if bias is None else constant + bias.double()).to(weight)
    return Matrix(new, bias)


def _rows_left(original: Graph, graph: Graph, place: Place) -> tuple[Tensor, Tensor | None]:
    """A matrix of the original and its bias, without the neurons that its layer has given up."""
    map_, bias = channel_matrices(original)[place]
    kept = kept_neurons(graph, original).get(original.stages[place[0]].nodes[0])
    if kept is None:
        return map_.dense(), bias
    return map_.dense()[kept], None if bias is None else bias[kept]


def _goal(
    weight: Float[Tensor, "d_out d_in"], prior: Float[Tensor, "d_out d_left"], seen: Refit
) -> Float[Tensor, "d_out d_left"]:
    """W*: the regression of W x + owed on y, shrunk towards W, or towards what W became as neurons were given up."""
    ridge = RIDGE * seen.yy.diagonal().mean() + TINY
    damped = seen.yy + ridge * torch.eye(len(seen.yy), dtype=seen.yy.dtype, device=seen.yy.device)
    missing = weight @ seen.xy - prior @ seen.yy
    missing = missing if seen.owed_y is None else missing + seen.owed_y
    return prior + torch.linalg.solve(damped, missing.T).T
