"""A behaviour in one call, from Python and from the command line, and the page it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import random_model
from scipy.stats import spearmanr
from typer.testing import CliRunner

import unweave
from unweave.cli import app
from unweave.dissection import Dissected, dissect, predict_effects
from unweave.errors import InputError
from unweave.report import validate_report_data
from unweave.scoring import score_edges
from unweave.storage import load_graph


@pytest.fixture(scope="module")
def found() -> Dissected:
    return dissect("zoo:induction", "induction", prompts=48, ablation="mean per position")


def test_the_known_circuit_is_found_and_proved(found):
    edges = {str(e) for e in found.circuit.edges}
    assert "blocks.0.attn.head.0->blocks.1.attn.head.1.k" in edges
    assert "blocks.1.attn.head.1->unembed.in" in edges
    assert found.check.accuracy > 0.95
    assert found.proof.faithfulness.value > 0.8
    assert found.proof.n_prompts == 24
    assert found.curves["unweave"].cpr > found.curves["random"].cpr + 0.2


def test_the_report_is_one_that_the_page_takes(found):
    report = validate_report_data(found.report)
    kept = [e for e in report["edges"] if e["kept"]]
    assert len(kept) == found.circuit.n_edges
    assert all(e["measured"] for e in kept)
    assert len(report["edges"]) == found.circuit.original.n_edges
    rows = {row["what"]: row["value"] for row in report["proof"]}
    assert rows["faithfulness"] == pytest.approx(found.proof.faithfulness.value)
    assert report["size_of"] == "edges"


def test_predictions_are_those_of_the_definition(found):
    graph, circuit = found.circuit.original, found.circuit
    data = found.task.data.select(slice(0, 16))
    got = predict_effects(circuit, data, n=1000, seed=0)
    options = {"ablation": circuit.instead.kind, "means": circuit.instead.means}
    x = score_edges(graph, data, circuit.scope, samples=4, **options).nats[graph.edge_matrix].double().numpy()
    y = score_edges(graph, data, circuit.scope, method="exact", **options).nats[graph.edge_matrix].double().numpy()
    slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    assert len(got.points) == len(x)
    assert got.slope == pytest.approx(slope, rel=1e-4)
    assert got.r2 == pytest.approx(1 - ((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-3)
    assert got.spearman == pytest.approx(spearmanr(x, y)[0], abs=1e-6)


def test_a_task_from_a_file(tmp_path):
    task = unweave.make_task("induction", vocabulary=48, first=0, n=40, length=16)
    lines = [
        json.dumps({"clean": clean, "corrupted": bad, "correct": right, "wrong": wrong})
        for clean, bad, right, wrong in zip(
            task.data.tokens.tolist(),
            task.corrupted.tokens.tolist(),
            task.data.labels["correct"].tolist(),
            task.data.labels["wrong"].tolist(),
            strict=True,
        )
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    result = dissect("zoo:induction", path, edges=4, metric="logit_difference")
    assert result.circuit.n_edges <= 4
    assert result.report["provenance"]["ablation"] == "counterfactual"
    assert torch.equal(result.task.data.tokens, task.data.tokens)


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_every_ablation_goes_all_the_way(ablation):
    result = dissect("zoo:induction", "induction", prompts=24, ablation=ablation)
    assert result.circuit.instead.kind == ablation
    assert result.proof.nats.value < result.proof.empty_nats
    assert result.curves["unweave"].faithfulness[-1].value == pytest.approx(1.0)


def test_a_model_that_cannot_do_the_task_gets_no_circuit():
    model = random_model("gpt2")
    with pytest.raises(InputError, match="cannot do this task"):
        dissect(model, unweave.make_task("induction", vocabulary=50, n=32))


# ---- the command line -------------------------------------------------------------------------------------------


def invoke(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_circuit_writes_everything(tmp_path):
    folder = tmp_path / "c"
    result = invoke("circuit", "zoo:induction", "--task", "induction", "--prompts", 32, "--edges", 7, "-o", folder)
    assert result.exit_code == 0, result.output
    assert "faithfulness" in result.output
    graph = load_graph(folder)
    assert graph.n_edges <= 7
    assert (folder / "report.html").stat().st_size > 50_000
    shown = invoke("show", folder)
    assert "own effect" in shown.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["./model"], "give --task: a .jsonl file, or one of"),
        (["./model"], "or --data: what the model reads"),
        (["zoo:induction", "--task", "induction", "--data", "zoo:induction"], "not both"),
        (["zoo:induction", "--task", "induction", "--at", "last"], "not both"),
        (["zoo:induction", "--at", "ansered"], "the closest: answered"),
        (["zoo:induction", "--data", "zoo:two_tasks"], "the model reads token ids, and zoo:two_tasks holds vectors of"),
        (["zoo:two_tasks", "--data", "zoo:induction"], "holds token ids; give what it reads"),
        (["zoo:induction", "--ablation", "counterfactual"], "has no corrupted prompts"),
        (["zoo:induction", "--metric", "logit_difference"], "has no answers"),
        (["zoo:induction", "--task", "inducton"], "closest: induction"),
        (["zoo:induction", "--task", "ioi"], "takes a tokenizer"),
        (["zoo:induction", "--task", "induction", "--edges", 5, "--kl-nats", 1], "exactly one budget"),
        (["zoo:induction", "--task", "induction", "--edges", 5, "--ablation", "median"], "unknown ablation"),
    ],
)
def test_mistakes_get_one_line(tmp_path, args, message):
    result = invoke("circuit", *args, "-o", tmp_path / "c", "--prompts", 16)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "c").exists()


def test_the_ready_made_tasks_are_listed():
    result = invoke("circuit", "zoo:induction", "--list")
    assert result.exit_code == 0
    assert {"induction", "ioi", "quotes"} <= {line.split(":")[0] for line in result.output.splitlines()}


def test_positions_can_be_apart_or_named():
    found = unweave.dissect("zoo:induction", "induction", prompts=32, positions="named")
    assert found.report["provenance"]["positions"] == "named"
    assert "blocks.1.attn.head.1@end" in found.circuit.nodes
    with pytest.raises(InputError, match="positions must be one of"):
        dissect("zoo:induction", "induction", positions="nowhere")
