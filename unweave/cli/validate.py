"""``unweave validate``: how far a graph is from its model, by data set and kind of token, next to its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import load_rows, pair_of, token_kinds, words_of, zoo_scope
from unweave.cli.options import FISHER_SAMPLES, Context, Data, Folder, Seed
from unweave.cli.tables import number, plain_interval, share, with_interval
from unweave.errors import InputError

if TYPE_CHECKING:
    from unweave.report.checks import EditsFacts, ValidationFacts, ValidationRow

__all__ = ["validate"]

# what random edits change, as a share (see docs)
EDIT_SIZES = {"0.1": 0.1, "0.3": 0.3, "1": 1.0}
LONGEST_TEXT = 60


@app.command()
def validate(
    folder: Folder,
    data: Data = None,
    other: Annotated[list[str] | None, typer.Option(help="More data, as rows of its own; may be repeated.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="LABEL=REGEX: rows of their own for tokens that match; or a label of the data. Repeatable."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Data for means and for baselines that need activations; not what is tested on.")
    ] = None,
    edits: Annotated[int, typer.Option(help="Also predict so many random edits of each of three sizes.")] = 0,
    model: Annotated[str | None, typer.Option(help="Where the original is now, if it moved.")] = None,
    top: Annotated[int, typer.Option(help="How many of the worst tokens to print.")] = 5,
    context: Context = 128,
    sequences: Annotated[int, typer.Option(help="How many sequences of each data set.")] = 64,
    seed: Seed = 0,
) -> None:
    """Say how far a graph is from its model, by data set and kind of token, next to baselines of its size.

    A circuit without --data is held against the model on the prompts that it was proved on.
    """
    with errors():
        from unweave.checks import validation_facts
        from unweave.dissection import proof_prompts
        from unweave.falsification import Validation
        from unweave.falsification import validate as run_validation
        from unweave.falsification.validation import INFORMED, PLAIN
        from unweave.storage import load_checks, load_results, save_check

        graph, original, source, tokenizer = pair_of(folder, model)
        tokens, scope = words_of(graph, tokenizer), zoo_scope(source)
        types = token_kinds(by or (), tokens)
        proof = None if data else proof_prompts(load_results(folder).get("provenance", {}), original, tokenizer)
        sets = {
            name: load_rows(graph, source, path, tokenizer, context, sequences, held_out=True)
            for name, path in _named(data, other or (), first=proof is None).items()
        }
        known = None
        if calibration is not None:
            known = load_rows(graph, source, calibration, tokenizer, context, 2 * sequences)
        size = graph.n_channel_parameters / max(original.n_channel_parameters, 1)
        rivals = [*PLAIN, *INFORMED] if known is not None and size < 1 else None
        options: dict[str, Any] = {"baselines": rivals, "calibration": known, "seed": seed}
        found = Validation({}, {})
        if proof is not None:
            kinds = {} if sets else types  # a task asks about few positions; kinds of tokens are of the other data
            found = run_validation(graph, original, {"proof": proof[0]}, scope=proof[1], types=kinds, **options)
        if sets:
            rest = run_validation(graph, original, sets, scope=scope, types=types, **options)
            found = Validation({**found.rows, **rest.rows}, {**found.left_out, **rest.left_out})
        facts = validation_facts(found, tokens, size)
        _print_validation(facts, top)
        written = [save_check(folder, "validation", facts)]
        if edits:
            first, measured = (next(iter(sets.values())), scope) if proof is None else proof
            predicted = _predict_edits(graph, original, first.select(slice(0, 16)), edits, measured, seed)
            _print_edits(predicted)
            held = load_checks(folder).get("edits", {"points": []})["points"]
            predicted["points"] += [point for point in held if point["size"] not in EDIT_SIZES]
            written.append(save_check(folder, "edits", predicted))
        console.print(f"wrote {escape(', '.join(map(str, written)))}; 'unweave report' shows it")


def _named(data: str | None, other: Sequence[str], *, first: bool) -> dict[str, str | None]:
    """Data sets by name; with ``first``, what --data says is one, too."""
    names: dict[str, str | None] = {"data": data} if first else {}
    for path in other:
        name = Path(path).stem or path
        if name in names:
            raise InputError(f"two data sets are called {name!r}; rename {path}")
        names[name] = path
    return names


def _predict_edits(graph: Any, original: Any, rows: Any, n: int, scope: Any, seed: int) -> EditsFacts:
    from unweave.checks import edits_facts
    from unweave.falsification import edit_prediction, random_edits

    edits = {
        name: random_edits(original, n, value, seed + i, rows) for i, (name, value) in enumerate(EDIT_SIZES.items())
    }
    table = edit_prediction(graph, original, edits, rows, scope, second_order=FISHER_SAMPLES, seed=seed)
    return edits_facts(table, edits)


def _print_validation(facts: ValidationFacts, top: int) -> None:
    """The table, one block for every data set and kind of token, and the worst tokens."""
    table = Table(title="held against the model, nats per token", title_justify="left")
    for name in ("graph", "KL", "99.9%", "max", "same", "loss rec."):
        table.add_column(name, justify="left" if name == "graph" else "right", overflow="fold")
    last = None
    for row in _best_at_random(facts["rows"]):
        here = (row["data"], row["type"])
        if here != last:
            if last is not None:
                table.add_section()
            table.add_row(f"[bold]{escape(' / '.join(here))}[/]", f"[dim]{row['n_tokens']:,} tokens[/]", *[""] * 4)
        last = here
        table.add_row(
            escape(row["graph"]),
            with_interval(row["kl_nats"]),
            number(row["kl_p999"], 2),
            number(row["kl_max"], 2),
            share(row["agreement"]["value"]),
            share(row["loss_recovered"]["value"]),
        )
    console.print(table)
    for name, why in facts["left_out"].items():
        console.print(f"[dim]no {escape(name)}: {escape(why)}[/]", highlight=False)
    worst = Table(title="worst tokens of the graph", title_justify="left")
    for name in ("data", "nats", "text", "model", "graph"):
        worst.add_column(name, overflow="fold")
    seen: dict[str, int] = {}
    for gap in facts["worst"]:
        seen[gap["data"]] = seen.get(gap["data"], 0) + 1
        if seen[gap["data"]] <= top:
            texts = (repr(gap[key])[1:-1] for key in ("text", "network", "graph"))
            worst.add_row(gap["data"], number(gap["nats"]), *(escape(text[-LONGEST_TEXT:]) for text in texts))
    if top:
        console.print(worst)


def _best_at_random(rows: Sequence[ValidationRow]) -> list[ValidationRow]:
    """The rows; of random circuits, only the one nearest to the model for each kind of token."""
    out: list[ValidationRow] = []
    kinds = groupby(rows, key=lambda r: (r["data"], r["type"], r["graph"].startswith("random ")))
    for (_, _, at_random), same in ((kind, list(some)) for kind, some in kinds):
        if at_random:
            nearest = min(same, key=lambda r: r["kl_nats"]["value"] or 0.0)
            same = [{**nearest, "graph": f"best of {len(same)} random"}]
        out.extend(same)
    return out


def _print_edits(facts: Mapping[str, Any]) -> None:
    """How well edits were called."""
    table = Table(title="random edits: change of the loss, predicted against true", title_justify="left")
    for name in ("size", "predicted by", "R²", "slope", "top token", "n"):
        table.add_column(name, justify="left" if name == "predicted by" else "right", overflow="fold")
    for row in facts["rows"]:
        if row["predictor"] == "graph" and row["size"] != facts["rows"][0]["size"]:
            table.add_section()
        cells = (plain_interval(row["r2"]), plain_interval(row["slope"]), share(row["top_token"]["value"]))
        table.add_row(row["size"], row["predictor"], *cells, str(row["n"]))
    console.print(table)
