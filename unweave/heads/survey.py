"""The pass over the data: every head looked at by every detector."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import Trace, check_inputs, trace
from unweave.freezing import clean_pattern
from unweave.graph import Graph
from unweave.heads.detectors import DETECTORS, View
from unweave.heads.scores import HeadScores, summarise
from unweave.ops import Attention
from unweave.paths import ov_circuit
from unweave.statistics import Sums, accumulate, check_finite

__all__ = ["score_heads"]

# below this, a standard error over sequences says little
FEWEST_SEQUENCES = 8


def score_heads(
    graph: Graph,
    data: TokenData,
    detectors: Iterable[str] | None = None,
    *,
    delimiters: str | Iterable[int] | None = None,
    token_strings: Sequence[str] | None = None,
    alpha: float = 0.01,
    shuffles: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> HeadScores:
    """Which heads attend to the previous token, to duplicates, after earlier copies, ..., each against a null.

    Args:
        detectors: names from :data:`DETECTORS`; by default all for which there is what they need.
        delimiters: ids, or a regular expression (``re.search``) on ``token_strings``; needed by "delimiter".
        token_strings: the string of every token.
        alpha: level of the verdict.
        shuffles: how many other sequences each is paired with.
        seed: of the pairing.

    Returns:
        :class:`HeadScores`.

    Raises:
        UnknownNameError: an unknown detector.
        InputError: no heads, no tokens, no delimiters where they are needed, or numbers that make no sense.
        EmptyDataError: fewer than 8 sequences.

    Cost:
        One forward pass with explicit patterns, two with "positional"; per layer shuffles x batch x queries x keys.
        "copy-suppression" also reads the stream in front of every layer out (batch x positions x outputs).

    Exact?
        Scores and null means are those of the data. p takes z as normal, which is rough for few sequences and small
        p; the least excess is what keeps small but certain differences out of the verdict.

    Example:
        >>> import unweave
        >>> data = unweave.load_data("zoo:induction", limit=32)
        >>> found = score_heads(unweave.capture("zoo:induction"), data).labels
        >>> found["blocks.1.attn.head.1"]
        ('induction',)

    Source:
        In each entry of :data:`DETECTORS`; Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    marked = _delimiters(graph, delimiters, token_strings)
    names = _check(graph, data, detectors, marked, alpha, shuffles)
    shifts = torch.randperm(len(data) - 1, generator=torch.Generator().manual_seed(seed))[:shuffles] + 1
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    profile = _profile(graph, data, **options) if "positional" in names else None
    lowered = _lowered(graph) if "copy-suppression" in names else None

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        check_finite(t, batch)
        per_stage: list[dict[str, Tensor]] = []
        for s in _attention_stages(graph):
            view = _view(t, s, batch, data, shifts, marked, profile, lowered)
            per_stage.append({name: torch.stack(DETECTORS[name].measure(view), -1).double() for name in names})
        out: Sums = {"tokens": batch.mask.sum()}
        for name in names:
            every = torch.cat([found[name] for found in per_stage], dim=1)
            out[name] = every.sum(0)
            out[f"{name} products"] = torch.einsum("bhi,bhj->hij", every, every)
        return out

    sums = accumulate(data, step, description="scoring heads", **options)
    heads = tuple(n for s in _attention_stages(graph) for n in graph.stages[s].nodes)
    return summarise(sums, heads, names, alpha, len(data))


def _attention_stages(graph: Graph) -> list[int]:
    return [s for s, stage in enumerate(graph.stages) if isinstance(stage.core, Attention)]


def _own_outputs(graph: Graph) -> bool:
    """Whether the graph's outputs are its tokens."""
    return graph.info.get("d_vocab") == graph.stages[-1].code_widths[0]


def _check(
    graph: Graph, data: TokenData, detectors: Iterable[str] | None, marked: Tensor | None, alpha: float, shuffles: int
) -> tuple[str, ...]:
    """The detectors to use, after checking that they have what they need."""
    if not _attention_stages(graph) or "d_vocab" not in graph.info:
        raise InputError("the graph has no attention heads that read tokens, so there is nothing to score")
    if graph.resample:
        raise InputError("this graph's cut edges hear another input; score the uncut graph or one cut to means")
    if not 0 < alpha < 1 or shuffles < 1:
        raise InputError(f"alpha must be between 0 and 1 and shuffles at least 1, got {alpha} and {shuffles}")
    if len(data) < FEWEST_SEQUENCES:
        raise EmptyDataError(f"{len(data)} sequences are too few to tell a head from chance; give {FEWEST_SEQUENCES}")
    lacking = set() if marked is not None else {"delimiter"}
    lacking |= set() if _own_outputs(graph) else {"copy-suppression"}
    names = tuple(d for d in DETECTORS if d not in lacking) if detectors is None else tuple(detectors)
    for name in names:
        if name not in DETECTORS:
            raise UnknownNameError("detector", name, DETECTORS)
        if name in lacking:
            needs = "delimiters=..." if name == "delimiter" else "a graph whose outputs are its tokens"
            raise InputError(f"the detector {name!r} needs {needs}")
    if not names:
        raise InputError("no detector was named; name some of " + ", ".join(DETECTORS))
    return names


def _delimiters(
    graph: Graph, delimiters: str | Iterable[int] | None, token_strings: Sequence[str] | None
) -> Bool[Tensor, " vocabulary"] | None:
    """Which ids are delimiters.

    Raises:
        InputError: a pattern without strings, one that is broken or matches nothing, or ids out of range.
    """
    if delimiters is None:
        return None
    marked = torch.zeros(int(graph.info.get("d_vocab", 0)), dtype=torch.bool)
    if isinstance(delimiters, str):
        if token_strings is None:
            raise InputError(f"delimiters={delimiters!r} is a pattern: pass the tokens' strings as token_strings=")
        try:
            ids = [i for i, token in enumerate(token_strings) if re.search(delimiters, token)]
        except re.error as error:
            raise InputError(f"not a regular expression: {delimiters!r}: {error}") from error
    else:
        ids = [int(i) for i in delimiters]
    if not ids or min(ids) < 0 or max(ids) >= len(marked):
        raise InputError(f"delimiters must be ids from 0 to {len(marked) - 1}, at least one, got {ids[:8]}")
    marked[ids] = True
    return marked.to(graph.device)


def _lowered(graph: Graph) -> dict[int, Bool[Tensor, "head vocabulary"]]:
    """By stage and head, the tokens whose own logit (less the mean logit) falls when the head looks at them."""
    return {
        s: torch.stack([ov_circuit(graph, head).own_logits() < 0 for head in graph.stages[s].nodes])
        for s in _attention_stages(graph)
    }


def _seen(t: Trace, s: int, batch: Batch) -> Bool[Tensor, "batch query key"]:
    """Which real keys each real query of a layer may see."""
    core = cast(Attention, t.graph.stages[s].core)
    n, real = t.context.n_pos, batch.mask.to(t.graph.device)
    visible = core.visible(t.context)
    if visible is None:
        every = torch.ones(n, n, dtype=torch.bool, device=real.device)
        visible = (every.tril() if core.causal else every)[None, None]
    return visible[:, 0] & real[:, :, None] & real[:, None]


def _distance(t: Trace) -> Int[Tensor, "query key"]:
    pos = torch.arange(t.context.n_pos, device=t.graph.device)
    return pos[:, None] - pos


def _profile(graph: Graph, data: TokenData, **options: Any) -> dict[int, Float[Tensor, "head distances"]]:
    """Each head's mean, at each distance between query and key, of attention relative to even attention."""
    longest = data.tokens.shape[1]

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        check_finite(t, batch)
        place = (_distance(t) + longest - 1).flatten()
        out: Sums = {}
        for s in _attention_stages(graph):
            seen, pattern = _seen(t, s, batch), clean_pattern(t, s).float()
            relative = pattern * (seen * seen.sum(-1, keepdim=True))[:, None]
            mass = relative.sum(0).flatten(1).double()
            pairs = seen.sum(0).flatten().double()
            out[f"mass{s}"] = mass.new_zeros(len(mass), 2 * longest - 1).index_add(1, place, mass)
            out[f"pairs{s}"] = pairs.new_zeros(2 * longest - 1).index_add(0, place, pairs)
        return out

    sums = accumulate(data, step, description="attention by distance", **options)
    return {s: (sums[f"mass{s}"] / sums[f"pairs{s}"].clamp(min=1)).float() for s in _attention_stages(graph)}


def _view(
    t: Trace,
    s: int,
    batch: Batch,
    data: TokenData,
    shifts: Int[Tensor, " shuffles"],
    marked: Tensor | None,
    profile: dict[int, Tensor] | None,
    lowered: dict[int, Tensor] | None,
) -> View:
    rows, n = (batch.index.cpu() + shifts[:, None]) % len(data), t.context.n_pos
    device = t.graph.device
    return View(
        clean_pattern(t, s).float(),
        batch.inputs.to(device),
        _seen(t, s, batch),
        _distance(t),
        data.tokens[rows][..., :n].long().to(device),
        data.mask[rows][..., :n].to(device),
        marked,
        None if lowered is None else lowered[s],
        None if lowered is None else _predicted(t, s),
        None if profile is None else profile[s],
    )


def _predicted(t: Trace, s: int) -> Int[Tensor, "batch pos"]:
    """The output that the stream in front of a stage, read out as it stands, puts first."""
    port = t.plan.stages[-1].ports[0]
    x = t.stream(*t.graph.stages[s].visible)
    x = x if port.norm is None else port.norm.apply(x)
    # a sequence at a time: all logits of a batch at once could be larger than the model
    return torch.stack([port.reads[0].shared(row[None])[0, 0].argmax(-1) for row in x])
