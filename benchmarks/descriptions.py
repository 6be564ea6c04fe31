"""Descriptions by rule: how well they predict codes on held-out text, against random descriptions, for all nodes.

    python -m benchmarks.descriptions [--tiny] [MODEL ...]

Every coordinate of the code of every head and MLP gets the best one or two rules, fitted on training text and scored on
held-out text (R^2, and the AUROC of its top tenth). Beside it: the descriptions of other directions, drawn at random,
each with the best slope and offset for this one; and the same search on codes shifted against the text, whose 95th
percentile a label has to exceed. ``--tiny`` tries the code on few texts and saves nothing.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import torch

from benchmarks.common import RESULTS, SHARED, interval, model, save
from unweave.capture import load_tokenizer
from unweave.data import TokenData
from unweave.drivers import Description, Descriptions, describe
from unweave.pipeline import token_strings

MODELS = ("stories260K", "pylm")
SEQUENCES, HELD_OUT, TINY = 64, 64, 4


def summary(items: list[Description]) -> dict[str, Any]:
    """Mean scores of some directions, with intervals by bootstrap over directions; constant ones are left out."""
    scored = [item for item in items if item.score == item.score]
    row: dict[str, Any] = {"directions": len(items), "scored": len(scored)}
    for name in ("score", "random_score", "auroc", "random_auroc"):
        found = [value for item in scored if (value := getattr(item, name)) == value]
        mean, low, high = interval(found)
        row[name] = {"mean": mean, "low": low, "high": high, "n": len(found)}
    row["median_score"] = float(torch.tensor([item.score for item in scored]).median())
    row["labelled"] = sum(item.label is not None for item in items) / len(items)
    row["above_half"] = sum(item.score > 0.5 for item in scored) / len(items)
    return row


def groups(found: Descriptions) -> dict[str, dict[str, Any]]:
    """All directions, then those of each layer's heads and MLP."""
    by_group: dict[str, list[Description]] = {"all nodes": list(found.items)}
    for item in found.items:
        by_group.setdefault(item.node.split(".head.")[0], []).append(item)
    return {name: summary(items) for name, items in by_group.items()}


def spread(data: TokenData, n: int) -> TokenData:
    """Sequences from all over a data set: neighbours are of one document."""
    return data.select(torch.linspace(0, len(data) - 1, n).long())


def measure(name: str, sequences: int, held_out: int) -> dict[str, Any]:
    graph, train, held = model(name)
    tokens = token_strings(load_tokenizer(SHARED / "models" / name), graph.info["d_vocab"])
    started = time.time()
    found = describe(graph, spread(train, sequences), spread(held, held_out), token_strings=tokens, progress=False)
    labelled = sorted((item for item in found.items if item.label), key=lambda item: -item.score)
    return {
        "groups": groups(found),
        "nodes": found.summary(),
        "null_95": found.threshold,
        "null_mean": float(found.null.mean()),
        "tokens": found.n_tokens,
        "tokens_held_out": found.n_held_out,
        "first_rules": dict(Counter(item.rules[0] for item in labelled).most_common()),
        "examples": [[f"{i.node} {i.direction}", i.label, round(i.score, 3)] for i in labelled[:: len(labelled) // 12]],
        "describe_s": round(time.time() - started, 1),
    }


def main() -> None:
    started, tiny = time.time(), "--tiny" in sys.argv
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or MODELS
    sizes = (TINY, TINY) if tiny else (SEQUENCES, HELD_OUT)
    results = {name: measure(name, *sizes) for name in names}
    if tiny:
        sys.stdout.write(f"{ {name: r['groups']['all nodes'] for name, r in results.items()} }\n")
        return
    command = " ".join(["python -m benchmarks.descriptions", *sys.argv[1:]])
    save("descriptions", {"seed": 0, "models": results}, started, command)
    sys.stdout.write(f"{RESULTS / 'descriptions.json'}\n")


if __name__ == "__main__":
    main()
