"""Compression against its peers, without training and with the same refinement for all.

    python -m benchmarks.compression pylm
    python -m benchmarks.compression stories260K

Calibration: 128 sequences of 128 tokens. Refinement: 200 steps of 16 x 128 tokens of KL to the original, Adam, cosine
decay, the learning rate chosen from four on a separate tuning slice (40 steps each). Nothing is tuned on the
held-out data.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.common import interval, model, save
from unweave.compression import baselines, channel_moments, refine_factors
from unweave.compression.allocation import Budgeter, mean_divergence
from unweave.compression.refinement import trainable
from unweave.data import TokenData
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope, divergence

SIZES = (0.8, 0.6, 0.4)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


@torch.no_grad()
def held_out_kl(graph: Graph, other: Graph, data: TokenData) -> tuple[float, float, float]:
    values = []
    for batch in data.batches(16):
        a, b = run(graph, batch.inputs).logits, run(other, batch.inputs).logits
        values += divergence(Scope(), a, b, batch).mean(1).tolist()
    return interval(values)


def candidates(graph: Graph, calibration: TokenData, size: float, cache: dict) -> dict[str, tuple[Graph, set[str], int]]:
    if not cache:
        cache["moments"] = channel_moments(graph, calibration, Scope())
        cache["budgeter"] = Budgeter(graph, cache["moments"])
        cache["rows"] = baselines.fisher_rows(graph, calibration)
    moments = cache["moments"]
    plain = {
        "unweave": cache["budgeter"].at_size(size),
        "plain SVD": baselines.plain_svd(graph, size),
        "activation SVD": baselines.activation_svd(graph, size, moments),
        "row-Fisher SVD": baselines.row_fisher_svd(graph, size, cache["rows"]),
    }
    out = {name: (g, set(trainable(g)), g.n_channel_parameters) for name, g in plain.items()}
    out["PCA slicing"] = baselines.pca_slicing(graph, size, moments)
    return out


def refined(graph: Graph, small: Graph, paths: set[str], train: TokenData, tune: TokenData) -> tuple[Graph, float]:
    tried = {}
    for rate in RATES:
        short = refine_factors(small, graph, train, steps=40, learning_rate=rate, train=paths)
        tried[rate] = mean_divergence(graph, short, tune, Scope())
    best = min(tried, key=lambda rate: tried[rate])
    return refine_factors(small, graph, train, steps=200, learning_rate=best, train=paths), best


def main(name: str) -> None:
    started = time.time()
    torch.set_num_threads(1)
    graph, train, held = model(name)
    calibration, tune = train.select(slice(0, 128)), train.select(slice(128, 160))
    train, held = train.select(slice(160, 160 + 3200)), held.select(slice(0, 128))
    rows, cache = [], {}
    for size in SIZES:
        for method, (small, paths, numbers) in candidates(graph, calibration, size, cache).items():
            kl = held_out_kl(graph, small, held)
            better, rate = refined(graph, small, paths, train, tune)
            kl_refined = held_out_kl(graph, better, held)
            row = {"size": size, "method": method, "numbers_share": numbers / graph.n_channel_parameters}
            row |= {"kl_nats": kl, "kl_nats_refined": kl_refined, "learning_rate": rate}
            rows.append(row)
            print(name, row, flush=True)
            save(f"compression-{name}", {"model": name, "rows": rows, "n": len(held)}, started, f"python -m benchmarks.compression {name}")


if __name__ == "__main__":
    main(sys.argv[1])
