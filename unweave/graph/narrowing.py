"""Let an edge carry only some dimensions: the inside of :meth:`Graph.narrow`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from unweave.errors import InputError, ShapeError
from unweave.graph.parts import Edge, Port, Stage, Wires

__all__ = ["add_wires", "check_factors", "drop_wires"]


def check_factors(edge: Edge, left: Tensor, right: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The two factors of an edge's projection, after checking that they fit its stream.

    Raises:
        ShapeError: they do not.
        InputError: they are not finite.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape != (width, right.shape[0]) or right.shape[1] != width:
        raise ShapeError(
            f"the factors of {edge} must be [{width}, k] and [k, {width}], "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise InputError(f"the factors of {edge} are not finite")
    return left, right


def add_wires(
    stage: Stage,
    port_name: str,
    wires: Sequence[tuple[int, int, Tensor, Tensor]],
    writers: Sequence[str],
    means: Mapping[str, Tensor] | None,
) -> Stage:
    """The stage with some cut edges of a port, as (node, writer, left, right), given back these dimensions."""
    (port,) = [p for p in stage.ports if p.name == port_name]
    old = port.wires
    k = max([left.shape[1] for _, _, left, _ in wires] + ([] if old is None else [old.left.shape[2]]))
    new = Wires(
        torch.tensor([node for node, *_ in wires], device=stage.device),
        torch.tensor([writer for _, writer, *_ in wires], device=stage.device),
        torch.stack([F.pad(left, (0, k - left.shape[1])) for _, _, left, _ in wires]).to(stage.device),
        torch.stack([F.pad(right, (0, 0, 0, k - right.shape[0])) for *_, right in wires]).to(stage.device),
    )
    port = _add_constants(port, new, writers, means, -1.0)
    if old is not None:
        k_old = k - old.left.shape[2]
        left, right = F.pad(old.left, (0, k_old)), F.pad(old.right, (0, 0, 0, k_old))
        new = Wires(
            torch.cat([old.nodes, new.nodes]),
            torch.cat([old.writers, new.writers]),
            torch.cat([left, new.left]),
            torch.cat([right, new.right]),
        )
    return _replace(stage, dataclasses.replace(port, wires=new))


def drop_wires(
    port: Port,
    gone: Bool[Tensor, "nodes writers"],
    writers: Sequence[str],
    means: Mapping[str, Tensor] | None,
) -> Port:
    """The port after the wires among the edges marked in ``gone`` were cut; their constants take their place."""
    wires = port.wires
    if wires is None:
        return port
    leaving = gone.to(wires.nodes.device)[wires.nodes, wires.writers]
    cut = wires.select(leaving)
    if cut is None:
        return port
    return dataclasses.replace(_add_constants(port, cut, writers, means, 1.0), wires=wires.select(~leaving))


def _add_constants(
    port: Port, wires: Wires, writers: Sequence[str], means: Mapping[str, Tensor] | None, sign: float
) -> Port:
    """The port's offset, with the share of the constants that the wires carry themselves added or taken away."""
    if means is None:
        return port
    assert port.offset is not None
    constants = [means[writers[w]] for w in wires.writers.tolist()]
    longest = max(c.shape[0] for c in constants)
    table = torch.stack([c.expand(longest, -1) for c in constants]).to(wires.left)
    carried = wires.carry(table[None])[0]
    added = torch.zeros(port.offset.shape[0], *carried.shape[1:], dtype=carried.dtype, device=carried.device)
    added.index_add_(0, wires.nodes, sign * carried)
    return dataclasses.replace(port, offset=port.offset + added.to(port.offset))


def _replace(stage: Stage, port: Port) -> Stage:
    return dataclasses.replace(stage, ports=tuple(port if p.name == port.name else p for p in stage.ports))
