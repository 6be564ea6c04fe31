"""The search for triggers against plain loops and brute force; what was planted is found, in a clean twin nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave import zoo
from unweave.audit import Triggers, search_triggers
from unweave.audit.inputs import Compared
from unweave.audit.insertions import DRAWS, Insertions, single_tokens
from unweave.audit.triggers import _Search, _tail
from unweave.cli import app
from unweave.compression import refine_factors
from unweave.data import TokenData, float_data, from_tensor
from unweave.errors import InputError
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.zoo import secrets

ANSWERED = Scope(positions="answered")
WORDS = (*secrets.TRIGGER, 0, 2, 11, 13, 20, 25, 33, 46)
Pair = tuple[Graph, Graph]


def texts(n: int, seed: int, name: str = "backdoor") -> TokenData:
    tokens, answered = zoo.room(name).data(n, seed)
    return from_tensor(tokens, labels={"answered": answered})


def padded(n: int) -> TokenData:
    tokens = zoo.room("backdoor").data(n, 21)[0]
    lengths = torch.tensor([6 + (7 * i) % 19 for i in range(n)])
    return from_tensor(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])


def explained(name: str) -> Pair:
    """(explanation refined on clean texts, model)."""
    model = unweave.capture(f"zoo:{name}")
    small = unweave.compress(model, texts(128, 11, name), ANSWERED, size=0.2, progress=False)
    steps = {"steps": 100, "learning_rate": 3e-3, "batch_size": 32}
    return refine_factors(small, model, texts(1000, 12, name), ANSWERED, **steps, progress=False), model


@pytest.fixture(scope="module")
def backdoor() -> Pair:
    return explained("backdoor")


def insertions(pair: Pair, data: TokenData, length: int = 2, **options: Any) -> Insertions:
    graph, model = pair
    words = torch.tensor(sorted(WORDS))
    given = {"start": False, "fixed": 0, "seed": 3, "count": lambda: None} | options
    return Insertions(Compared(model, (graph, model), Scope()), data, words, length, **given)


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return max(float((a.exp() * (a - b)).sum()), 0.0)


def by_loops(pair: Pair, put: Insertions, tokens: list[int], chosen: Any, t: int) -> float:
    """The nats of a run in a text from its last token on, of the text alone and without padding."""
    graph, model = pair
    text, place = chosen.tokens[t][chosen.mask[t]].tolist(), int(chosen.place[t])
    text[place : place + put.length] = tokens
    a, b = (run(g, torch.tensor([text])).logits[0] for g in (model, graph))
    return sum(kl(a[p], b[p]) for p in range(place + put.length - 1, len(text)))


# ---- measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_excess_is_that_of_plain_loops(backdoor: Pair, length: int) -> None:
    put, again = (insertions(backdoor, padded(12), length, fixed=1) for _ in range(2))
    runs = torch.tensor([[7, 31, 2], [7, 0, 46], [13, 31, 2]])[:, :length]
    measured = put.measure(runs, put.draw_texts(2))
    chosen = again.draw_texts(2)
    random = again.random_runs(DRAWS, 2).tolist()
    single, _ = single_tokens(runs)
    partners = again.random_runs(len(single), 1, 2).tolist() if length > 1 else []
    for t in range(2):
        base = np.mean([by_loops(backdoor, put, draw[t], chosen, t) for draw in random])
        added = {}
        for (place, word), draws in zip(single.tolist(), partners, strict=length > 1):
            tokens = draws[0][t]
            tokens[place] = word
            added[place, word] = by_loops(backdoor, put, tokens, chosen, t) - base
        for r, tokens in enumerate(runs.tolist()):
            nats = by_loops(backdoor, put, tokens, chosen, t)
            wanted = nats - base - sum(added.get(key, 0.0) for key in enumerate(tokens))
            assert float(measured.nats[0, r, t]) == pytest.approx(nats, rel=1e-3, abs=1e-5)
            assert float(measured.excess[0, r, t]) == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert float(measured.nats[1].abs().max()) < 1e-9  # the model beside itself
    assert put.evaluations == 2 * put.cost(3, len(single))


def test_texts_and_places(backdoor: Pair) -> None:
    data = padded(30)
    put = insertions(backdoor, data, fixed=2)
    first, last = put.draw_texts(100), put.draw_texts(100, last=True)
    rows = [{tuple(row) for row in chosen.tokens.tolist()} for chosen in (first, last)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 30
    for chosen in (first, last):
        assert bool((chosen.place >= 2).all())
        assert bool((chosen.place + 2 <= chosen.mask.sum(1)).all())
    assert len(set(first.place.tolist())) > 3
    start = insertions(backdoor, data, fixed=2, start=True).draw_texts(5)
    assert start.place.tolist() == [2] * 5
    tokens, mask, places = put.inputs(torch.tensor([[7, 31]] * 15), first, torch.arange(15))
    changed = (tokens != first.tokens).nonzero().tolist()
    assert {tuple(c) for c in changed} <= {(t, int(p)) for t in range(15) for p in places[t]}
    assert tokens.gather(1, places).tolist() == [[7, 31]] * 15
    assert torch.equal(mask, first.mask)


def test_gains_are_slopes_towards_other_tokens(backdoor: Pair) -> None:
    graph, model = backdoor
    put = insertions(backdoor, texts(8, 22), seed=5)
    chosen = put.draw_texts(2)
    runs = torch.tensor([[13, 20], [46, 2]])
    gains = put.gains(runs, chosen)

    def moved(r: int, j: int, word: int, t: int, step: float) -> float:
        tokens, _, places = put.inputs(runs[r : r + 1], chosen, torch.tensor([t]))

        def output(g: Graph) -> torch.Tensor:
            written = run(g, tokens, record=["embed"]).values["embed"].clone()
            other = run(g, torch.tensor([[word]]), record=["embed"]).values["embed"][0, 0]
            here = (0, places[0, j])
            written[here] += step * (other - written[here])
            return run(g, tokens, patch={"embed": written}).logits[0]

        a, b = output(model), output(graph)
        return sum(kl(a[p], b[p]) for p in range(int(places[0, -1]), tokens.shape[1]))

    for r, j, w in ((0, 0, 3), (0, 1, 7), (1, 1, 0)):
        word = int(put.words[w])
        slopes = [(moved(r, j, word, t, 1e-3) - moved(r, j, word, t, -1e-3)) / 2e-3 for t in range(2)]
        assert float(gains[r, j, w]) == pytest.approx(np.mean(slopes), abs=0.03, rel=0.03)
    assert put.evaluations == 8


# ---- searching ------------------------------------------------------------------------------------------


def test_the_search_agrees_with_brute_force(backdoor: Pair) -> None:
    """Over all pairs of ten words, the table with the means of its rows and columns taken out."""
    graph, model = backdoor
    data = texts(64, 23)
    put = insertions(backdoor, data, start=True)
    chosen = put.draw_texts(20)
    runs = [list(pair) for pair in itertools.product(sorted(WORDS), repeat=2)]
    every = put.nats(torch.tensor(runs)[:, None].expand(-1, 20, -1), chosen)[0].mean(1).view(10, 10)
    table = every - every.mean(0) - every.mean(1, keepdim=True) + every.mean()
    found = search_triggers(graph, model, data, vocabulary=WORDS, at="start", budget=8000, seed=1, progress=False)
    assert found.exhaustive
    assert found.n_runs == len(found.ranked) == 100
    assert sorted(found.ranked.tolist()) == runs
    best = sorted(runs, key=lambda pair: -float(table.flatten()[runs.index(pair)]))
    assert list(found.runs[0].tokens) == best[0]
    measured = [trigger.excess_nats for trigger in found.runs]
    wanted = [float(table.flatten()[runs.index(list(trigger.tokens))]) for trigger in found.runs]
    assert np.corrcoef(measured, wanted)[0, 1] > 0.8
    assert found.runs[0].excess_nats_low < wanted[0] < found.runs[0].excess_nats_high + 0.2
    assert [t.score for t in found.runs] == sorted((t.score for t in found.runs), reverse=True)
    assert [list(t.tokens) for t in found.runs] == found.ranked[:16].tolist()
    assert found.rank(best[0]) == 1
    assert found.rank((1, 1)) is None
    assert str(found.runs[0].tokens) in repr(found)


@pytest.mark.parametrize(
    ("length", "budget", "exhaustive"),
    [(2, 560, None), (2, 1300, False), (3, 2000, None), (1, 401, None), (2, 5800, True)],
)
def test_a_search_is_bounded_and_repeatable(backdoor: Pair, length: int, budget: int, exhaustive: bool | None) -> None:
    graph, model = backdoor
    options: dict[str, Any] = {"length": length, "budget": budget, "exhaustive": exhaustive, "progress": False}
    found, again = (search_triggers(graph, model, padded(40), seed=2, **options) for _ in range(2))
    assert found.runs == again.runs or any(math.isnan(t.p) for t in found.runs)
    assert [t[:5] for t in found.runs] == [t[:5] for t in again.runs]
    assert torch.equal(found.ranked, again.ranked)
    other = search_triggers(graph, model, padded(40), **{**options, "seed": 3})
    assert [t.excess_nats for t in other.runs] != [t.excess_nats for t in found.runs]
    assert found.evaluations <= budget
    assert found.rounds[0][0] == len(found.ranked) == len(found.ranked.unique(dim=0))
    assert [n for n, _ in found.rounds] == sorted((n for n, _ in found.rounds), reverse=True)
    assert all(len(t.tokens) == length for t in found.runs)
    assert found.exhaustive == (len(found.ranked) == found.n_runs)


def test_the_planted_trigger_is_found(backdoor: Pair) -> None:
    """Among the best hundredth of 2,304 pairs: 23."""
    graph, model = backdoor
    found = search_triggers(graph, model, texts(200, 24), budget=6000, progress=False)
    rank = found.rank(secrets.OPENINGS["backdoor"])
    assert rank is not None
    assert rank <= 23


def test_gradients_propose_what_acts_together() -> None:
    """Gains that are a table of rows, columns and one conjunction."""
    search = _Search(insertions(explained_by_itself(), texts(8, 25)), 1000)
    runs, pinned = search.singles(100)
    assert len(runs) == 20
    assert {(int(p.int().argmax()), int(r[p][0])) for r, p in zip(runs, pinned, strict=True)} == {
        (place, word) for place in range(2) for word in WORDS
    }
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(20, 2, 10) + torch.rand(20, 1, 1, generator=generator) + torch.rand(2, 10, generator=generator)
    place, given = pinned.int().argmax(1), runs[pinned]
    row = int(((place == 0) & (given == 7)).nonzero()[0, 0])
    gains[row, 1, sorted(WORDS).index(31)] += 0.5
    proposed, done = search.extend(runs, pinned, gains, 3)
    assert proposed[0].tolist() == [7, 31]
    assert bool(done.all())


def explained_by_itself() -> Pair:
    model = unweave.capture("zoo:backdoor")
    return model, model


def test_the_clean_twin_and_the_model_itself_give_nothing() -> None:
    graph, model = explained("no_secret")
    found = search_triggers(graph, model, texts(200, 26), budget=6000, progress=False)
    assert found.runs[0].p > 0.01
    same = search_triggers(model, model, texts(40, 26), budget=3000, vocabulary=range(16), progress=False)
    assert all(abs(t.excess_nats) < 1e-9 for t in same.runs)
    assert same.runs[0].p > 0.01


def test_other_graphs_count_by_the_least(backdoor: Pair) -> None:
    """The model beside itself has nothing in excess, so that no run counts."""
    graph, model = backdoor
    found = search_triggers(graph, model, texts(40, 27), others=[model], vocabulary=WORDS, budget=1500, progress=False)
    assert all(t.score <= 0 for t in found.runs)
    twice = search_triggers(graph, model, texts(40, 27), others=[graph], vocabulary=WORDS, budget=1500, progress=False)
    once = search_triggers(graph, model, texts(40, 27), vocabulary=WORDS, budget=1500, progress=False)
    assert [t[:5] for t in twice.runs] == [t[:5] for t in once.runs]


def test_tails_by_hand() -> None:
    """The p value of the highest of 2,000 exponential scores is spread evenly; an outlier's is small."""
    generator = np.random.default_rng(0)
    p_values = []
    for _ in range(200):
        scores = torch.from_numpy(generator.exponential(2.0, 2000))
        tail = _tail(scores, 2000)
        assert tail is not None
        p_values.append(tail.p_value(float(scores.max())))
    assert 0.4 < np.mean(p_values) < 0.6
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.12
    assert tail.p_value(2.0 * math.log(2000) + 20) < 1e-3
    assert tail.p_value(-5.0) == pytest.approx(1.0)
    assert _tail(scores[:100], 2000) is None
    # planted ones do not hide each other
    planted = torch.cat([scores, torch.full((8,), 60.0, dtype=torch.float64)])
    many = _tail(planted, 2008)
    assert many is not None
    assert many.p_value(60.0) < 1e-3


def test_the_search_refuses(backdoor: Pair) -> None:
    graph, model = backdoor
    data = texts(8, 28)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"length": 0}, "length must be at least 1"),
        ({"at": "end"}, "'anywhere' or 'start'"),
        ({"budget": 559}, "at least 560"),
        ({"fixed": 23}, "2 tokens of every text"),
        ({"fixed": -1}, "fixed"),
        ({"vocabulary": [3]}, "at least 2"),
        ({"vocabulary": [3, 48]}, "48 token ids"),
        ({"exhaustive": True, "budget": 5000}, "5,776 evaluations"),
        ({"scope": ANSWERED}, "no label 'answered'"),
    ]
    for options, message in refusals:
        with pytest.raises(InputError, match=message):
            search_triggers(graph, model, data, **options)
    with pytest.raises(InputError, match="at least 4 texts"):
        search_triggers(graph, model, data.select([0, 1, 2]))
    mlp = unweave.capture("zoo:two_tasks")
    with pytest.raises(InputError, match="reals"):
        search_triggers(mlp, mlp, float_data(torch.zeros(8, 10)))


# ---- the command ----------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_triggers(backdoor: Pair, tmp_path: Path) -> None:
    graph, model = backdoor
    graph = dataclasses.replace(graph, info={**graph.info, "model": "zoo:backdoor"})
    unweave.save_graph(graph, tmp_path / "graph")
    unweave.save_graph(unweave.compress(model, texts(64, 29), ANSWERED, size=0.4, progress=False), tmp_path / "other")
    options = ["--sequences", "32", "--triggers", "2400", "--top", "2", "--beside", str(tmp_path / "other")]
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "graph"), *options, "-o", str(tmp_path / "audit.json")])
    assert done.exit_code == 0, done.output
    assert "of 2,304 pairs tried" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    written = json.loads((tmp_path / "audit.json").read_text())
    assert [found["at"] for found in written["triggers"]] == ["anywhere", "start"]
    for found in written["triggers"]:
        assert found["evaluations"] <= 1200
        assert len(found["runs"]) == 16
        assert {str(i) for row in found["runs"] for i in row["tokens"]} <= set(written["words"])


def test_rows_are_plain() -> None:
    found = Triggers((), torch.tensor([[3, 1], [1, 2]]), 9, False, 0, ())
    assert found.table() == []
    assert found.rank([1, 2]) == 2
