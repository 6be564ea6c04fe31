"""Split the nodes of a stage into finer ones: the inside of :meth:`Graph.refine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from unweave import tree
from unweave.errors import InputError
from unweave.graph.parts import Port, Read, Stage
from unweave.ops import Activation, Attention, Dense, Identity, LinearMap, LowRank, Masked

__all__ = ["Parts", "part_names", "read_parts", "split_stage", "split_writers"]

Parts = tuple[tuple[int, ...], ...]


def read_parts(node: str, given: int | Sequence[Sequence[int]], width: int) -> Parts:
    """The code coordinates of each part of a node, after checking that they cover each of ``width`` once.

    Raises:
        InputError: they do not.
    """
    if isinstance(given, int):
        if not 1 <= given <= width:
            raise InputError(f"{node} has a code of {width} numbers and cannot be split into {given} parts")
        return tuple(tuple(part.tolist()) for part in torch.arange(width).tensor_split(given))
    parts = tuple(tuple(int(i) for i in part) for part in given)
    if not all(parts) or sorted(chain(*parts)) != list(range(width)):
        raise InputError(f"the parts of {node} must hold each of its coordinates 0..{width - 1} exactly once")
    return parts


def split_stage(stage: Stage, parts: Mapping[int, Parts]) -> Stage:
    """The stage with node i split into ``parts[i]``; nodes not named stay whole.

    Raises:
        InputError: the stage's nodes cannot be split.
    """
    if not isinstance(stage.core, (Activation, Attention)) or stage.write is None:
        raise InputError(f"{stage.nodes[0]} cannot be split: its code has no coordinates of its own")
    per_node = [parts.get(i, (tuple(range(width)),)) for i, width in enumerate(stage.code_widths)]
    counts = [len(p) for p in per_node]
    if isinstance(stage.core, Attention) and len(set(counts)) > 1:
        raise InputError(f"all heads beside {stage.nodes[0]} must be split into equally many parts, got {counts}")
    starts = list(accumulate(stage.code_widths, initial=0))
    order = [starts[i] + c for i, node in enumerate(per_node) for part in node for c in part]
    core, write, positions = stage.core, stage.write, stage.positions
    if isinstance(write, Identity):  # what one part writes is as wide as the stream, its code is not
        eye = write.dense().to(next(t for _, t in tree.leaves(stage.ports) if t.is_floating_point()))
        write = Masked.keep(eye, eye > 0)
    if isinstance(core, Attention):
        core = dataclasses.replace(core, n_heads=sum(counts))
    if positions is not None:
        positions = positions.repeat_interleave(torch.tensor(counts, device=positions.device), 0)
    return dataclasses.replace(
        stage,
        nodes=tuple(n for name, p in zip(stage.nodes, per_node, strict=True) for n in part_names(name, len(p))),
        ports=tuple(_split_port(stage, port, per_node) for port in stage.ports),
        core=core,
        write=_pick_inputs(write, order),
        code_widths=tuple(len(part) for node in per_node for part in node),
        positions=positions,
    )


def part_names(node: str, count: int) -> list[str]:
    """What the parts of a node are called; a node left whole keeps its name."""
    return [node] if count == 1 else [f"{node}.part.{k}" for k in range(count)]


def split_writers(stage: Stage, counts: Sequence[int]) -> Stage:
    """The stage after the writers it may hear, in their order, were split into so many parts each."""
    times = torch.tensor(counts, device=stage.device)

    def again(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.repeat_interleave(times, 1)

    ports = tuple(dataclasses.replace(p, edges=again(p.edges), reach=again(p.reach)) for p in stage.ports)
    return dataclasses.replace(stage, ports=ports)


def _split_port(stage: Stage, port: Port, per_node: Sequence[Parts]) -> Port:
    times = torch.tensor([len(p) for p in per_node], device=stage.device)

    def again(table: Tensor | None) -> Tensor | None:
        return None if table is None else table.repeat_interleave(times, 0)

    # queries and keys stay whole: all parts of a head share its pattern
    whole = isinstance(stage.core, Attention) and port.name != "v"
    reads = port.reads if whole else tuple(_split_read(read, per_node) for read in port.reads)
    edges, offset, reach = again(port.edges), again(port.offset), again(port.reach)
    return dataclasses.replace(port, reads=reads, edges=edges, offset=offset, reach=reach)


def _split_read(read: Read, per_node: Sequence[Parts]) -> Read:
    copies = len(per_node) // len(read.widths)
    starts = list(accumulate(read.widths, initial=0))
    order = [starts[i // copies] + c for i, node in enumerate(per_node) for part in node for c in part]
    widths = tuple(len(part) for node in per_node for part in node)
    if order == list(range(read.map.d_out)):
        return dataclasses.replace(read, widths=widths)
    index = torch.tensor(order)
    bias = None if read.bias is None else read.bias[index.to(read.bias.device)]
    return Read(read.map.select_outputs(index), widths, bias)


def _pick_inputs(write: LinearMap, order: Sequence[int]) -> LinearMap:
    """The map applied to inputs that come in another order."""
    if list(order) == list(range(write.d_in)):
        return write
    if isinstance(write, LowRank):
        return LowRank(write.left, _pick_inputs(write.right, order))
    if isinstance(write, Masked):
        return write.select_inputs(torch.tensor(order, device=write.mask.device))
    return Dense(write.dense()[:, torch.tensor(order)])
