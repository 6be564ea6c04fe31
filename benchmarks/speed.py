"""Times as ratios, measured side by side, and memory against the size of the data set.

    python -m benchmarks.speed

Times want a machine with nothing else to do. With --memory only the memory is measured again, which does not mind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import RESULTS, SHARED, fastest, model, save
from unweave.capture import capture, load_model
from unweave.compression import channel_moments, survey
from unweave.compression.allocation import Budgeter
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.statistics import collect_means


def forwards(name: str) -> dict[str, float]:
    graph, train, _ = model(name)
    original = load_model(SHARED / "models" / name)
    tokens = train.tokens[:16].long()
    means = {w: torch.zeros(1, graph.info["d_model"]) for w in graph.writers}
    half = graph.possible_edges & (
        torch.rand(graph.possible_edges.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    )
    small = Budgeter(graph, channel_moments(graph, train.select(slice(0, 32)), Scope())).at_size(0.4)
    with torch.no_grad():
        base = fastest(lambda: original(tokens), 15)
        graphs: dict[str, Graph] = {
            "uncut": graph,
            "half of the edges cut": graph.restrict(half, means=means),
            "compressed to 40%": small,
        }
        return {what: fastest(lambda g=g: run(g, tokens), 15) / base for what, g in graphs.items()}


def pipeline(name: str, n: int) -> float:
    """Capture + statistics + scores + compression against forward + backward, over the same n sequences."""
    _, train, _ = model(name)
    data = train.select(slice(0, n))
    original = load_model(SHARED / "models" / name)

    def passes() -> None:
        for batch in data.batches(16):
            logits = original(batch.inputs).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.inputs[:, 1:].flatten()).backward()
            original.zero_grad()

    def ours() -> None:
        graph = capture(original, verify=False)
        means = collect_means(graph, data)
        _, moments = survey(graph, data, Scope(), means, samples=1)
        Budgeter(graph, moments).at_size(0.6)

    return fastest(ours, 2) / fastest(passes, 2)


def peak_megabytes(tokens: Path, n: int) -> float:
    """Peak memory of scoring and moments over n sequences mapped from a file, in a process of its own."""
    code = (
        "import re, sys, torch; torch.set_num_threads(1)\n"
        "from unweave import capture, collect_means, load_data\n"
        "from unweave.compression import survey\n"
        "from unweave.scope import Scope\n"
        f"graph = capture({str(SHARED / 'models' / 'stories260K')!r})\n"
        f"data = load_data({str(tokens)!r}, context=128).select(slice(0, {n}))\n"
        f"assert len(data) == {n}\n"
        "survey(graph, data, Scope(), collect_means(graph, data), samples=1)\n"
        # not getrusage: its peak includes that of the process that started this one
        "sys.stdout.write(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1]) / 1024


def main(memory_only: bool) -> None:
    started = time.time()
    torch.set_num_threads(1)
    result: dict = {"forward_ratio": {}, "pipeline_ratio": {}, "peak_mb": {}}
    if memory_only:
        result = json.loads((RESULTS / "speed.json").read_text()) | {"peak_mb": {}}
    for name in () if memory_only else ("stories260K", "pylm"):
        result["forward_ratio"][name] = forwards(name)
        result["pipeline_ratio"][name] = {n: pipeline(name, n) for n in (256, 1024)}
        print(result, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, model("stories260K")[1].tokens.numpy())
        for n in (16, 64, 256, 1024, 4096):
            result["peak_mb"][n] = peak_megabytes(tokens, n)
    print(result)
    save("speed", result, started, "python -m benchmarks.speed")


if __name__ == "__main__":
    main("--memory" in sys.argv)
