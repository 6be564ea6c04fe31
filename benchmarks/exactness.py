"""Families x precision: the largest logit difference between a captured graph and its model.

    python -m benchmarks.exactness

Tiny random models of every family and option (tests/families.py), 2 x 48 tokens, and the shared models.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.common import SHARED, save
from unweave.capture import capture, load_model, model_logits
from unweave.execution import run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from families import CONFIGS, random_model


def difference(model: torch.nn.Module, vocabulary: int, length: int) -> dict[str, float]:
    graph = capture(model, verify=False)
    length = min(length, graph.info["n_ctx"])
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, truth = run(graph, tokens).logits.float(), model_logits(model, tokens).float()
    return {"largest": float((ours - truth).abs().max()), "largest_logit": float(truth.abs().max())}


def main() -> None:
    warnings.simplefilter("ignore")
    started = time.time()
    rows = []
    for name in CONFIGS:
        for dtype in (torch.float32, torch.bfloat16):
            row = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row | difference(random_model(name, dtype), 50, 48))
    for name in ("stories260K", "pylm"):
        for dtype in (torch.float32, torch.bfloat16):
            original = load_model(SHARED / "models" / name).to(dtype)
            row = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row | difference(original, 512, 128))
    for row in rows:
        print(row)
    save("exactness", {"rows": rows}, started, "python -m benchmarks.exactness")


if __name__ == "__main__":
    main()
