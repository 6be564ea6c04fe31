"""Tasks: answers read again from the text, pairs that differ only where they should, and what no model can do."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import product
from pathlib import Path

import jaxtyping
import pytest
import scipy.stats
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import unweave
from unweave import zoo
from unweave.capture import load_tokenizer
from unweave.data import TokenData, from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, StorageError, UnknownNameError
from unweave.execution import run
from unweave.scope import Scope, position_mask
from unweave.tasks import (
    Task,
    TaskCheck,
    check_task,
    list_tasks,
    load_task,
    make_task,
    require_solved,
    task_from_data,
)
from unweave.tasks import behaviours as b
from unweave.tasks.checking import binomial_tail
from unweave.tasks.making import TEMPLATES
from unweave.zoo import ToyConfig, ToyTransformer

TEXTS = sorted(TEMPLATES)
CHANGED = {name: template.changed for name, template in TEMPLATES.items()} | {"induction": ("answer", "swapped")}
NOUN_FORMS = {form: number for pair in b.NOUNS for number, form in enumerate(pair)}


# ---- toy tokenizers -------------------------------------------------------------------------------------


def every_word() -> list[str]:
    """All words that the templates use."""
    groups = [b.NAMES, b.PLACES, b.OBJECTS, b.EVENTS, b.BETWEEN, b.LETTERS, b.WORDS, tuple(NOUN_FORMS)]
    said = " ".join(b.WANTS) + " When and went to the gave a lasted from year The said that I She He They Then with x"
    verbs = [verb.strip() for pair in b.VERBS for verb in pair]
    return sorted({word for group in groups for word in group} | set(said.split()) | set(verbs))


def word_tokenizer(
    words: list[str], digits: str = r"\d\d", lead: bool = False, extra: str = ""
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokens carry the space before them, as GPT-2's do; ``digits``: how it cuts numbers."""
    pairs = [f"{space}{n:02d}" for n in range(100) for space in ("", " ")] if digits == r"\d\d" else []
    signs = list('()[]{},.="-!?') + [" " + c for c in '()[]{}="-'] + [f"{s}{d}" for d in range(10) for s in ("", " ")]
    pieces = ["<unk>", "<s>", *(s + w for w in words for s in ("", " ")), *signs, *pairs, *extra.split()]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    joined = "|".join(map(re.escape, extra.split()))
    pattern = rf" ?[A-Za-z]+| ?{digits}| ?\d|{joined + '|' if joined else ''} ?[^\sA-Za-z\d]|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if lead:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


TOKENIZERS = {
    "words": lambda: word_tokenizer(every_word()),
    "words, single digits, a first token": lambda: word_tokenizer(every_word(), digits=r"\d", lead=True),
    "words, stop and quote joined": lambda: word_tokenizer(every_word(), extra='." ," !"'),
}
REAL = ("stories260K", "pylm")
# what each tokenizer lacks
UNSPELLABLE = {("stories260K", "agreement"), ("stories260K", "strings"), ("pylm", "ioi")}


def tokenizer_of(kind: str, request: pytest.FixtureRequest):
    if kind in TOKENIZERS:
        return TOKENIZERS[kind]()
    return load_tokenizer(request.getfixturevalue("shared") / "models" / kind)


def text_of(tokenizer, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()


def token_text(tokenizer, i: int) -> str:
    return tokenizer.decode([i]).strip()


def answers(tokenizer, task: Task, kind: str, row: int) -> set[str]:
    return {token_text(tokenizer, i) for i in torch.atleast_1d(task.data.labels[kind][row]).tolist() if i >= 0}


# ---- answers, by reading the text again -----------------------------------------------------------------


def read_ioi(text: str) -> tuple[set[str], set[str]]:
    first, second, giver = re.fullmatch(r"When (\w+) and (\w+) went to the \w+, (\w+) gave a \w+ to", text).groups()
    assert giver in (first, second)
    return {first, second} - {giver}, {giver}


def read_greater_than(text: str) -> tuple[set[str], set[str]]:
    century, year, again = re.fullmatch(r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)", text).groups()
    assert century == again
    return {f"{y:02d}" for y in range(int(year) + 1, 100)}, {f"{y:02d}" for y in range(int(year) + 1)}


def read_digits(text: str) -> tuple[set[str], set[str]]:
    tens = int(re.fullmatch(r"The \w+ lasted from the year \d\d(\d)\d to the year \d\d", text)[1])
    return {str(d) for d in range(tens + 1, 10)}, {str(d) for d in range(tens)}


def read_agreement(text: str) -> tuple[set[str], set[str]]:
    subject, attractor = re.fullmatch(r"The (\w+) \w+ the (\w+)", text).groups()
    assert subject != attractor
    forms = {"is", "was", "has"}, {"are", "were", "have"}
    return forms if NOUN_FORMS[subject] == 0 else forms[::-1]


def read_brackets(text: str) -> tuple[set[str], set[str]]:
    stack = []
    for c in text:
        if c in "([{":
            stack.append(")]}"["([{".index(c)])
        elif c in ")]}":
            assert stack.pop() == c
    assert len(stack) == 1
    return {stack[0]}, set(")]}") - {stack[0]}


def read_quotes(text: str) -> tuple[set[str], set[str]]:
    inside, outside = {'"', '."', ',"', '!"'}, {"She", "He", "They", "The", "Then", ".", ",", "!", "?", "and", "with"}
    return (inside, outside) if text.count('"') == 1 else (outside, inside)


def read_strings(text: str) -> tuple[set[str], set[str]]:
    return ({'"'}, {")"}) if re.fullmatch(r'\w = "\w+', text) else ({")"}, {'"'})


READERS = {
    "ioi": read_ioi,
    "greater-than": read_greater_than,
    "agreement": read_agreement,
    "brackets": read_brackets,
    "quotes": read_quotes,
    "strings": read_strings,
}


@pytest.mark.parametrize("kind", [*TOKENIZERS, *REAL])
@pytest.mark.parametrize("name", TEXTS)
def test_answers_are_right_and_pairs_differ_only_where_they_should(kind, name, request):
    tokenizer = tokenizer_of(kind, request)
    if (kind, name) in UNSPELLABLE:
        with pytest.raises(InputError, match=f"the task '{name}'.*this tokenizer"):
            make_task(name, tokenizer)
        return
    task = make_task(name, tokenizer, n=48, seed=3)
    assert len(task) == 48
    assert bool(task.data.mask.all()), "one length"
    assert len(task.data.tokens.unique(dim=0)) == 48, "no two equal"
    reader = read_digits if "digit by digit" in task.description else READERS[name]
    for row in range(48):
        correct, wrong = reader(text_of(tokenizer, task.data.tokens[row]))
        given = answers(tokenizer, task, "correct", row), answers(tokenizer, task, "wrong", row)
        assert all(given), "an answer of each kind"
        assert given[0] <= correct
        assert given[1] <= wrong
    check_pairs(task)


def check_pairs(task: Task) -> None:
    """Clean and corrupted differ, and only at the positions named for it; the end is the last token."""
    marked = torch.stack([task.data.labels[name] for name in CHANGED[task.name] if name in task.data.labels]).any(0)
    assert bool(task.changed.any(1).all())
    assert not bool((task.changed & ~marked).any())
    assert torch.equal(task.data.labels["end"].nonzero()[:, 1], task.data.lengths - 1)
    assert task.corrupted.labels == task.data.labels


# a named position, and which word of the text must stand there
WORD_AT = {
    "ioi": ("indirect_object", lambda text: read_ioi(text)[0]),
    "greater-than": ("event", lambda text: {text.split()[1]}),
    "agreement": ("attractor", lambda text: {text.split()[-1]}),
    "brackets": ("opening", lambda text: {"([{"[")]}".index(min(read_brackets(text)[0]))]}),
    "quotes": ("opening", lambda text: {re.search(r'"I|that I', text)[0]}),
    "strings": ("opening", lambda text: {'"' if '"' in text else "("}),
}


@pytest.mark.parametrize("kind", [*TOKENIZERS, *REAL])
@pytest.mark.parametrize("name", TEXTS)
def test_named_positions_are_where_the_words_stand(kind, name, request):
    if (kind, name) in UNSPELLABLE:
        pytest.skip("this tokenizer cannot spell it")
    tokenizer = tokenizer_of(kind, request)
    task = make_task(name, tokenizer, n=16)
    label, expected = WORD_AT[name]
    for tokens, marks in zip(task.data.tokens, task.data.labels[label], strict=True):
        assert {text_of(tokenizer, tokens[marks])} == expected(text_of(tokenizer, tokens))


def test_the_corrupted_prompt_asks_for_something_else():
    tokenizer = TOKENIZERS["words"]()
    for name in ("agreement", "brackets", "quotes", "strings"):
        task = make_task(name, tokenizer, n=32)
        for row in range(32):
            clean, _ = READERS[name](text_of(tokenizer, task.data.tokens[row]))
            corrupted, _ = READERS[name](text_of(tokenizer, task.corrupted.tokens[row]))
            assert not clean & corrupted
            assert answers(tokenizer, task, "wrong", row) <= corrupted
    ioi = make_task("ioi", tokenizer, n=32)
    for text in (text_of(tokenizer, row) for row in ioi.corrupted.tokens):
        names = re.findall(r"[A-Z]\w+", text)[1:]
        assert len(set(names)) == 3
    for kind, year in (("words", "01"), ("words, single digits, a first token", r"0\d")):
        task = make_task("greater-than", TOKENIZERS[kind](), n=16)
        assert all(re.search(rf"year \d\d{year} to", text_of(TOKENIZERS[kind](), row)) for row in task.corrupted.tokens)


def test_the_noun_between_has_the_other_number():
    tokenizer = TOKENIZERS["words"]()
    task = make_task("agreement", tokenizer, n=32)
    for text in (text_of(tokenizer, row) for row in task.data.tokens):
        assert NOUN_FORMS[text.split()[1]] != NOUN_FORMS[text.split()[-1]]


def test_half_of_the_answers_go_each_way():
    """Whatever a network prefers without reading, it is right half of the time: correct and wrong change places."""
    tokenizer = TOKENIZERS["words"]()
    for name in sorted(set(TEXTS) - {"greater-than"}):
        task = make_task(name, tokenizer, n=400)
        preference = torch.rand(len(tokenizer), dtype=torch.float64)

        def mean(ids: torch.Tensor, preference: torch.Tensor = preference) -> torch.Tensor:
            ids = ids[:, None] if ids.ndim == 1 else ids
            return (preference[ids.clamp(min=0).long()] * (ids >= 0)).sum(1) / (ids >= 0).sum(1)

        right = (mean(task.data.labels["correct"]) > mean(task.data.labels["wrong"])).double().mean()
        assert abs(float(right) - 0.5) < 4 * math.sqrt(0.25 / len(task)), name


def test_tokenizers_that_cut_numbers_alike_get_digits_and_others_pairs():
    pairs = make_task("greater-than", TOKENIZERS["words"](), n=16)
    digits = make_task("greater-than", TOKENIZERS["words, single digits, a first token"](), n=16)
    assert "two digits in one token" in pairs.description
    assert "digit by digit" in digits.description
    assert "year" in pairs.positions
    assert {"tens", "units"} <= set(digits.positions)
    assert digits.data.tokens.shape[1] == pairs.data.tokens.shape[1] + 4  # the first token, two centuries, the year


def test_where_stop_and_quote_are_one_token_the_prompt_ends_before_them():
    apart = make_task("quotes", TOKENIZERS["words"](), n=16)
    tokenizer = TOKENIZERS["words, stop and quote joined"]()
    joined = make_task("quotes", tokenizer, n=16)
    assert all(text_of(TOKENIZERS["words"](), row).endswith(".") for row in apart.data.tokens)
    assert not any("." in text_of(tokenizer, row) for row in joined.data.tokens)
    assert '."' in answers(tokenizer, joined, "correct", 0) | answers(tokenizer, joined, "wrong", 0)


def test_random_texts_are_made_of_words(shared):
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    used = make_task("induction", tokenizer).data.tokens
    assert bool((used[:, 0] == tokenizer.bos_token_id).all())
    pieces = tokenizer.convert_ids_to_tokens(used[:, 1:].unique().tolist())
    assert len(pieces) > 200
    assert all(piece.removeprefix("\u2581").isalpha() for piece in pieces)


def test_what_a_tokenizer_puts_first_is_there_and_nothing_after():
    tokenizer = TOKENIZERS["words, single digits, a first token"]()
    assert tokenizer("The key")["input_ids"][-1] == 1, "this one also puts a token last"
    task = make_task("agreement", tokenizer, n=8)
    assert bool((task.data.tokens[:, 0] == 1).all())
    assert not bool((task.data.tokens[:, 1:] == 1).any())
    assert not any(bool(task.data.labels[name][:, 0].any()) for name in task.positions)
    other = make_task("agreement", TOKENIZERS["words"](), n=8, first=1)
    assert bool((other.data.tokens[:, 0] == 1).all())


def test_tasks_are_the_same_for_the_same_seed():
    tokenizer = TOKENIZERS["words"]()
    for name in list_tasks():
        one, two, other = (make_task(name, tokenizer, n=16, seed=seed) for seed in (0, 0, 1))
        assert one.fingerprint() == two.fingerprint() != other.fingerprint(), name


# ---- induction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "first"), [(4, None), (5, 0), (13, None), (24, 0), (40, 0)])
def test_induction_answers_follow_the_earlier_copy(length, first):
    task = make_task("induction", vocabulary=48, n=20, length=length, first=first)
    assert task.data.tokens.shape == (20, length)
    pairs = zip(task.data.tokens.tolist(), task.corrupted.tokens.tolist(), strict=True)
    for row, (clean, corrupted) in enumerate(pairs):
        correct, wrong = (int(task.data.labels[kind][row]) for kind in ("correct", "wrong"))
        for tokens, answer in ((clean, correct), (corrupted, wrong)):
            places = [i for i, token in enumerate(tokens) if token == tokens[-1]]
            assert len(places) == 2
            assert tokens[places[0] + 1] == answer
            assert bool(task.data.labels["previous"][row, places[0]])
            assert bool(task.data.labels["answer"][row, places[0] + 1])
        assert sorted(clean) == sorted(corrupted), "the same tokens: only order tells"
        assert clean.count(correct) == clean.count(wrong) == 1
    check_pairs(task)


def test_induction_on_the_zoo_is_solved(induction):
    task = make_task("induction", vocabulary=induction.info["d_vocab"], first=0, n=64)
    check = check_task(induction, task)
    assert check.accuracy > 0.98
    assert check.logit_difference > 5
    assert check.corrupted_logit_difference < -5, "the corrupted prompts have the other answer"
    assert check.told_apart > 0.98
    require_solved(check)


def untrained(d_vocab: int = 48) -> unweave.Graph:
    config = ToyConfig(n_layers=2, n_heads=2, d_model=16, d_head=8, d_mlp=0, d_vocab=d_vocab, d_out=d_vocab, n_ctx=48)
    return unweave.capture(ToyTransformer(config).eval())


def test_a_model_that_cannot_is_refused():
    check = check_task(untrained(), make_task("induction", vocabulary=48, first=0))
    assert 0.3 < check.accuracy < 0.7
    with pytest.raises(
        InputError,
        match=rf"cannot do this task: 'induction' has accuracy {check.accuracy:.1%} where guessing has 50.0% \(n = 128.*no circuit is searched",
    ):
        require_solved(check)


def test_a_model_that_does_not_read_the_prompt_is_refused(induction):
    """It prefers the answers whatever it reads: its edges to the output all cut."""
    task = make_task("induction", vocabulary=48, first=0, n=32)
    last = torch.tensor([not p.startswith("unembed") for p in induction.ports])
    deaf = induction.restrict(last[:, None].expand(induction.edge_matrix.shape), ablation="zero")
    check = check_task(deaf, task)
    assert check.told_apart == 0
    assert check.logit_difference == pytest.approx(check.corrupted_logit_difference)
    with pytest.raises(InputError, match="answers corrupted prompts alike: only 0.0% of the pairs"):
        require_solved(TaskCheck("x", 32, 1.0, 0.5, 0.0, 1.0, 1.0, check.told_apart, check.told_apart_p_value))


# ---- what real models can do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "solved", "failed"),
    [("stories260K", {"quotes"}, {"ioi", "greater-than"}), ("pylm", {"brackets", "quotes", "strings"}, {"agreement"})],
)
def test_real_models_do_what_they_were_trained_for(shared, model, solved, failed):
    folder = shared / "models" / model
    graph, tokenizer = unweave.capture(folder), load_tokenizer(folder)
    for name in solved | failed:
        check = check_task(graph, make_task(name, tokenizer, n=64))
        if name in solved:
            assert check.accuracy > 0.8, name
            require_solved(check)
        else:
            with pytest.raises(InputError, match="cannot do this task"):
                require_solved(check)


# ---- checks, by plain sums ------------------------------------------------------------------------------


def random_task(n: int = 9, metric: str = "kl") -> Task:
    """Prompts of different lengths, sets of answers, two end positions each."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 9, (n, 1), generator=generator)
    mask = torch.arange(8) < lengths
    tokens, other = torch.randint(1, 48, (2, n, 8), generator=generator) * mask
    index = torch.arange(8)
    end = (index >= lengths - 2) & (index < lengths)
    order = torch.rand(n, 48, generator=generator).argsort(1)
    correct, wrong = order[:, :2].clone(), order[:, 2:5].clone()
    correct[::2, 1] = -1
    labels = {"end": end, "correct": correct, "wrong": wrong}
    scope = Scope(positions="end", divergence=metric)
    return Task("random", from_tensor(tokens, mask, labels), scope, from_tensor(other, mask))


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("metric", ["kl", "logit_difference"])
def test_checks_are_plain_means(batch_size, metric, induction):
    task = random_task(metric=metric)
    differences: dict[str, list[float]] = {"clean": [], "corrupted": []}
    for which, data in (("clean", task.data), ("corrupted", task.corrupted)):
        for row in range(len(task)):
            length = int(task.data.lengths[row])
            logits = run(induction, data.tokens[row : row + 1, :length].long()).logits[0].double()
            correct, wrong = ([i for i in task.data.labels[k][row].tolist() if i >= 0] for k in ("correct", "wrong"))
            at = [logits[t, correct].mean() - logits[t, wrong].mean() for t in (length - 2, length - 1)]
            differences[which].append(float(sum(at) / 2))
    clean, corrupted = differences["clean"], differences["corrupted"]
    check = check_task(induction, task, batch_size=batch_size)
    right = sum(d > 0 for d in clean)
    apart = sum(c > d for c, d in zip(clean, corrupted, strict=True))
    assert check.n == 9
    assert check.accuracy == pytest.approx(right / 9)
    assert check.logit_difference == pytest.approx(sum(clean) / 9, rel=1e-4, abs=1e-4)
    assert check.corrupted_logit_difference == pytest.approx(sum(corrupted) / 9, rel=1e-4, abs=1e-4)
    assert check.told_apart == pytest.approx(apart / 9)
    assert check.p_value == pytest.approx(scipy.stats.binomtest(right, 9, 0.5, "greater").pvalue)
    assert check.told_apart_p_value == pytest.approx(scipy.stats.binomtest(apart, 9, 0.5, "greater").pvalue)


def test_a_function_marks_the_same_positions_in_corrupted_prompts(induction):
    task = random_task()
    by_label = check_task(induction, task)
    marks = {tuple(row.tolist()): end for row, end in zip(task.data.tokens, task.data.labels["end"], strict=True)}

    def where(batch):  # knows the clean prompts only
        width = batch.inputs.shape[1]
        rows = [tuple([*row.tolist(), *[0] * (8 - width)]) for row in batch.inputs]
        return torch.stack([marks[row][:width] for row in rows])

    assert check_task(induction, task.with_scope(Scope(positions=where))) == by_label


@pytest.mark.parametrize("batch_size", [5, 64])
def test_without_answers_the_next_token_counts(induction, induction_data, batch_size):
    task = task_from_data(induction_data, lambda batch: batch.labels["answered"], name="repeats")
    check = check_task(induction, task, batch_size=batch_size)
    right = n = 0
    for row in range(len(task)):
        tokens = task.data.tokens[row].long()
        guesses = run(induction, tokens[None]).logits[0].argmax(-1)
        for t in range(len(tokens) - 1):
            if task.data.labels["end"][row, t]:
                n += 1
                right += int(guesses[t] == tokens[t + 1])
    assert (check.n, check.accuracy) == (n, pytest.approx(right / n))
    assert check.accuracy > 0.95
    assert check.logit_difference is check.told_apart is check.corrupted_logit_difference is None
    require_solved(check)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("chance", [0.0, 1e-6, 0.02, 0.5, 0.97, 1.0])
def test_binomial_tails_are_those_of_scipy(n, chance):
    for k in {0, 1, n // 2, n - 1, n}:
        truth = scipy.stats.binom.sf(k - 1, n, chance)
        assert binomial_tail(k, n, chance) == pytest.approx(truth, rel=1e-8, abs=1e-300)


# ---- the task itself ------------------------------------------------------------------------------------


def test_splits_keep_pairs_together():
    task = make_task("induction", vocabulary=30, n=31)
    pairs = {tuple(a): tuple(c) for a, c in zip(task.data.tokens.tolist(), task.corrupted.tokens.tolist(), strict=True)}
    search, test = task.split(held_out=10, seed=4)
    assert (len(search), len(test)) == (21, 10)
    seen = []
    for part in (search, test):
        for row in range(len(part)):
            clean = tuple(part.data.tokens[row].tolist())
            assert pairs[clean] == tuple(part.corrupted.tokens[row].tolist())
            assert int(part.data.labels["correct"][row]) in clean
            seen.append(clean)
    assert sorted(seen) == sorted(pairs)
    again = task.split(held_out=10, seed=4)[1]
    assert again.fingerprint() == test.fingerprint() != task.split(held_out=10, seed=5)[1].fingerprint()
    chosen = task.select(lambda batch: batch.inputs[:, 0] > 10)
    assert torch.equal(chosen.corrupted.tokens, task.corrupted.tokens[task.data.tokens[:, 0] > 10])


def test_splits_do_not_part_documents():
    data = from_tensor(torch.arange(12).reshape(6, 2))
    data = TokenData(data.tokens, data.mask, {}, torch.tensor([0, 0, 1, 1, 2, 2]))
    search, test = Task("documents", data, Scope()).split(0.4)
    assert not set(search.data.documents.tolist()) & set(test.data.documents.tolist())


def test_a_task_works_as_a_scope(induction):
    task = make_task("induction", vocabulary=48, first=0, n=32)
    batch = next(task.data.batches(32))
    assert position_mask(task.scope, batch).sum(1).tolist() == [1] * 32
    assert task.metric == "kl"
    by_logits = task.with_metric("logit_difference")
    assert (by_logits.metric, by_logits.scope.positions) == ("logit_difference", "end")
    # all prompts have one length, so that what a node writes on average may depend on the position
    means = unweave.collect_means(induction, task.data, per_position=True)
    known = induction.mark_edges(zoo.known("induction")["edges"])
    for each in (task, by_logits):
        keep = unweave.score_edges(induction, each.data, each.scope).top(8)
        assert bool(keep[known].all())
        assert check_task(induction.restrict(keep, means=means), task).accuracy > 0.9
        assert check_task(induction.restrict(keep & ~known, means=means), task).accuracy < 0.8


def test_fingerprints_tell_tasks_apart():
    task = make_task("induction", vocabulary=30, n=8)
    data, corrupted = task.data, task.corrupted
    others = [
        task.with_metric("logit_difference"),
        task.with_scope(Scope(positions="last")),
        task.with_scope(Scope(positions="end", quotient=unweave.Quotient.from_sets({"few": {1}}, 30))),
        task.with_scope(Scope(positions="end", quotient=unweave.Quotient.from_sets({"few": {2}}, 30))),
        task.with_scope(Scope(positions=lambda batch: batch.inputs > 10)),
        task.with_scope(Scope(positions=lambda batch: batch.inputs > 11)),
        Task(task.name, data, task.scope, None),
        Task(task.name, data, task.scope, from_tensor(corrupted.tokens.flip(0)), task.chance),
        Task(task.name, data, task.scope, corrupted, 0.25),
        task.select(slice(0, 7)),
    ]
    prints = [t.fingerprint() for t in (task, *others)]
    assert len(set(prints)) == len(prints)
    assert task.with_metric("kl").fingerprint() == prints[0]


# ---- from files -----------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {
    "clean": "When Mary and John went to the store, John gave a drink to",
    "corrupted": "When Mary and John went to the store, Sue gave a drink to",
    "correct": " Mary",
    "wrong": [" John", " Sue"],
    "spans": {"subject": [14, 18], "indirect_object": "Mary", "place": "the store"},
}


def test_prompts_come_from_a_file(tmp_path):
    tokenizer = TOKENIZERS["words"]()
    short = {"clean": "Mary and John gave Mary", "corrupted": "Mary and Sue gave Mary", "correct": " John"}
    short |= {"wrong": tokenizer.convert_tokens_to_ids(" Sue")}
    short["spans"] = {"subject": "John", "indirect_object": [0, 4], "place": "gave"}
    path = write(tmp_path / "ioi.jsonl", ROW, "", short)
    task = load_task(path, tokenizer, metric="logit_difference", chance=0.25)
    assert (task.name, len(task), task.metric, task.chance) == ("ioi", 2, "logit_difference", 0.25)
    for row, text in enumerate((ROW["clean"], short["clean"])):
        real = task.data.mask[row]
        assert tokenizer.decode(task.data.tokens[row][real].tolist()) == text
        assert task.data.labels["end"][row].nonzero().tolist() == [[int(real.sum()) - 1]]
    words = {label: task.data.tokens[0][task.data.labels[label][0]] for label in ROW["spans"]}
    assert {k: text_of(tokenizer, v) for k, v in words.items()} == {
        "subject": "John",
        "indirect_object": "Mary",
        "place": "the store",
    }
    assert task.data.labels["subject"][0].nonzero().tolist() == [[3]]
    assert answers(tokenizer, task, "wrong", 0) == {"John", "Sue"}
    assert answers(tokenizer, task, "wrong", 1) == {"Sue"}
    assert task.data.labels["wrong"][1].tolist()[1] == -1
    assert task.changed.nonzero().tolist() == [[0, 9], [1, 2]]
    check_task(untrained(len(tokenizer)), task)


def test_prompts_may_be_ids(tmp_path):
    row = {"clean": [5, 6, 7, 5], "corrupted": [5, 8, 7, 5], "correct": [6, 9], "wrong": 8, "spans": {"first": [0, 2]}}
    task = load_task(write(tmp_path / "a.jsonl", row), vocabulary=10)
    assert task.data.tokens.tolist() == [[5, 6, 7, 5]]
    assert task.data.labels["first"].tolist() == [[True, True, False, False]]
    assert task.data.labels["correct"].tolist() == [[6, 9]]
    assert task.data.vocabulary_size == 10
    bare = load_task(write(tmp_path / "b.jsonl", {"clean": [1, 2]}, {"clean": [1, 2, 3]}))
    assert bare.corrupted is None
    assert not bare.has_answers
    assert bare.data.labels["end"].tolist() == [[False, True, False], [False, False, True]]


def test_pairs_of_different_lengths_can_be_dropped(tmp_path):
    long = {**ROW, "corrupted": "When Mary and John went to the big store, John gave a drink to"}
    words = word_tokenizer([*every_word(), "big"])
    path = write(tmp_path / "a.jsonl", ROW, long, ROW)
    with pytest.raises(InputError, match=r"a\.jsonl:2: 'clean' has 14 tokens and 'corrupted' 15.*align=\"drop\""):
        load_task(path, words)
    task = load_task(path, words, align="drop")
    assert (len(task), task.data.dropped) == (2, 1)
    with pytest.raises(EmptyDataError, match="1 pairs dropped"):
        load_task(write(tmp_path / "b.jsonl", long), words, align="drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"a\.jsonl:2: not JSON"),
        ("[" * 100_000, r"a\.jsonl:2: not JSON"),
        ("[1]", "needs an object with 'clean'"),
        ({"correct": " Mary"}, "needs an object with 'clean'"),
        ({**ROW, "clen": 1}, r"unknown fields \['clen'\]; known: clean, corrupted"),
        ({**ROW, "clean": ""}, "'clean' holds no token"),
        ({**ROW, "clean": 3}, "'clean' must be text or a list of token ids, got 3"),
        ({**ROW, "clean": [1, 2.5]}, "must be text or a list of token ids"),
        ({**ROW, "clean": [1, True]}, "must be text or a list of token ids"),
        ({**ROW, "corrupted": [1, 99999]}, r"'corrupted' holds token id 99999, outside the vocabulary of \d+"),
        ({**ROW, "corrupted": ROW["clean"]}, "'corrupted' equals 'clean'"),
        (
            {**ROW, "correct": "Mary"},
            "'Mary' must be exactly one token after the prompt .*write ' Mary', with the space",
        ),
        (
            {**ROW, "correct": " Zebedee"},
            "exactly one token after the prompt .*give a word of one token, or a token id",
        ),
        ({**ROW, "correct": " Mary John"}, r"exactly one token after the prompt \(got 2\)"),
        ({**ROW, "correct": 99999}, "'correct' holds token id 99999, outside"),
        ({**ROW, "correct": -1}, "'correct' holds token id -1, outside"),
        ({**ROW, "correct": True}, "must be a string or a token id, got True"),
        ({**ROW, "correct": ""}, "must be a string or a token id, got ''"),
        ({**ROW, "correct": []}, "'correct' is empty"),
        ({**ROW, "correct": " Sue"}, r"token \d+ is both a correct and a wrong answer"),
        ({k: v for k, v in ROW.items() if k != "wrong"}, "has 'correct' and no other answers"),
        ({k: v for k, v in ROW.items() if k != "corrupted"}, "has not the same fields and spans as the first line"),
        ({**ROW, "spans": {"subject": "John"}}, "'subject' must stand in 'clean' exactly once.*stands there 2 times"),
        ({**ROW, "spans": {"subject": "Zoe"}}, "stands there 0 times"),
        ({**ROW, "spans": {"subject": ""}}, "must be a part of the text"),
        ({**ROW, "spans": {"subject": [3, 999]}}, r"or \[first, end\] within it"),
        ({**ROW, "spans": {"subject": [3, 3]}}, r"or \[first, end\] within it"),
        ({**ROW, "spans": {"end": "Mary"}}, "a span cannot be called 'end'"),
        ({**ROW, "spans": {"place": "the store"}}, "has not the same fields and spans as the first line"),
        ({**ROW, "spans": ["Mary"]}, "spans must be an object"),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path, row, message):
    with pytest.raises(InputError, match=message) as error:
        load_task(write(tmp_path / "a.jsonl", ROW, row), TOKENIZERS["words"]())
    assert "a.jsonl:2:" in str(error.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(EmptyDataError, match="it is empty"):
        load_task(write(tmp_path / "a.jsonl", "", ""), TOKENIZERS["words"]())
    with pytest.raises(StorageError, match="cannot read"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="'clean' is text and there is no tokenizer"):
        load_task(write(tmp_path / "a.jsonl", ROW))
    with pytest.raises(InputError, match="'correct' is text and there is no tokenizer"):
        load_task(write(tmp_path / "a.jsonl", {"clean": [1], "correct": "a", "wrong": 3}))
    with pytest.raises(InputError, match="first= is put before texts"):
        load_task(tmp_path / "a.jsonl", first=1)
    (tmp_path / "b.jsonl").write_bytes(b'{"clean": "\xff"}')
    with pytest.raises(InputError, match=r"b\.jsonl:1 is not UTF-8"):
        load_task(tmp_path / "b.jsonl")


def test_a_span_that_no_token_covers_is_refused(tmp_path):
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1, "f": 2}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()  # spaces are part of no token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
    path = write(tmp_path / "a.jsonl", {"clean": "def f", "spans": {"gap": [3, 4]}})
    with pytest.raises(InputError, match=r"a\.jsonl:1: the span 'gap' covers no token, only ' '; widen it"):
        load_task(path, tokenizer)


@pytest.fixture
def unchecked():
    """No type checks on calls, as in production, so that our own refusals are what is met."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_unknown_options_are_refused(tmp_path, unchecked):
    with pytest.raises(InputError, match="align must be one of refuse, drop, got 'pad'"):
        load_task(tmp_path / "a.jsonl", align="pad")
    with pytest.raises(InputError, match="unknown divergence 'accuracy'"):
        make_task("induction", vocabulary=48, metric="accuracy")


# ---- from data ------------------------------------------------------------------------------------------


def test_a_pattern_marks_what_comes_before_it():
    tokens = ["a", "b", '"', "c"]
    data = from_tensor(
        torch.tensor([[0, 2, 1, 2], [0, 1, 3, 3], [2, 0, 2, 0]]), torch.tensor([[1] * 4, [1] * 4, [1, 1, 0, 0]])
    )
    task = task_from_data(data, '"', tokens=tokens, name="closing quotes")
    assert task.data.tokens.tolist() == [[0, 2, 1, 2]], "sequences in which nothing is asked are left out"
    assert task.data.labels["end"].tolist() == [[True, False, True, False]]
    ids = [i for row, real in zip(data.tokens, data.mask, strict=True) for i in row[real].tolist()]
    assert task.chance == pytest.approx(ids.count(2) / len(ids))
    mixed = task_from_data(data, "[bc]", tokens=tokens)
    after = [1, 1, 3, 3]
    assert mixed.chance == pytest.approx(sum(ids.count(i) / len(ids) for i in after) / 4)
    assert mixed.data.labels["end"].tolist() == [[False, True, False, False], [True, True, True, False]]


def test_a_function_marks_positions_batch_by_batch(induction_data):
    answered = induction_data.labels["answered"]
    task = task_from_data(induction_data, lambda batch: batch.labels["answered"], chance=0.125)
    expected = answered.clone()
    expected[:, -1] = False
    assert torch.equal(task.data.labels["end"], expected[expected.any(1)])
    assert (task.chance, task.metric, task.corrupted) == (0.125, "kl", None)
    with pytest.raises(InputError, match="has no answers, which a logit difference needs"):
        task.with_metric("logit_difference")


def test_bad_filters_are_refused(induction_data):
    data = from_tensor(torch.tensor([[0, 1, 2]]))
    with pytest.raises(InputError, match="needs the string of every token id: pass tokens="):
        task_from_data(data, "x")
    with pytest.raises(InputError, match=r"not a regular expression: '\('"):
        task_from_data(data, "(", tokens=["a", "b", "c"])
    with pytest.raises(InputError, match="token id 2 has no string among the 2"):
        task_from_data(data, "a", tokens=["a", "b"])
    with pytest.raises(EmptyDataError, match="'z' marks no position of tensor that has a next token"):
        task_from_data(data, "z", tokens=["a", "b", "c"])
    with pytest.raises(EmptyDataError, match="the function marks no position"):
        task_from_data(data, lambda batch: torch.tensor([[False, False, True]]))
    with pytest.raises(ShapeError, match=r"where\(batch\) must have shape \(1, 3\), got \(1,\)"):
        task_from_data(data, lambda batch: torch.tensor([True]))
    with pytest.raises(InputError, match="this data holds reals"):
        task_from_data(unweave.data.float_data(torch.zeros(2, 3)), "x")


# ---- refusals -------------------------------------------------------------------------------------------


def test_tasks_that_do_not_fit_together_are_refused():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    data, scope = from_tensor(tokens), Scope(positions="last")
    ids = torch.tensor([1, 2])
    with pytest.raises(EmptyDataError, match="'x' holds no prompt"):
        Task("x", data.select(slice(0, 0)), scope)
    with pytest.raises(InputError, match="chance is the accuracy of guessing, between 0 and 1, got 2"):
        Task("x", data, scope, chance=2.0)
    with pytest.raises(ShapeError, match="corrupted prompts must have the clean ones' shape and mask"):
        Task("x", data, scope, from_tensor(tokens[:1]))
    with pytest.raises(ShapeError, match="each pair must have one length"):
        Task("x", data, scope, from_tensor(tokens + 1, torch.tensor([[1, 1, 1], [1, 1, 0]])))
    with pytest.raises(InputError, match="prompt 1 equals its corrupted one"):
        Task("x", data, scope, from_tensor(torch.tensor([[1, 2, 4], [4, 5, 6]])))
    with pytest.raises(InputError, match="has 'wrong' answers only"):
        Task("x", from_tensor(tokens, labels={"wrong": ids}), scope)
    with pytest.raises(ShapeError, match=r"label 'correct' must be ids \[n\] or \[n k\], got torch.float32"):
        Task("x", from_tensor(tokens, labels={"wrong": ids, "correct": ids.float()}), scope)
    with pytest.raises(InputError, match="which a logit difference needs"):
        Task("x", data, Scope(positions="last", divergence="logit_difference"))
    with pytest.raises(UnknownNameError, match="no label of positions is named 'ende'; the closest: end"):
        Task("x", from_tensor(tokens, labels={"end": tokens > 3}), Scope(positions="ende"))


def test_checks_refuse_what_cannot_be_checked(induction):
    labels = {"correct": torch.tensor([1, 2]), "wrong": torch.tensor([3, 4])}
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    nowhere = Task("x", from_tensor(tokens, labels=labels | {"end": tokens == 3}), Scope(positions="end"))
    with pytest.raises(InputError, match="looks at no position of prompt 1"):
        check_task(induction, nowhere)
    outside = Task("x", from_tensor(tokens, labels=labels | {"wrong": torch.tensor([3, 48])}), Scope(positions="last"))
    with pytest.raises(InputError, match="label 'wrong' of sequence 1 holds id 48"):
        check_task(induction, outside)
    with pytest.raises(EmptyDataError, match="selects no position that has a next token"):
        check_task(induction, Task("x", from_tensor(tokens), Scope(positions="last")))
    with pytest.raises(InputError, match="level is a probability between 0 and 1, got 0.0"):
        require_solved(TaskCheck("x", 1, 1.0, 0.5, 0.5), level=0.0)


def test_ready_made_tasks_say_what_is_missing():
    with pytest.raises(UnknownNameError, match="no task is named 'greater'; the closest: greater-than"):
        make_task("greater")
    with pytest.raises(InputError, match="n must be at least 1"):
        make_task("induction", vocabulary=48, n=0)
    with pytest.raises(InputError, match="needs a tokenizer, or vocabulary="):
        make_task("induction")
    with pytest.raises(InputError, match="repeats 16 different ones, and the vocabulary has 10"):
        make_task("induction", vocabulary=10)
    for length in (-3, 0, 3):
        with pytest.raises(InputError, match=f"needs at least 4 tokens, got length={length}"):
            make_task("induction", vocabulary=10, length=length)
    with pytest.raises(InputError, match="first is id 48, outside the vocabulary of 48"):
        make_task("induction", vocabulary=48, first=48)
    with pytest.raises(InputError, match="the task 'ioi' takes a tokenizer"):
        make_task("ioi", vocabulary=48)
    with pytest.raises(InputError, match="takes no length"):
        make_task("ioi", TOKENIZERS["words"](), length=10)
    with pytest.raises(InputError, match="int does not tell which characters a token stands for"):
        make_task("ioi", 3)
    with pytest.raises(InputError, match="first is id 99999, outside the tokenizer's vocabulary"):
        make_task("ioi", TOKENIZERS["words"](), first=99999)


@pytest.mark.parametrize(
    ("name", "lacks", "message"),
    [
        ("ioi", {*b.NAMES} - {"Mary", "John"}, "needs 3 names of one token.*only ' Mary', ' John' of"),
        ("ioi", {*b.PLACES}, "needs places and objects"),
        ("ioi", {"gave"}, "only 0 different prompts with this tokenizer: a word of .* is unknown"),
        ("ioi", {*b.PLACES[1:], *b.OBJECTS[1:], *b.NAMES[2:-1]}, "only 12 different prompts.*its words allow no more"),
        ("agreement", {"is", "was", "have"}, "this tokenizer spells none of is/are, was/were, has/have as one token"),
        ("agreement", {*NOUN_FORMS} - {"key", "keys", "dog"}, "needs two nouns.*spells 1 of"),
        ("greater-than", {*"0123456789"}, r"needs two-digit numbers of one token \(0 of 100"),
        ("brackets", {")", " )"}, "needs the closing brackets"),
        ("quotes", {'"'}, "needs a closing quote"),
        ("strings", {'"'}, "needs a quote and a closing parenthesis"),
    ],
)
def test_templates_say_which_words_are_missing(name, lacks, message):
    full = word_tokenizer([w for w in every_word() if w not in lacks], digits=r"\d")
    state = json.loads(full.backend_tokenizer.to_str())
    state["model"]["vocab"] = {w: i for w, i in state["model"]["vocab"].items() if w not in lacks}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")
    with pytest.raises(InputError, match=message):
        make_task(name, tokenizer)


def test_adding_a_template_is_one_function():
    before = set(list_tasks())

    @b.text_template("parity", "which of two words stood first", ("subject",))
    def parity(speller, rng):
        for one, two, link in product(b.NAMES, b.NAMES, b.BETWEEN):
            fields = {"link": " " + link}
            yield b.Prompt(
                "{subject}{link}", {**fields, "subject": one}, {**fields, "subject": two}, (" is",), (" are",)
            )

    try:
        task = make_task("parity", TOKENIZERS["words"](), n=4)
        assert set(list_tasks()) - before == {"parity"}
        assert len(task) == 4
    finally:
        del TEMPLATES["parity"]


def test_named_positions_that_never_move_are_groups():
    task = make_task("induction", vocabulary=48, n=6, length=12)
    groups = task.position_groups()
    assert groups["end"] == [11]
    assert all(len(set(g)) == len(g) for g in groups.values())
    moving = torch.zeros_like(task.data.mask)
    moving[torch.arange(6), torch.arange(6)] = True
    only = dataclasses.replace(task.data, labels={k: task.data.labels[k] for k in ("correct", "wrong")} | {"x": moving})
    with pytest.raises(InputError, match="no named position"):
        Task("moving", only, Scope(positions="x")).position_groups()
