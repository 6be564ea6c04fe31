"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["FISHER_SAMPLES", "Context", "Data", "Folder", "Frozen", "Model", "Seed", "Sequences"]

# random output directions per sequence, where an edit is also predicted to second order
FISHER_SAMPLES = 16

Model = Annotated[str, typer.Argument(help="A hub name, a model folder, zoo:NAME, or a tracr folder.")]
Folder = Annotated[Path, typer.Argument(help="A folder made by 'unweave decompile'.")]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", help=".txt, .jsonl, .npy, .safetensors, a folder of them, or a hub data set."),
]
Context = Annotated[int, typer.Option(help="Longest sequence, in tokens.")]
Sequences = Annotated[int, typer.Option(help="How many sequences to calibrate on.")]
Frozen = Annotated[str, typer.Option(help="What gradients do not pass through: none, patterns, 'patterns and norms'.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
