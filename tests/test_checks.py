"""What validate, scrub and audit leave in a folder: the figures themselves, and the page that shows them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Open, chromium, in_browser
from report_fixtures import HOSTILE, estimate, report_data
from test_report_browser import open_page, settle
from typer.testing import CliRunner

import unweave
from unweave import zoo
from unweave.audit import AnomalyScore, audit
from unweave.capture import load_model
from unweave.checks import alarm_facts, audit_facts, edits_facts, scrubbing_row, validation_facts
from unweave.cli import app
from unweave.cli.tables import plain_interval
from unweave.errors import CorruptFileError, InputError, StorageError
from unweave.evaluation import evaluate
from unweave.falsification import Hypothesis, edit_prediction, load_hypotheses, random_edits, scrub, validate
from unweave.report import validate_report_data, write_report
from unweave.scope import Scope
from unweave.storage import load_checks, save_check

__all__ = ["chromium", "open_page"]  # fixtures of the other browser tests
SCOPE = Scope(positions="answered")
HYPOTHESIS = """
from unweave.falsification import Hypothesis

NODES = ("embed", "pos_embed", *(f"blocks.{b}.attn.head.{h}" for b in (0, 1) for h in (0, 1)))
hypotheses = {"everything": Hypothesis({name: None for name in NODES}), "nothing": Hypothesis({}, "no part matters")}
"""

# markup alone, and everything else in one string
ATTACKS = (HOSTILE[0], HOSTILE[1], "".join(HOSTILE[2:]))


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def pair() -> tuple[unweave.Graph, unweave.Graph, unweave.TokenData]:
    """(a graph that is wrong often enough, the model, held-out texts)."""
    graph = unweave.capture("zoo:induction")
    data, held = unweave.load_data("zoo:induction", limit=48).split(held_out=24)
    return unweave.compress(graph, data, SCOPE, size=0.25), graph, held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checks") / "graph"
    args = ("--size", 0.3, "--sequences", 16, "--held-out", 8, "--measure", 2)
    assert invoke("decompile", "zoo:induction", "-o", path, *args).exit_code == 0
    return path


# ---- from results to plain data -------------------------------------------------------------------------


def test_validation_facts_are_the_figures_of_the_evaluation(pair: Any) -> None:
    small, graph, held = pair
    tokens = [f"<{i}>" for i in range(48)]
    types = {"low": set(range(10))}
    facts = validation_facts(validate(small, graph, {"in": held}, scope=SCOPE, types=types), tokens, 0.25)
    row = next(r for r in facts["rows"] if (r["type"], r["graph"]) == ("all", "candidate"))
    truth = evaluate({"small": small}, graph, held, SCOPE)["small"]
    assert row["kl_nats"]["value"] == pytest.approx(truth.kl_nats.value)
    assert row["agreement"]["value"] == truth.top1_agreement.value
    assert row["n_tokens"] == truth.n_tokens
    assert {r["type"] for r in facts["rows"]} == {"all", "low"}
    nats, sequence, position, *_ = truth.worst[0]
    worst = facts["worst"][0]
    assert worst["nats"] == pytest.approx(nats)
    assert (worst["sequence"], worst["position"]) == (sequence, position)
    assert worst["text"].endswith(f"<{int(held.tokens[sequence, position])}>")


def test_scrubbing_and_edit_facts_are_the_figures_they_came_from(pair: Any) -> None:
    small, graph, held = pair
    nothing = Hypothesis({}, "no part matters")
    found = scrub(graph, held, nothing, SCOPE)
    row = scrubbing_row("nothing", nothing, found, "the model")
    assert row["loss_recovered"]["value"] == found.loss_recovered.value == 0
    assert (row["keys"], row["description"], row["n_tokens"]) == ([], "no part matters", found.n_tokens)
    edits = {"0.5": random_edits(graph, 5, 0.5)}
    table = edit_prediction(small, graph, edits, held.select(slice(0, 4)), SCOPE, second_order=2)
    facts = edits_facts(table, edits)
    np.testing.assert_array_equal([p["true"] for p in facts["points"]], table.true["0.5"])
    np.testing.assert_array_equal([p["second_order"] for p in facts["points"]], table.second_order["0.5"])
    assert [p["edit"].split()[0] for p in facts["points"]] == [type(e).__name__ for e in edits["0.5"]]
    assert facts["points"][2]["edit"].startswith("SwapTokens tokens ")
    assert facts["rows"][0]["r2"]["value"] == table.row("0.5", "graph").r2.value
    without = edits_facts(edit_prediction(small, graph, edits, held.select(slice(0, 4)), SCOPE), edits)
    assert "second_order" not in without["points"][0]


def test_an_audit_spells_every_token_that_it_names(pair: Any) -> None:
    small, graph, held = pair
    found = audit(small, graph, held, SCOPE, n_tokens=12)
    facts = audit_facts(found, [f"<{i}>" for i in range(48)])
    named = {i for row in facts["tokens"] for i in (*row["context"], row["model_says"], row["graph_says"])}
    named |= {pair[0] for row in facts["clusters"] for key in ("raised", "lowered") for pair in row[key]}  # type: ignore[literal-required]
    named |= {i for row in facts["clusters"] for _, i, _ in row["shared"]}
    assert facts["words"] == {str(i): f"<{i}>" for i in named}
    assert [row["nats"] for row in facts["tokens"]] == [row.nats for row in found.tokens]


def test_alarm_facts_count_texts_above_the_threshold(pair: Any) -> None:
    small, graph, held = pair
    clean, other = held.select(slice(0, 12)), held.select(slice(12, 24))
    scorer = AnomalyScore.fit(small, graph, clean, SCOPE, false_alarms=0.5)
    facts = alarm_facts(scorer, other)
    assert facts["alarms"] == sum(float(s) > facts["threshold"] for s in scorer.score_data(other))
    assert (facts["n_clean"], facts["n_texts"], facts["false_alarms"]) == (12, 12, 0.5)
    assert 0 < facts["alarms"] < 12


def test_intervals_of_either_sign_fit_a_cell() -> None:
    assert plain_interval({"value": -0.211, "low": -1234.0, "high": 0.5}) == "-0.21 [dim]-1e+03 to 0.50[/]"
    assert plain_interval({"value": -0.001, "low": -0.2, "high": 1.0}, percent=True) == "0% [dim]-20% to 100%[/]"
    assert plain_interval({"value": math.nan, "low": 0.0, "high": 1.0}) == "–"


# ---- hypotheses from files ------------------------------------------------------------------------------


def test_hypotheses_are_read_from_a_file(tmp_path: Path) -> None:
    one, many = tmp_path / "one.py", tmp_path / "many.py"
    one.write_text("from unweave.falsification import Hypothesis\nhypothesis = Hypothesis({'embed': None}, 'x')")
    many.write_text(HYPOTHESIS)
    assert list(load_hypotheses(one)["one"].keys) == ["embed"]
    assert list(load_hypotheses(many)) == ["everything", "nothing"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "define either 'hypothesis' or 'hypotheses' .* neither"),
        ("hypothesis = hypotheses = {}", "both"),
        ("hypothesis = {'embed': None}", "must be an unweave.falsification.Hypothesis, got dict"),
        ("hypotheses = {}", "not empty"),
        ("hypotheses = [1]", "must be a dictionary"),
    ],
)
def test_files_without_a_hypothesis_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "h.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_hypotheses(path)


def test_other_files_are_refused_and_errors_say_where(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no file"):
        load_hypotheses(tmp_path / "none.py")
    (tmp_path / "h.txt").write_text("")
    with pytest.raises(InputError, match="end in .py"):
        load_hypotheses(tmp_path / "h.txt")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError) as caught:
        load_hypotheses(tmp_path / "bad.py")
    assert caught.value.__notes__ == [f"while running {tmp_path / 'bad.py'}"]


# ---- the commands ---------------------------------------------------------------------------------------


def test_an_edit_that_is_asked_for_is_on_the_page(folder: Path, tmp_path: Path) -> None:
    done = invoke("edit", folder, "--scale", "blocks.1.attn.head.1=0", "--held-out", 8, "-o", tmp_path / "edited")
    assert done.exit_code == 0, done.output
    point = load_checks(folder)["edits"]["points"][-1]
    assert point["edit"] == "ScaleHead blocks.1.attn.head.1"
    assert point["true"] == pytest.approx(point["graph"], rel=0.3)
    assert abs(point["gradient"]) < 0.1 < point["true"]  # the readout is saturated: small changes tell nothing
    assert f"{point['true']:+.4f}" in done.output
    assert invoke("validate", folder, "--sequences", 16, "--edits", 3, "--top", 0).exit_code == 0
    facts = load_checks(folder)["edits"]
    assert point in facts["points"]
    assert len(facts["points"]) == 10  # random ones do not replace it
    assert invoke("report", folder, "-o", tmp_path / "r.html").exit_code == 0
    for name in ("validation", "edits"):
        (folder / f"{name}.json").unlink()


def test_the_commands_write_what_the_page_shows(folder: Path, tmp_path: Path) -> None:
    done = invoke(
        "validate", folder, "--sequences", 16, "--by", r"low=\[[0-9]\]", "--by", "answered", "--edits", 3, "--top", 2
    )
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines()[:-1])) <= 80
    hypotheses = tmp_path / "h.py"
    hypotheses.write_text(HYPOTHESIS)
    for extra in ((), ("--original",)):
        done = invoke("scrub", folder, hypotheses, "--form", "dag", "--samples", 1, "--sequences", 32, *extra)
        assert done.exit_code == 0, done.output
        assert max(map(len, done.output.splitlines()[:-1])) <= 80
    assert "100% 100% to 100%" in done.output
    done = invoke("audit", folder, "--sequences", 16, "--top", 1)
    assert done.exit_code == 0, done.output
    checks = load_checks(folder)
    assert list(checks) == ["validation", "scrubbing", "edits", "audit"]
    rows = checks["validation"]["rows"]
    assert {row["type"] for row in rows} == {"all", "low", "answered"}
    assert {"candidate", "plain SVD"} <= {row["graph"] for row in rows}
    assert len(checks["edits"]["points"]) == 9
    tested = [(row["name"], row["graph"]) for row in checks["scrubbing"]["hypotheses"]]
    assert tested == [(name, of) for of in ("the graph", "the model") for name in ("everything", "nothing")]
    assert invoke("report", folder, "-o", tmp_path / "r.html").exit_code == 0
    assert '"scrubbing":{"hypotheses"' in (tmp_path / "r.html").read_text()
    again = invoke("scrub", folder, hypotheses, "--form", "dag", "--sequences", 32)
    assert again.exit_code == 0
    assert len(load_checks(folder)["scrubbing"]["hypotheses"]) == 4  # those of the graph were replaced
    unweave.save_graph(unweave.load_graph(folder), folder, overwrite=True)  # a folder with checks is still a graph's
    assert load_checks(folder) == {}


@pytest.mark.parametrize(
    ("ablation", "positions"), [("mean", "together"), ("resample", "together"), ("counterfactual", "named")]
)
def test_a_circuit_is_held_against_the_model_on_the_prompts_of_its_proof(
    tmp_path: Path, ablation: str, positions: str
) -> None:
    how = {"ablation": ablation, "positions": positions}
    found = unweave.dissect("zoo:induction", "induction", prompts=16, edges=12, **how)
    found.save(tmp_path / "c")
    done = invoke("validate", tmp_path / "c", "--top", 1)
    assert done.exit_code == 0, done.output
    assert "best of 5 random" in done.output
    rows = {row["graph"]: row for row in load_checks(tmp_path / "c")["validation"]["rows"]}
    assert rows["candidate"]["data"] == "proof"
    assert rows["candidate"]["n_tokens"] == found.proof.n_tokens
    # resampling draws its partners anew; the rest is the proof's own divergence
    near = 0.5 if ablation == "resample" else 1e-4
    assert rows["candidate"]["kl_nats"]["value"] == pytest.approx(found.proof.nats.value, rel=near, abs=1e-6)
    assert min(rows[f"random {i}"]["kl_nats"]["value"] for i in range(5)) > rows["candidate"]["kl_nats"]["value"]
    written = invoke("run", tmp_path / "c", "3 4 5", "--tokens", 2)
    assert (written.exit_code == 0) == (ablation == "mean")
    if ablation == "resample":
        assert invoke("validate", tmp_path / "c", "--other", "zoo:induction", "--sequences", 8).exit_code == 0
        sets = {row["data"] for row in load_checks(tmp_path / "c")["validation"]["rows"]}
        assert sets == {"proof", "zoo:induction"}


def test_more_data_and_an_alarm(folder: Path, tmp_path: Path, pair: Any) -> None:
    """The same model from a folder of its own, on files of token ids."""
    zoo.save(load_model("zoo:induction"), tmp_path / "model")
    held = pair[2].tokens.numpy().astype(np.int64)
    for name, rows in (("in", held[:12]), ("out", held[12:, ::-1]), ("clean", held[12:])):
        np.save(tmp_path / f"{name}.npy", rows)
    common = (folder, "--model", tmp_path / "model", "--data", tmp_path / "in.npy", "--sequences", 12, "--top", 1)
    done = invoke("validate", *common, "--other", tmp_path / "out.npy", "--calibration", tmp_path / "clean.npy")
    assert done.exit_code == 0, done.output
    found = load_checks(folder)["validation"]
    assert {row["data"] for row in found["rows"]} == {"data", "out"}
    assert {"activation SVD", "plain SVD"} <= {row["graph"] for row in found["rows"]} | set(found["left_out"])
    done = invoke("audit", *common, "--clean", tmp_path / "clean.npy", "--false-alarms", 0.2)
    assert done.exit_code == 0, done.output
    alarm = load_checks(folder)["audit"]["anomaly"]
    assert (alarm["n_clean"], alarm["n_texts"], alarm["false_alarms"]) == (12, 12, 0.2)
    assert f"{alarm['alarms']} of 12" in " ".join(done.output.split())
    for name in ("validation", "audit"):
        (folder / f"{name}.json").unlink()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["validate", "/tmp"], "not a graph folder"),
        (["validate", "FOLDER", "--by", "x="], "LABEL=REGEX"),
        (["validate", "FOLDER", "--by", "x=("], "regular expression"),
        (["validate", "FOLDER", "--by", "x=zzz"], "no token is left"),
        (["validate", "FOLDER", "--by", "nothing"], "label"),
        (["validate", "FOLDER", "--other", "data.txt", "--other", "b/data.txt"], "two data sets"),
        (["scrub", "FOLDER", "none.py"], "no file none.py"),
        (["scrub", "FOLDER", "HYPOTHESIS", "--form", "bush"], "unknown form"),
        (["audit", "FOLDER", "--clean", "zoo:induction"], "other texts"),
    ],
)
def test_bad_requests_are_one_line(args: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text(HYPOTHESIS)
    places = {"FOLDER": folder, "HYPOTHESIS": tmp_path / "h.py"}
    result = invoke(*(places.get(a, a) for a in args))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_checks_are_kept_with_graphs_alone(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="unknown check 'weather'"):
        save_check(folder, "weather", {})
    with pytest.raises(StorageError, match="not a graph folder"):
        save_check(tmp_path, "audit", {})
    path = save_check(folder, "scrubbing", {"hypotheses": [math.nan]})
    assert json.loads(path.read_text()) == {"hypotheses": [None]}
    assert invoke("report", folder, "-o", tmp_path / "r.html").exit_code == 1
    path.write_text("[1]")
    with pytest.raises(CorruptFileError, match="must hold an object"):
        load_checks(folder)
    path.unlink()


# ---- the page -------------------------------------------------------------------------------------------


def check_facts(word: str = "word") -> dict[str, Any]:
    """One of everything, with a text in every place that holds one."""
    figures = {"kl_p99": 0.5, "kl_p999": 1.5, "kl_max": math.inf, "n_sequences": 4, "n_tokens": 64}
    rows = [
        {"data": word, "type": kind, "graph": graph, "kl_nats": estimate(kl), "agreement": estimate(0.9)}
        | {"loss_recovered": estimate(0.8)}
        | figures
        for kind in ("all", "digits")
        for graph, kl in (("original", 0.0), ("candidate", 0.05), (f"rival {word}", 0.5), (f"equal {word}", 0.051))
    ]
    worst = {"data": word, "nats": 2.0, "sequence": 1, "position": 3, "text": word, "network": word, "graph": word}
    scrubbed = {"graph": "the model", "form": "tree", "alone": {word: 0.25}, "n_samples": 2, "n_sequences": 4}
    hypotheses = [
        scrubbed
        | {"name": f"{name} {word}", "description": word, "keys": [word], "n_tokens": 9}
        | {"loss_recovered": estimate(value, 0.05), "recovered": estimate(value / 2)}
        for name, value in (("true", 0.9), ("false", -0.2))
    ]
    unknown = dict.fromkeys(("value", "low", "high"), math.nan)
    edit_rows = [
        {"size": size, "predictor": predictor, "correlation": estimate(0.9), "r2": estimate(r2), "slope": estimate(1)}
        | {"sign": estimate(0.8), "top_token": unknown, "mean_change": 0.1, "n": 3}
        for size in ("0.1", word)
        for predictor, r2 in (("graph", 0.95), ("gradient", -0.2), ("permuted", -1.0))
    ]
    points = [
        {"size": size, "edit": f"{word} {i}", "true": 0.01 * (i - 1), "graph": 0.011 * (i - 1), "gradient": None}
        for size in ("0.1", word)
        for i in range(3)
    ]
    gap = {"nats": 3.0, "sequence": 2, "position": 5}
    parts = [{"name": f"{word} {i}", "restored_nats": 1.0 - i, "left_nats": 2.0 + i} for i in range(2)]
    score = {"excess_nats_low": 2.0, "excess_nats_high": 3.0, "nats": 4.0, "score": 9.0, "p": math.nan, "n_texts": 20}
    audited = {
        "kl_nats": 0.1,
        "n_tokens": 64,
        "n_sequences": 4,
        "tokens": [gap | {"context": [1, 2], "model_says": 3, "graph_says": 4, "cluster": 0}],
        "texts": [gap | {"mean_nats": 0.5}],
        "clusters": [
            {"mean_nats": 3.0, "n_tokens": 2, "raised": [[3, 0.5]], "lowered": [[4, -0.5]], "shared": [[0, 2, 1.0]]}
        ],
        "writers": parts,
        "readers": parts,
        "words": {str(i): f"{word}{i}" for i in (1, 2, 3)},
        "anomaly": {"threshold": 1.5, "false_alarms": 0.01, "n_clean": 200, "n_texts": 50, "alarms": 7},
        "triggers": [
            {"at": "start", "n_runs": 2304, "n_screened": 120, "evaluations": 900}
            | {"runs": [{"tokens": [1, 4], "excess_nats": 2.5} | score]}
        ],
    }
    return {
        "validation": {"candidate": "candidate", "size": 0.5, "rows": rows, "worst": [worst], "left_out": {word: word}},
        "scrubbing": {"hypotheses": hypotheses},
        "edits": {"rows": edit_rows, "points": points},
        "audit": audited,
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path, data = tmp_path_factory.mktemp("pages"), report_data(1, 2)
    checks = {f"hostile {i}": check_facts(text) for i, text in enumerate(ATTACKS)}
    checks |= {"all": check_facts(), "audit": {"audit": check_facts()["audit"]}}
    every = {name: data | {"checks": facts} for name, facts in checks.items()} | {"none": data}
    return {name: write_report(d, path / f"{name}.html") for name, d in every.items()}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["validation", "rows", 0, "kl_nats"], 3, r"checks.validation.rows\[0\].kl_nats must be a dict"),
        (["edits", "points", 1, "true"], "x", r"checks.edits.points\[1\].true must be a number or None"),
        (["audit", "words", "1"], 5, r"checks.audit.words\['1'\] must be a string"),
        (["scrubbing", "hypotheses"], None, "checks.scrubbing.hypotheses must be a list"),
    ],
)
def test_checks_of_another_form_are_refused(path: list[Any], value: Any, message: str) -> None:
    facts: Any = check_facts()
    inner = facts
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InputError, match=message):
        validate_report_data(report_data(1, 2) | {"checks": facts})
    assert validate_report_data(report_data(1, 2) | {"checks": check_facts()})["checks"]["audit"]["n_tokens"] == 64


@in_browser
def test_each_part_is_there_when_its_file_is(open_page: Open) -> None:
    parts = {name: open_page(name).locator("#checks .check") for name in ("all", "audit", "none")}
    ids = [part.get_attribute("id") for part in parts["all"].all()]
    assert ids == ["check-validation", "check-scrubbing", "check-edits", "check-audit"]
    assert [part.get_attribute("id") for part in parts["audit"].all()] == ["check-audit"]
    assert parts["none"].count() == 0
    page = parts["none"].page
    assert not page.locator("#checks-section").is_visible()
    assert not page.locator("nav [href='#h-checks']").is_visible()


@in_browser
def test_the_figures_are_on_the_page(open_page: Open) -> None:
    page = open_page("all")
    verdict = page.inner_text("#check-validation .verdict")
    assert (
        "below that of 2 of 4 baselines of its size; not below equal word (word), equal word (word, digits)" in verdict
    )
    assert page.locator("#check-validation tr.ours").count() == 2
    rows = page.locator("#check-validation .plot .line")
    assert rows.count() == 6  # the original has no divergence to draw
    spots = [float(rows.nth(i).locator("circle").get_attribute("cx")) for i in range(3)]
    assert spots[0] < spots[2] < spots[1]
    bars = page.locator("#check-scrubbing .amount")
    widths = [float(bars.nth(i).get_attribute("width")) for i in range(2)]
    assert widths[0] / widths[1] == pytest.approx(0.9 / 0.2)
    assert page.locator("#check-scrubbing tbody tr").first.inner_text().split("\t")[5] == "25.0%"
    # predicted 10% too much: below the line where positive, above it where negative
    dots = [
        (float(d.get_attribute("cx")), float(d.get_attribute("cy")))
        for d in page.locator("#edits-plot circle.point").all()
    ]
    assert len(dots) == 6 + 2
    middle, positive = dots[1], dots[2]
    assert middle == (pytest.approx(340), pytest.approx(182))
    assert (positive[0] - 340) / 440 > (182 - positive[1]) / 336 > 0
    assert page.locator("#check-edits button.port").all_inner_texts() == ["the graph"]  # no other was told
    audited = page.inner_text("#check-audit .verdict")
    assert "set at 1.50 nats at one token: calibrated on 200 clean texts" in audited
    assert "Of the 50 texts audited, 7 raise it." in audited
    assert page.locator("#audit-tokens .tok").all_inner_texts() == ["word2", "word3", "[4]"]  # 4 was not spelled
    assert page.locator("#audit-clusters .tok").all_inner_texts() == ["word3", "[4]", "word2"]
    found = page.locator("#audit-triggers-start")
    assert "120 of 2,304 tried" in page.locator("#audit-triggers-start").inner_html()
    assert found.locator(".tok").all_inner_texts() == ["word1", "[4]"]
    assert "2.50 (2.00 to 3.00)" in found.inner_text()
    assert page.locator("#audit-writers tbody th").all_inner_texts() == ["word 0", "word 1"]


@in_browser
@pytest.mark.parametrize("i", range(len(ATTACKS)))
def test_hostile_strings_stay_text(i: int, open_page: Open) -> None:
    page = open_page(f"hostile {i}")
    settle(page)
    for k in range(page.locator("#checks [data-tip]").count()):
        page.locator("#checks [data-tip]").nth(k).dispatch_event("pointerover")
    assert page.locator("#checks .check").count() == 4
    assert page.locator("img, iframe, svg [onload], [onerror], object, embed").count() == 0
    assert page.locator("script").count() == 2
    assert not set("\u202e\u2066\u2028\u200b\ufeff\x00\x1b") & set(page.inner_text("body"))


@in_browser
def test_nothing_is_wider_than_a_telephone(open_page: Open) -> None:
    page = open_page("all")
    page.set_viewport_size({"width": 420, "height": 800})
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_the_data_are_not_changed_by_a_page(tmp_path: Path) -> None:
    data = report_data(1, 2) | {"checks": check_facts()}
    before = copy.deepcopy(data["checks"])
    write_report(data, tmp_path / "r.html")
    assert repr(data["checks"]) == repr(before)
