"""What talks and listens, at two grains: nodes as they are, or split into coordinates that have a basis of their own.

A *cell* is a node, or one coordinate of a node. Neurons, features of real inputs and the outputs of networks that read
reals are coordinates with a meaning of their own, since something acts on each of them apart; those of heads and
embeddings are not (any rotation of them does as well), so heads and embeddings stay whole at both grains.
"""

from __future__ import annotations

from itertools import chain

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import InputError
from unweave.execution import PortPlan, Trace, plan_of
from unweave.graph import Graph, Stage
from unweave.ops import Activation, FloatInput, Readout
from unweave.statistics import Gradients

__all__ = [
    "LEVELS",
    "MOST_CELLS",
    "cell_layers",
    "cell_names",
    "felt_values",
    "read_maps",
    "stage_cells",
    "standardised",
    "written_maps",
    "written_values",
]

LEVELS = ("node", "dimension")
# the square of it is how many numbers a communication graph holds
MOST_CELLS = 4096


def _is_split(graph: Graph, stage: Stage, level: str) -> bool:
    if level == "node":
        return False
    reads_reals = graph.info.get("d_input") is not None
    return isinstance(stage.core, (Activation, FloatInput)) or (isinstance(stage.core, Readout) and reads_reals)


def stage_cells(graph: Graph, stage: Stage, level: str) -> list[str]:
    """The names of a stage's cells: ``NODE``, or ``NODE.code[i]``."""
    if not _is_split(graph, stage, level):
        return list(stage.nodes)
    return [f"{n}.code[{i}]" for n, width in zip(stage.nodes, stage.code_widths, strict=True) for i in range(width)]


def cell_names(graph: Graph, level: str) -> tuple[str, ...]:
    """Every cell, in execution order.

    Raises:
        InputError: an unknown level, more than 4096 cells, or a graph that cannot be looked at so finely.
    """
    if level not in LEVELS:
        raise InputError(f"unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    if level == "dimension":
        for stage in graph.stages:
            if stage.post is not None and _is_split(graph, stage, level):
                raise InputError(
                    f"{stage.nodes[0]} writes through a norm, which ties its neurons together; use level='node' on a "
                    "graph refined into groups of neurons"
                )
        if graph.is_cut:
            raise InputError("this graph has cut edges; use level='node', or look at the whole graph")
    # counted before any name is made
    count = sum(sum(s.code_widths) if _is_split(graph, s, level) else len(s.nodes) for s in graph.stages)
    if count > MOST_CELLS:
        raise InputError(
            f"{graph!r} has {count} cells at level {level!r}, and {MOST_CELLS} is the limit; group neurons first "
            "(unweave.modules.group_neurons) and use level='node'"
        )
    return tuple(chain.from_iterable(stage_cells(graph, stage, level) for stage in graph.stages))


def cell_layers(graph: Graph, level: str) -> tuple[int, ...]:
    """The graph's layer of every cell."""
    return tuple(stage.layer for stage in graph.stages for _ in stage_cells(graph, stage, level))


def written_maps(graph: Graph, s: int, level: str) -> Float[Tensor, "cell width d_model"]:
    """From the coordinates in which :func:`written_values` gives what a cell of stage s writes, to the stream.

    They are those of the cell's code, or of the stream where those are fewer (or a norm stands between).
    """
    plan = plan_of(graph).stages[s]
    stage, weight = plan.stage, plan.node_write.float().to(graph.device)
    if _is_split(graph, stage, level):
        return rearrange(weight, "n w d -> (n w) 1 d")[_coordinates(stage.code_widths)]
    return weight if _in_code(weight, stage) else _identity(weight)


def written_values(t: Trace, s: int, level: str) -> Float[Tensor, "batch cell pos width"]:
    """What the cells of stage s write at every position, before :func:`written_maps`."""
    plan = t.plan.stages[s]
    if _is_split(t.graph, plan.stage, level):
        codes = rearrange(t.codes[s], "b n t w -> b (n w) t 1")[:, _coordinates(plan.stage.code_widths)]
    else:
        codes = t.codes[s] if _in_code(plan.node_write, plan.stage) else t.node_writes(s)
    return codes.detach().float()


def read_maps(graph: Graph, s: int, level: str) -> list[Float[Tensor, "cell width d_model"]]:
    """For every read of stage s, ports in order: from the normalised stream (gain, centring folded in) to the
    coordinates in which :func:`felt_values` gives what is felt there; those of the read, or of the stream where fewer.
    """
    plan = plan_of(graph).stages[s]
    maps = [read.folded(port.norm).float() for port in plan.ports for read in port.reads]
    if _is_split(graph, plan.stage, level):
        kept = _coordinates(plan.stage.code_widths)
        return [rearrange(m, "n w d -> (n w) 1 d")[kept] for m in maps]
    return [m if m.shape[1] <= m.shape[2] else _identity(m) for m in maps]


def felt_values(
    t: Trace, s: int, gradients: Gradients, level: str
) -> list[tuple[PortPlan, Float[Tensor, "batch cell pos width"]]]:
    """For every read of stage s, its port and the gradient there, so that felt @ map is the gradient at the stream
    that a port hears but for the part along that stream itself, which its norm takes away."""
    plan = t.plan.stages[s]
    kept = _coordinates(plan.stage.code_widths)
    out = []
    for port in plan.ports:
        inverse = None if port.norm is None else standardised(t, s, port)[1]
        for read, felt in zip(port.reads, gradients.reads[s, port.port.name], strict=True):
            felt = felt.float() if inverse is None else felt.float() * inverse
            if _is_split(t.graph, plan.stage, level):
                felt = rearrange(felt, "b n t w -> b (n w) t 1")[:, kept]
            elif felt.shape[-1] > read.map.d_in:
                felt = torch.einsum("bntw,nwd->bntd", felt, read.folded(port.norm).float())
            out.append((port, felt))
    return out


def standardised(
    t: Trace, s: int, port: PortPlan
) -> tuple[Float[Tensor, "batch #node pos d_model"], Float[Tensor, "batch #node pos 1"]]:
    """What a port hears before gain and bias, and one over what it was divided by; see :meth:`Norm.standardise`."""
    assert port.norm is not None
    heard = t.inputs[s, port.port.name].detach().float()
    n, inverse = port.norm.standardise(heard if heard.shape[1] in (1, len(port.row_of)) else heard[:, port.row_of])
    return n, inverse


def _in_code(weight: Float[Tensor, "node width d_model"], stage: Stage) -> bool:
    return stage.post is None and weight.shape[1] <= weight.shape[2]


def _identity(like: Float[Tensor, "cell width d_model"]) -> Float[Tensor, "cell d_model d_model"]:
    return torch.eye(like.shape[2], device=like.device).expand(len(like), -1, -1)


def _coordinates(widths: tuple[int, ...]) -> Int[Tensor, " coordinates"]:
    """Where the coordinates of blocks lie once all are padded to the widest."""
    return (torch.arange(max(widths)) < torch.tensor(widths)[:, None]).flatten().nonzero()[:, 0]
