"""Compression to single weights: every channel matrix keeps some of its numbers, and those are adjusted.

Changing a matrix W by D costs 1/2 tr(G D A D^T) nats per token, with A the second moment of what it reads and G that
of the gradient at what it gives (see :mod:`unweave.compression.moments`). Which numbers stay is one threshold for
all matrices together: one price in nats per number. What the numbers left out gave on average is kept as constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.compression.matrices import Matrix, Place, channel_matrices, matrix_moments, with_matrices
from unweave.compression.moments import ChannelMoments, check_compressible
from unweave.compression.neurons import Narrowing, give_up, kept_neurons, narrowings, plain_layers
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.ops import Masked, mask_numbers

__all__ = ["Masker", "Metric", "is_biased", "largest", "solve", "sparsify"]

DAMPING = 1e-2
RHO = 1.0
ROUNDS, POLISH = 10, 5
# how often neurons without weights make room for other weights
ROOMS = 4
# nothing that real data sends or feels is as small; keeps what is never used from dividing by zero
TINY = 1e-30


@dataclass(frozen=True)
class Metric:
    """One matrix where numbers are comparable: V = g W a, so that 1/2 V_ij^2 is about the nats that W_ij is worth.

    a and g are the roots of the diagonals of A and G; what is left of A and G, with ones on the diagonal, is
    P sigma P^T and Q lambda Q^T, damped by adding to the eigenvalues.

    Attributes:
        goal: V of the matrix that is to be approximated.
        into: a, felt: g.
        right, left: P and Q.
        curvature: lambda_i sigma_j.
    """

    goal: Float[Tensor, "d_out d_in"]
    into: Float[Tensor, " d_in"]
    felt: Float[Tensor, " d_out"]
    right: Float[Tensor, "d_in d_in"]
    left: Float[Tensor, "d_out d_out"]
    curvature: Float[Tensor, "d_out d_in"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "d_out d_in"],
        inputs2: Float[Tensor, "d_in d_in"],
        felt2: Float[Tensor, "d_out d_out"],
        damping: float = DAMPING,
        dtype: torch.dtype = torch.float32,
    ) -> Metric:
        """The metric of W, A and G, worked out in float64."""
        (into, right, sigma), (felt, left, lambda_) = _whiten(inputs2, damping), _whiten(felt2, damping)
        goal = felt[:, None] * weight.double() * into
        curvature = torch.outer(lambda_, sigma)
        return cls(goal.to(dtype), into, felt, right.to(dtype), left.to(dtype), curvature.to(dtype))

    def nats(self, v: Float[Tensor, "d_out d_in"]) -> float:
        """What replacing the goal by v costs."""
        rotated = self.left.T @ (v - self.goal) @ self.right
        return 0.5 * float((rotated.square() * self.curvature).sum())

    def nearest(self, v: Float[Tensor, "d_out d_in"], rho: float) -> Float[Tensor, "d_out d_in"]:
        """argmin over u of nats(u) + rho / 2 |u - v|^2."""
        rotated = self.left.T @ (self.goal - v) @ self.right
        return v + self.left @ (rotated * (self.curvature / (self.curvature + rho))) @ self.right.T

    def weight(self, v: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The W whose V is v, in float64."""
        return v.double() / self.felt[:, None] / self.into


def _whiten(second: Float[Tensor, "n n"], damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """(roots of the diagonal, eigenvectors and damped eigenvalues of what is left)."""
    second = second.double()
    diagonal = second.diagonal().clamp(min=0)
    scale = (diagonal + 1e-6 * diagonal.mean()).sqrt().clamp(min=TINY)
    values, vectors = torch.linalg.eigh(second / scale / scale[:, None])
    return scale, vectors, values.clamp(min=0) + damping


def largest(values: Sequence[Tensor], count: int) -> list[Bool[Tensor, "d_out d_in"]]:
    """Which numbers are among the ``count`` largest of all in magnitude (equal ones at the edge are left out)."""
    sizes = [v.abs() for v in values]
    flat = torch.cat([s.flatten() for s in sizes])
    if count >= len(flat):
        return [torch.ones_like(s, dtype=torch.bool) for s in sizes]
    threshold = flat.kthvalue(len(flat) - count).values
    return [s > threshold for s in sizes]


def solve(
    metrics: Sequence[Metric], count: int, *, rounds: int = ROUNDS, polish: int = POLISH, rho: float = RHO
) -> tuple[list[Float[Tensor, "d_out d_in"]], list[Bool[Tensor, "d_out d_in"]]]:
    """Matrices with ``count`` numbers in all that lose few nats, by ADMM.

    Minimise sum_m nats_m(V_m) subject to V = Z, Z having ``count`` numbers: V takes the step of :meth:`Metric.nearest`
    from Z - U, Z keeps the largest of V + U over all matrices, U += V - Z. The number kept falls over the ``rounds``;
    in the ``polish`` rounds the masks stay, which converges to the best values for them.

    Returns:
        (Z, masks), in the coordinates of the metrics.

    Exact?
        The values for given masks in the limit of many polish rounds; the masks are a heuristic.

    Source:
        Boyd et al. 2011 (ADMM); Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models", for one
        matrix with G = I.
    """
    total = sum(m.goal.numel() for m in metrics)
    z = [m.goal for m in metrics]
    u = [torch.zeros_like(m.goal) for m in metrics]
    masks = [torch.ones_like(m.goal, dtype=torch.bool) for m in metrics]
    for step in range(rounds + polish):
        v = [m.nearest(z_ - u_, rho) for m, z_, u_ in zip(metrics, z, u, strict=True)]
        moved = [v_ + u_ for v_, u_ in zip(v, u, strict=True)]
        if step < rounds:
            done = 1 - (1 - (step + 1) / rounds) ** 3
            masks = largest(moved, round(total + (count - total) * done))
        z = [m * mask for m, mask in zip(moved, masks, strict=True)]
        u = [m - z_ for m, z_ in zip(moved, z, strict=True)]
    return z, masks


class Masker:
    """All matrices of a graph's channels, ready to be masked at any size, once plain layers are narrowed."""

    def __init__(self, graph: Graph, moments: Mapping[int, ChannelMoments]) -> None:
        check_compressible(graph)
        if not channel_matrices(graph):
            raise InputError("this graph has no attention or MLP channel to compress")
        self.graph, self.moments = graph, moments
        self.options = [_Masking(narrowing) for narrowing in narrowings(graph, moments)]

    def at_size(self, size: float) -> Graph:
        """The best graph predicted for a size; the graph itself for 1.

        Raises:
            InputError: the size is smaller than masks, biases and norms.
        """
        if size == 1:
            return self.graph
        numbers = size * self.graph.n_channel_parameters
        found = [masked for option in self.options for masked in self._candidates(option, numbers)]
        if not found:
            raise InputError(f"size {size:.3g} is smaller than masks, biases and norms alone; ask for more")
        return min(found, key=lambda masked: masked.nats).graph

    def _candidates(self, option: _Masking, numbers: float) -> list[_Candidate]:
        """One option at a size, and what it becomes as neurons that are left without weights make room for others."""
        found: list[_Candidate] = []
        for _ in range(ROOMS):
            masked = option.keep(numbers)
            if masked is None:
                break
            found.append(masked)
            if not masked.idle:
                break
            left = {**kept_neurons(option.narrowing.graph, self.graph)}
            for node, idle in masked.idle.items():
                before = left.get(node, list(range(self.graph.find(node)[0].code_widths[0])))
                left[node] = [n for i, n in enumerate(before) if i not in idle]
            option = _Masking(give_up(self.graph, self.moments, left))
        return found


class _Candidate(NamedTuple):
    """A masked graph, the nats predicted, and the neurons of plain layers that nothing enters or that nothing hears."""

    graph: Graph
    nats: float
    idle: dict[str, set[int]]


class _Masking:
    """The matrices of a graph, perhaps with some neurons given up, ready to be masked."""

    def __init__(self, narrowing: Narrowing) -> None:
        self.narrowing, self.graph = narrowing, narrowing.graph
        self.matrices = channel_matrices(self.graph)
        self.moments = {place: matrix_moments(self.graph, narrowing.moments, place) for place in self.matrices}
        self.metrics = {
            place: Metric.of(matrix.map.dense(), self.moments[place].inputs2, self.moments[place].felt2)
            for place, matrix in self.matrices.items()
        }

    def keep(self, numbers: float) -> _Candidate | None:
        """The best graph of so many numbers, if masks and biases leave room for weights."""
        count = math.floor(numbers) - self._fixed()
        if count < 0:
            return None
        values, masks = solve(list(self.metrics.values()), count)
        nats, new = self.narrowing.nats, {}
        for (place, metric), v, mask in zip(self.metrics.items(), values, masks, strict=True):
            new[place] = self._masked(place, metric.weight(v), mask)
            nats += metric.nats(v)
        return _Candidate(with_matrices(self.graph, new), nats, self._idle(dict(zip(self.metrics, masks, strict=True))))

    def _fixed(self) -> int:
        """Norms, biases (new ones, too) and one bit per position."""
        fixed = self.graph.n_channel_parameters - sum(m.map.n_parameters for m in self.matrices.values())
        for place, (map_, bias) in self.matrices.items():
            fixed += mask_numbers(map_.d_out, map_.d_in)
            fixed += map_.d_out if bias is None and is_biased(self.graph, place) else 0
        return fixed

    def _idle(self, masks: Mapping[Place, Tensor]) -> dict[str, set[int]]:
        idle = {}
        for s, reader in plain_layers(self.graph).items():
            used = masks[s, self.graph.stages[s].ports[0].name, 0].any(1)
            columns = [mask.any(0) for place, mask in masks.items() if place[0] == reader and place[1] != "write"]
            if columns:
                used = used & torch.stack(columns).any(0)
            if not bool(used.all()) and bool(used.any()):
                idle[self.graph.stages[s].nodes[0]] = set((~used).nonzero()[:, 0].tolist())
        return idle

    def _masked(self, place: Place, weight: Tensor, mask: Tensor) -> Matrix:
        old, bias = self.matrices[place].map.dense(), self.matrices[place].bias
        new = Masked.keep(weight.to(old), mask)
        if is_biased(self.graph, place):
            constant = (old.double() - new.dense().double()) @ self.moments[place].mean
            bias = (constant if bias is None else bias.double() + constant).to(old)
        return Matrix(new, bias)


def is_biased(graph: Graph, place: Place) -> bool:
    """Whether the mean of what is left out can be kept: not where a norm stands before the stage's constant."""
    return place[1] != "write" or graph.stages[place[0]].post is None


def sparsify(graph: Graph, moments: Mapping[int, ChannelMoments], size: float) -> Graph:
    """A graph of the same matrices that keeps only some of their numbers (closed form, no data pass).

    Minimise the sum over matrices of 1/2 tr(G D A D^T), A and G damped by 1e-2 of their diagonals, for a number of
    kept weights that brings the channels to ``size``; what was left out stays as a constant, its mean. Plain layers
    give up whole neurons first, as many as the prediction says (:mod:`unweave.compression.neurons`).

    Args:
        graph: a captured graph with no edge cut.
        moments: of this graph, from :func:`unweave.channel_moments`.
        size: the share of the channels' numbers to keep, above 0 and at most 1; one bit per position of each matrix
            counts 1/32 number, and biases that appear are counted.

    Returns:
        A graph of the same nodes and edges, and of the same shapes but for plain layers; the graph itself at size 1.

    Raises:
        InputError: the size is out of range or smaller than masks and biases; edges are cut, or nodes are split; the
            moments are of another graph.

    Cost:
        Two eigendecompositions per matrix (O(d^3 + d_mlp^3) per layer; about ten times as much where there are plain
        layers) and 60 products of the size of the matrix with
        a square one; memory of six times the channels' numbers.

    Exact?
        At size 1 nothing is lost. Below, the loss is second order and treats matrices one by one, and the choice of
        numbers is a heuristic (see :func:`solve`).

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=16)
        >>> small = sparsify(graph, unweave.channel_moments(graph, data, unweave.Scope()), 0.5)
        >>> small.n_channel_parameters <= 0.5 * graph.n_channel_parameters
        True
    """
    if not 0 < size <= 1:
        raise InputError(f"size must be above 0 and at most 1, got {size}")
    return Masker(graph, moments).at_size(size)
