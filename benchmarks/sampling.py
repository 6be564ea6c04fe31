"""Usage per token: what it costs, and whether kinds of data found without labels are the tasks of a mixture.

    python -m benchmarks.sampling [--sequences N]

Tasks: on zoo:three_tasks, found types of texts against the true task of every token (correlation); circuits searched on
a found type against circuits searched on its task (F1); the edges in use, by second order, against those whose
ablation, measured one by one on the texts of one task, costs at least 0.01 nats (F1: lower, since ablating one token
of what a saturated head looks by does nothing); and what is found in usage shuffled within edges. Cost:
on stories260K, recording against one forward + backward pass of the model, side by side on one thread, and peak memory
at two sizes. Times want a machine with nothing else to do; without --sequences, every story is taken.
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
from pyarrow import parquet
from scipy.optimize import linear_sum_assignment

import unweave
from benchmarks.common import SHARED, save
from unweave.capture import load_model, load_tokenizer
from unweave.data import TokenData
from unweave.graph import Graph
from unweave.sampling import Usage, find_types, open_usage, record_usage
from unweave.scoring import score_edges
from unweave.zoo.three_tasks import TASKS

LEAST_NATS = 0.01
NULLS = 10


def f1(found: torch.Tensor, true: torch.Tensor) -> float:
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def shuffled(usage: Usage, folder: Path, seed: int) -> Usage:
    """The same usage, every column shuffled among the tokens on its own."""
    rng = np.random.default_rng(seed)
    tables = [parquet.read_table(path) for path in usage.paths]
    folder.mkdir()
    (folder / "usage.json").write_text((usage.folder / "usage.json").read_text())
    joined = {
        name: np.concatenate([table[name].to_numpy() for table in tables])
        for name in tables[0].column_names
        if name.startswith("u")
    }
    joined = {name: rng.permutation(column) for name, column in joined.items()}
    start = 0
    for path, table in zip(usage.paths, tables, strict=True):
        for name, column in joined.items():
            place = table.column_names.index(name)
            table = table.set_column(place, name, [column[start : start + len(table)]])
        parquet.write_table(table, folder / path.name)
        start += len(table)
    return open_usage(folder)


def tasks(folder: Path) -> dict:
    graph, data = unweave.capture("zoo:three_tasks"), unweave.load_data("zoo:three_tasks")
    scope = unweave.Scope(positions="answered")
    usage = record_usage(graph, data, scope, folder / "tasks", level="edge", samples=2)
    found = find_types(usage, units="sequence")
    truth = data.labels["task"][:, None].expand(data.mask.shape)
    corr = np.array(
        [
            [np.corrcoef(t.tokens.flatten(), (truth == k).flatten())[0, 1] for k in range(len(TASKS))]
            for t in found.types
        ]
    )
    rows, columns = linear_sum_assignment(-corr)
    marked = found.marked(data, scope)
    of_types = []
    for r, k in zip(rows, columns, strict=True):
        of_types.append(one_task(graph, data, marked, found.types[r], int(k), float(corr[r, k])))
    nothing = [
        len(find_types(shuffled(usage, folder / f"null {n}", n), units="sequence", seed=n).types) for n in range(NULLS)
    ]
    by_token = find_types(usage)
    return {
        "types": of_types,
        "n_factors": found.n_factors,
        "trials": list(found.trials),
        "mean_correlation": float(np.mean([row["correlation"] for row in of_types])),
        "least_f1_circuits": min(row["f1_circuits"] for row in of_types),
        "least_f1_edges_used": min(row["f1_edges_used"] for row in of_types),
        "types_found_in_nulls": nothing,
        "types_by_token": {t.name: t.top(3) for t in by_token.types},
    }


def one_task(graph: Graph, data: TokenData, marked: TokenData, kind: unweave.sampling.DataType, k: int, corr: float):
    scope = unweave.Scope(positions="answered")
    own = data.select(data.labels["task"] == k)
    means = unweave.collect_means(graph, data)
    effects = score_edges(graph, own, scope, method="exact", means=means)
    circuits = [
        unweave.find_circuit(graph, texts, where, faithfulness=0.9, means=means)
        for texts, where in ((own, scope), (marked.select(kind.tokens.any(1)), kind.scope()))
    ]
    return {
        "task": TASKS[k],
        "correlation": corr,
        "tokens": int(kind.tokens.sum()),
        "agreement": kind.agreement,
        "edges_used": int(kind.edges(graph, LEAST_NATS).sum()),
        "edges_measured": int(effects.above(LEAST_NATS).sum()),
        "f1_edges_used": f1(kind.edges(graph, LEAST_NATS), effects.above(LEAST_NATS)),
        "f1_circuits": f1(circuits[1].kept, circuits[0].kept),
    }


def cost(folder: Path, n: int | None) -> dict:
    name = SHARED / "models" / "stories260K"
    path, tokenizer = SHARED / "data" / "stories260K.jsonl", load_tokenizer(name)
    data = unweave.load_data(path, tokenizer, context=256, limit=n)
    graph, original = unweave.capture(name), load_model(name)
    started = time.perf_counter()
    for batch in data.batches(16):
        logits = original(batch.inputs, attention_mask=batch.mask.long()).logits
        targets = batch.inputs.masked_fill(~batch.mask, -100)[:, 1:]
        F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
        original.zero_grad()
    passes = time.perf_counter() - started
    started = time.perf_counter()
    usage = record_usage(graph, data, None, folder / "stories")
    recording = time.perf_counter() - started
    started = time.perf_counter()
    rows = usage.where("blocks.2.attn.head.3 > 0.5")
    asking = time.perf_counter() - started
    return {
        "sequences": len(data),
        "tokens": usage.n_tokens,
        "ratio": recording / passes,
        "record_s": recording,
        "forward_backward_s": passes,
        "disk_mb": sum(p.stat().st_size for p in usage.paths) / 1e6,
        "query_s": asking,
        "rows": len(rows),
    }


def peak_megabytes(folder: Path, n: int) -> float:
    """Peak memory of recording, in a process of its own."""
    code = (
        "import re, sys, torch; torch.set_num_threads(1)\n"
        "from unweave import capture, load_data\n"
        "from unweave.sampling import record_usage\n"
        f"graph = capture({str(SHARED / 'models' / 'stories260K')!r})\n"
        f"data = load_data({str(folder / 'tokens.npy')!r}, context=128).select(slice(0, {n}))\n"
        f"assert len(data) == {n}\n"
        f"record_usage(graph, data, None, {str(folder / f'memory {n}')!r})\n"
        # not getrusage: its peak includes that of the process that started this one
        "sys.stdout.write(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1]) / 1024


def main(arguments: list[str]) -> None:
    started = time.time()
    torch.set_num_threads(1)
    n = int(arguments[arguments.index("--sequences") + 1]) if "--sequences" in arguments else None
    command = "python -m benchmarks.sampling" + (f" --sequences {n}" if n else "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict = {"tasks": tasks(folder)}
        print(json.dumps(result, indent=1), flush=True)
        save("sampling", result, started, command)
        result["cost"] = cost(folder, n)
        print(result["cost"], flush=True)
        save("sampling", result, started, command)
        tokens = torch.randint(3, 500, (4096, 128), generator=torch.Generator().manual_seed(0))
        np.save(folder / "tokens.npy", tokens.int().numpy())
        sizes = (128, 512) if n else (1024, 4096)
        result["peak_mb"] = {str(size): peak_megabytes(folder, size) for size in sizes}
    print(result["peak_mb"])
    save("sampling", result, started, command)


if __name__ == "__main__":
    main(sys.argv[1:])
