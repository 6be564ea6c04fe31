"""``unweave circuit``: the part of a model that does a task, or that makes its output on plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.options import Context, Data, Frozen, Model, Seed
from unweave.cli.outputs import write_folder
from unweave.cli.tables import edge_table, named_edges, number, with_interval
from unweave.errors import InputError

__all__ = ["circuit", "print_circuit"]


@app.command()
def circuit(
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="A ready-made task (see --list), or a .jsonl file.")] = "",
    data: Data = None,
    at: Annotated[
        str | None, typer.Option("--at", help="Positions of the data to explain: all, last, or a label of a zoo room.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("circuit"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is a graph's.")] = False,
    edges: Annotated[int | None, typer.Option(help="Keep at most so many edges.")] = None,
    kl_nats: Annotated[float | None, typer.Option(help="Stay within so many nats per token.")] = None,
    faithfulness: Annotated[float | None, typer.Option(help="Reach this faithfulness (the default: 0.9).")] = None,
    ablation: Annotated[
        str | None, typer.Option(help="mean, 'mean per position', zero, resample or counterfactual.")
    ] = None,
    metric: Annotated[str, typer.Option(help="kl or logit_difference.")] = "kl",
    level: Annotated[
        str,
        typer.Option(help="Choose edges, whole nodes, or how many dimensions each edge keeps: edge, node, subspace."),
    ] = "edge",
    positions: Annotated[
        str, typer.Option(help="Take positions together, apart (edges lead from one to another), or apart where named.")
    ] = "together",
    frozen: Frozen = "none",
    prompts: Annotated[
        int | None,
        typer.Option(help="How many prompts to make, or sequences to load (the default: 128, of vectors 512)."),
    ] = None,
    context: Context = 128,
    list_: Annotated[bool, typer.Option("--list", help="List the ready-made tasks and stop.")] = False,
    seed: Seed = 0,
) -> None:
    """Find the part of MODEL that does a task, prove it on other prompts, and write it to a folder.

    Without --task: the part that makes its output on --data, or on a zoo model's own data.
    """
    with errors():
        from unweave.dissection import dissect
        from unweave.scope import Scope
        from unweave.storage import check_destination
        from unweave.tasks import list_tasks

        if list_:
            for name, text in list_tasks().items():
                console.print(f"[bold]{escape(name)}[/]: {escape(text)}")
            return
        if not task and data is None and not model.startswith("zoo:"):
            tasks = ", ".join(list_tasks())
            raise InputError(
                f"give --task: a .jsonl file, or one of {tasks}; or --data: what the model reads, without a task"
            )
        check_destination(output, overwrite)
        options: dict[str, Any] = {"edges": edges, "kl_nats": kl_nats, "faithfulness": faithfulness}
        options |= {"ablation": ablation, "metric": metric, "level": level, "positions": positions}
        options |= {"frozen": frozen, "prompts": prompts, "context": context, "seed": seed}
        if at is not None:
            options["scope"] = Scope(at, divergence=metric, description=f"positions: {at}")  # type: ignore[arg-type]
        found = dissect(model, task or None, data=data, **options)
        write_folder(found, output, overwrite)
        print_circuit(found.report)
        console.print(f"\nwrote [bold]{escape(str(output))}/[/]: the circuit as a graph, results.json, report.html")


def print_circuit(results: Mapping[str, Any], edges: int = 20) -> None:
    """A circuit's proof and its edges, from plain results."""
    table = Table(title=f"{escape(results['title'])}: proof on held-out prompts", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    for row in results["proof"]:
        table.add_row(escape(row["what"]), with_interval(row) if row["low"] is not None else number(row["value"]))
    console.print(table)
    kept = [e for e in results["edges"] if e["kept"]]
    console.print(edge_table(named_edges(results, kept[:edges]), f"{len(kept)} edges, with their own effect"))
