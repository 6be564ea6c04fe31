"""The circuit of a convolutional network from the command line, and its page: kernels as pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, chromium, in_browser, open_report
from report_fixtures import report_data
from residual_networks import networks
from torch import nn
from typer.testing import CliRunner

import unweave
from unweave import zoo
from unweave.annotations import kernels as annotated_kernels
from unweave.annotations import page_kind, with_kernels
from unweave.cli import app
from unweave.data import float_data
from unweave.dissection import proof_prompts
from unweave.errors import InputError
from unweave.kernels import kernels_between, kernels_into
from unweave.report import validate_report_data, write_report
from unweave.storage import load_graph, load_results

__all__ = ["chromium"]  # a fixture of all browser tests


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cnn") / "circuit"
    done = invoke("circuit", "zoo:oriented_shapes", "--prompts", 16, "--level", "node", "--edges", 40, "-o", path)
    assert done.exit_code == 0, done.output
    assert "faithfulness" in done.output
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return dict(load_results(folder))


# ---- a circuit without a task ---------------------------------------------------------------------------


def test_the_folder_is_a_circuit_proved_on_the_other_half(folder: Path, results: dict[str, Any]) -> None:
    assert load_graph(folder).n_edges <= 40
    rows = {row["what"]: row["value"] for row in results["proof"]}
    assert "chance" not in rows  # nothing is asked that could be right
    assert results["title"] == "zoo:oriented_shapes: its own data"
    assert results["scope"]["n_tokens_held_out"] == results["scope"]["n_tokens_calibration"] == 8
    original = unweave.capture("zoo:oriented_shapes")
    again, scope = proof_prompts(results["provenance"], original) or pytest.fail("cannot be loaded again")
    everything = unweave.load_data("zoo:oriented_shapes", limit=16)
    held_out = {tuple(row) for row in again.tokens[:, 0].tolist()}
    assert len(held_out) == 8
    assert held_out < {tuple(row) for row in everything.tokens[:, 0].tolist()}
    # the proof's own figure, from these images and the stored graph alone
    with torch.no_grad():
        clean = unweave.run(original, again.tokens).logits.log_softmax(-1).double()
        cut = unweave.run(load_graph(folder), again.tokens).logits.log_softmax(-1).double()
    nats = float((clean.exp() * (clean - cut)).sum(-1).mean())
    assert scope.positions == "answered"
    assert rows["divergence, nats per token"] == pytest.approx(nats, rel=1e-3)


def test_images_from_a_file_and_a_network_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    zoo.save(zoo.make_cnn(zoo.CnnConfig((2, 6, 6), (3, 3), (3, 2), 4)), tmp_path / "model")
    images = torch.randn(24, 2, 6, 6)
    np.save(tmp_path / "images.npy", images.double().numpy())
    args = ["circuit", tmp_path / "model", "--data", tmp_path / "images.npy", "--edges", 9, "--prompts", 20]
    done = invoke(*args, "-o", tmp_path / "c")
    assert done.exit_code == 0, done.output
    facts = load_results(tmp_path / "c")
    assert facts["scope"]["positions"] == "all"
    assert facts["title"].endswith(": images.npy")
    data = float_data(images[:20].flatten(1))
    model = unweave.capture(tmp_path / "model")
    again, _ = proof_prompts(facts["provenance"], model) or pytest.fail("it is in the file")
    assert torch.equal(again.tokens, data.split(0.5, 0)[1].tokens)
    assert proof_prompts({k: v for k, v in facts["provenance"].items() if k != "data"}, model) is None
    with pytest.raises(InputError, match=r"reads vectors of 256 numbers \(images of 1 x 16 x 16\), and .* of 72"):
        unweave.dissect("zoo:oriented_shapes", data=data)


def test_plain_text_and_a_label_work_for_token_models(tmp_path: Path) -> None:
    args = ["--at", "last", "--prompts", 8, "--level", "node", "--edges", 24]
    done = invoke("circuit", "zoo:induction", *args, "-o", tmp_path / "c")
    assert done.exit_code == 0, done.output
    facts = load_results(tmp_path / "c")
    assert facts["scope"]["n_tokens_held_out"] == 4  # one position of each
    assert facts["scope"]["positions"] == "last"
    assert {e["kernel"] for e in facts["edges"] if "kernel" in e} == set()


def test_decompile_says_which_command_to_use(tmp_path: Path) -> None:
    done = invoke("decompile", "zoo:oriented_shapes", "-o", tmp_path / "d", "--sequences", 8, "--held-out", 4)
    assert done.exit_code == 1
    assert "unweave circuit" in " ".join(done.output.split())
    assert not (tmp_path / "d").exists()


# ---- kernels as facts -----------------------------------------------------------------------------------


def test_kernels_on_the_page_are_the_models_own_weights(results: dict[str, Any]) -> None:
    model = zoo.load("oriented_shapes")
    weights = {f"conv{k}": conv.weight for k, conv in enumerate((m for m in model if isinstance(m, nn.Conv2d)), 1)}
    names, seen = [node["name"] for node in results["nodes"]], 0
    for edge in results["edges"]:
        layer, _, reader = names[edge["dst"]].partition(".map.")
        if layer == "output":
            assert "kernel" not in edge
            continue
        writer = names[edge["src"]].partition(".map.")[2] or "0"
        own = weights[layer][int(reader), int(writer)]
        assert torch.allclose(torch.tensor(edge["kernel"]), own, rtol=1e-3, atol=1e-7)
        seen += 1
    assert seen == 12 + 12 * 32
    kinds = {node["name"].partition(".")[0]: node["kind"] for node in results["nodes"]}
    assert kinds == {"input": "embed", "conv1": "map", "conv2": "map", "output": "unembed"}


def every_edge(graph: unweave.Graph) -> list[dict[str, Any]]:
    node = {name: i for i, name in enumerate(graph.nodes)}
    ends = [(e.src, e.dst, e.port) for e in graph.edges]
    return [{"src": node[src], "dst": node[dst], "port": port} for src, dst, port in ends]


def test_kernels_of_residual_networks_hold_their_norms_and_skips() -> None:
    model = networks()["resnet"]
    graph, net = unweave.capture(model), model[1]

    def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
        return convolution.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]

    plain, strided = net.layer1[0], net.layer2[0]
    own = {
        ("input", "conv1"): folded(net.conv1, net.bn1),
        ("conv1", "layer1.0.conv1"): folded(plain.conv1, plain.bn1),
        ("layer1.0.conv1", "layer1.0.conv2"): folded(plain.conv2, plain.bn2),
        ("layer1.0.conv2", "layer2.0.conv1"): folded(strided.conv1, strided.bn1),
        ("layer1.0.conv2", "layer2.0.conv2"): folded(*strided.downsample),
        ("layer2.0.conv1", "layer2.0.conv2"): folded(strided.conv2, strided.bn2),
    }
    seen = set()
    for row in with_kernels(graph, every_edge(graph)):
        (src, _, i), (dst, _, j) = (graph.nodes[row[end]].partition(".map.") for end in ("src", "dst"))
        # the identity of the first block only carries maps on
        assert ("kernel" in row) == ((src, dst) in own)
        if "kernel" in row:
            assert torch.allclose(torch.tensor(row["kernel"]), own[src, dst][int(j), int(i)], rtol=1e-3, atol=1e-6)
            seen.add((src, dst))
    assert seen == set(own)


class TwoWays(nn.Module):
    """A convolution added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(x) + x).flatten(1))


def test_an_edge_of_two_convolutions_has_no_one_kernel() -> None:
    graph = unweave.capture(nn.Sequential(nn.Unflatten(1, (2, 6, 6)), TwoWays()))
    assert list(kernels_between(graph)) == [(0, 1)]
    with pytest.raises(InputError, match="through several convolutions at once"):
        kernels_into(graph, "second")


def test_pictures_are_bounded_and_need_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Sequential(nn.Unflatten(1, (1, 40, 40)), nn.Conv2d(1, 2, 33), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    graph = unweave.capture(wide)
    assert not any("kernel" in row for row in with_kernels(graph, every_edge(graph)))
    graph = unweave.capture("zoo:oriented_shapes")
    edges = every_edge(graph)
    monkeypatch.setattr(annotated_kernels, "MOST_WEIGHTS", 100)
    rows = with_kernels(graph, edges)
    assert sum(len(row["kernel"]) * len(row["kernel"][0]) for row in rows if "kernel" in row) <= 100
    assert sum("kernel" in row for row in rows) == 4  # of 25 weights each
    assert not any("kernel" in edge for edge in edges)  # what was given is left as it was
    monkeypatch.undo()
    small = (nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    finer = unweave.capture(nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *small)).refine({"conv1.map.0": 4})
    assert not any("kernel" in row for row in with_kernels(finer, every_edge(finer)))
    assert {page_kind(stage) for stage in unweave.capture("zoo:induction").stages} == {"embed", "attn", "unembed"}


# ---- hostile data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ([], "1 to 32 rows of one length of 1 to 32, got 0 rows of nothing"),
        ([[]], "got 1 rows of 0"),
        ([[1.0], [1.0, 2.0]], "got 2 rows of 1, 2"),
        ([[0.0] * 33], "got 1 rows of 33"),
        ([[0.0]] * 33, "got 33 rows of 1"),
        ("<svg onload=alert(1)>", r"edges\[0\].kernel must be a list"),
        ([["<b>"]], r"edges\[0\].kernel\[0\]\[0\] must be a number or None"),
        ([[True]], "must be a number or None"),
        ([1.0], r"edges\[0\].kernel\[0\] must be a list"),
        (None, "must be a list"),
    ],
)
def test_kernels_that_are_none_are_refused(kernel: Any, message: str) -> None:
    data = report_data()
    data["edges"][0]["kernel"] = kernel
    with pytest.raises(InputError, match=message):
        validate_report_data(data)


def test_what_is_no_number_becomes_none() -> None:
    data = report_data()
    data["edges"][0]["kernel"] = [[float("nan"), 1], [float("-inf"), 1e300]]
    assert validate_report_data(data)["edges"][0]["kernel"] == [[None, 1], [None, 1e300]]


# ---- the picture ----------------------------------------------------------------------------------------


@pytest.fixture
def open_page(request: pytest.FixtureRequest) -> Iterator[Any]:
    surprises: list[str] = []
    contexts = []

    def opened(path: Path, width: int = 1200, scheme: str = "light", fragment: str = "") -> Any:
        options: dict[str, Any] = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        page = open_report(request.getfixturevalue("chromium"), path, surprises, fragment, **options)
        contexts.append(page.context)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert surprises == []


SQUARE = re.compile(r"M(\d+) (\d+)h1v1h-1z")


def drawn(picture: Any) -> dict[tuple[int, int], float]:
    """(row, column) -> the signed share that its square is shaded by."""
    paths = picture.evaluate(
        "p => [...p.querySelectorAll('path')].map(q => [q.getAttribute('class'), q.style.getPropertyValue('--share'), "
        "q.getAttribute('d')])"
    )
    found = {}
    for sign, share, squares in paths:
        for x, y in SQUARE.findall(squares):
            found[int(y), int(x)] = (-1 if sign == "cold" else 1) * int(share.rstrip("%")) / 100
    return found


@in_browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_table_draws_every_kernel_on_one_scale(open_page: Any, folder: Path, results: dict[str, Any]) -> None:
    page = open_page(folder / "report.html")
    ranked = sorted(results["edges"], key=lambda e: -abs(e["nats"]))[:200]
    pictures = page.locator("#edge-table tbody .kernel")
    assert pictures.count() == sum("kernel" in e for e in ranked)
    largest = max(abs(w) for e in results["edges"] for row in e.get("kernel", []) for w in row)
    with_one = [e for e in ranked if "kernel" in e]
    for place in (0, 7, len(with_one) - 1):
        kernel, got = with_one[place]["kernel"], drawn(pictures.nth(place))
        assert set(got) == {(y, x) for y in range(len(kernel)) for x in range(len(kernel[0]))}
        for (y, x), share in got.items():
            assert share == pytest.approx(kernel[y][x] / largest, abs=0.03)
    assert f"adds +{largest:.2g}" in page.inner_text("#kernel-legend")
    page.get_by_role("button", name="kernel").click()
    first = max((w for row in with_one[0]["kernel"] for w in row), key=abs)
    assert max(drawn(pictures.nth(0)).values(), key=abs) ** 2 >= (first / largest) ** 2 - 0.06
    assert page.locator("h1").inner_text() == "zoo:oriented_shapes: its own data"
    assert "nats per image" in page.inner_text("#summary")
    assert "n/a heads" not in page.inner_text(".about")


@in_browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "dark"), (400, "light")])
def test_a_map_shows_its_kernels_and_the_page_fits(
    open_page: Any, folder: Path, results: dict[str, Any], width: int, scheme: str
) -> None:
    node = next(e["dst"] for e in results["edges"] if e["kept"] and results["nodes"][e["src"]]["name"] == "input")
    page = open_page(folder / "report.html", width, scheme, f"#node={results['nodes'][node]['name']}")
    kept = [e for e in results["edges"] if e["kept"] and node in (e["src"], e["dst"])]
    assert len(kept) >= 2
    assert page.locator("#panel .kernel").count() == 1 + min(8, len(kept) - 1)
    assert page.locator("#page-in .kernel").count() == 1
    assert "feature map" in page.inner_text("#panel")
    box = page.locator("#panel .kernel").first.bounding_box()
    assert box["width"] >= 24
    assert page.evaluate("document.documentElement.scrollWidth") == width
    warm, cold = (
        page.evaluate(
            "([sign]) => { const all = [...document.querySelectorAll(`#edge-table .kernel .${sign}`)];"
            " const top = all.reduce((a, b) => parseFloat(b.style.getPropertyValue('--share')) >"
            " parseFloat(a.style.getPropertyValue('--share')) ? b : a); const c = document.createElement('canvas');"
            " const g = c.getContext('2d'); g.fillStyle = getComputedStyle(top).fill; g.fillRect(0, 0, 1, 1);"
            " return [...g.getImageData(0, 0, 1, 1).data]; }",
            [sign],
        )
        for sign in ("warm", "cold")
    )
    assert warm[0] > warm[2] + 60  # red
    assert cold[2] > cold[0] + 60  # blue


@in_browser
def test_hostile_kernels_do_no_harm(open_page: Any, tmp_path: Path) -> None:
    data = report_data()
    for edge in data["edges"]:
        edge["kernel"] = [[0.0]]
    data["edges"][0]["kernel"] = [[None] * 32] * 32
    data["edges"][1]["kernel"] = [[1e308, -1e308, float("nan")]]
    data["edges"][2]["kernel"] = [[5e-324, 0]]
    page = open_page(write_report(data, tmp_path / "hostile.html"))
    assert page.locator("#edge-table .kernel").count() == 200
    assert page.locator("#edge-table [aria-label*='no number']").count() == 1
    odd = page.locator("#edge-table [aria-label*='+1×10³⁰⁸']")
    assert drawn(odd) == {(0, 0): 1.0, (0, 1): -1.0}
    assert json.dumps(data["edges"][3]["kernel"]) == "[[0.0]]"
    write_report({**data, "edges": data["edges"][:1]}, tmp_path / "one.html")
    assert open_page(tmp_path / "one.html").locator(".kernel path").count() == 0
