"""Whole neurons of plain layers given up: layers whose neurons are what the next layer reads, with no stream between.

Giving up neurons of such a layer narrows three things: its read, its code, and what the next layer reads. With c its
code, k the neurons kept and C the regression of c on c_k, the next layer reads W C c_k instead of W c, and its bias
takes over the mean of the difference. To second order that costs 1/2 tr(G D A D^T) nats per token, with D c = c - C c_k
the change, A the second moment of c and G that of the gradient at c. A neuron that is always the same costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.compression.factors import Elimination, compensated_write, eliminate_neurons
from unweave.compression.moments import ChannelMoments
from unweave.errors import InputError
from unweave.graph import CHANNEL_KINDS, Graph, Read, Stage
from unweave.ops import Activation, Dense, Identity

__all__ = ["NEURONS", "Narrowing", "give_up", "kept_neurons", "narrowings", "plain_layers"]

NEURONS = "neurons_kept"
"""The entry of a graph's info that says which neurons of its plain layers are left, by node."""

# nats per number, half a decade apart: what a number is worth in a network that is worth compressing lies between
PRICES = tuple(10 ** (k / 2) for k in range(-18, 1))


class Narrowing(NamedTuple):
    """A graph with some neurons given up, its moments as far as they are known without another pass, the nats lost."""

    graph: Graph
    moments: Mapping[int, ChannelMoments]
    nats: float


def plain_layers(graph: Graph) -> dict[int, int]:
    """The stages whose neurons can be given up one by one, each with the only stage that hears it."""
    found = {}
    for s, stage in enumerate(graph.stages):
        if stage.kind in CHANNEL_KINDS and isinstance(stage.write, Identity) and isinstance(stage.core, Activation):
            hear = [t for t in range(s + 1, len(graph.stages)) if s in range(*graph.stages[t].visible)]
            plain = stage.bias is None and stage.post is None and len(stage.nodes) == len(stage.ports[0].reads) == 1
            if plain and len(hear) == 1 and _hears_alone(graph.stages[hear[0]], s):
                found[s] = hear[0]
    return found


def _hears_alone(stage: Stage, writer: int) -> bool:
    """Whether a stage reads what one writer writes as it is."""
    return stage.visible == (writer, writer + 1) and all(p.norm is None and not p.is_cut for p in stage.ports)


def narrowings(graph: Graph, moments: Mapping[int, ChannelMoments]) -> list[Narrowing]:
    """The graph as it is, and with ever more neurons given up: as many as pay at one price per number for all layers.

    Cost:
        An elimination per plain layer: O(neurons^3). Nothing for networks without plain layers.
    """
    layers = {s: t for s, t in plain_layers(graph).items() if s in moments}
    if any(len(moments[s].code) != graph.stages[s].code_widths[0] for s in layers):
        raise InputError("the moments do not fit the layers of this graph: take them from this very graph")
    out = [Narrowing(graph, moments, 0.0)]
    if not layers:
        return out
    orders = {s: _elimination(moments[s]) for s in layers}
    sizes = {s: _numbers_per_neuron(graph, s, t) for s, t in layers.items()}
    tried = set()
    for price in PRICES:
        kept = {graph.stages[s].nodes[0]: _kept(orders[s], price * sizes[s]) for s in layers}
        counts = tuple(len(k) for k in kept.values())
        if counts not in tried:
            tried.add(counts)
            out.append(give_up(graph, moments, kept))
    return out


def _elimination(m: ChannelMoments) -> Elimination:
    eye = torch.eye(len(m.code), dtype=m.code.dtype, device=m.code.device)
    return eliminate_neurons(eye, m.code2, m.written2)


def _numbers_per_neuron(graph: Graph, s: int, t: int) -> int:
    """What a neuron stores: its row, its bias, and its column where the next layer is counted, too."""
    own = sum(read.map.d_in + (read.bias is not None) for read in graph.stages[s].ports[0].reads)
    reader = graph.stages[t]
    after = sum(read.map.d_out for port in reader.ports for read in port.reads)
    return own + (after if reader.kind in CHANNEL_KINDS else 0)


def _kept(order: Elimination, cost: float) -> list[int]:
    """The neurons that are worth more than their cost: at least one."""
    gone = torch.arange(len(order.order), dtype=torch.float64)
    best = int((order.nats[:-1] - cost * gone).argmin())
    return sorted(order.order[best:].tolist())


def give_up(graph: Graph, moments: Mapping[int, ChannelMoments], kept: Mapping[str, Sequence[int]]) -> Narrowing:
    """The graph with only some neurons of its plain layers; the next layers make up for the others.

    Args:
        graph: with plain layers (see :func:`plain_layers`).
        moments: of this graph.
        kept: by node, which of its neurons stay, in ascending order; layers not named stay whole.

    Raises:
        InputError: a node that is no plain layer, or neurons that it does not have.
    """
    stages, known, nats = list(graph.stages), dict(moments), 0.0
    layers, named = plain_layers(graph), dict(graph.info.get(NEURONS, {}))
    for node, neurons in kept.items():
        graph.find(node)
        s = graph.where[node][0]
        index = _checked(node, neurons, stages[s], s in layers)
        m, reader = known[s], layers[s]
        eye = torch.eye(len(m.code), dtype=m.code.dtype, device=m.code.device)
        regressed = compensated_write(eye, m.code2, index)
        lost = eye.clone()
        lost[:, index] -= regressed
        nats += 0.5 * float(torch.trace(m.written2 @ lost @ m.code2 @ lost.T))
        constant = m.code - regressed @ m.code[index]
        stages[s] = _with_outputs(stages[s], index)
        stages[reader] = _with_inputs(stages[reader], regressed, constant)
        known[s] = _of_outputs(m, index, regressed)
        if reader in known:
            known[reader] = _of_inputs(known[reader], index)
        before = named.get(node, range(len(m.code)))
        named[node] = [before[i] for i in neurons]
    return Narrowing(dataclasses.replace(graph, stages=tuple(stages), info={**graph.info, NEURONS: named}), known, nats)


def kept_neurons(graph: Graph, original: Graph) -> dict[str, list[int]]:
    """Which neurons of the original's plain layers a graph has, where that is not all, counted in the original."""
    before, left = original.info.get(NEURONS, {}), graph.info.get(NEURONS, {})
    return {
        node: [before[node].index(i) for i in neurons] if node in before else list(neurons)
        for node, neurons in left.items()
        if neurons != before.get(node)
    }


def _checked(node: str, neurons: Sequence[int], stage: Stage, plain: bool) -> Int[Tensor, " kept"]:
    if not plain:
        raise InputError(
            f"{node} is no plain layer; only layers that one other layer reads as they are can be narrowed"
        )
    width = stage.code_widths[0]
    if not neurons or sorted(set(neurons)) != list(neurons) or neurons[0] < 0 or neurons[-1] >= width:
        raise InputError(f"{node} has neurons 0 to {width - 1}; name at least one, in ascending order, got {neurons}")
    return torch.tensor(list(neurons), device=stage.device)


def _with_outputs(stage: Stage, index: Int[Tensor, " kept"]) -> Stage:
    """A plain layer of only some neurons."""
    (port,) = stage.ports
    (read,) = port.reads
    bias = None if read.bias is None else read.bias[index]
    read = Read(Dense(read.map.dense()[index]), (len(index),), bias)
    port = dataclasses.replace(port, reads=(read,))
    return dataclasses.replace(stage, ports=(port,), write=Identity(len(index)), code_widths=(len(index),))


def _with_inputs(stage: Stage, regressed: Float[Tensor, "n kept"], constant: Float[Tensor, " n"]) -> Stage:
    """A layer that reads W C instead of W, with W times a constant in its bias."""
    ports = []
    for port in stage.ports:
        reads = []
        for read in port.reads:
            weight = read.map.dense()
            added = weight.double() @ constant
            bias = read.bias
            if bool((added != 0).any()):
                bias = (added if bias is None else bias.double() + added).to(weight)
            reads.append(dataclasses.replace(read, map=Dense((weight.double() @ regressed).to(weight)), bias=bias))
        ports.append(dataclasses.replace(port, reads=tuple(reads)))
    return dataclasses.replace(stage, ports=tuple(ports))


def _of_outputs(m: ChannelMoments, index: Int[Tensor, " kept"], regressed: Float[Tensor, "n kept"]) -> ChannelMoments:
    """The moments of a layer of only some neurons, which now speak for the others."""

    def rows(moments: dict[tuple[str, int], Tensor]) -> dict[tuple[str, int], Tensor]:
        return {key: second[index][:, index] for key, second in moments.items()}

    return dataclasses.replace(
        m,
        reads2=rows(m.reads2),
        gradients2=rows(m.gradients2),
        code=m.code[index],
        code2=m.code2[index][:, index],
        written2=regressed.T @ m.written2 @ regressed,
    )


def _of_inputs(m: ChannelMoments, index: Int[Tensor, " kept"]) -> ChannelMoments:
    inputs = {port: mean[index] for port, mean in m.inputs.items()}
    return dataclasses.replace(m, inputs=inputs, inputs2={p: a[index][:, index] for p, a in m.inputs2.items()})
