"""``unweave edit``: predict an edit, make it, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import load_rows, pair_of, zoo_scope
from unweave.cli.options import FISHER_SAMPLES, Context, Data, Model, Seed, Sequences
from unweave.errors import InputError

if TYPE_CHECKING:
    from unweave.data import TokenData
    from unweave.falsification import Edit
    from unweave.graph import Graph
    from unweave.report.checks import EditPoint
    from unweave.scope import Scope

__all__ = ["edit"]


@app.command()
def edit(
    model: Model,
    data: Data = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="NODE:FILE, a direction (.npy or .safetensors) that the node is no longer to write."),
    ] = None,
    scale: Annotated[
        list[str] | None, typer.Option(help="NODE=FACTOR, what a head or MLP writes times a factor.")
    ] = None,
    swap: Annotated[
        tuple[str, str] | None, typer.Option(help="Two tokens, by text or id, whose embeddings change places.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")] = Path("edited"),
    size: Annotated[float, typer.Option(help="Share of the channels' numbers in the graph that predicts.")] = 0.8,
    form: Annotated[str, typer.Option(help="Form of that graph: low-rank or sparse.")] = "sparse",
    context: Context = 128,
    sequences: Sequences = 128,
    held_out: Annotated[int, typer.Option(help="How many sequences to predict and measure on.")] = 32,
    seed: Seed = 0,
) -> None:
    """Edit MODEL, save it, and compare what its compressed graph predicted with what the edit did.

    MODEL may be a graph folder: then that graph predicts, and its report shows the edit.
    """
    with errors():
        from unweave.capture import capture, load_model, load_tokenizer
        from unweave.falsification import read_edit, save_edited

        folder = Path(model) if (Path(model) / "graph.json").is_file() else None
        if folder is None:
            small, source, tokenizer = None, model, load_tokenizer(model)
        else:
            small, _, source, tokenizer = pair_of(folder, None)
        change = read_edit(remove or (), scale or (), swap, tokenizer)
        original = load_model(source)
        graph = capture(original)
        for edited in (graph, small or graph):
            change.apply_to_graph(edited)  # refused before anything is computed
        if data is not None or source.startswith("zoo:"):
            n = held_out if small is not None else sequences + held_out
            rows = load_rows(graph, source, data, tokenizer, context, n, held_out=small is not None)
            scope = zoo_scope(source)
            if small is None:
                small, rows = _compressed(graph, rows, held_out, scope, size, form, seed)
            point = _predict(small, graph, change, rows, scope, seed)
            _print_point(point)
            if folder is not None:
                _keep(folder, point)
        save_edited(change, original, output, tokenizer)
        console.print(f"wrote {escape(str(output))}")


def _compressed(
    graph: Graph, rows: TokenData, held_out: int, scope: Scope | None, size: float, form: str, seed: int
) -> tuple[Graph, TokenData]:
    """(a graph that predicts, the sequences that it has not seen)."""
    from unweave.compression import compress

    if len(rows) <= held_out:
        raise InputError(f"{len(rows)} sequences are too few to calibrate and hold {held_out} out")
    calibration, held = rows.split(held_out=held_out, seed=seed)
    return compress(graph, calibration, scope, size=size, form=form, seed=seed), held


def _predict(small: Graph, graph: Graph, change: Edit, rows: TokenData, scope: Scope | None, seed: int) -> EditPoint:
    """The change of the loss by the edit, nats per token: as it is, and as predicted."""
    from unweave.checks import spell_edit
    from unweave.falsification import predict_edit
    from unweave.falsification.expansion import expand_loss

    first, half = expand_loss(graph, [change], rows, scope, samples=FISHER_SAMPLES, seed=seed)
    return {
        "size": "as asked",
        "edit": spell_edit(change),
        "true": predict_edit(graph, change, rows, scope).loss_nats,
        "graph": predict_edit(small, change, rows, scope).loss_nats,
        "gradient": float(first[0]),
        "second_order": float(first[0] + half[0]),
    }


def _print_point(point: EditPoint) -> None:
    console.print(f"[bold]{escape(point['edit'])}[/]")
    table = Table()
    table.add_column("change of the loss")
    table.add_column("nats per token", justify="right")
    names = {"true": "measured", "graph": "predicted by the graph", "second_order": "second order"}
    for key, name in (names | {"gradient": "first order (gradient)"}).items():
        table.add_row(name, f"{point[key]:+.4f}")  # type: ignore[literal-required]
    console.print(table)


def _keep(folder: Path, point: EditPoint) -> None:
    """Put an edit beside those that the folder holds."""
    from unweave.storage import load_checks, save_check

    held = load_checks(folder).get("edits", {"rows": [], "points": []})
    written = save_check(folder, "edits", {**held, "points": [*held["points"], point]})
    console.print(f"wrote {escape(str(written))}; 'unweave report' shows it")
