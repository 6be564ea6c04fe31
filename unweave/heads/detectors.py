"""What single heads do: attention to named places, each against a null, over all heads at once.

A *detector* says where a head of its kind looks. Its score is a mean attention mass,

score_h = sum over queries t of sum over keys s in S(t) of A_h[t, s] / number of queries whose S(t) is not empty,

with A the attention pattern and S(t) the set of visible keys the detector names. The null is the same score where
the head cannot know the set: S made from another sequence's tokens at the same positions ("other tokens"), or
attention spread evenly over the visible keys ("uniform"). To add a detector, write one function from a
:class:`View` to an :class:`Evidence`, list it in :data:`DETECTORS`, and test it on patterns made by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["DETECTORS", "Detector", "Evidence", "View"]


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
