"""Edit prediction: what compressed graphs of stories260K say of random edits, against what the edits do to the model.

    python -m benchmarks.edits

300 edits of each of three sizes for the graph the goal is about (80% of the numbers, sparse), 50 of each for the
others; 16 held-out stories of 128 tokens. Every table holds the first-order prediction on the model itself and the
graph's predictions of other edits ("permuted").
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from benchmarks.common import model, save
from unweave.compression import channel_moments, compress, refine_factors
from unweave.evaluation import evaluate
from unweave.falsification import PredictionRow, edit_prediction, random_edits
from unweave.graph import Graph
from unweave.scope import Scope

SIZES = {"0.1": 0.1, "0.3": 0.3, "1": 1.0}
GOAL = "sparse, 80%"


def plain(row: PredictionRow) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(row).items()}


def main() -> None:
    started = time.time()
    torch.set_num_threads(1)
    graph, train, held = model("stories260K")
    calibration, held = train.select(slice(0, 64)), held.select(slice(0, 16))
    moments = channel_moments(graph, calibration, Scope())

    def small(size: float, form: str) -> Graph:
        return compress(graph, calibration, size=size, form=form, moments=moments)

    low_rank = small(0.8, "low-rank")
    graphs = {
        GOAL: small(0.8, "sparse"),
        "sparse, 60%": small(0.6, "sparse"),
        "low-rank, 80%": low_rank,
        "low-rank, 80%, 100 steps of refinement": refine_factors(
            low_rank, graph, train.select(slice(64, 1664)), steps=100
        ),
    }
    faithful = evaluate(graphs, graph, held, n_worst=0)
    rows = []
    for name, compressed in graphs.items():
        n = 300 if name == GOAL else 50
        edits = {size: random_edits(graph, n, value, i, calibration) for i, (size, value) in enumerate(SIZES.items())}
        table = edit_prediction(compressed, graph, edits, held)
        for row in table.rows:
            rows.append({"graph": name, "kl_nats": faithful[name].kl_nats.value, **plain(row)})
            print(rows[-1], flush=True)
        save("edits", {"model": "stories260K", "n": len(held), "rows": rows}, started, "python -m benchmarks.edits")


if __name__ == "__main__":
    main()
