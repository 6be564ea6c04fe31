"""Convolutional networks, residual ones too: every feature map is a node, every edge between maps is a kernel.

A stage is what lies between one set of maps and the next: convolutions with their batch norms multiplied in, whatever
is added to them (a skip connection is one more convolution, of 1 x 1 kernels), an activation, pooling. The code of a
map is its pixels. There is no residual stream that all share; a map writes to a place of its own in the stream of those
layers that some stage hears together: the two ends of a skip connection and what is between them.

The network begins with ``nn.Unflatten(1, (channels, height, width))``: it reads vectors, as graphs do, and says how
they are images. What follows may be any module: it is run once and read off the functions that it calls.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unweave.architectures.calls import ACTIVATION_CALLS, POOLING_CALLS, Call, record_calls
from unweave.errors import UnsupportedModelError
from unweave.graph import Graph, Port, Read, Stage
from unweave.ops import (
    Activation,
    BlockMap,
    Chain,
    Convolution,
    Core,
    Dense,
    DenseBlocks,
    FloatInput,
    Identity,
    Joined,
    LinearMap,
    Pair,
    Placed,
    Pool,
    Readout,
)

__all__ = ["capture_convolutional", "is_convolutional"]

Term = tuple[int, LinearMap]


@dataclass(frozen=True, eq=False)
class _Value:
    """A sum of linear maps of what stages write, and what is then done to it.

    Attributes:
        terms: (number of a stage, map) each.
        bias: one number per map, or per feature where there are no maps.
        maps: how many; 1 for a vector of features.
        size: rows and columns of each; None for features.
        width: of a map or of the features.
        stage: where it is written as it is; None if nowhere.
        name: of the weights that make it.
    """

    terms: tuple[Term, ...]
    bias: Tensor | None
    maps: int
    size: Pair | None
    width: int
    steps: tuple[Core, ...] = ()
    stage: int | None = None
    name: str = ""

    def then(self, step: Core, size: Pair | None) -> _Value:
        width = self.width if size is None else size[0] * size[1]
        return dataclasses.replace(self, steps=(*self.steps, step), size=size, width=width, stage=None)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A stage before its stream is known."""

    name: str
    value: _Value

    @property
    def sources(self) -> range:
        """The stages from the first to the last that it hears."""
        heard = [source for source, _ in self.value.terms]
        return range(min(heard), max(heard) + 1) if heard else range(0)


def is_convolutional(model: nn.Sequential) -> bool:
    """Whether an ``nn.Sequential`` holds a convolution."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def capture_convolutional(model: nn.Sequential) -> Graph:
    """A network of convolutions, skip connections, activations, pooling and linear layers, map by map."""
    first = next(iter(model), None)
    if not isinstance(first, nn.Unflatten) or len(first.unflattened_size) != 3 or first.dim != 1:
        raise UnsupportedModelError(
            "a convolutional network must begin with nn.Unflatten(1, (channels, height, width)), which says how the "
            "vectors that it reads are images: nn.Sequential(nn.Unflatten(1, (3, 32, 32)), model)"
        )
    image = tuple(int(n) for n in first.unflattened_size)
    d_input = image[0] * image[1] * image[2]
    calls, last = record_calls(model, d_input)
    layers = _Builder(calls, next(model.parameters()).detach()).build(last)
    streams = _streams(layers)
    stages = [_stage(i, layer, layers, streams, last=i == len(layers) - 1) for i, layer in enumerate(layers)]
    info: dict[str, Any] = {
        "name": "cnn",
        "family": "convolutional",
        "n_layers": len(layers) - 1,
        "n_heads": None,
        "d_model": None,
        "d_input": d_input,
        "d_out": layers[-1].value.width * layers[-1].value.maps,
        "image": list(image),
    }
    return Graph(tuple(stages), info)


# ---- from calls to layers -------------------------------------------------------------------------------


class _Builder:
    """Goes through the calls in order; what several of them take, or what is not linear, becomes a layer."""

    def __init__(self, calls: Sequence[Call], like: Tensor) -> None:
        self.calls, self.like = calls, like
        self.layers: list[_Layer] = []
        self.values: list[_Value] = []
        self.uses = Counter(source for call in calls for source in call.sources)
        self.named: Counter[str] = Counter()
        self.steps: dict[str, Callable[[Call, list[_Value]], _Value]] = {
            "add": self._add,
            "batch_norm": self._batch_norm,
            "conv2d": self._convolution,
            "image": self._image,
            "linear": self._linear,
            "pad": self._pad,
            "reshape": self._reshape,
            **dict.fromkeys(ACTIVATION_CALLS, self._activation),
            **dict.fromkeys(POOLING_CALLS, self._pool),
        }

    def build(self, last: int) -> list[_Layer]:
        for i, call in enumerate(self.calls[: last + 1]):
            value = self.steps[call.function](call, [self.values[s] for s in call.sources])
            self.values.append(self._settle(value) if self.uses[i] > 1 and call.function != "image" else value)
        value = self.values[last]
        value = self._settle(value) if value.steps else value
        terms = tuple((source, Dense(m.dense())) for source, m in value.terms)
        self.layers.append(_Layer("output", dataclasses.replace(value, terms=terms, stage=None)))
        return self.layers

    def _settle(self, value: _Value) -> _Value:
        """The value as what a layer of its own writes."""
        if value.stage is not None:
            return value
        stem = value.name or "step"
        self.named[stem] += 1
        again = self.named[stem] > 1 or not value.name
        self.layers.append(_Layer(f"{stem}{'_' * bool(value.name)}{self.named[stem]}" if again else stem, value))
        return self._written(value)

    def _written(self, value: _Value) -> _Value:
        """What the last layer writes, unchanged."""
        number = len(self.layers) - 1
        if value.size is None:
            same: LinearMap = Dense(torch.eye(value.width).to(self.like))
        else:
            same = Convolution(torch.ones(value.maps, 1, 1, 1).to(self.like), value.size, groups=value.maps)
        return _Value(((number, same),), None, value.maps, value.size, value.width, stage=number)

    def _name(self, call: Call, kind: str) -> str:
        """Of the module in the model; numbered by kind where it has only numbers."""
        parts = call.name.split(".")
        while parts and (not parts[0] or parts[0].isdigit()):
            parts = parts[1:]
        number = sum(c.function == call.function for c in self.calls[: len(self.values) + 1])
        return ".".join(parts) or f"{kind}{number}"

    def _image(self, call: Call, _: list[_Value]) -> _Value:
        return _Value((), None, 1, None, call.shape[0])

    def _reshape(self, call: Call, given: list[_Value]) -> _Value:
        (value,) = given
        if value.terms or len(call.shape) != 3:
            whole = (value.maps, *value.size) if value.size is not None else (value.width,)
            _refuse(call.shape not in (whole, (value.maps * value.width,)), f"maps {whole} reshaped to {call.shape}")
            return value
        maps, height, width = call.shape
        self.layers.append(_Layer("input", _Value((), None, maps, (height, width), height * width)))
        return self._written(self.layers[-1].value)

    def _convolution(self, call: Call, given: list[_Value]) -> _Value:
        value, options = self._settle(given[0]), call.settings
        name = self._name(call, "conv")
        _refuse(value.size is None, f"{name}: a Conv2d after Flatten")
        assert value.size is not None
        assert value.stage is not None
        weight = options["weight"]
        stride, dilation = _pair(options.get("stride", 1)), _pair(options.get("dilation", 1))
        padding = options.get("padding", 0)
        if isinstance(padding, str):
            extra = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, weight.shape[2:], strict=True)]
            _refuse(any(e % 2 for e in extra), f"{name}: padding 'same' of even kernels")
            padding = (extra[0] // 2, extra[1] // 2)
        slid = Convolution(weight, value.size, stride, _pair(padding), dilation, int(options.get("groups", 1)))
        height, width = slid.out_size
        return _Value(
            ((value.stage, slid),), options.get("bias"), slid.blocks, slid.out_size, height * width, name=name
        )

    def _linear(self, call: Call, given: list[_Value]) -> _Value:
        value, weight = self._settle(given[0]), call.settings["weight"]
        name = self._name(call, "linear")
        _refuse(len(self.calls[call.sources[0]].shape) != 1, f"{name}: a Linear layer before Flatten")
        assert value.stage is not None
        terms = ((value.stage, Dense(weight)),)
        return _Value(terms, call.settings.get("bias"), 1, None, weight.shape[0], name=name)

    def _batch_norm(self, call: Call, given: list[_Value]) -> _Value:
        """Multiplied into what is before it, in float64; an own 1 x 1 convolution where that is not linear."""
        value = self._settle(given[0]) if given[0].steps else given[0]
        options = call.settings
        _refuse(
            options.get("running_mean") is None or bool(options.get("training")),
            "a batch norm without running statistics, which depends on the batch,",
        )
        scale = (options["running_var"].double() + options.get("eps", 1e-5)).rsqrt()
        scale = scale if options.get("weight") is None else scale * options["weight"].double()
        bias = (0.0 if value.bias is None else value.bias.double()) - options["running_mean"].double()
        bias = bias * scale + (0.0 if options.get("bias") is None else options["bias"].double())
        terms = tuple((source, _scaled(m, scale)) for source, m in value.terms)
        return dataclasses.replace(value, terms=terms, bias=bias.to(self.like), stage=None)

    def _activation(self, call: Call, given: list[_Value]) -> _Value:
        (value,), function = given, call.function
        _refuse(not value.terms, f"{function} before nn.Unflatten")
        slope = call.settings.get("negative_slope", 0.01)
        _refuse(slope != 0.01, f"leaky_relu of slope {slope}; only 0.01")
        function = "gelu_tanh" if call.settings.get("approximate", "none") == "tanh" else function
        return value.then(Activation(function), value.size)

    def _pool(self, call: Call, given: list[_Value]) -> _Value:
        (value,) = given
        _refuse(value.size is None or len(self.calls[call.sources[0]].shape) != 3, f"{call.function} of no maps")
        assert value.size is not None
        pool = _pool(call, value.size)
        out = call.shape[1:] or (1, 1)
        _refuse(call.shape[0] != value.maps or pool.out_size != out, f"{call.function}, here with ceil_mode")
        return value.then(pool, pool.out_size)

    def _pad(self, call: Call, _: list[_Value]) -> _Value:
        mode = call.settings.get("mode", "constant")
        raise UnsupportedModelError(
            f"padding with {mode!r} cannot be captured; only Conv2d and pooling layers that pad with zeros themselves"
        )

    def _add(self, call: Call, given: list[_Value]) -> _Value:
        a, b = (self._settle(v) if v.steps else v for v in given)
        _refuse(call.settings.get("alpha", 1) != 1, "a weighted sum of feature maps")
        _refuse((a.maps, a.size, a.width) != (b.maps, b.size, b.width), "a sum of maps of different sizes")
        _refuse(not a.terms or not b.terms, "a sum with the image before nn.Unflatten")
        bias = a.bias if b.bias is None else b.bias if a.bias is None else a.bias + b.bias
        return dataclasses.replace(a, terms=(*a.terms, *b.terms), bias=bias, stage=None, name=a.name or b.name)


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise UnsupportedModelError(f"{what} cannot be captured; see docs/architectures.md")


def _scaled(map_: LinearMap, scale: Float[Tensor, " n"]) -> LinearMap:
    """The map with every map (or feature) that it makes multiplied by a number."""
    if isinstance(map_, Convolution):
        kernels = map_.kernels.double() * scale[:, None, None, None]
        return dataclasses.replace(map_, kernels=kernels.to(map_.kernels))
    weight = map_.dense()
    return Dense((weight.double() * scale[:, None]).to(weight))


def _pool(call: Call, size: Pair) -> Pool:
    options, function = call.settings, call.function
    if function == "mean":
        axes = options.get("dim")
        axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
        _refuse(sorted(a % 4 for a in axes) != [2, 3], f"a mean over the axes {axes}; only over rows and columns")
        return Pool("average", size, size, size)
    if function == "adaptive_avg_pool2d":
        out = _pair(tuple(n if o is None else o for o, n in zip(_both(options["output_size"]), size, strict=True)))
        _refuse(size[0] % out[0] + size[1] % out[1] > 0, f"adaptive pooling of {size} to {out}, not in equal windows,")
        window = (size[0] // out[0], size[1] // out[1])
        return Pool("average", size, window, window)
    kernel = _pair(options["kernel_size"])
    stride, padding = _pair(options.get("stride") or kernel), _pair(options.get("padding", 0))
    if function == "max_pool2d":
        _refuse(_pair(options.get("dilation", 1)) != (1, 1), "dilated pooling")
        return Pool("max", size, kernel, stride, padding)
    plain = options.get("divisor_override") is None and (options.get("count_include_pad", True) or padding == (0, 0))
    _refuse(not plain, "average pooling with a divisor of its own")
    return Pool("average", size, kernel, stride, padding)


def _both(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _pair(value: Any) -> Pair:
    a, b = tuple(value) * (2 if len(value) == 1 else 1) if isinstance(value, (tuple, list)) else (value, value)
    return int(a), int(b)


# ---- from layers to stages ------------------------------------------------------------------------------


def _streams(layers: Sequence[_Layer]) -> list[range]:
    """For each layer, those that write to the same stream: all that some layer hears together, directly or not."""
    streams = [range(i, i + 1) for i in range(len(layers))]
    for heard in sorted((layer.sources for layer in layers[1:]), key=lambda r: r.start):
        whole = range(streams[heard.start].start, max(streams[i].stop for i in heard))
        for i in whole:
            streams[i] = whole
    return streams


def _places(layers: Sequence[_Layer], stream: range) -> tuple[dict[int, int], int]:
    """(where in its stream each layer begins to write, how long the stream is)."""
    starts, at = {}, 0
    for i in stream:
        starts[i] = at
        at += layers[i].value.maps * layers[i].value.width
    return starts, at


def _stage(i: int, layer: _Layer, layers: Sequence[_Layer], streams: Sequence[range], last: bool) -> Stage:
    value = layer.value
    n, width = value.maps, value.width
    names = (layer.name,) if value.size is None else tuple(f"{layer.name}.map.{c}" for c in range(n))
    ports = (_port(layer, layers, streams),) if value.terms else ()
    visible = (layer.sources.start, layer.sources.stop) if value.terms else (0, 0)
    if last:
        return Stage(("output",), "unembed", i - 1, ports, Readout(), None, (n * width,), visible)
    starts, length = _places(layers, streams[i])
    alone = length == n * width
    write = Identity(width) if alone and n == 1 else Placed(n * width, starts[i], None if alone else length)
    if not value.terms:
        names = ("input",) if n == 1 else names
        return Stage(names, "embed", -1, (), FloatInput(n * width, n), write, (width,) * n, (0, 0))
    core: Core = value.steps[0] if len(value.steps) == 1 else Chain(value.steps)
    core = core if value.steps else Activation("identity")
    return Stage(names, "mlp", i - 1, ports, core, write, (width,) * n, visible)


def _port(layer: _Layer, layers: Sequence[_Layer], streams: Sequence[range]) -> Port:
    value = layer.value
    starts, length = _places(layers, streams[layer.sources.start])
    nodes = 1 if layer.name == "output" else value.maps
    first = value.terms[0][1]
    outputs = first.d_out
    if len(value.terms) > 1 or first.d_in != length:
        parts = tuple(m if isinstance(m, BlockMap) else DenseBlocks(m.dense(), nodes) for _, m in value.terms)
        first = Joined(parts, tuple(starts[source] for source, _ in value.terms), length)
    bias = value.bias
    if bias is not None and len(bias) != outputs:
        bias = repeat(bias, "maps -> (maps pixels)", pixels=outputs // len(bias))
    return Port("in", (Read(first, (outputs // nodes,) * nodes, bias),), reach=_reach(layer, layers, nodes))


def _reach(layer: _Layer, layers: Sequence[_Layer], nodes: int) -> Bool[Tensor, "nodes writers"] | None:
    """Which of the maps between the first and the last that it hears each node can hear; None if all."""
    heard = [layers[k].value.maps for k in layer.sources]
    tables = [torch.zeros(nodes, n, dtype=torch.bool) for n in heard]
    for source, map_ in layer.value.terms:
        table = tables[source - layer.sources.start]
        if isinstance(map_, Convolution):
            table.scatter_(1, map_.group_maps.cpu(), True)
        else:
            table.fill_(True)
    reach = torch.cat(tables, dim=1)
    return None if bool(reach.all()) else reach
