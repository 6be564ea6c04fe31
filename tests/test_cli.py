"""The commands as a user types them."""

from __future__ import annotations

import json

import pytest
import report_fixtures
from typer.testing import CliRunner

import unweave
from unweave.cli import app
from unweave.cli.application import console
from unweave.cli.modules import print_modules

runner = CliRunner()


def invoke(*args):
    return runner.invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "graph"
    result = invoke(
        "decompile", "zoo:induction", "-o", path, "--size", 0.6, "--sequences", 16, "--held-out", 8, "--measure", 3
    )
    assert result.exit_code == 0, result.output
    assert "decompiled graph" in result.output
    return path


def test_decompile_writes_everything(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "graph.json",
        "report.html",
        "results.json",
        "weights.safetensors",
    ]
    again = invoke("decompile", "zoo:induction", "-o", folder)
    assert again.exit_code == 1
    assert "--overwrite" in again.output


def test_show_report_and_run(folder, tmp_path):
    shown = invoke("show", folder, "--edges", 2)
    assert shown.exit_code == 0
    assert "blocks.1.attn.head" in shown.output
    assert invoke("report", folder, "-o", tmp_path / "r.html").exit_code == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    written = invoke("run", folder, "0 7 3 9 2 7 3 9", "--tokens", 2)
    assert written.exit_code == 0
    assert written.output.count("7 3 9 2 7") == 2  # the graph and the original both repeat


def test_score(folder, tmp_path):
    out = tmp_path / "edges.json"
    assert invoke("score", "zoo:induction", "--sequences", 8, "-o", out).exit_code == 0
    assert len(json.loads(out.read_text())["edges"]) == 42
    assert invoke("score", folder, "--sequences", 8, "--top", 3).exit_code == 0


def test_modules(tmp_path):
    out = tmp_path / "modules"
    args = ["--sequences", 64, "--held-out", 8, "--n-null", 19, "--n-random", 2, "--neurons", "whole", "-o", out]
    result = invoke("modules", "zoo:shared_step", *args)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("No modules are significant")
    facts = json.loads((out / "results.json").read_text())["modules"]
    row = facts["interfaces"][0]
    assert f"module.{row['src']} → module.{row['dst']}" in result.output
    assert f"{row['measured']['value']:.2g}" in result.output
    assert sorted(p.name for p in out.iterdir()) == ["graph.json", "report.html", "results.json", "weights.safetensors"]
    assert facts["significant"] is False
    n_blocks = max(facts["hierarchy"][facts["measured"]]["labels"]) + 1
    assert len(set(unweave.load_graph(out).modules.values())) == n_blocks
    shown = invoke("show", out)
    assert shown.exit_code == 0
    assert "No modules are significant" in shown.output
    assert invoke("modules", "zoo:shared_step", "-o", out).exit_code == 1


def test_modules_that_are_significant_are_called_so():
    table = report_fixtures.modules_data()
    with console.capture() as capture:
        print_modules(table)
    text = capture.get()
    assert text.startswith("4 modules save 90.0 bits (p = 0.02).")
    assert "not modules" not in text
    table["modules"] |= {"significant": False}
    with console.capture() as capture:
        print_modules(table)
    assert capture.get().startswith("No modules are significant: 4 blocks save 90.0 bits (p = 0.02).")


def test_tables_of_modules_fit_into_80_columns(monkeypatch):
    """One line per row, intervals whole: only names of nodes are cut."""
    table = report_fixtures.modules_data()
    for node in table["nodes"]:
        node["name"] = "layers." + node["name"]
    for row in (*table["modules"]["effects"], *table["modules"]["interfaces"]):
        row["nats" if "blocks" in row else "measured"] = {"value": 0.00123, "low": 0.00117, "high": 0.00135}
    monkeypatch.setattr(console, "width", 80)
    with console.capture() as capture:
        print_modules(table)
    lines = capture.get().splitlines()[1:]
    assert max(len(line) for line in lines) <= 80
    alone = [row for row in table["modules"]["effects"] if len(row["blocks"]) == 1]
    whole = [line for line in lines if "0.0012 0.0012–0.0014" in line]
    assert len(whole) == len(alone) + len(table["modules"]["interfaces"])
    for line in whole:
        assert line.startswith("module.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["modules", "zoo:induction", "--neurons", "some"], "'auto', 'whole', 'single'"),
        (["modules", "zoo:induction", "--nulls", "magic"], "closest: "),
        (["decompile", "zoo:nothing"], "closest: "),
        (["decompile", "zoo:induction", "--size", "2"], "at most 1"),
        (["decompile", "zoo:induction", "--size", ".5", "--kl-nats", "1"], "one budget"),
        (["decompile", "./nowhere"], "no such model folder"),
        (["show", "/tmp"], "not a graph folder"),
        (["report", "/tmp"], "no results"),
        (["run", "/tmp", "x"], "not a graph folder"),
        (["score", "zoo:induction", "--method", "magic"], "unknown method"),
    ],
)
def test_errors_are_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback():
    result = invoke("--debug", "show", "/tmp")
    assert result.exception is not None
    assert type(result.exception).__name__ == "StorageError"
    invoke("show", "/tmp")


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    import unweave.pipeline.decompiling as pipeline

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "survey", interrupt)
    result = invoke(
        "decompile", "zoo:induction", "-o", tmp_path / "g", "--size", 0.5, "--sequences", 8, "--held-out", 4
    )
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_real_language_model(shared, tmp_path):
    model, data = shared / "models" / "stories260K", shared / "data" / "stories260K.jsonl"
    args = [
        "--data",
        data,
        "--size",
        0.9,
        "--sequences",
        8,
        "--held-out",
        4,
        "--context",
        48,
        "--measure",
        2,
        "-o",
        tmp_path / "g",
    ]
    result = invoke("decompile", model, *args)
    assert result.exit_code == 0, result.output
    written = invoke("run", tmp_path / "g", "Once upon a time", "--tokens", 8)
    assert written.exit_code == 0
    assert written.output.count("Once upon a time") == 2
    assert invoke("decompile", model, "-o", tmp_path / "h").exit_code == 1  # no data


def test_kinds_of_data_are_found_written_and_shown(tmp_path):
    out = tmp_path / "graph"
    assert (
        invoke(
            "decompile", "zoo:three_tasks", "-o", out, "--size", 0.9, "--sequences", 32, "--held-out", 8, "--measure", 0
        ).exit_code
        == 0
    )
    found = invoke("types", out, "--units", "sequence", "--sequences", "128", "--most", "4", "--trials", "20")
    assert found.exit_code == 0, found.output
    written = json.loads((out / "kinds.json").read_text())
    assert len(written["kinds"]) == len(written["circuits"]) == 3
    assert all(kind["name"] in found.output for kind in written["kinds"])
    assert invoke("types", out, "--label", "task").exit_code == 0
    by_label = json.loads((out / "kinds.json").read_text())["kinds"]
    assert len(by_label) == 3
    assert sum(kind["share"] for kind in by_label) == pytest.approx(1)
    assert invoke("report", out).exit_code == 0
    assert all(kind["name"] in (out / "report.html").read_text() for kind in by_label)
    assert invoke("types", out, "--label", "tsk").exit_code == 1
