"""The communication graph, shared subspaces, neuron groups and traffic: against loops in float64 and known circuits."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch
from families import random_model
from oracles import naive_run
from torch import nn

import unweave
from unweave.capture import capture
from unweave.data import TokenData, float_data, from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import check_inputs, run, trace
from unweave.graph import Graph
from unweave.modules import Communication, communication
from unweave.modules.directions import shared_dimensions
from unweave.scope import Scope, fisher_cotangent
from unweave.zoo import ToyConfig, ToyTransformer
from unweave.zoo.tracr import load_tracr, tracr_examples, true_edges

SCOPE = Scope(positions="answered")
PREVIOUS, INDUCTION = "blocks.0.attn.head.0", "blocks.1.attn.head.1"


def tokens_of(n=3, pos=6, vocabulary=50, padded=True):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (n, pos), generator=generator)
    mask = torch.arange(pos) < torch.tensor([pos] * (n - 1) + [pos - 2 if padded else pos])[:, None]
    return from_tensor(tokens, mask)


def toy_transformer(d_mlp=6, seed=1):
    torch.manual_seed(seed)
    model = ToyTransformer(ToyConfig(2, 2, 8, 4, d_mlp, d_vocab=11, d_out=11, n_ctx=10, activation="gelu"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return capture(model, verify=False)


def plain_mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


# ---- nats and dimensions against loops ---------------------------------------------------------------------


def naive_nats(graph: Graph, data: TokenData, samples: int, seed: int = 0) -> torch.Tensor:
    """Pair by pair in float64: the derivative of the output along (y_i - m_i), heard by all ports of j at once."""
    graph = graph.to(dtype=torch.float64)
    batch = next(data.batches(len(data)))
    written = naive_run(graph, batch.inputs, batch.mask)[1]
    means = {name: y[batch.mask].mean(0) for name, y in written.items()}
    context = check_inputs(graph, batch.inputs, batch.mask)
    generator = torch.Generator().manual_seed(seed * 1_000_003)
    logits = trace(graph, context).output
    cotangents = [fisher_cotangent(Scope(), logits.float(), batch, generator).double() for _ in range(samples)]
    steps, patch = {}, {}
    for edge in graph.edges:
        pair = graph.nodes.index(edge.dst), graph.nodes.index(edge.src)
        steps.setdefault(pair, torch.zeros(len(data), dtype=torch.float64, requires_grad=True))

        def along(y, step=steps[pair], mean=means[edge.src]):
            return y + step[:, None, None] * (y - mean).detach()

        patch[str(edge)] = along
    logits = trace(graph, context, patch=patch).output
    out = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    for c in cotangents:
        slopes = torch.autograd.grad((c * logits).sum(), list(steps.values()), retain_graph=True)
        for pair, slope in zip(steps, slopes, strict=True):
            out[pair] += 0.5 * slope.square().sum() / samples
    return out / data.n_tokens


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased", "gemma2"])
def test_nats_are_those_of_all_ports_of_a_node_at_once(name):
    graph, data = capture(random_model(name), verify=False), tokens_of()
    found = communication(graph, data, samples=2)
    torch.testing.assert_close(found.nats.double(), naive_nats(graph, data, 2), rtol=2e-3, atol=1e-9)
    assert found.nodes == graph.nodes
    assert found.layer[:2] == (-1, 0) or found.layer[0] == -1


def test_cut_edges_carry_nothing():
    graph, data = toy_transformer(), tokens_of(vocabulary=11)
    keep = graph.possible_edges & (torch.rand(graph.possible_edges.shape) < 0.6)
    graph = graph.restrict(keep, means=unweave.collect_means(graph, data))
    found = communication(graph, data, samples=2)
    truth = naive_nats(graph, data, 2)
    torch.testing.assert_close(found.nats.double(), truth, rtol=2e-3, atol=1e-9)
    assert bool(((found.dimensions > 0) == (truth > 0)).all())
    assert 0 < int((truth > 0).sum()) < 36


def naive_dimensions(graph, data, cotangents):
    """From the stream itself, for graphs without norms: Cov(y_i), the second moment of g_j, and their product's traces."""
    batch = next(data.batches(len(data)))
    context = check_inputs(graph, batch.inputs, batch.mask)
    written = naive_run(graph, batch.inputs, batch.mask)[1]
    covariance = {name: torch.cov(y[batch.mask].T, correction=0) for name, y in written.items()}
    out = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    for j, reader in enumerate(graph.nodes):
        ports = [p for p in graph.ports if p.rpartition(".")[0] == reader]
        second = 0
        for c in cotangents if ports else []:
            bump = torch.zeros(*batch.inputs.shape, 8, dtype=torch.float64, requires_grad=True)
            logits = trace(graph, context, patch={p: lambda x, bump=bump: x + bump for p in ports}).output
            (g,) = torch.autograd.grad((c * logits).sum(), bump)
            second = second + torch.einsum("btd,bte->de", g, g)
        for i, writer in enumerate(graph.nodes):
            if any(e.src == writer and e.dst == reader for e in graph.edges):
                both = covariance[writer] @ second
                out[j, i] = both.trace() ** 2 / (both @ both).trace()
    return out


def test_dimensions_are_participation_ratios_of_virtual_weights():
    graph, data = toy_transformer(), tokens_of(vocabulary=11)
    wide, batch = graph.to(dtype=torch.float64), next(data.batches(3))
    logits = run(wide, batch.inputs, mask=batch.mask).logits
    generator = torch.Generator().manual_seed(0)
    cotangents = [fisher_cotangent(Scope(), logits.float(), batch, generator).double() for _ in range(2)]
    found = communication(graph, data, samples=2)
    torch.testing.assert_close(
        found.dimensions.double(), naive_dimensions(wide, data, cotangents), rtol=1e-3, atol=1e-6
    )
    assert found.dimensions.max() > 1.5


@pytest.mark.parametrize("shape", [(2, 5), (5, 2)])
def test_k_equal_lines_are_k_dimensions(shape):
    lines = torch.zeros(2, 6, shape[0], dtype=torch.float64)
    lines[0, 0, 0] = lines[0, 1, 1] = 3.0  # two equal lines
    lines[1, 0, 0] = 1.0  # one line
    felt = torch.eye(6, dtype=torch.float64)[None, : shape[1]]
    torch.testing.assert_close(shared_dimensions(lines, felt), torch.tensor([[2.0, 1.0]], dtype=torch.float64))
    assert shared_dimensions(lines * 0, felt).abs().sum() == 0


# ---- neurons as nodes --------------------------------------------------------------------------------------


def test_coordinates_of_a_plain_network_against_its_own_backward_pass():
    model, x = plain_mlp(5, 7, 6, 3), torch.randn(40, 5)
    data, scope = float_data(x), Scope(divergence="gaussian")
    found = communication(capture(model, verify=False), data, scope, level="dimension", batch_size=40, samples=1)
    logits = model(x)[:, None]
    batch = next(data.batches(40))
    c = fisher_cotangent(scope, logits.detach(), batch, torch.Generator().manual_seed(0))[:, 0].double()
    model, values = model.double(), [x.double()]
    for k in range(0, 6, 2):
        values.append(model[k](values[-1]) if k == 4 else model[k + 1](model[k](values[-1])))
    starts = [0, 5, 12, 18, 21]
    truth = torch.zeros(21, 21, dtype=torch.float64)
    for layer, linear in enumerate((model[0], model[2], model[4])):
        heard = linear(values[layer].detach()).requires_grad_()
        rest = heard if layer == 2 else model[2 * layer + 1 :](heard)
        (felt,) = torch.autograd.grad((c * rest).sum(), heard)
        for k in range(linear.out_features):
            for i in range(linear.in_features):
                moved = values[layer][:, i].detach() - values[layer][:, i].detach().mean()
                slope = felt[:, k] * linear.weight[k, i].detach() * moved
                truth[starts[layer + 1] + k, starts[layer] + i] = 0.5 * slope.square().mean()
    torch.testing.assert_close(found.nats.double(), truth, rtol=1e-3, atol=1e-9)
    assert found.nodes[0] == "input.code[0]"
    assert found.nodes[-1] == "output.code[2]"
    assert found.nodes[12] == "layers.1.code[0]"
    torch.testing.assert_close(found.dimensions, (truth > 0).float())


@pytest.mark.parametrize("name", ["toy", "gpt2", "llama-tied-biased"])
def test_neurons_as_coordinates_are_neurons_as_nodes(name):
    graph = toy_transformer() if name == "toy" else capture(random_model(name), verify=False)
    data = tokens_of(vocabulary=11)
    split = {n: s.code_widths[0] for s in graph.stages if s.kind == "mlp" for n in s.nodes}
    finer = communication(graph.refine(split), data, samples=2)
    found = communication(graph, data, level="dimension", samples=2)
    assert len(found.nodes) == len(finer.nodes) > len(graph.nodes)
    assert found.layer == finer.layer
    torch.testing.assert_close(found.nats, finer.nats, rtol=2e-3, atol=1e-8)
    torch.testing.assert_close(found.dimensions, finer.dimensions, rtol=2e-3, atol=1e-4)


# ---- laws, ground truth and refusals -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def talk_of_induction(induction, induction_data):
    return communication(induction, induction_data, SCOPE, samples=4)


def test_doubling_the_data_doubles_nothing():
    graph, data = toy_transformer(), tokens_of(n=16, vocabulary=11, padded=False)
    twice = from_tensor(torch.cat([data.tokens, data.tokens]).long())
    a, b = (communication(graph, d, samples=12, batch_size=32) for d in (data, twice))
    there = a.nats > 0
    assert float((a.nats[there] / b.nats[there]).log().abs().median()) < 0.2
    torch.testing.assert_close(a.dimensions, b.dimensions, rtol=0.2, atol=0.1)


def test_the_induction_circuit_is_what_talks(talk_of_induction):
    strong = {
        (r["src"], r["dst"])
        for r in talk_of_induction.table()
        if r["nats"] > 1e-3 * float(talk_of_induction.nats.sum())
    }
    assert (PREVIOUS, INDUCTION) in strong
    assert (INDUCTION, "unembed") in strong
    assert not any("head.1" in a and "blocks.0" in a for pair in strong for a in pair)  # the idle head
    nats, dimensions = talk_of_induction.between(PREVIOUS, INDUCTION)
    assert nats > 1e-3
    assert 1 < dimensions < 32
    both = talk_of_induction.symmetric()
    assert torch.equal(both, both.T)
    assert float(both.sum()) == pytest.approx(2 * float(talk_of_induction.nats.sum()))


def test_compiled_models_talk_where_the_compiler_wired_them(shared):
    folder = shared / "models" / "tracr" / "reverse"
    tokens, mask, _ = tracr_examples(folder)
    graph = capture(load_tracr(folder), verify=False)
    found = communication(graph, from_tensor(tokens[:64], mask[:64]), Scope(divergence="gaussian"))
    true = {(e.src, e.dst) for e in true_edges(folder)}
    strong = {(r["src"], r["dst"]) for r in found.table() if r["nats"] > 1e-9 * float(found.nats.max())}
    assert strong
    assert strong <= true, strong - true


compute = inspect.unwrap(communication)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"level": "neuron"}, InputError, "unknown level 'neuron'"),
        ({"samples": 0}, InputError, "samples must be at least 1"),
        ({"scope": Scope(positions="nowhere")}, UnknownNameError, "nowhere"),
    ],
)
def test_nonsense_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        compute(toy_transformer(), tokens_of(vocabulary=11), **change)


def test_graphs_that_cannot_be_split_are_refused():
    data = tokens_of()
    cut = toy_transformer().restrict([], ablation="zero")
    with pytest.raises(InputError, match="cut edges"):
        communication(cut, tokens_of(vocabulary=11), level="dimension")
    with pytest.raises(InputError, match="writes through a norm"):
        communication(capture(random_model("gemma2"), verify=False), data, level="dimension")
    wide = capture(plain_mlp(2, 5000, 2), verify=False)
    with pytest.raises(InputError, match="5004 cells at level 'dimension', and 4096 is the limit"):
        communication(wide, float_data(torch.randn(2, 2)), level="dimension")
    nothing = dataclasses.replace(data, labels={"none": torch.zeros_like(data.mask)})
    with pytest.raises(EmptyDataError, match="selects no position"):
        communication(capture(random_model("gpt2"), verify=False), nothing, Scope(positions="none"))


def test_broken_tables_are_refused():
    make = inspect.unwrap(Communication)
    table = torch.ones(2, 2)
    with pytest.raises((ShapeError, TypeError)):
        make(("a", "b"), torch.ones(3, 3), table, (0, 1))
    with pytest.raises(InputError, match="not negative"):
        make(("a", "b"), -table, table, (0, 1))
    with pytest.raises(InputError, match="different names"):
        make(("a", "a"), table, table, (0, 1))
    with pytest.raises(UnknownNameError, match="closest"):
        make(("a", "b"), table, table, (0, 1)).between("a", "c")
