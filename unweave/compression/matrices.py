"""The matrices of a graph's channels one by one: where they are, what is known of each, how to replace them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.compression.moments import ChannelMoments
from unweave.errors import InputError
from unweave.graph import Graph, Stage
from unweave.ops import Identity, LinearMap

__all__ = ["Matrix", "MatrixMoments", "Place", "channel_matrices", "matrix_moments", "with_matrices"]

Place = tuple[int, str, int]
"""(stage, port, number of the read), or (stage, "write", 0)."""


class Matrix(NamedTuple):
    """A map and the constant beside it; for a write that is the constant of its stage."""

    map: LinearMap
    bias: Tensor | None


class MatrixMoments(NamedTuple):
    """What is known of one matrix: the mean of what it reads, its centred second moment, the gradient's second."""

    mean: Float[Tensor, " d_in"]
    inputs2: Float[Tensor, "d_in d_in"]
    felt2: Float[Tensor, "d_out d_out"]


def channel_matrices(graph: Graph) -> dict[Place, Matrix]:
    """Every matrix of the attention and MLP stages, in execution order (identities are none)."""
    out: dict[Place, Matrix] = {}
    for s in graph.channels:
        stage = graph.stages[s]
        out |= {(s, p.name, r): Matrix(read.map, read.bias) for p in stage.ports for r, read in enumerate(p.reads)}
        if stage.write is not None and not isinstance(stage.write, Identity):
            out[s, "write", 0] = Matrix(stage.write, stage.bias)
    return out


def with_matrices(graph: Graph, new: Mapping[Place, Matrix]) -> Graph:
    """The graph with the matrices at some places replaced."""
    stages = list(graph.stages)
    for s in {place[0] for place in new}:
        stages[s] = _with_reads(stages[s], {place[1:]: matrix for place, matrix in new.items() if place[0] == s})
        if (s, "write", 0) in new:
            write = new[s, "write", 0]
            stages[s] = dataclasses.replace(stages[s], write=write.map, bias=write.bias)
    return dataclasses.replace(graph, stages=tuple(stages))


def _with_reads(stage: Stage, new: Mapping[tuple[str, int], Matrix]) -> Stage:
    ports = []
    for port in stage.ports:
        matrices = [new.get((port.name, r), Matrix(read.map, read.bias)) for r, read in enumerate(port.reads)]
        reads = (
            dataclasses.replace(read, map=m.map, bias=m.bias) for read, m in zip(port.reads, matrices, strict=True)
        )
        ports.append(dataclasses.replace(port, reads=tuple(reads)))
    return dataclasses.replace(stage, ports=tuple(ports))


def matrix_moments(graph: Graph, moments: Mapping[int, ChannelMoments], place: Place) -> MatrixMoments:
    """The moments of one matrix, out of those of its stage.

    A norm after the write (Gemma) is taken as the constant factor that it is on average: its gain over the root mean
    square of what the stage writes. The constant of the stage comes after that norm and cannot stand in for the
    mean, which is therefore left in the second moment.

    Raises:
        InputError: the moments are of another graph.
    """
    s, port, number = place
    m, stage = moments.get(s), graph.stages[s]
    if m is None or (port != "write" and (port, number) not in m.gradients2):
        raise InputError(f"there are no moments of {stage.nodes[0]}; take them from this graph with channel_moments")
    if port != "write":
        found = MatrixMoments(m.inputs[port], m.inputs2[port], m.gradients2[port, number])
    elif stage.post is None:
        found = MatrixMoments(m.code, m.code2, m.written2)
    else:
        assert stage.write is not None
        seen = m.code2 + torch.outer(m.code, m.code)
        weight = stage.write.dense().double()
        mean_square = ((weight @ seen) * weight).sum(1).mean()
        felt = stage.post.fold(stage.post.fold(m.written2).T) / mean_square.clamp(min=1e-30)
        found = MatrixMoments(torch.zeros_like(m.code), seen, felt)
    map_ = channel_matrices(graph)[place].map
    if (len(found.inputs2), len(found.felt2)) != (map_.d_in, map_.d_out):
        raise InputError(f"the moments of {stage.nodes[0]} do not fit its matrices: take them from this very graph")
    return found
