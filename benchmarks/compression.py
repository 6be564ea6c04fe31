"""Compression against its peers, without training and with the same refinement for all.

    python -m benchmarks.compression pylm
    python -m benchmarks.compression stories260K

Calibration: 128 sequences of 128 tokens. Refinement: 200 steps of 16 x 128 tokens of KL to the original, Adam, cosine
decay, the learning rate chosen from four on a separate tuning slice (40 steps each). Nothing is tuned on the
held-out data. A run that was stopped goes on where it was; delete the result file to start afresh. With
--closed-form only the part without training is run (minutes).
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.common import RESULTS, interval, model, save
from unweave.compression import baselines, channel_moments, refine_factors
from unweave.compression.allocation import Budgeter, mean_divergence
from unweave.compression.compensation import sweep
from unweave.compression.masks import Masker
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


def candidates(
    graph: Graph, calibration: TokenData, size: float, cache: dict
) -> dict[str, tuple[Graph, set[str], int]]:
    if not cache:
        cache["moments"] = channel_moments(graph, calibration, Scope())
        cache["budgeter"] = Budgeter(graph, cache["moments"])
        cache["masker"] = Masker(graph, cache["moments"])
        cache["rows"] = baselines.fisher_rows(graph, calibration)
    moments = cache["moments"]
    plain = {
        "unweave": cache["budgeter"].at_size(size),
        "plain SVD": baselines.plain_svd(graph, size),
        "activation SVD": baselines.activation_svd(graph, size, moments),
        "row-Fisher SVD": baselines.row_fisher_svd(graph, size, cache["rows"]),
        "unweave, sparse": sweep(cache["masker"].at_size(size), graph, calibration, moments),
        "magnitude": baselines.magnitude(graph, size),
        "Wanda": baselines.wanda(graph, size, moments),
        "SparseGPT-like": baselines.sparse_regression(graph, size, moments),
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


def earlier(name: str) -> list[dict]:
    """Rows of an interrupted run: refinement takes hours, so it goes on where it stopped."""
    path = RESULTS / f"compression-{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main(name: str, closed_form_only: bool) -> None:
    started = time.time()
    torch.set_num_threads(1)
    graph, train, held = model(name)
    calibration, tune = train.select(slice(0, 128)), train.select(slice(128, 160))
    train, held = train.select(slice(160, 160 + 3200)), held.select(slice(0, 128))
    rows = {(r["size"], r["method"]): r for r in earlier(name)}
    cache: dict = {}
    for refine in (False, True)[: 1 if closed_form_only else 2]:
        for size in SIZES:
            for method, (small, paths, numbers) in candidates(graph, calibration, size, cache).items():
                row = rows.setdefault((size, method), {"size": size, "method": method})
                row["numbers_share"] = numbers / graph.n_channel_parameters
                if not refine:
                    row["kl_nats"] = held_out_kl(graph, small, held)
                elif "kl_nats_refined" not in row:
                    better, rate = refined(graph, small, paths, train, tune)
                    row |= {"kl_nats_refined": held_out_kl(graph, better, held), "learning_rate": rate}
                print(name, row, flush=True)
                result = {"model": name, "rows": list(rows.values()), "n": len(held)}
                save(f"compression-{name}", result, started, f"python -m benchmarks.compression {name}")


if __name__ == "__main__":
    main(sys.argv[1], "--closed-form" in sys.argv)
