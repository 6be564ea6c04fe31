"""Divide what heads write into subspaces ordered by worth, so that an edge may keep only some of its dimensions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.compression.factors import root
from unweave.compression.moments import ChannelMoments, channel_moments
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Edge, Graph, Read, Stage
from unweave.ops import Attention, Dense
from unweave.scope import Scope

__all__ = ["divide", "edge_numbers", "whole"]

# share of the mean eigenvalue added to a metric, so that a change of basis can be undone exactly
DAMPING = 1e-6


def divide(graph: Graph, data: TokenData, scope: Scope, parts: int = 4, **options: Any) -> Graph:
    """The same function with every head's values in ``parts`` parts, the most valuable first.

    A head's code c = V n and what it writes, O c, stay the same under c -> R c, O -> O R^-1. R is chosen (for all heads
    that share values together) so that the coordinates of R c are uncorrelated on the data, do not interact in the
    output's Fisher information, and come in the order of the nats they are worth. MLPs stay whole: neurons cannot be
    mixed, and a group of them writes as many dimensions as it has neurons.

    Args:
        graph: whole.
        data, scope: on which and for what the worth is taken.
        parts: at most so many per node; nodes with shorter codes get fewer.
        options: of :func:`unweave.channel_moments`.

    Raises:
        InputError: fewer than two parts, or a graph that cannot be measured.

    Cost:
        One forward and two backward passes.

    Exact?
        The function is unchanged up to rounding (1e-5 of a logit in float32).
    """
    if parts < 2:
        raise InputError(f"parts must be at least 2, got {parts}")
    moments = channel_moments(graph, data, scope, **options)
    stages = list(graph.stages)
    wanted: dict[str, list[list[int]]] = {}
    for s, m in moments.items():
        stage = stages[s]
        if isinstance(stage.core, Attention):
            stages[s] = _ordered_values(stage, m)
            n = min(parts, *stage.code_widths)
            for node, width in zip(stage.nodes, stage.code_widths, strict=True):
                wanted[node] = [part.tolist() for part in torch.arange(width).tensor_split(n)]
    return dataclasses.replace(graph, stages=tuple(stages)).refine(wanted)


def _ordered_values(stage: Stage, m: ChannelMoments) -> Stage:
    """The stage with its values in the basis of :func:`divide`."""
    assert stage.write is not None
    (place,) = [p for p, port in enumerate(stage.ports) if port.name == "v"]
    read, write = stage.ports[place].reads[0], stage.write.dense().double()
    columns = list(write.split(list(stage.code_widths), dim=1))
    starts = torch.tensor([0, *stage.code_widths]).cumsum(0).tolist()
    heads = len(stage.nodes) // len(read.widths)
    values, biases = [], []
    weights = read.map.dense().double().split(list(read.widths))
    old = None if read.bias is None else read.bias.double().split(list(read.widths))
    for block, weight in enumerate(weights):
        mine = range(block * heads, (block + 1) * heads)
        seen = sum(m.code2[starts[h] : starts[h + 1], starts[h] : starts[h + 1]] for h in mine)
        felt = sum(columns[h].T @ m.written2.to(write) @ columns[h] for h in mine)
        turn, back = _basis(seen.to(write), felt)  # type: ignore[union-attr, arg-type]
        values.append(turn @ weight)
        if old is not None:
            biases.append(turn @ old[block])
        for h in mine:
            columns[h] = columns[h] @ back
    like = stage.write.dense()
    new = Read(Dense(torch.cat(values).to(like)), read.widths, torch.cat(biases).to(like) if biases else None)
    ports = list(stage.ports)
    ports[place] = dataclasses.replace(ports[place], reads=(new,))
    return dataclasses.replace(stage, ports=tuple(ports), write=Dense(torch.cat(columns, dim=1).to(like)))


def _basis(seen: Float[Tensor, "w w"], felt: Float[Tensor, "w w"]) -> tuple[Tensor, Tensor]:
    """(R, R^-1) that makes both second moments diagonal, the largest product first."""
    eye = torch.eye(len(felt), dtype=felt.dtype, device=felt.device)
    felt = felt + (DAMPING * felt.diagonal().mean() + 1e-30) * eye
    half, inverse = root(felt, 0.0)
    u, _, _ = torch.linalg.svd(half @ root(seen, 0.0)[0])
    return u.T @ half, inverse @ u


def whole(node: str) -> str:
    """The node that a part is a part of."""
    return node.partition(".part.")[0]


def edge_numbers(graph: Graph, edges: tuple[Edge, ...]) -> int:
    """How many numbers a set of edges takes as virtual weights: dimensions written times dimensions read, for each.

    An edge into several parts of one node counts once. A port reads no more dimensions than the stream has.
    """
    written = {
        n: min(w, _width(s)) for s in graph.stages if s.write for n, w in zip(s.nodes, s.code_widths, strict=True)
    }
    read: dict[tuple[str, str], int] = {}
    for stage in graph.stages:
        for port in stage.ports:
            for i, node in enumerate(stage.nodes):
                widths = sum(r.widths[i * len(r.widths) // len(stage.nodes)] for r in port.reads)
                key = (whole(node), port.name)
                # parts of a head share queries and keys, and have values of their own
                shared = key in read and isinstance(stage.core, Attention) and port.name != "v"
                read[key] = widths if shared else read.get(key, 0) + widths
    d = max(_width(s) for s in graph.stages if s.write)
    pairs = {(e.src, whole(e.dst), e.port) for e in edges}
    return sum(written[src] * min(read[dst, port], d) for src, dst, port in pairs)


def _width(stage: Stage) -> int:
    assert stage.write is not None
    return stage.write.d_out
