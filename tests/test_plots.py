"""What is drawn is read back from the artists and compared with the result; labels, colours, refusals, no state left."""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import sys
import weakref
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import rc_context, style
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import unweave
from unweave import plots
from unweave.circuits import faithfulness_curve
from unweave.circuits.curve import FaithfulnessCurve
from unweave.dissection import Prediction
from unweave.errors import InputError, UnknownNameError
from unweave.falsification import Hypothesis, scrub
from unweave.hypotheses.interchange import Accuracy, Interchange
from unweave.intervals import Estimate
from unweave.plots.style import COLOURS, GREY, log_norm, plain, styles
from unweave.sampling import record_usage
from unweave.statistics import replacement
from unweave.subspaces import Subspace

HEAD = "blocks.1.attn.head.1"
SCOPE = unweave.Scope(positions="answered")
# TeX, half of TeX, an open brace, control, right-to-left, a letter no font here has, a blank, nothing, a hidden label
HOSTILE = [
    "$x_1$",
    "a$b",
    "\\frac{",
    "\x00\x1b[31m",
    "\u202eabc",
    "\U0001f600\u4e2d",
    " ",
    "",
    "_hidden",
    "x" * 500,
    "\n\t\r",
]
CURVES = {
    "unweave": [(0.9, Estimate(0.01, 0.005, 0.02)), (0.3, Estimate(0.4, 0.3, 0.5)), (0.5, Estimate(0.1, 0.08, 0.12))],
    "plain SVD": [(0.5, Estimate(0.7, 0.6, 0.9)), (0.3, Estimate(2.0, 1.5, 2.5))],
}


@pytest.fixture(scope="module")
def scores(induction, induction_data):
    return unweave.score_edges(induction, induction_data, SCOPE)


@pytest.fixture(scope="module")
def exact(induction, induction_data):
    return unweave.score_edges(induction, induction_data, SCOPE, method="exact")


@pytest.fixture(scope="module")
def usage(induction, induction_data, tmp_path_factory):
    strings = [HOSTILE[k % len(HOSTILE)] for k in range(48)]
    return record_usage(induction, induction_data, SCOPE, tmp_path_factory.mktemp("usage") / "usage", strings=strings)


@pytest.fixture(scope="module")
def faithfulness(induction, induction_data):
    small = unweave.compress(induction, induction_data, SCOPE, size=0.3)
    return unweave.evaluate({"small": small}, induction, induction_data, SCOPE, n_worst=10**6)


@pytest.fixture(autouse=True)
def _drawn_without_pyplot():
    """pyplot keeps figures for ever; no plot may use it."""
    known = "matplotlib.pyplot" in sys.modules
    yield
    assert known == ("matplotlib.pyplot" in sys.modules)


def draw(ax) -> bytes:
    """The picture as PNG; a missing letter or half a formula is a warning, and so an error."""
    out = io.BytesIO()
    ax.figure.savefig(out, dpi=40)
    return out.getvalue()


def labels_of(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def legend_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ---- lines ----------------------------------------------------------------------------------------------


def test_rate_distortion_draws_the_curves_and_their_intervals() -> None:
    ax = plots.rate_distortion(CURVES)
    assert legend_of(ax) == list(CURVES)
    for line, band, points in zip(ax.get_lines(), ax.collections, CURVES.values(), strict=True):
        rising = sorted(points)
        np.testing.assert_allclose(line.get_xdata(), [size for size, _ in rising])
        np.testing.assert_allclose(line.get_ydata(), [kl.value for _, kl in rising])
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9).tolist()}
        assert {(size, end) for size, kl in points for end in kl[1:]} <= corners
    assert ax.get_yscale() == "log"
    assert "nats per token" in ax.get_ylabel()


def test_rate_distortion_takes_a_decompiled_model(induction, scores) -> None:
    found = unweave.Decompiled(induction, induction, scores, {}, CURVES, {})
    assert plots.rate_distortion(found).get_lines()[1].get_ydata().tolist() == [2.0, 0.7]


def test_divergences_of_nothing_are_not_drawn_on_a_log_scale() -> None:
    ax = plots.rate_distortion({"a": [(0.5, Estimate(0.0, 0.0, 0.0)), (0.3, Estimate(0.1, 0.0, 0.2))]})
    assert draw(ax)


def test_circuit_sizes_draw_faithfulness_with_intervals(induction, induction_data, scores) -> None:
    instead, _ = replacement(induction, induction_data)
    curve = faithfulness_curve(scores, induction, induction_data, SCOPE, instead, shares=(0.1, 0.5, 1.0))
    ax = plots.circuit_sizes({"ours": curve, "again": curve})
    for container in ax.containers:
        line, _, (bars,) = container.lines
        np.testing.assert_allclose(line.get_xdata(orig=False), curve.shares)
        np.testing.assert_allclose(line.get_ydata(orig=False), [f.value for f in curve.faithfulness])
        ends = [segment[:, 1] for segment in bars.get_segments()]
        # an interval that misses its value ends at the value
        want = [(min(f.low, f.value), max(f.high, f.value)) for f in curve.faithfulness]
        np.testing.assert_allclose(ends, want, atol=1e-12)
    assert legend_of(ax) == [f"{name}, CPR {curve.cpr:.2f}" for name in ("ours", "again")]
    assert labels_of(ax.xaxis) == ["10", "50", "100"]


def test_spectrum_draws_what_is_worth_something(induction, induction_data) -> None:
    moments = unweave.channel_moments(induction, induction_data, SCOPE)
    spaces = unweave.node_subspaces(induction, moments)[HEAD]
    ax = plots.spectrum(spaces)
    assert legend_of(ax) == list(spaces)
    for line, space in zip(ax.get_lines(), spaces.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), space.nats[: space.rank])
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, space.rank + 1))


def test_tail_is_the_survival_function(faithfulness) -> None:
    row = faithfulness["small"]
    assert len(row.worst) == row.n_tokens  # all of them
    nats, share = plots.kl_tail(faithfulness).get_lines()[0].get_data()
    every = np.array([worst[0] for worst in row.worst])
    assert len(nats) == (every > 0).sum()
    for x, y in list(zip(nats, share, strict=True))[:: max(1, len(nats) // 20)]:
        if (every == x).sum() == 1:  # one of equal values stands in the middle of a step
            assert y == pytest.approx((every >= x).mean())
    assert nats[-1] == row.kl_max


def test_tail_goes_on_with_the_quantiles(faithfulness) -> None:
    row = dataclasses.replace(faithfulness["small"], kl_p99=0.5, kl_p999=1.0, kl_max=3.0, worst=(), n_tokens=10_000)
    nats, share = plots.kl_tail(row).get_lines()[0].get_data()
    np.testing.assert_allclose([nats, share], [[0.5, 1.0, 3.0], [1e-2, 1e-3, 1e-4]])


# ---- points and bars ------------------------------------------------------------------------------------


def test_effects_of_every_edge_lie_where_they_were_measured(induction, scores, exact) -> None:
    ax = plots.attributed_measured(scores, exact)
    kept = induction.edge_matrix
    want = np.stack([scores.nats[kept].numpy(), exact.nats[kept].numpy()], axis=1)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), want)
    (line,) = ax.get_lines()
    start, end = line.get_transform().transform([[0.0, 0.0], [1.0, 1.0]])
    for value in (1e-9, 1e-5, 1e-3, 1.0):
        along, equal = end - start, ax.transData.transform((value, value)) - start
        assert abs(np.cross([*along, 0], [*equal, 0])[2]) < 1e-6 * float(along @ along)
    for scale in (ax.xaxis, ax.yaxis):
        assert scale.get_scale() == "symlog"


def test_only_measured_edges_are_compared(induction, induction_data, scores) -> None:
    some = unweave.score_edges(induction, induction_data, SCOPE, measure_top=5)
    assert len(plots.attributed_measured(scores, some).collections[0].get_offsets()) == int(some.measured.sum()) == 5


def test_effects_of_a_prediction_are_apart_by_circuit() -> None:
    points = [
        {"edge": "a->b.in", "attributed": 0.25, "measured": 0.5, "kept": True},
        {"edge": "a->c.in", "attributed": -0.1, "measured": 0.0, "kept": False},
    ]
    ax = plots.attributed_measured(Prediction(points, 1.0, 1.0, 1.0))
    inside, outside = ax.collections
    assert inside.get_offsets().tolist() == [[0.25, 0.5]]
    assert outside.get_offsets().tolist() == [[-0.1, 0.0]]
    assert legend_of(ax) == ["in the circuit", "outside", "equal"]
    assert draw(ax)


def test_bars_have_the_values_and_intervals() -> None:
    groups = {"a": {"x": Estimate(1.0, 0.5, 2.0), "y": Estimate(3.0, 2.5, 3.5)}, "b": {"x": Estimate(-1.0, -2.0, 0.0), "y": Estimate(*[math.nan] * 3)}}  # fmt: skip
    ax = plots.interval_bars(groups, unit="nats")
    widths = [[bar.get_width() for bar in container.patches] for container in ax.containers if hasattr(container, "patches")]  # fmt: skip
    np.testing.assert_allclose(widths, [[1.0, -1.0], [3.0, math.nan]])
    ends = [bars.get_segments() for c in ax.containers if hasattr(c, "lines") for bars in c.lines[2]]
    np.testing.assert_allclose([s[:, 0] for s in ends[0]], [[0.5, 2.0], [-2.0, 0.0]])
    assert labels_of(ax.yaxis) == ["a", "b"]
    assert ax.yaxis_inverted()
    heights = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches)
    assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(heights))
    assert draw(ax)


def test_scrubbed_and_interchange_bars(induction, induction_data) -> None:
    found = scrub(induction, induction_data, Hypothesis(dict.fromkeys(induction.writers)), SCOPE, form="dag")
    ax = plots.scrubbed_bars({"everything": found})
    assert [bar.get_width() for bar in ax.patches] == [found.loss_recovered.value, found.recovered.value]
    one, other = (Accuracy(Estimate(x, x - 0.1, x + 0.1), *[Estimate(0.0, 0.0, 0.0)] * 2, 5, 6) for x in (0.9, 0.2))
    three = dataclasses.replace(other, effective=Estimate(0.4, 0.3, 0.5))
    swapped = Interchange({"x": one}, {"x": (other, three)}, {"x": other}, one.effective, 8)
    ax = plots.interchange_bars(swapped)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [0.9, 0.3, 0.2])
    spans = [bars.get_segments()[0][:, 0] for c in ax.containers if hasattr(c, "lines") for bars in c.lines[2]]
    np.testing.assert_allclose(spans, [[0.8, 1.0], [0.2, 0.4], [0.1, 0.3]])
    none = dataclasses.replace(swapped, elsewhere={"x": ()})
    assert draw(plots.interchange_bars(none))


# ---- matrices -------------------------------------------------------------------------------------------


def test_edge_matrix_has_every_edge_in_its_place(induction, scores) -> None:
    ax = plots.edge_matrix(scores)
    shown = ax.images[0].get_array()
    assert np.array_equal(~np.ma.getmaskarray(np.ma.masked_invalid(shown)), induction.edge_matrix.numpy())
    kept = induction.edge_matrix.numpy()
    np.testing.assert_allclose(np.asarray(shown)[kept], scores.nats.abs().numpy()[kept])
    assert (labels_of(ax.yaxis), labels_of(ax.xaxis)) == (list(induction.ports), list(induction.writers))
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "nats per token"


def test_block_matrix_puts_modules_together(induction, induction_data) -> None:
    found = unweave.find_modules(induction, induction_data, SCOPE, nulls=())
    ax = plots.block_matrix(found)
    order = [node for nodes in found.partition.blocks.values() for node in nodes]
    assert labels_of(ax.xaxis) == labels_of(ax.yaxis) == order
    shown = np.ma.filled(np.ma.masked_invalid(ax.images[0].get_array()), 0.0)
    for j, dst in enumerate(order):
        for i, src in enumerate(order):
            assert shown[j, i] == pytest.approx(found.communication.between(src, dst)[0])
    frames = [(p.get_x() + 0.5, p.get_width()) for p in ax.patches]
    starts = np.cumsum([0, *(len(nodes) for nodes in found.partition.blocks.values())])
    assert frames == list(zip(starts[:-1], np.diff(starts), strict=True))


def test_attention_pattern_is_the_recorded_one(induction, induction_data) -> None:
    run = unweave.run(induction, induction_data.tokens[:2], record=[f"{HEAD}.pattern"])
    ax = plots.attention_pattern(run, HEAD, HOSTILE, sequence=1)
    n = len(HOSTILE)
    shown = np.ma.filled(np.ma.masked_invalid(ax.images[0].get_array()), 0.0)
    np.testing.assert_allclose(shown, run.values[f"{HEAD}.pattern"][1, :n, :n].numpy(), atol=1e-6)
    assert labels_of(ax.xaxis) == [plain(token, blanks=True) for token in HOSTILE]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("to", "from")
    assert draw(ax)


def test_usage_of_a_text(usage) -> None:
    ax = plots.token_usage(usage, 2, k=3)
    text = usage.text(2)
    best = sorted(usage.columns, key=lambda part: -text[part].sum())[:3]
    rows = [part for part in usage.columns if part in best]
    assert labels_of(ax.yaxis) == rows
    np.testing.assert_allclose(ax.images[0].get_array(), text[rows].to_numpy().T)
    assert labels_of(ax.xaxis) == [plain(token, blanks=True) for token in text["string"]]
    assert draw(ax)
    chosen = plots.token_usage(usage, 2, [HEAD, "embed"])
    assert labels_of(chosen.yaxis) == [HEAD, "embed"]


# ---- labels, colours, figures ---------------------------------------------------------------------------


def test_hostile_names_are_drawn_as_they_are() -> None:
    curves = {name: [(0.5, Estimate(0.1, 0.05, 0.2))] for name in HOSTILE}
    ax = plots.rate_distortion(curves)
    assert len(legend_of(ax)) == len(HOSTILE)
    assert legend_of(ax)[0] == "$x_1$"
    assert draw(ax)
    assert draw(plots.interval_bars({name: {name: Estimate(1.0, 0.5, 2.0)} for name in ["$a_1$"]}))
    value = (Estimate(0.5, 0.4, 0.6), Estimate(1.0, 1.0, 1.0))
    curve = FaithfulnessCurve((0.1, 1.0), (8, 80), value, (1.0, 0.0), 0.6, 0.3)
    assert draw(plots.circuit_sizes(dict.fromkeys(HOSTILE, curve)))
    assert draw(plots.spectrum(dict.fromkeys(HOSTILE, Subspace(torch.eye(2), torch.tensor([1.0, 0.5])))))


@pytest.mark.parametrize("token", HOSTILE)
def test_a_label_is_one_short_line_of_letters_that_the_font_has(token: str) -> None:
    label = plain(token, blanks=True)
    assert len(label) <= 100
    assert not set(label) & set("\n\r\t\x00\x1b\u202e\u4e2d ")
    assert label or not token


def test_many_labels_are_thinned_out(induction) -> None:
    ax = Figure().subplots()
    names = [f"n{k}" for k in range(1000)]
    plots.style.label_ticks(ax.xaxis, names)
    places = [int(place) for place in ax.get_xticks()]
    assert len(places) <= 64
    assert labels_of(ax.xaxis) == [names[k] for k in places]


@pytest.mark.parametrize("colour", [*COLOURS, GREY])
def test_colours_stand_out_on_white_and_black(colour: str) -> None:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    light = float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    assert 1.05 / (light + 0.05) >= 3  # WCAG 2.1: graphical objects
    assert (light + 0.05) / 0.05 >= 3


def test_series_are_told_apart_without_colour() -> None:
    kinds = [(s["marker"], s["linestyle"]) for s in styles(7)]
    assert len(set(kinds)) == 7
    assert len({tuple(s.values()) for s in styles(140)}) == 140


def test_pictures_follow_the_style_in_use(scores) -> None:
    with style.context("dark_background"):
        ax = plots.interval_bars({"a": {"x": Estimate(1.0, 0.5, 2.0)}})
        for text in (ax.xaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()):
            assert to_rgb(text.get_color()) == (1.0, 1.0, 1.0)
        assert to_rgb(ax.get_facecolor()) == (0.0, 0.0, 0.0)
        (errors,) = next(c for c in ax.containers if hasattr(c, "lines")).lines[2]
        assert to_rgb(errors.get_color()[0]) == (1.0, 1.0, 1.0)
        assert draw(plots.edge_matrix(scores))


def test_pictures_are_drawn_on_the_axes_given(induction, induction_data, scores, exact, usage, faithfulness) -> None:
    run = unweave.run(induction, induction_data.tokens[:1, :6], record=[f"{HEAD}.pattern"])
    figure = Figure()
    ax = figure.subplots(2, 4).flatten()
    pictures = [
        plots.rate_distortion(CURVES, ax[0]),
        plots.attributed_measured(scores, exact, ax[1]),
        plots.edge_matrix(scores, ax[2]),
        plots.kl_tail(faithfulness, ax[3]),
        plots.attention_pattern(run, HEAD, list("abcdef"), ax[4]),
        plots.token_usage(usage, 0, None, ax[5]),
        plots.interval_bars({"a": {"x": Estimate(1.0, 0.5, 2.0)}}, ax[6]),
        plots.spectrum(Subspace(torch.eye(2), torch.tensor([1.0, 0.5])), ax[7]),
    ]
    assert pictures == list(ax)
    assert len(figure.axes) == 8 + 3  # colour bars


def test_no_figure_outlives_its_picture(scores) -> None:
    left = weakref.ref(plots.edge_matrix(scores).figure)
    gc.collect()
    assert left() is None


def test_settings_are_left_alone(scores) -> None:
    def settings() -> dict[str, object]:
        return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}  # to ask for it is to choose

    with rc_context():
        before = settings()
        draw(plots.edge_matrix(scores))
        assert settings() == before


def test_log_scale_of_colours() -> None:
    assert log_norm(np.array([0.0, -1.0, np.nan])) is None
    norm = log_norm(np.array([1e-9, 0.0, 1.0, np.nan]), decades=4.0)
    assert (norm.vmin, norm.vmax) == (1e-4, 1.0)
    assert log_norm(np.array([2.0])).vmin < 2.0


# ---- refusals -------------------------------------------------------------------------------------------


def test_refusals(induction, induction_data, scores, exact, usage, faithfulness) -> None:
    other = unweave.capture("zoo:modular_addition")
    elsewhere = dataclasses.replace(scores, graph=other)
    nothing = dataclasses.replace(scores, nats=torch.zeros_like(scores.nats))
    run = unweave.run(induction, induction_data.tokens[:1, :6], record=[f"{HEAD}.pattern"])
    one = {"x": Estimate(1.0, 0.5, 2.0)}
    for message, refused in {
        "no curve": lambda: plots.rate_distortion({}),
        "at least one method": lambda: plots.rate_distortion({"a": []}),
        "one FaithfulnessCurve": lambda: plots.circuit_sizes({}),
        "no spectrum": lambda: plots.spectrum(Subspace(torch.eye(2), torch.zeros(2))),
        "no tail": lambda: plots.kl_tail(faithfulness["original"]),
        "give measured effects": lambda: plots.attributed_measured(scores),
        "of one graph": lambda: plots.attributed_measured(scores, elsewhere),
        "no edge has both": lambda: plots.attributed_measured(exact, scores),
        "no edge is worth": lambda: plots.edge_matrix(nothing),
        "at least one group": lambda: plots.interval_bars({}),
        "must have the kinds": lambda: plots.interval_bars({"a": one, "b": {"y": one["x"]}}),
        "7 kinds": lambda: plots.interval_bars({"a": {str(k): one["x"] for k in range(7)}}),
        "sequences 0 to 0, got 1": lambda: plots.attention_pattern(run, HEAD, ["a"], sequence=1),
        "1 to 6 of them, got 7": lambda: plots.attention_pattern(run, HEAD, list("abcdefg")),
        "1 to 6 of them, got 0": lambda: plots.attention_pattern(run, HEAD, []),
        "at least 1, got 0": lambda: plots.token_usage(usage, k=0),
        "no token of sequence -1": lambda: plots.token_usage(usage, -1),
    }.items():
        with pytest.raises(InputError, match=message):
            refused()
    with pytest.raises(UnknownNameError, match=HEAD):
        plots.attention_pattern(run, "blocks.1.attn.head.0", ["a"])
    with pytest.raises(UnknownNameError, match="embed"):
        plots.token_usage(usage, 0, ["embde"])


def test_every_picture_is_tested_and_documented() -> None:
    own, page = Path(__file__).read_text(), (Path(__file__).parent.parent / "docs/plots.md").read_text()
    for name in plots.__all__:
        assert f"plots.{name}(" in own
        assert f"::: unweave.plots.{name}\n" in page


def test_quantities_along_training_are_drawn_with_where_they_form() -> None:
    steps = list(range(0, 200, 10))
    rows = [
        {"step": s, "quantity": "edge nats", "part": name, "value": height * (s > 95)}
        for s in steps
        for name, height in (("a->b.q", 2.0), ("a->b.k", 0.0))
    ]
    ax = plots.along_training(rows, "edge nats", ["a->b.q"])
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == steps
    assert line.get_ydata().tolist() == [2.0 * (s > 95) for s in steps]
    (band,) = ax.patches
    assert 80 <= band.get_x() <= 100 <= band.get_x() + band.get_width() + 10 <= 130
    assert len(plots.along_training(rows, "edge nats").get_lines()) == 2
    with pytest.raises(UnknownNameError, match="edge nats"):
        plots.along_training(rows, "edge nat")
    with pytest.raises(InputError, match="no rows"):
        plots.along_training([], "edge nats")
