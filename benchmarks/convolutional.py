"""Convolutional networks: exactness, what a run of a cut graph costs, and circuits of small ResNets trained here.

    python -m benchmarks.convolutional

Exactness: residual, grouped, depthwise and pre-activation networks of tests/residual_networks.py, and transformers'
ResNet, random weights and norms. Time: processor seconds beside the model's own forward pass, in turns. Circuits: a
ResNet of two blocks trained on the shapes of ``zoo:oriented_shapes``, three seeds; edges chosen on 128 images, measured
on 256 others, beside as many edges of the largest kernels and at random; nothing was tuned on either.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import unweave
from benchmarks.common import save
from unweave.data import float_data
from unweave.execution import run, trace
from unweave.execution.runs import check_inputs
from unweave.kernels import kernels_into, layers_of_maps
from unweave.zoo.oriented_shapes import batch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from residual_networks import BasicBlock, networks, on_vectors

STEPS, BATCH = 150, 128
ROUNDS = 7


def resnet(channels: int, maps: tuple[int, ...], blocks: int, d_out: int) -> nn.Sequential:
    """The layout of CIFAR's ResNets: a stem, layers of blocks, each but the first halving the image."""
    layers: list[nn.Module] = [nn.Conv2d(channels, maps[0], 3, 1, 1, bias=False), nn.BatchNorm2d(maps[0]), nn.ReLU()]
    before = maps[0]
    for i, after in enumerate(maps):
        for k in range(blocks):
            layers.append(BasicBlock(before, after, 2 if i and not k else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, d_out))


def exactness() -> list[dict[str, Any]]:
    found = networks()
    for kind in ("basic", "bottleneck"):
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=kind, num_labels=5)
        found[f"transformers, {kind}"] = on_vectors(ResNetForImageClassification(config), (3, 32, 32))
    rows = []
    for name, model in found.items():
        graph = unweave.capture(model, verify=False)
        x = torch.randn(8, 1, graph.info["d_input"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            truth, ours = model(x[:, 0]), run(graph, x).logits[:, 0]
        truth = truth if isinstance(truth, Tensor) else truth.logits
        rows.append(
            {"model": name, "largest": float((ours - truth).abs().max()), "largest_logit": float(truth.abs().max())}
        )
    return rows


def in_turns(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Processor seconds of the fastest of some runs of each, one after the other."""
    best = dict.fromkeys(functions, float("inf"))
    for k in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start) if k else best[name]
    return best


@torch.no_grad()
def times(model: nn.Sequential, n: int) -> dict[str, float]:
    """Runs of the graph and of it with half of its edges cut, as multiples of the model's forward pass."""
    graph = unweave.capture(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, graph.info["d_input"], generator=generator)
    keep = graph.edge_matrix & (torch.rand(graph.edge_matrix.shape, generator=generator) < 0.5)
    means = unweave.collect_means(graph, float_data(x[:, 0]), progress=False)
    zero, mean = graph.restrict(keep, ablation="zero"), graph.restrict(keep, means=means)
    other = graph.restrict(keep, ablation="resample")
    functions = {
        "model": lambda: model(x[:, 0]),
        "graph": lambda: run(graph, x),
        "half cut to zero": lambda: run(zero, x),
        "half cut to means": lambda: run(mean, x),
        "half cut by resampling": lambda: run(other, x, counterfactual=x.flip(0)),
        # what is kept for scores hears map by map, as every cut graph did before (then through dense matrices)
        "half cut to zero, each map apart": lambda: trace(zero, check_inputs(zero, x), keep=True),
    }
    seconds = in_turns(functions)
    return {"edges": graph.n_edges, **{name: s / seconds["model"] for name, s in seconds.items() if name != "model"}}


def trained(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Unflatten(1, (1, 16, 16)), resnet(1, (8, 16), 1, 4)).train()
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x, kinds, _ = batch(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), kinds).backward()
        optimizer.step()
    return model.eval()


def kernel_norms(graph: unweave.Graph) -> Tensor:
    """The norm of every edge's kernel; edges into the output, whose weights are no kernels, are all kept."""
    norms = torch.zeros(graph.edge_matrix.shape)
    norms[-1] = float("inf")
    for layer, s in layers_of_maps(graph).items():
        row = graph.port_starts[s, "in"]
        for k in range(*graph.stages[s].visible):
            nodes = graph.stages[k].nodes
            columns = slice(graph.writer_starts[k], graph.writer_starts[k + 1])
            rows = slice(row, row + len(graph.stages[s].nodes))
            if bool(graph.edge_matrix[rows, columns].any()):
                source = nodes[0].rpartition(".map.")[0] or nodes[0]
                norms[rows, columns] = kernels_into(graph, layer, source=source).flatten(2).norm(dim=2)
    return norms.masked_fill(~graph.edge_matrix, -1.0)


def circuits(seed: int) -> dict[str, Any]:
    model = trained(seed)
    graph = unweave.capture(model)
    x, _, _ = batch(128, torch.Generator().manual_seed(1000 + seed))
    held, kinds, _ = batch(256, torch.Generator().manual_seed(2000 + seed))
    data, unseen = float_data(x), float_data(held)
    marked = graph.edge_matrix
    exact = unweave.score_edges(graph, unseen.select(slice(0, 32)), method="exact", progress=False).nats[marked]
    fisher = unweave.score_edges(graph, data, progress=False).nats[marked]
    found = unweave.find_circuit(graph, data, faithfulness=0.9, progress=False)
    means, n = found.instead.means, found.n_edges
    norms = kernel_norms(graph)
    chance = torch.rand(norms.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~marked, -1.0)
    graphs = {"circuit": found.graph}
    for name, order in (("largest kernels", norms), ("random", chance)):
        keep = torch.zeros_like(marked).flatten()
        keep[order.flatten().topk(n).indices] = True
        graphs[name] = graph.restrict(keep.view_as(marked), means=means)
    rows = unweave.evaluate(graphs, graph, unseen, means=means, progress=False)
    proof = unweave.prove(found, unseen, progress=False).faithfulness
    return {
        "seed": seed,
        "accuracy": float((run(graph, held[:, None]).logits[:, 0].argmax(1) == kinds).double().mean()),
        "edges": graph.n_edges,
        "kept": n,
        "spearman_fisher_exact": float(spearmanr(fisher, exact)[0]),
        "spearman_kernel_norm_exact": float(spearmanr(norms[marked].clamp(max=1e6), exact)[0]),
        "faithfulness": [proof.value, proof.low, proof.high],
        "kl_nats": {
            name: [rows[name].kl_nats.value, rows[name].kl_nats.low, rows[name].kl_nats.high] for name in graphs
        },
    }


def main() -> None:
    warnings.simplefilter("ignore")
    started = time.time()
    result: dict[str, Any] = {"exactness": exactness(), "times": {}, "circuits": []}
    generator = torch.Generator().manual_seed(0)
    for name, model, n in (
        (
            "2 blocks, 8 to 16 maps of 16 x 16",
            nn.Sequential(nn.Unflatten(1, (1, 16, 16)), resnet(1, (8, 16), 1, 4)),
            64,
        ),
        (
            "9 blocks, 16 to 64 maps of 32 x 32",
            nn.Sequential(nn.Unflatten(1, (3, 32, 32)), resnet(3, (16, 32, 64), 3, 10)),
            4,
        ),
    ):
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.kaiming_normal_(p, generator=generator)
        result["times"][name] = times(model.eval(), n)
        print(name, result["times"][name])
    save("convolutional", result, started, "python -m benchmarks.convolutional")
    for seed in range(3):
        result["circuits"].append(circuits(seed))
        print(result["circuits"][-1])
        save("convolutional", result, started, "python -m benchmarks.convolutional")


if __name__ == "__main__":
    main()
