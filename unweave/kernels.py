"""The weights of convolutional graphs as pictures: kernels between maps, multiplied out along a path, drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from unweave.errors import InputError, UnknownNameError
from unweave.graph import Edge, Graph, Stage
from unweave.ops import Chain, Convolution, Core, Joined, Pair, Placed, Pool

__all__ = [
    "compose_kernels",
    "draw_kernels",
    "expanded_kernels",
    "kernels_between",
    "kernels_into",
    "layers_of_maps",
]

# more pixels than a page should hold as rectangles
MOST_PIXELS = 40_000
GAP = 1
DIGITS = 2
WARM, COLD = (178, 24, 43), (33, 102, 172)


def layers_of_maps(graph: Graph) -> dict[str, int]:
    """The convolutional layers of a graph and the number of each one's stage.

    Example:
        >>> import unweave
        >>> layers_of_maps(unweave.capture("zoo:oriented_shapes"))
        {'conv1': 1, 'conv2': 2}
    """
    found = {}
    for s, stage in enumerate(graph.stages):
        if stage.write is not None and _sources(graph, s):
            found[_layer_of(stage)] = s
    return found


def kernels_into(
    graph: Graph, layer: str, edges: Iterable[Edge | str] | None = None, source: str | None = None
) -> Float[Tensor, "maps_out maps_in height width"]:
    """What each edge into the maps of a layer is: a kernel, slid over the map that it comes from.

    Args:
        layer: such as "conv2".
        edges: only these are shown; the others, and those that are cut in the graph, are zero.
        source: the layer whose maps are read, such as "conv1"; needed where several are: the ends of a skip
            connection, itself a convolution of 1 x 1 kernels (the identity's are ones).

    Raises:
        UnknownNameError: there is no such convolutional layer, or it does not read that source.
        InputError: several layers are read and none is named, an edge that the graph cannot have, or nodes that are
            no longer whole maps.

    Exact?
        Yes; a batch norm behind the convolution is in it. Maps of other groups have kernels of zeros.

    Example:
        >>> import unweave
        >>> kernels_into(unweave.capture("zoo:oriented_shapes"), "conv2").shape
        torch.Size([32, 12, 3, 3])
    """
    layers = layers_of_maps(graph)
    if layer not in layers:
        raise UnknownNameError("convolutional layer", layer, layers)
    s = layers[layer]
    stage, kept = graph.stages[s], graph.edge_matrix
    if edges is not None:
        kept = kept & graph.mark_edges(edges)
    convolution, maps = _pick(graph, layer, s, source)
    row = graph.port_starts[s, stage.ports[0].name]
    marks = kept[row : row + len(stage.nodes), graph.visible_writers(s)][:, maps]
    kernels = convolution.ungrouped()
    if marks.shape != kernels.shape[:2]:
        raise InputError(f"the nodes into {layer} are not one per map; take kernels of a graph before it is refined")
    return kernels * marks.to(kernels)[:, :, None, None]


def kernels_between(graph: Graph) -> dict[tuple[int, int], Float[Tensor, "maps_out maps_in height width"]]:
    """The kernels between whole maps by (stage that writes, stage that reads), whatever is cut.

    Left out are skips that only carry maps on unchanged, layers that are read in two ways at once, and stages whose
    nodes are not one per map.

    Example:
        >>> import unweave
        >>> {pair: kernels.shape for pair, kernels in kernels_between(unweave.capture("zoo:oriented_shapes")).items()}
        {(0, 1): torch.Size([12, 1, 5, 5]), (1, 2): torch.Size([32, 12, 3, 3])}
    """
    found = {}
    for s in layers_of_maps(graph).values():
        for source in _sources(graph, s).values():
            shape = len(graph.stages[s].nodes), len(graph.stages[source.stage].nodes)
            if source.convolution is None or _carries(source.convolution):
                continue
            kernels = source.convolution.ungrouped()
            if kernels.shape[:2] == shape:
                found[source.stage, s] = kernels
    return found


def _carries(convolution: Convolution) -> bool:
    """Whether each map is the one in its place, times 1."""
    kernels = convolution.kernels
    return kernels.shape[1:] == (1, 1, 1) and convolution.groups == len(kernels) and bool((kernels == 1).all())


@dataclass(frozen=True)
class _Source:
    """A layer that a stage reads: through what (None: through several at once), and which visible writers it is."""

    convolution: Convolution | None
    maps: slice
    stage: int


def _sources(graph: Graph, s: int) -> dict[str, _Source]:
    """The layers that a stage reads through convolutions."""
    stage, found = graph.stages[s], dict[str, _Source]()
    for map_ in (read.map for port in stage.ports for read in port.reads):
        parts = zip(map_.maps, map_.starts, strict=True) if isinstance(map_, Joined) else [(map_, 0)]
        for part, start in parts:
            first = 0
            for number, other in enumerate(graph.stages[slice(*stage.visible)], stage.visible[0]):
                at = other.write.start if isinstance(other.write, Placed) else 0
                if isinstance(part, Convolution) and at == start and other.write is not None:
                    only = None if _layer_of(other) in found else part
                    found[_layer_of(other)] = _Source(only, slice(first, first + len(other.nodes)), number)
                first += len(other.nodes)
    return found


def _layer_of(stage: Stage) -> str:
    return stage.nodes[0].rpartition(".map.")[0] or stage.nodes[0]


def _pick(graph: Graph, layer: str, s: int, source: str | None) -> tuple[Convolution, slice]:
    sources = _sources(graph, s)
    if source is None and len(sources) > 1:
        raise InputError(f"{layer} reads the maps of {' and '.join(sources)}; name one of them as source=")
    source = next(iter(sources)) if source is None else source
    if source not in sources:
        raise UnknownNameError(f"layer that {layer} reads", source, sources)
    convolution, maps = sources[source].convolution, sources[source].maps
    if convolution is None:
        raise InputError(f"{layer} reads the maps of {source} through several convolutions at once: no one kernel each")
    return convolution, maps


def compose_kernels(
    later: Float[Tensor, "maps_out middle h w"],
    earlier: Float[Tensor, "middle maps_in k l"],
    stride: Pair = (1, 1),
) -> Float[Tensor, "maps_out maps_in height width"]:
    """The kernels of two convolutions in a row: E[o, i, c] = sum over m, a of later[o, m, a] earlier[m, i, c - s a].

    Args:
        stride: s, by which ``earlier`` moves.

    Exact?
        Yes away from padded borders, for convolutions with nothing between them.
    """
    return F.conv_transpose2d(later, earlier, stride=stride)


def expanded_kernels(graph: Graph, layer: str) -> Float[Tensor, "maps_out maps_in height width"]:
    """Kernels from the image itself to the maps of a layer: what they would see if the layers between were linear.

    Args:
        layer: such as "conv2".

    Raises:
        UnknownNameError: there is no such convolutional layer.
        InputError: a layer on the way reads several others, so that there are several ways.

    Exact?
        Where nothing but average pooling is between. Activations are left out, the largest of a window counts as its
        mean, borders as if there were none: a picture of what is looked for, not of what is computed.

    Example:
        >>> import unweave
        >>> expanded_kernels(unweave.capture("zoo:oriented_shapes"), "conv2").shape
        torch.Size([32, 1, 10, 10])

    Source:
        Voss et al. 2021, "Visualizing Weights" (expanded weights).
    """
    layers = layers_of_maps(graph)
    if layer not in layers:
        raise UnknownNameError("convolutional layer", layer, layers)
    found: Tensor | None = None
    stride = (1, 1)
    for name, s in layers.items():
        convolution, _ = _pick(graph, name, s, None)
        own = _dilate(kernels_into(graph, name), convolution.dilation)
        found = own if found is None else compose_kernels(own, found, stride)
        stride = _times(stride, convolution.stride)
        if name == layer:
            break
        for pool in _pools(graph.stages[s].core):
            window = torch.full(pool.kernel, 1.0 / (pool.kernel[0] * pool.kernel[1])).to(found)
            eye = torch.eye(len(found)).to(found)
            found = compose_kernels(torch.einsum("om,hw->omhw", eye, window), found, stride)
            stride = _times(stride, pool.stride)
    assert found is not None
    return found


def draw_kernels(
    kernels: Float[Tensor, "rows columns height width"],
    *,
    pixel: int = 4,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> str:
    """Kernels as a table of pictures, one SVG element without scripts or outside references: red adds, blue inhibits.

    Args:
        kernels: one row per map made, one column per map read; colours are scaled by the largest weight of all.
        pixel: the side of a weight, in units of the page.
        names: of rows and columns, shown when pointed at.

    Raises:
        InputError: too many weights for a page, or not finite.

    Example:
        >>> draw_kernels(torch.tensor([[[[1.0, -1.0]]]]))[:30]
        '<svg xmlns="http://www.w3.org/'
    """
    rows, columns, height, width = kernels.shape
    if kernels.numel() > MOST_PIXELS:
        raise InputError(f"{kernels.numel():,} weights are too many for one picture; show at most {MOST_PIXELS:,}")
    if not bool(torch.isfinite(kernels).all()):
        raise InputError("kernels hold NaN or inf and cannot be drawn")
    shares = (kernels / kernels.abs().max().clamp(min=1e-30)).detach().cpu().tolist()
    step_x, step_y = pixel * (width + GAP), pixel * (height + GAP)
    parts = []
    for i, row in enumerate(shares):
        for j, picture in enumerate(row):
            title = "" if names is None else f"<title>{escape(names[1][j])} to {escape(names[0][i])}</title>"
            squares = "".join(
                f'<rect x="{x * pixel}" y="{y * pixel}" width="{pixel}" height="{pixel}" fill="{_colour(share)}"/>'
                for y, line in enumerate(picture)
                for x, share in enumerate(line)
            )
            parts.append(f'<g transform="translate({j * step_x} {i * step_y})">{title}{squares}</g>')
    size = f'width="{columns * step_x}" height="{rows * step_y}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} shape-rendering="crispEdges">{"".join(parts)}</svg>'


def _colour(share: float) -> str:
    """White for 0, red for 1, blue for -1."""
    end = WARM if share > 0 else COLD
    mixed = [round(255 + (c - 255) * abs(share)) for c in end]
    return "#" + "".join(f"{c:0{DIGITS}x}" for c in mixed)


def _pools(core: Core) -> list[Pool]:
    steps = core.steps if isinstance(core, Chain) else (core,)
    return [step for step in steps if isinstance(step, Pool)]


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0], a[1] * b[1]


def _dilate(kernels: Float[Tensor, "o i h w"], dilation: Pair) -> Float[Tensor, "o i height width"]:
    """The same kernels with the holes of a dilated convolution written out as zeros."""
    height, width = ((n - 1) * d + 1 for n, d in zip(kernels.shape[2:], dilation, strict=True))
    out = repeat(kernels.new_zeros(1), "1 -> o i h w", o=kernels.shape[0], i=kernels.shape[1], h=height, w=width)
    out = out.clone()
    out[:, :, :: dilation[0], :: dilation[1]] = kernels
    return out
