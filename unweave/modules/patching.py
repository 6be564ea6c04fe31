"""What it costs, in nats, to run a graph with some of its values patched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import batch_trace
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import Patch, StagePlan, check_inputs, trace
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap_ratio
from unweave.progress import track
from unweave.scope import Scope, divergence, position_mask

__all__ = [
    "Patches",
    "blocks_of",
    "by_stage",
    "nats_per_token",
    "patched_nats",
    "port_row",
    "refuse_resampling",
    "writing_nodes",
]

# the patches of one run; made anew for every batch, since they may depend on it and remember what they have seen
Patches: TypeAlias = Callable[[Batch], Mapping[str, Patch]]


def blocks_of(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The nodes of every block of the graph's partition; a node that no module names is a block of its own.

    Raises:
        InputError: a module has the name of a node that is outside it.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction").quotient({"input": ["embed", "pos_embed"]})
        >>> list(blocks_of(graph))[:2]
        ['input', 'blocks.0.attn.head.0']
    """
    out: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node not in graph.modules and node in graph.modules.values():
            raise InputError(f"module {node!r} has the name of a node outside it; give it another name")
        out.setdefault(graph.modules.get(node, node), []).append(node)
    return {block: tuple(nodes) for block, nodes in out.items()}


def writing_nodes(graph: Graph, block: str) -> tuple[str, ...]:
    """The nodes of a block.

    Raises:
        UnknownNameError: no such block.
        InputError: the output is one of them.
    """
    blocks = blocks_of(graph)
    if block not in blocks:
        raise UnknownNameError("module", block, blocks)
    silent = [n for n in blocks[block] if n not in graph.writers]
    if silent:
        raise InputError(f"module {block!r} holds the output {silent[0]}, which writes nothing that could be replaced")
    return blocks[block]


def by_stage(graph: Graph, nodes: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """The nodes of a module by stage, in execution order."""
    out: dict[int, tuple[str, ...]] = {}
    for n in nodes:
        out[graph.where[n][0]] = (*out.get(graph.where[n][0], ()), n)
    return out


def port_row(x: Tensor, plan: StagePlan, name: str, i: int) -> Float[Tensor, "batch pos d_model"]:
    """What node i hears at a port, from what a kept run holds for all nodes of its stage."""
    (port,) = [p for p in plan.ports if p.port.name == name]
    if x.shape[1] == 1:
        return x[:, 0]
    return x[:, int(port.row_of[i]) if x.shape[1] == int(port.row_of.max()) + 1 else i]


def refuse_resampling(graph: Graph) -> None:
    """Refuse a graph whose cut edges hear another input.

    Raises:
        InputError: it is one.
    """
    if graph.resample:
        raise InputError("the graph's cut edges hear another input; use a graph that is whole or cut to means or zeros")


@torch.no_grad()
def patched_nats(
    graph: Graph,
    data: TokenData,
    scope: Scope,
    patches: Mapping[str, Patches],
    *,
    batch_size: int = 16,
    description: str = "running with patches",
    progress: bool | None = None,
) -> dict[str, np.ndarray]:
    """Nats by which patched runs differ from the graph's own, summed over each sequence's positions in the scope.

    Returns:
        By the patches' names, ``[n]``; and "tokens", how many positions of each sequence are in the scope.

    Raises:
        EmptyDataError: the scope selects no position.

    Cost:
        1 + (number of patches) forward passes.
    """
    refuse_resampling(graph)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("tokens", *patches)}
    total = -(-len(data) // batch_size)
    for batch in track(data.batches(batch_size), description, total, show=progress):
        reference = batch_trace(graph, batch).output
        rows["tokens"].append(position_mask(scope, batch).sum(1).double().numpy())
        for name, patch in patches.items():
            context = check_inputs(graph, batch.inputs, batch.mask)
            logits = trace(graph, context, patch=patch(batch)).output
            nats: Tensor = divergence(scope, reference, logits, batch).sum(1)
            rows[name].append(nats.double().cpu().numpy())
    out = {name: np.concatenate(parts) for name, parts in rows.items()} if rows["tokens"] else {}
    if not out or out["tokens"].sum() == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    return out


def nats_per_token(nats: np.ndarray, tokens: np.ndarray, seed: int = 0) -> Estimate:
    """A sum over positions as nats per token of the scope, with its 95% interval over resampled sequences."""
    return bootstrap_ratio(nats, tokens, seed)
