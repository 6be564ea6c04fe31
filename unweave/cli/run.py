"""``unweave run``: a text continued by the graph."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import open_folder
from unweave.cli.options import Folder, Seed
from unweave.errors import InputError

__all__ = ["run"]


@app.command()
def run(
    folder: Folder,
    prompt: Annotated[
        str, typer.Argument(help="Text to continue (token ids separated by spaces for models without a tokenizer).")
    ],
    model: Annotated[str | None, typer.Option(help="Where the original is now, if it moved.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 60,
    temperature: Annotated[float, typer.Option(help="0 for the most likely token.")] = 0.0,
    seed: Seed = 0,
) -> None:
    """Continue a text with the graph, next to the original model."""
    with errors():
        from unweave.capture import capture
        from unweave.generation import encode_prompt, generate

        graph, source, tokenizer = open_folder(folder, model)
        if graph.resample:
            raise InputError(
                f"cut edges of {folder} hear another input, and a text that is being written has none; "
                "'unweave circuit --ablation mean' makes a circuit that writes"
            )
        ids = encode_prompt(prompt, tokenizer)
        texts = {"graph": graph}
        if source:
            texts["original"] = capture(source, verify=False)
        table = Table(show_header=True, show_lines=True)
        table.add_column("")
        table.add_column("continuation", overflow="fold")
        for name, g in texts.items():
            out = generate(g, ids, tokens, temperature=temperature, seed=seed)[0].tolist()
            table.add_row(name, escape(_decode(out, tokenizer)))
        console.print(table)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
