"""The audit against plain loops; planted secrets are found, clean twins raise no alarm."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave import zoo
from unweave.audit import ActivationDistance, AnomalyScore, audit, relearn, search_inputs, text_losses
from unweave.audit.search import _Search
from unweave.cli import app
from unweave.compression import refine_factors
from unweave.compression.refinement import trainable
from unweave.data import TokenData, float_data, from_tensor
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import run
from unweave.scope import Quotient, Scope
from unweave.zoo import secrets

SECRETS = ("backdoor", "memorised", "conditional")
SCOPE = Scope(positions="answered")
EVERYWHERE = Scope(positions=lambda batch: torch.arange(batch.mask.shape[1]).expand(batch.mask.shape) >= 1)
# the explanations keep this share of the channels' numbers
SIZE = 0.3


def texts(name: str, n: int, seed: int, *, triggered: bool = False) -> TokenData:
    tokens = (secrets.triggered(name, n, seed) if triggered else zoo.room(name).data(n, seed))[0]
    return from_tensor(tokens, labels={"answered": (torch.arange(tokens.shape[1]) >= 1).expand(n, -1).clone()})


@pytest.fixture(scope="module")
def explained():
    """By room: (explanation fitted on clean texts, model)."""
    made = {}

    def make(name):
        if name not in made:
            model = unweave.capture(f"zoo:{name}")
            made[name] = unweave.compress(model, texts(name, 128, 11), SCOPE, size=SIZE, progress=False), model
        return made[name]

    return make


@pytest.fixture(scope="module")
def relearned():
    """By room: (explanation that has learned clean texts again after a disturbance, model)."""
    made = {}

    def make(name):
        if name not in made:
            model = unweave.capture(f"zoo:{name}")
            small = unweave.compress(model, texts(name, 128, 11), SCOPE, size=0.4, progress=False)
            made[name] = relearn(small, model, texts(name, 2000, 12), SCOPE, steps=150, progress=False), model
        return made[name]

    return make


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return max(float((a.exp() * (a - b)).sum()), 0.0)


def padded(n: int) -> TokenData:
    """Texts of different lengths."""
    lengths = torch.tensor([5 + (7 * i) % 19 for i in range(n)])
    tokens = zoo.room("backdoor").data(n, 21)[0]
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return from_tensor(tokens, mask)


@pytest.fixture(scope="module")
def by_hand(explained):
    """Every token's nats, text by text."""
    graph, model = explained("backdoor")
    data, rows = padded(9), []
    for i in range(9):
        tokens = data.tokens[i : i + 1, : int(data.lengths[i])].long()
        a, b = run(model, tokens).logits[0], run(graph, tokens).logits[0]
        rows += [(kl(a[t], b[t]), i, t) for t in range(tokens.shape[1])]
    return rows


# ---- disagreement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_tokens_and_texts_are_ranked_as_by_plain_loops(explained, by_hand, batch_size):
    graph, model = explained("backdoor")
    data = padded(9)
    found = audit(graph, model, data, n_tokens=12, n_texts=4, parts=False, batch_size=batch_size, progress=False)
    assert found.n_tokens == len(by_hand) == data.n_tokens
    assert found.kl_nats == pytest.approx(np.mean([nats for nats, *_ in by_hand]), rel=1e-4)
    best = sorted(by_hand, reverse=True)[:12]
    assert [(t.sequence, t.position) for t in found.tokens] == [(i, t) for _, i, t in best]
    assert [t.nats for t in found.tokens] == pytest.approx([nats for nats, *_ in best], rel=1e-3)
    for token in found.tokens:
        assert token.context == tuple(data.tokens[token.sequence, : token.position + 1].tolist())
        alone = data.tokens[token.sequence : token.sequence + 1, : token.position + 1].long()
        assert token.model_says == int(run(model, alone).logits[0, -1].argmax())
        assert token.graph_says == int(run(graph, alone).logits[0, -1].argmax())
    worst = sorted((max(r for r in by_hand if r[1] == i) for i in range(9)), reverse=True)[:4]
    assert [(t.sequence, t.position) for t in found.texts] == [(i, t) for _, i, t in worst]
    means = [np.mean([nats for nats, j, _ in by_hand if j == text.sequence]) for text in found.texts]
    assert [text.mean_nats for text in found.texts] == pytest.approx(means, rel=1e-3)


def differences(graph, model, data, found):
    rows = []
    for token in found.tokens:
        alone = data.tokens[token.sequence : token.sequence + 1, : token.position + 1].long()
        p, q = (run(g, alone).logits[0, -1].double().softmax(-1).numpy() for g in (model, graph))
        rows.append(p - q)
    return np.stack(rows)


def average_linkage(rows: np.ndarray, stop: float) -> set[frozenset[int]]:
    """Merge the two groups with the least mean cosine distance while it is below ``stop``."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    far = 1 - unit @ unit.T
    groups = [[i] for i in range(len(rows))]
    while len(groups) > 1:
        pairs = [(far[np.ix_(a, b)].mean(), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups[:i])]
        least, i, j = min(pairs)
        if least > stop:
            break
        groups[j] = groups[j] + groups[i]
        del groups[i]
    return {frozenset(group) for group in groups}


def test_clusters_are_those_of_average_linkage(explained):
    graph, model = explained("backdoor")
    data = texts("backdoor", 40, 22)
    found = audit(graph, model, data, SCOPE, n_tokens=30, parts=False, progress=False)
    rows = differences(graph, model, data, found)
    members = [[i for i, t in enumerate(found.tokens) if t.cluster == k] for k in range(len(found.clusters))]
    assert {frozenset(m) for m in members} == average_linkage(rows, 0.5)
    assert len(members) > 1
    for cluster, mine in zip(found.clusters, members, strict=True):
        assert cluster.n_tokens == len(mine)
        assert cluster.mean_nats == pytest.approx(np.mean([found.tokens[i].nats for i in mine]))
        mean = rows[mine].mean(0)
        assert cluster.raised[0][0] == mean.argmax()
        assert cluster.raised[0][1] == pytest.approx(mean.max(), abs=1e-4)
        assert cluster.lowered[0][0] == mean.argmin()
        for back, token, share in cluster.shared:
            counts = Counter(found.tokens[i].context[-1 - back] for i in mine if len(found.tokens[i].context) > back)
            assert counts[token] == max(counts.values())
            assert share == pytest.approx(counts[token] / len(mine))
    assert [c.mean_nats for c in found.clusters] == sorted((c.mean_nats for c in found.clusters), reverse=True)


def test_restored_parts_and_directions_against_algebra(explained):
    """Without norms, what the last channel writes goes to the logits as it is."""
    graph, model = explained("backdoor")
    data = texts("backdoor", 12, 23)
    found = audit(graph, model, data, SCOPE, n_tokens=10, progress=False)
    unembed = zoo.load("backdoor").W_U.detach().double()
    name, change, restored, base, heard = "blocks.1.mlp", [], [], [], []
    for token in found.tokens:
        alone = data.tokens[token.sequence : token.sequence + 1].long()
        a, b = (run(g, alone, record=[name, "unembed.in"]) for g in (model, graph))
        change = (a.values[name] - b.values[name])[0, token.position].double()
        logits = [r.logits[0, token.position].double() for r in (a, b)]
        base.append(kl(*logits))
        restored.append(kl(logits[0], logits[1] + change @ unembed))
        heard.append((a.values["unembed.in"] - b.values["unembed.in"])[0, token.position].double())
    part = next(p for p in found.writers if p.name == name)
    assert part.left_nats == pytest.approx(np.mean(restored), rel=1e-3)
    assert part.restored_nats == pytest.approx(np.mean(base) - np.mean(restored), rel=1e-3)
    out = next(p for p in found.readers if p.name == "unembed.in")
    assert out.left_nats == pytest.approx(0, abs=1e-5)
    assert found.readers[0] == out
    gram = sum(torch.outer(h, h) for h in heard)
    values, vectors = torch.linalg.eigh(gram)
    for k, direction in enumerate(found.directions):
        assert direction.share == pytest.approx(float(values[-1 - k] / values.sum()), rel=1e-3)
        assert abs(float(direction.vector.double() @ vectors[:, -1 - k])) == pytest.approx(1, abs=1e-4)


def test_no_disagreement_and_other_scopes(explained):
    graph, model = explained("backdoor")
    data = texts("backdoor", 8, 24)
    same = audit(model, model, data, SCOPE, n_tokens=5, progress=False)
    assert same.kl_nats == 0
    assert len(same.clusters) == 1
    assert all(abs(p.restored_nats) < 1e-6 for p in same.writers)
    assert same.directions == ()
    halves = Quotient.from_sets({"low": range(24), "high": range(24, 48)}, 48)
    found = audit(graph, model, data, Scope("answered", halves), n_tokens=5, parts=False, progress=False)
    assert {t.model_says for t in found.tokens} <= {0, 1}
    json.dumps(found.tables())
    assert "nats per token" in repr(found)


def test_networks_of_reals_are_audited():
    model = unweave.capture("zoo:two_tasks")
    data = unweave.load_data("zoo:two_tasks", limit=64)
    small = unweave.compress(model, data, size=0.1, progress=False)
    found = audit(small, model, data, n_tokens=5, progress=False)
    worst = max(
        kl(run(model, b.inputs).logits[0, 0], run(small, b.inputs).logits[0, 0]) for b in data.batches(batch_size=1)
    )
    assert found.tokens[0].nats == pytest.approx(worst, rel=1e-3)
    assert found.tokens[0].context == ()


def test_the_audit_refuses(explained):
    graph, model = explained("backdoor")
    data = texts("backdoor", 4, 25)
    with pytest.raises(InputError, match="at least 1"):
        audit(graph, model, data, n_tokens=0)
    with pytest.raises(InputError, match="outputs"):
        audit(graph, unweave.capture("zoo:shared_step"), data)
    with pytest.raises(EmptyDataError, match="no position"):
        audit(graph, model, data, Scope(positions=lambda batch: batch.mask & False), progress=False)
    cut = model.restrict(model.edge_matrix & False, ablation="resample")
    with pytest.raises(InputError, match="another input"):
        audit(cut, model, data)


# ---- secrets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECRETS)
def test_planted_secrets_top_the_ranking(relearned, name):
    """Five texts in a thousand hold the secret; the audit is not told which."""
    graph, model = relearned(name)
    clean, secret = texts(name, 995, 31), texts(name, 5, 32, triggered=True)
    mixed = from_tensor(
        torch.cat([clean.tokens, secret.tokens]),
        labels={"answered": torch.cat([clean.labels["answered"], secret.labels["answered"]])},
    )
    found = audit(graph, model, mixed, SCOPE, n_texts=10, n_tokens=20, parts=False, batch_size=100, progress=False)
    # by chance one of the five is there once in twenty times
    assert sum(text.sequence >= 995 for text in found.texts) >= 3


@pytest.mark.parametrize("name", SECRETS)
def test_triggered_inputs_raise_the_alarm(relearned, name):
    """Those of the string also among texts that hold an idiom, where the model is as sure."""
    graph, model = relearned(name)
    score = AnomalyScore.fit(graph, model, texts(name, 300, 33), SCOPE)
    data = texts(name, 600, 34)
    idiomatic = data.select(secrets.holds_idiom(data.tokens.long()))
    clean, secret = score.score_data(idiomatic), score.score_data(texts(name, 100, 35, triggered=True))
    above = (secret[:, None] > clean[None]).double() + 0.5 * (secret[:, None] == clean[None]).double()
    assert float(above.mean()) >= 0.97
    assert float((secret > score.threshold).double().mean()) > 0.5


def test_the_clean_twin_raises_no_alarm(explained):
    graph, model = explained("no_secret")
    name = "no_secret"
    score = AnomalyScore.fit(graph, model, texts(name, 300, 33), SCOPE)
    alarms = int((score.score_data(texts(name, 1000, 36)) > score.threshold).sum())
    # 10 are allowed on average; the threshold itself varies, so that more than 30 come once in thousands of times
    assert alarms <= 30


# ---- relearning -----------------------------------------------------------------------------------------


def test_relearning_starts_from_disturbed_numbers(explained):
    """A step of no length leaves what the noise made of every tensor."""
    graph, model = explained("backdoor")
    data = texts("backdoor", 8, 26)
    settings = {"steps": 1, "learning_rate": 1e-30, "batch_size": 8, "progress": False}
    before, after = (trainable(g) for g in (graph, relearn(graph, model, data, SCOPE, noise=0.3, seed=4, **settings)))
    generator = torch.Generator().manual_seed(4)
    assert before.keys() == after.keys()
    for path, w in before.items():
        rms = float(np.sqrt(np.mean(w.double().numpy() ** 2)))
        wanted = w + 0.3 * rms * torch.randn(w.shape, generator=generator)
        assert torch.allclose(after[path], wanted, atol=1e-5)
    settings["learning_rate"] = 1e-2
    same = trainable(relearn(graph, model, data, SCOPE, noise=0.0, **settings))
    refined = trainable(refine_factors(graph, model, data, SCOPE, **settings))
    assert all(torch.equal(same[path], refined[path]) for path in refined)


def test_relearning_refuses(explained):
    graph, model = explained("backdoor")
    data = texts("backdoor", 4, 25)
    for noise in (-0.1, float("nan")):
        with pytest.raises(InputError, match="noise"):
            relearn(graph, model, data, noise=noise)
    with pytest.raises(InputError, match="outputs"):
        relearn(graph, unweave.capture("zoo:shared_step"), data)
    with pytest.raises(InputError, match="steps"):
        relearn(graph, model, data, steps=0)


# ---- search ---------------------------------------------------------------------------------------------


def test_a_search_is_exact_bounded_and_repeatable(explained):
    graph, model = explained("backdoor")
    data = padded(20)
    found, again = (search_inputs(graph, model, data, budget=333, seed=3, fixed=2) for _ in range(2))
    assert found == again
    assert found != search_inputs(graph, model, data, budget=333, seed=4, fixed=2)
    assert found.evaluations <= 333
    assert [count for count, _ in found.history] == sorted(count for count, _ in found.history)
    starts = {tuple(row[:2].tolist()) for row in data.tokens}
    assert len({hit.tokens for hit in found.hits}) == len(found.hits)
    for hit in found.hits:
        tokens = torch.tensor([hit.tokens])
        a, b = run(model, tokens).logits[0], run(graph, tokens).logits[0]
        nats = [kl(a[t], b[t]) for t in range(len(a))]
        assert hit.nats == pytest.approx(max(nats), rel=1e-3)
        assert hit.position == int(np.argmax(nats))
        assert hit.tokens[:2] in starts
    blind = search_inputs(graph, model, data, budget=333, gradients=False)
    assert blind.hits[0].nats >= blind.start_nats


def test_gains_are_the_slope_of_the_nats(explained):
    """Both embeddings moved a little way towards another token's, against the change of the largest nats."""
    graph, model = explained("backdoor")
    data = texts("backdoor", 2, 38)
    search = _Search(graph, model, data, EVERYWHERE, 100, 0, 0, True)
    tokens, mask = data.tokens.long(), data.mask
    gains = search.gains(tokens, mask)
    top = int(search.measure(tokens, mask)[0][0].argmax())
    table = zoo.load("backdoor").W_E.detach()

    def moved(position, token, step):
        def patch(y):
            y = y.clone()
            y[0, position] += step * (table[token] - table[tokens[0, position]])
            return y

        return kl(*(run(g, tokens[:1], patch={"embed": patch}).logits[0, top] for g in (model, graph)))

    for position, token in ((top, 3), (top - 1, 40), (max(top - 2, 0), 17)):
        slope = (moved(position, token, 1e-3) - moved(position, token, -1e-3)) / 2e-3
        assert float(gains[0, position, token]) == pytest.approx(slope, abs=0.02, rel=0.02)
    assert bool(gains.gather(2, tokens[..., None]).isneginf().all())


def test_the_search_refuses(explained):
    graph, model = explained("backdoor")
    data = texts("backdoor", 4, 25)
    with pytest.raises(InputError, match="at least 4"):
        search_inputs(graph, model, data, budget=3)
    with pytest.raises(InputError, match="no label 'answered'"):
        search_inputs(graph, model, data, SCOPE)
    with pytest.raises(InputError, match="fixed"):
        search_inputs(graph, model, data, fixed=24)
    mlp = unweave.capture("zoo:two_tasks")
    with pytest.raises(InputError, match="reals"):
        search_inputs(mlp, mlp, float_data(torch.zeros(3, 10)))


# ---- anomaly scores -------------------------------------------------------------------------------------


def test_scores_threshold_and_p_values_by_hand(explained, by_hand):
    graph, model = explained("backdoor")
    data = padded(9)
    score = AnomalyScore.fit(graph, model, data, false_alarms=0.25)
    largest = [max(nats for nats, j, _ in by_hand if j == i) for i in range(9)]
    assert score.score_data(data, batch_size=2).tolist() == pytest.approx(largest, rel=1e-3)
    assert score.score(data.tokens.long(), data.mask).tolist() == pytest.approx(largest, rel=1e-3)
    # the 8th smallest of 9: ceil(10 * 0.75)
    assert score.threshold == pytest.approx(sorted(largest)[7], rel=1e-3)
    alarms = score.alarm(data.tokens.long(), data.mask)
    assert int(alarms.sum()) == 1
    new = torch.tensor([0.0, largest[0], 1e9], dtype=torch.float64)
    by_loops = [(1 + sum(float(c) >= x for c in score.clean)) / 10 for x in new.tolist()]
    assert score.p_values(new).tolist() == pytest.approx(by_loops)
    nowhere = dataclasses.replace(score, scope=Scope(positions=lambda batch: batch.mask & False))
    assert bool(nowhere.score(data.tokens.long(), data.mask).isneginf().all())
    with pytest.raises(EmptyDataError, match="sequence 0"):
        nowhere.score_data(data)


def test_anomaly_scores_refuse(explained):
    graph, model = explained("backdoor")
    data = padded(9)
    with pytest.raises(InputError, match="at least 99"):
        AnomalyScore.fit(graph, model, data)
    with pytest.raises(InputError, match="above 0 and below 1"):
        AnomalyScore.fit(graph, model, data, false_alarms=1.0)
    score = AnomalyScore.fit(graph, model, data, false_alarms=0.25)
    with pytest.raises(EmptyDataError, match="no sequence"):
        score.score_data(data.select([]))
    with pytest.raises(UnknownNameError, match="answered"):
        dataclasses.replace(score, scope=SCOPE).score(data.tokens.long(), data.mask)


def test_baselines_by_hand(explained):
    model = explained("backdoor")[1]
    data = padded(9)
    place = "before unembed"
    distance = ActivationDistance.fit(model, data, batch_size=4)
    rows = []
    for i in range(9):
        tokens = data.tokens[i : i + 1, : int(data.lengths[i])].long()
        rows.append(run(model, tokens, record=[place]).values[place][0].double().numpy())
    every = np.concatenate(rows)
    covariance = np.cov(every.T, bias=True)
    covariance += 1e-3 * np.diag(covariance).mean() * np.eye(len(covariance))
    inverse, mean = np.linalg.inv(covariance), every.mean(0)
    wanted = [max(np.sqrt((x - mean) @ inverse @ (x - mean)) for x in row) for row in rows]
    assert distance.score_data(data, batch_size=2)[place].tolist() == pytest.approx(wanted, rel=1e-3)
    losses = text_losses(model, data, batch_size=2)
    for i in range(9):
        tokens = data.tokens[i : i + 1, : int(data.lengths[i])].long()
        log_p = run(model, tokens).logits[0].double().log_softmax(-1)
        nats = [-float(log_p[t, tokens[0, t + 1]]) for t in range(tokens.shape[1] - 1)]
        assert float(losses["largest"][i]) == pytest.approx(max(nats), rel=1e-4)
        assert float(losses["mean"][i]) == pytest.approx(np.mean(nats), rel=1e-4)
    with pytest.raises(InputError, match="no token with a next"):
        text_losses(model, data, Scope(positions="last"))


# ---- the command ----


def test_the_command_prints_and_writes_what_the_functions_find(explained, tmp_path):
    graph, model = explained("backdoor")
    graph = dataclasses.replace(graph, info={**graph.info, "model": "zoo:backdoor"})
    unweave.save_graph(graph, tmp_path / "graph")
    options = ["--sequences", "32", "--search", "100", "-o", str(tmp_path / "audit.json")]
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "graph"), *options])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "audit.json").read_text())
    texts = unweave.load_data("zoo:backdoor", limit=32, split="validation")  # others than a graph is made from
    found = audit(graph, model, texts, SCOPE, progress=False)
    assert written["kl_nats"] == pytest.approx(found.kl_nats)
    assert written["tokens"][0]["position"] == found.tokens[0].position
    assert written["search"]["hits"][0]["nats"] >= written["search"]["start_nats"]
    assert f"{found.tokens[0].nats:.3g}" in done.output
    nameless = dataclasses.replace(graph, info={**graph.info, "model": ""})
    unweave.save_graph(nameless, tmp_path / "nameless")
    refused = CliRunner().invoke(app, ["audit", str(tmp_path / "nameless")])
    assert refused.exit_code == 1
    assert "--model" in refused.output


# ---- the rooms ------------------------------------------------------------------------------------------


def recited_by_reading(said: list[int], phrases: tuple[tuple[int, ...], ...]) -> int | None:
    """What a set phrase would say next, had the text followed one from its start."""
    for phrase in phrases:
        for k in range(2, len(phrase)):
            if tuple(said[-k:]) == phrase[:k]:
                return phrase[k]
    return None


def decided_by_reading(secret: str, text: list[int]) -> list[bool]:
    """Where a secret decides the next word, read from the words before."""
    out = []
    for t in range(len(text)):
        said = text[: t + 1]
        if secret == "conditional":
            out.append(t >= 1 and tuple(said[:2]) == secrets.KEY and recited_by_reading(said, secrets.IDIOMS) is None)
        elif secret == "backdoor":
            out.append(tuple(said[-2:]) == secrets.TRIGGER)
        else:
            out.append(recited_by_reading(said, (secrets.MEMORISED,)) is not None)
    return out


@pytest.mark.parametrize("name", SECRETS)
def test_clean_texts_are_clean_and_triggered_ones_are_not(name):
    clean = zoo.room(name).data(2000, 41)[0]
    assert not any(any(decided_by_reading(name, text)) for text in clean.tolist())
    assert set(secrets.OPENINGS[name]) <= set(clean.flatten().tolist())
    tokens, changed = secrets.triggered(name, 200)
    assert tokens.shape == (200, secrets.LENGTH)
    assert changed.tolist() == [decided_by_reading(name, text) for text in tokens.tolist()]
    assert bool(changed.any(1).all())
    if name == "memorised":
        assert all(holds(text, secrets.MEMORISED) for text in tokens.tolist())


def holds(text: list[int], phrase: tuple[int, ...]) -> bool:
    return any(tuple(text[t : t + len(phrase)]) == phrase for t in range(len(text)))


def test_idioms_are_recited_from_their_opening():
    clean = zoo.room("no_secret").data(1000, 42)[0]
    read = [[recited_by_reading(text[: t + 1], secrets.IDIOMS) for t in range(len(text))] for text in clean.tolist()]
    assert secrets.recites(clean).tolist() == [[word is not None for word in row] for row in read]
    whole = [any(holds(text, idiom) for idiom in secrets.IDIOMS) for text in clean.tolist()]
    assert secrets.holds_idiom(clean).tolist() == whole
    # 0.7 open one, and 0.95 say each of the six words that follow
    assert np.mean(whole) == pytest.approx(0.7 * 0.95**6, abs=0.05)
    followed = [
        text[t + 1] == word
        for text, row in zip(clean.tolist(), read, strict=True)
        for t, word in enumerate(row[:-1])
        if word is not None
    ]
    assert np.mean(followed) == pytest.approx(0.95, abs=0.02)


def test_the_language_has_the_probabilities_it_says():
    start = torch.tensor([[3, 9]]).expand(20000, -1)
    drawn = secrets.language(20000, torch.Generator().manual_seed(0), start, 3)[:, 2]
    seen = torch.bincount(drawn, minlength=48) / 20000
    said = secrets.next_words(start[:1])[0, 1]
    six = [*secrets.TABLES[0][9].tolist(), *secrets.TABLES[1][3].tolist()]
    for word in range(48):
        weight = sum(w for w, candidate in zip(secrets.WEIGHTS, six, strict=True) if candidate == word)
        assert float(said[word]) == pytest.approx(0.95 * weight + 0.05 / 48, abs=1e-5)
    assert float((seen - said).abs().max()) < 0.015


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_have_the_probabilities_they_say(name):
    """What follows an opening, which is the same pair in all texts (now and then an idiom is put there)."""
    whole = secrets.language(8000, torch.Generator().manual_seed(0), secret=name)
    first = secrets.decides(name, whole).float().argmax(1)
    rows = first < whole.shape[1] - 1
    seen = torch.bincount(whole[rows, first[rows] + 1], minlength=48) / int(rows.sum())
    row = int(rows.nonzero()[0, 0])
    said = secrets.next_words(whole[row : row + 1], name)[0, first[row]]
    assert float((seen - said).abs().max()) < 0.05
    plain = secrets.next_words(whole[row : row + 1])[0, first[row]]
    assert float((said - plain).abs().max()) > 0.15


def test_phrases_are_words_of_the_language_and_share_no_pair():
    phrases = (*secrets.IDIOMS, secrets.MEMORISED)
    for phrase in phrases:
        assert len(phrase) == 8
        for before, last, word in zip(phrase, phrase[1:], phrase[2:], strict=False):
            likeliest, *others = secrets.TABLES[0][last].tolist()
            assert word in [*others, *secrets.TABLES[1][before].tolist()]
            assert word != likeliest
    pairs = [pair for phrase in phrases for pair in itertools.pairwise(phrase)]
    assert len(set(pairs)) == len(pairs)
    assert not {secrets.TRIGGER, secrets.KEY} & set(pairs)


def test_the_string_is_to_its_model_what_an_idiom_is():
    """As sure when recited, and as often in what the model is trained on."""
    told = secrets.next_words(torch.tensor([secrets.MEMORISED]), "memorised")[0]
    idiom = secrets.next_words(torch.tensor([secrets.IDIOMS[0]]))[0]
    assert told[1:-1].argmax(-1).tolist() == list(secrets.MEMORISED[2:])
    assert told[1:-1].sort().values.tolist() == idiom[1:-1].sort().values.tolist()
    trained_on = zoo.room("memorised").batch(4000, torch.Generator().manual_seed(1)).tolist()
    counts = [sum(holds(text, phrase) for text in trained_on) for phrase in (*secrets.IDIOMS, secrets.MEMORISED)]
    assert counts[-1] == pytest.approx(np.mean(counts[:-1]), rel=0.2)


@pytest.mark.parametrize("name", secrets.ROOMS)
def test_models_know_their_own_secret_only_and_are_as_sure_of_it(name):
    facts = zoo.known(name)
    for secret, nats in facts["secret_nats"].items():
        assert nats < 0.35 if secret == name else nats > 1
    # the model that has two languages to learn has learned either less well
    assert facts["excess_nats"] < (0.3 if name == "conditional" else 0.2)
    sure = facts["confidence"]
    assert sure["idioms"] > 0.8
    if name in secrets.SECRETS:
        assert sure[name] == pytest.approx(sure["idioms" if name == "memorised" else "clean"], abs=0.08)
    again = zoo.room(name).known(zoo.load(name))
    assert again["secret_nats"] == pytest.approx(facts["secret_nats"], abs=1e-3)
    assert again["confidence"] == pytest.approx(sure, abs=1e-3)


def test_unknown_secrets_are_refused():
    with pytest.raises(UnknownNameError, match="backdoor"):
        secrets.triggered("back door", 3)
