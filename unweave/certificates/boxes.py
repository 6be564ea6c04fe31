"""How far a graph can be from its model on a whole box of inputs: linear bounds, then branch and bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unweave.certificates.bounds import (
    ROUNDING,
    Boxes,
    Functional,
    LayerBounds,
    blame_inputs,
    interval_bounds,
    layer_bounds,
    upper_bounds,
)
from unweave.certificates.chains import ChainPair, pair_up
from unweave.certificates.divergence import PairBounds, largest_kl
from unweave.errors import EmptyDataError, InputError, ShapeError
from unweave.graph import Graph
from unweave.progress import counter

__all__ = ["BoxCertificate", "certify_boxes"]

QUANTITIES = ("output", "kl")
BOXES_AT_ONCE = 256
# of the boxes that are open, one in so many is halved before they are ranked again
ROUND_SHARE = 8
SEARCH_STARTS, SEARCH_STEPS = 1024, 100
# nats under which the second order of the KL is climbed instead
SMALL_KL = 1e-3
# the search for inputs starts again from the worst boxes whenever there are so many times as many
SEARCH_AGAIN = 4


@dataclass(frozen=True, eq=False)
class BoxCertificate:
    """A sound bound on how far a graph is from its model over boxes, and how tight it is.

    Attributes:
        quantity: "output" (largest absolute difference of an output) or "kl" (nats).
        bound: no input of the boxes has more.
        found: the most that was found.
        found_at: the input that has it.
        unsplit_bound: the bound before any box was split.
        interval_bound: what plain interval propagation gives, without splitting.
        n_boxes: how many boxes were bounded.
        finished: whether the bound came within the factor asked for.
    """

    quantity: str
    bound: float
    found: float
    found_at: Float[Tensor, " d_input"]
    unsplit_bound: float
    interval_bound: float
    n_boxes: int
    finished: bool

    @property
    def tightness(self) -> float:
        """bound / found: 1 is exact."""
        return self.bound / self.found if self.found > 0 else math.inf


def certify_boxes(
    graph: Graph,
    original: Graph,
    low: Float[Tensor, "*box d_input"],
    high: Float[Tensor, "*box d_input"],
    *,
    quantity: str = "output",
    factor: float = 2.0,
    limit: int = 100_000,
    tolerance: float = 1e-6,
    pairing: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> BoxCertificate:
    """A bound on max over x in the boxes, and outputs i, of |graph_i(x) - original_i(x)|, or of the KL.

    Linear bounds of the difference are taken back to the inputs (see :mod:`unweave.certificates.bounds`); the boxes
    with the largest bounds are halved, along the input that most moves the bound and makes neurons uncertain that it
    hears, until no bound is above ``factor`` times the largest difference found. The KL is bounded by what the bounds
    of all logit differences allow (see :mod:`unweave.certificates.divergence`). What was found is the best of gradient
    ascent from random inputs, corners and the worst boxes; a worse input may exist.

    Args:
        graph: a graph of the same depth as the original; compressed, narrowed, restricted or refined.
        low, high: corners of one box, or of several; inputs in the units of the network.
        factor: stop when bound <= factor x found.
        limit: give up (with what is proved by then) after so many boxes.
        tolerance: a bound below this is good enough whatever was found: differences in outputs, or nats.
        pairing: False bounds the two networks apart, neuron by neuron (for comparison).
        seed: of the starting points of the search.

    Raises:
        InputError: boxes that are empty, infinite or NaN, or an unusable factor or limit.
        ShapeError: boxes of another width than the inputs.
        UnsupportedModelError: attention, norms, tokens, or an activation without bounds.

    Cost:
        Per box, about 6 times the widths' products of every pair of layers; memory for 2 d_input numbers a box.

    Exact?
        An upper bound for the functions in real arithmetic with the weights as stored. The bounds are computed in
        float64 and moved outwards by 1e-10 of the sums they are made of, not by directed rounding; a run in float32 can
        differ from the real function by its own rounding, which is not covered.

    Example:
        >>> import torch, unweave
        >>> model = unweave.capture("zoo:retina")
        >>> same = certify_boxes(model, model, -torch.ones(8), torch.ones(8))
        >>> same.bound < 1e-6
        True

    Source:
        Zhang et al. 2018 (CROWN); Paulsen et al. 2020 (ReluDiff); Bunel et al. 2018 for branch and
        bound; Wang et al. 2018 ("Efficient Formal Safety Analysis") for splitting by what is uncertain.
    """
    if quantity not in QUANTITIES:
        raise InputError(f"unknown quantity {quantity!r}; choose one of {', '.join(QUANTITIES)}")
    if not (math.isfinite(factor) and factor > 1) or limit < 1 or not tolerance > 0:
        raise InputError(
            f"factor must be above 1, limit at least 1 and tolerance above 0: {factor}, {limit}, {tolerance}"
        )
    pair = pair_up(graph, original)
    boxes = _checked(low, high, pair.d_input)
    search = _Search(pair, quantity, pairing)
    search.start(boxes, seed)
    return search.run(boxes, factor, limit, tolerance, progress)


def _checked(low: Tensor, high: Tensor, d_input: int) -> Boxes:
    if low.shape != high.shape or low.ndim not in (1, 2) or low.shape[-1] != d_input:
        raise ShapeError(
            f"corners must both be [{d_input}] or [box, {d_input}], got {tuple(low.shape)} and {tuple(high.shape)}"
        )
    low, high = (t.detach().cpu().double().reshape(-1, d_input) for t in (low, high))
    if len(low) == 0:
        raise EmptyDataError("there is no box; give at least one")
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise InputError("a corner is NaN or infinite; bounds need boxes of finite size")
    if bool((low > high).any()):
        row, column = (low > high).nonzero()[0].tolist()
        raise InputError(f"box {row} is empty: input {column} runs from {low[row, column]} to {high[row, column]}")
    return Boxes(low, high)


class _Search:
    """Branch and bound over boxes, with the largest difference found so far."""

    def __init__(self, pair: ChainPair, quantity: str, pairing: bool) -> None:
        self.pair, self.quantity, self.pairing = pair, quantity, pairing
        self.found, self.found_at = -1.0, torch.zeros(pair.d_input, dtype=torch.float64)
        eye = torch.eye(pair.d_out, dtype=torch.float64)
        self.first, self.second = torch.triu_indices(pair.d_out, pair.d_out, 1)
        self.pairs = eye[self.first] - eye[self.second]
        self.signed = torch.cat([eye, -eye])

    # ---- points ----

    def values(self, x: Float[Tensor, "n d_input"]) -> Float[Tensor, " n"]:
        """The quantity at some inputs."""
        if self.quantity == "output":
            return self.pair.difference(x).abs().amax(1)
        p, q = (F.log_softmax(chain.run(x), dim=1) for chain in (self.pair.original, self.pair.graph))
        return (p.exp() * (p - q)).sum(1)

    def look(self, x: Float[Tensor, "n d_input"]) -> None:
        """Keep the best of some inputs."""
        values = self.values(x)
        best = int(values.argmax())
        if float(values[best]) > self.found:
            self.found, self.found_at = float(values[best]), x[best].clone()

    def start(self, boxes: Boxes, seed: int) -> None:
        """Search from random points and corners of the boxes."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(len(boxes), (SEARCH_STARTS,), generator=generator)
        low, high = boxes.low[which], boxes.high[which]
        share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
        share[::2] = share[::2].round()
        self.climb(low + share * (high - low), low, high)

    def climb(self, x: Float[Tensor, "n d_input"], low: Tensor, high: Tensor) -> None:
        """Signed gradient ascent within [low, high], by smaller and smaller steps."""
        for step in range(SEARCH_STEPS):
            self.look(x)
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self._height(x).sum(), x)
            x = x.detach() + 0.25 * (1 - step / SEARCH_STEPS) ** 2 * (high - low) * grad.sign()
            x = torch.minimum(torch.maximum(x, low), high)
        self.look(x)

    def _height(self, x: Float[Tensor, "n d_input"]) -> Float[Tensor, " n"]:
        """What is climbed: the quantity; of the KL the logarithm, by its second order where it is small.

        A sure model leaves the KL flat, and the computed one 0.
        """
        values = self.values(x)
        if self.quantity == "output" or self.pair.d_out == 1:
            return values
        log_p, d = F.log_softmax(self.pair.original.run(x), dim=1), self.pair.difference(x)
        i, j = self.first, self.second
        small = (log_p[:, i] + log_p[:, j] + 2 * ((d[:, i] - d[:, j]).abs() + 1e-30).log()).logsumexp(1)
        return torch.where(values > SMALL_KL, values.clamp(min=SMALL_KL).log(), small)

    # ---- bounds ----

    @torch.no_grad()
    def bound(self, boxes: Boxes) -> tuple[Float[Tensor, " box"], Int[Tensor, " box"]]:
        """A bound of the quantity over each box, and the input to halve it along."""
        layers = layer_bounds(self.pair, boxes, pairing=self.pairing)
        if self.quantity == "output":
            worst, forms = upper_bounds(self.pair, boxes, layers, _of_difference(self.signed))
            most, row = worst.max(1)
            most, wanted = most.clamp(min=0), self.signed[row]
        else:
            most, wanted, forms, row = self._bound_kl(boxes, layers)
        form = forms[torch.arange(len(boxes)), row]
        self.look((boxes.low + boxes.high) / 2)
        self.look(torch.where(form > 0, boxes.high, boxes.low))
        blame = blame_inputs(self.pair, boxes, layers, _of_difference(wanted[:, None]))
        return most, _which_input(boxes.high - boxes.low, blame, form)

    def _bound_kl(self, boxes: Boxes, layers: list[LayerBounds]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(bounds, the differences that make them, linear forms of all rows, the row of that difference)."""
        one, none = self.pairs, torch.zeros_like(self.pairs)
        rows = Functional(torch.cat([none, none, one, -one, one, -one]), torch.cat([one, -one, none, none, one, -one]))
        ends, forms = upper_bounds(self.pair, boxes, layers, rows)
        up_d, low_d, up_b, low_b, up_a, low_a = ends.chunk(6, dim=1)
        bounds = PairBounds(self.first, self.second, (-low_b, up_b), (-low_a, up_a), (-low_d, up_d))
        most, parts = largest_kl(bounds, self.pair.d_out)
        row = parts.argmax(1)
        row = row + len(one) * (low_d > up_d).gather(1, row[:, None])[:, 0]
        return (1 + ROUNDING) * most + ROUNDING, torch.cat([one, -one])[row], forms, row

    # ---- the search ----

    def run(self, boxes: Boxes, factor: float, limit: int, tolerance: float, progress: bool | None) -> BoxCertificate:
        """Split until the bound is good enough, or ``limit`` boxes were bounded."""
        worst, cut = self._bound_all(boxes)
        unsplit, done, n_boxes, searched = float(worst.max()), 0.0, len(boxes), BOXES_AT_ONCE
        by_intervals = self._by_intervals(boxes)
        with counter("branch and bound", -(-limit // BOXES_AT_ONCE), show=progress) as count:
            while True:
                is_open = worst > max(factor * self.found, tolerance)
                done = max(done, float(torch.where(is_open, 0.0, worst).max()))
                if not bool(is_open.any()) or n_boxes >= limit:
                    break
                boxes, worst, cut = _select(boxes, is_open), worst[is_open], cut[is_open]
                if n_boxes >= searched:
                    searched *= SEARCH_AGAIN
                    self._search_worst(boxes, worst)
                n = min(len(worst), max(BOXES_AT_ONCE // 2, len(worst) // ROUND_SHARE), -(-(limit - n_boxes) // 2))
                boxes, worst, cut = self._split(boxes, worst, cut, n)
                n_boxes += 2 * n
                for _ in range(0, 2 * n, BOXES_AT_ONCE):
                    count()
        bound, finished = max(done, float(worst.max())), not bool(is_open.any())
        return BoxCertificate(self.quantity, bound, self.found, self.found_at, unsplit, by_intervals, n_boxes, finished)

    def _search_worst(self, boxes: Boxes, worst: Tensor) -> None:
        """Search from the centres of the boxes with the largest bounds, no farther than all open boxes reach."""
        top = _select(boxes, worst.topk(min(len(worst), SEARCH_STARTS)).indices)
        self.climb((top.low + top.high) / 2, top.low, top.high)

    def _split(self, boxes: Boxes, worst: Tensor, cut: Tensor, n: int) -> tuple[Boxes, Tensor, Tensor]:
        """The boxes after the n with the largest bounds were halved."""
        picked = worst.topk(n).indices
        halves = _halves(_select(boxes, picked), cut[picked])
        new, new_cut = self._bound_all(halves)
        new = torch.minimum(new, worst[picked].repeat(2))  # a half is no worse than the whole
        rest = torch.ones(len(worst), dtype=torch.bool).index_fill_(0, picked, False)
        left = Boxes(torch.cat([boxes.low[rest], halves.low]), torch.cat([boxes.high[rest], halves.high]))
        return left, torch.cat([worst[rest], new]), torch.cat([cut[rest], new_cut])

    def _bound_all(self, boxes: Boxes) -> tuple[Tensor, Tensor]:
        """:meth:`bound` of any number of boxes."""
        if self.pair.d_out == 1 and self.quantity == "kl":  # a softmax over one output says nothing
            return torch.zeros(len(boxes), dtype=torch.float64), torch.zeros(len(boxes), dtype=torch.long)
        ends = zip(boxes.low.split(BOXES_AT_ONCE), boxes.high.split(BOXES_AT_ONCE), strict=True)
        worst, cut = zip(*(self.bound(Boxes(low, high)) for low, high in ends), strict=True)
        return torch.cat(worst), torch.cat(cut)

    def _by_intervals(self, boxes: Boxes) -> float:
        most = float(interval_bounds(self.pair, boxes).max())
        return most if self.quantity == "output" else min(2 * most, most**2 / 2)


def _of_difference(rows: Float[Tensor, "*box row d_out"]) -> Functional:
    return Functional(torch.zeros_like(rows), rows)


def _which_input(
    width: Float[Tensor, "box d_input"], blame: Float[Tensor, "box d_input"], form: Float[Tensor, "box d_input"]
) -> Int[Tensor, " box"]:
    """The input with the largest sum of its shares in what is uncertain and in how far the bound's linear form moves.

    The first alone never narrows small differences of graph and model; the second alone leaves uncertain neurons be.
    Where there is neither, the widest.
    """
    first, second, third = (
        t / t.sum(1, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny) for t in (blame, form.abs() * width, width)
    )
    return (first + second + 0.01 * third).argmax(1)


def _select(boxes: Boxes, which: Tensor) -> Boxes:
    return Boxes(boxes.low[which], boxes.high[which])


def _halves(boxes: Boxes, cut: Int[Tensor, " box"]) -> Boxes:
    """Every box in two along one input, lower halves first."""
    here = F.one_hot(cut, boxes.low.shape[1]).bool()
    middle = (boxes.low + boxes.high) / 2
    low, high = torch.where(here, middle, boxes.low), torch.where(here, middle, boxes.high)
    return Boxes(torch.cat([boxes.low, low]), torch.cat([high, boxes.high]))
