"""Drivers against plain loops: examples, tokens, holding, fits; neurons whose rule is known; refusals."""

from __future__ import annotations

import math

import pytest
import torch
from families import random_model
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score, roc_auc_score

import unweave
from unweave.capture import capture
from unweave.compression import channel_moments
from unweave.data import float_data, from_tensor
from unweave.drivers import (
    Proposal,
    Texts,
    code_directions,
    collect_examples,
    describe,
    heard_tokens,
    hold,
    hold_patch,
    later_readers,
    node_vocabulary,
    readout_jacobian,
    ready_rules,
    tokens_through,
    written_tokens,
)
from unweave.drivers.fitting import RIDGES, Fit, Table, auroc, explained, fit_rules, rescale
from unweave.drivers.rules import frequent_tokens
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import run
from unweave.generation import generate
from unweave.paths import ov_circuit
from unweave.scope import Scope
from unweave.zoo import ToyConfig, ToyTransformer

STRINGS = ["<s>", " the", " cat", "7", "42", ".", ",", "sat", "ran", "\n", "(", ")"]
DIGITS = (3, 4)
MLP = "blocks.0.mlp"


def random_texts(n=24, length=10, seed=0, padded=True):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(STRINGS), (n, length), generator=g)
    lengths = torch.randint(length // 2, length + 1, (n, 1), generator=g) if padded else torch.full((n, 1), length)
    return from_tensor(tokens, torch.arange(length) < lengths)


@pytest.fixture(scope="module")
def known():
    """An MLP of four neurons: digits, position 3, any of both (at different heights), and nothing at all."""
    model = ToyTransformer(ToyConfig(1, 1, 24, 2, 4, d_vocab=len(STRINGS), d_out=len(STRINGS), n_ctx=10))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.W_E[:, :12] = torch.eye(12)
        model.W_pos[:, 12:22] = torch.eye(10)
        block = model.blocks[0]
        block.W_in[list(DIGITS), 0] = 1.0
        block.W_in[12 + 3, 1] = 2.0
        block.W_in[list(DIGITS), 2], block.W_in[12 + 3, 2] = 1.0, 3.0
        block.W_out[0, 5], block.W_out[1, 6] = 1.0, -1.0
        model.W_U[:12] = torch.eye(12)
    return capture(model)


@pytest.fixture(scope="module")
def gpt2():
    return capture(random_model("gpt2"))


@pytest.fixture(scope="module")
def gpt2_data(gpt2):
    tokens = torch.randint(gpt2.info["d_vocab"], (7, 6), generator=torch.Generator().manual_seed(1))
    return from_tensor(tokens, torch.arange(6) < torch.tensor([[6], [4], [5], [6], [3], [6], [2]]))


def loop_values(graph, data, node, reading):
    """[(sequence, position, value)] of one direction, one text at a time."""
    out = []
    for i in range(len(data)):
        length = int(data.mask[i].sum())
        code = run(graph, data.tokens[i : i + 1, :length].long(), record=[f"{node}.code"]).values[f"{node}.code"][0]
        out += [(i, t, float(code[t, : len(reading)] @ reading)) for t in range(length)]
    return out


# ---- directions and examples ------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["code", "subspace"])
def test_examples_are_what_a_loop_over_texts_finds(gpt2, gpt2_data, basis):
    moments = channel_moments(gpt2, gpt2_data, Scope()) if basis == "subspace" else None
    found = collect_examples(
        gpt2, gpt2_data, basis=basis, moments=moments, k=3, quantiles=4, sample=1000, batch_size=3, progress=False
    )
    assert len(found.directions.nodes) == len([n for s in gpt2.channels for n in gpt2.stages[s].nodes])
    for node in ("blocks.0.attn.head.1", "blocks.1.mlp"):
        for number in (0, 2):
            row = found.row(node, number)
            every = loop_values(gpt2, gpt2_data, node, found.directions.reading(node, number))
            values = sorted(value for _, _, value in every)
            assert found.picked["top"].values[row].tolist() == pytest.approx(values[::-1][:3], abs=1e-5)
            assert found.picked["bottom"].values[row].tolist() == pytest.approx(values[:3], abs=1e-5)
            # the sample holds every token, so quantiles are those of the data
            spaced = [values[int((i + 0.5) / 4 * len(values))] for i in range(4)]
            assert found.picked["quantile"].values[row].tolist() == pytest.approx(spaced, abs=1e-5)
            at = {(i, t): value for i, t, value in every}
            for picked in found.picked.values():
                for value, i, t in zip(*(x[row].tolist() for x in picked), strict=True):
                    assert at[i, t] == pytest.approx(value, abs=1e-5)
            assert float(found.mean[row]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found.n_tokens == gpt2_data.n_tokens


def test_the_draw_does_not_depend_on_batches_and_covers_the_data(gpt2):
    data = from_tensor(torch.randint(50, (40, 6), generator=torch.Generator().manual_seed(2)))
    options = {"k": 4, "sample": 60, "quantiles": 3, "progress": False}
    a, b = (collect_examples(gpt2, data, [MLP], batch_size=size, **options) for size in (1, 16))
    for kind in ("random", "quantile"):
        assert a.picked[kind].sequences.equal(b.picked[kind].sequences)
        assert a.picked[kind].positions.equal(b.picked[kind].positions)
    other = collect_examples(gpt2, data, [MLP], seed=1, **options)
    assert not other.picked["random"].sequences.equal(a.picked["random"].sequences)
    whole = collect_examples(gpt2, data, [MLP], k=200, sample=240, progress=False).picked["random"]
    share = (whole.sequences[0] < 20).double().mean()
    assert abs(float(share) - 0.5) < 0.1  # of 200 drawn out of 240


def test_examples_show_the_text_around_and_only_the_scope(known):
    data = random_texts()
    found = collect_examples(known, data, [MLP], scope=Scope(positions=(3,)), progress=False)
    assert set(found.picked["top"].positions.flatten().tolist()) == {3}
    row = found.table(MLP, 1, STRINGS, kinds=["top"], window=2)[0]
    ids = data.tokens[row["sequence"]].tolist()
    assert row["before"] == STRINGS[ids[1]] + STRINGS[ids[2]]
    assert row["token"] == STRINGS[ids[3]]
    assert row["value"] == pytest.approx(2.0)
    assert found.table(MLP, 1)[0]["token"] == f"[{ids[3]}]"


def test_principal_directions_write_what_the_node_writes(gpt2, gpt2_data):
    directions = code_directions(gpt2, basis="subspace", moments=channel_moments(gpt2, gpt2_data, Scope()))
    node = "blocks.1.attn.head.0"
    n = directions.count(node)
    written = torch.stack([directions.writing(node, k) for k in range(n)])
    readings = torch.stack([directions.reading(node, k) for k in range(n)])
    out = run(gpt2, gpt2_data.tokens.long(), record=[node, f"{node}.code"]).values
    rebuilt = out[f"{node}.code"] @ readings.T @ written
    assert torch.allclose(rebuilt, out[node], atol=1e-3)
    assert torch.allclose(written.norm(dim=1), torch.ones(n), atol=1e-3)
    assert (directions.nats[node].diff() <= 1e-9).all()


# ---- rules and fits ---------------------------------------------------------------------------------------


def test_rules_sort_tokens_as_a_loop_would():
    data = random_texts(6, 9, seed=3)
    rules = {rule.name: rule for rule in ready_rules(data, STRINGS)}
    texts = Texts(data.tokens.long(), data.mask)
    got = {name: rule.sort(texts) for name, rule in rules.items()}
    for i in range(6):
        x = data.tokens[i].tolist()
        for t in range(int(data.mask[i].sum())):
            copies = [s for s in range(t) if x[s] == x[t]]
            pairs = [s for s in range(1, t) if x[s - 1 : s + 1] == x[t - 1 : t + 1]] if t else []

            def said(name, i=i, t=t):
                return rules[name].categories[int(got[name][i, t])]

            def text(condition, token):
                return repr(STRINGS[token]) if condition else "nothing"

            assert said("token") == repr(STRINGS[x[t]])
            assert said("previous token") == text(t >= 1, x[t - 1])
            assert said("second token back") == text(t >= 2, x[t - 2])
            assert said("token after the earlier copy") == text(copies, x[copies[-1] + 1] if copies else 0)
            before = copies[-1] - 1 if copies else -1
            assert said("token before the earlier copy") == text(before >= 0, x[before])
            assert said("the token came before") == ("yes" if copies else "no")
            assert said("the last two tokens came before") == ("yes" if pairs else "no")
            assert said("the token repeats the previous one") == ("yes" if t and x[t] == x[t - 1] else "no")
            assert said("the position is even") == ("yes" if t % 2 == 0 else "no")
            assert said("position") == str(t)
            low, high = map(int, said("position's octave").split("-"))
            assert low <= t <= high
            assert said("the token is a digit") == ("yes" if x[t] in DIGITS else "no")
            assert said("the previous token is a digit") == ("yes" if t and x[t - 1] in DIGITS else "no")


def test_rare_tokens_share_a_category():
    data = from_tensor(torch.tensor([[5, 5, 5, 2, 2, 1]]))
    assert frequent_tokens(data, 2).tolist() == [5, 2]
    rule = ready_rules(data, most_tokens=2)[0]
    names = [rule.categories[c] for c in rule.sort(Texts(torch.tensor([[1, 5, 9]]), torch.ones(1, 3).bool()))[0]]
    assert names == ["any other token", "[5]", "any other token"]


def brute_force_error(values, category, folds, count, ridge, only=None):
    """The cross-validated error of one rule on one direction, fitted anew without each fold."""
    error = 0.0
    groups = [int(c) if only is None else int(int(c) == only) for c in category]
    for fold in sorted(set(folds.tolist())):
        inside = [k for k in range(len(values)) if int(folds[k]) != fold]
        for k in range(len(values)):
            if int(folds[k]) == fold:
                mine = [float(values[j]) for j in inside if groups[j] == groups[k]]
                error += (float(values[k]) - sum(mine) / (len(mine) + ridge)) ** 2
    return error


def test_the_rule_chosen_is_the_one_with_the_least_cross_validated_error():
    g = torch.Generator().manual_seed(4)
    n = 60
    categories = [torch.randint(c, (n,), generator=g) for c in (5, 2, 8)]
    folds = torch.arange(n) % 3
    values = torch.randn(n, 3, generator=g)
    values[:, 0] += 2.0 * torch.randn(5, generator=g)[categories[0]]
    values[:, 1] += 3.0 * (categories[2] == 6)
    values = values - values.mean(0)
    fit = fit_rules(values, categories, (5, 2, 8), folds)
    for d, rule, single in ((0, 0, None), (1, 2, 6)):
        table = next(t for t in fit.tables if d in t.rows.tolist())
        assert table.rule == rule
        column = table.rows.tolist().index(d)
        assert int(table.category[column]) == (-1 if single is None else single)
        tried = {
            (r, ridge, only): brute_force_error(values[:, d], categories[r], folds, (5, 2, 8)[r], ridge, only)
            for r in range(3)
            for ridge in RIDGES
            for only in (None, *range((5, 2, 8)[r]))
        }
        (_, ridge, _), _ = min(
            ((k, e) for k, e in tried.items() if k[0] == rule and k[2] == single), key=lambda p: p[1]
        )
        least, total = min(tried.values()), float(values[:, d].square().sum())
        assert total - tried[rule, ridge, single] >= 0.95 * (total - least)
        groups = categories[rule] if single is None else (categories[rule] == single).long()
        for c in groups.unique().tolist():
            mine = values[groups == c, d]
            where = c if single is None else (single if c else (single + 1) % 8)
            assert float(table.values[where, column]) == pytest.approx(
                float(mine.sum()) / (len(mine) + ridge), abs=1e-5
            )


def test_noise_gets_no_rule_with_many_categories():
    g = torch.Generator().manual_seed(5)
    values = torch.randn(400, 6, generator=g)
    categories = [torch.randint(100, (400,), generator=g)]
    fit = fit_rules(values, categories, (100,), torch.arange(400) // 100)
    whole = [t for t in fit.tables if bool((t.category < 0).any())]
    gained = explained(fit.predict(categories), values)
    assert not whole or float(gained.max()) < 0.1


def test_scores_are_the_textbook_ones():
    g = torch.Generator().manual_seed(6)
    values, predicted = torch.randn(80, 4, generator=g), torch.randn(80, 4, generator=g).round()
    r2, area, line = explained(predicted, values), auroc(predicted, values), rescale(predicted, values)
    for d in range(4):
        v, p = values[:, d].double().numpy(), predicted[:, d].double().numpy()
        positive = v > torch.quantile(values[:, d].double(), 0.9).item()
        assert float(r2[d]) == pytest.approx(r2_score(v, p), abs=1e-5)
        assert float(area[d]) == pytest.approx(roc_auc_score(positive, p), abs=1e-6)
        best = LinearRegression().fit(p[:, None], v)
        assert float(line[0][d]) == pytest.approx(best.coef_[0], abs=1e-5)
        assert float(line[1][d]) == pytest.approx(best.intercept_, abs=1e-5)
    often = (torch.arange(80) % 2).float()[:, None]  # the top tenth is the half that is equal
    assert float(auroc(often, often)) == 1.0
    constant = torch.ones(80, 1)
    assert math.isnan(float(explained(constant, constant)))
    assert math.isnan(float(auroc(constant, constant)))


def test_tables_add_up():
    first = Table(0, torch.tensor([1]), torch.tensor([[1.0], [2.0]]), torch.tensor([-1]))
    second = Table(1, torch.tensor([0, 1]), torch.tensor([[10.0, 20.0], [30.0, 40.0]]), torch.tensor([-1, -1]))
    fit = Fit(torch.tensor([0.5, 0.25]), (first, second))
    got = fit.predict([torch.tensor([0, 1]), torch.tensor([1, 0])])
    assert got.tolist() == [[30.5, 41.25], [10.5, 22.25]]


# ---- descriptions -----------------------------------------------------------------------------------------


def test_hand_made_neurons_are_described_as_what_they_are(known):
    found = describe(
        known, random_texts(40, seed=7), random_texts(40, seed=8), [MLP], token_strings=STRINGS, progress=False
    )
    digit, third, both, nothing = found.items
    assert digit.label == "high where the token is a digit"
    assert digit.score > 0.99
    assert digit.auroc == 1.0
    assert third.label == "high where the position is 3"
    assert third.score > 0.95
    assert set(both.rules) == {"position", "the token is a digit"}
    assert both.score > 0.95
    assert nothing.label is None
    assert math.isnan(nothing.score)
    assert "same on all" in nothing.note
    assert digit.random_score < 0.7
    assert found.threshold < 0.2
    (row,) = found.summary()
    assert (row["directions"], row["scored"], row["labelled"]) == (4, 3, 3)
    assert row["score"] == pytest.approx((digit.score + third.score + both.score) / 3)
    assert found.table()[0]["label"] == digit.label
    assert found.find(MLP, 1) is third


def test_the_heads_of_the_induction_model_are_described_as_known():
    graph = unweave.capture("zoo:induction")
    data, held_out = unweave.load_data("zoo:induction", limit=96).split(held_out=0.5)
    found = describe(graph, data, held_out, progress=False)
    truth = unweave.zoo.known("induction")
    by_node = {row["node"]: row for row in found.summary()}
    for heads, rule in (
        (truth["previous_token_heads"], "previous token"),
        (truth["induction_heads"], "token after the earlier copy"),
    ):
        assert heads
        for head in heads:
            mine = [item for item in found.items if item.node == head]
            assert all(item.rules[0] == rule and item.label for item in mine)
            assert by_node[head]["score"] > 0.7 > 0.2 > by_node[head]["random_score"]


def test_a_description_of_chance_gets_no_good_score(known):
    train, held_out = random_texts(40, seed=9), random_texts(40, seed=10)

    def other(evidence):
        table = torch.randn(len(STRINGS), generator=torch.Generator().manual_seed(evidence.direction))
        return Proposal("chance", predict=lambda x: table[x.tokens])

    found = describe(known, train, held_out, [MLP], describer=other, progress=False)
    third = found.find(MLP, 1)
    assert third.score < 0.05
    assert third.auroc < 0.8


def test_a_describer_is_scored_in_the_same_way(known):
    seen = []

    def describer(evidence):
        seen.append(evidence)
        answers = {
            0: Proposal("digits", predict=lambda x: torch.isin(x.tokens, torch.tensor(DIGITS)) * -5.0 + 2),
            1: Proposal("fires third", rule="position"),
            2: Proposal("something deep"),
        }
        return answers.get(evidence.direction, Proposal("nothing", rule="token"))

    train, held_out = random_texts(40, seed=7), random_texts(40, seed=8)
    found = describe(known, train, held_out, [MLP], describer=describer, token_strings=STRINGS, progress=False)
    digit, third, deep, nothing = found.items
    assert digit.label == "digits"
    assert digit.score > 0.99
    assert third.label == "fires third"
    assert third.score > 0.95
    assert third.rules == ("position",)
    assert deep.label is None
    assert math.isnan(deep.score)
    assert "text alone cannot be scored" in deep.note
    assert deep.text == "something deep"
    assert nothing.label is None
    assert [e.direction for e in seen] == [0, 1, 2, 3]
    assert seen[0].examples[0]["kind"] == "top"
    assert seen[0].examples[0]["token"] in ("7", "42")
    assert not math.isnan(digit.random_score)

    with pytest.raises(UnknownNameError, match="previous token"):
        describe(known, train, held_out, [MLP], describer=lambda e: Proposal("x", rule="previos token"), progress=False)
    with pytest.raises(ShapeError, match="prediction must have shape"):
        describe(
            known,
            train,
            held_out,
            [MLP],
            describer=lambda e: Proposal("x", predict=lambda x: torch.zeros(3)),
            progress=False,
        )


# ---- tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_written_tokens_are_the_mean_first_order_effect_on_the_logits(family):
    model = random_model(family).double()
    graph = capture(model)
    g = torch.Generator().manual_seed(11)
    data = from_tensor(torch.randint(graph.info["d_vocab"], (3, 5), generator=g))
    u = torch.randn(2, graph.find("blocks.0.mlp")[0].write.d_out, generator=g, dtype=torch.float64)
    got = written_tokens(graph, u, readout_jacobian(graph, data, progress=False).double())
    edge, eps = f"blocks.0.mlp->{graph.nodes[-1]}.{graph.stages[-1].ports[0].name}", 1e-5

    def stepped(step):  # the output alone hears the step
        return run(graph, data.tokens.long(), patch={edge: lambda y: y + step}).logits

    for k in range(2):
        slope = ((stepped(eps * u[k]) - stepped(-eps * u[k])) / (2 * eps)).mean((0, 1))
        assert torch.allclose(got[k], slope - slope.mean(), atol=1e-4)


def test_later_readers_are_relative_to_a_random_direction(gpt2):
    node = "blocks.0.attn.head.1"
    g = torch.Generator().manual_seed(12)
    width = gpt2.find(node)[0].write.d_out
    u = torch.randn(2, width, generator=g)
    ports, strength = later_readers(gpt2, node, u)
    heard = gpt2.edge_matrix[:, gpt2.writers.index(node)]
    assert ports == tuple(gpt2.ports[j] for j in heard.nonzero()[:, 0])
    for j, port in enumerate(ports):
        reader, _, name = port.rpartition(".")
        weight = unweave.paths.weights.node_read(*gpt2.find(reader), name)
        for k in range(2):
            felt = float((weight @ u[k]).square().sum())
            even = float(weight.square().sum() * u[k].square().sum()) / width
            assert float(strength[k, j]) == pytest.approx(felt / even, rel=1e-4)
    # over an orthonormal basis the mean is 1
    assert torch.allclose(later_readers(gpt2, node, torch.eye(width))[1].mean(0), torch.ones(len(ports)), atol=1e-4)


def test_tokens_through_heads_and_heard_tokens(induction):
    u = torch.randn(2, 64, generator=torch.Generator().manual_seed(13))
    head = "blocks.1.attn.head.1"
    circuit = ov_circuit(induction, head)
    readout = unweave.paths.weights.readout_weight(induction)
    table = induction.stages[0].core.table
    plain = u @ (readout @ circuit.write @ circuit.value).T
    assert torch.allclose(tokens_through(induction, u, f"{head}.v"), plain - plain.mean(1, keepdim=True), atol=1e-4)
    looked_for = u @ unweave.paths.qk_circuit(induction, head).matrix() @ table.T
    assert torch.allclose(
        tokens_through(induction, u, f"{head}.q"), looked_for - looked_for.mean(1, keepdim=True), atol=1e-4
    )
    stage, i = induction.find("blocks.0.attn.head.0")
    heard = heard_tokens(induction, "blocks.0.attn.head.0")[0]
    weight, bias = (f(stage, i, "v") for f in (unweave.paths.weights.node_read, unweave.paths.weights.node_bias))
    assert torch.allclose(heard.T, table @ weight.T + bias, atol=1e-4)
    # what the previous-token head writes of a token is the key that the same token, as a query, looks for
    write = ov_circuit(induction, "blocks.0.attn.head.0").write
    asked_by = tokens_through(induction, (write @ heard).T, f"{head}.k")
    assert float((asked_by.argmax(1) == torch.arange(48)).double().mean()) > 0.8


def test_the_vocabulary_of_known_neurons(known):
    directions = code_directions(known)
    rows = node_vocabulary(directions, MLP, 0, STRINGS, k=2)
    writes = [row["token"] for row in rows if row["role"] == "writes"]
    assert writes[0] == "."
    reads = [row["token"] for row in rows if row["role"] == "reads"]
    assert set(reads[:2]) == {"7", "42"}
    assert {row["port"] for row in rows if row["role"] == "read by"} == {f"{known.nodes[-1]}.in"}


# ---- holding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["code", "subspace"])
def test_holding_sets_one_value_and_its_effects_are_measured(gpt2, gpt2_data, basis):
    moments = channel_moments(gpt2, gpt2_data, Scope()) if basis == "subspace" else None
    directions = code_directions(gpt2, basis=basis, moments=moments)
    node, number = "blocks.0.attn.head.1", 1
    readings = torch.stack([directions.reading(node, k) for k in range(directions.count(node))])
    inputs, mask = gpt2_data.tokens.long(), gpt2_data.mask
    patch = hold_patch(directions, node, number, 1.5)
    names = [n for n in gpt2.writers if gpt2.where[n][0] > gpt2.where[node][0]]
    clean = run(gpt2, inputs, mask, record=[f"{node}.code"])
    held = run(gpt2, inputs, mask, record=[f"{node}.code", node, *names], patch=patch)
    before, after = (x.values[f"{node}.code"] @ readings.T for x in (clean, held))
    assert torch.allclose(after[..., number], torch.tensor(1.5), atol=1e-4)
    others = [k for k in range(len(readings)) if k != number]
    assert torch.allclose(after[..., others], before[..., others], atol=1e-3)

    effect = hold(gpt2, gpt2_data, node, number, 1.5, directions=directions, batch_size=2, progress=False)

    def nats(logits):
        p, q = clean.logits.double().log_softmax(-1), logits.double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1)[mask].mean())

    assert effect.kl_nats == pytest.approx(nats(held.logits), rel=1e-3)
    assert effect.mean_before == pytest.approx(float(before[..., number][mask].mean()), abs=1e-4)
    assert set(effect.nats) == {node, *names}
    assert effect.n_tokens == gpt2_data.n_tokens
    for name in (names[0], names[-1]):
        alone = run(gpt2, inputs, mask, patch={name: held.values[name]}).logits
        assert effect.nats[name] == pytest.approx(nats(alone), rel=1e-3, abs=1e-7)
    output = gpt2.stages[-1]
    direct = run(gpt2, inputs, mask, patch={f"{node}->{output.nodes[0]}.{output.ports[0].name}": held.values[node]})
    assert effect.nats[node] == pytest.approx(nats(direct.logits), rel=1e-3, abs=1e-7)
    change = (held.logits.double().log_softmax(-1) - clean.logits.double().log_softmax(-1))[mask].mean(0)
    assert torch.allclose(effect.log_probs.double(), change, atol=1e-5)
    rows = effect.table(k=2)
    assert [row["what"] for row in rows[-4:]] == ["up", "up", "down", "down"]
    assert rows[-4]["name"] == f"[{int(change.argmax())}]"
    assert rows[-2]["name"] == f"[{int(change.argmin())}]"


def test_text_written_with_a_neuron_held(known):
    tokens = torch.tensor([[0, 1]])
    patch = hold_patch(code_directions(known), MLP, 0, 50.0)
    assert generate(known, tokens, 4, patch=patch)[0, 2:].tolist() == [5] * 4  # it writes "."
    assert generate(known, tokens, 4)[0, 2:].tolist() != [5] * 4


# ---- refusals ---------------------------------------------------------------------------------------------


def test_refusals(known, gpt2):
    data, other = random_texts(), random_texts(seed=1)
    with pytest.raises(UnknownNameError, match="blocks"):
        collect_examples(known, data, ["blocks.0.mpl"])
    with pytest.raises(InputError, match="unknown basis"):
        collect_examples(known, data, basis="neuron")
    with pytest.raises(InputError, match="needs the moments"):
        collect_examples(known, data, basis="subspace")
    with pytest.raises(InputError, match="is the output"):
        code_directions(known, [known.nodes[-1]])
    with pytest.raises(InputError, match="no nodes"):
        code_directions(known, [])
    with pytest.raises(InputError, match="at least 1"):
        collect_examples(known, data, k=0)
    with pytest.raises(EmptyDataError, match="no token"):
        collect_examples(known, data, scope=Scope(positions=lambda batch: torch.zeros_like(batch.mask)))
    found = collect_examples(known, data, [MLP], progress=False)
    with pytest.raises(UnknownNameError, match="direction"):
        found.row(MLP, 4)
    with pytest.raises(UnknownNameError, match="kind"):
        found.table(MLP, 0, kinds=["best"])
    with pytest.raises(InputError, match="are the data themselves"):
        describe(known, data, data)
    with pytest.raises(InputError, match="draws and shifts"):
        describe(known, data, other, draws=0)
    with pytest.raises(EmptyDataError, match="too few"):
        describe(known, data, other.select(slice(3)), progress=False)
    with pytest.raises(EmptyDataError, match="at least 4"):
        describe(known, data.select(slice(2)), other)
    with pytest.raises(InputError, match="has no string"):
        describe(known, data, other, token_strings=STRINGS[:3], progress=False)
    with pytest.raises(InputError, match="speak of tokens"):
        describe(known, float_data(torch.zeros(4, 3)), other)
    with pytest.raises(InputError, match="reals"):
        ready_rules(float_data(torch.zeros(4, 3)))


def test_refusals_of_directions_and_holding(known, gpt2):
    data, directions = random_texts(), code_directions(known)
    with pytest.raises(InputError, match="no direction 9"):
        directions.reading(MLP, 9)
    with pytest.raises(UnknownNameError, match="node with directions"):
        directions.reading("embed", 0)
    with pytest.raises(InputError, match="finite"):
        hold(known, data, MLP, 0, math.nan)
    with pytest.raises(InputError, match="another graph"):
        hold(known, data, MLP, 0, 1.0, directions=code_directions(gpt2))
    with pytest.raises(InputError, match="is the output"):
        hold(known, data, known.nodes[-1], 0, 1.0)
    with pytest.raises(ShapeError, match="must be"):
        written_tokens(known, torch.zeros(1, 3))
    with pytest.raises(InputError, match="no port of an attention head"):
        tokens_through(known, torch.zeros(1, 24), f"{MLP}.in")
    with pytest.raises(InputError, match="reads nothing"):
        heard_tokens(known, known.nodes[0])
    with pytest.raises(UnknownNameError, match="writer"):
        later_readers(known, "nothing", torch.zeros(1, 24))
    resampled = known.restrict(known.edges[1:], ablation="resample")
    with pytest.raises(InputError, match="another input"):
        hold(resampled, data, MLP, 0, 1.0)
    with pytest.raises(InputError, match="another input"):
        collect_examples(resampled, data)
