"""What can be read where and when in networks that learn bracket balance, and whether it is used there.

    python -m benchmarks.probes [when] [used]

Each seed is trained from nothing; probes are fitted at checkpoints and judged on other sequences.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.common import RESULTS, interval, save
from unweave.capture import capture
from unweave.data import Batch, load_data
from unweave.files import read_json, write_json
from unweave.graph import Graph
from unweave.probes import Concept, probe_effect, probe_table
from unweave.scope import Scope
from unweave.storage import finite
from unweave.zoo import ToyTransformer, brackets

SEEDS = 3
CHECKPOINTS = (100, 500, 2000)
SEQUENCES = 384
FIGURES = ("score", "baseline", "control", "logistic", "logistic_control", "compression", "control_compression")
EFFECTS = ("share", "kl_nats", "random_kl_nats", "erased_behaviour", "random_behaviour", "is_used")
SUMMARIES = {
    "when": (("concept", "step", "layer", "place"), FIGURES),
    "used": (("concept", "place", "erasure"), EFFECTS),
}
ANSWERED = Scope(positions="answered")


def on_brackets(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Labels, none at the start token."""
    nothing = torch.nan if values.is_floating_point() else -1
    return torch.where(batch.inputs != brackets.START, values, nothing)


CONCEPTS = (
    Concept("elevation", lambda b: on_brackets(brackets.elevation(b.inputs).double(), b)),
    Concept("lowest elevation", lambda b: on_brackets(brackets.elevation(b.inputs).cummin(1).values.double(), b)),
    Concept("elevation 0 to 3", lambda b: on_brackets(brackets.elevation(b.inputs).clamp(0, 3), b), classes=4),
    Concept("broken", lambda b: on_brackets((brackets.status(b.inputs) == 0).long(), b), classes=2),
)


def right(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Whether the answer is right."""
    return (logits.argmax(-1) == brackets.status(batch.inputs)).double()


def trained(seed: int) -> dict[int, Graph]:
    """Checkpoints of one training run."""
    torch.manual_seed(seed)
    graphs = {0: capture(ToyTransformer(brackets.CONFIG))}
    return graphs | {step: capture(model) for step, _, model in brackets.train(seed) if step in CHECKPOINTS}


def when(seed: int, graphs: dict[int, Graph]) -> list[dict[str, object]]:
    """The table of one training run."""
    data = load_data("zoo:brackets", limit=SEQUENCES)
    held = load_data("zoo:brackets", limit=SEQUENCES, split="validation")
    options = {"control": "token at position", "batch_size": 128}
    table = probe_table(graphs, CONCEPTS, data, held, code=True, **options)
    logistic = probe_table(graphs, CONCEPTS, data, held, method="logistic", **options).table()
    return [
        {"seed": seed, **row, "logistic": other["score"], "logistic_control": other["control"]}
        for row, other in zip(table.table(), logistic, strict=True)
    ]


def used(seed: int, graph: Graph) -> list[dict[str, object]]:
    """The effects of erasing what probes read at the end of a training run."""
    data = load_data("zoo:brackets", limit=SEQUENCES)
    held, causal = (load_data("zoo:brackets", limit=SEQUENCES, split=s) for s in ("validation", "test"))
    table = probe_table(graph, CONCEPTS, data, held, control=None, batch_size=128)
    return [
        {"seed": seed, "concept": r.concept, "place": r.place, "erasure": how}
        | probe_effect(
            graph, r.probe, r.place, causal, ANSWERED, behaviour=right, erasure=how, batch_size=128
        ).columns()
        for r in table.rows
        for how in ("oblique", "orthogonal")
    ]


def summary(rows: list[dict[str, object]], keys: tuple[str, ...], figures: tuple[str, ...]) -> list[dict[str, object]]:
    """Means over seeds with the range of a bootstrap over seeds."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True))
        | {
            f: interval([r[f] for r in members]) for f in figures if members[0][f] == members[0][f]
        }  # numbers have no code
        for key, members in groups.items()
    ]


def main() -> None:
    """Write results/probes.json; a part that was not asked for stays as it was."""
    started = time.time()
    parts = sys.argv[1:] or ["when", "used"]
    result: dict[str, list[dict[str, object]]] = {part: [] for part in parts}
    for seed in range(SEEDS):
        graphs = trained(seed)
        for part in parts:
            result[part] += when(seed, graphs) if part == "when" else used(seed, graphs[max(graphs)])
        write_json(RESULTS / "probes.partial.json", finite(result))
    path = RESULTS / "probes.json"
    kept = {part: rows for part, rows in read_json(path).items() if part in SUMMARIES} if path.exists() else {}
    found = {part: summary(rows, *SUMMARIES[part]) for part, rows in result.items()}
    save("probes", {"seeds": SEEDS} | kept | found, started, "python -m benchmarks.probes")
    (RESULTS / "probes.partial.json").unlink()


if __name__ == "__main__":
    main()
