"""Whole edges against edges that keep a few dimensions: the size of a circuit at equal faithfulness.

    python -m benchmarks.subspaces

The tasks of benchmarks.circuits, counterfactual ablation, the KL at the last position. Circuits are found on half of
the prompts for a faithfulness 1 - nats / nats of the empty circuit, and measured on the other half. Size: numbers of
the edges' virtual weights (written x read, or k (written + read) where an edge keeps k dimensions), and dimensions.
"Principal components" narrows the same circuit alike, in the directions in which the writer varies most.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from benchmarks.circuits import ZOO, one_answer, tasks
from benchmarks.common import save
from unweave.capture import capture
from unweave.circuits import Circuit, find_circuit, narrow_circuit, prove
from unweave.scope import Scope

FAITHFULNESS = (0.8, 0.9, 0.95)
# of the nats allowed, for the whole edges that are narrowed afterwards
WHOLE = 0.8


def row(name: str, target: float, method: str, circuit: Circuit, test: Any) -> dict[str, Any]:
    proof = prove(circuit, test, n_random=0, n_subsets=0, progress=False)
    return {
        "task": name,
        "target": target,
        "method": method,
        "edges": circuit.n_edges,
        "numbers": circuit.n_numbers,
        "dimensions": circuit.n_dimensions,
        "faithfulness": circuit.faithfulness,
        "faithfulness_held_out": proof.faithfulness._asdict(),
        "n": proof.n_prompts,
    }


def main(wanted: list[str]) -> None:
    started = time.time()
    torch.set_num_threads(1)
    scope, rows = Scope(positions="end"), []
    for name, (model, make) in tasks(wanted).items():
        graph, task = capture("zoo:induction" if model == ZOO else model), one_answer(make())
        found, held_out = task.split(0.5, 0)
        data, test = found.paired, held_out.paired
        for target in FAITHFULNESS:
            options: dict[str, Any] = {"ablation": "counterfactual", "batch_size": 32, "progress": False}
            whole = find_circuit(graph, data, scope, faithfulness=target, **options)
            allowed = (1 - target) * whole.empty_nats
            closer = find_circuit(graph, data, scope, kl_nats=WHOLE * allowed, **options)
            circuits = {"whole edges": whole}
            for label, directions in {"unweave, narrow edges": "fisher", "principal components": "variance"}.items():
                circuits[label] = narrow_circuit(
                    closer, data, kl_nats=allowed, directions=directions, batch_size=32, progress=False
                )
            rows += [row(name, target, label, c, test) for label, c in circuits.items()]
            print(*rows[-3:], sep="\n", flush=True)
            save("subspaces", {"rows": rows}, started, "python -m benchmarks.subspaces")


if __name__ == "__main__":
    main(sys.argv[1:])
