"""``unweave probe``: which concept can be read where, and when in training, and whether what is read there is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import graph_of, load_rows, token_kinds, words_of, zoo_scope
from unweave.cli.options import Context, Data, Seed
from unweave.cli.tables import share, with_interval
from unweave.cli.track import print_tracked
from unweave.errors import InputError

__all__ = ["print_probes", "probe"]

BEFORE = "before "
LEGEND = (
    "score: accuracy of a linear probe on held-out tokens (of a number: R²)",
    "plain: that of always saying the commonest class",
    "gain: the share of the plain guess's errors that the probe does not make",
    "bits: the share of the labels' information that is read off with few examples",
    "control: the same for random labels of tokens, learnt by heart; only what is",
    "above it (selectivity) says that the network has the concept there",
)
LEGEND_USED = (
    "random: without as much of other directions; variance: how much is taken out",
    "used: more than random, intervals apart: something there is used, which need",
    "not be the concept, least of all where the probe reads little",
)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A model, or a folder made by 'unweave decompile'.")],
    data: Data = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="NAME=REGEX: whether a token's text matches. Repeatable.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A label of the data, as its classes. Repeatable.")] = None,
    offset: Annotated[
        int, typer.Option(help="Which token concepts are asked of: 0 the one just read, -1 the one before, 1 the next.")
    ] = 0,
    place: Annotated[
        list[str] | None, typer.Option(help="NODE, NODE.code or 'before NODE'; the stream everywhere. Repeatable.")
    ] = None,
    control: Annotated[
        str, typer.Option(help="Labels dealt at random to each token, to each 'token at position', or none.")
    ] = "token",
    draws: Annotated[int, typer.Option(help="Random directions ablated beside each probe's; 0 ablates nothing.")] = 5,
    steps: Annotated[
        Path | None, typer.Option(help="Probe the checkpoints in this folder; MODEL says which tokenizer and data.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Tokens to fit on, at most.")] = 10_000,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all figures as JSON.")] = None,
    context: Context = 128,
    sequences: Annotated[int, typer.Option(help="How many sequences to read; those held out are of them.")] = 256,
    held_out: Annotated[int, typer.Option(help="How many sequences to measure on.")] = 64,
    seed: Seed = 0,
) -> None:
    """Say which concepts a linear probe reads where in MODEL (and when), and what MODEL loses without what it reads."""
    with errors():
        from unweave.files import write_json
        from unweave.probes import label_concept, probe_table, token_concept
        from unweave.storage import finite

        if draws < 0:
            raise InputError(f"--draws must be at least 0, got {draws}")
        graph, source, tokenizer = graph_of(model)
        rows = load_rows(graph, source, data, tokenizer, context, sequences)
        words = words_of(graph, tokenizer)
        concepts = [
            token_concept(name, ids, len(words), offset) for name, ids in _patterns(concept or (), rows, words).items()
        ]
        concepts += [label_concept(name, rows) for name in label or ()]
        if not concepts:
            known = ", ".join(rows.labels) or "none"
            raise InputError(f"say what to look for: --concept NAME=REGEX, or --label (labels of these data: {known})")
        dealt = None if control == "none" or rows.tokens.is_floating_point() else control
        graphs = {0: graph} if steps is None else _checkpoints(steps)
        train, test = rows.split(held_out=held_out, seed=seed)
        options: dict[str, Any] = {"method": "logistic", "code": True, "control": dealt, "limit": limit, "seed": seed}
        found = probe_table(graphs, concepts, train, test, places=place, **options)
        last = max(graphs)
        effects = _effects(found, graphs[last], test, zoo_scope(source), last, draws, seed) if draws > 0 else []
        facts = {
            "model": model,
            "data": rows.source,
            "n_train": int(min(limit, train.n_tokens)),
            "n_held_out": test.n_tokens,
            "vocabulary": len(words),
            "width": int(found.rows[0].probe.weight.shape[1]),
            "options": {**options, "offset": offset, "steps": None if steps is None else str(steps)},
            "probes": found.table(),
            "effects": effects,
        }
        facts = finite(facts)
        print_probes(facts)
        if output is not None:
            write_json(output, facts)
            console.print(f"wrote {escape(str(output))}")


def _patterns(concepts: Sequence[str], rows: Any, words: Sequence[str]) -> dict[str, set[int]]:
    if concepts and rows.tokens.is_floating_point():
        raise InputError("these inputs are numbers, not tokens that a --concept could match; give --label")
    out = {}
    for name, ids in token_kinds(concepts, words).items():
        if isinstance(ids, str):
            raise InputError(f"a concept is written NAME=REGEX, got {name!r}; if it is a label of the data, --label it")
        out[name] = ids
    return out


def _checkpoints(folder: Path) -> dict[int, Any]:
    from unweave.capture import capture
    from unweave.progress import track
    from unweave.tracking import checkpoints_in

    found = checkpoints_in(folder)
    return {step: capture(str(path), verify=False) for step, path in track(found, "loading checkpoints")}


def _effects(found: Any, graph: Any, rows: Any, scope: Any, step: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """What the network of the last step loses without what each probe reads, beside random directions."""
    from unweave.probes import probe_effect
    from unweave.progress import track

    out = []
    for row in track([r for r in found.rows if r.step == step], "ablating what probes read"):
        named = {"concept": row.concept, "place": row.place, "step": step}
        if not bool(row.probe.weight.any()):
            continue
        effect = probe_effect(graph, row.probe, row.place, rows, scope, draws=draws, seed=seed)
        kept = {k: v for k, v in effect.columns().items() if "behaviour" not in k}
        out.append(named | kept)
    return out


def print_probes(facts: Mapping[str, Any]) -> None:
    """The tables of plain results: what is read where, when, and whether it is used."""
    last = max(row["step"] for row in facts["probes"])
    when = len({row["step"] for row in facts["probes"]}) > 1
    at = f", step {last}" if when else ""
    rows = [row for row in facts["probes"] if row["step"] == last]
    title = f"what a linear probe reads{at}: {facts['n_held_out']:,} held-out tokens"
    read = _table(title, rows, ("score", "plain", "gain", "control", "bits", "control"))
    for name, row in _by_concept(read, rows):
        read.add_row(
            name,
            _score(row),
            _percent(row["baseline"]),
            *(_whole(row[name]) for name in ("gain", "control_gain", "saved", "control_saved")),
        )
    console.print(read)
    for line in LEGEND:
        console.print(f"[dim]{line}[/]", highlight=False)
    if facts["options"]["control"] == "token" and facts["vocabulary"] <= facts["width"]:
        console.print(
            f"[yellow]with {facts['vocabulary']} tokens in {facts['width']} dimensions, a probe can learn any labels of"
            " tokens by heart: take --control 'token at position'[/]",
            highlight=False,
        )
    if when:
        _print_courses(facts["probes"])
    if facts["effects"]:
        _print_effects(facts["effects"])


def _print_effects(effects: Sequence[Mapping[str, Any]]) -> None:
    title = "what is lost without what the probe reads, nats per token"
    used = _table(title, effects, ("nats", "random", "variance", ""))
    for name, row in _by_concept(used, effects):
        nats, others = (with_interval(_interval(row, figure)) for figure in ("kl_nats", "random_kl_nats"))
        used.add_row(name, nats, others, share(row["share"]), "used" if row["is_used"] else "–")
    console.print()
    console.print(used)
    for line in LEGEND_USED:
        console.print(f"[dim]{line}[/]", highlight=False)


def _print_courses(rows: Sequence[Mapping[str, Any]]) -> None:
    console.print()
    courses = [
        {"step": r["step"], "quantity": r["concept"], "part": _place(r["place"]), "value": r["score"]}
        for r in rows
        if r["score"] is not None
    ]
    print_tracked(courses, top=len(courses))


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("stream before" if _all_in_stream(rows) else "where", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _by_concept(table: Table, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(the place as a cell, row) of all rows, each concept's under its name."""
    concept, streams = None, _all_in_stream(rows)
    for row in rows:
        if row["concept"] != concept:
            if concept is not None:
                table.add_section()
            concept = row["concept"]
            table.add_row(f"[bold]{escape(concept)}[/]")
        place = _place(row["place"])
        yield place.removeprefix(BEFORE) if streams else place, row


def _all_in_stream(rows: Sequence[Mapping[str, Any]]) -> bool:
    return all(row["place"].startswith(BEFORE) for row in rows)


def _place(name: str) -> str:
    """A place as a cell: the stream before a layer's heads is the same for all of them."""
    stem, _, _ = name.partition(".head.")
    return escape(stem if name.startswith(BEFORE) else name)


def _interval(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}


def _percent(value: float | None) -> str:
    return share(None if value is None else round(value, 3) + 0.0)  # no -0.0%


def _score(row: Mapping[str, Any]) -> str:
    ends = [None if row[name] is None else 100 * row[name] for name in ("score_low", "score_high")]
    low, high = ("–" if end is None else f"{end:.1f}".replace("100.0", "100") for end in ends)
    return f"{_percent(row['score'])} [dim]{low}{' to ' if '-' in low else '–'}{high}[/]"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.0%}"
