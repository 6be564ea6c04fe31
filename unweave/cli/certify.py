"""``unweave certify``: bounds on how far a graph is from its model, for every input of a box or of a finite set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import pair_of
from unweave.cli.options import Folder, Seed
from unweave.cli.tables import number, share
from unweave.errors import InputError

__all__ = ["certify"]

# what a bound is of, and its unit
QUANTITIES = {"output": "largest difference of an output", "kl": "KL divergence, nats"}


@app.command()
def certify(
    folder: Folder,
    box: Annotated[
        str | None, typer.Option(help="LOW,HIGH of every input: bound the distance over all reals between them.")
    ] = None,
    all_inputs: Annotated[
        str | None, typer.Option(help="Tokens at each position, as '0-112,5,*': try every input. * is any token.")
    ] = None,
    positions: Annotated[str, typer.Option(help="Of --all-inputs: compare at all positions, or at the last.")] = "all",
    factor: Annotated[float, typer.Option(help="Of --box: stop at so many times the worst found.")] = 2.0,
    limit: Annotated[int, typer.Option(help="Bound so many boxes at most, or refuse more inputs.")] = 100_000,
    model: Annotated[str | None, typer.Option(help="Where the original is now, if it moved.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file; by default certificate.json in the folder.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Bound how far a graph is from its model at every input of a box, or try all inputs of a finite set."""
    with errors():
        from unweave.files import write_json
        from unweave.storage import finite

        if (box is None) == (all_inputs is None):
            raise InputError("say for which inputs: either --box LOW,HIGH or --all-inputs TOKENS,TOKENS,...")
        graph, original, _, _ = pair_of(folder, model)
        if box is not None:
            facts = _over_box(graph, original, _ends(box), factor, limit, seed)
        else:
            facts = _over_all(graph, original, str(all_inputs), positions, limit)
        path = folder / "certificate.json" if output is None else output
        write_json(path, finite(facts))
        console.print(f"wrote {escape(str(path))}")


def _ends(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--box is two numbers with a comma between, as -1,1; got {text!r}") from None
    return low, high


def _allowed(text: str, vocabulary: int) -> list[Sequence[int]]:
    """The tokens of each position."""
    allowed: list[Sequence[int]] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if part.strip() == "*":
            allowed.append(range(vocabulary))
        elif first.isdecimal() and (last.isdecimal() if dash else True):
            allowed.append(range(int(first), int(last or first) + 1))
        else:
            raise InputError(f"--all-inputs is a token, FIRST-LAST or * for each position, by commas; got {part!r}")
    return allowed


def _over_box(
    graph: Any, original: Any, ends: tuple[float, float], factor: float, limit: int, seed: int
) -> Mapping[str, Any]:
    import torch

    from unweave.certificates import certify_boxes

    if "d_input" not in graph.info:
        raise InputError("a box is of real inputs, and this graph reads tokens; use --all-inputs")
    low, high = (torch.full((graph.info["d_input"],), end, dtype=torch.float64) for end in ends)
    rows = []
    for quantity in QUANTITIES:
        found = certify_boxes(
            graph, original, low, high, quantity=quantity, factor=factor, limit=limit, tolerance=1e-9, seed=seed
        )
        plain = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
        rows.append(plain | {"found_at": found.found_at.tolist(), "tightness": found.tightness})
    _print_boxes(rows, ends)
    return {"box": list(ends), "factor": factor, "limit": limit, "rows": rows}


def _print_boxes(rows: Sequence[Mapping[str, Any]], ends: tuple[float, float]) -> None:
    table = Table(title=f"graph and model, every input in [{ends[0]:g}, {ends[1]:g}]", title_justify="left")
    for name in ("of", "at most", "found", "ratio", "unsplit", "intervals", "boxes"):
        table.add_column(name, justify="left" if name == "of" else "right", overflow="fold")
    for row in rows:
        figures = (number(row[k]) for k in ("bound", "found", "tightness", "unsplit_bound", "interval_bound"))
        table.add_row(QUANTITIES[row["quantity"]], *figures, f"{row['n_boxes']:,}")
    console.print(table)
    if not all(row["finished"] for row in rows):
        console.print(
            "[dim]the bound holds, but more boxes (--limit) may bring it nearer to what was found[/]", highlight=False
        )


def _over_all(graph: Any, original: Any, text: str, positions: str, limit: int) -> Mapping[str, Any]:
    from unweave.certificates import certify_exhaustively
    from unweave.scope import Scope

    if "d_vocab" not in graph.info:
        raise InputError("this graph reads real numbers, of which there is no end; use --box")
    if positions not in ("all", "last"):
        raise InputError(f"--positions is all or last, got {positions!r}")
    domain = _allowed(text, graph.info["d_vocab"])
    scope = Scope(positions="last") if positions == "last" else None
    found = certify_exhaustively(graph, original, domain, scope, limit=limit)
    table = Table(title=f"graph and model, all {found.n_inputs:,} inputs", title_justify="left")
    for name in ("of", "most", "at", "mean"):
        table.add_column(name, justify="left" if name in ("of", "at") else "right", overflow="fold")
    at, apart_at = (" ".join(f"{t:g}" for t in x) for x in (found.worst_input, found.logit_input))
    table.add_row("KL divergence, nats", number(found.worst_nats), at, number(found.mean_nats))
    table.add_row("difference of a logit", number(found.worst_logit_difference), apart_at, "")
    table.add_row("same first output", "", "", share(found.agreement))
    console.print(table)
    return {"all_inputs": text, "positions": positions, **dataclasses.asdict(found)}
