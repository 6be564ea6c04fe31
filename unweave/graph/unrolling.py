"""Split nodes by the positions at which they write: the inside of :meth:`Graph.unroll`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.errors import InputError
from unweave.graph.parts import Port, Stage
from unweave.ops import Attention, Repeated

__all__ = ["REST", "at_positions", "copy_names", "listening", "meet", "read_groups", "unroll_stage"]

# the group of the positions that no group names
REST = "rest"


def read_groups(n_pos: int, groups: Mapping[str, Iterable[int]] | None) -> dict[str, Bool[Tensor, " pos"]]:
    """The positions of each group as marks; without groups, every position is one.

    Raises:
        InputError: a group that is empty, reaches beyond ``n_pos``, shares a position or has a name that edges cannot
            carry.
    """
    if type(n_pos) is not int or n_pos < 1:
        raise InputError(f"n_pos must be a positive number of positions, got {n_pos!r}")
    if groups is None:
        return {str(i): mark for i, mark in enumerate(torch.eye(n_pos, dtype=torch.bool))}
    taken = torch.zeros(n_pos, dtype=torch.bool)
    marks = {}
    for name, places in groups.items():
        if not name or any(c in name for c in ".@>") or name == REST:
            raise InputError(f"a group's name must have none of '.@>' in it and not be {REST!r}, got {name!r}")
        index = sorted({int(i) for i in places})
        if not index or index[0] < 0 or index[-1] >= n_pos:
            raise InputError(f"the group {name!r} must hold positions from 0 to {n_pos - 1}, got {index}")
        mark = torch.zeros(n_pos, dtype=torch.bool)
        mark[index] = True
        if bool((mark & taken).any()):
            raise InputError(f"position {int((mark & taken).nonzero()[0])} is in two groups, {name!r} is one of them")
        taken |= mark
        marks[name] = mark
    return marks if bool(taken.all()) else {**marks, REST: ~taken}


def copy_names(node: str, groups: Iterable[str]) -> list[str]:
    """What the copies of a node are called."""
    return [f"{node}@{group}" for group in groups]


def unroll_stage(stage: Stage, groups: Mapping[str, Bool[Tensor, " pos"]]) -> Stage:
    """The stage with every node once per group of positions; the output, which writes nothing, stays whole.

    Raises:
        InputError: it is unrolled already.
    """
    if stage.write is None:
        return stage
    if stage.positions is not None:
        raise InputError(f"{stage.nodes[0]} is unrolled already; unroll the graph it came from")
    n, times = len(stage.nodes), len(groups)

    def again(port: Port) -> Port:
        given = (port.edges, port.offset, port.reach)
        edges, offset, reach = (None if t is None else t.repeat_interleave(times, 0) for t in given)
        return dataclasses.replace(port, edges=edges, offset=offset, reach=reach)

    core = stage.core
    if isinstance(core, Attention):
        core = dataclasses.replace(core, n_heads=core.n_heads * times)
    return dataclasses.replace(
        stage,
        nodes=tuple(copy for node in stage.nodes for copy in copy_names(node, groups)),
        ports=tuple(again(port) for port in stage.ports),
        core=core,
        write=Repeated(stage.write, stage.code_widths, times),
        code_widths=tuple(w for w in stage.code_widths for _ in range(times)),
        positions=torch.stack(list(groups.values())).repeat(n, 1).to(stage.device),
    )


def at_positions(
    stage: Stage, codes: Float[Tensor, "batch _ pos width"], nodes: Tensor | None = None
) -> Float[Tensor, "batch node pos width"]:
    """The codes where their nodes write, and zero elsewhere.

    Args:
        nodes: which nodes of the stage the codes belong to; all, in their order, by default.
    """
    if stage.positions is None:
        return codes
    where = stage.positions if nodes is None else stage.positions[nodes]
    if 1 < codes.shape[1] < len(where):  # copies that read alike were computed once
        codes = codes.repeat_interleave(len(where) // codes.shape[1], 1)
    return codes * where[:, : codes.shape[2], None].to(codes)


def listening(stage: Stage, port: Port) -> Bool[Tensor, "nodes pos"] | None:
    """The positions at which what a port hears can reach the code of each node; None where all can."""
    if stage.positions is None:
        return None
    where = stage.positions.cpu()
    if not isinstance(stage.core, Attention) or port.name == "q":
        return where
    pos = torch.arange(where.shape[1])
    distance = pos[:, None] - pos
    seen = distance >= 0 if stage.core.causal else torch.ones_like(distance, dtype=torch.bool)
    if stage.core.window is not None:
        seen &= distance.abs() < stage.core.window
    return (where.float() @ seen.float()) > 0


def meet(
    listens: Bool[Tensor, "nodes pos"] | None, writes: Sequence[Bool[Tensor, "_ pos"] | None], counts: Sequence[int]
) -> Bool[Tensor, "_ writers"] | bool:
    """Which node listens at a position where a writer writes; True where no one is bound to positions.

    Args:
        writes, counts: for each stage heard, where its nodes write (None: everywhere), and how many there are.
    """
    if listens is None and all(w is None for w in writes):
        return True
    span = next(x.shape[1] for x in (listens, *writes) if x is not None)
    everywhere = torch.ones(1, span, dtype=torch.bool)
    columns = [everywhere.expand(n, -1) if w is None else w.cpu() for w, n in zip(writes, counts, strict=True)]
    heard = everywhere if listens is None else listens
    return (heard.float() @ torch.cat(columns).float().T) > 0
