"""A search for triggers finds the planted ones, and reports none on clean twins.

    python -m benchmarks.triggers [--folder FOLDER] [--only ROW ...]

Models and explanations are those of benchmarks/audit.py: seed 0 is the bundled models, others are trained here, into
FOLDER, or taken from there. A row is a secret and a seed, or a twin. A search is told neither the secret nor where it
stands: runs are put anywhere and at the start, with BUDGET texts for each. Beside ours, with the same number of texts:
every pair in as many texts, ranked by plain nats; and, ranking single texts, ``search_inputs`` and clean texts with a
random pair each. All choices were made on models of seed 10, and of twins 11 and 12.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.audit import EVERYWHERE, REFINEMENT, SCOPE, at_random, clean, model, reveals
from benchmarks.common import folder_and_rows, resumed, save
from unweave.audit import Triggers, search_inputs, search_triggers
from unweave.audit.inputs import Compared
from unweave.audit.insertions import Insertions
from unweave.compression import channel_moments, compress, refine_factors
from unweave.graph import Graph
from unweave.zoo import secrets

SEEDS = (0, 1, 2)
TWINS = (0, 1, 2, 3, 4, 5)
# the first is the explanation, the second stands beside it
SIZES = (0.2, 0.4)
BUDGET = 20_000
PLACES = ("anywhere", "start")
N_TEXTS = 500


def explanations(graph: Graph) -> list[Graph]:
    fitted, other = clean(256, 11), clean(4000, 10)
    moments = channel_moments(graph, fitted, SCOPE, progress=False)
    cut = [compress(graph, fitted, SCOPE, size=size, moments=moments, progress=False) for size in SIZES]
    return [refine_factors(g, graph, other, SCOPE, **REFINEMENT, progress=False) for g in cut]


def by_plain_nats(graph: Graph, small: Graph, at: str, pair: tuple[int, int]) -> int:
    """The rank of a pair among all, by mean nats in as many texts for each as the budget allows."""
    compared = Compared(graph, (small,), EVERYWHERE)
    words = torch.arange(secrets.N_WORDS)
    put = Insertions(compared, clean(N_TEXTS, 18), words, 2, at == "start", 0, 0, lambda: None)
    runs = put.every_run()
    chosen = put.draw_texts(BUDGET // len(runs))
    nats = put.nats(runs[:, None].expand(-1, len(chosen.place), -1), chosen)[0].mean(1)
    return int((nats > nats[(runs == torch.tensor(pair)).all(1)]).sum()) + 1


def facts(found: Triggers, secret: str | None) -> dict[str, Any]:
    """The rank of what was planted, and what is said of it and of the first."""
    out: dict[str, Any] = {"evaluations": found.evaluations, "screened": len(found.ranked), "first": found.table()[0]}
    if secret is not None:
        planted = secrets.OPENINGS[secret]
        said = [row for row in found.table() if row["tokens"] == planted]
        out |= {"rank": found.rank(planted), "planted": said[0] if said else None}
    return out


def single_texts(graph: Graph, small: Graph, secret: str) -> dict[str, Any]:
    """Whether a search for single inputs shows the secret: in its first input, and in any of its 32."""
    found = search_inputs(small, graph, clean(N_TEXTS, 18), EVERYWHERE, budget=BUDGET)
    hits = {
        "search_inputs": [(hit.tokens, hit.position) for hit in found.hits],
        "at random": at_random(graph, small, 0, BUDGET),
    }
    shown = {name: [reveals(secret, *hit) for hit in best] for name, best in hits.items()}
    return {name: {"first": marks[0], "any": any(marks)} for name, marks in shown.items()}


def row(secret: str | None, seed: int, folder: Path) -> dict[str, Any]:
    graph = model(secret or "no_secret", seed, folder)
    small, beside = explanations(graph)
    out: dict[str, Any] = {"secret": secret, "seed": seed}
    for at in PLACES:
        options: dict[str, Any] = {"at": at, "budget": BUDGET, "seed": seed, "progress": False}
        ways: dict[str, dict[str, Any]] = {"one graph": {}, "two graphs": {"others": [beside]}}
        if secret is not None:
            ways["two graphs, candidates"] = {"others": [beside], "exhaustive": False}
        for name, way in ways.items():
            found = search_triggers(small, graph, clean(N_TEXTS, 18), EVERYWHERE, **options, **way)
            out[f"{name}, {at}"] = facts(found, secret)
        if secret is not None:
            out[f"plain nats, {at}"] = {"rank": by_plain_nats(graph, small, at, secrets.OPENINGS[secret])}
    return out | ({} if secret is None else single_texts(graph, small, secret))


def main() -> None:
    started = time.time()
    folder, only = folder_and_rows(__doc__)
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        f"{secret} {seed}": partial(row, secret, seed, folder) for seed in SEEDS for secret in secrets.SECRETS
    }
    todo |= {f"twin {seed}": partial(row, None, seed, folder) for seed in TWINS}
    for rows, missing in resumed(todo, folder / "triggers.json", only):
        result = {"budget": BUDGET, "sizes": SIZES, "n_pairs": secrets.N_WORDS**2, "not_run": missing, "rows": rows}
        save("triggers", result, started, "python -m benchmarks.triggers")


if __name__ == "__main__":
    main()
