"""What single heads do: attention to named places, each against a null, over all heads at once.

A *detector* says where a head of its kind looks. Its score is a mean attention mass,

score_h = sum over queries t of sum over keys s in S(t) of A_h[t, s] / number of queries whose S(t) is not empty,

with A the attention pattern and S(t) the set of visible keys the detector names. The null is the same score where
the head cannot know the set: S made from another sequence's tokens at the same positions ("other tokens"), or
attention spread evenly over the visible keys ("uniform"). To add a detector, write one function from a
:class:`View` to an :class:`Evidence`, list it in :data:`DETECTORS`, and test it on patterns made by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import Trace, check_inputs, trace
from unweave.graph import Graph
from unweave.ops import Attention
from unweave.paths.circuits import ov_circuit
from unweave.statistics import Sums, accumulate, check_finite

__all__ = ["DETECTORS", "Detector", "Evidence", "HeadScores", "View", "score_heads"]

# below this, a standard error over sequences says little
FEWEST_SEQUENCES = 8


# ---- what a detector sees, and what it says -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """The heads of one layer on one batch.

    Attributes:
        pattern: attention probabilities.
        tokens: ids.
        visible: which real keys each real query may see.
        distance: query's position minus key's.
        others: for each shuffle, the ids of another sequence at the same positions.
        others_real: where that sequence has a real token.
        delimiters: which ids are delimiters.
        lowered: tokens whose own logit a head lowers when it looks at them.
        predicted: the most likely next token, read off the stream in front of the layer (logit lens).
        profile: by distance, the mean over all data of attention relative to even attention; the most negative first.
    """

    pattern: Float[Tensor, "batch head query key"]
    tokens: Int[Tensor, "batch query"]
    visible: Bool[Tensor, "batch query key"]
    distance: Int[Tensor, "query key"]
    others: Int[Tensor, "shuffle batch query"]
    others_real: Bool[Tensor, "shuffle batch query"]
    delimiters: Bool[Tensor, " vocabulary"] | None = None
    lowered: Bool[Tensor, "head vocabulary"] | None = None
    predicted: Int[Tensor, "batch query"] | None = None
    profile: Float[Tensor, "head distances"] | None = None


class Evidence(NamedTuple):
    """Sums per sequence and head: score = mass / queries, null = null_mass / null_queries, over all sequences."""

    mass: Float[Tensor, "batch head"]
    queries: Float[Tensor, "batch head"]
    null_mass: Float[Tensor, "batch head"]
    null_queries: Float[Tensor, "batch head"]


def _mass(
    view: View, target: Tensor, visible: Bool[Tensor, "batch query key"]
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
    """(attention on the visible keys of a target, queries that have any); a target for all heads or for each."""
    target = (target if target.ndim == 4 else target[:, None]) & visible[:, None]
    mass = (view.pattern * target).sum((2, 3))
    return mass, target.any(-1).sum(-1).to(mass).expand_as(mass)


def against_uniform(view: View, target: Bool[Tensor, "#batch query key"]) -> Evidence:
    """Attention on the keys marked, against the same mass of attention spread evenly over the visible keys."""
    mass, queries = _mass(view, target, view.visible)
    even = (target & view.visible).sum(-1) / view.visible.sum(-1).clamp(min=1)
    return Evidence(mass, queries, even.sum(-1, keepdim=True).to(mass).expand_as(mass), queries)


def against_other_tokens(view: View, where: Callable[[Tensor], Tensor]) -> Evidence:
    """Attention on the keys that ``where`` marks for the tokens, against those it marks for other sequences'."""
    mass, queries = _mass(view, where(view.tokens), view.visible)
    null_mass, null_queries = torch.zeros_like(mass), torch.zeros_like(mass)
    for tokens, real in zip(view.others, view.others_real, strict=True):
        m, q = _mass(view, where(tokens), view.visible & real[:, :, None] & real[:, None])
        null_mass, null_queries = null_mass + m, null_queries + q
    return Evidence(mass, queries, null_mass, null_queries)


# ---- the detectors --------------------------------------------------------------------------------------


def previous_token(view: View) -> Evidence:
    """S(t) = {t - 1}."""
    return against_uniform(view, (view.distance == 1)[None])


def duplicate_token(view: View) -> Evidence:
    """S(t) = {s < t: x_s = x_t} (without a causal mask: s != t)."""
    return against_other_tokens(view, lambda x: (x[:, :, None] == x[:, None]) & (view.distance != 0))


def induction(view: View) -> Evidence:
    """S(t) = {s <= t: x_(s-1) = x_t}: after an earlier copy of the token."""
    return against_other_tokens(view, lambda x: F.pad(x[:, :, None] == x[:, None, :-1], (1, 0)) & (view.distance >= 0))


def copy_suppression(view: View) -> Evidence:
    """S_h(t) = {s <= t: x_s = what is about to be predicted at t, and looking at x_s makes head h lower its logit}."""
    predicted, lowered = view.predicted, view.lowered
    assert predicted is not None
    assert lowered is not None

    def where(x: Tensor) -> Bool[Tensor, "batch head query key"]:
        lowers = rearrange(lowered[:, x], "h b k -> b h 1 k")
        return lowers & (x[:, None] == predicted[:, :, None])[:, None]

    return against_other_tokens(view, where)


def delimiter(view: View) -> Evidence:
    """S(t) = {s <= t: x_s is a delimiter}."""
    assert view.delimiters is not None
    # other sequences often have theirs (a first token) at the same places, so they are no null
    return against_uniform(view, view.delimiters[view.tokens][:, None].expand_as(view.visible))


def positional(view: View) -> Evidence:
    """R^2 = 1 - sum (A[t, s] - f_t(s))^2 / sum (A[t, s] - u_t)^2, with u_t = 1 / visible keys (even attention).

    f_t(s) = g(t - s) / sum of g(t - s') over visible s' is a pattern made of distances alone; g(d) is the head's mean
    of A[t, s] / u_t at distance d. Sequences on which attention is even, to 1% of the variance of attention to
    single keys, do not count: there is nothing to explain.
    """
    assert view.profile is not None
    seen = view.visible[:, None].to(view.pattern)
    even = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    expected = view.profile[:, view.distance + view.profile.shape[1] // 2] * seen
    expected = expected / expected.sum(-1, keepdim=True).clamp(min=1e-12)
    total = ((view.pattern - even).square() * seen).sum((2, 3))
    left = ((view.pattern - expected).square() * seen).sum((2, 3))
    largest = (seen.amax(-1) - even.amax(-1)).sum(-1)  # each query's variance if it looked at one key
    uneven = total > 0.01 * largest
    return Evidence((total - left) * uneven, total * uneven, torch.zeros_like(total), total * uneven)


@dataclass(frozen=True)
class Detector:
    """One kind of head.

    Attributes:
        measure: what says where it looks; its docstring has the formula.
        least: by how much the score must exceed the null for a head to be called one.
        null: "other tokens" or "uniform".
        source: the paper.
    """

    measure: Callable[[View], Evidence]
    least: float
    null: str
    source: str


OLSSON = "Olsson et al. 2022, In-context Learning and Induction Heads"
DETECTORS: dict[str, Detector] = {
    "previous-token": Detector(previous_token, 0.3, "uniform", OLSSON),
    "duplicate-token": Detector(duplicate_token, 0.3, "other tokens", "Wang et al. 2022, Interpretability in the Wild"),
    "induction": Detector(induction, 0.3, "other tokens", OLSSON),
    "copy-suppression": Detector(
        copy_suppression,
        0.3,
        "other tokens",
        "McDougall et al. 2023, Copy Suppression: Comprehensively Understanding an Attention Head",
    ),
    "positional": Detector(
        positional, 0.7, "uniform", "Voita et al. 2019, Analyzing Multi-Head Self-Attention (positional heads)"
    ),
    "delimiter": Detector(delimiter, 0.3, "uniform", "Clark et al. 2019, What Does BERT Look At?"),
}


# ---- the result -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of all heads by all detectors; NaN where the data hold no query for it (or attention is even: R^2).

    Attributes:
        heads, detectors: columns and rows.
        score: mean attention mass (R^2 for "positional").
        null: the mean score under the null.
        null_sd: its standard error over sequences.
        z: (score - null) / the standard error over sequences of that difference.
        p: one-sided, of z, adjusted by Holm over all heads and detectors.
        least: the smallest excess over the null that counts, by detector.
        alpha: the level.
        n_sequences, n_tokens: on how much data.
    """

    heads: tuple[str, ...]
    detectors: tuple[str, ...]
    score: Float[Tensor, "detectors heads"]
    null: Float[Tensor, "detectors heads"]
    null_sd: Float[Tensor, "detectors heads"]
    z: Float[Tensor, "detectors heads"]
    p: Float[Tensor, "detectors heads"]
    least: Float[Tensor, " detectors"]
    alpha: float
    n_sequences: int
    n_tokens: int

    @property
    def verdict(self) -> Bool[Tensor, "detectors heads"]:
        """Which heads are of which kind, by :attr:`rule`."""
        return (self.p <= self.alpha) & (self.score - self.null >= self.least[:, None])

    @property
    def rule(self) -> str:
        """The rule of :attr:`verdict`, in words."""
        least = ", ".join(f"{d} {x:.2g}" for d, x in zip(self.detectors, self.least.tolist(), strict=True))
        return (
            f"p <= {self.alpha:g} after Holm's correction over {int((~self.p.isnan()).sum())} tests, and score above "
            f"its null by at least: {least}"
        )

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The heads that are of some kind, and of which."""
        found = self.verdict
        kinds = {h: tuple(d for k, d in enumerate(self.detectors) if found[k, i]) for i, h in enumerate(self.heads)}
        return {head: labels for head, labels in kinds.items() if labels}

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: head, detector, score, null, null_sd, z, p, verdict; the largest excess over the null first."""
        columns = {"score": self.score, "null": self.null, "null_sd": self.null_sd, "z": self.z, "p": self.p}
        order = (self.score - self.null).nan_to_num(-torch.inf).flatten().argsort(descending=True)
        verdict = self.verdict
        rows = []
        for place in order.tolist():
            d, h = divmod(place, len(self.heads))
            values = {name: float(values[d, h]) for name, values in columns.items()}
            rows.append(
                {"head": self.heads[h], "detector": self.detectors[d], **values, "verdict": bool(verdict[d, h])}
            )
        return rows


# ---- the pass over the data -----------------------------------------------------------------------------


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
    return _summary(sums, heads, names, alpha, len(data))


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


def _pattern(t: Trace, s: int) -> Float[Tensor, "batch head query key"]:
    core = cast(Attention, t.graph.stages[s].core)
    return core.pattern(t.reads[s, "q"][0], t.reads[s, "k"][0], t.context).float()


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
            seen, pattern = _seen(t, s, batch), _pattern(t, s)
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
        _pattern(t, s),
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


def _summary(sums: Sums, heads: tuple[str, ...], names: tuple[str, ...], alpha: float, n: int) -> HeadScores:
    tested = [_tested(sums[name], sums[f"{name} products"], n) for name in names]
    score, null, null_sd, z = (torch.stack(values).cpu() for values in zip(*tested, strict=True))
    p = _holm(0.5 * torch.erfc(z / 2**0.5))
    least = torch.tensor([DETECTORS[name].least for name in names])
    return HeadScores(
        heads,
        names,
        score.float(),
        null.float(),
        null_sd.float(),
        z.float(),
        p.float(),
        least,
        alpha,
        n,
        int(sums["tokens"]),
    )


def _tested(
    sums: Float[Tensor, "head 4"], products: Float[Tensor, "head 4 4"], n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(score, null, standard error of the null, z of the difference), by linearisation over sequences."""
    mass, queries, null_mass, null_queries = sums.unbind(-1)
    score, null, zero = mass / queries, null_mass / null_queries, torch.zeros_like(mass)
    of_score = torch.stack([1 / queries, -score / queries, zero, zero], -1)
    of_null = torch.stack([zero, zero, 1 / null_queries, -null / null_queries], -1)

    def error(of: Float[Tensor, "head 4"]) -> Float[Tensor, " head"]:
        variance = torch.einsum("hi,hij,hj->h", of, products, of)
        return (variance.clamp(min=0) * n / (n - 1)).sqrt()

    difference, spread = score - null, error(of_score - of_null)
    z = torch.where(difference.abs() < 1e-6, 0 * difference, difference / spread)  # an idle head: 0 / 0
    return score, null, error(of_null), z


def _holm(p: Float[Tensor, "detectors heads"]) -> Float[Tensor, "detectors heads"]:
    """p values adjusted for how many there are: the running maximum of (m - i) p_(i), ascending, at most 1."""
    flat = p.flatten()
    order = flat.argsort()  # NaN comes last
    known = int((~flat.isnan()).sum())
    factor = torch.arange(known, 0, -1, dtype=p.dtype, device=p.device)
    adjusted = (flat[order[:known]] * factor).cummax(0).values.clamp(max=1)
    return flat.index_put((order[:known],), adjusted).reshape(p.shape)
