"""Edges ablated one by one, many in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.ablation import Replacement, batch_trace
from unweave.data import Batch, TokenData
from unweave.data.tokens import repeat_rows
from unweave.errors import InputError
from unweave.execution import Trace, finish_stage, plan_of, run_stages
from unweave.freezing import freeze
from unweave.graph import Graph, Port, at_positions
from unweave.scope import Scope, divergence
from unweave.scoring.results import EdgeScores, scores_from, sequence_moments
from unweave.statistics import (
    Sums,
    accumulate,
    check_finite,
)

__all__ = ["calibrate", "measure_edges"]

# how many tokens one forward pass over ablated copies may hold; bounds memory, not the result
TOKENS_AT_ONCE = 16384
# the same for numbers heard: a token of a convolutional network is an image
NUMBERS_AT_ONCE = 1 << 25


def measure_edges(
    graph: Graph,
    data: TokenData,
    scope: Scope,
    edges: Bool[Tensor, "ports writers"],
    instead: Replacement,
    *,
    frozen: str = "none",
    batch_size: int = 16,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> EdgeScores:
    """The effect of ablating each marked edge to its mean, alone: the oracle of every attribution.

    Everything before the edge's reader is run once; of the reader's stage only the node in question is
    recomputed; what follows runs on many copies of the batch at once.

    Args:
        frozen: what keeps the values of the graph's own run, see the module's text.

    Returns:
        :class:`EdgeScores` with NaN for edges that were not marked; node scores are NaN.

    Raises:
        InputError: a marked edge is not in the graph, or an unknown word for what is frozen.
        UnsupportedModelError: norms are to be frozen and a layer's writes pass another one (Gemma).

    Cost:
        On average half a forward pass per edge.
    """
    if bool((edges & ~graph.edge_matrix).any()):
        raise InputError(f"{graph.name_edges(edges & ~graph.edge_matrix)[0]} is not an edge of this graph")

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = batch_trace(graph, batch, keep=True)
        check_finite(t, batch)
        sent = instead.sent(graph, batch, t.counterfactual)
        held = freeze(t, frozen)
        t = dataclasses.replace(t, graph=held, plan=plan_of(held))
        out = torch.zeros(len(batch.index), len(graph.ports), len(graph.writers), device=graph.device)
        for s, port, rows, columns in _chunks(graph, edges, batch):
            reference = t.output.repeat(len(rows), 1, 1)
            logits = _ablated_logits(t, s, port, rows, columns, sent)
            values = divergence(scope, reference, logits, batch.repeat(len(rows))).sum(1)
            start = graph.port_starts[s, graph.stages[s].ports[port].name]
            first = graph.visible_writers(s).start
            out[:, start + rows, first + columns] = rearrange(values, "(k b) -> b k", k=len(rows)).float()
        nodes = out.new_zeros(len(batch.index), len(graph.writers))
        return sequence_moments({"edge": out, "node": nodes}, scope, batch)

    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "checkpoint": checkpoint}
    identity = ("exact", edges.nonzero().tolist(), frozen, graph, scope, instead)
    sums = accumulate(data, step, description="measuring edges", identity=identity, **options)
    scores = scores_from(graph, sums, "exact", len(data))
    unknown = ~edges
    nan = torch.full_like(scores.node_nats, torch.nan)
    return dataclasses.replace(
        scores,
        nats=scores.nats.masked_fill(unknown, torch.nan),
        se=scores.se.masked_fill(unknown, torch.nan),
        measured=scores.measured & edges,
        node_nats=nan,
        node_se=nan,
        frozen=frozen,
    )


def _chunks(graph: Graph, edges: Tensor, batch: Batch) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(stage, port number, nodes, writers among the visible) in pieces that fit in memory."""
    for s, stage in enumerate(graph.stages):
        for p, port in enumerate(stage.ports):
            tokens = min(TOKENS_AT_ONCE, NUMBERS_AT_ONCE // port.reads[0].map.d_in)
            size = max(1, tokens // (batch.inputs.shape[0] * batch.inputs.shape[1]))
            row = graph.port_starts[s, port.name]
            marked = edges[row : row + len(stage.nodes), graph.visible_writers(s)].nonzero()
            for piece in marked.split(size):
                if len(piece):
                    yield s, p, piece[:, 0], piece[:, 1]


def _ablated_logits(
    t: Trace, s: int, p: int, nodes: Tensor, writers: Tensor, sent: list[Tensor]
) -> Float[Tensor, "copies_batch pos d_out"]:
    """Logits of one copy of the batch per edge, in which node ``nodes[k]`` does not hear ``writers[k]``."""
    plan = t.plan.stages[s]
    port, name = plan.ports[p], plan.ports[p].port.name
    heard = t.written(*plan.stage.visible)[:, writers]
    shape = (-1, t.context.inputs.shape[0], t.context.n_pos, -1)
    replaced = torch.cat([values.expand(shape) for values in sent[slice(*plan.stage.visible)]])[writers]
    x = t.inputs[s, name]
    x = x if x.shape[1] == 1 else x[:, port.row_of[nodes] if x.shape[1] <= int(port.row_of.max()) + 1 else nodes]
    x = x + _carried(port.port, rearrange(replaced, "k b t d -> b k t d").to(heard) - heard, nodes, writers)
    normed = port.port.norm.for_nodes(nodes).apply(x) if port.port.norm is not None else x
    reads = []
    for q, other in enumerate(plan.ports):
        for r, read in enumerate(other.reads):
            kept = t.reads[s, other.port.name][r]
            reads.append(read.apart_for(normed, nodes) if q == p else kept[:, nodes])
    codes = at_positions(plan.stage, plan.stage.core.for_nodes(nodes).forward(tuple(reads), t.context), nodes)
    return _run_from(t, s, nodes, codes)


def _carried(
    port: Port, change: Float[Tensor, "batch copies pos d"], nodes: Tensor, writers: Tensor
) -> Float[Tensor, "batch copies pos d"]:
    """The part of a change in what a writer writes that reaches the node: all of it, or what a narrow edge carries."""
    wires = port.wires
    if wires is None:
        return change
    same = (nodes[:, None] == wires.nodes) & (writers[:, None] == wires.writers)
    narrow, which = same.nonzero(as_tuple=True)
    if len(narrow) == 0:
        return change
    return change.index_copy(1, narrow, change[:, narrow] @ wires.right[which].mT @ wires.left[which].mT)


def _run_from(t: Trace, s: int, nodes: Tensor, codes: Float[Tensor, "batch copies pos width"]) -> Tensor:
    """Finish the run once per copy, copy k with the code of node ``nodes[k]`` of stage s replaced."""
    copies = len(nodes)
    context = t.context.expand(copies)
    replaced = repeat(t.codes[s], "b n t w -> k b n t w", k=copies).clone()
    replaced[torch.arange(copies), :, nodes] = rearrange(codes, "b k t w -> k b t w")
    out = Trace(t.graph, t.plan, context, counterfactual=_repeated(t.counterfactual, copies))
    later_apart = {i for stage in t.graph.stages[s + 1 :] for i in range(*stage.visible)}
    for i in range(s):
        apart = t.plan.stages[i].each_needed and i in later_apart
        out.each.append(repeat_rows(t.node_writes(i), copies) if apart else None)
        out.total.append(t.total[i])  # heard only through the sums below
    horizons = {stage.visible for stage in t.graph.stages[s + 1 :]}
    for lo, hi in {(lo, min(hi, s)) for lo, hi in horizons if lo < min(hi, s)}:
        out.preset(lo, hi, repeat_rows(t.stream(lo, hi), copies))
    finish_stage(out, s, rearrange(replaced, "k b n t w -> (k b) n t w"))
    run_stages(out, s + 1)
    return out.output


def _repeated(t: Trace | None, copies: int) -> Trace | None:
    """What cut edges carry in every copy of a batch."""
    if t is None:
        return None
    out = Trace(t.graph, t.plan, t.context.expand(copies))
    for s in range(len(t.graph.stages) - 1):
        out.each.append(repeat_rows(t.node_writes(s), copies))
        out.total.append(repeat_rows(t.total[s], copies))
    return out


def calibrate(
    scores: EdgeScores, data: TokenData, scope: Scope, instead: Replacement, top: int, **options: Any
) -> EdgeScores:
    """Measure the effects of the ``top`` edges with the largest attributions and put them in their place.

    The second order is too small for the few largest edges, where the output saturates and norms rescale; those
    are few, so measuring them is cheap. All other edges keep their attribution. What the
    scores hold frozen is held here, too.
    """
    marked = scores.top(top)
    exact = measure_edges(scores.graph, data, scope, marked, instead, frozen=scores.frozen, **options)
    return dataclasses.replace(
        scores,
        nats=torch.where(marked, exact.nats, scores.nats),
        se=torch.where(marked, exact.se, scores.se),
        measured=scores.measured | marked,
    )
