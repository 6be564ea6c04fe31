"""``unweave match`` as a user types it: known copies are found, figures are the library's, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave import zoo
from unweave.cli import app
from unweave.cli.application import console
from unweave.scope import Scope
from unweave.universality import match, stitch
from unweave.zoo.toy import ToyConfig, ToyTransformer

runner = CliRunner()
ANSWERED = Scope(positions="answered")
SMALL = ["--sequences", 12, "--held-out", 4]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setattr(console, "width", 80)


def invoke(*args):
    return runner.invoke(app, ["match", *map(str, args)])


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """The bundled induction model with the heads of each layer in the other order."""
    model = zoo.load("induction")
    assert isinstance(model, ToyTransformer)
    with torch.no_grad():
        for block in model.blocks:
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
                getattr(block, name).copy_(getattr(block, name).flip(0))
    folder = tmp_path_factory.mktemp("match") / "turned"
    zoo.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def found(turned, tmp_path_factory):
    out = tmp_path_factory.mktemp("match") / "match.json"
    result = invoke("zoo:induction", turned, *SMALL, "--nulls", 2, "--stitch", 1, "-o", out)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(out.read_text())


def test_heads_in_another_order_are_found(found):
    _, facts = found
    of = {pair["a"]: pair["b"] for pair in facts["pairs"]}
    heads = [f"blocks.{layer}.attn.head.{head}" for layer in (0, 1) for head in (0, 1)]
    assert of == {a: heads[i ^ 1] for i, a in enumerate(heads)}
    assert all(pair["similarity"] > 0.999 for pair in facts["pairs"] if pair["worth_a"] > 0.1)
    assert facts["unmatched"] == [[], []]
    for way in facts["ways"]:
        assert way["edges"]["correlation"] > 0.95
        assert way["n_matches"] == 4
    stitched = facts["stitched"][0]
    assert stitched["nats"]["value"] < 0.01 * stitched["mean_nats"]["value"]
    assert stitched["nats"]["value"] < 0.1 * stitched["control_nats"]["value"]
    # two of four heads do all the work
    assert sum(pair["worth_a"] for pair in facts["pairs"]) == pytest.approx(1)
    assert sorted(pair["worth_a"] > 0.1 for pair in facts["pairs"]) == [False, False, True, True]


def test_figures_are_the_library_s(found, turned):
    _, facts = found
    a, b = unweave.capture("zoo:induction"), unweave.capture(str(turned))
    train, test = unweave.load_data("zoo:induction", context=128, limit=16).split(held_out=4, seed=0)
    expected = match(a, b, train, scope=ANSWERED, nulls=2)
    rows = {pair["a"]: pair for pair in facts["pairs"]}
    for pair in expected.pairs:
        row = rows[pair.a]
        assert row["similarity"] == pytest.approx(pair.similarity)
        assert row["margin"] == pytest.approx(pair.margin)
        assert row["p"] == expected.p_of(pair)
    own, procrustes = facts["ways"][0], facts["ways"][-1]
    assert own["by"] == "behaviour"
    assert own["p"] == expected.p
    assert own["edges"] == pytest.approx(expected.edges._asdict())
    assert procrustes["by"] == "procrustes"
    other = match(a, b, train, scope=ANSWERED, by="procrustes")
    assert procrustes["similarity"] == pytest.approx(other.score)
    assert procrustes["edges"] == pytest.approx(other.edges._asdict())
    row = facts["stitched"][0]
    losses = stitch(a, row["a"], b, row["b"], train, test, ANSWERED)
    assert row["control"] == losses.control_node
    for name, loss in (("nats", losses.loss.nats), ("mean_nats", losses.loss.ablated_nats)):
        assert row[name] == pytest.approx(loss._asdict())
    assert row["control_nats"] == pytest.approx(losses.control.nats._asdict())


def test_the_page_of_the_terminal_is_narrow_and_says_it_all(found):
    text, facts = found
    assert max(map(len, text.splitlines()[:-1])) <= 80  # the last line is a path
    for row in facts["pairs"]:
        (line,) = (x for x in text.splitlines() if x.startswith(f" {row['a']}") and row["b"] in x)
        assert f"{row['similarity']:.2f}" in line
        assert f"{row['p']:.2g}" in line
    assert "← " in text
    for way in ("behaviour", "cka", "svcca", "procrustes"):
        assert f" {way}" in text


def test_nearest_and_ties(tmp_path):
    """All heads of B are the same: each is as good a match, and one to one takes them all."""
    torch.manual_seed(0)
    model = ToyTransformer(ToyConfig(1, 3, 16, 4, 0, d_vocab=48, d_out=48, n_ctx=48)).eval()
    with torch.no_grad():
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            getattr(model.blocks[0], name)[1:] = getattr(model.blocks[0], name)[:1]
    zoo.save(model, tmp_path / "same")
    args = ["zoo:induction", tmp_path / "same", *SMALL, "--by", "patterns", "--nulls", 0, "--stitch", 0]
    nearest = invoke(*args, "--nearest", "-o", tmp_path / "nearest.json")
    assert nearest.exit_code == 0, nearest.output
    facts = json.loads((tmp_path / "nearest.json").read_text())
    assert len({pair["b"] for pair in facts["pairs"]}) == 1
    assert "left over in A" not in nearest.output
    assert "left over in B: blocks.0.attn.head.1, blocks.0.attn.head.2\n" in nearest.output
    assert nearest.output.count(" tie ") == 4
    assert all(pair["p"] is None for pair in facts["pairs"])
    assert "A with B's node" not in nearest.output
    single = invoke(*args, "-o", tmp_path / "single.json")
    facts = json.loads((tmp_path / "single.json").read_text())
    assert len({pair["b"] for pair in facts["pairs"]}) == 3
    assert len(facts["unmatched"][0]) == 1
    assert f"left over in A: {facts['unmatched'][0][0]}\n" in single.output


def test_models_of_two_tokenizers(shared, tmp_path):
    out = tmp_path / "match.json"
    models = [shared / "models" / name for name in ("stories260K", "pylm")]
    data = ["--data", shared / "data/stories260K.jsonl"]
    args = ["--by", "patterns", "--nulls", 0, "--sequences", 3, "--held-out", 2, "--context", 48, "--top", 2, "-o", out]
    result = invoke(*models, *data, *args)
    assert result.exit_code == 0, result.output
    facts = json.loads(out.read_text())
    assert facts["aligned_by_text"]
    assert facts["stitched"] == []
    assert "different tokenizers" in result.output
    assert "14 more pairs" in result.output  # pylm has 16 heads
    assert "and 21 more\n" in result.output  # of stories260K's 40
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    refused = invoke(*models, *args)
    assert refused.exit_code == 1
    assert "different tokenizers: give --data" in refused.output
    refused = invoke(models[0], "zoo:induction", *data, *args)
    assert "only one of A and B has a tokenizer" in refused.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["zoo:induction", "zoo:brackets"], "read different inputs"),
        (["zoo:induction", "zoo:induction", "--by", "magic"], "closest: "),
        (["zoo:induction", "zoo:induction", "--nulls", -1], "at least 0"),
        (["zoo:induction", "zoo:nowhere"], "nowhere"),
        (["zoo:induction", "zoo:induction", "--data", "nowhere.npy"], "nowhere.npy does not exist"),
    ],
)
def test_refusals(args, message):
    result = invoke(*args, *SMALL)
    assert result.exit_code == 1
    assert message in result.output
