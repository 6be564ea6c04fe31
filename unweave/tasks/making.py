"""Ready-made tasks: prompts drawn at random, of one length, in pairs that differ only where they should."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from string import Formatter
from typing import Any

from unweave.errors import InputError, UnknownNameError
from unweave.tasks.behaviours import TEMPLATES, Prompt, Template
from unweave.tasks.spelling import Speller
from unweave.tasks.task import ANSWERS, Metric, Task, assemble

__all__ = ["INDUCTION", "TEMPLATES", "list_tasks", "make_task"]

INDUCTION = "a random text is repeated: what followed this token before?"
INDUCTION_LENGTH = 24
# how sentencepiece writes a byte that no other token spells
BYTE = re.compile("<0x[0-9A-F]{2}>")
# fewer distinct prompts say little about a model
FEWEST = 16
# draws per prompt asked for before a template is taken to have no more
DRAWS = 20


@dataclass(frozen=True)
class _Made:
    """One prompt as ids."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answers: Mapping[str, Sequence[int]]
    places: Mapping[str, Sequence[int]]
    note: str = ""


def list_tasks() -> dict[str, str]:
    """The ready-made tasks: name -> what is asked.

    Example:
        >>> sorted(list_tasks())
        ['agreement', 'brackets', 'greater-than', 'induction', 'ioi', 'quotes', 'strings']
    """
    return {"induction": INDUCTION, **{name: template.description for name, template in TEMPLATES.items()}}


def make_task(
    name: str,
    tokenizer: Any = None,
    *,
    vocabulary: int | None = None,
    n: int = 128,
    seed: int = 0,
    length: int | None = None,
    first: int | None = None,
    metric: Metric = "kl",
) -> Task:
    """A ready-made behaviour, in prompts for this tokenizer.

    All prompts have one length, no two are equal, and each differs from its corrupted one only at the positions
    that are named for it, so that means may be taken by position (``collect_means(..., per_position=True)``). The
    same for the same seed. Guessing is right half of the time: correct and wrong answers
    change places (but see "greater-than": there the corrupted prompts are the proof).

    Args:
        name: one of :func:`list_tasks`.
        tokenizer: a fast Hugging Face tokenizer; "induction" does without.
        vocabulary: for "induction" without a tokenizer: ids are drawn below it.
        n: how many prompts. Where words or numbers are few there may be fewer, but never two equal ones.
        seed: which prompts are drawn.
        length: of the prompts of "induction", in tokens, the first id included; 24 by default.
        first: the id put before every prompt; None for what the tokenizer puts there by itself.
        metric: the scope's divergence at the position "end".

    Raises:
        UnknownNameError: no such task.
        InputError: the tokenizer cannot spell it; says what is missing.

    Cost:
        A few calls of the tokenizer for each prompt; no model is run.

    Example:
        >>> task = make_task("induction", vocabulary=48, first=0, n=3)
        >>> task.data.tokens[:, 0].tolist(), task.scope.positions
        ([0, 0, 0], 'end')
    """
    if name not in list_tasks():
        raise UnknownNameError("task", name, list_tasks())
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    rng = Random(seed)
    if name == "induction":
        ids, lead = _alphabet(tokenizer, vocabulary, first)
        made = _induction(ids, lead, n, INDUCTION_LENGTH if length is None else length, rng)
    else:
        if tokenizer is None or length is not None:
            needs = "a tokenizer" if tokenizer is None else "no length: its prompts are as long as its text"
            raise InputError(f"the task {name!r} takes {needs}")
        made = _texts(TEMPLATES[name], Speller(tokenizer, first), n, rng)
    return assemble(
        [p.clean for p in made],
        [p.corrupted for p in made],
        {kind: [p.answers[kind] for p in made] for kind in ANSWERS},
        {place: [p.places[place] for p in made] for place in made[0].places},
        name=name,
        metric=metric,
        description=list_tasks()[name] + (f" ({made[0].note})" if made[0].note else ""),
        vocabulary=len(tokenizer) if vocabulary is None else vocabulary,
    )


# ---- texts ----------------------------------------------------------------------------------------------


def _texts(template: Template, speller: Speller, n: int, rng: Random) -> list[_Made]:
    """Draw until ``n`` different prompts of one length are there, or no more come."""
    by_length: dict[int, dict[tuple[int, ...], _Made]] = {}
    refused: Counter[str] = Counter()
    for prompt in islice(template.draw(speller, rng), DRAWS * max(n, FEWEST)):
        made = _make(template, speller, prompt)
        if isinstance(made, str):
            refused[made] += 1
            continue
        group = by_length.setdefault(len(made.clean), {})
        group[made.clean] = made
        if len(group) == n:
            break
    best = max(by_length.values(), key=len, default={})
    if len(best) < min(n, FEWEST):
        why = refused.most_common(1)[0][0] if refused else "its words allow no more"
        raise InputError(
            f"the task {template.name!r} has only {len(best)} different prompts with this tokenizer: {why}; "
            "use another task, or write prompts for it and load them with load_task"
        )
    return list(best.values())


def _make(template: Template, speller: Speller, prompt: Prompt) -> _Made | str:
    """The prompt as ids, or why it is of no use."""
    clean, spans = _fill(prompt.frame, prompt.clean)
    corrupted, _ = _fill(prompt.frame, prompt.corrupted)
    spelt, twin = speller.spell(clean), speller.spell(corrupted)
    if speller.unknown is not None and speller.unknown in (*spelt.ids, *twin.ids):
        return f"a word of {clean!r} is unknown"
    places = {field: spelt.overlapping(*span) for field, span in spans.items()}
    if len(spelt.ids) != len(twin.ids):
        return f"{clean!r} and {corrupted!r} differ in length ({len(spelt.ids)} and {len(twin.ids)} tokens)"
    differ = {i for i, (a, b) in enumerate(zip(spelt.ids, twin.ids, strict=True)) if a != b}
    if not differ or not differ <= {i for field in template.changed for i in places.get(field, ())}:
        return f"{clean!r} and {corrupted!r} differ outside {' and '.join(template.changed)}"
    tails = speller.tails(clean, [*prompt.correct, *prompt.wrong])
    answers = [ids[0] for ids in tails if ids is not None and len(ids) == 1]
    if len(answers) < len(tails) or len(set(answers)) < len(answers):
        return f"an answer to {clean!r} is not one token"
    k = len(prompt.correct)
    return _Made(spelt.ids, twin.ids, {"correct": answers[:k], "wrong": answers[k:]}, places, prompt.note)


def _fill(frame: str, fields: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The text of a frame, and where each field stands in it (its leading space left out)."""
    text, spans = "", {}
    for literal, field, _, _ in Formatter().parse(frame):
        text += literal
        if field is not None:
            word = fields[field]
            spans[field] = (len(text) + len(word) - len(word.lstrip()), len(text) + len(word))
            text += word
    return text, spans


# ---- induction ------------------------------------------------------------------------------------------


def _alphabet(tokenizer: Any, vocabulary: int | None, first: int | None) -> tuple[list[int], tuple[int, ...]]:
    """The ids a random text is made of, and those before it."""
    if tokenizer is None:
        if vocabulary is None:
            raise InputError("the task 'induction' needs a tokenizer, or vocabulary= (graph.info['d_vocab'])")
        lead = () if first is None else (first,)
        if first is not None and not 0 <= first < vocabulary:
            raise InputError(f"first is id {first}, outside the vocabulary of {vocabulary}")
        return [i for i in range(vocabulary) if i not in lead], lead
    speller = Speller(tokenizer, first)
    special = {*tokenizer.all_special_ids, *speller.lead}
    n = min(len(tokenizer), vocabulary or len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    words = zip(pieces, tokenizer.batch_decode([[i] for i in range(n)]), strict=True)
    # whole or part words, as in Olsson et al. 2022: signs and single bytes are seldom repeated in any text
    usable = [BYTE.fullmatch(piece or "") is None and word.strip().isalpha() for piece, word in words]
    return [i for i, ok in enumerate(usable) if ok and i not in special], speller.lead


def _induction(ids: Sequence[int], lead: tuple[int, ...], n: int, length: int, rng: Random) -> list[_Made]:
    """Random texts whose second copy breaks off: "A B C D E F A B" -> "C", which followed B before.

    Corrupted: in the first copy the answer has changed places with another token that the second copy does not
    reach, "A B E D C F A B" -> "E". Both prompts hold the same tokens, once or twice alike: only order tells. All
    tokens of the text differ from each other. Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    period = (2 * (length - len(lead)) + 2) // 3
    reach = length - len(lead) - period
    if reach < 1 or period - reach < 2:
        raise InputError(f"the task 'induction' needs at least {4 + len(lead)} tokens, got length={length}")
    if len(ids) < period:
        raise InputError(
            f"an 'induction' prompt of {length} tokens repeats {period} different ones, and the vocabulary has "
            f"{len(ids)} to draw from; give a smaller length"
        )
    front = len(lead)
    made: dict[tuple[int, ...], _Made] = {}
    for _ in range(DRAWS * n):
        text = rng.sample(ids, period)
        other = rng.randrange(reach + 1, period)
        swapped = list(text)
        swapped[reach], swapped[other] = text[other], text[reach]
        clean = (*lead, *text, *text[:reach])
        made[clean] = _Made(
            clean,
            (*lead, *swapped, *text[:reach]),
            {"correct": [text[reach]], "wrong": [text[other]]},
            {"previous": [front + reach - 1], "answer": [front + reach], "swapped": [front + other]},
        )
        if len(made) == n:
            break
    return list(made.values())
