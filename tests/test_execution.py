"""The executor against models, against the plainest executor, and against its own laws."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from families import CONFIGS, random_model
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from naive_executor import naive_run
from torch import Tensor, nn

from unweave import tree
from unweave.capture import capture, model_logits
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.execution import run, uncut
from unweave.graph import Graph, Read, Stage
from unweave.ops import Attention, Dense, LinearMap, LowRank, Pivoted, Stacked
from unweave.zoo.toy import ToyConfig, ToyTransformer

NAMES = sorted(CONFIGS)
# absolute positions; turned, grouped keys; norms after the writes, soft caps, windows; parallel blocks
KINDS = ["gpt2", "llama-tied-biased", "gemma2", "gpt_neox"]
N_POS = 9  # past the sliding window of 5
ABLATIONS = ["mean", "position", "zero", "resample"]


@cache
def model_of(name: str) -> nn.Module:
    return random_model(name)


@cache
def graph_of(name: str, dtype: torch.dtype = torch.float32) -> Graph:
    graph = capture(model_of(name), verify=False)
    return graph if dtype == torch.float32 else graph.to(dtype=dtype)


def wide(name: str) -> Graph:
    """In float64, where summation order does not matter."""
    return graph_of(name, torch.float64)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 3, n_pos: int = N_POS, side: str = "right") -> Tensor:
    """A mask with a full row, a half-empty row and a row of one token."""
    mask = torch.ones(batch, n_pos, dtype=torch.bool)
    mask[1, n_pos // 2 :] = False
    mask[2, 1:] = False
    return mask if side == "right" else mask.flip(1)


def random_keep(graph: Graph, share: float, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(graph.edge_matrix.shape, generator=generator) < share


def random_means(graph: Graph, n_pos: int = 1, seed: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # as collected: float32, unless the graph is more precise than that
    dtype = torch.float64 if graph.tensors[0].dtype == torch.float64 else torch.float32
    return {w: torch.randn(n_pos, graph.info["d_model"], generator=generator).to(dtype) for w in graph.writers}


def cut_at_random(graph: Graph, ablation: str, share: float = 0.5, seed: int = 3) -> Graph:
    keep = random_keep(graph, share, seed)
    if ablation in ("mean", "position"):
        return graph.restrict(keep, means=random_means(graph, N_POS if ablation == "position" else 1))
    return graph.restrict(keep, ablation=ablation)  # type: ignore[arg-type]


def everything(graph: Graph) -> list[str]:
    """The name of every value that can be recorded."""
    heads = [n for s in graph.stages if isinstance(s.core, Attention) for n in s.nodes]
    codes = [f"{n}.code" for n in graph.nodes[:-1]]
    return [*graph.writers, *graph.ports, *codes, *(f"{n}.pattern" for n in heads)]


def assert_equals_naive(graph: Graph, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> None:
    """Logits and every value on the way are those of the plainest executor, in float64."""
    truth = naive_run(graph, x, mask, other)
    out = run(graph, x, mask, record=everything(graph), counterfactual=other)
    assert torch.allclose(out.logits, truth.logits, atol=1e-9)
    assert set(out.values) == set(everything(graph))
    for name, value in out.values.items():
        expected = truth.values[name]
        assert torch.allclose(value[..., : expected.shape[-1]], expected, atol=1e-9), name
        assert not bool(value[..., expected.shape[-1] :].any()), f"{name}: padding is not zero"
    plain = run(graph, x, mask, counterfactual=other).logits  # recording takes another path through the executor
    assert torch.allclose(plain, truth.logits, atol=1e-9)


# ---- against the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_models_at_every_length(name):
    model, graph = model_of(name), graph_of(name)
    for length in (1, 2, 5, 6, graph.info["n_ctx"]):
        x = tokens(2, length)
        with torch.no_grad():
            truth = model_logits(model, x)
            assert torch.allclose(run(graph, x).logits, truth, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_models_with_padding(name, side):
    x, mask = tokens(3, 20), padded(3, 20, side)
    with torch.no_grad():
        truth = model_logits(model_of(name), x, mask.long())
        ours = run(graph_of(name), x, mask.long()).logits
    assert torch.allclose(ours[mask], truth[mask], atol=1e-5)
    assert torch.equal(run(graph_of(name), x, mask).logits, ours)


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_logits_are_the_models(name):
    model = random_model(name, torch.float64)
    x = tokens(2, 17)
    with torch.no_grad():  # Hugging Face computes norms in float32, whatever the precision
        assert torch.allclose(run(capture(model), x).logits, model_logits(model, x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_logits_are_the_models_to_three_percent(name):
    model = random_model(name, torch.bfloat16)
    x = tokens(2, 30)
    with torch.no_grad():
        ours, truth = run(capture(model, verify=False), x).logits, model_logits(model, x).float()
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - truth).abs().max()) <= 0.03 * float(truth.abs().max())


# ---- against the plainest executor -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_graph_equals_the_plainest_executor(name):
    assert_equals_naive(wide(name), tokens(3, N_POS), padded())


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_graph_equals_the_plainest_executor(name, ablation):
    graph = cut_at_random(wide(name), ablation)
    other = tokens(3, N_POS, seed=2) if ablation == "resample" else None
    assert_equals_naive(graph, tokens(3, N_POS), padded(), other)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_a_cut_graph_in_float32_equals_the_plainest_executor(name, ablation, share):
    # in float32, ports that lose few writers take them from the whole sum
    graph = cut_at_random(graph_of(name), ablation, share, seed=5)
    other = tokens(3, N_POS, seed=2) if ablation == "resample" else None
    truth = naive_run(graph, tokens(3, N_POS), padded(), other).logits
    ours = run(graph, tokens(3, N_POS), padded(), counterfactual=other).logits
    assert torch.allclose(ours.double(), truth, atol=1e-5)


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
@pytest.mark.parametrize("name", KINDS)
def test_a_cut_graph_in_bfloat16_stays_within_three_percent(name, ablation):
    graph = cut_at_random(graph_of(name, torch.bfloat16), ablation)  # the means are float32
    other = tokens(3, N_POS, seed=2) if ablation == "resample" else None
    truth = naive_run(graph, tokens(3, N_POS), padded(), other).logits
    ours = run(graph, tokens(3, N_POS), padded(), counterfactual=other).logits
    assert ours.dtype == torch.bfloat16
    assert float((ours.double() - truth).abs().max()) <= 0.03 * float(truth.abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_cutting_every_edge_leaves_constants_and_biases(name):
    graph = wide(name)
    for cut in (graph.restrict([], ablation="zero"), graph.restrict([], means=random_means(graph))):
        logits = run(cut, tokens(2, 4)).logits
        assert torch.allclose(logits, logits[:1, :1].expand_as(logits), atol=1e-12)
        assert torch.allclose(logits, naive_run(cut, tokens(2, 4)).logits, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_edges_cut_in_two_steps_leave_the_sum_of_both_constants(name):
    graph = wide(name)
    first = graph.restrict(random_keep(graph, 0.7, 1), means=random_means(graph, 1, 1))
    second = first.restrict(random_keep(graph, 0.7, 2), means=random_means(graph, N_POS, 2))
    assert_equals_naive(second, tokens(2, N_POS))
    third = second.restrict(random_keep(graph, 0.7, 3), ablation="zero")
    assert_equals_naive(third, tokens(2, 4))  # shorter than the means reach


@settings(deadline=None, max_examples=25, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(st.data())
def test_any_cut_of_any_toy_transformer_equals_the_plainest_executor(data):
    draw = data.draw
    heads, n_pos = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    config = ToyConfig(
        n_layers=draw(st.integers(1, 2)),
        n_heads=heads,
        d_model=6,
        d_head=draw(st.integers(1, 3)),
        d_mlp=draw(st.sampled_from([0, 4])),
        d_vocab=50,
        d_out=3,
        n_ctx=5,
        causal=draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    graph = capture(ToyTransformer(config), verify=False).to(dtype=torch.float64)
    ablation = draw(st.sampled_from(["mean", "zero", "resample"]))
    graph = cut_at_random(graph, ablation, draw(st.sampled_from([0.1, 0.5, 0.9])), draw(st.integers(0, 99)))
    x, mask = torch.randint(50, (2, n_pos)), torch.rand(2, n_pos) < 0.7
    other = torch.randint(50, (2, n_pos)) if ablation == "resample" else None
    assert_equals_naive(graph, x, mask, other)


# ---- cheaper maps, ragged widths ---------------------------------------------------------------------------------


def narrow(read: Read, widths: tuple[int, ...]) -> Read:
    """The first few outputs of each block."""
    starts = [sum(read.widths[:i]) for i in range(len(widths))]
    rows = torch.cat([torch.arange(start, start + w) for start, w in zip(starts, widths, strict=True)])
    bias = None if read.bias is None else read.bias[rows]
    return Read(Dense(read.map.dense()[rows]), widths, bias)


def narrow_codes(stage: Stage, widths: tuple[int, ...]) -> Dense:
    """The write matrix of the first few coordinates of each code."""
    assert stage.write is not None
    columns = stage.write.dense().split(list(stage.code_widths), dim=1)
    return Dense(torch.cat([c[:, :w] for c, w in zip(columns, widths, strict=True)], dim=1))


def ragged(graph: Graph, qk: tuple[int, ...] | None, v: tuple[int, ...]) -> Graph:
    """Attention with fewer coordinates in some heads' values, and in some heads' queries and keys."""
    stages = []
    for stage in graph.stages:
        if isinstance(stage.core, Attention):
            q, k, value = stage.ports
            nodes = len(stage.nodes)
            codes = tuple(v[i * len(v) // nodes] for i in range(nodes))
            if qk is not None:
                q = dataclasses.replace(
                    q, reads=(narrow(q.reads[0], tuple(qk[i * len(qk) // nodes] for i in range(nodes))),)
                )
                k = dataclasses.replace(k, reads=(narrow(k.reads[0], qk),))
            value = dataclasses.replace(value, reads=(narrow(value.reads[0], v),))
            write = narrow_codes(stage, codes)
            stage = dataclasses.replace(stage, ports=(q, k, value), write=write, code_widths=codes)
        stages.append(stage)
    return dataclasses.replace(graph, stages=tuple(stages))


RAGGED: dict[str, tuple[str, tuple[int, ...] | None, tuple[int, ...]]] = {
    "values": ("gpt2", None, (8, 3, 1, 5)),
    "a head without values": ("gpt2", None, (8, 0, 2, 8)),
    "no values": ("gpt2", None, (0, 0, 0, 0)),
    "queries and keys": ("gpt2", (8, 1, 4, 2), (8, 8, 8, 8)),
    "a head that looks everywhere": ("gpt2", (0, 3, 8, 2), (1, 2, 3, 4)),
    "shared values": ("llama-tied-biased", None, (3, 7)),
    "one shared value": ("llama-multi-query", None, (3,)),
    "behind a norm": ("gemma2", None, (11, 2)),
}


@pytest.mark.parametrize("case", sorted(RAGGED))
@pytest.mark.parametrize("ablation", [None, "mean", "resample"])
def test_ragged_heads_equal_the_plainest_executor(case, ablation):
    name, qk, v = RAGGED[case]
    graph = ragged(wide(name), qk, v)
    graph = graph if ablation is None else cut_at_random(graph, ablation)
    other = tokens(3, N_POS, seed=2) if ablation == "resample" else None
    assert_equals_naive(graph, tokens(3, N_POS), padded(), other)


def test_ragged_shared_queries_and_keys_equal_the_plainest_executor():
    graph = wide("llama-tied-biased")
    stages = [
        dataclasses.replace(s, core=dataclasses.replace(s.core, rotary=None)) if isinstance(s.core, Attention) else s
        for s in graph.stages
    ]
    graph = ragged(dataclasses.replace(graph, stages=tuple(stages)), (3, 8), (8, 2))
    assert_equals_naive(graph, tokens(3, N_POS), padded())
    assert_equals_naive(cut_at_random(graph, "zero"), tokens(3, N_POS), padded())


def low_rank(linear: LinearMap) -> LinearMap:
    u, s, vt = torch.linalg.svd(linear.dense(), full_matrices=False)
    return LowRank(u[:, :5] * s[:5], Dense(vt[:5]))


def with_pivots(linear: LinearMap) -> LinearMap:
    weight = linear.dense()
    rank, d = 6, weight.shape[1]
    order = torch.randperm(d, generator=torch.Generator().manual_seed(0))
    right = Pivoted(weight[:rank, rank:] * 0.3, order[:rank], order[rank:])
    return LowRank(weight[:, :rank], right)


def in_pieces(linear: LinearMap) -> LinearMap:
    top, bottom = linear.dense()[:7], linear.dense()[7:]
    return Stacked((Dense(top), low_rank(Dense(bottom))))


def with_maps(graph: Graph, change: Callable[[LinearMap], LinearMap]) -> Graph:
    """The graph with every read and write of its channels replaced."""
    stages = []
    for stage in graph.stages:
        if stage.kind in ("attn", "mlp"):
            ports = tuple(
                dataclasses.replace(p, reads=tuple(dataclasses.replace(r, map=change(r.map)) for r in p.reads))
                for p in stage.ports
            )
            assert stage.write is not None
            stage = dataclasses.replace(stage, ports=ports, write=change(stage.write))
        stages.append(stage)
    return dataclasses.replace(graph, stages=tuple(stages))


@pytest.mark.parametrize("change", [low_rank, with_pivots, in_pieces])
@pytest.mark.parametrize("ablation", [None, "mean"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied-biased", "llama-multi-query", "gemma2"])
def test_graphs_of_cheaper_maps_equal_the_plainest_executor(name, change, ablation):
    graph = with_maps(wide(name), change)
    graph = graph if ablation is None else cut_at_random(graph, ablation)
    assert_equals_naive(graph, tokens(3, N_POS), padded())


def test_ragged_low_rank_reads_equal_the_plainest_executor():
    graph = ragged(wide("gpt2"), (8, 2, 4, 1), (3, 8, 1, 2))
    graph = with_maps(graph, low_rank)
    assert_equals_naive(graph, tokens(3, N_POS), padded())
    assert_equals_naive(cut_at_random(graph, "mean"), tokens(3, N_POS), padded())


# ---- laws of cutting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_restricting_twice_computes_what_restricting_to_both_does(name, ablation):
    graph = wide(name)
    a, b = random_keep(graph, 0.7, 1), random_keep(graph, 0.7, 2)
    extra: dict[str, Any] = {
        "ablation": ablation,
        "means": random_means(graph) if ablation == "mean" else None,
    }
    x, other = tokens(2, N_POS), tokens(2, N_POS, seed=2) if ablation == "resample" else None
    once = run(graph.restrict(a & b, **extra), x, counterfactual=other).logits
    for first, second in ((a, b), (b, a)):
        twice = run(graph.restrict(first, **extra).restrict(second, **extra), x, counterfactual=other).logits
        assert torch.allclose(once, twice, atol=1e-9)
    assert float((once - run(graph, x).logits).abs().max()) > 0.01  # the cut does something


@pytest.mark.parametrize("name", KINDS)
def test_quotient_and_uncut_keep_the_function(name):
    graph, x = graph_of(name), tokens(2, N_POS)
    before = run(graph, x).logits
    assert torch.equal(run(graph.quotient({"m": graph.nodes[1:4]}), x).logits, before)
    assert torch.equal(run(uncut(cut_at_random(graph, "mean")), x).logits, before)
    assert torch.equal(run(uncut(cut_at_random(graph, "resample")), x).logits, before)


@pytest.mark.parametrize("name", KINDS)
def test_resampling_from_the_same_input_changes_nothing(name):
    graph, x = wide(name), tokens(3, N_POS)
    cut = cut_at_random(graph, "resample", 0.3)
    assert torch.allclose(run(cut, x, padded(), counterfactual=x).logits, run(graph, x, padded()).logits, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_cutting_all_edges_out_of_a_node_is_patching_the_node(name):
    graph, x, other = wide(name), tokens(3, N_POS), tokens(3, N_POS, seed=2)
    means = random_means(graph)
    for node in ("embed", "blocks.0.attn.head.2", "blocks.0.mlp", "blocks.1.attn.head.0"):
        keep = [e for e in graph.edges if e.src != node]
        elsewhere = run(graph, other, record=[node]).values[node]
        ways: list[tuple[Graph, Tensor]] = [
            (graph.restrict(keep, means=means), means[node][0]),
            (graph.restrict(keep, ablation="zero"), torch.zeros(1)),
            (graph.restrict(keep, ablation="resample"), elsewhere),
        ]
        for cut, value in ways:
            by_cutting = run(cut, x, counterfactual=other if cut.resample else None).logits
            by_patching = run(graph, x, patch={node: value}).logits
            assert torch.allclose(by_cutting, by_patching, atol=1e-9)


# ---- patching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", [None, "mean"])
@pytest.mark.parametrize("name", KINDS)
def test_patching_a_value_with_itself_changes_nothing(name, ablation):
    graph = wide(name) if ablation is None else cut_at_random(wide(name), ablation)
    x, mask = tokens(3, N_POS), padded()
    truth = run(graph, x, mask, record=everything(graph))
    for value in everything(graph)[::5]:
        again = run(graph, x, mask, patch={value: truth.values[value]}).logits
        assert torch.allclose(again, truth.logits, atol=1e-9), value
    together = run(graph, x, mask, patch=dict(truth.values)).logits
    assert torch.allclose(together, truth.logits, atol=1e-9)
    edges = {str(e): (lambda v: v) for e in graph.edges[::7]}
    assert torch.allclose(run(graph, x, mask, patch=edges).logits, truth.logits, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_patching_an_edge_is_rebuilding_the_graph_by_hand(name):
    graph, x = wide(name), tokens(1, N_POS)
    for edge in graph.edges[1::9]:
        value = torch.randn(N_POS, 32, dtype=torch.float64)
        cut = graph.restrict([e for e in graph.edges if e != edge], means={edge.src: value})
        assert torch.allclose(run(graph, x, patch={str(edge): value}).logits, run(cut, x).logits, atol=1e-9), edge


@pytest.mark.parametrize("name", KINDS)
def test_patching_an_edge_of_a_cut_graph_is_rebuilding_it_by_hand(name):
    graph, x = cut_at_random(wide(name), "mean", 0.6), tokens(1, N_POS)
    for edge in graph.edges[1::9]:
        value = torch.randn(1, 32, dtype=torch.float64)
        cut = graph.restrict([e for e in graph.edges if e != edge], means={edge.src: value})
        assert torch.allclose(run(graph, x, patch={str(edge): value}).logits, run(cut, x).logits, atol=1e-9), edge


def test_several_patches_act_together_and_in_order():
    graph, x = wide("llama-tied-biased"), tokens(2, N_POS)
    edges = ["embed->blocks.1.mlp.in", "blocks.0.mlp->blocks.1.mlp.in"]
    values = [torch.randn(32, dtype=torch.float64) for _ in edges]
    before = run(graph, x, record=["blocks.1.mlp.in", "embed", "blocks.0.mlp"]).values
    after = run(graph, x, patch=dict(zip(edges, values, strict=True)), record=["blocks.1.mlp.in"]).values
    expected = before["blocks.1.mlp.in"] - before["embed"] - before["blocks.0.mlp"] + sum(values)
    assert torch.allclose(after["blocks.1.mlp.in"], expected, atol=1e-9)
    doubled = run(graph, x, patch={"embed": lambda v: 2 * v, edges[0]: lambda v: v / 2}, record=["embed"])
    assert torch.allclose(doubled.values["embed"], 2 * before["embed"], atol=1e-12)
    others = [str(e) for e in graph.edges if e.src == "embed" and str(e) != edges[0]]
    same = run(graph, x, patch={name: lambda v: 2 * v for name in others})
    assert torch.allclose(doubled.logits, same.logits, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_a_head_that_hears_another_input_does_what_it_does_there(name):
    graph, x, other = wide(name), tokens(2, N_POS), tokens(2, N_POS, seed=2)
    head = "blocks.1.attn.head.3"
    parts = [f"{head}.{part}" for part in ("q", "k", "v", "code", "pattern")]
    there = run(graph, other, record=parts).values
    moved = run(graph, x, patch={p: there[p] for p in parts[:3]}, record=parts).values
    assert torch.allclose(moved[f"{head}.code"], there[f"{head}.code"], atol=1e-9)
    assert torch.allclose(moved[f"{head}.pattern"], there[f"{head}.pattern"], atol=1e-9)
    by_port = run(graph, x, patch={p: there[p] for p in parts[:3]}).logits
    by_code = run(graph, x, patch={f"{head}.code": there[f"{head}.code"]}).logits
    assert torch.allclose(by_port, by_code, atol=1e-9)


def test_a_patched_pattern_mixes_the_values_as_it_says():
    graph, x = wide("llama"), tokens(2, N_POS)
    head, first = "blocks.0.attn.head.1", torch.zeros(N_POS, N_POS, dtype=torch.float64)
    first[:, 0] = 1
    code = run(graph, x, patch={f"{head}.pattern": first}, record=[f"{head}.code"]).values[f"{head}.code"]
    untouched = run(graph, x, record=[f"{head}.code"]).values[f"{head}.code"]
    assert torch.allclose(code, untouched[:, :1].expand_as(code), atol=1e-12)


def test_a_patched_output_is_the_output():
    graph, x = wide("gpt2"), tokens(2, 3)
    out = run(graph, x, patch={"unembed.code": torch.ones(50).double()}, record=["unembed.in"])
    assert torch.equal(out.logits, torch.ones(2, 3, 50).double())


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ablation", [None, "mean"])
@pytest.mark.parametrize("name", KINDS)
def test_what_stands_at_padded_positions_does_not_matter(name, ablation, side):
    graph = wide(name) if ablation is None else cut_at_random(wide(name), ablation)
    x, mask = tokens(3, N_POS), padded(side=side)
    changed = torch.where(mask, x, (x + 17) % 50)
    a, b = run(graph, x, mask).logits, run(graph, changed, mask).logits
    assert torch.allclose(a[mask], b[mask], atol=1e-12)
    assert not torch.allclose(a[~mask], b[~mask], atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_right_padding_is_as_if_it_were_not_there(name):
    graph, x = wide(name), tokens(2, N_POS)
    mask = torch.ones(2, N_POS, dtype=torch.bool)
    mask[:, 4:] = False
    assert torch.allclose(run(graph, x, mask).logits[:, :4], run(graph, x[:, :4]).logits, atol=1e-12)
    assert torch.equal(run(graph, x, torch.ones_like(mask)).logits, run(graph, x).logits)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["mean", "resample", None])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_through_a_cut_graph_are_those_of_finite_differences(name, ablation):
    graph = wide(name) if ablation is None else cut_at_random(wide(name), ablation, 0.7)
    x, other = tokens(1, 4), tokens(1, 4, seed=2) if ablation == "resample" else None
    base = run(graph, x, record=["embed"], counterfactual=other).values["embed"].detach()
    directions = torch.randn(3, 4, 32, dtype=torch.float64)
    weights = torch.randn(1, 4, 50, dtype=torch.float64)

    def loss(amounts: Tensor) -> Tensor:
        value = base + torch.einsum("k,ktd->td", amounts, directions)
        return (run(graph, x, patch={"embed": value}, counterfactual=other).logits * weights).sum()

    assert torch.autograd.gradcheck(loss, torch.zeros(3, dtype=torch.float64, requires_grad=True))


def trainable(graph: Graph, names: Callable[[str], bool]) -> tuple[Graph, list[Tensor]]:
    """The graph with some tensors as leaves that require gradients."""
    chosen = {path: t.clone().requires_grad_() for path, t in tree.tensors(graph.stages).items() if names(path)}
    return dataclasses.replace(graph, stages=tree.replace_tensors(graph.stages, chosen)), list(chosen.values())


TRAINED: dict[str, tuple[Callable[[], Graph], Callable[[str], bool]]] = {
    "dense": (lambda: wide("llama-tied-biased"), lambda path: path.endswith("weight")),
    "dense-cut": (
        lambda: cut_at_random(wide("llama-tied-biased"), "mean"),
        lambda path: path.endswith("weight"),
    ),
    "low-rank-cut": (
        lambda: cut_at_random(with_maps(wide("llama"), low_rank), "mean"),
        lambda path: path.endswith(("left", "right.weight")),
    ),
    "right-factors": (
        lambda: cut_at_random(with_maps(wide("llama"), low_rank), "mean"),
        lambda path: path.endswith("right.weight"),
    ),
    "pivoted-cut": (
        lambda: cut_at_random(with_maps(wide("llama"), with_pivots), "mean"),
        lambda path: path.endswith("rest"),
    ),
    "ragged": (
        lambda: ragged(wide("gpt2"), (8, 2, 4, 1), (3, 8, 1, 2)),
        lambda path: path.endswith("weight"),
    ),
    "ragged-biases": (
        lambda: ragged(wide("gpt2"), (8, 2, 4, 1), (3, 8, 1, 2)),
        lambda path: path.endswith("bias") and "reads" in path,
    ),
    "constants": (lambda: cut_at_random(wide("gpt2"), "mean"), lambda path: path.endswith("offset")),
    "stacked-cut": (
        lambda: cut_at_random(with_maps(wide("llama"), in_pieces), "mean"),
        lambda path: ".maps." in path and path.endswith("weight"),
    ),
    "gains": (lambda: cut_at_random(wide("gemma2"), "mean"), lambda path: path.endswith("gain")),
}


@pytest.mark.parametrize("case", sorted(TRAINED))
def test_factors_train_step_after_step(case):
    make, names = TRAINED[case]
    graph, parameters = trainable(make(), names)
    x, weights = tokens(1, 4), torch.randn(1, 4, 50, dtype=torch.float64)
    assert parameters
    for _ in range(2):  # what is worked out once per graph must not outlive a step
        loss = (run(graph, x).logits * weights).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        directions = [
            torch.zeros_like(p) if g is None else g / (g.norm() + 1e-12)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
        with torch.no_grad():
            losses = []
            for step in (1e-6, -1e-6):
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=step)
                losses.append(float((run(graph, x).logits * weights).sum()))
                for p, d in zip(parameters, directions, strict=True):
                    p.sub_(d, alpha=step)
            assert slope > 0
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=0.1)


def test_a_graph_run_in_inference_mode_can_be_differentiated_later():
    for graph in (cut_at_random(graph_of("llama"), "zero"), ragged(graph_of("gpt2"), None, (8, 3, 1, 5))):
        graph = dataclasses.replace(graph)  # never run before
        x = tokens(1, 4)
        with torch.inference_mode():
            run(graph, x, record=["blocks.0.attn.head.1"])
        value = torch.randn(1, 4, 32, requires_grad=True)
        run(graph, x, patch={"embed": value}).logits.square().sum().backward()
        assert value.grad is not None
        assert float(value.grad.abs().max()) > 0


def test_what_is_kept_for_a_graph_goes_with_it():
    graph = dataclasses.replace(graph_of("gpt2"))
    run(graph, tokens(1, 3))
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    assert gone() is None


# ---- refusals ------------------------------------------------------------------------------------------------------

unchecked_run = inspect.unwrap(run)  # as users call it: without the type checks that the tests run under


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            ShapeError,
            r"token ids must be integers \[batch, pos\], got torch.float32 \(2, 3\)",
        ),
        (torch.zeros(2, 3, dtype=torch.bool), ShapeError, "token ids must be integers"),
        (
            torch.zeros(3, dtype=torch.long),
            ShapeError,
            r"token ids must be integers \[batch, pos\], got torch.int64 \(3,\)",
        ),
        (torch.zeros(1, 2, 3, dtype=torch.long), ShapeError, "token ids must be integers"),
        (torch.zeros(0, 3, dtype=torch.long), ShapeError, r"inputs are empty: \(0, 3\)"),
        (torch.zeros(3, 0, dtype=torch.long), ShapeError, r"inputs are empty: \(3, 0\)"),
        (
            torch.zeros(1, 65, dtype=torch.long),
            InputError,
            "a sequence of 65 tokens is longer than the context of 64",
        ),
        (torch.full((1, 3), 50), InputError, "token id 50 is outside the vocabulary of 50"),
        (torch.full((1, 3), -1), InputError, "token id -1 is outside the vocabulary of 50"),
    ],
)
def test_inputs_a_model_cannot_read_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        unchecked_run(graph_of("gpt2"), inputs)


def test_inputs_are_checked_on_graphs_that_read_real_vectors():
    graph = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    for bad in (torch.zeros(2, 4), torch.zeros(2, 1, 5), torch.zeros(2, 4, dtype=torch.long)):
        with pytest.raises(ShapeError, match=r"inputs must be reals \[batch, pos, 4\]"):
            unchecked_run(graph, bad)


def test_masks_and_counterfactuals_of_the_wrong_shape_are_refused():
    graph, x = graph_of("gpt2"), tokens(2, 5)
    with pytest.raises(ShapeError, match=r"mask must have shape \(2, 5\), got \(2, 4\)"):
        run(graph, x, torch.ones(2, 4, dtype=torch.bool))
    cut = cut_at_random(graph, "resample")
    with pytest.raises(InputError, match="cut edges hear another input: pass counterfactual"):
        run(cut, x)
    with pytest.raises(ShapeError, match=r"counterfactual must have shape \(2, 5\), got \(2, 6\)"):
        run(cut, x, counterfactual=tokens(2, 6))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.mpl", "no value is named 'blocks.0.mpl'; the closest: blocks.0.mlp"),
        ("blocks.0.mlp.pattern", "no value is named 'blocks.0.mlp.pattern'"),
        ("blocks.0.mlp.q", "no value is named 'blocks.0.mlp.q'"),
        ("unembed", "no value is named 'unembed'; the closest: embed, unembed.in, unembed.code"),
    ],
)
def test_unknown_values_are_refused(name, message):
    for extra in ({"record": [name]}, {"patch": {name: torch.zeros(1)}}):
        with pytest.raises(UnknownNameError, match=message):
            run(graph_of("gpt2"), tokens(1, 3), **extra)


def test_edges_that_are_not_there_cannot_be_patched():
    graph, x = graph_of("gpt2"), tokens(1, 3)
    cut = graph.restrict(graph.edges[1:], ablation="zero")
    with pytest.raises(InputError, match=rf"{graph.edges[0]} is cut in this graph and cannot be patched"):
        run(cut, x, patch={str(graph.edges[0]): torch.zeros(1)})
    with pytest.raises(InputError, match="does not come after"):
        run(graph, x, patch={"blocks.1.mlp->blocks.0.mlp.in": torch.zeros(1)})
    with pytest.raises(UnknownNameError, match="no value is named 'embed->unembed.in'"):
        run(graph, x, record=["embed->unembed.in"])


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(1, 1, 1, 32), torch.zeros(2, 3, 32), lambda v: 3.0])
@pytest.mark.parametrize("name", ["embed", "blocks.0.mlp.in", "embed->blocks.0.mlp.in"])
def test_patches_of_the_wrong_shape_are_refused(name, value):
    with pytest.raises(ShapeError, match=rf"the patch of {name} must have shape \(1, 3, 32\), got"):
        unchecked_run(graph_of("gpt2"), tokens(1, 3), patch={name: value})


def test_errors_inside_a_run_say_where():
    graph = cut_at_random(graph_of("gpt2"), "position")
    with pytest.raises(InputError, match="cover 9 positions and the input has 10") as caught:
        run(graph, tokens(1, 10))
    assert caught.value.__notes__[0].startswith("while running blocks.0.attn.head.0, blocks.0.attn.head.1")
