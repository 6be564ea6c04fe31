"""One global allocation of numbers to channels, for a size or for an error in nats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from unweave.compression.channels import channel_parts
from unweave.compression.compensation import sweep
from unweave.compression.masks import Masker
from unweave.compression.moments import ChannelMoments, channel_moments, check_matrices
from unweave.compression.neurons import Narrowing, narrowings
from unweave.compression.parts import Choice, Part
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.execution import check_inputs, trace
from unweave.graph import Graph
from unweave.scope import Scope, divergence, position_mask

__all__ = ["FORMS", "Budgeter", "compress"]

FORMS = ("low-rank", "sparse")

PRICE_STEPS = 40
# the share of all numbers below which looking for a use of them costs more time than it saves nats
WORTH_SPENDING = 1e-3
# nats that rounding alone makes: numbers that gain no more are not stored
WORTHLESS = 1e-9


def compress(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    size: float | None = None,
    kl_nats: float | None = None,
    form: str = "low-rank",
    moments: Mapping[int, ChannelMoments] | None = None,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Graph:
    """A smaller graph: narrower channels, or channels of fewer single weights, and constants for the rest.

    To second order the divergence is a sum over the network's matrices of 1/2 tr(G D A D^T), with D the change of
    the matrix, A the second moment of what it reads and G that of the gradient at what it gives. One price per
    number for all of them gives the allocation. Means are kept as constants, so that keeping nothing is mean ablation.

    - ``"low-rank"``: low-rank reads, fewer value dimensions per head, fewer neurons. Channels have narrow subspaces
      to read and to write, and fewer multiplications.
    - ``"sparse"``: single weights are kept and adjusted (:func:`unweave.compression.masks.sparsify`), then adjusted
      again in execution order to the compressed graph's own activations
      (:func:`unweave.compression.compensation.sweep`). Loses far fewer nats where matrices are nearly of full rank
      (language models), more where they are not (toy models at small sizes). It has no narrow subspaces and runs as
      dense as before.

    Args:
        graph: a captured graph with no edge cut.
        data: calibration data; 64 to 256 sequences do.
        scope: the signal whose nats count.
        size: the share of the channels' numbers to keep, above 0 and at most 1; or
        kl_nats: the divergence to allow, in nats per token, measured on the calibration data.
        moments: from :func:`channel_moments`, to try several budgets on one pass.
        samples: cotangents per sequence.

    Returns:
        A graph of the same nodes and edges.

    Raises:
        InputError: not exactly one budget, one that is out of range, an unknown form, or a graph of convolutions.

    Cost:
        One forward and ``samples`` backward passes over the data, then eigendecompositions of the moments:
        O(d^3 + d_mlp^3) per layer. A budget in nats adds about eight forward passes over at most 64 sequences.
        ``"sparse"`` adds four forward passes over the data per layer for each size tried (one, or about eight).

    Exact?
        At size 1 nothing is lost. Below, the prediction is second order and treats matrices one by one; the loss
        measured afterwards (:func:`unweave.evaluate`) is what counts.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> small = unweave.compress(graph, unweave.load_data("zoo:induction", limit=32), size=0.5)
        >>> small.n_channel_parameters <= 0.5 * graph.n_channel_parameters
        True
    """
    if (size is None) == (kl_nats is None):
        raise InputError("give exactly one budget: size= (a share of the numbers) or kl_nats= (nats per token)")
    if size is not None and not 0 < size <= 1:
        raise InputError(f"size must be above 0 and at most 1, got {size}")
    if kl_nats is not None and not (kl_nats > 0 and math.isfinite(kl_nats)):
        raise InputError(f"kl_nats must be a positive number, got {kl_nats}")
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    check_matrices(graph)
    scope = scope or Scope()
    if moments is None:
        moments = channel_moments(
            graph, data, scope, samples=samples, batch_size=batch_size, seed=seed, progress=progress
        )
    at_size = _sizes(form, graph, data, moments, batch_size, progress)
    if size is not None:
        return at_size(size)
    assert kl_nats is not None
    return _to_error(at_size, graph, data.select(slice(0, 64)), scope, kl_nats, batch_size)


def _sizes(
    form: str,
    graph: Graph,
    data: TokenData,
    moments: Mapping[int, ChannelMoments],
    batch_size: int,
    progress: bool | None,
) -> Callable[[float], Graph]:
    """What gives the graph of a form at any size."""
    if form == "low-rank":
        return Budgeter(graph, moments).at_size
    masker = Masker(graph, moments)

    def at_size(size: float) -> Graph:
        small = masker.at_size(size)
        return small if size == 1 else sweep(small, graph, data, moments, batch_size=batch_size, progress=progress)

    return at_size


class Budgeter:
    """All parts of a graph's channels, ready to be allocated at any size, once plain layers are narrowed."""

    def __init__(self, graph: Graph, moments: Mapping[int, ChannelMoments]) -> None:
        self.graph = graph
        self.options = [_Allocation(narrowing) for narrowing in narrowings(graph, moments)]

    def lossless(self) -> Graph:
        """The smallest graph that loses nothing, as predicted without giving up neurons of plain layers."""
        return self.options[0].build(self.options[0].lossless)

    def at_size(self, size: float) -> Graph:
        """The best graph predicted for a size; the graph itself for 1.

        Raises:
            InputError: the size is smaller than biases and norms.
        """
        if size == 1:
            return self.graph
        numbers = size * self.graph.n_channel_parameters
        found = [(chosen, o) for o in self.options if (chosen := o.choose(numbers)) is not None]
        if not found:
            raise InputError(f"size {size:.3g} is smaller than the biases and norms alone; ask for more")
        chosen, option = min(found, key=lambda pair: pair[1].nats + sum(c.nats for c in pair[0]))
        return option.build(chosen)


class _Allocation:
    """The parts of a graph, perhaps with some neurons given up, ready to be allocated."""

    def __init__(self, narrowing: Narrowing) -> None:
        self.graph, self.nats = narrowing.graph, narrowing.nats
        self.parts: list[tuple[int, Part]] = [
            (s, part) for s, m in narrowing.moments.items() for part in channel_parts(self.graph.stages[s], m)
        ]
        if not self.parts:
            raise InputError("this graph has no attention or MLP channel to compress")
        chosen = self.lossless
        # norms and other numbers that no choice touches
        self.fixed = self.build(chosen).n_channel_parameters - sum(c.numbers for c in chosen)

    @property
    def lossless(self) -> list[Choice]:
        """For each part the smallest choice that loses nothing."""
        return [part.choose(0.0) for _, part in self.parts]

    def choose(self, numbers: float) -> list[Choice] | None:
        """One choice per part, with what no choice touches at most so many numbers; None if none is as small."""
        target = numbers - self.fixed
        low, high = 1e-14, 1e4
        for _ in range(PRICE_STEPS):
            price = math.sqrt(low * high)
            over = sum(part.choose(price).numbers for _, part in self.parts) > target
            low, high = (price, high) if over else (low, price)
        chosen = [part.choose(high) for _, part in self.parts]
        if sum(c.numbers for c in chosen) > target:
            return None
        return self._spend(chosen, target - sum(c.numbers for c in chosen))

    def _spend(self, chosen: list[Choice], spare: float) -> list[Choice]:
        """Use what one price for all has left over, where it saves most."""
        chosen, little = list(chosen), WORTH_SPENDING * self.graph.n_channel_parameters
        while spare > little:
            larger = [part.within(c.numbers + spare) for (_, part), c in zip(self.parts, chosen, strict=True)]
            fits = [n.numbers <= c.numbers + spare for n, c in zip(larger, chosen, strict=True)]
            gains = [(c.nats - n.nats) * ok for n, c, ok in zip(larger, chosen, fits, strict=True)]
            best = max(range(len(gains)), key=gains.__getitem__)
            if gains[best] <= WORTHLESS:
                break
            spare -= larger[best].numbers - chosen[best].numbers
            chosen[best] = larger[best]
        return chosen

    def build(self, chosen: list[Choice]) -> Graph:
        """The graph in which every part is made into its choice."""
        stages = list(self.graph.stages)
        for (s, part), choice in zip(self.parts, chosen, strict=True):
            stages[s] = part.apply(stages[s], choice)
        return dataclasses.replace(self.graph, stages=tuple(stages))


def _to_error(
    at_size: Callable[[float], Graph], graph: Graph, data: TokenData, scope: Scope, kl_nats: float, batch_size: int
) -> Graph:
    """The smallest size whose measured error is within the budget, by bisection."""
    low, high, best = 0.0, 1.0, graph
    for _ in range(8):
        size = (low + high) / 2
        try:
            small = at_size(size)
        except InputError:
            low = size
            continue
        if mean_divergence(graph, small, data, scope, batch_size) <= kl_nats:
            high, best = size, small
        else:
            low = size
    return best


@torch.no_grad()
def mean_divergence(graph: Graph, other: Graph, data: TokenData, scope: Scope, batch_size: int = 16) -> float:
    """Nats per token in the scope between two graphs."""
    total: Tensor | float = 0.0
    tokens = 0
    for batch in data.batches(batch_size):
        context = check_inputs(graph, batch.inputs, batch.mask)
        reference, logits = trace(graph, context).output, trace(other, context).output
        total = total + divergence(scope, reference, logits, batch).double().sum()
        tokens += int(position_mask(scope, batch).sum())
    return float(total) / max(tokens, 1)
