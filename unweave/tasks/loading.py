"""Tasks from a file of prompts, and from plain data with a filter."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from unweave.data import Batch, TokenData, numbered_lines
from unweave.errors import EmptyDataError, InputError, ShapeError
from unweave.scope import Scope
from unweave.tasks.spelling import Speller
from unweave.tasks.task import ANSWERS, Metric, Task, assemble

__all__ = ["load_task", "task_from_data"]

Align = Literal["refuse", "drop"]
FIELDS = ("clean", "corrupted", *ANSWERS)
# what a span may not be called: labels and positions that mean something else
TAKEN = (*ANSWERS, "end", "all", "last")


@dataclass(frozen=True)
class _Row:
    """One line of a file, as ids."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...] | None
    answers: Mapping[str, tuple[int, ...]]
    places: Mapping[str, list[int]]

    @property
    def kind(self) -> tuple[bool, bool, tuple[str, ...]]:
        """What a line has, which all lines of a file must have alike."""
        return self.corrupted is not None, bool(self.answers), tuple(sorted(self.places))


@dataclass(frozen=True)
class _Reader:
    """What turns a line into ids; ``place`` is where it stands, for messages."""

    speller: Speller | None
    vocabulary: int | None
    place: str = ""

    def read(self, line: str) -> _Row:
        row = self._object(line)
        clean = self._prompt(row, "clean")
        twin = self._prompt(row, "corrupted") if row.get("corrupted") is not None else None
        there = [kind for kind in ANSWERS if kind in row]
        if len(there) == 1:
            raise InputError(f"{self.place}: has {there[0]!r} and no other answers; give both correct and wrong ones")
        answers = {kind: self._answers(row, kind) for kind in there}
        both = set(answers.get("correct", ())) & set(answers.get("wrong", ()))
        if both:
            raise InputError(f"{self.place}: token {min(both)} is both a correct and a wrong answer")
        spans = row.get("spans", {})
        if not isinstance(spans, dict):
            raise InputError(f'{self.place}: spans must be an object such as {{"subject": "Mary"}}, got {spans!r}')
        places = {name: self._span(row["clean"], name, span) for name, span in spans.items()}
        return _Row(clean, twin, answers, places)

    def _object(self, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.place}: not JSON: {error}") from error
        if not isinstance(row, dict) or "clean" not in row:
            raise InputError(f"{self.place}: needs an object with 'clean' (and corrupted, correct, wrong, spans)")
        unknown = set(row) - {*FIELDS, "spans"}
        if unknown:
            raise InputError(f"{self.place}: unknown fields {sorted(unknown)}; known: {', '.join(FIELDS)}, spans")
        return row

    def _prompt(self, row: Mapping[str, Any], field: str) -> tuple[int, ...]:
        value = row[field]
        if isinstance(value, str):
            ids = self._spelling(f"{field!r}").spell(value).ids
            lead = len(self._spelling(field).lead)
        else:
            ids, lead = self._ids(value, field), 0
        if len(ids) == lead:
            raise InputError(f"{self.place}: {field!r} holds no token")
        return ids

    def _spelling(self, what: str) -> Speller:
        if self.speller is None:
            raise InputError(f"{self.place}: {what} is text and there is no tokenizer: pass one, or give token ids")
        return self.speller

    def _ids(self, value: Any, field: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise InputError(f"{self.place}: {field!r} must be text or a list of token ids, got {value!r:.60}")
        for i in value:
            self._check_id(i, field)
        return tuple(value)

    def _check_id(self, i: int, field: str) -> int:
        if not 0 <= i < (self.vocabulary or 2**31):
            raise InputError(
                f"{self.place}: {field!r} holds token id {i}, outside the vocabulary of {self.vocabulary or 2**31}; "
                "was it made with another tokenizer?"
            )
        return i

    def _answers(self, row: Mapping[str, Any], kind: str) -> tuple[int, ...]:
        given = row[kind] if isinstance(row[kind], list) else [row[kind]]
        if not given:
            raise InputError(f"{self.place}: {kind!r} is empty; give at least one answer")
        return tuple(dict.fromkeys(self._answer(row["clean"], kind, answer) for answer in given))

    def _answer(self, clean: Any, kind: str, answer: Any) -> int:
        if type(answer) is int:
            return self._check_id(answer, kind)
        if not isinstance(answer, str) or not answer:
            raise InputError(f"{self.place}: an answer of {kind!r} must be a string or a token id, got {answer!r}")
        speller = self._spelling(f"{kind!r}")
        before = clean if isinstance(clean, str) else ""
        (ids,) = speller.tails(before, [answer])
        if ids is not None and len(ids) == 1:
            return self._check_id(ids[0], kind)
        spaced = speller.one_token([" " + answer], before)
        hint = f"write {' ' + answer!r}, with the space" if spaced else "give a word of one token, or a token id"
        got = "the prompt's own tokens change, or the tokenizer does not know it" if ids is None else f"got {len(ids)}"
        raise InputError(
            f"{self.place}: {kind!r} answer {answer!r} must be exactly one token after the prompt ({got}); {hint}"
        )

    def _span(self, clean: Any, name: str, span: Any) -> list[int]:
        if name in TAKEN:
            raise InputError(f"{self.place}: a span cannot be called {name!r}, which means something else; rename it")
        pair = isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
        if isinstance(span, str) and span and isinstance(clean, str):
            if clean.count(span) != 1:
                raise InputError(
                    f"{self.place}: the span {name!r} must stand in 'clean' exactly once, and {span!r} stands there "
                    f"{clean.count(span)} times; give [first, end] in characters instead"
                )
            first = clean.index(span)
            span, pair = [first, first + len(span)], True
        if not pair or not 0 <= span[0] < span[1] <= len(clean):
            raise InputError(
                f"{self.place}: the span {name!r} must be a part of the text of 'clean', or [first, end] within it "
                f"(characters of text, or tokens of ids), got {span!r}"
            )
        if not isinstance(clean, str):
            return list(range(*span))
        positions = self._spelling(f"{name!r}").spell(clean).overlapping(*span)
        if not positions:
            raise InputError(f"{self.place}: the span {name!r} covers no token, only {clean[slice(*span)]!r}; widen it")
        return positions


def load_task(
    path: str | Path,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    align: Align = "refuse",
    first: int | None = None,
    vocabulary: int | None = None,
    metric: Metric = "kl",
    chance: float = 0.5,
    description: str = "",
) -> Task:
    """A task from a ``.jsonl`` file of prompts.

    Each line is an object: "clean" (text, or a list of token ids), "corrupted" (the same, of as many tokens), "correct"
    and "wrong" (an answer or a list of them: text that continues the prompt as exactly one token, or a token id),
    and "spans", which name positions: ``{"subject": "Mary"}`` (a part of the text), or ``[first, end]`` in characters
    of text or in tokens of ids. All but "clean" are optional, but all lines must have the same of them.

    Args:
        tokenizer: a fast Hugging Face tokenizer; not needed where all is ids.
        name: the task's; by default the file's.
        align: what becomes of a pair whose prompts differ in length: "refuse" it, or "drop" it (the task's
            ``data.dropped`` counts them).
        first: the id put before every text; None for what the tokenizer puts there by itself.
        vocabulary: ids must be below it; by default the tokenizer's.
        metric: the scope's divergence at the end positions.
        chance: the accuracy of guessing.

    Raises:
        InputError: a bad line; names it and says what to do.
        EmptyDataError: no line, or no pair of equal lengths.
        StorageError: the file cannot be read.

    Cost:
        The file is read once; each line is tokenised a few times.

    Example:
        >>> import tempfile, pathlib
        >>> from unweave.tasks import load_task
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "copy.jsonl"
        >>> _ = path.write_text('{"clean": [3, 4, 3], "corrupted": [3, 5, 3], "correct": 4, "wrong": 5}')
        >>> load_task(path).data.labels["correct"]
        tensor([4])
    """
    if align not in get_args(Align):
        raise InputError(f"align must be one of {', '.join(get_args(Align))}, got {align!r}")
    if first is not None and tokenizer is None:
        raise InputError("first= is put before texts, and without a tokenizer all prompts are ids; write it there")
    path = Path(path).expanduser()
    vocabulary = len(tokenizer) if vocabulary is None and tokenizer is not None else vocabulary
    reader = _Reader(None if tokenizer is None else Speller(tokenizer, first), vocabulary)
    rows: list[_Row] = []
    kind, dropped = None, 0
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        row = dataclasses.replace(reader, place=place).read(line)
        kind = kind or row.kind
        if row.kind != kind:
            raise InputError(f"{place}: has not the same fields and spans as the first line; give all lines the same")
        if _aligned(row, place, align):
            rows.append(row)
        else:
            dropped += 1
    if not rows:
        raise EmptyDataError(
            f"{path}: no prompt to read: " + (f"{dropped} pairs dropped" if dropped else "it is empty")
        )
    task = assemble(
        [row.clean for row in rows],
        [row.corrupted for row in rows if row.corrupted is not None] or None,
        {kind: [row.answers[kind] for row in rows] for kind in rows[0].answers},
        {span: [row.places[span] for row in rows] for span in rows[0].places},
        name=name or path.stem,
        metric=metric,
        chance=chance,
        description=description or f"prompts of {path.name}",
        vocabulary=vocabulary,
    )
    return dataclasses.replace(task, data=dataclasses.replace(task.data, source=str(path), dropped=dropped))


def _aligned(row: _Row, place: str, align: Align) -> bool:
    if row.corrupted == row.clean:
        raise InputError(f"{place}: 'corrupted' equals 'clean'; change what tells the answer")
    if row.corrupted is None or len(row.corrupted) == len(row.clean):
        return True
    if align == "refuse":
        raise InputError(
            f"{place}: 'clean' has {len(row.clean)} tokens and 'corrupted' {len(row.corrupted)}; choose words of equal "
            'length, or drop such pairs with align="drop"'
        )
    return False


def task_from_data(
    data: TokenData,
    where: str | Callable[[Batch], Tensor],
    *,
    tokens: Sequence[str] | None = None,
    name: str = "from data",
    chance: float | None = None,
    description: str = "",
) -> Task:
    """A task from plain data: the positions whose next-token prediction is the behaviour.

    Sequences without such a position are left out. There are no answers and no corrupted prompts; the scope is
    the KL at the position label "end".

    Args:
        where: a function of a batch that marks positions ``[batch pos]``, or a regular expression (``re.search``)
            on the string of the *next* token.
        tokens: the string of every token id, for a regular expression.
        chance: the accuracy of guessing; by default that of drawing tokens as often as they occur in the data: the
            mean over marked positions of the frequency of the token that follows.

    Raises:
        InputError: not a regular expression, or one without ``tokens``.
        ShapeError: the function does not mark ``[batch pos]``.
        EmptyDataError: nothing is marked.

    Cost:
        One pass over the ids; no model is run.

    Example:
        >>> import torch
        >>> from unweave.data import from_tensor
        >>> from unweave.tasks import task_from_data
        >>> data = from_tensor(torch.tensor([[0, 1, 2], [0, 2, 2]]))
        >>> task_from_data(data, "b", tokens=["a", "b", "c"]).data.labels["end"].tolist()
        [[True, False, False]]
    """
    if data.tokens.is_floating_point():
        raise InputError("a task asks for the next token, and this data holds reals")
    marks = _marker(where, tokens)
    real = torch.zeros(data.mask.shape, dtype=torch.bool)
    real[:, :-1] = data.mask[:, 1:]
    end = torch.zeros_like(real)
    for batch in data.batches(256):
        found = marks(batch)
        if found.shape != batch.mask.shape:
            raise ShapeError(f"where(batch) must have shape {tuple(batch.mask.shape)}, got {tuple(found.shape)}")
        end[batch.index, : found.shape[1]] = found.bool().cpu()
    end &= real
    if not bool(end.any()):
        what = repr(where) if isinstance(where, str) else "the function"
        raise EmptyDataError(f"{what} marks no position of {data.source or 'the data'} that has a next token")
    if chance is None:
        chance = _frequency_chance(data, end)
    labelled = dataclasses.replace(data, labels={**data.labels, "end": end}).select(end.any(1))
    scope = Scope(positions="end", description=description or f"the next token where {name}")
    return Task(name, labelled, scope, None, chance, description)


def _marker(where: str | Callable[[Batch], Tensor], tokens: Sequence[str] | None) -> Callable[[Batch], Tensor]:
    if not isinstance(where, str):
        return where
    if tokens is None:
        raise InputError(f"the regular expression {where!r} needs the string of every token id: pass tokens=")
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise InputError(f"not a regular expression: {where!r}: {error}") from error
    matches = torch.tensor([bool(pattern.search(token)) for token in tokens])

    def marks(batch: Batch) -> Tensor:
        if int(batch.inputs.max()) >= len(matches):
            raise InputError(f"token id {int(batch.inputs.max())} has no string among the {len(matches)} of tokens=")
        out = torch.zeros_like(batch.mask)
        out[:, :-1] = matches[batch.inputs[:, 1:]]
        return out

    return marks


def _frequency_chance(data: TokenData, end: Bool[Tensor, "n pos"]) -> float:
    """mean over marked positions of the share that the token after it has of all real tokens."""
    ids = data.tokens[data.mask].long()
    share = ids.bincount().double() / len(ids)
    after = data.tokens[:, 1:][end[:, :-1]].long()
    return float(share[after].mean())
