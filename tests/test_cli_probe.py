"""``unweave probe`` as a user types it: figures are the library's, planted concepts, checkpoints, refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave import zoo
from unweave.cli import app
from unweave.cli.application import console
from unweave.data import float_data, from_tensor
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.probes import control_task, label_concept, probe_effect, probe_table, stream_places, token_concept
from unweave.scope import Scope
from unweave.zoo.train import weights_folder

runner = CliRunner()
SMALL = ["--sequences", 32, "--held-out", 8]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setattr(console, "width", 80)


def invoke(*args):
    return runner.invoke(app, ["probe", *map(str, args)])


def test_a_label_and_a_concept_with_the_library_s_figures(tmp_path):
    out = tmp_path / "probes.json"
    args = ["--label", "task", "--concept", r"low=\[[0-7]\]", "--draws", 2, "--limit", 200, "-o", out]
    result = invoke("zoo:three_tasks", *SMALL, *args)
    assert result.exit_code == 0, result.output
    facts = json.loads(out.read_text())
    graph = unweave.capture("zoo:three_tasks")
    data = unweave.load_data("zoo:three_tasks", context=128, limit=32)
    train, test = data.split(held_out=8, seed=0)
    low = token_concept("low", range(8), 24)
    place = "before blocks.0.mlp"
    options = {"method": "logistic", "code": True, "limit": 200, "places": [place]}
    table = probe_table(graph, [low, label_concept("task", data)], train, test, **options)
    assert len(facts["probes"]) == 2 * len(stream_places(graph))
    here = [row for row in facts["probes"] if row["place"] == place]
    assert here == [pytest.approx(row) for row in table.table()]
    assert len(facts["effects"]) == len(facts["probes"])
    for row, effect in zip(table.rows, (e for e in facts["effects"] if e["place"] == place), strict=True):
        expected = probe_effect(graph, row.probe, row.place, test, Scope(positions="answered"), draws=2)
        assert (effect["concept"], effect["place"]) == (row.concept, row.place)
        assert effect["kl_nats"] == pytest.approx(expected.kl_nats.value)
        assert effect["random_kl_nats_high"] == pytest.approx(expected.random_kl_nats.high)
        assert effect["is_used"] == expected.is_used
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    assert "take --control 'token at position'" in "".join(result.output.splitlines())
    row = table.find("low", place)
    line = next(line for line in result.output.splitlines() if line.startswith(" blocks.0.mlp"))
    shares = (row.gain, row.control_gain, row.code.saved, row.control_code.saved)
    figures = [f"{row.score.value:.1%}", f"{row.baseline:.1%}", *(f"{round(x, 2) + 0.0:.0%}" for x in shares)]
    assert [line.split()[i] for i in (1, 3, 4, 5, 6, 7)] == figures


def test_places_and_no_control(tmp_path):
    out = tmp_path / "probes.json"
    places = ["--place", "blocks.0.attn.head.0.code", "--place", "before blocks.0.mlp"]
    args = ["--concept", "three=3", *places, "--control", "none", "--draws", 0, "--limit", 200, "-o", out]
    result = invoke("zoo:three_tasks", *SMALL, *args)
    assert result.exit_code == 0, result.output
    facts = json.loads(out.read_text())
    assert [row["place"] for row in facts["probes"]] == ["blocks.0.attn.head.0.code", "before blocks.0.mlp"]
    assert all(row["control"] is None for row in facts["probes"])
    assert facts["effects"] == []
    assert "what is lost" not in result.output
    assert "before blocks.0.mlp" in result.output


def test_checkpoints(tmp_path):
    """Before training and after: what is read is printed along steps, and used on the last one."""
    torch.manual_seed(1)
    zoo.save(zoo.untrained("brackets"), tmp_path / "run/step0")
    shutil.copytree(weights_folder("brackets"), tmp_path / "run/step500")
    out = tmp_path / "probes.json"
    args = ["--concept", r"open=\[1\]", "--offset", 1, "--steps", tmp_path / "run", "--draws", 1, "--limit", 150]
    args += ["--place", "before unembed"]
    result = invoke("zoo:brackets", *SMALL, *args, "-o", out)
    assert result.exit_code == 0, result.output
    facts = json.loads(out.read_text())
    assert {row["step"] for row in facts["probes"]} == {0, 500}
    assert {row["step"] for row in facts["effects"]} == {500}
    assert "held-out tokens" in result.output
    assert "step 500" in result.output
    assert "along training" in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["zoo:three_tasks"], "labels of these data: answered, task"),
        (["zoo:three_tasks", "--concept", "task"], "--label it"),
        (["zoo:three_tasks", "--concept", "a=", "--label", "task"], "LABEL=REGEX"),
        (["zoo:three_tasks", "--concept", "a=("], "not a regular expression"),
        (["zoo:three_tasks", "--concept", "a=never"], "matches none"),
        (["zoo:three_tasks", "--label", "tusk"], "task"),
        (["zoo:three_tasks", "--label", "task", "--place", "before blocks.7.mlp"], "closest: "),
        (["zoo:three_tasks", "--label", "task", "--control", "magic"], "control must be"),
        (["zoo:three_tasks", "--label", "task", "--draws", -1], "at least 0"),
        (["zoo:three_tasks", "--label", "task", "--steps", "nowhere"], "no such folder"),
        (["zoo:two_tasks", "--concept", "a=1"], "give --label"),
    ],
)
def test_refusals(args, message):
    result = invoke(*args, *SMALL)
    assert result.exit_code == 1
    assert message in result.output


# ---- the concepts that it makes -----------------------------------------------------------------------------


def ragged(seed=0):
    tokens = torch.randint(6, (5, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2], [6], [7]])
    return from_tensor(tokens, mask, vocabulary=6)


@pytest.mark.parametrize("offset", [0, -1, 1, 2, -9])
def test_concepts_about_other_tokens_and_their_control(offset):
    """Against a loop over positions; the control has one label for each token that the concept is about."""
    data, ids = ragged(), {1, 4}
    concept = token_concept("some", ids, 6, offset)
    batch = next(data.batches(5))
    value, said = concept.values(batch)
    dealt: dict[int, set[int]] = {}
    labels = control_task(concept, data, seed=1).values(batch) if bool(said.any()) else None
    n = 0
    for i, row in enumerate(batch.inputs.tolist()):
        length = int(batch.mask[i].sum())
        for t in range(batch.inputs.shape[1]):
            inside = t < length and 0 <= t + offset < length
            assert bool(said[i, t]) == inside
            if inside:
                assert int(value[i, t]) == (row[t + offset] in ids)
                assert labels is not None
                assert bool(labels[1][i, t])
                dealt.setdefault(row[t + offset], set()).add(int(labels[0][i, t]))
                n += 1
    assert all(len(found) == 1 for found in dealt.values())
    if offset != -9:
        assert n > 0
        assert len(set.union(*dealt.values())) == 2  # not all the same


def test_labels_of_sequences_and_tokens():
    data = ragged()
    whole = torch.tensor([0, 2, 1, 0, 1])
    each = torch.arange(35).reshape(5, 7) % 3
    labels = {"whole": whole, "each": each, "yes": whole > 0, "real": whole.double()}
    data = from_tensor(data.tokens, data.mask, labels=labels)
    assert {n: label_concept(n, data).classes for n in labels} == {"whole": 3, "each": 3, "yes": 2, "real": 0}
    batch = next(data.select([1, 3]).batches(2))  # narrower than the data
    width = batch.mask.shape[1]
    assert width < 7
    value, said = label_concept("whole", data).values(batch)
    assert torch.equal(value[said], whole[[1, 3], None].expand(2, width)[batch.mask])
    value, said = label_concept("each", data).values(batch)
    assert torch.equal(value[said], each[[1, 3], :width][batch.mask])
    assert torch.equal(said, batch.mask)
    with pytest.raises(UnknownNameError, match="whole"):
        label_concept("hole", data)
    with pytest.raises(ShapeError, match="per sequence or per token"):
        label_concept("wide", from_tensor(data.tokens, data.mask, labels={"wide": torch.zeros(5, 3)}))
    reals = float_data(torch.zeros(4, 3), {"flag": torch.tensor([True, False, True, False])})
    assert label_concept("flag", reals).classes == 2


def test_a_concept_needs_tokens_of_the_vocabulary():
    for ids in (set(), {7}, {-1}):
        with pytest.raises(InputError, match="needs tokens"):
            token_concept("bad", ids, 6)
