"""Known circuits: compiled RASP programs, their found circuits against the edges that the compiler made.

    python -m benchmarks.tracr [FOLDER ...]

Folders hold models in the format of ../shared/models/tracr (the default); benchmarks/peers/tracr_models.py compiles
more of them. For every ablation: edges with an effect (above 1e-6 nats) that the compiler did not make, edges of the
found circuit (within 1e-4 nats) that it did not make, true edges that the circuit lacks, how many of these have no
effect on the data, and the others by name.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SHARED, save
from unweave.capture import capture
from unweave.circuits import find_circuit
from unweave.data import from_tensor
from unweave.execution import run
from unweave.scope import Scope
from unweave.scoring import score_edges
from unweave.zoo.tracr import tracr_examples, true_edges

NIL_NATS, BUDGET_NATS = 1e-6, 1e-4
ABLATIONS = ("mean", "resample", "zero")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    graph, (tokens, mask, outputs) = capture(folder), tracr_examples(folder)
    words = json.loads((folder / "config.json").read_text())["outputs"]
    known, logits = ~outputs.isnan(), run(graph, tokens, mask).logits
    answers = logits.argmax(-1).float() if words else logits[..., 0]
    off = float((answers - outputs)[known].abs().max())
    data = from_tensor(tokens, mask, {"answered": known})
    scope = Scope(positions="answered", divergence="kl" if words else "gaussian")
    true, rows = graph.mark_edges(true_edges(folder)), []
    for ablation in ABLATIONS:
        options: dict[str, Any] = {"ablation": ablation, "progress": False}
        scores = score_edges(graph, data, scope, method="exact", **options)
        felt = scores.nats.nan_to_num().abs() > NIL_NATS
        circuit = find_circuit(graph, data, scope, kl_nats=BUDGET_NATS, scores=scores, **options)
        lacking = true & ~circuit.kept
        row: dict[str, Any] = {"model": folder.name, "ablation": ablation, "nodes": len(graph.nodes), "off": off}
        row |= {"true_edges": int(true.sum()), "felt_but_untrue": int((felt & ~true).sum())}
        row |= {"kept_but_untrue": int((circuit.kept & ~true).sum()), "lacking": int(lacking.sum())}
        row |= {"lacking_without_effect": int((lacking & ~felt).sum()), "nats": circuit.nats}
        row |= {"lacking_with_effect": [str(e) for e in graph.name_edges(lacking & felt)]}
        rows.append(row)
        print(row, flush=True)
    return rows


def main(folders: list[str]) -> None:
    started = time.time()
    torch.set_num_threads(1)
    rows = []
    for parent in map(Path, folders or [SHARED / "models" / "tracr"]):
        for folder in sorted(p for p in parent.iterdir() if (p / "config.json").exists()):
            rows += rows_of(folder)
            save("tracr", {"rows": rows}, started, "python -m benchmarks.tracr")


if __name__ == "__main__":
    main(sys.argv[1:])
