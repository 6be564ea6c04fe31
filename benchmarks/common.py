"""What the benchmarks share: models, data, splits, intervals and the form of a result file."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unweave
from unweave.capture import capture, load_tokenizer
from unweave.data import TokenData, load_data
from unweave.files import read_json, write_json
from unweave.graph import Graph

ROOT = Path(__file__).parent
SHARED = ROOT.parent.parent / "shared"
RESULTS = ROOT / "results"


def model(name: str, context: int = 128) -> tuple[Graph, TokenData, TokenData]:
    """(graph, calibration data, held-out data) of one of the shared models; sequences of full length only."""
    folder = SHARED / "models" / name
    tokenizer = load_tokenizer(folder)
    if name == "pylm":
        path = SHARED / "data" / "python-source.jsonl"
        train = load_data(path, tokenizer, context=context, where={"split": "train"})
        held = load_data(path, tokenizer, context=context, where={"split": "validation"})
    else:
        every = load_data(SHARED / "data" / "stories260K.jsonl", tokenizer, context=context)
        last = int(every.documents.max()) - 500
        train, held = every.select(every.documents <= last), every.select(every.documents > last)
    return capture(folder), full_length(train), full_length(held)


def full_length(data: TokenData) -> TokenData:
    """The sequences that fill the whole context."""
    return data.select(data.mask.all(1))


def save(name: str, result: dict[str, Any], started: float, command: str) -> None:
    """Write results/NAME.json with what is needed to repeat it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    result |= {
        "command": command,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "unweave": unweave.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "wall_s": round(time.time() - started, 1),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def interval(values: Any, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """(mean, 2.5%, 97.5%) by bootstrap over sequences."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def fastest(function: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def folder_and_rows(about: str | None) -> tuple[Path, list[str] | None]:
    """(where trained models and finished rows are kept, the rows asked for or None for all), from the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--folder", type=Path, help="for trained models and rows; what is there is not done again")
    parser.add_argument("--only", nargs="*", help="names of rows, as in 'backdoor 0', 'twin 1'")
    arguments = parser.parse_args()
    return arguments.folder or Path(tempfile.mkdtemp()), arguments.only


def resumed(
    todo: Mapping[str, Callable[[], dict[str, Any]]], saved: Path, only: list[str] | None
) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """After each job, (the rows there are, the names of those there are not); those in ``saved`` are not done again."""
    done: dict[str, Any] = read_json(saved) if saved.exists() else {}
    for name, job in todo.items():
        if name not in done and (not only or name in only):
            done[name] = job()
            write_json(saved, done)
        yield [done[other] for other in todo if other in done], [other for other in todo if other not in done]
