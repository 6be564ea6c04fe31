"""Convolutional networks: captured exactly, map by map."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unweave
from unweave.data import float_data
from unweave.errors import CorruptFileError, InputError, ShapeError, UnknownNameError, UnsupportedModelError
from unweave.features import map_responses, match_kernels, match_responses, shuffle_pixels
from unweave.kernels import draw_kernels, expanded_kernels, kernels_into, layers_of_maps
from unweave.ops import Activation, Chain, Context, Convolution, Masked, Placed, Pool
from unweave.retrodiction import PHENOMENA
from unweave.retrodiction.equivariance import CLAIMS, damage, same_images_turned, tune
from unweave.zoo import save, untrained
from unweave.zoo.oriented_shapes import batch, draw
from unweave.zoo.train import train_room

torch.manual_seed(0)


def small_cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (2, 6, 6)),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).eval()


def inputs(n: int = 12, d: int = 72, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ---- the ops against the plainest code ------------------------------------------------------------------


def loop_convolution(x: Tensor, c: Convolution) -> Tensor:
    """One output pixel at a time."""
    maps = torch.nn.functional.pad(x.reshape(-1, *c.size), (c.padding[1],) * 2 + (c.padding[0],) * 2)
    out = torch.zeros(c.kernels.shape[0], *c.out_size, dtype=x.dtype)
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                for m in range(maps.shape[0]):
                    for a in range(c.kernels.shape[2]):
                        for b in range(c.kernels.shape[3]):
                            pixel = maps[m, i * c.stride[0] + a * c.dilation[0], j * c.stride[1] + b * c.dilation[1]]
                            out[o, i, j] += c.kernels[o, m, a, b] * pixel
    return out.flatten()


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": (2, 1)}, {"padding": (1, 2)}, {"dilation": (2, 1), "padding": (1, 0)}],
    ids=["plain", "stride", "padding", "dilation"],
)
def test_a_convolution_is_the_sum_over_windows(options):
    c = Convolution(torch.randn(2, 3, 3, 2, dtype=torch.float64), (5, 4), **options)
    x = torch.randn(c.d_in, dtype=torch.float64)
    truth = loop_convolution(x, c)
    assert c.d_out == len(truth)
    assert torch.allclose(c.apply(x), truth, atol=1e-12)
    assert torch.allclose(c.dense() @ x, truth, atol=1e-12)
    assert c.n_parameters == 2 * 3 * 3 * 2


def test_picking_whole_maps_of_a_convolution_leaves_one():
    c = Convolution(torch.randn(3, 1, 2, 2), (3, 3))
    picked = c.select_outputs(torch.tensor([8, 9, 10, 11, 0, 1, 2, 3]))
    assert isinstance(picked, Convolution)
    assert torch.equal(picked.kernels, c.kernels[[2, 0]])
    rows = torch.tensor([3, 0, -1, 7])
    dense = torch.cat([c.dense(), torch.zeros(1, 9)])
    assert torch.equal(c.select_outputs(rows).dense(), dense[rows])
    shifted = torch.tensor([1, 2, 3, 4])  # as many as a map has, but of two maps
    assert torch.equal(c.select_outputs(shifted).dense(), c.dense()[shifted])


@pytest.mark.parametrize(("kind", "of"), [("max", torch.max), ("average", torch.mean)])
def test_pooling_takes_windows_of_each_node(kind, of):
    x = torch.randn(2, 3, 1, 24)
    pooled = Pool(kind, (4, 6), (2, 3), (2, 3)).forward((x,), Context(torch.zeros(2, 1, 1)))
    truth = [
        of(x[b, n, 0].view(4, 6)[i : i + 2, j : j + 3])
        for b in range(2)
        for n in range(3)
        for i in (0, 2)
        for j in (0, 3)
    ]
    assert torch.allclose(pooled.flatten(), torch.stack(truth))


def test_a_chain_does_its_steps_in_order():
    x = -torch.ones(1, 1, 1, 4)
    steps = (Activation("relu"), Pool("average", (2, 2), (2, 2), (2, 2)))
    assert Chain(steps).forward((x,), Context(x[:, 0])).item() == 0.0
    assert Chain(steps[::-1]).forward((x - torch.tensor([0.0, 0.0, 0.0, -8.0]),), Context(x[:, 0])).item() == 1.0


def test_ops_refuse_what_does_not_fit():
    with pytest.raises(ShapeError, match="do not fit"):
        Convolution(torch.randn(1, 1, 5, 5), (4, 4))
    with pytest.raises(ShapeError, match="do not fit"):
        Pool("max", (2, 2), (3, 3), (1, 1))
    with pytest.raises(InputError, match="unknown pooling 'median'"):
        Pool("median", (2, 2), (1, 1), (1, 1))


# ---- capture --------------------------------------------------------------------------------------------


def difference(model: nn.Sequential, graph: unweave.Graph, x: Tensor) -> float:
    with torch.no_grad():
        return float((unweave.run(graph, x[:, None]).logits[:, 0] - model(x)).abs().max())


def test_nodes_are_maps():
    graph = unweave.capture(small_cnn())
    assert graph.nodes[:5] == ("input.map.0", "input.map.1", "conv1.map.0", "conv1.map.1", "conv1.map.2")
    assert graph.nodes[-3:] == ("conv2.map.3", "linear1", "output")
    assert graph.n_edges == 2 * 3 + 3 * 4 + 4 + 1
    assert difference(small_cnn(), graph, inputs()) < 1e-5


@st.composite
def networks(draw) -> tuple[nn.Sequential, int]:
    maps = draw(st.integers(1, 3))
    size = [draw(st.integers(5, 9)), draw(st.integers(5, 9))]
    layers: list[nn.Module] = [nn.Unflatten(1, (maps, *size))]
    d = maps * size[0] * size[1]
    for _ in range(draw(st.integers(1, 2))):
        after = draw(st.integers(1, 4))
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        options = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2)), "bias": draw(st.booleans())}
        layers.append(nn.Conv2d(maps, after, kernel, dilation=draw(st.integers(1, 2)), **options))
        if draw(st.booleans()):
            norm = nn.BatchNorm2d(after)
            norm.running_mean, norm.running_var = torch.randn(after), torch.rand(after) + 0.5
            layers.append(norm)
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.Identity()])))
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 1, 1)])))
        maps = after
    if draw(st.booleans()):
        layers.append(nn.AdaptiveAvgPool2d(1))
    layers.append(nn.Flatten())
    return nn.Sequential(*layers), d


@settings(max_examples=25, deadline=None, derandomize=True)
@given(networks())
def test_random_networks_are_captured_exactly(found):
    model, d = found
    x = inputs(4, d)
    try:
        with torch.no_grad():
            width = model.eval()(x).shape[1]
    except RuntimeError:  # the maps became smaller than a kernel
        return
    model.append(nn.Linear(width, 3))
    graph = unweave.capture(model)
    assert difference(model, graph, x) < 1e-5


def test_cutting_an_edge_is_zeroing_a_kernel():
    model = small_cnn()
    graph = unweave.capture(model)
    keep = graph.edge_matrix & ~graph.mark_edges(["conv1.map.1->conv2.map.2.in", "input.map.0->conv1.map.2.in"])
    with torch.no_grad():
        model[5].weight[2, 1] = 0.0
        model[1].weight[2, 0] = 0.0
    assert difference(model, graph.restrict(keep, ablation="zero"), inputs()) < 1e-5


def test_cutting_an_edge_to_its_mean_leaves_the_mean_image():
    model, x = small_cnn(), inputs()
    graph, data = unweave.capture(model), float_data(x)
    keep = graph.edge_matrix & ~graph.mark_edges(["conv1.map.1->conv2.map.2.in"])
    cut = graph.restrict(keep, means=unweave.collect_means(graph, data))
    with torch.no_grad():
        maps = model[:5](x)
        mean = maps.clone()
        mean[:, 1] = maps[:, 1].mean(0)
        second = model[5](maps)
        second[:, 2] = model[5](mean)[:, 2]
        truth = model[6:](second)
    assert torch.allclose(unweave.run(cut, x[:, None]).logits[:, 0], truth, atol=1e-5)


def test_scores_circuits_and_evaluation_work_on_maps():
    graph, data = unweave.capture(small_cnn()), float_data(inputs(16))
    exact = unweave.score_edges(graph, data, method="exact", progress=False)
    fisher = unweave.score_edges(graph, data, samples=8, progress=False)
    marked = graph.edge_matrix
    ranks = [s.nats[marked].argsort().argsort().double() for s in (exact, fisher)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8
    circuit = unweave.find_circuit(graph, data, faithfulness=0.8, max_trials=40, progress=False)
    assert 0 < circuit.n_edges < graph.n_edges
    rows = unweave.evaluate({"circuit": circuit.graph}, graph, data, means=circuit.instead.means, progress=False)
    assert rows["circuit"].kl_nats.value == pytest.approx(circuit.nats, rel=1e-3)
    with pytest.raises(InputError, match="kernels are stored once"):
        unweave.compress(graph, data, size=0.5)


def test_maps_are_split_into_pixels_and_change_nothing():
    graph = unweave.capture(small_cnn())
    finer = graph.refine({"conv2.map.1": 4})
    assert "conv2.map.1.part.3" in finer.nodes
    assert isinstance(finer.find("conv2.map.1.part.3")[0].write, Masked)
    assert isinstance(graph.find("conv2.map.1")[0].write, Placed)
    x = inputs()[:, None]
    assert torch.allclose(unweave.run(finer, x).logits, unweave.run(graph, x).logits, atol=1e-5)


def test_a_graph_of_maps_is_saved_and_loaded_bit_for_bit(tmp_path):
    graph = unweave.capture(small_cnn())
    unweave.save_graph(graph, tmp_path / "graph")
    loaded = unweave.load_graph(tmp_path / "graph")
    x = inputs()[:, None]
    assert torch.equal(unweave.run(loaded, x).logits, unweave.run(graph, x).logits)


HEAD = (nn.Unflatten(1, (2, 6, 6)), nn.Conv2d(2, 3, 3))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)], "must begin with nn.Unflatten"),
        ([*HEAD, nn.PReLU(), nn.Flatten(), nn.Linear(48, 2)], r"calls 'prelu' on what .* supported: "),
        ([HEAD[0], nn.Conv2d(2, 4, 3, padding_mode="circular", padding=1), nn.Flatten()], "'circular'"),
        ([HEAD[0], nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)], "does not run on the images .* 3 channels"),
        ([*HEAD, nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()], "without running statistics"),
        ([*HEAD, nn.MaxPool2d(3, ceil_mode=True), nn.Flatten(), nn.Linear(12, 2)], "ceil_mode"),
        ([*HEAD, nn.AvgPool2d(2, divisor_override=3), nn.Flatten(), nn.Linear(12, 2)], "a divisor of its own"),
        ([*HEAD, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(27, 2)], "not in equal windows"),
        ([*HEAD, nn.Linear(4, 2), nn.Flatten(), nn.Linear(24, 2)], "a Linear layer before Flatten"),
        ([*HEAD, nn.ReLU()], "must end with one vector of logits"),
        ([*HEAD, nn.Flatten(2), nn.Linear(16, 2), nn.Flatten()], r"reshaped to \(3, 16\)"),
        ([*HEAD, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(48, 2)], "slope 0.2"),
        ([*HEAD, nn.Dropout(), nn.MaxPool2d(2, dilation=2), nn.Flatten()], "dilated pooling"),
    ],
)
def test_what_cannot_be_captured_is_refused_by_name(layers, message):
    with pytest.raises(UnsupportedModelError, match=message):
        unweave.capture(nn.Sequential(*layers))


# ---- kernels as pictures --------------------------------------------------------------------------------


def test_kernels_are_the_models_with_the_norm_in_them_and_cut_ones_are_zero():
    model = small_cnn()
    model[2].running_mean, model[2].running_var = torch.randn(3), torch.rand(3) + 0.5
    graph = unweave.capture(model)
    scale = model[2].weight / (model[2].running_var + model[2].eps).sqrt()
    assert torch.allclose(kernels_into(graph, "conv1"), model[1].weight * scale[:, None, None, None], atol=1e-6)
    second = kernels_into(graph, "conv2", ["conv1.map.2->conv2.map.1.in"])
    assert torch.equal(second[1, 2], model[5].weight[1, 2])
    assert int((second != 0).sum()) == 4
    cut = graph.restrict(graph.edge_matrix & ~graph.mark_edges(["conv1.map.2->conv2.map.1.in"]), ablation="zero")
    assert torch.equal(kernels_into(cut, "conv2") + second, model[5].weight)
    assert layers_of_maps(graph) == {"conv1": 1, "conv2": 2}


def test_expanded_kernels_are_the_linear_networks_own():
    """Brute force: the response of one output pixel to every input pixel by itself."""
    torch.manual_seed(3)
    first, second = nn.Conv2d(2, 3, 2, stride=2, bias=False), nn.Conv2d(3, 4, 2, dilation=2, bias=False)
    linear = nn.Sequential(first, nn.AvgPool2d(2, 1), second)
    model = nn.Sequential(nn.Unflatten(1, (2, 10, 10)), *linear, nn.Flatten(), nn.Linear(16, 2))
    expanded = expanded_kernels(unweave.capture(model), "conv2")
    impulses = torch.eye(200).view(200, 2, 10, 10)
    with torch.no_grad():
        response = linear(impulses)[:, :, 0, 0].T.view(4, 2, 10, 10)
    height, width = expanded.shape[2:]
    assert (height, width) == (8, 8)
    assert torch.allclose(expanded, response[:, :, :8, :8], atol=1e-6)
    assert float(response[:, :, 8:].abs().max()) == 0.0


def test_a_picture_has_a_square_for_each_weight():
    kernels = torch.tensor([[[[1.0, -1.0], [0.0, 0.5]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    picture = draw_kernels(kernels, pixel=3, names=(["<a>", "b"], ["image"]))
    root = ElementTree.fromstring(picture)  # well-formed, so names are escaped
    squares = [e.get("fill") for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert squares == ["#b2182b", "#2166ac", "#ffffff", "#d88c95", *["#ffffff"] * 4]
    assert (root.get("width"), root.get("height")) == ("9", "18")
    assert [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")] == ["image to <a>", "image to b"]


def two_layers() -> nn.Sequential:
    convolutions = (nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2))
    return nn.Sequential(nn.Unflatten(1, (1, 5, 5)), *convolutions, nn.Flatten(), nn.Linear(8, 2))


def test_pictures_refuse_what_cannot_be_shown():
    graph = unweave.capture(small_cnn())
    with pytest.raises(UnknownNameError, match="conv2"):
        kernels_into(graph, "conv3")
    with pytest.raises(UnknownNameError, match="convolutional layer"):
        expanded_kernels(graph, "linear1")
    with pytest.raises(InputError, match="before it is refined"):
        kernels_into(unweave.capture(two_layers()).refine({"conv1.map.0": 4}), "conv2")
    with pytest.raises(InputError, match="NaN"):
        draw_kernels(torch.full((1, 1, 2, 2), float("nan")))
    with pytest.raises(InputError, match="too many"):
        draw_kernels(torch.zeros(100, 100, 3, 3))


# ---- equivariance: a network made by hand ---------------------------------------------------------------


def turned_edges(n_families: int = 1, seed: int = 5) -> nn.Sequential:
    """Four quarter-turned copies of each of some kernels, read by one logit with equal weights: a union."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randn(n_families, 1, 3, 3, generator=generator)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4 * n_families, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(6),
        nn.Flatten(),
        nn.Linear(4 * n_families, 2),
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.cat([seeds.rot90(k, (2, 3)) for k in range(4)]))
        model[5].weight.copy_(torch.stack([torch.ones(4 * n_families), torch.zeros(4 * n_families)]))
        model[5].bias.zero_()
    return model


def quarter_turns(n: int = 40, seed: int = 2) -> list[Tensor]:
    images = torch.randn(n, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [images.rot90(k, (1, 2)).flatten(1) for k in range(4)]


def test_turned_copies_are_found_in_weights_and_in_responses():
    graph = unweave.capture(turned_edges(2))
    nodes = graph.stages[1].nodes
    by_weight = match_kernels(nodes, kernels_into(graph, "conv1"))
    by_response = match_responses(graph, nodes, quarter_turns())
    for matches in (by_weight, by_response):
        assert matches.orbit_score == pytest.approx(1.0, abs=1e-5)
        for turn in range(4):
            for i in range(8):  # maps of both families alternate; copy k is turned by k quarters
                assert matches.values[turn, i, (i + 2 * turn) % 8] == pytest.approx(1.0, abs=1e-5)
        assert matches.families(0.999) == (nodes[0::2], nodes[1::2])
    assert by_response.degrees == by_weight.degrees == (0.0, 90.0, 180.0, 270.0)


def test_the_union_of_turned_copies_is_invariant_and_its_members_are_not():
    graph = unweave.capture(turned_edges())
    turned = quarter_turns()
    logits = torch.stack([unweave.run(graph, x[:, None]).logits[:, 0, 0] for x in turned])
    members = torch.stack([map_responses(graph, graph.stages[1].nodes, x) for x in turned])
    assert torch.allclose(logits, logits[:1].expand(4, -1), atol=1e-5)
    assert float(members.std(0).mean()) > 0.1


def test_the_nulls_of_hand_made_copies_are_far_below_them():
    graph = unweave.capture(turned_edges(2))
    kernels, nodes = kernels_into(graph, "conv1"), graph.stages[1].nodes
    shuffled = shuffle_pixels(kernels, seed=1)
    assert torch.equal(shuffled.flatten(1).sort(1).values, kernels.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, kernels)
    assert match_kernels(nodes, shuffled).orbit_score < 0.85
    fresh = unweave.capture(turned_edges(2).apply(lambda m: m.reset_parameters() if isinstance(m, nn.Conv2d) else None))
    assert match_responses(fresh, nodes, quarter_turns()).orbit_score < 0.85


def test_responses_are_the_largest_of_each_map():
    model, x = small_cnn(), inputs()
    with torch.no_grad():
        truth = model[:5](x).amax((2, 3))
    graph = unweave.capture(model)
    assert torch.allclose(map_responses(graph, graph.stages[1].nodes, x), truth, atol=1e-6)


def test_a_silent_map_matches_nothing():
    model = turned_edges()
    with torch.no_grad():
        model[1].weight[2] = 0.0
    graph = unweave.capture(model)
    for matches in (
        match_kernels(graph.stages[1].nodes, kernels_into(graph, "conv1")),
        match_responses(graph, graph.stages[1].nodes, quarter_turns()),
    ):
        assert float(matches.values[:, 2].abs().max()) == float(matches.values[:, :, 2].abs().max()) == 0.0
        assert ("conv1.map.2",) in matches.families(0.5)


def test_matching_refuses_what_it_cannot_compare():
    graph = unweave.capture(turned_edges())
    nodes = graph.stages[1].nodes
    with pytest.raises(ShapeError, match="square"):
        match_kernels(nodes, torch.zeros(4, 1, 2, 3))
    with pytest.raises(ShapeError, match="the same ones"):
        match_responses(graph, nodes, [torch.zeros(3, 64), torch.zeros(4, 64)])
    with pytest.raises(InputError, match="at least two turns"):
        match_responses(graph, nodes, [torch.zeros(3, 64)])
    with pytest.raises(UnknownNameError):
        map_responses(graph, ["conv9.map.0"], torch.zeros(3, 64))
    with pytest.raises(InputError, match="threshold"):
        match_kernels(nodes, torch.ones(4, 1, 3, 3)).families(0.0)


# ---- the room -------------------------------------------------------------------------------------------


def test_shapes_turn_as_images_do():
    kinds = torch.arange(4).repeat(2)
    turns, places = torch.tensor([0.0, 1.0, 3.0, 5.5] * 2), torch.randn(8, 2)
    images = draw(kinds, turns, places)
    turned = draw(kinds, turns + 2, torch.stack([-places[:, 1], places[:, 0]], dim=1))
    assert torch.allclose(images.rot90(1, (1, 2)), turned, atol=1e-4)
    assert 0.0 <= float(images.min()) <= float(images.max()) <= 1.0
    assert bool((images.flatten(1).sum(1) > 8).all())
    # a stroke two pixels and a half wide at half height: the bar's length of 8 and its round ends
    assert float(draw(torch.tensor([3]), torch.zeros(1), torch.zeros(1, 2)).sum()) == pytest.approx(19, abs=4)


def test_the_bundled_network_names_shapes_it_has_not_seen():
    model = unweave.load_model("zoo:oriented_shapes")
    x, kinds, turns = batch(1024, torch.Generator().manual_seed(77))
    with torch.no_grad():
        right = model(x).argmax(1) == kinds
    assert float(right.double().mean()) > 0.98
    assert min(float(right[turns == t].double().mean()) for t in range(8)) > 0.95
    graph = unweave.capture("zoo:oriented_shapes")
    assert difference(model, graph, x) < 1e-4


def test_the_network_is_saved_and_loaded(tmp_path):
    model = train_room("oriented_shapes", tmp_path, seed=3, steps=2)
    back = unweave.load_model(tmp_path)
    x = inputs(3, 256)
    with torch.no_grad():
        assert torch.equal(back(x), model(x))


@pytest.mark.parametrize(
    "change", [{"maps": [12]}, {"kernels": [5, 40]}, {"image": "big"}, {"d_out": -1}, {"maps": [12, 31]}]
)
def test_broken_folders_are_refused(tmp_path, change):
    save(untrained("oriented_shapes"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptFileError):
        unweave.load_model(tmp_path)


# ---- what the phenomenon is measured with ---------------------------------------------------------------


def test_tuning_finds_the_class_and_turn_of_a_map():
    """One map per (class, turn) would answer alone; here responses are made up through the images themselves."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 8)), nn.Conv2d(1, 2, (4, 8), bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2, 4)
    )
    cells = torch.zeros(2, 32)
    cells[0, 2 * 8 + 5], cells[1, 0] = 1.0, -1.0  # class 2 at turn 5; silent
    with torch.no_grad():
        model[1].weight.copy_(cells.view(2, 1, 4, 8))
    graph = unweave.capture(model)
    kinds, turns = torch.arange(4).repeat_interleave(8), torch.arange(8).repeat(4)
    tuning = tune(graph, graph.stages[1].nodes, torch.eye(32), kinds, turns)
    assert (tuning.kinds.tolist(), tuning.turns.tolist()) == ([2, -1], [5, -1])
    assert torch.equal(tuning.curves[0].flatten().float(), cells[0])


def test_damage_is_what_ablating_by_hand_costs():
    model = unweave.load_model("zoo:oriented_shapes")
    graph = unweave.capture("zoo:oriented_shapes")
    x, kinds, _ = batch(64, torch.Generator().manual_seed(5))
    means = unweave.collect_means(graph, float_data(x))
    lost = damage(graph, ["conv2.map.3", "conv2.map.8"], means, x, kinds)
    with torch.no_grad():
        codes = model[:8](x) if isinstance(model[7], nn.Flatten) else model[:-1](x)
        other = codes.clone()
        other[:, [3, 8]] = codes[:, [3, 8]].mean(0)
        before, after = (model[-1](c).double().log_softmax(1) for c in (codes, other))
    truth = (before - after)[torch.arange(64), kinds]
    assert torch.allclose(lost, truth, atol=1e-4)


def test_stimuli_are_the_same_shapes_turned():
    turned = same_images_turned(20, seed=4)
    assert len(turned) == 8
    back = turned[2].view(20, 16, 16).rot90(-1, (1, 2)).flatten(1)
    assert float((back - turned[0]).std()) == pytest.approx(0.1 * 2**0.5, rel=0.05)  # two draws of noise


def test_the_phenomenon_says_where_it_is_from():
    assert PHENOMENA["equivariance"].seeds >= 3
    assert all(low < high for *_, (low, high), _ in CLAIMS)
