"""Parts by latents that hear different things: as if the whole layer were run apart for each of them."""

from __future__ import annotations

import pytest
import torch
from families import CONFIGS, random_model
from test_features import HEAD, TOKENS, random_dictionary

from unweave.capture import capture
from unweave.execution import check_inputs, trace
from unweave.features import find_site, refine_features

PLACES = ["blocks.0.mlp", "blocks.0.mlp.code", HEAD, "blocks.0.attn", "blocks.0.attn.code"]


@pytest.fixture(scope="module")
def llama():
    return capture(random_model("llama"))


def refined(graph, where, activation, groups, transcoder=False):
    site = find_site(graph, where)
    d_in = graph.stages[site.stage].ports[0].reads[0].map.d_in if transcoder else site.width
    d = random_dictionary(d_in, 9, activation, d_out=site.width)
    if transcoder and not d.is_transcoder:
        d = type(d)(d.encoder, d.encoder_bias, d.decoder, d.decoder_bias, d.activation, d.k, d.threshold, True)
    finer = refine_features(graph, {where: d}, {where: groups})
    return finer, finer.where[finer.nodes[[n.startswith(site.stem + ".lat") for n in finer.nodes].index(True)]][0]


def reads_of(graph, s, apart):
    """What the stage reads on a batch, a row per node: each its own, or one for all."""
    context = check_inputs(graph, TOKENS)
    t = trace(graph, context, keep=True)
    n, g = len(graph.stages[s].nodes), torch.Generator().manual_seed(1)
    reads = [r[:, :1].expand(-1, n, -1, -1) for port in graph.stages[s].ports for r in t.reads[s, port.name]]
    if apart:
        reads = [r + torch.randn(r.shape, generator=g) for r in reads]
    return [r.detach() for r in reads], context


def one_by_one(core, reads, context, rows):
    """The whole core once for each node."""
    codes = [core.forward(tuple(r[:, row : row + 1] for r in reads), context)[:, n] for n, row in enumerate(rows)]
    return torch.stack(codes, dim=1)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "identity"])
@pytest.mark.parametrize("where", PLACES)
def test_rows_apart_are_the_whole_core_apart(llama, where, activation):
    graph, s = refined(llama, where, activation, [[4], [2, 3], [0]])
    core, n = graph.stages[s].core, len(graph.stages[s].nodes)
    reads, context = reads_of(graph, s, apart=True)
    got = core.forward(tuple(reads), context)
    torch.testing.assert_close(got, one_by_one(core, reads, context, range(n)), atol=1e-5, rtol=1e-4)
    rows = torch.arange(n) % 3 % 2
    got = core.forward_rows(tuple(r[:, :2] for r in reads), rows, context)
    torch.testing.assert_close(got, one_by_one(core, reads, context, rows.tolist()), atol=1e-5, rtol=1e-4)
    some = torch.tensor([2, 2, 0])
    got = core.for_nodes(some).forward(tuple(r[:, some] for r in reads), context)
    torch.testing.assert_close(got, one_by_one(core, reads, context, range(n))[:, some], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("transcoder", [False, True])
def test_gradients_of_one_read_for_all_are_those_of_the_whole_core(llama, activation, transcoder):
    graph, s = refined(llama, "blocks.1.mlp", activation, [[i] for i in range(7)], transcoder)
    core = graph.stages[s].core
    reads, context = reads_of(graph, s, apart=False)
    assert all(r.stride(1) == 0 for r in reads)
    many = [r.requires_grad_() for r in reads]
    alone = [r.detach().clone().requires_grad_() for r in reads]
    out = core.forward(tuple(many), context)
    plain = one_by_one(core, alone, context, range(len(graph.stages[s].nodes)))
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(
        *(torch.autograd.grad((o * weight).sum(), r) for o, r in ((out, many), (plain, alone))), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_behind_a_second_norm_all_latents_are_computed():
    gemma = capture(random_model(next(name for name in CONFIGS if "gemma" in name)))
    graph, s = refined(gemma, "blocks.0.mlp", "jumprelu", [[4], [2, 3]])
    core, n = graph.stages[s].core, len(graph.stages[s].nodes)
    assert not core._narrow
    reads, context = reads_of(graph, s, apart=True)
    expected = one_by_one(core, reads, context, range(n))
    torch.testing.assert_close(core.forward(tuple(reads), context), expected, atol=1e-5, rtol=1e-4)


def test_nodes_that_hear_the_same_share_a_run_of_the_layer(llama, monkeypatch):
    """Nine parts of which one lacks an edge: two rows go through the MLP, not eleven."""
    graph, s = refined(llama, "blocks.0.mlp", "topk", [[i] for i in range(9)])
    cut = graph.restrict(
        [e for e in graph.edges if (e.src, e.dst) != ("embed", "blocks.0.mlp.latent.3")], ablation="zero"
    )
    inner = type(graph.stages[s].core.inner)
    seen, forward = [], inner.forward

    def counted(self, reads, context):
        seen.append(reads[0].shape[0] // TOKENS.shape[0])
        return forward(self, reads, context)

    monkeypatch.setattr(inner, "forward", counted)
    trace(cut, check_inputs(cut, TOKENS))
    assert max(seen) == 2
