"""The ready-made behaviours: one function each, which draws prompts without end.

A text is a *frame* with fields in braces and two ways to fill them, clean and corrupted; every field is a named
position. To add a behaviour, write a function that yields :class:`Prompt` for a tokenizer and a random generator,
mark it with :func:`text_template`, and test that its answers are right by reading the text again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from unweave.errors import InputError
from unweave.tasks.spelling import Speller, most

__all__ = ["TEMPLATES", "Prompt", "Template", "text_template"]


@dataclass(frozen=True)
class Prompt:
    """A prompt before it is tokenised.

    Attributes:
        frame: text with fields in braces.
        clean, corrupted: what stands in each field.
        correct, wrong: the answers, as text that continues the clean prompt by one token.
        note: what depends on the tokenizer, for the task's description.
    """

    frame: str
    clean: Mapping[str, str]
    corrupted: Mapping[str, str]
    correct: tuple[str, ...]
    wrong: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Template:
    """A behaviour that makes its own prompts.

    Attributes:
        name, description: for people.
        changed: the named positions at which clean and corrupted prompts may differ.
        draw: (tokenizer, random generator) -> prompts; raises InputError where the tokenizer lacks words.
    """

    name: str
    description: str
    changed: tuple[str, ...]
    draw: Callable[[Speller, Random], Iterator[Prompt]]


TEMPLATES: dict[str, Template] = {}

Draw = Callable[[Speller, Random], Iterator[Prompt]]


def text_template(name: str, description: str, changed: tuple[str, ...]) -> Callable[[Draw], Draw]:
    """Enter a function into the ready-made behaviours."""

    def enter(draw: Draw) -> Draw:
        TEMPLATES[name] = Template(name, description, changed, draw)
        return draw

    return enter


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ---- indirect object ------------------------------------------------------------------------------------

NAMES = _words(
    "Mary John Tom James Sarah Anna Ben Tim Lily Timmy Sue Max Mia Jack Emma Kate Lucy Sam Bob Alice Paul Mark David "
    "Michael Robert William Richard Joseph Thomas Charles Daniel Matthew Anthony Peter George Henry Frank Simon Martin "
    "Laura Lisa Linda Susan Karen Jane Rachel Amy Emily Jessica Kevin Brian Adam Alex Andrew Steven Eric Ryan Luke "
    "Jason Justin Scott Sara Maria Helen Ruth Rose Grace Fred Joe Dan"
)
PLACES = _words("park store school house garden zoo beach farm shop station hospital office market restaurant")
OBJECTS = _words("ball book drink toy box cake hat gift flower bag ring kiss bone computer necklace snack")


def _spaced(words: tuple[str, ...]) -> list[str]:
    return [" " + word for word in words]


@text_template("ioi", "which of two names is the indirect object: the one that came once", ("subject_again",))
def ioi(speller: Speller, rng: Random) -> Iterator[Prompt]:
    """ "When Mary and John went to the store, John gave a drink to" -> " Mary", not " John".

    Half of the prompts name the subject second (ABB), half first (BAB); corrupted: a third name gives (ABC).
    Source: Wang et al. 2022, "Interpretability in the Wild".
    """
    names = list(speller.require_one_token(_spaced(NAMES), "ioi", "names", 3, before="When"))
    places = [word for (word,) in most(speller.by_length([(" " + word,) for word in PLACES]))]
    things = [word for (word,) in most(speller.by_length([(" " + word,) for word in OBJECTS]))]
    if not places or not things:
        raise InputError(f"the task 'ioi' needs places and objects, and this tokenizer spells none of {PLACES}")
    rest = " went to the{place},{subject_again} gave a{object} to"
    frames = ("When{indirect_object} and{subject}" + rest, "When{subject} and{indirect_object}" + rest)
    while True:
        a, b, c = rng.sample(names, 3)
        fields = {"indirect_object": a, "subject": b, "place": rng.choice(places), "object": rng.choice(things)}
        clean, corrupted = {**fields, "subject_again": b}, {**fields, "subject_again": c}
        yield Prompt(rng.choice(frames), clean, corrupted, (a,), (b,))


# ---- greater than ---------------------------------------------------------------------------------------

EVENTS = _words("war plan work trip show game trial project study reign siege fight quest test journey")
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")


@text_template("greater-than", "a year that ends a span is greater than the one that began it", ("year", "tens"))
def greater_than(speller: Speller, rng: Random) -> Iterator[Prompt]:
    """ "The war lasted from the year 1732 to the year 17" -> 33..99, not 00..32; corrupted: from the year 1701.

    Where the tokenizer writes numbers digit by digit, the next token is the tens digit: 4..9, not 0..2 (the same
    digit is neither); corrupted: the first tens digit is 0. A network that always prefers large numbers would
    be right, too: only the corrupted prompts tell it from one that reads the year.
    Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?".
    """
    events = [word for (word,) in most(speller.by_length([(" " + word,) for word in EVENTS]))] or [" war"]
    whole = list(speller.one_token([f"{y:02d}" for y in range(100)], before="The year 17"))
    digits = list(speller.one_token([str(d) for d in range(10)], before="The year 17"))
    begin = "The{event} lasted from the year {century}"
    end = " to the year {century_again}"
    if "01" in whole and len(whole) >= 50:
        middle = [y for y in whole if "02" <= y <= "98"]
        while True:
            year, century = rng.choice(middle), rng.choice(CENTURIES)
            fields = {"event": rng.choice(events), "century": century, "century_again": century}
            yield Prompt(
                begin + "{year}" + end,
                {**fields, "year": year},
                {**fields, "year": "01"},
                tuple(y for y in whole if y > year),
                tuple(y for y in whole if y <= year),
                "two digits in one token",
            )
    if len(digits) < 10:
        raise InputError(
            f"the task 'greater-than' needs two-digit numbers of one token ({len(whole)} of 100 are, after '17') or "
            f"digits of one token each ({len(digits)} of 10 are), and this tokenizer cuts years in another way"
        )
    while True:
        tens, century = rng.choice("12345678"), rng.choice(CENTURIES)
        fields = {
            "event": rng.choice(events),
            "century": century,
            "century_again": century,
            "units": rng.choice(digits),
        }
        yield Prompt(
            begin + "{tens}{units}" + end,
            {**fields, "tens": tens},
            {**fields, "tens": "0"},
            tuple(d for d in digits if d > tens),
            tuple(d for d in digits if d < tens),
            "digit by digit: the next token is the tens digit",
        )


# ---- agreement ------------------------------------------------------------------------------------------

NOUNS = (
    *(
        (word, word + "s")
        for word in _words("key dog cat boy girl book car tree friend toy house teacher king cook file")
    ),
    *((word, word + "s") for word in _words("string value object name line path author doctor farmer lawyer picture")),
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("mouse", "mice"),
    ("foot", "feet"),
    ("goose", "geese"),
    ("tooth", "teeth"),
    ("person", "people"),
)
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
BETWEEN = ("near", "behind", "with", "by")


@text_template("agreement", "the verb agrees with the subject, not with the noun before it", ("subject",))
def agreement(speller: Speller, rng: Random) -> Iterator[Prompt]:
    """ "The keys near the dog" -> " are", not " is"; corrupted: "The key near the dog".

    The noun between has the other number than the subject. All verb pairs that are single tokens count.
    Source: Linzen et al. 2016, "Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies".
    """
    found = speller.one_token([verb for pair in VERBS for verb in pair], before="The dog")
    verbs = [pair for pair in VERBS if set(pair) <= set(found)]
    if not verbs:
        tried = ", ".join(f"{a.strip()}/{b.strip()}" for a, b in VERBS)
        raise InputError(
            f"the task 'agreement' needs a verb in both numbers: this tokenizer spells none of {tried} as "
            "one token each"
        )
    nouns = most(speller.by_length([(" " + one, " " + many) for one, many in NOUNS]))
    if len(nouns) < 2:
        raise InputError(
            "the task 'agreement' needs two nouns whose singular and plural have the same number of tokens, and this "
            f"tokenizer spells {len(nouns)} of {len(NOUNS)} so, such as {' and '.join(NOUNS[0])}"
        )
    links = [word for (word,) in most(speller.by_length([(" " + word,) for word in BETWEEN]))]
    while True:
        (subject, attractor), number = rng.sample(nouns, 2), rng.randrange(2)
        fields = {"link": rng.choice(links), "attractor": attractor[1 - number]}
        yield Prompt(
            "The{subject}{link} the{attractor}",
            {**fields, "subject": subject[number]},
            {**fields, "subject": subject[1 - number]},
            tuple(pair[number] for pair in verbs),
            tuple(pair[1 - number] for pair in verbs),
        )


# ---- brackets -------------------------------------------------------------------------------------------

CLOSES = {"(": ")", "[": "]", "{": "}"}
LETTERS = _words("a b c d e f g h i j k m n p q r s t u v w x y z")
# each style: a bracket closed before the open one, and one closed inside it; as in code, or with spaces between
BRACKETS = (
    ("x = {other}{p}, {q}{mate}, {opening}{r}", "x = {opening}{p}, {other}{q}{mate}, {r}"),
    ("x = {other} {p} {q} {mate} {opening} {r}", "x = {opening} {p} {other} {q} {mate} {r}"),
)


@text_template("brackets", "which bracket closes: the mate of the one still open", ("opening",))
def brackets(speller: Speller, rng: Random) -> Iterator[Prompt]:
    """ "x = (a, b), [c" -> "]", not ")"; and "x = [a, (b), c" -> "]"; corrupted: the open bracket is of another kind.

    In half of the prompts the open bracket is the last that opened, in the other half another one opened and
    closed since. The wrong answer is the one that the corrupted prompt asks for.
    """
    example = {"p": "a", "q": "b", "r": "c", "other": "[", "mate": "]", "opening": "("}
    styles = [(frames, space) for frames in BRACKETS for space in ("", " ")]
    for frames, space in styles:
        texts = [frame.format(**example) for frame in frames]
        ends = [space + mate for mate in CLOSES.values()]
        if all(len(speller.one_token(ends, text)) == len(ends) for text in texts) and speller.knows(texts[0]):
            break
    else:
        raise InputError(
            "the task 'brackets' needs the closing brackets ) ] } as one token each after a word, with a space before "
            "them or without, and this tokenizer does not spell all three so"
        )
    while True:
        opening, corrupted = rng.sample(list(CLOSES), 2)
        other = rng.choice(list(CLOSES))
        p, q, r = rng.sample(LETTERS, 3)
        fields = {"other": other, "mate": CLOSES[other], "p": p, "q": q, "r": r}
        answers = (space + CLOSES[opening],), (space + CLOSES[corrupted],)
        yield Prompt(rng.choice(frames), {**fields, "opening": opening}, {**fields, "opening": corrupted}, *answers)


# ---- quotes ---------------------------------------------------------------------------------------------

WANTS = tuple(
    f"{verb} {thing}"
    for verb in ("want", "like", "have", "see", "need", "love", "know")
    for thing in ("you", "a dog", "the ball", "the toy", "to play", "to go", "a friend", "the park", "your hat", "it")
)
# (what ends the sentence, answers inside a quote, answers outside): some tokenizers join the stop and the quote
QUOTES = (
    (".", ('"',), (" She", " He", " They", " The", " Then")),
    ("", ('."', ',"', '!"', '?"', '"'), (".", ",", "!", "?", " and", " with")),
)


@text_template("quotes", "whether a quotation closes: only if one was opened", ("opening",))
def quotes(speller: Speller, rng: Random) -> Iterator[Prompt]:
    """ "Mary said "I want to play." -> a closing quote, not " She"; "Mary said that I want to play." -> " She".

    Half of the prompts open a quotation; the corrupted prompt is the other kind. They differ in the two tokens
    after "said". Where a tokenizer joins stop and quote, the prompt ends before them.
    """
    names = [word for (word,) in most(speller.by_length([(word,) for word in NAMES], before=""))]
    wants = [text for (text,) in most(speller.by_length([(" " + text,) for text in WANTS]))]
    kinds = (' "I', " that I")
    for stop, inside, outside in QUOTES:
        found = speller.one_token([*inside, *outside], before=f'Tom said "I want to play{stop}')
        closing, going_on = tuple(w for w in inside if w in found), tuple(w for w in outside if w in found)
        if closing and going_on and names and wants:
            break
    else:
        raise InputError(
            "the task 'quotes' needs a closing quote and a word that begins a sentence as one token each after a full "
            "stop, or stop and quote joined in one, and this tokenizer spells neither"
        )
    while True:
        quoted = rng.random() < 0.5
        clean, corrupted = kinds if quoted else kinds[::-1]
        fields = {"name": rng.choice(names), "words": rng.choice(wants)}
        answers = (closing, going_on) if quoted else (going_on, closing)
        frame = "{name} said{opening}{words}" + stop
        yield Prompt(frame, {**fields, "opening": clean}, {**fields, "opening": corrupted}, *answers)


WORDS = _words("name value path text line file data key code list type string test error time end start size item")


@text_template("strings", "whether a string or a parenthesis closes in code: what was opened", ("opening",))
def strings(speller: Speller, rng: Random) -> Iterator[Prompt]:
    """An open quote before a word -> a quote, not ")"; corrupted: a parenthesis in place of the quote, or reversed."""
    ends = {'"': '"', "(": ")"}
    found = speller.one_token(ends.values(), before='x = "name')
    if len(found) < len(ends):
        raise InputError(
            "the task 'strings' needs a quote and a closing parenthesis as one token each after a word, and this "
            f"tokenizer spells {len(found)} of the two so"
        )
    words = [word for (word,) in most(speller.by_length([(word,) for word in WORDS], before='x = "'))]
    while True:
        opening, corrupted = rng.sample(list(ends), 2)
        fields = {"variable": rng.choice(LETTERS), "word": rng.choice(words)}
        answers = (ends[opening],), (ends[corrupted],)
        frame = "{variable} = {opening}{word}"
        yield Prompt(frame, {**fields, "opening": opening}, {**fields, "opening": corrupted}, *answers)
