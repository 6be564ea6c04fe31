"""Rules: cheap functions of the tokens and positions that may say when a code is high.

Every rule sorts tokens into categories (which token stood before, which position this is, whether it is a digit); what
a rule predicts is one number per category. So a rule with two categories is a yes/no question, and one with as many
categories as tokens is a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from unweave.data import TokenData
from unweave.errors import InputError

__all__ = ["CLASSES", "Rule", "Texts", "frequent_tokens", "ready_rules"]

# classes of tokens, by how their strings look
CLASSES = {
    "a digit": r"^\s*\d+$",
    "punctuation": r"^\s*[^\w\s]+\s*$",
    "a sentence end": r"^\s*[.!?]+\s*$",
    "a quote": r"^\s*[\"'“”‘’`]+\s*$",
    "a bracket": r"^\s*[()\[\]{}]+\s*$",
    "capitalised": r"^\s*[A-Z]",
    "white space": r"^\s+$",
    "the start of a word": r"^\s\w",
    "letters without a space before": r"^[^\W\d_]+$",
    "a line break": r"\n",
}


@dataclass(frozen=True, eq=False)
class Texts:
    """A batch of texts, padded on the right.

    Attributes:
        tokens: ids.
        mask: True where a token is real.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """0, 1, 2, ..."""
        return torch.arange(self.tokens.shape[1]).expand(len(self.tokens), -1)

    def back(self, steps: int) -> Int[Tensor, "batch pos"]:
        """The token so many steps before; -1 where the text had not begun."""
        return F.pad(self.tokens, (steps, 0), value=-1)[:, : self.tokens.shape[1]]

    def earlier_copy(self, length: int = 1) -> Int[Tensor, "batch pos"]:
        """The position of the last earlier token that ends the same ``length`` tokens; -1 where there is none."""
        n = self.tokens.shape[1]
        same = torch.ones(len(self.tokens), n, n, dtype=torch.bool).tril(-1)
        for steps in range(length):
            shifted = self.back(steps)
            same &= (shifted[:, :, None] == shifted[:, None]) & (shifted[:, None] >= 0)
        return torch.where(same, torch.arange(n), -1).amax(-1)

    def beside_copy(self, step: int) -> Int[Tensor, "batch pos"]:
        """The token ``step`` after the earlier copy of this one; -1 where there is none."""
        copy = self.earlier_copy()
        at = copy + step
        return torch.where((copy >= 0) & (at >= 0), self.tokens.gather(1, at.clamp(min=0)), -1)


@dataclass(frozen=True, eq=False)
class Rule:
    """A way to sort tokens into categories.

    Attributes:
        name: what the categories tell apart ("previous token"), or what the second one says ("the token is a digit").
        categories: their names, for people; ("no", "yes") for a question.
        sort: texts -> the category of each token.
    """

    name: str
    categories: tuple[str, ...]
    sort: Callable[[Texts], Int[Tensor, "batch pos"]]

    @property
    def is_question(self) -> bool:
        """Whether it has a yes and a no."""
        return self.categories == ("no", "yes")

    def explain(self, values: Sequence[float], category: int | None = None, names: int = 3) -> str:
        """What the rule says, given what it predicts for each category above the mean.

        Args:
            category: the one category that is told apart from all others.
        """
        if self.is_question:
            return f"{'high' if values[1] > values[0] else 'low'} where {self.name}"
        if category is not None:
            return f"{'high' if values[category] > 0 else 'low'} where the {self.name} is {self.categories[category]}"
        order = sorted(range(len(values)), key=lambda c: -values[c])
        high = [self.categories[c] for c in order[:names] if values[c] > 0]
        low = [self.categories[c] for c in order[::-1][:names] if values[c] < 0]
        parts = [f"{word} for {', '.join(found)}" for word, found in (("high", high), ("low", low)) if found]
        return f"set by the {self.name}: {'; '.join(parts)}"


def frequent_tokens(data: TokenData, most: int) -> Int[Tensor, " kept"]:
    """The most frequent token ids of a data set, at most so many, the most frequent first."""
    counts = torch.zeros(0, dtype=torch.int64)
    for batch in data.batches(256):
        new = batch.inputs[batch.mask].bincount(minlength=len(counts))
        counts = new + F.pad(counts, (0, len(new) - len(counts)))
    order = counts.argsort(descending=True, stable=True)
    return order[: int((counts > 0).sum())][:most]


def ready_rules(
    data: TokenData, token_strings: Sequence[str] | None = None, *, most_tokens: int = 1024
) -> tuple[Rule, ...]:
    """The ready-made rules, for the texts of a data set.

    Which token (this one, the previous one, the one before that, the one after or before the earlier copy of this one),
    which position, alone or in octaves, odd or even; whether the token or the pair with the previous one came before;
    and, with token strings, the :data:`CLASSES` of this token and of the previous one.

    Args:
        token_strings: the string of every token.
        most_tokens: tokens told apart in tables, the most frequent ones; the others are one category.

    Raises:
        InputError: the data are no tokens, or a token has no string.

    Example:
        >>> import unweave
        >>> [r.name for r in ready_rules(unweave.load_data("zoo:induction", limit=4))][:2]
        ['token', 'previous token']
    """
    if data.tokens.is_floating_point():
        raise InputError("rules speak of tokens, and these data are reals; look at examples instead")
    kept = frequent_tokens(data, most_tokens)
    if token_strings is not None and len(kept) and int(kept.max()) >= len(token_strings):
        raise InputError(f"token {int(kept.max())} has no string: token_strings holds {len(token_strings)}")
    names = tuple(f"[{i}]" if token_strings is None else repr(token_strings[i]) for i in kept.tolist())
    names += ("any other token", "nothing")
    number = _numbering(kept)
    tables = {
        "token": lambda x: x.tokens,
        "previous token": lambda x: x.back(1),
        "second token back": lambda x: x.back(2),
        "token after the earlier copy": lambda x: x.beside_copy(1),
        "token before the earlier copy": lambda x: x.beside_copy(-1),
    }
    rules = [Rule(name, names, _by_token(found, number)) for name, found in tables.items()]
    return (*rules, *_position_rules(data.tokens.shape[1]), *_questions(), *_class_rules(token_strings))


def _numbering(kept: Int[Tensor, " kept"]) -> Callable[[Tensor], Tensor]:
    """From ids to categories: a place among the kept, then any other token, then -1 for none."""
    ordered = kept.sort()
    n = len(kept)

    def number(ids: Tensor) -> Tensor:
        at = torch.searchsorted(ordered.values, ids.contiguous()).clamp(max=max(n - 1, 0))
        known = ordered.values[at] == ids
        return torch.where(ids < 0, n + 1, torch.where(known, ordered.indices[at], n))

    return number


def _by_token(found: Callable[[Texts], Tensor], number: Callable[[Tensor], Tensor]) -> Callable[[Texts], Tensor]:
    return lambda x: number(found(x))


def _position_rules(n_pos: int) -> list[Rule]:
    octaves = n_pos.bit_length()
    spans = tuple(f"{(1 << k) - 1}-{(2 << k) - 2}" for k in range(octaves))
    last = n_pos - 1
    return [
        Rule("position", tuple(str(p) for p in range(n_pos)), lambda x: x.positions.clamp(max=last)),
        Rule(
            "position's octave",
            spans,
            lambda x: (x.positions + 1).double().log2().floor().long().clamp(max=octaves - 1),
        ),
    ]


def _questions() -> list[Rule]:
    questions: Mapping[str, Callable[[Texts], Tensor]] = {
        "the position is even": lambda x: x.positions % 2 == 0,
        "the token came before": lambda x: x.earlier_copy() >= 0,
        "the last two tokens came before": lambda x: x.earlier_copy(2) >= 0,
        "the token repeats the previous one": lambda x: x.tokens == x.back(1),
    }
    return [_question(name, asked) for name, asked in questions.items()]


def _question(name: str, asked: Callable[[Texts], Tensor]) -> Rule:
    return Rule(name, ("no", "yes"), lambda x: asked(x).long())


def _class_rules(token_strings: Sequence[str] | None) -> list[Rule]:
    rules: list[Rule] = []
    for name, pattern in CLASSES.items() if token_strings is not None else ():
        marked = torch.tensor([re.search(pattern, text) is not None for text in token_strings or ()])
        if bool(marked.any()) and not bool(marked.all()):
            rules.append(_question(f"the token is {name}", _is_marked(marked, 0)))
            rules.append(_question(f"the previous token is {name}", _is_marked(marked, 1)))
    return rules


def _is_marked(marked: Bool[Tensor, " vocabulary"], steps: int) -> Callable[[Texts], Tensor]:
    def asked(x: Texts) -> Tensor:
        ids = x.back(steps)
        inside = (ids >= 0) & (ids < len(marked))
        return marked[ids.clamp(0, len(marked) - 1)] & inside

    return asked
