"""What a tokenizer makes of words: one token or several, alone or at the end of a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unweave.errors import InputError

__all__ = ["Spelled", "Speller", "most"]


@dataclass(frozen=True)
class Spelled:
    """A text as ids, with the characters ``(first, end)`` that each id stands for.

    Attributes:
        lead: how many ids at the front stand for no text.
    """

    ids: tuple[int, ...]
    characters: tuple[tuple[int, int], ...]
    lead: int

    def overlapping(self, first: int, end: int) -> list[int]:
        """The positions of the tokens that share a character with the range."""
        spans = enumerate(self.characters)
        return [i for i, (a, b) in spans if i >= self.lead and a < end and b > first]


class Speller:
    """A tokenizer, asked how it spells.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        first: the id put before every text; None for what the tokenizer puts there by itself.

    Raises:
        InputError: a tokenizer that does not tell which characters a token stands for, or ``first`` outside it.
    """

    def __init__(self, tokenizer: Any, first: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} does not tell which characters a token stands for; give a fast Hugging "
                "Face tokenizer (AutoTokenizer.from_pretrained(...))"
            )
        if first is not None and not 0 <= first < len(tokenizer):
            raise InputError(f"first is id {first}, outside the tokenizer's vocabulary of {len(tokenizer)}")
        self.tokenizer = tokenizer
        self.unknown = tokenizer.unk_token_id
        self.lead = self._own_lead() if first is None else (first,)

    def _own_lead(self) -> tuple[int, ...]:
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        return tuple(next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), ()))

    def spell(self, text: str) -> Spelled:
        """A prompt as ids, what stands before it included; nothing is put after it."""
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        front = [(0, 0)] * len(self.lead)
        return Spelled((*self.lead, *out["input_ids"]), (*front, *out["offset_mapping"]), len(self.lead))

    def tails(self, before: str, words: Sequence[str]) -> list[list[int] | None]:
        """The ids that each word adds after a text; None where the text's own ids change or a token is unknown."""
        if not words:
            return []
        texts = [before, *(before + word for word in words)]
        start, *whole = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        n = len(start)
        known = [ids[:n] == start and self.unknown not in ids[n:] for ids in whole]
        return [list(ids[n:]) if ok else None for ids, ok in zip(whole, known, strict=True)]

    def knows(self, text: str) -> bool:
        """Whether no part of a text is unknown."""
        return self.tails("", [text])[0] is not None

    def one_token(self, words: Iterable[str], before: str = "The") -> dict[str, int]:
        """The words that are one token after a text, with their ids."""
        words = list(words)
        spelt = zip(words, self.tails(before, words), strict=True)
        return {word: ids[0] for word, ids in spelt if ids is not None and len(ids) == 1}

    def by_length(self, groups: Iterable[tuple[str, ...]], before: str = "The") -> dict[int, list[tuple[str, ...]]]:
        """Groups of words (a noun's singular and plural) by how many tokens each word of the group has.

        Groups whose words differ in length are left out.
        """
        out: dict[int, list[tuple[str, ...]]] = defaultdict(list)
        for group in groups:
            tails = self.tails(before, group)
            lengths = {0 if ids is None else len(ids) for ids in tails}
            if len(lengths) == 1 and 0 not in lengths:
                out[lengths.pop()].append(group)
        return dict(out)

    def require_one_token(
        self, words: Iterable[str], task: str, what: str, least: int, before: str = "The"
    ) -> dict[str, int]:
        """:meth:`one_token`, where a template needs at least so many.

        Raises:
            InputError: fewer; says which words were tried.
        """
        words = list(words)
        found = self.one_token(words, before)
        if len(found) < least:
            some = f"only {', '.join(map(repr, found))}" if found else "none"
            tried = ", ".join(map(repr, words[:8])) + (", ..." if len(words) > 8 else "")
            raise InputError(
                f"the task {task!r} needs {least} {what} of one token, and this tokenizer spells {some} of {tried} "
                "as one token; use another task, or write prompts for it and load them with load_task"
            )
        return found


def most(groups: Mapping[int, list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """The largest group; of equally large ones, the one of the shortest words."""
    return max((groups[k] for k in sorted(groups)), key=len, default=[])
