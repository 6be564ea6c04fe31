"""Circuits of heads and effects of paths against the plainest code: dense matrices, nested hooks, sums over chains."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
from families import random_model
from oracles import _code, _reads, naive_run

import unweave
from unweave.capture import capture
from unweave.data import from_tensor
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError, UnsupportedModelError
from unweave.execution import run
from unweave.ops import Dense, LayerNorm, LowRank, Pivoted, Stacked
from unweave.paths import (
    composition,
    direct_effect,
    expand_paths,
    ov_circuit,
    path_effect,
    qk_circuit,
    virtual_weight,
)
from unweave.paths.circuits import positive_share
from unweave.paths.weights import check_token_ids
from unweave.scope import Scope, divergence
from unweave.scoring import score_edges
from unweave.statistics import collect_means
from unweave.zoo import ToyConfig, ToyTransformer
from unweave.zoo.tracr import true_edges

# a family each for: learned positions, partial rotary, grouped queries with biases, norms of q and k, caps and post norms
NAMES = ["gpt2", "gpt_neox-partial", "llama-tied-biased", "qwen3", "gemma2"]
HEAD = "blocks.0.attn.head.{}"


@pytest.fixture(scope="module")
def families():
    return {name: capture(random_model(name), verify=False).to(dtype=torch.float64) for name in NAMES}


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(1)
    model = ToyTransformer(ToyConfig(3, 2, 16, 8, 0, d_vocab=11, d_out=11, n_ctx=10))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return capture(model, verify=False).to(dtype=torch.float64)


def tokens_of(n=3, pos=7, vocabulary=50, seed=3):
    return torch.randint(vocabulary, (n, pos), generator=torch.Generator().manual_seed(seed))


def linear_part(norm, x):
    """The norm of x times what it divided by: what is linear in x."""
    if norm is None:
        return x
    wide = x - x.mean(-1, keepdim=True) if isinstance(norm, LayerNorm) else x
    spread = (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    return (norm.apply(x) - norm.apply(torch.zeros_like(x))) * spread


def block(map_, widths, i, n):
    group = i // (n // len(widths))
    start = sum(widths[:group])
    return map_.dense()[start : start + widths[group]]


# ---- virtual weights ------------------------------------------------------------------------------------


def naive_virtual(graph, src, dst, port_name, read=0):
    """Each column: what the read hears when the writer's code is one unit vector."""
    source, j = graph.find(src)
    stage, i = graph.find(dst)
    port = next(p for p in stage.ports if p.name == port_name)
    if source.kind == "embed":
        written = source.core.table * source.core.scale
    else:
        start = sum(source.code_widths[:j])
        written = source.write.dense()[:, start : start + source.code_widths[j]].T
    if source.post is not None:
        written = written * source.post.gain
    weight = block(port.reads[read].map, port.reads[read].widths, i, len(stage.nodes))
    return (linear_part(port.norm, written) @ weight.T).T


EDGES = [
    ("blocks.0.attn.head.1", "blocks.1.attn.head.2", "q"),
    ("blocks.0.attn.head.3", "blocks.1.attn.head.2", "k"),
    ("blocks.0.mlp", "blocks.1.attn.head.3", "v"),
    ("embed", "blocks.0.mlp", "in"),
    ("blocks.1.attn.head.0", "unembed", "in"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("src", "dst", "port"), EDGES)
def test_a_virtual_weight_is_what_a_port_reads_of_each_unit_of_the_code(families, name, src, dst, port):
    graph = families[name]
    stage, _ = graph.find(dst)
    for r in range(len(next(p for p in stage.ports if p.name == port).reads)):
        got = virtual_weight(graph, f"{src}->{dst}.{port}", read=r)
        assert torch.allclose(got, naive_virtual(graph, src, dst, port, r), atol=1e-9)


def as_low_rank(map_, rank=3):
    u, s, v = torch.linalg.svd(map_.dense(), full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], Dense(v[:rank]))


def with_maps(graph, change):
    """The graph with read and write maps of attention changed."""
    stages = []
    for stage in graph.stages:
        if stage.kind == "attn":
            ports = tuple(
                dataclasses.replace(p, reads=tuple(dataclasses.replace(r, map=change(r.map, r)) for r in p.reads))
                for p in stage.ports
            )
            stage = dataclasses.replace(stage, ports=ports, write=change(stage.write, None))
        stages.append(stage)
    return dataclasses.replace(graph, stages=tuple(stages))


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "gemma2"])
def test_low_rank_maps_offer_their_codes(families, name):
    graph = with_maps(families[name], lambda m, r: as_low_rank(m))
    src, dst = "blocks.0.attn.head.1", "blocks.1.attn.head.2"
    whole = virtual_weight(graph, f"{src}->{dst}.k")
    assert torch.allclose(whole, naive_virtual(graph, src, dst, "k"), atol=1e-9)
    small = virtual_weight(graph, f"{src}->{dst}.k", codes=True)
    assert small.shape == (3, 3)
    stage, i = graph.find(dst)
    read = stage.ports[1].reads[0]
    left = block(Dense(read.map.left), read.widths, i, len(stage.nodes))
    right = graph.stages[graph.where[src][0]].write.right.dense()[:, 8:16] if name != "gemma2" else None
    if right is None:
        right = graph.stages[graph.where[src][0]].write.right.dense()[:, 16:32]
    assert torch.allclose(left @ small @ right, whole, atol=1e-9)


def test_stacked_and_pivoted_maps(families):
    def change(map_, read):
        if read is None:
            return map_
        parts, start = [], 0
        for width in read.widths:
            rows = map_.dense()[start : start + width]
            start += width
            pivots, others = torch.arange(width), torch.arange(width, map_.d_in)
            pivoted = Pivoted(torch.linalg.solve(rows[:, :width], rows[:, width:]), pivots, others)
            parts.append(pivoted if len(parts) % 2 else LowRank(rows[:, :width], pivoted))
        return Stacked(tuple(parts))

    graph = with_maps(families["llama-tied-biased"], change)
    for i, port in product(range(4), "qkv"):
        src, dst = "blocks.0.mlp", f"blocks.1.attn.head.{i}"
        got = virtual_weight(graph, f"{src}->{dst}.{port}")
        assert torch.allclose(got, naive_virtual(graph, src, dst, port), atol=1e-8)
    stage, _ = graph.find("blocks.1.attn.head.0")
    codes = virtual_weight(graph, "blocks.0.mlp->blocks.1.attn.head.0.q", codes=True)
    left = stage.ports[0].reads[0].map.maps[0].left
    assert torch.allclose(left @ codes, virtual_weight(graph, "blocks.0.mlp->blocks.1.attn.head.0.q"), atol=1e-8)


def test_virtual_weights_of_compressed_graphs(induction, induction_data):
    small = unweave.compress(induction, induction_data, size=0.5)
    assert small.n_channel_parameters < 0.6 * induction.n_channel_parameters
    for edge in small.edges:
        got, expected = virtual_weight(small, edge), naive_virtual(small, edge.src, edge.dst, edge.port)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-4)
    # heads of different widths, some of none
    assert composition(small).table(1)[0]["edge"] == "blocks.0.attn.head.0->blocks.1.attn.head.1.k"


def test_chosen_tokens_are_columns(families):
    graph = families["gemma2"]
    whole = virtual_weight(graph, "embed->unembed.in")
    assert whole.shape == (50, 50)
    part = virtual_weight(graph, "embed->unembed.in", tokens=torch.tensor([7, 3]))
    assert torch.allclose(part, whole[:, [7, 3]])


def test_where_there_is_no_stream_virtual_weights_are_the_layers():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    graph = capture(model)
    assert torch.equal(virtual_weight(graph, "input->layers.0.in"), model[0].weight)
    assert torch.equal(virtual_weight(graph, "layers.0->output.in"), model[2].weight)


def test_bfloat16_is_computed_in_float32(induction):
    graph = induction.to(dtype=torch.bfloat16)
    assert virtual_weight(graph, "embed->unembed.in").dtype == torch.float32


def test_virtual_weights_that_are_not_there_are_refused(induction, monkeypatch):
    with pytest.raises(UnknownNameError, match="no port"):
        virtual_weight(induction, "embed->blocks.0.attn.head.0.z")
    with pytest.raises(InputError, match="does not come after"):
        virtual_weight(induction, "blocks.1.attn.head.0->blocks.0.attn.head.0.q")
    with pytest.raises(InputError, match="1 read"):
        virtual_weight(induction, "embed->unembed.in", read=1)
    with pytest.raises(InputError, match="is none"):
        virtual_weight(induction, "blocks.0.attn.head.0->unembed.in", tokens=torch.tensor([1]))
    with pytest.raises(InputError, match="from 0 to 47"):
        virtual_weight(induction, "embed->unembed.in", tokens=torch.tensor([48]))
    for tokens in (torch.tensor([[1]]), torch.tensor([1.0])):
        with pytest.raises(ShapeError, match="integers"):
            check_token_ids(tokens, 48)
    cut = induction.restrict([e for e in induction.edges if e.src != "embed"], ablation="zero")
    with pytest.raises(InputError, match="is cut"):
        virtual_weight(cut, "embed->unembed.in")
    monkeypatch.setattr("unweave.paths.weights.LARGEST_TABLE", 100)
    with pytest.raises(InputError, match="tokens="):
        virtual_weight(induction, "embed->unembed.in")


# ---- QK and OV ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_token_scores_are_the_true_scores_of_the_first_layer(families, name):
    """log A[t, s] - log A[t, t] is a difference of two scores of the pattern the executor computes."""
    graph, tokens = families[name], tokens_of(1, 5)
    for i in (1, 3):
        pattern = run(graph, tokens, record=[HEAD.format(i) + ".pattern"]).values[HEAD.format(i) + ".pattern"][0].log()
        circuit = qk_circuit(graph, HEAD.format(i))
        for t, s in product(range(5), range(5)):
            if s > t:
                continue
            learned = {"positions": (t, s)} if name == "gpt2" else {"distance": t - s}
            itself = {"positions": (t, t)} if name == "gpt2" else {"distance": 0}
            here = circuit.token_scores(tokens[0, [t]], tokens[0, [s]], **learned)
            there = circuit.token_scores(tokens[0, [t]], **itself)
            assert math.isclose(float(here - there), float(pattern[t, s] - pattern[t, t]), rel_tol=1e-6, abs_tol=1e-6)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt_neox-partial", "qwen3"])
def test_factors_are_the_bilinear_form_of_scores(families, name):
    """Without biases and scales of norms: W_Q^T R W_K, with the rotation as a matrix made from complex numbers."""
    graph = families[name]
    stage, i = graph.find(HEAD.format(2))
    core, distance = stage.core, 3
    q, k = (block(p.reads[0].map, p.reads[0].widths, i, 4) for p in stage.ports[:2])
    planes, width = len(core.rotary.inv_freq), q.shape[0]
    rotation = torch.eye(width, dtype=torch.float64)
    for p, frequency in enumerate(core.rotary.inv_freq.double().tolist()):
        z = complex(math.cos(distance * frequency), math.sin(distance * frequency))
        rotation[p, p] = rotation[planes + p, planes + p] = z.real
        rotation[planes + p, p], rotation[p, planes + p] = z.imag, -z.imag
    if core.q_norm is not None:
        q, k = core.q_norm.gain[:, None] * q, core.k_norm.gain[:, None] * k
    eye = torch.eye(q.shape[1], dtype=torch.float64)
    n = linear_part(stage.ports[0].norm, eye)  # row j: what the norm makes of unit vector j
    expected = (n @ q.T @ rotation.T) @ (n @ k.T).T * core.scale
    assert torch.allclose(qk_circuit(graph, HEAD.format(2)).matrix(distance), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt_neox-partial", "qwen3"])
def test_token_logits_are_what_a_head_writes_of_one_token(families, name):
    graph = families[name]
    tokens = torch.arange(50)[:, None]
    last = graph.stages[-1]
    for i in (0, 3):
        written = run(graph, tokens, record=[HEAD.format(i)]).values[HEAD.format(i)][:, 0]
        expected = linear_part(last.ports[0].norm, written) @ last.ports[0].reads[0].map.dense().T
        circuit = ov_circuit(graph, HEAD.format(i))
        assert torch.allclose(circuit.token_logits(), expected, atol=1e-8)
        chosen, outs = torch.tensor([4, 9]), torch.tensor([1, 2, 3])
        assert torch.allclose(circuit.token_logits(chosen, outs), expected[chosen][:, outs], atol=1e-8)
        own = expected.diagonal() - expected.mean(1)
        assert torch.allclose(circuit.own_logits(), own, atol=1e-8)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2"])
def test_copying_and_matching_are_eigenvalues_of_the_whole_table(families, name):
    graph = families[name]
    stage, i = graph.find(HEAD.format(1))
    embedded = graph.stages[0].core.table
    norm = stage.ports[0].norm
    x = norm.apply(embedded) - norm.apply(torch.zeros_like(embedded))
    q, k, v = (block(p.reads[0].map, p.reads[0].widths, i, 4) for p in stage.ports)
    last = graph.stages[-1]
    written = x @ v.T @ stage.write.dense()[:, 8:16].T
    table = linear_part(last.ports[0].norm, written) @ last.ports[0].reads[0].map.dense().T
    for matrix, got in [
        (table, ov_circuit(graph, HEAD.format(1)).copying()),
        ((x @ q.T) @ (x @ k.T).T, qk_circuit(graph, HEAD.format(1)).matching()),
    ]:
        values = torch.linalg.eigvals(matrix)
        assert math.isclose(got, float(values.real.sum() / values.abs().sum()), abs_tol=1e-6)


def test_a_head_that_copies_and_one_that_suppresses():
    x = torch.randn(9, 4, dtype=torch.float64)
    assert positive_share(x, x) == pytest.approx(1)
    assert positive_share(-x, x) == pytest.approx(-1)
    assert positive_share(0 * x, x) == 0


def test_the_induction_head_copies_and_reads_the_previous_token(induction):
    found = unweave.zoo.known("induction")
    (head,), (before,) = found["induction_heads"], found["previous_token_heads"]
    assert ov_circuit(induction, head).copying() > 0.9
    logits = ov_circuit(induction, head).token_logits()
    assert (logits[1:].argmax(1) == torch.arange(1, 48)).all()
    best = composition(induction).table(1)[0]
    assert best["edge"] == f"{before}->{head}.k"
    assert best["score"] > 0.1


def test_circuits_that_are_not_there_are_refused(induction, shared, monkeypatch):
    for circuit in (qk_circuit, ov_circuit):
        with pytest.raises(UnknownNameError, match="attention head"):
            circuit(induction, "embed")
    qk = qk_circuit(induction, HEAD.format(0))
    with pytest.raises(InputError, match="table of 48 positions"):
        qk.token_scores(torch.tensor([1]), positions=(48, 0))
    with pytest.raises(InputError, match="from 0 to 47"):
        qk.token_scores(torch.tensor([], dtype=torch.int64))
    hist = capture(shared / "models" / "tracr" / "hist")
    with pytest.raises(InputError, match="its own output"):
        ov_circuit(hist, HEAD.format(0)).copying()
    monkeypatch.setattr("unweave.paths.weights.LARGEST_TABLE", 100)
    with pytest.raises(InputError, match="tokens="):
        qk.token_scores()
    with pytest.raises(InputError, match="tokens="):
        ov_circuit(induction, HEAD.format(0)).token_logits()


# ---- composition ----------------------------------------------------------------------------------------


def head_matrices(graph, node, distance):
    """QK and OV of a head as d x d matrices; QK from the factors tested above."""
    return qk_circuit(graph, node).matrix(distance), ov_circuit(graph, node).matrix()


@pytest.mark.parametrize("name", NAMES)
def test_composition_is_the_ratio_of_norms(families, name):
    graph, distance = families[name], 2
    got = composition(graph, distance=distance)
    heads = got.heads
    for b, reader in enumerate(heads):
        for a, writer in enumerate(heads):
            if int(writer.split(".")[1]) >= int(reader.split(".")[1]):
                assert torch.stack([got.q[b, a], got.k[b, a], got.v[b, a]]).isnan().all()
                continue
            qk, ov_b = head_matrices(graph, reader, distance)
            _, ov = head_matrices(graph, writer, distance)
            for left, score in ((qk.T, got.q), (qk, got.k), (ov_b, got.v)):
                ratio = (left @ ov).norm() / (left.norm() * ov.norm()) - 32**-0.5
                assert math.isclose(float(score[b, a]), float(ratio), abs_tol=1e-5)


def test_the_baseline_is_that_of_heads_turned_at_random(families):
    graph = families["gpt2"]
    qk, _ = head_matrices(graph, "blocks.1.attn.head.0", 0)
    _, ov = head_matrices(graph, "blocks.0.attn.head.0", 0)
    turns = torch.linalg.qr(torch.randn(800, 32, 32, dtype=torch.float64))[0]
    squared = ((qk @ turns @ ov).norm(dim=(1, 2)) / (qk.norm() * ov.norm())).square().mean()
    assert math.isclose(float(squared.sqrt()), composition(graph).baseline, rel_tol=0.03)


def test_composition_weighted_by_data(toy):
    data = from_tensor(tokens_of(4, 8, 11), mask=torch.arange(8) < torch.tensor([[8], [5], [8], [3]]))
    got = composition(toy, data=data, batch_size=3)
    assert got.weighted
    batch = next(data.batches(4))
    writer, reader = "blocks.0.attn.head.1", "blocks.2.attn.head.0"
    written = run(toy, batch.inputs, batch.mask, record=[writer]).values[writer][batch.mask]
    spread = written - written.mean(0)
    for left, score in ((qk_circuit(toy, reader).matrix(), got.k), (qk_circuit(toy, reader).matrix().T, got.q)):
        ratio = (spread @ left.T).norm() / (left.norm() * spread.norm()) - 0.25
        assert math.isclose(float(score[4, 1]), float(ratio), abs_tol=1e-5)


def test_composition_knows_cut_edges_and_idle_heads(induction):
    edge = "blocks.0.attn.head.0->blocks.1.attn.head.1.k"
    cut = induction.restrict([e for e in induction.edges if str(e) != edge], ablation="zero")
    assert composition(cut).k[3, 0].isnan()
    assert not composition(induction).k[3, 0].isnan()
    idle = with_maps(
        induction, lambda m, read: m if read is None else Dense(m.dense() * (torch.arange(64) < 32)[:, None])
    )
    assert composition(idle).k[3, 0] == 0  # a head whose reads are zero composes with none
    assert composition(idle).k[2, 0] != 0
    assert len(composition(induction).table()) == 12


def test_composition_without_heads_is_refused():
    with pytest.raises(InputError, match="no attention heads"):
        composition(capture(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))))


# ---- effects of paths -----------------------------------------------------------------------------------


def naive_code(graph, tokens, heard, node, changed_port, x, frozen):
    """One node run again with one port changed, head by head; scales and patterns taken from the clean run."""
    stage, i = graph.find(node)
    reads = []
    for port in stage.ports:
        clean = heard[f"{node}.{port.name}"]
        new = x if port.name == changed_port else clean
        if frozen == "patterns and norms" and port.norm is not None:
            centred = clean - clean.mean(-1, keepdim=True) if isinstance(port.norm, LayerNorm) else clean
            inverse = (centred.pow(2).mean(-1, keepdim=True) + port.norm.eps).rsqrt()
            normed = linear_part(port.norm, new) * inverse + port.norm.apply(torch.zeros_like(new))
            bare = dataclasses.replace(port, norm=None)
            reads += _reads(stage, bare, i, normed)
        else:
            reads += _reads(stage, port, i, new)
    if frozen != "none" and stage.kind == "attn":
        pattern = run(graph, tokens, record=[node + ".pattern"]).values[node + ".pattern"]
        return pattern @ reads[2]
    core = stage.core
    return naive_core(core, stage, i, reads, tokens)


def naive_core(core, stage, i, reads, tokens):
    return _code(stage, i, reads, tokens, torch.ones_like(tokens, dtype=torch.bool))


def naive_path_logits(graph, tokens, path, mean, frozen):
    _, written, heard = naive_run(graph, tokens)
    sent = mean.expand_as(written[path[0].src])
    for edge in path:
        x = heard[f"{edge.dst}.{edge.port}"] + sent - written[edge.src]
        code = naive_code(graph, tokens, heard, edge.dst, edge.port, x, frozen)
        stage, i = graph.find(edge.dst)
        if stage.write is None:
            return code
        start = sum(stage.code_widths[:i])
        sent = code @ stage.write.dense()[:, start : start + stage.code_widths[i]].T
    raise AssertionError("the path must end at the output")


PATHS = [
    ["embed->unembed.in"],
    ["embed->blocks.0.attn.head.1.v", "blocks.0.attn.head.1->unembed.in"],
    ["embed->blocks.0.attn.head.2.q", "blocks.0.attn.head.2->blocks.1.attn.head.3.k", "blocks.1.attn.head.3->unembed.in"],
    ["blocks.0.attn.head.0->blocks.0.mlp.in", "blocks.0.mlp->blocks.1.attn.head.1.v", "blocks.1.attn.head.1->blocks.1.mlp.in", "blocks.1.mlp->unembed.in"],
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox-sequential", "llama-tied-biased"])
@pytest.mark.parametrize("frozen", ["none", "patterns", "patterns and norms"])
def test_effects_of_paths_are_those_of_nested_hooks(name, frozen):
    graph = capture(random_model(name), verify=False).to(dtype=torch.float64)
    data = from_tensor(tokens_of(3, 4))
    means = {n: m.double() for n, m in collect_means(graph, data).items()}
    batch = next(data.batches(3))
    clean = run(graph, batch.inputs).logits
    for texts in PATHS:
        path = [unweave.Edge.parse(e) for e in texts]
        truth = divergence(
            Scope(), clean, naive_path_logits(graph, batch.inputs, path, means[path[0].src], frozen), batch
        )
        got = path_effect(graph, data, texts, means, frozen=frozen, batch_size=2)
        assert f"frozen: {got.frozen})" in str(got)
        assert got.frozen == frozen
        assert math.isclose(got.nats, float(truth.mean()), rel_tol=1e-4, abs_tol=1e-9)
        per_sequence = truth.sum(1) - truth.mean() * 4
        assert math.isclose(
            got.se, float((per_sequence.square().sum() * 3 / 2).sqrt() / 12), rel_tol=1e-3, abs_tol=1e-9
        )


@pytest.mark.parametrize("cut", [False, True])
def test_one_edge_is_a_path(cut):
    graph = capture(random_model("gemma2"), verify=False)
    data = from_tensor(tokens_of(4, 6), mask=torch.arange(6) < torch.tensor([[6], [6], [3], [5]]))
    means = collect_means(graph, data)
    if cut:
        keep = torch.rand(graph.possible_edges.shape, generator=torch.Generator().manual_seed(0)) < 0.7
        graph = graph.restrict(keep, means=means)
    exact = score_edges(graph, data, method="exact", means=means)
    for j, i in graph.edge_matrix.nonzero()[::37]:
        (edge,) = graph.name_edges(torch.zeros_like(graph.edge_matrix).index_put((j, i), torch.tensor(True)))
        got = path_effect(graph, data, [edge], means)
        assert math.isclose(got.nats, float(exact.nats[j, i]), rel_tol=2e-2, abs_tol=2e-6)
        assert math.isclose(got.se, float(exact.se[j, i]), rel_tol=3e-2, abs_tol=2e-6)


def test_frozen_norms_hold_in_cut_graphs(families):
    graph = families["llama-tied-biased"]
    data = from_tensor(tokens_of(2, 4))
    means = {n: m.double() for n, m in collect_means(graph, data).items()}
    keep = torch.rand(graph.possible_edges.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    cut = graph.restrict(keep | graph.mark_edges(PATHS[2]), means=means)
    batch = next(data.batches(2))
    path = [unweave.Edge.parse(e) for e in PATHS[2]]
    for texts in (PATHS[2], [PATHS[2][1].replace(".k", ".v"), PATHS[2][2]]):
        path = [unweave.Edge.parse(e) for e in texts]
        if bool((cut.mark_edges(path) & ~cut.edge_matrix).any()):
            continue
        logits = naive_path_logits(cut, batch.inputs, path, means[path[0].src], "patterns and norms")
        truth = divergence(Scope(), run(cut, batch.inputs).logits, logits, batch).mean()
        got = path_effect(cut, data, texts, means, frozen="patterns and norms")
        assert math.isclose(got.nats, float(truth), rel_tol=1e-4, abs_tol=1e-9)


def test_the_induction_circuit_is_a_path(induction):
    data = unweave.load_data("zoo:induction", limit=16)
    scope, means = Scope("answered"), collect_means(induction, data)
    head, before = "blocks.1.attn.head.1", "blocks.0.attn.head.0"
    way = [f"embed->{before}.v", f"{before}->{head}.k", f"{head}->unembed.in"]
    assert path_effect(induction, data, way, means, scope).nats > 1
    assert path_effect(induction, data, way, means, scope, frozen="patterns").nats < 1e-9  # it passes by the pattern
    other = [f"embed->{before}.v", f"{before}->{head}.q", f"{head}->unembed.in"]
    assert path_effect(induction, data, other, means, scope).nats < 0.1
    direct = direct_effect(induction, data, head, means, scope)
    assert direct.path == (unweave.Edge(head, "unembed", "in"),)
    assert direct.nats > 1 > direct_effect(induction, data, before, means, scope).nats


@pytest.mark.parametrize("model", ["reverse", "frac_prevs", "sort_unique"])
def test_true_edges_of_tracr_make_paths_and_others_do_not(shared, model):
    folder, scope = shared / "models" / "tracr" / model, Scope(divergence="gaussian")
    graph = capture(folder)
    tokens, mask, _ = unweave.zoo.tracr.tracr_examples(folder)
    data = from_tensor(tokens[:16], mask[:16])
    edges = set(true_edges(folder))
    ends = [e for e in edges if e.dst == "unembed" and "attn" in e.src]
    ways = [(a, b) for b in ends for a in edges if a.dst == b.src]
    assert ways
    means = collect_means(graph, data)
    assert max(path_effect(graph, data, way, means, scope).nats for way in ways) > 0.02
    false = [e for e in graph.edges if e.dst == ends[0].src and e not in edges]
    assert false
    assert max(path_effect(graph, data, [edge, ends[0]], means, scope).nats for edge in false) < 1e-6


def test_half_precision_is_near(induction):
    data, half = unweave.load_data("zoo:induction", limit=8), induction.to(dtype=torch.bfloat16)
    means, way = collect_means(induction, data), ["blocks.0.attn.head.0->blocks.1.attn.head.1.k"]
    for frozen in ("none", "patterns and norms"):
        whole = path_effect(induction, data, way, means, frozen=frozen).nats
        assert math.isclose(path_effect(half, data, way, means, frozen=frozen).nats, whole, rel_tol=0.1, abs_tol=1e-3)
    tokens = next(data.batches(2)).inputs
    logits = run(half, tokens).logits.float()
    terms = expand_paths(half, tokens)
    assert terms.logits.dtype == torch.float32
    assert (terms.total() - logits).abs().max() < 0.05 * logits.abs().max()


def test_paths_that_make_no_sense_are_refused(induction, induction_data, families):
    means = collect_means(induction, induction_data)
    for path, said in (
        ([], "at least one"),
        ("embed->unembed.in", "list of edges"),
        (["embed->blocks.0.attn.head.0.v", "blocks.0.attn.head.1->unembed.in"], "must join"),
        (["unembed"], "source->node"),
    ):
        with pytest.raises(InputError, match=said):
            path_effect(induction, induction_data, path, means)
    with pytest.raises(UnknownNameError, match="writer"):
        direct_effect(induction, induction_data, "embd", means)
    edge = ["embed->unembed.in"]
    with pytest.raises(InputError, match="frozen must be"):
        path_effect(induction, induction_data, edge, means, frozen="norms")
    with pytest.raises(InputError, match="no mean"):
        path_effect(induction, induction_data, edge, {})
    with pytest.raises(InputError, match="covers 3 positions"):
        path_effect(induction, induction_data, edge, {"embed": torch.zeros(3, 64)})
    with pytest.raises(EmptyDataError, match="no position"):
        path_effect(induction, induction_data, edge, means, Scope(lambda b: torch.zeros_like(b.mask)))
    cut = induction.restrict([e for e in induction.edges if e.src != "embed"], ablation="zero")
    with pytest.raises(InputError, match="is cut"):
        path_effect(cut, induction_data, edge, means)
    resampled = induction.restrict(induction.edges[1:], ablation="resample")
    with pytest.raises(InputError, match="another input"):
        path_effect(resampled, induction_data, edge, means)
    graph = families["gemma2"]
    with pytest.raises(UnsupportedModelError, match="another norm"):
        path_effect(graph, from_tensor(tokens_of()), edge, frozen="patterns and norms")


# ---- the expansion --------------------------------------------------------------------------------------


def test_the_terms_of_an_attention_only_model_sum_to_its_logits(induction, induction_data, toy):
    batch = next(induction_data.batches(4))
    terms = expand_paths(induction, batch.inputs)
    assert torch.allclose(terms.total(), run(induction, batch.inputs).logits, atol=1e-4)
    tokens, mask = tokens_of(3, 6, 11), torch.arange(6) < torch.tensor([[6], [4], [2]])
    deep = expand_paths(toy, tokens, mask)
    assert torch.allclose(deep.total(), run(toy, tokens, mask).logits, atol=1e-10)
    assert torch.allclose(deep.by_depth().sum(0), deep.total(), atol=1e-10)
    assert len(deep.by_depth()) == max(deep.n_heads) + 1 == 4


def test_each_term_is_a_product_of_matrices(toy):
    tokens = tokens_of(1, 5, 11)
    chain = ["blocks.0.attn.head.1", "blocks.2.attn.head.0"]
    patterns = run(toy, tokens, record=[n + ".pattern" for n in chain]).values
    x = toy.stages[0].core.table[tokens[0]]
    readout = toy.stages[-1].ports[0].reads[0].map.dense()
    terms = expand_paths(toy, tokens)
    found = dict(zip(terms.paths, terms.logits[:, 0], strict=True))
    assert torch.allclose(found["embed",], x @ readout.T)
    for node in chain:
        x = patterns[node + ".pattern"][0] @ x @ ov_circuit(toy, node).matrix().T
    assert torch.allclose(found["embed", *chain], x @ readout.T)
    # by layer 2, 9, 30 and 93 terms, each read by two heads, and a constant per head, layer and output
    assert len(found) == len(terms.paths) == 94


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [False, True])
def test_mlps_can_stand_as_writers(families, name, cut):
    graph, tokens = families[name], tokens_of(2, 6)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    if cut:
        means = {n: m.double() for n, m in collect_means(graph, from_tensor(tokens_of(4, 8))).items()}
        keep = torch.rand(graph.possible_edges.shape, generator=torch.Generator().manual_seed(0)) < 0.6
        graph = graph.restrict(keep, means=means)
    terms = expand_paths(graph, tokens, mask, mlps="as writers")
    logits = run(graph, tokens, mask).logits
    assert torch.allclose(terms.total(), logits, atol=1e-8)
    some = expand_paths(graph, tokens, mask, mlps="as writers", outputs=torch.tensor([3, 1]))
    assert torch.allclose(some.total(), logits[..., [3, 1]], atol=1e-8)
    assert any(path[0] == "blocks.0.mlp" for path in terms.paths) or cut


def test_the_induction_term_is_where_the_answer_comes_from(induction):
    data = unweave.load_data("zoo:induction", limit=8)
    batch = next(data.batches(8))
    terms = expand_paths(induction, batch.inputs)
    asked = batch.labels["answered"][:, :-1].bool()
    right = batch.inputs[:, 1:][asked]
    margin = {
        path: float((logits[:, :-1][asked].gather(1, right[:, None])[:, 0] - logits[:, :-1][asked].mean(1)).mean())
        for path, logits in zip(terms.paths, terms.logits, strict=True)
    }
    assert max(margin, key=margin.get) == ("embed", "blocks.1.attn.head.1")


def test_expansions_that_are_not_exact_are_refused(induction, families):
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp, blocks\.1\.mlp"):
        expand_paths(families["gpt2"], tokens)
    with pytest.raises(InputError, match="as writers"):
        expand_paths(induction, tokens, mlps="ignored")
    with pytest.raises(InputError, match="max_paths is 5"):
        expand_paths(induction, tokens, max_paths=5)
    with pytest.raises(InputError, match="from 0 to 47"):
        expand_paths(induction, tokens, outputs=torch.tensor([48]))
    with pytest.raises(InputError, match="another input"):
        expand_paths(induction.restrict(induction.edges[1:], ablation="resample"), tokens)
