"""The battery every family inherits: exact, cuttable, and equal to the plainest executor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import CONFIGS, random_model
from oracles import naive_run

from unweave.capture import capture, model_logits
from unweave.data import from_tensor
from unweave.execution import run
from unweave.statistics import collect_means
from unweave.storage import load_graph, save_graph

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about the tiny vocabularies

NAMES = sorted(CONFIGS)
# one of each kind of machinery, for the slow oracle
KINDS = ["gpt2", "gpt_neo", "gpt_neox-partial", "llama-tied-biased", "llama-yarn", "qwen3", "gemma2", "gemma3"]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_models(name):
    model = random_model(name)
    graph = capture(model)
    for length in (1, 2, 17, min(64, graph.info["n_ctx"])):
        x = tokens(2, length)
        with torch.no_grad():
            assert torch.allclose(run(graph, x).logits, model_logits(model, x), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_attended_to(name):
    model = random_model(name)
    graph = capture(model, verify=False)
    x, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, 12:], mask[1, 5:] = 0, 0
    with torch.no_grad():
        ours, truth = run(graph, x, mask).logits, model_logits(model, x, mask)
    assert torch.allclose(ours[mask.bool()], truth[mask.bool()], atol=1e-4)
    left = mask.flip(1)
    with torch.no_grad():
        ours, truth = run(graph, x, left).logits, model_logits(model, x, left)
    assert torch.allclose(ours[left.bool()], truth[left.bool()], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close(name):
    model = random_model(name, torch.bfloat16)
    graph = capture(model)
    x = tokens(2, 17)
    with torch.no_grad():
        ours, truth = run(graph, x).logits.float(), model_logits(model, x).float()
    assert (ours - truth).abs().max() <= 0.05 * truth.abs().max()


def random_cut(graph, share=0.6):
    generator = torch.Generator().manual_seed(3)
    return graph.possible_edges & (torch.rand(graph.possible_edges.shape, generator=generator) < share)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ablation", ["mean", "position", "zero", "resample"])
def test_cut_graphs_equal_the_plainest_executor(name, ablation):
    graph = capture(random_model(name), verify=False)
    x, other = tokens(2, 9), tokens(2, 9).flip(0)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    means = None
    if ablation in ("mean", "position"):
        means = collect_means(graph, from_tensor(tokens(6, 9)), per_position=ablation == "position")
    kind = ablation if ablation in ("zero", "resample") else "mean"
    cut = graph.restrict(random_cut(graph), ablation=kind, means=means)
    extra = {"counterfactual": other} if kind == "resample" else {}
    truth, written, heard = naive_run(cut, x, mask, other)
    node, port = graph.nodes[-3], graph.ports[-4]
    out = run(cut, x, mask, record=[node, port], **extra)
    assert torch.allclose(out.logits[mask], truth[mask], atol=2e-5)
    assert torch.allclose(out.values[node][mask], written[node][mask], atol=2e-5)
    assert torch.allclose(out.values[port][mask], heard[port][mask], atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_means_are_what_nodes_write_on_average(name):
    graph = capture(random_model(name), verify=False)
    x, mask = tokens(5, 8), torch.ones(5, 8, dtype=torch.bool)
    mask[1, 3:] = False
    means = collect_means(graph, from_tensor(x, mask), batch_size=2)
    _, written, _ = naive_run(graph, x, mask)
    for node, y in written.items():
        assert torch.allclose(means[node][0], y[mask].mean(0), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_graph_is_the_same_bit_by_bit(name, tmp_path):
    graph = capture(random_model(name, torch.bfloat16 if "2" in name else torch.float32), verify=False)
    graph = graph.restrict(random_cut(graph), ablation="zero").quotient({"m": list(graph.nodes[:2])})
    back = load_graph(save_graph(graph, tmp_path / "g"))
    x = tokens(2, 9)
    assert torch.equal(run(back, x).logits, run(graph, x).logits)
    assert back.info == graph.info
    assert back.modules == graph.modules
    assert back.n_parameters == graph.n_parameters


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-tied-biased", "qwen3", "gemma2"])
def test_parameters_are_counted_as_the_model_counts_them(name):
    model = random_model(name)
    assert capture(model, verify=False).n_parameters == sum(p.numel() for p in model.parameters())


def test_a_tampered_capture_is_caught():
    from unweave.errors import GraphError

    model = random_model("llama")
    model.config.rms_norm_eps = 1e-5
    model.model.layers[0].self_attn.scaling = 0.7  # the module uses it
    capture(model)
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(GraphError, match="differs from the model"):
        capture(model)


def test_a_copied_graph_does_not_follow_training():
    model = random_model("gpt2")
    graph = capture(model)
    before = run(graph, tokens(1, 5)).logits
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(run(graph, tokens(1, 5)).logits, before)
    assert dataclasses.is_dataclass(graph)
