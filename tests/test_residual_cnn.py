"""Residual, grouped and depthwise convolutional networks: captured exactly, cut as convolutions, scored pair by pair."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from residual_networks import BasicBlock, ResNet, head, networks, on_vectors
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import unweave
from unweave.data import Batch, float_data
from unweave.errors import GraphError, InputError, ShapeError, UnknownNameError, UnsupportedModelError
from unweave.execution import check_inputs, plan_of, trace
from unweave.kernels import expanded_kernels, kernels_into, layers_of_maps
from unweave.ops import BlockMap, Convolution, DenseBlocks, Joined
from unweave.scoring import edge_products, port_gradients
from unweave.statistics import differentiable_trace, gradients_of

D = 2 * 9 * 8
NETWORKS = networks()


def inputs(n: int = 6, d: int = D, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(NETWORKS))
def network(request) -> nn.Sequential:
    return NETWORKS[request.param]


def truth(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x[:, 0])


# ---- maps between blocks against their matrices ---------------------------------------------------------


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PLAIN = Convolution(rand(3, 2, 3, 2), (6, 5), (2, 1), (1, 0), (1, 2))
GROUPED = Convolution(rand(4, 1, 3, 3), (5, 5), (2, 3), (1, 2), groups=2)
DEPTHWISE = Convolution(rand(3, 1, 1, 1), (3, 2), groups=3)
BLOCK_MAPS: dict[str, tuple[BlockMap, tuple[tuple[int, int], ...]]] = {
    "plain": (PLAIN, ((0, 30), (30, 30))),
    "grouped": (GROUPED, ((0, 25), (25, 25))),
    "depthwise": (DEPTHWISE, ((0, 6), (6, 6), (12, 6))),
    "dense": (DenseBlocks(rand(6, 7), 3), ((0, 4), (4, 1), (5, 2))),
    "joined": (
        Joined(
            (Convolution(rand(3, 2, 2, 2), (3, 2), padding=(0, 0)), Convolution(rand(3, 3, 1, 1), (2, 1))), (6, 0), 19
        ),
        ((6, 6), (12, 6), (0, 2), (2, 2), (4, 2), (18, 1)),
    ),
}


@pytest.fixture(params=sorted(BLOCK_MAPS))
def block_map(request):
    return BLOCK_MAPS[request.param]


def by_pairs(map_: BlockMap, places) -> Tensor:
    """[block, writer, width, d_in]: the dense matrix with all but one block and one writer's columns zero."""
    rows = map_.dense().reshape(map_.blocks, -1, map_.d_in)
    out = torch.zeros(map_.blocks, len(places), *rows.shape[1:], dtype=rows.dtype)
    for w, (start, width) in enumerate(places):
        out[:, w, :, start : start + width] = rows[:, :, start : start + width]
    return out


def test_blocks_are_those_of_the_dense_matrix(block_map):
    map_, places = block_map
    rows = map_.dense().reshape(map_.blocks, -1, map_.d_in)
    assert torch.allclose(map_.dense(), torch.stack([map_.apply(e) for e in torch.eye(map_.d_in).double()], 1))
    blocks = torch.tensor([map_.blocks - 1, 0, 0])
    x, g = rand(2, 3, map_.d_in, seed=1), rand(2, 3, rows.shape[1], seed=2)
    assert torch.allclose(map_.apply_blocks(x, blocks), torch.einsum("brd,rwd->brw", x, rows[blocks]))
    assert torch.allclose(map_.pull(g, blocks), torch.einsum("brw,rwd->brd", g, rows[blocks]))


def test_pairs_are_those_of_the_dense_matrix(block_map):
    map_, places = block_map
    pairs = by_pairs(map_, places)
    table = torch.rand(pairs.shape[:2], generator=torch.Generator().manual_seed(4)) < 0.5
    assert 0 < int(table.sum()) < table.numel()
    masked = map_.mask(table, places)
    assert torch.allclose(masked.dense(), (pairs * table[:, :, None, None]).sum(1).flatten(0, 1))
    g, x = rand(4, *pairs.shape[::2], seed=4), rand(4, map_.d_in, seed=5)
    assert torch.allclose(map_.pair_products(g, x, places), torch.einsum("nbw,biwd,nd->nbi", g, pairs, x))


def test_writers_that_are_not_the_blocks_of_a_map_are_left_to_others():
    table = torch.ones(3, 2, dtype=torch.bool)
    assert PLAIN.mask(table, ((0, 20), (20, 40))) is None
    assert PLAIN.pair_products(rand(1, 3, 3), rand(1, 60), ((0, 60),)) is None
    assert DenseBlocks(rand(6, 7), 3).mask(table, ((0, 3), (4, 3))) is None
    assert Joined((PLAIN,), (1,), 62).mask(table, ((0, 31), (31, 31))) is None


def test_a_grouped_convolution_is_torchs():
    module = nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2, bias=False).double()
    x = rand(3, 4, 7, 8)
    ours = Convolution(module.weight, (7, 8), (2, 2), (1, 1), (2, 2), 2)
    assert torch.allclose(ours.apply(x.flatten(1)), module(x).flatten(1))
    whole = dataclasses.replace(ours, kernels=ours.ungrouped(), groups=1)
    assert torch.allclose(whole.dense(), ours.dense())
    assert int((ours.ungrouped() != 0).sum()) == module.weight.numel()
    with pytest.raises(ShapeError, match="3 groups"):
        Convolution(rand(4, 1, 1, 1), (2, 2), groups=3)
    with pytest.raises(ShapeError, match="as many numbers"):
        Joined((PLAIN, GROUPED), (0, 0), 100)
    with pytest.raises(ShapeError, match="beyond"):
        Joined((PLAIN,), (10,), 60)


# ---- capture --------------------------------------------------------------------------------------------


def test_the_graph_is_the_model(network):
    x = inputs()
    graph, logits = unweave.capture(network), truth(network, x)
    assert float((unweave.run(graph, x).logits[:, 0] - logits).abs().max()) <= 1e-5
    assert float(logits.std()) > 1e-3
    double = unweave.capture(network.double())
    assert torch.allclose(unweave.run(double, x.double()).logits[:, 0], truth(network, x.double()), atol=1e-12)
    network.float()


def test_nodes_of_a_resnet_have_the_names_of_its_modules():
    graph = unweave.capture(NETWORKS["resnet"])
    layers = {"conv1": 3, "layer1.0.conv1": 3, "layer1.0.conv2": 3, "layer2.0.conv1": 4, "layer2.0.conv2": 4}
    maps = tuple(f"{name}.map.{i}" for name, n in layers.items() for i in range(n))
    assert graph.nodes == ("input.map.0", "input.map.1", *maps, "output")
    # an identity connects a map with itself, a projection with all; what lies between the two ends hears neither
    into = {name: sorted(e.src for e in graph.edges if e.dst == name) for name in graph.nodes}
    assert into["layer1.0.conv2.map.1"] == sorted(["conv1.map.1", *(f"layer1.0.conv1.map.{i}" for i in range(3))])
    assert into["layer2.0.conv2.map.0"] == sorted(
        [*(f"layer1.0.conv2.map.{i}" for i in range(3)), *(f"layer2.0.conv1.map.{i}" for i in range(4))]
    )
    assert graph.n_edges == 2 * 3 + 9 + 9 + 3 + 12 + 12 + 16 + 4
    assert not graph.is_cut


def test_maps_of_other_groups_are_not_heard():
    model = on_vectors(nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), *head(4)))
    graph = unweave.capture(model)
    assert graph.n_edges == 4 + 4 + 4
    with pytest.raises(InputError, match="no such edge"):
        graph.restrict(["input.map.0->conv1.map.2.in"], ablation="zero")


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_hugging_faces_resnets_are_captured(layer_type):
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "num_labels": 3}
    model = on_vectors(ResNetForImageClassification(ResNetConfig(layer_type=layer_type, **sizes)), (3, 12, 12))
    x = inputs(3, 432)
    with torch.no_grad():
        logits = model(x[:, 0]).logits
    graph = unweave.capture(model)
    assert torch.allclose(unweave.run(graph, x).logits[:, 0], logits, atol=1e-5)
    assert any("stages.1.layers.0" in node for node in graph.nodes)


def test_capturing_leaves_the_model_as_it_was():
    model = on_vectors(ResNet()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    unweave.capture(model)
    assert model.training
    assert model[1].bn1.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Calls(nn.Module):
    """A module that does one thing to maps."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what, self.conv = what, nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x * torch.sigmoid(x), "calls '(__mul__|mul)'"),
        (lambda x: torch.cat([x, x], 1), "calls 'cat'"),
        (lambda x: x + 1.0, "and on something else"),
        (lambda x: x + x.mean((2, 3), keepdim=True), "different sizes"),
        (lambda x: x.chunk(3, 1)[0] + 0, "takes feature maps apart"),
        (lambda x: torch.add(x, x, alpha=2), "weighted sum"),
        (lambda x: F.dropout(x, 0.5, training=True), "at random"),
        (lambda x: x.mean(1, keepdim=True), "over the axes"),
        (lambda x: x.flatten(0, 1)[None], "mixes images"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "padding with 'reflect'"),
        (lambda x: F.batch_norm(x, None, None, training=True), "without running statistics"),
    ],
)
def test_calls_that_cannot_be_captured_are_refused(what, message):
    with pytest.raises(UnsupportedModelError, match=message):
        unweave.capture(nn.Sequential(nn.Unflatten(1, (2, 6, 6)), Calls(what)))


# ---- cutting --------------------------------------------------------------------------------------------


def some_edges(graph: unweave.Graph, share: float = 0.6, seed: int = 0) -> Tensor:
    return graph.edge_matrix & (
        torch.rand(graph.edge_matrix.shape, generator=torch.Generator().manual_seed(seed)) < share
    )


def by_hand(model: nn.Sequential, x: Tensor, kept: set[str], instead: dict[str, Tensor]) -> Tensor:
    """The small ResNet edge by edge: reader o hears, from each writer, its maps or what stands for them."""
    net = model[1]

    def heard(name: str, maps: Tensor, node: str) -> Tensor:
        parts = [
            maps[:, i] if f"{name}.map.{i}->{node}.in" in kept else instead[f"{name}.map.{i}"].view(-1, *maps.shape[2:])
            for i in range(maps.shape[1])
        ]
        return torch.stack([part.expand(len(maps), *maps.shape[2:]) for part in parts], 1)

    def layer(name: str, sources) -> Tensor:
        """sources: (name, maps, function of maps) each; every output map from what it alone hears."""
        made = [sum(f(heard(s, m, f"{name}.map.0")) for s, m, f in sources)]
        made += [sum(f(heard(s, m, f"{name}.map.{o}")) for s, m, f in sources) for o in range(1, made[0].shape[1])]
        return torch.stack([m[:, o] for o, m in enumerate(made)], 1)

    image = x.view(-1, 2, 9, 8)
    stem = net.maxpool(F.relu(layer("conv1", [("input", image, lambda m: net.bn1(net.conv1(m)))])))
    previous, before = "conv1", stem
    for k in (1, 2):
        block = getattr(net, f"layer{k}")[0]
        skip = block.downsample or nn.Identity()
        first, second = f"layer{k}.0.conv1", f"layer{k}.0.conv2"
        middle = F.relu(layer(first, [(previous, before, lambda m, b=block: b.bn1(b.conv1(m)))]))
        sources = [(first, middle, lambda m, b=block: b.bn2(b.conv2(m))), (previous, before, skip)]
        previous, before = second, F.relu(layer(second, sources))
    pooled = before.mean((2, 3), keepdim=True)
    parts = [
        pooled[:, i]
        if f"{previous}.map.{i}->output.in" in kept
        else instead[f"{previous}.map.{i}"].view(-1, 1, 1).expand(len(x), 1, 1)
        for i in range(4)
    ]
    return net.fc(torch.cat([p.flatten(1) for p in parts], 1))


def codes_of(graph: unweave.Graph, x: Tensor) -> dict[str, Tensor]:
    names = [f"{n}.code" for n in graph.writers]
    return {n.removesuffix(".code"): v[:, 0] for n, v in unweave.run(graph, x, record=names).values.items()}


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@torch.no_grad()
def test_a_cut_resnet_is_the_network_cut_by_hand(ablation):
    model, x, other = NETWORKS["resnet"], inputs(), inputs(seed=7)
    graph = unweave.capture(model)
    keep = some_edges(graph)
    means = unweave.collect_means(graph, float_data(x[:, 0])) if ablation == "mean" else None
    cut = graph.restrict(keep, ablation=ablation, means=means)
    codes = codes_of(graph, other if ablation == "resample" else x)
    if ablation != "resample":
        codes = {n: (v.mean(0, keepdim=True) if ablation == "mean" else 0 * v[:1]) for n, v in codes.items()}
    kept = {str(e) for e in graph.name_edges(keep)}
    plain = by_hand(model, x, kept, codes)
    options = {"counterfactual": other} if ablation == "resample" else {}
    fast = unweave.run(cut, x, **options)
    assert torch.allclose(fast.logits[:, 0], plain, atol=1e-5)
    assert not torch.allclose(fast.logits[:, 0], truth(model, x), atol=1e-2)
    # what is recorded is heard map by map, on the other way through the executor
    slow = unweave.run(cut, x, record=["layer2.0.conv2.map.1.in"], **options)
    assert torch.allclose(slow.logits[:, 0], plain, atol=1e-5)


@torch.no_grad()
def test_cut_maps_of_every_kind_run_alike_masked_and_apart(network):
    x = inputs()
    graph = unweave.capture(network)
    means = unweave.collect_means(graph, float_data(x[:, 0]))
    cut = graph.restrict(some_edges(graph), means=means)
    assert any(port.masked for stage in plan_of(cut).stages for port in stage.ports)
    ports = [p for p in cut.ports if p != "output.in"]
    slow = unweave.run(cut, x, record=ports)
    assert torch.allclose(unweave.run(cut, x).logits, slow.logits, atol=1e-5)
    assert not torch.allclose(slow.logits, unweave.run(graph, x).logits, atol=1e-3)
    # hearing nothing leaves a constant, whatever the image
    nothing = graph.restrict(graph.edge_matrix & False, means=means)
    assert torch.allclose(*unweave.run(nothing, x[:2]).logits, atol=1e-6)


def test_a_cut_run_makes_no_matrix_and_no_map_apart(monkeypatch):
    graph, x = unweave.capture(NETWORKS["resnet"]), inputs()
    cut = graph.restrict(some_edges(graph), ablation="zero")

    def refuse(self):
        raise AssertionError("a dense matrix of a convolution")

    plan_of(cut)
    monkeypatch.setattr(Convolution, "dense", refuse)
    t = trace(cut, check_inputs(cut, x))
    assert all(each is None for each in t.each)


# ---- scores, circuits, storage --------------------------------------------------------------------------


def test_products_are_the_slopes_of_every_edge(network):
    """d(value)/d(a) at a = 0 where an edge carries y + a (m - y), by autograd, edge by edge."""
    x, graph = inputs(3), unweave.capture(network)
    means = unweave.collect_means(graph, float_data(inputs(8, seed=4)[:, 0]))
    weight = torch.randn(unweave.run(graph, x).logits.shape, generator=torch.Generator().manual_seed(2))
    t = differentiable_trace(graph, Batch(x, torch.ones(3, 1, dtype=torch.bool), {}, torch.arange(3)))
    sent = [torch.stack([means[n] for n in stage.nodes])[:, None] for stage in graph.stages[:-1]]
    gradients = gradients_of(t, (t.output * weight).sum())
    products = edge_products(t, sent, gradients).sum(0)
    for edge in graph.edges[:: max(1, graph.n_edges // 12)]:
        a = torch.zeros((), requires_grad=True)
        patch = {str(edge): lambda y, e=edge, a=a: y + a * (means[e.src] - y)}
        (slope,) = torch.autograd.grad((unweave.run(graph, x, patch=patch).logits * weight).sum(), a)
        assert float(products[graph.mark_edges([edge])]) == pytest.approx(-float(slope), abs=2e-4, rel=1e-3)
    assert float(products[~graph.edge_matrix].abs().max() if (~graph.edge_matrix).any() else 0.0) < 1e-6
    port = port_gradients(t)(len(graph.stages) - 2, "in", gradients)
    assert port.shape[0] == len(graph.stages[-2].nodes)


def test_exact_scores_are_what_cutting_one_edge_costs():
    graph, data = unweave.capture(NETWORKS["resnet"]), float_data(inputs(8)[:, 0])
    means = unweave.collect_means(graph, data)
    scores = unweave.score_edges(graph, data, method="exact", progress=False)
    clean = unweave.run(graph, inputs(8)).logits.log_softmax(-1)
    for edge in graph.edges[::9]:
        cut = graph.restrict(graph.edge_matrix & ~graph.mark_edges([edge]), means=means)
        other = unweave.run(cut, inputs(8)).logits.log_softmax(-1)
        nats = float((clean.exp() * (clean - other)).sum(-1).mean())
        assert float(scores.nats[graph.mark_edges([edge])]) == pytest.approx(nats, abs=1e-5, rel=1e-3)


def test_a_circuit_of_a_resnet_is_found_and_costs_what_it_says():
    graph, data = unweave.capture(NETWORKS["resnet"]), float_data(inputs(10)[:, 0])
    circuit = unweave.find_circuit(graph, data, faithfulness=0.8, max_trials=6, progress=False)
    assert 0 < circuit.n_edges < graph.n_edges
    proof = unweave.prove(circuit, data, progress=False)
    assert proof.faithfulness.value >= 0.75
    with pytest.raises(InputError, match="kernels are stored once"):
        unweave.compress(graph, data, size=0.5)
    with pytest.raises(InputError, match="kernels are stored once"):
        unweave.channel_moments(graph, data, unweave.Scope())


def test_graphs_are_saved_and_loaded_bit_for_bit(network, tmp_path):
    graph, x = unweave.capture(network), inputs()
    cut = graph.restrict(some_edges(graph), ablation="zero")
    unweave.save_graph(cut, tmp_path / "graph")
    loaded = unweave.load_graph(tmp_path / "graph")
    assert torch.equal(unweave.run(loaded, x).logits, unweave.run(cut, x).logits)
    assert torch.equal(loaded.edge_matrix, cut.edge_matrix)
    assert torch.equal(loaded.possible_edges, graph.edge_matrix)


@torch.no_grad()
def test_maps_are_split_and_unrolled_and_change_nothing():
    graph, x = unweave.capture(NETWORKS["resnet"]), inputs()
    finer = graph.refine({"layer1.0.conv1.map.1": 4, "layer1.0.conv2.map.0": 2})
    assert torch.allclose(unweave.run(finer, x).logits, unweave.run(graph, x).logits, atol=1e-5)
    assert finer.n_edges == graph.n_edges + 3 * 3 + (4 * 7 - 12) + 4 + 4  # into and out of the parts
    cut = finer.restrict(
        ["input.map.0->conv1.map.0.in", "conv1.map.0->layer1.0.conv1.map.1.part.2.in"], ablation="zero"
    )
    whole = graph.restrict(["input.map.0->conv1.map.0.in"], ablation="zero")
    assert torch.allclose(unweave.run(cut, x).logits, unweave.run(whole, x).logits, atol=1e-5)
    two = torch.cat([x, x.flip(0)], 1)
    unrolled = graph.unroll(2)
    assert torch.allclose(unweave.run(unrolled, two).logits, unweave.run(graph, two).logits, atol=1e-5)
    half = unrolled.restrict(
        unrolled.edge_matrix & ~unrolled.mark_edges(["input.map.0@1->conv1.map.0@1.in"]), ablation="zero"
    )
    one = graph.restrict(graph.edge_matrix & ~graph.mark_edges(["input.map.0->conv1.map.0.in"]), ablation="zero")
    expected = torch.cat([unweave.run(graph, two).logits[:, :1], unweave.run(one, two).logits[:, 1:]], 1)
    assert torch.allclose(unweave.run(half, two).logits, expected, atol=1e-5)


def test_kernels_are_told_apart_by_what_they_read():
    model = NETWORKS["resnet"]
    graph, block = unweave.capture(model), model[1].layer2[0]
    scale = block.bn2.weight / (block.bn2.running_var + block.bn2.eps).sqrt()
    own = kernels_into(graph, "layer2.0.conv2", source="layer2.0.conv1")
    assert torch.allclose(own, block.conv2.weight * scale[:, None, None, None], atol=1e-6)
    identity = kernels_into(graph, "layer1.0.conv2", source="conv1")
    assert torch.equal(identity[:, :, 0, 0], torch.eye(3))
    assert kernels_into(graph, "layer2.0.conv2", source="layer1.0.conv2").shape == (4, 3, 1, 1)
    assert list(layers_of_maps(graph)) == ["conv1", *(f"layer{k}.0.conv{i}" for k in (1, 2) for i in (1, 2))]
    with pytest.raises(InputError, match="name one of them"):
        kernels_into(graph, "layer2.0.conv2")
    with pytest.raises(UnknownNameError, match="layer2.0.conv1"):
        kernels_into(graph, "layer2.0.conv2", source="layer2.0.conv3")
    with pytest.raises(InputError, match="name one of them"):
        expanded_kernels(graph, "layer2.0.conv1")
    assert expanded_kernels(graph, "layer1.0.conv1").shape == (3, 2, 9, 9)


def test_a_table_of_reach_has_to_fit():
    graph = unweave.capture(NETWORKS["resnet"])
    s = graph.where["layer1.0.conv2.map.0"][0]
    port = dataclasses.replace(graph.stages[s].ports[0], reach=torch.ones(3, 4, dtype=torch.bool))
    stages = (*graph.stages[:s], dataclasses.replace(graph.stages[s], ports=(port,)), *graph.stages[s + 1 :])
    with pytest.raises(GraphError, match="what it reaches"):
        dataclasses.replace(graph, stages=stages)


def test_a_block_alone_is_a_network():
    model = on_vectors(nn.Sequential(BasicBlock(2, 2), nn.Flatten(), nn.Linear(D, 3)))
    x = inputs()
    assert torch.allclose(unweave.run(unweave.capture(model), x).logits[:, 0], truth(model, x), atol=1e-5)
