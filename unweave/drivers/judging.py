"""How well rules and proposals predict a direction on held-out tokens, beside random and shifted values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.data import TokenData
from unweave.drivers.descriptions import Description, Descriptions
from unweave.drivers.evidence import Predict, Proposal
from unweave.drivers.fitting import Fit, auroc, explained, fit_rules, rescale
from unweave.drivers.rules import Rule, Texts
from unweave.errors import EmptyDataError, ShapeError, UnknownNameError
from unweave.scope import Scope, position_mask

__all__ = ["FOLDS", "Side", "by_proposals", "by_rules", "check_tokens", "judge"]

NULL_QUANTILE = 0.95
FEWEST_TOKENS = 100
FOLDS = 4
CANNOT_SCORE = "a text alone cannot be scored: give a predict function or the name of a rule with it"


class Side(NamedTuple):
    """The tokens of one data set.

    Attributes:
        values: of every direction at every token.
        data: the texts; with the mask of every batch.
    """

    values: Float[Tensor, "token direction"]
    data: TokenData
    scope: Scope
    batch_size: int

    def along(self, function: Predict) -> Tensor:
        """A function of texts, at the same tokens."""
        found = []
        for batch in self.data.batches(self.batch_size):
            got = function(Texts(batch.inputs, batch.mask))
            if not isinstance(got, Tensor) or got.shape != batch.inputs.shape:
                shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                raise ShapeError(f"a prediction must have shape {tuple(batch.inputs.shape)}, got {shape}")
            found.append(got[position_mask(self.scope, batch)])
        return torch.cat(found)

    @property
    def folds(self) -> Int[Tensor, " token"]:
        """Which of four parts of the texts each token is in; whole documents where there are enough."""
        documents = self.data.documents
        texts = torch.arange(len(self.data)) if documents is None else documents.unique(return_inverse=True)[1]
        part = (texts if int(texts.max()) + 1 >= FOLDS else torch.arange(len(self.data))) % FOLDS
        batches = self.data.batches(self.batch_size)
        marked = [(position_mask(self.scope, batch), part[batch.index]) for batch in batches]
        return torch.cat([own[:, None].expand_as(mask)[mask] for mask, own in marked])

    def categories(self, rules: Sequence[Rule]) -> list[Int[Tensor, " token"]]:
        return [self.along(rule.sort) for rule in rules]


def check_tokens(train: Side, held: Side) -> None:
    """Refuse two sides of which one has too few tokens."""
    fewest = min(len(train.values), len(held.values))
    if fewest < FEWEST_TOKENS:
        raise EmptyDataError(f"{fewest} tokens are too few to fit or score on; give {FEWEST_TOKENS} on both sides")


class _Found(NamedTuple):
    """Predictions of both sides ``[token direction]`` (NaN where there are none), their texts, rules and null."""

    train: Float[Tensor, "token direction"]
    held: Float[Tensor, "token direction"]
    texts: list[str | None]
    rules: list[tuple[str, ...]]
    null: Float[Tensor, " draws"]


def _shift(n: int, generator: torch.Generator) -> int:
    """By how many tokens codes are shifted against the text: a quarter to three quarters of it."""
    return n // 4 + int(torch.randint(n // 2, (1,), generator=generator))


def by_rules(train: Side, held: Side, rules: Sequence[Rule], shifts: int, generator: torch.Generator) -> _Found:
    """The best of the ready rules for each direction, fitted on one side; the null is of shifted values."""
    sizes = [len(rule.categories) for rule in rules]
    sorted_train, sorted_held = train.categories(rules), held.categories(rules)
    # unit variance, so that float32 sums are good for codes of any size
    std = train.values.std(0).clamp(min=1e-20)
    folds = train.folds
    fit = fit_rules(train.values / std, sorted_train, sizes, folds)
    null = []
    for _ in range(shifts):
        shifted = train.values.roll(_shift(len(train.values), generator), 0) / std
        beside = held.values.roll(_shift(len(held.values), generator), 0) / std
        null.append(explained(fit_rules(shifted, sorted_train, sizes, folds).predict(sorted_held), beside))
    texts, names = _explain(fit, rules, len(std))
    return _Found(fit.predict(sorted_train) * std, fit.predict(sorted_held) * std, texts, names, torch.cat(null))


def _explain(fit: Fit, rules: Sequence[Rule], n: int) -> tuple[list[str | None], list[tuple[str, ...]]]:
    texts: list[list[str]] = [[] for _ in range(n)]
    names: list[tuple[str, ...]] = [() for _ in range(n)]
    for table in fit.tables:
        rule = rules[table.rule]
        for j, row in enumerate(table.rows.tolist()):
            category = int(table.category[j])
            texts[row].append(rule.explain(table.values[:, j].tolist(), None if category < 0 else category))
            names[row] = (*names[row], rule.name)
    return ["; ".join(parts) if parts else None for parts in texts], names


def by_proposals(
    train: Side,
    held: Side,
    rules: Sequence[Rule],
    proposals: Sequence[Proposal],
    shifts: int,
    generator: torch.Generator,
) -> _Found:
    """What each proposal predicts, with the best slope and offset; the null is of shifted values."""
    columns = [_predicted(train, held, rules, p, d) for d, p in enumerate(proposals)]
    raw_train, raw_held = (torch.stack([c[side] for c in columns], 1) for side in (0, 1))
    null = []
    for _ in range(shifts):
        line = rescale(raw_train, train.values.roll(_shift(len(train.values), generator), 0))
        beside = held.values.roll(_shift(len(held.values), generator), 0)
        null.append(explained(raw_held * line[0] + line[1], beside))
    slope, offset = rescale(raw_train, train.values)
    names: list[tuple[str, ...]] = [() if p.rule is None else (p.rule,) for p in proposals]
    texts: list[str | None] = [p.text for p in proposals]
    return _Found(raw_train * slope + offset, raw_held * slope + offset, texts, names, torch.cat(null))


def _predicted(train: Side, held: Side, rules: Sequence[Rule], proposal: Proposal, d: int) -> tuple[Tensor, Tensor]:
    """What a proposal predicts for direction d on both sides; NaN where a text is all there is."""
    if proposal.predict is not None:
        return train.along(proposal.predict).float(), held.along(proposal.predict).float()
    if proposal.rule is None:
        return torch.full((len(train.values),), torch.nan), torch.full((len(held.values),), torch.nan)
    by_name = {rule.name: rule for rule in rules}
    if proposal.rule not in by_name:
        raise UnknownNameError("rule", proposal.rule, by_name)
    rule = by_name[proposal.rule]
    category, size = train.along(rule.sort), len(rule.categories)
    values = train.values[:, d] - train.values[:, d].mean()
    table = torch.zeros(size).index_add(0, category, values) / (category.bincount(minlength=size) + 1)
    return table[category], table[held.along(rule.sort)]


def _random(
    train: Side, held: Side, found: _Found, draws: int, generator: torch.Generator
) -> tuple[Float[Tensor, " direction"], Float[Tensor, " direction"]]:
    """Mean held-out score and AUROC of other directions' descriptions, with the best slope and offset for this one.

    The AUROC is that of one of them.
    """
    n = len(found.texts)
    scores, area = [], torch.full((n,), torch.nan)
    for draw in range(draws if n > 1 else 0):
        # a permutation that leaves nothing in its place
        order = torch.randperm(n, generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        slope, offset = rescale(found.train[:, other], train.values)
        predicted = found.held[:, other] * slope + offset
        scores.append(explained(predicted, held.values))
        area = auroc(predicted, held.values) if draw == 0 else area
    return torch.stack(scores).nanmean(0) if scores else torch.full((n,), torch.nan), area


def judge(
    names: Sequence[tuple[str, int]],
    train: Side,
    held: Side,
    found: _Found,
    draws: int,
    generator: torch.Generator,
) -> Descriptions:
    """Scores on the held-out side, and the texts of what scores above the null."""
    score, area = explained(found.held, held.values), auroc(found.held, held.values)
    area = torch.where(found.held.isnan().any(0), torch.nan, area)
    null = found.null[~found.null.isnan()]
    # less than the mean itself predicts is nothing, whatever chance does
    threshold = max(float(null.quantile(NULL_QUANTILE)), 0.0) if len(null) else 0.0
    random_score, random_area = _random(train, held, found, draws, generator)
    constant = explained(torch.zeros_like(held.values), held.values).isnan()
    items = []
    for d, (node, number) in enumerate(names):
        text, value = found.texts[d], float(score[d])
        passed = text is not None and value > threshold
        note = "" if passed else _why_not(text, bool(constant[d]), value, threshold)
        items.append(
            Description(
                node,
                number,
                text,
                text if passed else None,
                found.rules[d],
                value,
                float(area[d]),
                float(random_score[d]),
                float(random_area[d]),
                note,
            )
        )
    return Descriptions(tuple(items), null, threshold, len(train.values), len(held.values))


def _why_not(text: str | None, constant: bool, score: float, threshold: float) -> str:
    if constant:
        return "the code is the same on all held-out tokens"
    if text is None:
        return "no rule predicts it"
    if score != score:
        return CANNOT_SCORE
    return f"a score of {score:.3f} is not above the {threshold:.3f} of shifted codes"
