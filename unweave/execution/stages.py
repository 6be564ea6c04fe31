"""Stages run one after another: what they hear, compute and write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import InputError, UnweaveError
from unweave.execution.hooks import Hooks, Patch
from unweave.execution.plans import PortPlan, StagePlan, plan_of, write_each
from unweave.execution.traces import Trace
from unweave.graph import Graph
from unweave.ops import Context

__all__ = ["finish_stage", "run_stages", "trace"]


def trace(
    graph: Graph,
    context: Context,
    *,
    keep: bool = False,
    apart: bool = False,
    record: frozenset[str] = frozenset(),
    patch: Mapping[str, Patch] | None = None,
    counterfactual: Trace | None = None,
) -> Trace:
    """Run all stages, keeping intermediate values for those who compute on them (statistics, scores).

    Args:
        keep: keep every port's input, normalised input, reads and every stage's codes.
        apart: compute what each node writes even where only the sum is needed.
        record, patch: see :func:`run`; names already checked.
        counterfactual: the run that cut edges of a resampling graph hear.
    """
    plan = plan_of(graph)
    out = Trace(graph, plan, context, keep=keep, apart=apart, counterfactual=counterfactual)
    run_stages(out, 0, Hooks(graph, record, dict(patch or {})))
    return out


def run_stages(t: Trace, start: int, hooks: Hooks | None = None, stop: int | None = None) -> None:
    """Run stage ``start`` and all after it (or those before ``stop``), on top of what the trace holds already."""
    hooks = hooks or Hooks(t.graph, frozenset(), {})
    for s in range(start, len(t.plan.stages) if stop is None else stop):
        try:
            hooks.stream(t, s)
            _run_stage(t, s, hooks)
        except (UnweaveError, RuntimeError, IndexError) as error:
            error.add_note(f"while running {', '.join(t.plan.stages[s].stage.nodes[:3])} (stage {s})")
            raise


def _run_stage(t: Trace, s: int, hooks: Hooks) -> None:
    plan = t.plan.stages[s]
    masked = not t.keep and any(port.masked for port in plan.ports) and not hooks.hears(plan)
    joint = None if masked or t.keep or hooks.active else plan.joint_rows
    reads = _masked_reads(t, plan) if masked else _reads(t, s, hooks, None if joint is None else joint[0])
    apart = joint is not None and any(read.shape[1] > 1 for read in reads)
    finish_stage(t, s, hooks.core(t, s, reads, joint[1] if joint is not None and apart else None), hooks)


def _masked_reads(t: Trace, plan: StagePlan) -> tuple[Tensor, ...]:
    """What nodes read of one stream that all hear, cut edges being zeros in their maps."""
    reads: list[Tensor] = []
    for port in plan.ports:
        x = t.stream(*plan.stage.visible)
        got = [read.shared(x) for read in (port.masked or port.reads)]
        if t.counterfactual is not None:
            other = t.counterfactual.stream(*plan.stage.visible)
            got = [r + gone.shared(other) for r, gone in zip(got, port.gone, strict=True)] if port.gone else got
        reads.extend(got)
    return tuple(reads)


def _reads(t: Trace, s: int, hooks: Hooks, joint: Int[Tensor, "ports row"] | None) -> tuple[Tensor, ...]:
    """What nodes read of each port (``joint``: of which row of what the port hears, where nodes share rows)."""
    plan = t.plan.stages[s]
    reads: list[Tensor] = []
    normed_once: dict[tuple[int, int], Tensor] = {}  # ports that hear the same often share their norm, too
    for number, (port, heard) in enumerate(zip(plan.ports, _hear(t, plan), strict=True)):
        x = hooks.port(t, s, port, heard)
        norm, key = port.norm, (id(x), id(port.norm))
        if key not in normed_once:
            normed_once[key] = x if norm is None else norm.apply(x)
        normed = normed_once[key]
        if x.shape[1] == 1:
            got = tuple(read.shared(normed[:, 0]) for read in port.reads)
        else:
            row_of = port.row_of if joint is None else joint[number]
            row_of = row_of if x.shape[1] == int(port.row_of.max()) + 1 else torch.arange(x.shape[1])
            got = tuple(read.apart(normed, row_of) for read in port.reads)
        if t.keep:
            # one read per node, so that gradients at the reads tell apart heads that share keys and values
            got = tuple(
                _one_each(r, p.copies) if r.shape[1] < len(plan.stage.nodes) else r
                for r, p in zip(got, port.reads, strict=True)
            )
            t.inputs[s, port.port.name], t.normed[s, port.port.name], t.reads[s, port.port.name] = x, normed, got
        reads.extend(got)
    return tuple(reads)


def _one_each(read: Float[Tensor, "batch block pos width"], copies: int) -> Float[Tensor, "batch node pos width"]:
    """A read of each node; where all share one, that one seen many times."""
    return read.expand(-1, copies, -1, -1) if read.shape[1] == 1 else read.repeat_interleave(copies, 1)


def finish_stage(t: Trace, s: int, codes: Tensor, hooks: Hooks | None = None) -> None:
    """From the codes of stage s to what it writes."""
    plan = t.plan.stages[s]
    last = plan.write is None
    if t.keep or last or plan.codes_needed:
        t.codes[s] = codes
    if last:
        t.total.append(codes[:, 0])
        t.each.append(None)
        return
    patched = hooks is not None and hooks.touches(s)
    each = total = None
    if plan.each_needed or t.apart or patched:
        each = write_each(plan, codes)
        each = hooks.node(t, s, each) if hooks is not None and patched else each
        total = each.sum(1) if each.shape[1] > 1 else each[:, 0]
    else:
        total = _write_sum(plan, codes)
    t.total.append(total if plan.stage.bias is None else total + plan.stage.bias)
    t.each.append(each)


def _write_sum(plan: StagePlan, codes: Float[Tensor, "batch node pos width"]) -> Float[Tensor, "batch pos d_model"]:
    assert plan.write is not None
    total = plan.write.apply(rearrange(codes, "b n t w -> b t (n w)"))
    return total if plan.stage.post is None else plan.stage.post.apply(total)


def _hear(t: Trace, plan: StagePlan) -> list[Float[Tensor, "batch row pos d_model"]]:
    """For each port, the distinct sums that its nodes hear."""
    if not plan.ports:
        return []
    lo, hi = plan.stage.visible
    everything = t.stream(lo, hi)[:, None]
    heard = [everything] * len(plan.ports)
    if plan.table is not None:
        sums = iter(_cut_sums(t, lo, hi, plan.table, everything).split(list(plan.rows), dim=1))
        heard = [everything if port.table is None else next(sums) for port in plan.ports]
    heard = [
        x if port.offset is None else x + _at_positions(port.offset, x.shape[2]).to(x.dtype)
        for port, x in zip(plan.ports, heard, strict=True)
    ]
    return [_add_wires(t, lo, hi, port, x) for port, x in zip(plan.ports, heard, strict=True)]


def _add_wires(
    t: Trace, lo: int, hi: int, port: PortPlan, x: Float[Tensor, "batch row pos d"]
) -> Float[Tensor, "batch row pos d"]:
    """What comes over edges that carry some dimensions only."""
    wires = port.port.wires
    if wires is None:
        return x
    sent = t.written(lo, hi)[:, wires.writers]
    if t.counterfactual is not None:
        sent = sent - t.counterfactual.written(lo, hi)[:, wires.writers]
    return x.index_add(1, port.row_of[wires.nodes], wires.carry(sent))


def _cut_sums(
    t: Trace, lo: int, hi: int, table: Bool[Tensor, "row writers"], everything: Float[Tensor, "batch 1 pos d"]
) -> Float[Tensor, "batch row pos d"]:
    """Row r: the sum of the writers marked in table[r], plus what is never cut (biases)."""
    written = t.written(lo, hi)
    columns = (~table).any(0).nonzero()[:, 0]
    whole = everything.dtype == torch.float32 and 2 * len(columns) < table.shape[1]
    if whole:  # few writers are cut somewhere: subtract those from the shared sum
        sums = everything - _weigh(~table[:, columns], written[:, columns])
    else:
        sums = _weigh(table, written)
        biases = [stage.stage.bias for stage in t.plan.stages[lo:hi] if stage.stage.bias is not None]
        if biases:
            sums = sums + torch.stack(biases).sum(0)
    if t.counterfactual is not None:
        sums = sums + _weigh(~table, t.counterfactual.written(lo, hi))
    return sums


def _weigh(table: Bool[Tensor, "row writers"], written: Float[Tensor, "batch writers pos d"]) -> Tensor:
    flat = table.to(written.dtype) @ rearrange(written, "b n t d -> b n (t d)")
    return rearrange(flat, "b r (t d) -> b r t d", t=written.shape[2])


def _at_positions(offset: Float[Tensor, "row _ d"], n_pos: int) -> Float[Tensor, "row _ d"]:
    if offset.shape[1] == 1 or offset.shape[1] == n_pos:
        return offset
    if offset.shape[1] < n_pos:
        raise InputError(
            f"the means left by cut edges cover {offset.shape[1]} positions and the input has {n_pos}; "
            "collect means on longer texts or average them over positions"
        )
    return offset[:, :n_pos]
