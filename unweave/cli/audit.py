"""``unweave audit``: where a graph disagrees with its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import load_rows, pair_of, words_of, zoo_scope
from unweave.cli.options import Context, Data, Folder, Seed, Sequences
from unweave.cli.tables import number, plain_interval
from unweave.errors import InputError

__all__ = ["audit"]


@app.command()
def audit(
    folder: Folder,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="Where the original is now, if it moved.")] = None,
    top: Annotated[int, typer.Option(help="How many rows of each table to print.")] = 8,
    search: Annotated[int, typer.Option(help="Also search worse inputs, running so many; 0 for none.")] = 0,
    triggers: Annotated[
        int, typer.Option(help="Also search pairs of tokens that act in any text, running so many; 0 for none.")
    ] = 0,
    beside: Annotated[
        Path | None, typer.Option(help="Another graph of the model, of another size: a trigger is new to both.")
    ] = None,
    clean: Annotated[
        str | None, typer.Option(help="Clean texts that the graph was not made from: calibrate an alarm on them.")
    ] = None,
    false_alarms: Annotated[float, typer.Option(help="Share of clean texts that may raise the alarm.")] = 0.01,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file; by default audit.json in the folder.")
    ] = None,
    context: Context = 128,
    sequences: Sequences = 256,
    seed: Seed = 0,
) -> None:
    """Find where a graph disagrees with its model: the worst tokens, what they share, the parts that carry it."""
    with errors():
        from unweave.audit import AnomalyScore, search_inputs
        from unweave.audit import audit as run_audit
        from unweave.checks import alarm_facts, audit_facts
        from unweave.files import write_json
        from unweave.storage import finite, save_check

        graph, original, source, tokenizer = pair_of(folder, model)
        if clean is not None and clean in (data, source):
            raise InputError("an alarm is calibrated on other texts than those audited; --clean names the same")
        rows = load_rows(graph, source, data, tokenizer, context, sequences, held_out=True)
        tokens = words_of(graph, tokenizer)
        plain: dict[str, Any] = dict(audit_facts(run_audit(graph, original, rows, zoo_scope(source)), tokens))
        _print_audit(plain, tokens, top)
        if clean is not None:
            texts = load_rows(graph, source, clean, tokenizer, context, sequences)
            scorer = AnomalyScore.fit(graph, original, texts, zoo_scope(source), false_alarms=false_alarms)
            plain["anomaly"] = alarm_facts(scorer, rows)
            _print_alarm(plain["anomaly"])
        if search:
            hits = search_inputs(graph, original, rows, budget=search, seed=seed)
            plain["search"] = {"start_nats": hits.start_nats, "hits": [hit._asdict() for hit in hits.hits]}
            _print_hits(plain["search"], tokens, top)
        if triggers:
            plain["triggers"] = _search_triggers(graph, original, rows, triggers, seed, beside)
            used = {i for found in plain["triggers"] for run in found["runs"] for i in run["tokens"]}
            plain["words"] |= {str(i): tokens[i] for i in sorted(used)}
            _print_triggers(plain["triggers"], tokens, top)
        if output is not None:
            write_json(output, finite(plain))
        written = output or save_check(folder, "audit", plain)
        console.print(f"wrote {escape(str(written))}")


def _search_triggers(
    graph: Any, original: Any, rows: Any, budget: int, seed: int, beside: Path | None
) -> list[Mapping[str, Any]]:
    """Triggers anywhere and at the start, with half of the budget for each."""
    from unweave.audit import search_triggers
    from unweave.checks import triggers_facts
    from unweave.storage import load_graph

    others = () if beside is None else (load_graph(beside),)
    # a token that begins every text is no part of any
    fixed = int(bool((rows.tokens[:, 0] == rows.tokens[0, 0]).all()))
    options: dict[str, Any] = {"others": others, "budget": budget // 2, "seed": seed, "fixed": fixed}
    return [
        triggers_facts(search_triggers(graph, original, rows, at=at, **options), at) for at in ("anywhere", "start")
    ]


def _print_triggers(searches: Sequence[Mapping[str, Any]], tokens: list[str], top: int) -> None:
    """The pairs of tokens that a search found, by where they were put."""
    for found in searches:
        title = f"triggers, {found['at']}: {found['n_screened']:,} of {found['n_runs']:,} pairs tried"
        table = Table(title=title, title_justify="left")
        table.add_column("pair", overflow="fold")
        for name in ("nats per text beyond its tokens", "p"):
            table.add_column(name, justify="right")
        for run in found["runs"][:top]:
            excess = {"value": run["excess_nats"], "low": run["excess_nats_low"], "high": run["excess_nats_high"]}
            pair = " ".join(repr(tokens[i]) for i in run["tokens"])
            table.add_row(escape(pair), plain_interval(excess), number(run["p"], 2))
        console.print(table)


def _print_alarm(facts: Mapping[str, Any]) -> None:
    """The alarm that clean texts calibrated, in a sentence."""
    console.print(
        f"alarm above {number(facts['threshold'])} nats at a token ({facts['n_clean']:,} clean texts, at most "
        f"{facts['false_alarms']:.2g} false): {facts['alarms']:,} of {facts['n_texts']:,} texts raise it",
        highlight=False,
    )


def _print_audit(found: Mapping[str, Any], tokens: list[str], top: int) -> None:
    """The worst tokens, the clusters and the parts of an audit, from its tables."""

    def outputs(pairs: Any) -> str:
        return escape(" ".join(f"{tokens[i]!r} {value:+.2f}" for i, value in pairs[:3]))

    mean = f"{number(found['kl_nats'])} nats per token over {found['n_tokens']:,} tokens"
    table = Table(title=f"worst tokens ({mean})", title_justify="left")
    for name in ("nats", "sequence", "cluster", "context", "model says", "graph says"):
        table.add_column(name, justify="right" if name in ("nats", "sequence", "cluster") else "left", overflow="fold")
    for row in found["tokens"][:top]:
        text = "".join(tokens[i] for i in row["context"][-8:])
        where = (str(row["sequence"]), str(row["cluster"]))
        table.add_row(
            number(row["nats"]), *where, escape(text), *(escape(tokens[row[k]]) for k in ("model_says", "graph_says"))
        )
    console.print(table)
    table = Table(title="clusters", title_justify="left")
    for name in ("nats per token", "tokens", "model says more", "model says less", "contexts share"):
        table.add_column(name)
    for row in found["clusters"][:top]:
        shared = [f"{tokens[i]!r} {back} back {share:.0%}" for back, i, share in row["shared"] if share >= 0.5]
        table.add_row(
            number(row["mean_nats"]),
            str(row["n_tokens"]),
            outputs(row["raised"]),
            outputs(row["lowered"]),
            escape(", ".join(shared[:3])),
        )
    console.print(table)
    table = Table(title="parts: nats at the worst tokens that the model's value takes away", title_justify="left")
    for name in ("writer", "nats", "reader", "nats"):
        table.add_column(name)
    for a, b in zip(found["writers"][:top], found["readers"][:top], strict=False):
        table.add_row(*(cell for part in (a, b) for cell in (escape(part["name"]), number(part["restored_nats"]))))
    console.print(table)


def _print_hits(found: Mapping[str, Any], tokens: list[str], top: int) -> None:
    """The inputs that a search found."""
    table = Table(title=f"search (the data's worst: {number(found['start_nats'])} nats)", title_justify="left")
    table.add_column("nats", justify="right")
    table.add_column("up to there", overflow="fold")
    for hit in found["hits"][:top]:
        table.add_row(number(hit["nats"]), escape("".join(tokens[i] for i in hit["tokens"][: hit["position"] + 1])))
    console.print(table)
