"""Bounds of a sum of outputs of two chains, and of their differences, over boxes of inputs.

With b what a neuron of the model hears, a = b + d what the same neuron of the graph hears, a linear functional of the
outputs is taken back through the layers as coefficients of (b, d), neuron by neuron. Where both neurons are on the
same side of their kink, or d is small, f(b + d) - f(b) is bounded by lines in d alone, m d <= f(b + d) - f(b) <= M d
with [m, M] the slopes f can have: there what graph and model share cancels. Elsewhere f(a) and f(b) are bounded by
lines of their own. At the inputs, both halves add to one linear form, whose extremes over a box are at its corners.

Source: Zhang et al. 2018 (CROWN) and Singh et al. 2019 (DeepPoly) for linear bounds taken backwards; Paulsen et al.
2020, "ReluDiff", for bounds of the difference of two networks neuron by neuron.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.certificates.chains import Affine, ChainPair
from unweave.certificates.slopes import Lines, lines, slope_range
from unweave.ops import ACTIVATIONS

__all__ = ["Boxes", "Functional", "LayerBounds", "blame_inputs", "interval_bounds", "layer_bounds", "upper_bounds"]

# Bounds are moved outwards by this share of the sums of absolute values that they are made of. Sums of a few hundred
# terms in float64 err by a share of about 1e-13 of them; directed rounding is not used.
ROUNDING = 1e-10

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of inputs: all x with low <= x <= high."""

    low: Float[Tensor, "box d_input"]
    high: Float[Tensor, "box d_input"]

    def __len__(self) -> int:
        return len(self.low)

    @property
    def reach(self) -> Float[Tensor, "box d_input"]:
        """The largest absolute value of each input."""
        return torch.maximum(self.low.abs(), self.high.abs())


@dataclass(frozen=True, eq=False)
class Functional:
    """Rows of coefficients: original . b + difference . d at some layer (or the outputs)."""

    original: Float[Tensor, "*box row neuron"]
    difference: Float[Tensor, "*box row neuron"]


@dataclass(frozen=True, eq=False)
class LayerBounds:
    """Where the neurons of a layer can be, and the lines that bound what comes out of them, box by box.

    Attributes:
        original, graph, difference: the intervals of b, a and d.
        paired: where f(a) - f(b) is bounded by lines in d; elsewhere f(a) and f(b) are bounded apart.
        of_original, of_graph: lines of f over b and a.
        of_difference: lines in d of f(a) - f(b).
        forms: what the upper bounds of b were read off: their slopes in every input.
    """

    original: Interval
    graph: Interval
    difference: Interval
    paired: Bool[Tensor, "box neuron"]
    of_original: Lines
    of_graph: Lines
    of_difference: Lines
    forms: Float[Tensor, "box neuron d_input"]

    @property
    def reach(self) -> tuple[Tensor, Tensor]:
        """The largest absolute values of b and d."""
        (bl, bu), (dl, du) = self.original, self.difference
        return torch.maximum(bl.abs(), bu.abs()), torch.maximum(dl.abs(), du.abs())


def _difference_lines(name: str, layer: tuple[Interval, Interval, Interval]) -> Lines:
    """Lines in d of f(b + d) - f(b)."""
    (bl, bu), (al, au), (dl, du) = layer
    least, most = slope_range(name, torch.minimum(bl, al), torch.maximum(bu, au))
    width = torch.where(du > dl, du - dl, 1.0)

    def at(d: Tensor, steep: Tensor, flat: Tensor) -> Tensor:
        return torch.where(d >= 0, steep, flat) * d

    top = (at(dl, most, least), at(du, most, least))
    bottom = (at(dl, least, most), at(du, least, most))
    rises = [torch.where(du > dl, (end - start) / width, most) for start, end in (top, bottom)]
    upper, lower = ((rise, start - rise * dl) for rise, (start, _) in zip(rises, (top, bottom), strict=True))
    gap = (most - least) * torch.maximum(dl.abs(), du.abs())
    return Lines(lower, upper, gap)


def _layer(name: str, bounds: tuple[Interval, Interval, Interval], forms: Tensor, pairing: bool) -> LayerBounds:
    (bl, bu), (al, au), (dl, du) = bounds
    # what is known of two of a, b, d bounds the third
    al, au = torch.maximum(al, bl + dl), torch.minimum(au, bu + du)
    dl, du = torch.maximum(dl, al - bu), torch.minimum(du, au - bl)
    au, du = torch.maximum(al, au), torch.maximum(dl, du)
    of_b, of_a = lines(name, bl, bu), lines(name, al, au)
    of_d = _difference_lines(name, ((bl, bu), (al, au), (dl, du)))
    paired = (of_d.gap <= of_a.gap + of_b.gap) if pairing else torch.zeros_like(bl, dtype=torch.bool)
    return LayerBounds((bl, bu), (al, au), (dl, du), paired, of_b, of_a, of_d, forms)


def upper_bounds(
    pair: ChainPair, boxes: Boxes, layers: list[LayerBounds], rows: Functional
) -> tuple[Float[Tensor, "box row"], Float[Tensor, "box row d_input"]]:
    """The largest value each row can take over each box, and the linear form that it was read off.

    Args:
        layers: the bounds of all layers before the one that the rows are about.
    """
    at_b, at_d = (t.expand(len(boxes), *t.shape[-2:]) for t in (rows.original, rows.difference))
    total = at_b.new_zeros(at_b.shape[:2])
    size = torch.zeros_like(total)
    for i in range(len(layers), -1, -1):
        model, graph = pair.original.maps[i], pair.graph.maps[i]
        change = Affine(graph.weight - model.weight, graph.bias - model.bias)
        total = total + at_b @ model.bias + at_d @ change.bias
        # how large the summands are: of this map, and of the neurons that the coefficients are about
        sizes_b, sizes_d = model.bias.abs(), graph.bias.abs() + model.bias.abs()
        if i < len(layers):
            sizes_b, sizes_d = sizes_b + layers[i].reach[0], sizes_d + layers[i].reach[1]
        size = size + (at_b.abs() @ sizes_b[..., None] + at_d.abs() @ sizes_d[..., None])[..., 0]
        on_b, on_d = at_b @ model.weight + at_d @ change.weight, at_d @ graph.weight
        if i == 0:
            break
        at_b, at_d, shift = _through(layers[i - 1], on_b, on_d)
        total, size = total + shift, size + shift.abs()
    ends = (on_b.clamp(min=0) @ boxes.high[..., None] + on_b.clamp(max=0) @ boxes.low[..., None])[..., 0]
    size = size + (on_b.abs() @ boxes.reach[..., None])[..., 0]
    return total + ends + ROUNDING * (1 + size), on_b


def _through(
    layer: LayerBounds, on_b: Float[Tensor, "box row neuron"], on_d: Float[Tensor, "box row neuron"]
) -> tuple[Tensor, Tensor, Float[Tensor, "box row"]]:
    """Coefficients of f(b) and f(a) - f(b) as coefficients of b and d, and what is left over."""
    paired = layer.paired[:, None]
    parts = [
        # f(b) + (f(a) - f(b)) is f(a) where the two are bounded apart
        (torch.where(paired, on_b, on_b - on_d), layer.of_original.lower, layer.of_original.upper),
        (torch.where(paired, 0.0, on_d), layer.of_graph.lower, layer.of_graph.upper),
        (torch.where(paired, on_d, 0.0), layer.of_difference.lower, layer.of_difference.upper),
    ]
    slopes = []
    shift = on_b.new_zeros(on_b.shape[:2])
    for on, lower, upper in parts:
        more = on.clamp(min=0)
        slopes.append(torch.addcmul(on * lower[0][:, None], more, (upper[0] - lower[0])[:, None]))
        shift = shift + (more @ (upper[1] - lower[1])[..., None])[..., 0]
        if lower[1].any():
            shift = shift + (on @ lower[1][..., None])[..., 0]
    of_b, of_a, of_d = slopes
    return of_b + of_a, of_a + of_d, shift


def blame_inputs(
    pair: ChainPair, boxes: Boxes, layers: list[LayerBounds], rows: Functional
) -> Float[Tensor, "box d_input"]:
    """By how much the lines of all neurons can miss a row of each box, blamed on inputs that make neurons uncertain.

    What a neuron's lines miss, times the coefficient with which the row hears it, is shared among the inputs in
    proportion to how far each moves the neuron in the box.

    Args:
        rows: one row for every box.
    """
    width = (boxes.high - boxes.low)[:, None]
    at_b, at_d = rows.original, rows.difference
    blame = torch.zeros_like(boxes.low)
    for i in range(len(layers), 0, -1):
        model, graph, layer = pair.original.maps[i], pair.graph.maps[i], layers[i - 1]
        on_b, on_d = at_b @ model.weight + at_d @ (graph.weight - model.weight), at_d @ graph.weight
        paired, alone = layer.paired[:, None], (on_b - on_d).abs() * layer.of_original.gap[:, None]
        together = on_b.abs() * layer.of_original.gap[:, None] + on_d.abs() * layer.of_difference.gap[:, None]
        missed = torch.where(paired, together, alone + on_d.abs() * layer.of_graph.gap[:, None])
        moves = layer.forms.abs() * width
        moves = moves / moves.sum(-1, keepdim=True).clamp(min=torch.finfo(moves.dtype).tiny)
        blame = blame + (missed @ moves)[:, 0]
        at_b, at_d, _ = _through(layer, on_b, on_d)
    return blame


def layer_bounds(pair: ChainPair, boxes: Boxes, *, pairing: bool = True) -> list[LayerBounds]:
    """The bounds of every hidden layer, each from those before it.

    Args:
        pairing: whether differences of neurons may be bounded by lines of their own.

    Cost:
        Per box and layer, one product of 6n rows with the matrices of every layer before it.
    """
    layers: list[LayerBounds] = []
    for i, name in enumerate(pair.original.activations):
        eye = torch.eye(len(pair.original.maps[i].bias), dtype=torch.float64)
        nothing = torch.zeros_like(eye)
        b, d = torch.cat([eye, nothing, eye]), torch.cat([nothing, eye, eye])
        highest, forms = upper_bounds(pair, boxes, layers, Functional(torch.cat([b, -b]), torch.cat([d, -d])))
        up_b, up_d, up_a, low_b, low_d, low_a = highest.chunk(6, dim=1)
        ends = ((-low_b, up_b), (-low_a, up_a), (-low_d, up_d))
        layers.append(_layer(name, ends, forms[:, : len(eye)], pairing))
    return layers


def interval_bounds(pair: ChainPair, boxes: Boxes) -> Float[Tensor, "box d_out"]:
    """Bounds of |a - b| by intervals sent forward through both chains apart: the baseline."""
    ends = []
    for chain in (pair.graph, pair.original):
        low, high = boxes.low, boxes.high
        for i, linear in enumerate(chain.maps):
            middle, half = (low + high) / 2, (high - low) / 2
            centre, spread = middle @ linear.weight.T + linear.bias, half @ linear.weight.abs().T
            spread = spread + ROUNDING * (1 + middle.abs() @ linear.weight.abs().T + linear.bias.abs() + spread)
            low, high = centre - spread, centre + spread
            if i < len(chain.activations):
                name = chain.activations[i]
                low, high = _image(name, low, high)
        ends.append((low, high))
    (al, au), (bl, bu) = ends
    return torch.maximum(au - bl, bu - al)


def _image(name: str, low: Tensor, high: Tensor) -> Interval:
    """An interval that holds what an activation makes of one."""
    least, _ = slope_range(name, low, high)
    f = ACTIVATIONS[name]
    # where it may fall, the lines say more than the ends do
    around = lines(name, low, high)
    under = torch.minimum(around.lower[0] * low, around.lower[0] * high) + around.lower[1]
    over = torch.maximum(around.upper[0] * low, around.upper[0] * high) + around.upper[1]
    return torch.where(least >= 0, f(low), under), torch.where(least >= 0, f(high), over)
