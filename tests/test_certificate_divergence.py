"""The largest KL that bounds of logit differences allow, against grids and random logits; what splitting goes by."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import unweave
from unweave import storage
from unweave.certificates import certify_boxes
from unweave.certificates.bounds import Boxes, Functional, blame_inputs, layer_bounds, upper_bounds
from unweave.certificates.chains import pair_up
from unweave.certificates.divergence import PairBounds, largest_kl, peak, two_output_kl
from unweave.cli import app
from unweave.execution import run

D = torch.float64


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the model's logits b from the graph's a, in the plainest way."""
    p, q = b.softmax(-1), a.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def pair_bounds(a: torch.Tensor, b: torch.Tensor) -> PairBounds:
    """The ranges of all pairs of logits over points ``[box point output]``."""
    i, j = torch.triu_indices(a.shape[-1], a.shape[-1], 1)

    def ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        apart = x[..., i] - x[..., j]
        return apart.amin(1), apart.amax(1)

    return PairBounds(i, j, ends(b), ends(a), ends(a - b))


@given(m=st.floats(-12, 12), d=st.floats(-12, 12))
@settings(deadline=None, max_examples=60)
def test_two_outputs_have_the_kl_of_two_outputs(m, d):
    b = torch.tensor([m, 0.0], dtype=D)
    a = b + torch.tensor([d, 0.0], dtype=D)
    assert float(two_output_kl(b[0], a[0] - b[0])) == pytest.approx(float(kl(a, b)), abs=1e-12)


@given(d=st.floats(-40, 40).filter(lambda d: abs(d) > 1e-3))
@settings(deadline=None, max_examples=80)
def test_a_change_costs_most_at_its_peak_and_less_on_both_sides(d):
    m = torch.linspace(-60, 60, 6001, dtype=D)
    change = torch.full_like(m, d)
    values = two_output_kl(m, change)
    top = float(two_output_kl(peak(change[:1]), change[:1]))
    assert float(values.max()) <= top * (1 + 1e-9) + 1e-15
    assert top <= float(values.max()) * 1.001
    rises = values.diff()[values[1:] > 1e-6 * top]
    assert bool((rises[m[1:][values[1:] > 1e-6 * top] < float(peak(change[:1])) - 0.02] > -1e-13).all())
    assert bool((rises[m[1:][values[1:] > 1e-6 * top] > float(peak(change[:1])) + 0.04] < 1e-13).all())


@given(
    m=st.tuples(st.floats(-9, 9), st.floats(0, 8)),
    d=st.tuples(st.floats(-6, 3), st.floats(0, 6)),
    cut=st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
)
@settings(deadline=None, max_examples=60)
def test_of_two_outputs_the_bound_is_the_maximum(m, d, cut):
    """Over all m and d of their ranges whose sum is in the graph's."""
    (ml, mu), (dl, du) = (m[0], m[0] + m[1]), (d[0], d[0] + d[1])
    al, au = (ml + dl + share * (mu + du - ml - dl) for share in cut)
    grid = torch.cartesian_prod(torch.linspace(ml, mu, 161, dtype=D), torch.linspace(dl, du, 161, dtype=D))
    inside = (grid.sum(1) >= al) & (grid.sum(1) <= au)
    most = float(two_output_kl(*grid[inside].unbind(1)).max()) if bool(inside.any()) else 0.0
    ends = [
        (torch.tensor([[low]], dtype=D), torch.tensor([[high]], dtype=D))
        for low, high in ((ml, mu), (al, au), (dl, du))
    ]
    bound, parts = largest_kl(PairBounds(torch.tensor([0]), torch.tensor([1]), *ends), 2)
    assert most <= float(bound) + 1e-12
    assert float(bound) <= float(parts) + 1e-12
    if bool(inside.any()):  # no more than over the sums that are as near as a strip and a step of the grid
        slack = m[1] / 16 + (m[1] + d[1]) / 80 + 1e-9
        near = (grid.sum(1) >= al - slack) & (grid.sum(1) <= au + slack)
        assert float(bound) <= 1.1 * float(two_output_kl(*grid[near].unbind(1)).max()) + 1e-3


@given(n=st.integers(2, 5), seed=st.integers(0, 10_000), size=st.sampled_from([0.05, 1.0, 5.0]))
@settings(deadline=None, max_examples=60)
def test_no_logits_within_the_bounds_have_more(n, seed, size):
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(4, 1, n, dtype=D, generator=generator)
    b = centre + size * torch.randn(4, 400, n, dtype=D, generator=generator)
    a = b + size * torch.randn(4, 1, n, dtype=D, generator=generator) * torch.rand(
        4, 400, 1, dtype=D, generator=generator
    )
    bound, parts = largest_kl(pair_bounds(a, b), n)
    assert bool((kl(a, b).amax(1) <= bound + 1e-12).all())
    assert parts.shape == (4, n * (n - 1) // 2)


@pytest.mark.parametrize(("n", "factor"), [(2, 1 + 1e-6), (3, 1.2), (5, 1.2)])
def test_at_one_point_the_bound_is_near_the_kl(n, factor):
    generator = torch.Generator().manual_seed(n)
    b = 2 * torch.randn(50, 1, n, dtype=D, generator=generator)
    a = b + 0.1 * torch.randn(50, 1, n, dtype=D, generator=generator)
    bound, _ = largest_kl(pair_bounds(a, b), n)
    value = kl(a, b)[:, 0]
    assert bool((value <= bound * (1 + 1e-9)).all())
    assert bool((bound <= factor * value + 1e-12).all())


def perceptron(seed: int, change: float = 0.0) -> unweave.Graph:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[:, 2] = 0.0  # an input that nothing hears
        for p in model.parameters():
            p += change * torch.randn_like(p) * (p != 0)
    return unweave.capture(model, verify=False)


def test_blame_is_what_plain_loops_say():
    pair = pair_up(perceptron(0, 0.2), perceptron(0))
    low = torch.tensor([[-1.0, -0.5, -1.0], [0.0, -2.0, 0.5]], dtype=D)
    boxes = Boxes(low, low + torch.tensor([2.0, 1.5, 1.0], dtype=D))
    layers = layer_bounds(pair, boxes)
    rows = torch.tensor([[[1.0, -1.0, 0.0]], [[0.0, 1.0, -1.0]]], dtype=D)
    blame = blame_inputs(pair, boxes, layers, Functional(torch.zeros_like(rows), rows))
    assert bool((blame[:, 2] == 0).all())
    assert float(blame.sum()) > 0
    for box in range(2):
        on_last = rows[box, 0] @ pair.graph.maps[2].weight  # of the difference of the last hidden layer
        on_both = rows[box, 0] @ (pair.graph.maps[2].weight - pair.original.maps[2].weight)
        layer, wanted = layers[1], torch.zeros(3, dtype=D)
        for n in range(5):
            if layer.paired[box, n]:
                missed = abs(on_both[n]) * layer.of_original.gap[box, n]
                missed = missed + abs(on_last[n]) * layer.of_difference.gap[box, n]
            else:
                missed = abs(on_both[n] - on_last[n]) * layer.of_original.gap[box, n]
                missed = missed + abs(on_last[n]) * layer.of_graph.gap[box, n]
            moves = layer.forms[box, n].abs() * (boxes.high - boxes.low)[box]
            wanted += missed * moves / moves.sum()
        alone = layers_without_first(layers)
        last = blame_inputs(pair, boxes, alone, Functional(torch.zeros_like(rows), rows))[box]
        assert torch.allclose(last, wanted)


def layers_without_first(layers):
    """The first layer with lines that miss nothing: what is left is the blame of the others."""
    import dataclasses

    exact = [
        dataclasses.replace(lines, gap=torch.zeros_like(lines.gap))
        for lines in (layers[0].of_original, layers[0].of_graph, layers[0].of_difference)
    ]
    first = dataclasses.replace(layers[0], of_original=exact[0], of_graph=exact[1], of_difference=exact[2])
    return [first, *layers[1:]]


@pytest.mark.parametrize("seed", range(3))
def test_what_lines_miss_is_no_less_than_what_the_bound_misses(seed):
    """The bound less the largest value there is is at most what all lines miss on its way."""
    pair = pair_up(perceptron(seed, 0.2), perceptron(seed))
    low = torch.tensor([[-1.0, -0.5, -1.0]], dtype=D)
    boxes = Boxes(low, low + 1.0)
    layers = layer_bounds(pair, boxes)
    rows = torch.tensor([[[1.0, -1.0, 0.0]]], dtype=D)
    of = Functional(torch.zeros_like(rows), rows)
    bound, _ = upper_bounds(pair, boxes, layers, of)
    x = low + torch.rand(20_000, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    most = float((pair.difference(x) @ rows[0, 0]).max())
    assert most <= float(bound)
    assert float(bound) - most <= float(blame_inputs(pair, boxes, layers, of).sum()) + 1e-2


@pytest.mark.parametrize("quantity", ["output", "kl"])
def test_more_boxes_bring_the_bound_nearer_and_no_more_are_bounded(quantity):
    graph, model = perceptron(5, 0.3), perceptron(5)
    low, high = -2 * torch.ones(3), 2 * torch.ones(3)
    options = {"quantity": quantity, "factor": 1.0001, "tolerance": 1e-9}
    bounds = [certify_boxes(graph, model, low, high, limit=n, **options) for n in (1, 17, 1024)]
    assert [c.n_boxes <= n + 1 for c, n in zip(bounds, (1, 17, 1024), strict=True)] == [True] * 3
    assert bounds[0].bound == bounds[0].unsplit_bound
    assert bounds[0].bound > bounds[1].bound > bounds[2].bound >= bounds[2].found
    assert bounds[2].tightness < 1.5


def test_a_sure_model_is_searched_where_it_is_least_sure():
    """Nearly everywhere the KL is below what float64 can tell from 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight *= 300
        # unsure on a thin line only
        model[2].bias -= model(torch.tensor([[0.8, 0.7]]))[0]
    one = unweave.capture(model, verify=False)
    with torch.no_grad():
        model[2].weight += 0.3 * torch.randn_like(model[2].weight)
    other = unweave.capture(model, verify=False)
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    x = torch.cartesian_prod(*[torch.linspace(-1, 1, 801, dtype=D)] * 2)
    a, b = (run(g.to(dtype=D), x[:, None]).logits[:, 0] for g in (other, one))
    most = float(two_output_kl(b[:, 0] - b[:, 1], (a - b)[:, 0] - (a - b)[:, 1]).max())
    found = certify_boxes(other, one, low, high, quantity="kl", limit=2000, tolerance=1e-9)
    assert most > 1e-4
    assert 0.99 * most <= found.found <= found.bound <= 2 * found.found


# ---- the command ----------------------------------------------------------------------------------------


def certify(folders, room, *options):
    args = ["certify", folders[room], "--model", f"zoo:{room}", *options]
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Graph folders of a network of reals and of one of tokens."""
    out = {}
    for room in ("retina", "induction"):
        model, data = unweave.capture(f"zoo:{room}"), unweave.load_data(f"zoo:{room}", limit=32)
        out[room] = tmp_path_factory.mktemp("certify") / room
        storage.save_graph(unweave.compress(model, data, size=0.8, progress=False), out[room])
    return out


def test_the_command_bounds_a_box_and_writes_what_it_found(folders):
    done = certify(folders, "retina", "--box", "-1,1", "--limit", 130)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    written = json.loads((folders["retina"] / "certificate.json").read_text())
    graph, model = storage.load_graph(folders["retina"]), unweave.capture("zoo:retina")
    for row in written["rows"]:
        direct = certify_boxes(
            graph, model, -torch.ones(8), torch.ones(8), quantity=row["quantity"], limit=130, tolerance=1e-9
        )
        assert row["bound"] == pytest.approx(direct.bound)
        assert row["found_at"] == pytest.approx(direct.found_at.tolist())
        assert f"{direct.bound:.3g}" in done.output
    assert written["box"] == [-1.0, 1.0]
    assert "--limit" in done.output


def test_the_command_tries_all_inputs(folders, tmp_path):
    path = tmp_path / "c.json"
    done = certify(folders, "induction", "--all-inputs", "0, 1-6 ,*", "--positions", "last", "-o", path)
    assert done.exit_code == 0, done.output
    written = json.loads(path.read_text())
    assert written["n_inputs"] == written["n_positions"] == 6 * 48
    graph, model = storage.load_graph(folders["induction"]), unweave.capture("zoo:induction")
    x = torch.cartesian_prod(torch.tensor([0]), torch.arange(1, 7), torch.arange(48))
    nats = kl(*(run(g, x).logits[:, -1].double() for g in (graph, model)))
    assert written["worst_nats"] == pytest.approx(float(nats.max()), rel=1e-5)
    assert written["worst_input"] == x[nats.argmax()].tolist()
    assert max(map(len, done.output.splitlines())) <= 80
    all_positions = certify(folders, "induction", "--all-inputs", "0,1-6,*", "-o", path)
    assert all_positions.exit_code == 0
    assert json.loads(path.read_text())["n_positions"] == 3 * 6 * 48


@pytest.mark.parametrize(
    ("room", "options", "match"),
    [
        ("retina", [], "either --box"),
        ("retina", ["--box", "-1,1", "--all-inputs", "0"], "either --box"),
        ("retina", ["--box", "1"], "two numbers"),
        ("retina", ["--box", "a,b"], "two numbers"),
        ("retina", ["--box", "1,-1"], "box 0 is empty"),
        ("retina", ["--all-inputs", "0,1"], "use --box"),
        ("induction", ["--box", "-1,1"], "use --all-inputs"),
        ("induction", ["--all-inputs", "0,1-b"], "for each position"),
        ("induction", ["--all-inputs", "0,,1"], "for each position"),
        ("induction", ["--all-inputs", "0,5-3"], "position 1 has no token"),
        ("induction", ["--all-inputs", "0,99"], "outside the vocabulary"),
        ("induction", ["--all-inputs", "0", "--positions", "first"], "all or last"),
        ("induction", ["--all-inputs", "*,*,*"], "limit"),
    ],
)
def test_the_command_refuses(folders, room, options, match):
    done = certify(folders, room, *options)
    assert done.exit_code == 1
    assert match in " ".join(done.output.split())
