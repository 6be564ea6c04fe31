"""Cut edges out of a stage and leave constants in their place: the inside of :meth:`Graph.restrict`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.errors import InputError
from unweave.graph.narrowing import drop_wires
from unweave.graph.parts import Stage

__all__ = ["check_means", "cut_stage"]


def check_means(
    writers: Sequence[str],
    means: Mapping[str, Tensor] | None,
    cut: Bool[Tensor, "ports writers"],
    width_of: Callable[[str], int],
) -> Mapping[str, Tensor]:
    """The means, after checking that every writer with a cut edge has one of its stream's width.

    Raises:
        InputError: means are missing or of a wrong shape.
    """
    if means is None:
        raise InputError("mean ablation needs means=...; collect them with unweave.collect_means(graph, data)")
    for i in cut.any(0).nonzero()[:, 0].tolist():
        name = writers[i]
        if name not in means:
            raise InputError(f"no mean was given for {name}; collect means on this graph")
        width, got = width_of(name), tuple(means[name].shape)
        if len(got) != 2 or got[1] != width:
            raise InputError(f"the mean of {name} must be [1, {width}] or [pos, {width}], got {got}")
    return means


def cut_stage(
    stage: Stage,
    cut: Mapping[str, Bool[Tensor, "nodes writers"]],
    writers: Sequence[str],
    means: Mapping[str, Tensor] | None,
) -> Stage:
    """A stage whose ports no longer hear the writers marked, by port name, in ``cut``."""
    ports = []
    for port in stage.ports:
        gone = cut[port.name]
        if not bool(gone.any()):
            ports.append(port)
            continue
        port = drop_wires(port, gone, writers, means)
        heard = ~torch.zeros_like(gone) if port.edges is None else port.edges.cpu()
        edges, offset = heard & ~gone, port.offset
        if means is not None and bool((whole := gone & heard).any()):
            offset = _add_constants(offset, whole, [means.get(n) for n in writers])
        ports.append(dataclasses.replace(port, edges=edges.to(stage.device), offset=offset))
    return dataclasses.replace(stage, ports=tuple(ports))


def _add_constants(
    offset: Float[Tensor, "nodes _ d_model"] | None,
    gone: Bool[Tensor, "nodes writers"],
    constants: list[Float[Tensor, "_ d_model"] | None],
) -> Float[Tensor, "nodes _ d_model"]:
    """Offsets after the writers marked as gone have been replaced by their constants."""
    given = [(i, c) for i, c in enumerate(constants) if c is not None]
    longest = max(c.shape[0] for _, c in given)
    if any(c.shape[0] not in (1, longest) for _, c in given):
        raise InputError("means per position must cover the same number of positions for every writer")
    table = torch.stack([c.expand(longest, -1) for _, c in given])
    weights = gone[:, [i for i, _ in given]].to(table)
    added = torch.einsum("nw,wpd->npd", weights, table)
    if offset is None:
        return added
    if offset.shape[1] != added.shape[1] and 1 not in (offset.shape[1], added.shape[1]):
        raise InputError("means per position must cover the same number of positions in every cut")
    return offset + added
