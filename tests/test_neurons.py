"""Neurons of plain layers given up: against least squares on activations, on networks whose dead neurons are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import random_model
from torch import nn

import unweave
from unweave.capture import capture
from unweave.compression import channel_moments, compensation
from unweave.compression.allocation import FORMS, Budgeter, mean_divergence
from unweave.compression.masks import Masker
from unweave.compression.matrices import channel_matrices
from unweave.compression.neurons import NEURONS, give_up, kept_neurons, narrowings, plain_layers
from unweave.data import TokenData, float_data
from unweave.errors import InputError, UnknownNameError
from unweave.execution import run
from unweave.ops import RMSNorm
from unweave.scope import Scope
from unweave.statistics import accumulate
from unweave.storage import load_graph, save_graph
from unweave.zoo import two_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
KEPT = {"layers.0": [0, 2, 3, 6, 8], "layers.1": [1, 2, 4, 5]}


def network(activation=nn.Tanh):
    return nn.Sequential(nn.Linear(5, 9), activation(), nn.Linear(9, 7), activation(), nn.Linear(7, 4))


def setup(model, n=200):
    data = float_data(torch.randn(n, model[0].in_features))
    graph = capture(model)
    return graph, data, channel_moments(graph, data, Scope(), samples=2)


def naive_chain(graph, x, offset=None):
    """The logits of a chain of layers, one after the other; ``offset`` is what the first layer hears instead of x."""
    for s, stage in enumerate(graph.stages[1:], 1):
        read = stage.ports[0].reads[0]
        heard = offset.expand(len(x), -1) if s == 1 and offset is not None else x
        x = heard @ read.map.dense().T + (0 if read.bias is None else read.bias)
        x = torch.tanh(x) if stage.write is not None else x
    return x


def best_without(model, x, kept):
    """(what a Sequential becomes: its narrowed layers' weights and biases), by least squares on its activations."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    w, b = [layer.weight.detach().double() for layer in layers], [layer.bias.detach().double() for layer in layers]
    hidden = x.double()
    for k in range(len(layers) - 1):
        hidden = torch.tanh(hidden @ layers[k].weight.detach().double().T + layers[k].bias.detach().double())
        index = torch.tensor(kept[f"layers.{k}"])
        w[k], b[k] = w[k][index], b[k][index]
        goal, design = hidden @ w[k + 1].T, torch.cat([hidden[:, index], torch.ones(len(x), 1).double()], 1)
        solution = torch.linalg.lstsq(design, goal).solution
        w[k + 1], b[k + 1] = solution[:-1].T, b[k + 1] + solution[-1]
    return w, b


def test_the_next_layer_makes_up_for_the_neurons_given_up():
    model = network()
    graph, data, moments = setup(model)
    small = give_up(graph, moments, KEPT).graph
    weights, biases = best_without(model, data.tokens[:, 0], KEPT)
    hidden = data.tokens[:, 0].double()
    for s, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        read = small.stages[s].ports[0].reads[0]
        torch.testing.assert_close(read.map.dense().double(), weight, atol=0.02, rtol=0.0)  # a little damping
        torch.testing.assert_close(read.bias.double(), bias, atol=0.02, rtol=0.0)
        hidden = hidden @ weight.T + bias
        hidden = torch.tanh(hidden) if s < len(weights) else hidden
    torch.testing.assert_close(run(small, data.tokens).logits[:, 0].double(), hidden, atol=0.02, rtol=0.0)
    assert small.n_channel_parameters == 5 * 5 + 5 + 4 * 5 + 4
    assert small.nodes == graph.nodes


def test_the_price_is_that_of_the_change_in_the_metric():
    model = network()
    graph, data, moments = setup(model, 50)
    got = give_up(graph, moments, {"layers.0": KEPT["layers.0"]}).nats
    codes = run(graph, data.tokens, record=["layers.0.code"]).values["layers.0.code"][:, 0].double()
    centred, kept = codes - codes.mean(0), KEPT["layers.0"]
    fit = torch.linalg.lstsq(centred[:, kept], centred).solution
    wanted = 0.0
    for change in centred - centred[:, kept] @ fit:
        wanted += 0.5 * float(change @ moments[1].written2 @ change) / len(codes)
    assert got == pytest.approx(wanted, rel=1e-2)
    assert give_up(graph, moments, {"layers.0": list(range(9))}).nats == pytest.approx(0.0, abs=1e-12)


def test_the_price_predicts_what_a_small_change_costs():
    model = network()
    with torch.no_grad():
        model[4].weight *= 0.1
    graph, data, moments = setup(model, 2000)
    for kept in ([0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6]):
        narrow = give_up(graph, moments, {"layers.1": kept})
        assert mean_divergence(graph, narrow.graph, data, Scope()) == pytest.approx(narrow.nats, rel=0.3)


def with_dead_neurons(model):
    """The same function with 30 neurons more in either layer: never on, always the same, or heard by nobody."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    wide = nn.Sequential(nn.Linear(5, 39), nn.ReLU(), nn.Linear(39, 37), nn.ReLU(), nn.Linear(37, 4))
    with torch.no_grad():
        for k, old in enumerate(layers):
            new = wide[2 * k]
            if k < 2:
                n = old.out_features
                new.bias[n : n + 10] = -100.0
                new.weight[n + 10 : n + 20], new.bias[n + 10 : n + 20] = 0.0, 0.5
            if k > 0:
                new.weight[:, old.in_features + 20 :] = 0.0
            new.weight[: old.out_features, : old.in_features] = old.weight
            new.bias[: old.out_features] = old.bias
        for k, old in enumerate(layers[1:], 1):
            at = old.in_features
            constant = 0.5 * wide[2 * k].weight[: old.out_features, at + 10 : at + 20].sum(1)
            wide[2 * k].bias[: old.out_features] -= constant
    return wide


def test_dead_neurons_make_no_difference():
    torch.manual_seed(3)
    lean = network(nn.ReLU)
    fat = with_dead_neurons(lean)
    x = torch.randn(300, 5)
    torch.testing.assert_close(fat(x), lean(x), atol=1e-4, rtol=0.0)
    lean_graph, fat_graph, data = capture(lean), capture(fat), float_data(x)
    for form in FORMS:
        for numbers in (110, 60):
            found = []
            for graph in (lean_graph, fat_graph):
                size = (numbers + 0.5) / graph.n_channel_parameters
                small = unweave.compress(graph, data, size=size, form=form, samples=4)
                assert 0.7 * numbers <= small.n_channel_parameters <= numbers
                found.append(mean_divergence(graph, small, data, Scope()))
            assert found[1] == pytest.approx(found[0], rel=0.15, abs=1e-5)
    # nothing but the dead ones goes where there is room for the others
    room = (lean_graph.n_channel_parameters + 20) / fat_graph.n_channel_parameters
    small = unweave.compress(fat_graph, data, size=room, form="low-rank")
    assert mean_divergence(fat_graph, small, data, Scope()) < 1e-6
    assert set(small.info[NEURONS]["layers.0"]) <= set(range(9))


def test_moments_of_what_is_left_are_those_of_another_pass():
    fat = with_dead_neurons(network(nn.ReLU))
    graph, data, moments = setup(fat)
    narrow = give_up(graph, moments, {"layers.0": list(range(9)), "layers.1": list(range(7))})
    assert narrow.nats == pytest.approx(0.0, abs=1e-9)
    again = channel_moments(narrow.graph, data, Scope(), samples=2)
    for s, m in again.items():
        for field in dataclasses.fields(m):
            known, fresh = getattr(narrow.moments[s], field.name), getattr(m, field.name)
            torch.testing.assert_close(known, fresh, atol=1e-4, rtol=1e-3)


def test_neurons_that_say_the_same_are_merged():
    model = network()
    with torch.no_grad():
        model[0].weight[5:] = -model[0].weight[:4]
        model[0].bias[5:] = -model[0].bias[:4]
    graph, data, moments = setup(model)
    narrow = give_up(graph, moments, {"layers.0": [0, 1, 2, 3, 4]})
    torch.testing.assert_close(
        run(narrow.graph, data.tokens).logits, run(graph, data.tokens).logits, atol=1e-3, rtol=0.0
    )
    offered = {g.graph.stages[1].code_widths[0]: g.nats for g in narrowings(graph, moments)}
    assert list(offered) == sorted(offered, reverse=True)
    assert offered[5] < 1e-4  # a little damping
    assert offered[min(offered)] > 5e-3


@pytest.mark.parametrize("form", FORMS)
def test_narrowed_graphs_are_graphs(form, tmp_path):
    graph, data, _ = setup(network())
    small = unweave.compress(graph, data, size=0.4, form=form)
    assert small.n_channel_parameters <= 0.4 * graph.n_channel_parameters
    assert small.n_edges == graph.n_edges
    x = data.tokens[:6]
    assert torch.allclose(run(small, x).logits[:, 0], naive_chain(small, x[:, 0]), atol=1e-5)
    back = load_graph(save_graph(small, tmp_path / "g"))
    assert torch.equal(run(back, x).logits, run(small, x).logits)
    assert kept_neurons(back, graph) == kept_neurons(small, graph)
    means = unweave.collect_means(small, data)
    cut = small.restrict(small.edges[1:], means=means)
    assert torch.allclose(run(cut, x).logits[:, 0], naive_chain(cut, x[:, 0], means["input"]), atol=1e-5)
    again = unweave.compress(small, data, size=0.7, form="low-rank") if form == "low-rank" else small
    for node, neurons in again.info.get(NEURONS, {}).items():
        assert set(neurons) <= set(small.info[NEURONS][node])
        assert len(neurons) == again.find(node)[0].code_widths[0]


def test_narrowing_pays_and_never_without_predicting_it():
    """Against the same search that may give up nothing."""
    graph, data, moments = setup(zoo_model())
    for searcher in (Masker(graph, moments), Budgeter(graph, moments)):
        size = 0.12
        free = mean_divergence(graph, searcher.at_size(size), data, Scope())
        searcher.options = searcher.options[:1]
        whole = mean_divergence(graph, searcher.at_size(size), data, Scope())
        assert free < 0.7 * whole


def zoo_model():
    return unweave.zoo.load("two_tasks")


def test_the_neurons_that_serve_a_task_stay():
    graph, data = capture("zoo:two_tasks"), float_data(two_tasks.data(512)[0])
    small = unweave.compress(graph, data, kl_nats=0.05, form="sparse")
    assert small.n_channel_parameters < 106  # masks and biases of all its neurons alone
    effects = unweave.zoo.mlp.neuron_effects(zoo_model(), data.tokens[:, 0], two_tasks.TASKS)
    needed = {name for name, nats in effects.items() if max(nats.values()) > 0.1}
    assert len(needed) > 4
    left = {f"{node}.part.{n}" for node, neurons in small.info[NEURONS].items() for n in neurons}
    assert needed <= left
    assert len(left) < 48


def test_the_sweep_aims_at_the_original_from_what_narrow_layers_hear():
    graph, _, moments = setup(network())
    data = TokenData(torch.randn(60, 2, 5), torch.ones(60, 2, dtype=torch.bool))
    narrow = give_up(graph, moments, KEPT)
    place = (2, "in", 0)
    sums = accumulate(data, compensation._Step(graph, narrow.graph, 2, [place]), batch_size=20)
    seen = compensation._finish(sums, narrow.graph, place)
    weight, bias = compensation._rows_left(graph, narrow.graph, place)
    assert torch.equal(bias, graph.stages[2].ports[0].reads[0].bias[KEPT["layers.1"]])
    prior = channel_matrices(narrow.graph)[place].map.dense().double()
    names = ["layers.0.code"]
    x, y = (run(g, data.tokens, record=names).values[names[0]].flatten(0, 1).double() for g in (graph, narrow.graph))
    goal = x @ graph.stages[2].ports[0].reads[0].map.dense().double()[KEPT["layers.1"]].T
    goal, y = goal - goal.mean(0), y - y.mean(0)
    ridge = (0.1 * y.square().mean()) ** 0.5 * torch.eye(y.shape[1]).double()
    rows, answers = torch.cat([y / len(y) ** 0.5, ridge]), torch.cat([goal / len(y) ** 0.5, ridge @ prior.T])
    truth = torch.linalg.lstsq(rows, answers).solution.T
    torch.testing.assert_close(compensation._goal(weight.double(), prior, seen), truth, atol=2e-3, rtol=0.0)


def test_other_precisions_keep_theirs():
    half = capture(network().to(torch.bfloat16), verify=False)
    data = TokenData(torch.randn(40, 1, 5).to(torch.bfloat16), torch.ones(40, 1, dtype=torch.bool))
    moments = channel_moments(half, data, Scope())
    small = give_up(half, moments, KEPT).graph
    assert {t.dtype for t in small.tensors if t.is_floating_point()} == {torch.bfloat16}
    assert torch.isfinite(run(small, data.tokens[:3]).logits).all()


def test_only_layers_that_are_read_as_they_are_are_plain():
    graph, data, moments = setup(network())
    assert plain_layers(graph) == {1: 2, 2: 3}
    stages = list(graph.stages)
    port = stages[2].ports[0]
    norm = RMSNorm(torch.ones(9), 1e-5)
    normed = dataclasses.replace(stages[2], ports=(dataclasses.replace(port, norm=norm),))
    assert plain_layers(unweave.Graph((*stages[:2], normed, stages[3]), graph.info)) == {2: 3}
    both = dataclasses.replace(stages[3], visible=(2, 3))
    biased = dataclasses.replace(stages[1], bias=torch.ones(9))
    assert plain_layers(unweave.Graph((stages[0], biased, stages[2], both), graph.info)) == {2: 3}
    transformer = capture(random_model("gpt2"), verify=False)
    assert plain_layers(transformer) == {}
    assert [n.graph for n in narrowings(transformer, {})] == [transformer]


REFUSALS = {
    "unknown": (UnknownNameError, "layers.0", {"layers.9": [0]}),
    "the input": (InputError, "no plain layer", {"input": [0]}),
    "none left": (InputError, "at least one", {"layers.0": []}),
    "unsorted": (InputError, "ascending", {"layers.0": [2, 1]}),
    "twice": (InputError, "ascending", {"layers.0": [1, 1]}),
    "too far": (InputError, "neurons 0 to 8", {"layers.0": [9]}),
    "negative": (InputError, "neurons 0 to 8", {"layers.0": [-1, 3]}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(name):
    graph, _, moments = setup(network(), 20)
    error, message, kept = REFUSALS[name]
    with pytest.raises(error, match=message):
        give_up(graph, moments, kept)


def test_moments_of_another_graph_are_refused():
    graph, _, _ = setup(network(), 20)
    _, _, others = setup(with_dead_neurons(network(nn.ReLU)), 20)
    for searcher in (Masker, Budgeter):
        with pytest.raises(InputError, match="take them from this very graph"):
            searcher(graph, others)
