"""Edge scores against the measured effect of every single edge of stories260K.

    python -m benchmarks.edges

24 stories of 64 tokens; the effect is the KL after ablating that one edge to its mean. Times are ratios to one Hugging
Face forward + backward pass over the same tokens in the same batches, means given. Fisher rows are means over five
seeds, with their spread.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr

from benchmarks.common import SHARED, fastest, model, save
from unweave.capture import load_model
from unweave.data import TokenData
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.statistics import collect_means

SEEDS = range(5)


def main() -> None:
    started = time.time()
    torch.set_num_threads(1)
    graph, _, held = model("stories260K", context=64)
    data = held.select(slice(0, 24))
    original = load_model(SHARED / "models" / "stories260K")
    means, scope = collect_means(graph, data), Scope()
    edges = graph.edge_matrix
    begin = time.perf_counter()
    exact = score_edges(graph, data, scope, method="exact", means=means)
    exact_s = time.perf_counter() - begin
    base = fastest(lambda: forward_backward(original, data))
    truth = exact.nats[edges].numpy()
    rows = [
        {"method": "exact, every edge", "spearman": 1.0, "pearson": 1.0, "top50": 1.0, "time_ratio": exact_s / base}
    ]

    def add(name: str, options: dict, seeds: range = SEEDS) -> None:
        results = []
        for seed in seeds:
            scores = score_edges(graph, data, scope, means=means, seed=seed, batch_size=24, **options)
            results.append(compare(scores.nats[edges].abs().numpy(), truth))
        seconds = fastest(lambda: score_edges(graph, data, scope, means=means, batch_size=24, **options), 3)
        mean = {k: float(np.mean([r[k] for r in results])) for k in results[0]}
        spread = {f"{k}_sd": float(np.std([r[k] for r in results])) for k in results[0]}
        rows.append({"method": name, **mean, **spread, "time_ratio": seconds / base})
        print(rows[-1], flush=True)

    for samples in (1, 2, 4, 8):
        add(f"unweave fisher, {samples} sample{'s' * (samples > 1)}", {"method": "fisher", "samples": samples})
    add("unweave fisher, 2 samples, top 150 measured", {"method": "fisher", "samples": 2, "measure_top": 150})
    add("EAP (gradient of the KL at the mean embedding)", {"method": "eap"}, range(1))
    for steps in (5, 10):
        add(f"EAP-IG, {steps} steps", {"method": "eap-ig", "steps": steps}, range(1))
    rng = np.random.default_rng(0)
    rows.append({"method": "random", **compare(rng.random(len(truth)), truth), "time_ratio": 0.0})
    result = {"model": "stories260K", "edges": len(truth), "n": len(data), "rows": rows}
    save("edges", result, started, "python -m benchmarks.edges")


def forward_backward(original: torch.nn.Module, data: TokenData) -> None:
    for batch in data.batches(24):
        logits = original(batch.inputs).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.inputs[:, 1:].flatten()).backward()
    original.zero_grad()


def compare(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    top = set(np.argsort(-truth)[:50])
    return {
        "spearman": float(spearmanr(scores, truth)[0]),
        "pearson": float(pearsonr(scores, truth)[0]),
        "top50": len(top & set(np.argsort(-scores)[:50])) / 50,
        "sum_ratio": float(scores.sum() / truth.sum()),
    }


if __name__ == "__main__":
    main()
