"""Streaming statistics: one pass over the data, sums in float64, memory that does not grow with it.

Everything measured on data is a dictionary of sums. A *step* turns a batch into such a dictionary; adding
dictionaries merges parts, whatever the batching or order; :func:`accumulate` does the loop, the progress bar,
the checkpoints and the search for the node where a NaN came from.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import KINDS, Means, Replacement, counterfactual_trace
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, NonFiniteError
from unweave.execution import Trace, check_inputs, plan_of, trace, write_each
from unweave.files import Checkpoint
from unweave.graph import Graph, Stage
from unweave.ops import Placed
from unweave.progress import track
from unweave.scope import Scope, describe, fisher_cotangent, position_mask

__all__ = [
    "FisherPass",
    "Gradients",
    "Sums",
    "Tally",
    "accumulate",
    "check_finite",
    "collect_means",
    "differentiable_trace",
    "gradients_of",
    "identify",
    "merge",
    "replacement",
]

Sums = dict[str, Tensor]
SECONDS_BETWEEN_CHECKPOINTS = 30.0


def merge(a: Sums, b: Mapping[str, Tensor]) -> Sums:
    """The sums over two parts of the data together, in float64.

    Example:
        >>> import torch
        >>> merge({"n": torch.tensor(1.0)}, {"n": torch.tensor(2.0)})["n"]
        tensor(3., dtype=torch.float64)
    """
    out = dict(a)
    for name, value in b.items():
        wide = value.detach().to(torch.float64)
        out[name] = out[name].to(torch.float64) + wide if name in out else wide
    return out


def accumulate(
    data: TokenData,
    step: Callable[[Batch], Mapping[str, Tensor]],
    *,
    batch_size: int = 16,
    description: str = "collecting statistics",
    checkpoint: str | Path | None = None,
    identity: Sequence[object] = (),
    progress: bool | None = None,
) -> Sums:
    """Sum ``step(batch)`` over all batches.

    Args:
        step: a batch -> sums over it; must treat every sequence alike whatever batch it is in.
        checkpoint: a file that keeps the sums so far every half minute, so that a killed pass resumes where it
            stopped; removed at the end.
        identity: all that the sums depend on besides the data, see :func:`identify`; a checkpoint of something else is
            refused.

    Raises:
        EmptyDataError: the data set has no sequence.

    Cost:
        One call of ``step`` per batch; memory for one batch and one set of sums.
    """
    if len(data) == 0:
        raise EmptyDataError("the data set holds no sequence")
    saver = None
    sums: Sums = {}
    start = 0
    if checkpoint is not None:
        saver = Checkpoint(Path(checkpoint), identify(data, *identity, batch_size))
        found = saver.load()
        if found is not None:
            sums, start = dict(found[0]), int(found[1]["next_batch"])
    n_batches = -(-len(data) // batch_size)
    saved = time.monotonic()
    batches = data.batches(batch_size, start=start)
    for number, batch in enumerate(track(batches, description, n_batches - start, show=progress), start):
        sums = merge(sums, step(batch))
        if saver is not None and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            saver.save({k: v.cpu() for k, v in sums.items()}, {"next_batch": number + 1})
            saved = time.monotonic()
    if saver is not None:
        saver.clear()
    return sums


def identify(data: TokenData, *things: object) -> str:
    """A hash of data and of all that a pass over it depends on, to tell whether a checkpoint belongs to it.

    Args:
        things: graphs count with their edges and weights, scopes with the positions that they mark in the data and the
            class of every output, replacements with their means, anything else as it prints.
    """
    digest = hashlib.sha256(data.fingerprint().encode())
    for thing in things:
        digest.update(b"/")
        if isinstance(thing, Graph):
            digest.update(repr((thing.nodes, thing.resample, _sums_of(thing.tensors))).encode())
            digest.update(thing.edge_matrix.numpy().tobytes())
        elif isinstance(thing, Scope):
            digest.update(repr(describe(thing)).encode())
            if thing.quotient is not None:
                digest.update(thing.quotient.classes.cpu().numpy().tobytes())
            if callable(thing.positions):
                for batch in data.batches(256):
                    digest.update(position_mask(thing, batch).cpu().numpy().tobytes())
        elif isinstance(thing, Replacement):
            digest.update(repr((thing.kind, _sums_of((thing.means or {}).values()))).encode())
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()[:24]


def _sums_of(tensors: Iterable[Tensor]) -> list[tuple[float, float]]:
    return [(float(t.double().sum()), float(t.double().square().sum())) for t in tensors]


def collect_means(
    graph: Graph,
    data: TokenData,
    *,
    per_position: bool = False,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> dict[str, Float[Tensor, "#pos d_model"]]:
    """What each node writes on average: the constants of mean ablation.

    mean_i = sum over real tokens of y_i / number of real tokens; with ``per_position``, one mean for each
    position (positions no text reaches get the overall mean). What a node writes is linear in its code, so codes are
    averaged, which are shorter; only where the writes pass another norm (Gemma) are they averaged themselves.

    Returns:
        A mapping from every writer to ``[1, d_model]`` or ``[n_pos, d_model]``, float32.

    Raises:
        NonFiniteError: names the node and batch.

    Cost:
        One forward pass over the data.
    """

    by_position = per_position or graph.is_unrolled

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        check_finite(t, batch)
        weight = batch.mask.to(graph.device, torch.float64)
        out: Sums = {"tokens": weight.sum(0) if by_position else weight.sum()[None]}
        for s, stage in enumerate(graph.stages[:-1]):
            each = t.codes[s] if stage.post is None else t.node_writes(s)
            kept = "t" if by_position else ""
            sums = torch.einsum(f"bntd,bt->n{kept}d", each.to(torch.float64), weight)
            out[str(s)] = sums if by_position else sums[:, None]
        # a batch is as long as its longest text
        short = data.tokens.shape[1] - batch.inputs.shape[1] if by_position else 0
        return {k: F.pad(v, (0, short) if k == "tokens" else (0, 0, 0, short)) for k, v in out.items()}

    sums = accumulate(
        data,
        step,
        batch_size=batch_size,
        description="means",
        checkpoint=checkpoint,
        identity=("means", per_position, graph),
        progress=progress,
    )
    tokens = sums.pop("tokens")
    means: dict[str, Tensor] = {}
    for s, stage in enumerate(graph.stages[:-1]):
        mean = _means(sums[str(s)], tokens, stage, per_position)
        if stage.post is None:
            mean = _write_means(graph, s, mean)
        means |= {name: mean[i].float().to(graph.device) for i, name in enumerate(stage.nodes)}
    return means


def _means(
    sums: Float[Tensor, "nodes #pos width"], tokens: Float[Tensor, " pos"], stage: Stage, per_position: bool
) -> Float[Tensor, "nodes #pos width"]:
    """Means over the positions where a node writes, or at each; positions that no text reaches get the former."""
    if stage.positions is None:
        overall = sums.sum(1, keepdim=True) / tokens.sum()
        where = None
    else:
        where = stage.positions[:, : len(tokens)].to(tokens)
        overall = sums.sum(1, keepdim=True) / (where @ tokens).clamp(min=1)[:, None, None]
    if per_position:
        mean = torch.where(tokens[None, :, None] > 0, sums / tokens.clamp(min=1)[None, :, None], overall)
    else:
        mean = overall
    return mean if where is None else mean * where[:, :, None]


def _write_means(graph: Graph, s: int, codes: Float[Tensor, "nodes #pos width"]) -> Float[Tensor, "nodes #pos d_model"]:
    """What the nodes of stage s write at these codes, in the codes' precision."""
    plan = plan_of(graph).stages[s]
    assert plan.write is not None
    if plan.write.keeps_blocks or isinstance(plan.write, Placed):
        return write_each(plan, codes[None])[0]
    return codes @ plan.node_write.to(codes)


def replacement(
    graph: Graph, data: TokenData, kind: str = "mean", *, means: Means | None = None, seed: int = 0, **options: Any
) -> tuple[Replacement, TokenData]:
    """What ablated edges carry, with the means collected and the partners drawn that the kind needs.

    Args:
        means: known already, for "mean" and "mean per position".
        options: of :func:`collect_means`.

    Returns:
        (the replacement, the data with partners where the kind needs them).

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown ablation {kind!r}; choose one of {', '.join(KINDS)}")
    if kind in ("resample", "counterfactual"):
        instead = Replacement(kind)
        return instead, instead.paired(data, seed)
    if kind == "zero":
        width = {w: graph.find(w)[0].write.d_out for w in graph.writers}  # type: ignore[union-attr]
        return Replacement(kind, {w: torch.zeros(1, d, device=graph.device) for w, d in width.items()}), data
    if means is None:
        means = collect_means(graph, data, per_position=kind == "mean per position", **options)
    return Replacement(kind, means), data


def check_finite(t: Trace, batch: Batch) -> None:
    """Refuse a run in which something is NaN or infinite.

    Raises:
        NonFiniteError: names the first node at fault and the sequences of the batch.
    """
    if bool(torch.isfinite(t.output[batch.mask.to(t.output.device)]).all()):
        return
    mask = batch.mask.to(t.output.device)
    for s, stage in enumerate(t.graph.stages):
        bad = ~torch.isfinite(t.total[s])[mask].all(-1)
        if bool(bad.any()):
            rows = torch.nonzero(mask)[bad][:, 0].unique()
            sequences = batch.index[rows.cpu()].tolist()[:5]
            raise NonFiniteError(
                f"{stage.nodes[0] if len(stage.nodes) == 1 else 'one of ' + ', '.join(stage.nodes)} writes NaN or inf "
                f"on sequences {sequences}; lower the precision's demands (float32), or look at these inputs"
            )


# ---- one backward pass per cotangent, shared by all that is computed from it ------------------------------


@dataclass(frozen=True)
class Gradients:
    """Gradients of one cotangent.

    Attributes:
        reads: by (stage, port), at each read ``[batch node pos width]``.
        totals: by stage, at what the channels and the first embedding write ``[batch pos d_model]``.
    """

    reads: dict[tuple[int, str], list[Tensor]]
    totals: dict[int, Tensor] = field(default_factory=dict)


@runtime_checkable
class Tally(Protocol):
    """What one measure has gathered on one batch."""

    def add(self, gradients: Gradients) -> None:
        """Take in the gradients of one more cotangent."""

    def sums(self) -> Sums:
        """The sums over the batch, when all cotangents are in."""


@dataclass(frozen=True)
class FisherPass:
    """A step for :func:`accumulate`: one forward and ``samples`` backward passes, whatever is measured on them.

    Attributes:
        measures: each starts a :class:`Tally` on a run and its batch; their sums are joined under their names.
    """

    graph: Graph
    scope: Scope
    samples: int
    seed: int
    measures: tuple[Callable[[Trace, Batch], Tally], ...]

    def __call__(self, batch: Batch) -> Sums:
        t = differentiable_trace(self.graph, batch)
        generator = torch.Generator(self.graph.device).manual_seed(self.seed * 1_000_003 + int(batch.index[0]))
        tallies = [measure(t, batch) for measure in self.measures]
        for sample in range(self.samples):
            cotangent = fisher_cotangent(self.scope, t.output.detach(), batch, generator)
            gradients = gradients_of(t, t.output, cotangent, retain=sample < self.samples - 1)
            for tally in tallies:
                tally.add(gradients)
        return {name: value for tally in tallies for name, value in tally.sums().items()}


def differentiable_trace(graph: Graph, batch: Batch, patch: Any = None, other: Trace | None = None) -> Trace:
    """A kept run whose reads can be differentiated, though no weight asks for gradients (``other``: as
    in :func:`batch_trace`)."""
    context, given = check_inputs(graph, batch.inputs, batch.mask), patch or {}
    with torch.enable_grad():
        if graph.resample:
            other = other or counterfactual_trace(graph, batch)
        first = {n: _leaf(given.get(n)) for n in graph.stages[0].nodes}
        t = trace(graph, context, keep=True, patch=first, counterfactual=other if graph.resample else None)
    check_finite(t, batch)
    return t


def _leaf(inner: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """A patch that makes a value the start of differentiation, after another patch."""
    return lambda y: (y if inner is None else inner(y)).detach().requires_grad_()


def gradients_of(t: Trace, output: Tensor, cotangent: Tensor | None = None, *, retain: bool = False) -> Gradients:
    """The gradients of an output of a run at all its reads and, where no edge is cut, at its totals; zero where they
    are stopped (:func:`unweave.freezing.hold`)."""
    inner = range(len(t.graph.stages) - 1)
    stages = () if t.graph.is_cut else [s for s in inner if t.total[s].requires_grad]
    flat = [r for reads in t.reads.values() for r in reads] + [t.total[s] for s in stages]
    got = iter(torch.autograd.grad(output, flat, cotangent, retain_graph=retain, materialize_grads=True))
    reads = {key: [next(got) for _ in reads] for key, reads in t.reads.items()}
    return Gradients(reads, {s: next(got) for s in stages})
