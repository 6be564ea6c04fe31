"""``unweave match``: which node of one network is which of another, whether edges map, and what a match can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import graph_of, load_rows, zoo_scope
from unweave.cli.options import Context, Data, Seed
from unweave.cli.tables import number, share, with_interval
from unweave.errors import InputError

__all__ = ["match", "print_matching"]

OTHER_WAYS = ("cka", "svcca", "procrustes")
LOSSES = ("nats", "control_nats", "mean_nats")
# margins below this are rounding
TIE = 1e-6
# share of all nodes' nats below which there is little that a stitch could do
LEAST_WORTH = 0.01
SHOWN_UNMATCHED = 3
Network = Annotated[str, typer.Argument(help="A model, or a folder made by 'unweave decompile'.")]


@app.command()
def match(
    a: Network,
    b: Network,
    data: Data = None,
    by: Annotated[
        str, typer.Option(help="behaviour, patterns (of heads), effects, cka, svcca or procrustes.")
    ] = "behaviour",
    one_to_one: Annotated[
        bool, typer.Option("--one-to-one/--nearest", help="Each node of B once, or for each of A the one most like it.")
    ] = True,
    nulls: Annotated[int, typer.Option(help="How many copies of B with shuffled weights to match A with.")] = 5,
    stitch: Annotated[int, typer.Option(help="Put so many of the best matches to work in A.")] = 3,
    top: Annotated[int, typer.Option(help="How many matches to print, most alike first.")] = 25,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all figures as JSON.")] = None,
    context: Context = 128,
    sequences: Annotated[int, typer.Option(help="How many sequences to compare on.")] = 32,
    held_out: Annotated[int, typer.Option(help="How many others to measure stitching on.")] = 16,
    seed: Seed = 0,
) -> None:
    """Match the nodes of A with those of B by what they do on the same texts; test it on edges and by stitching."""
    with errors():
        from unweave.files import write_json
        from unweave.storage import finite

        if min(nulls, stitch, top) < 0:
            raise InputError("--nulls, --stitch and --top must be at least 0")
        sides = graph_of(a), graph_of(b)
        rows, rows_b, scope = _same_texts(sides, data, context, sequences + held_out)
        train, test = rows.split(held_out=held_out, seed=seed)
        train_b = None if rows_b is None else rows_b.split(held_out=held_out, seed=seed)[0]
        graphs = sides[0][0], sides[1][0]
        options: dict[str, Any] = {"scope": scope, "one_to_one": one_to_one, "seed": seed}
        facts = _compared(graphs, train, train_b, by, nulls, options)
        # a node worth nothing has no work that another could do
        best = [pair for pair in facts["pairs"] if pair["worth_a"] >= LEAST_WORTH][:stitch]
        facts["stitched"] = [] if rows_b is not None else _stitched(graphs, best, train, test, scope, seed)
        said = {"a": a, "b": b, "data": rows.source, "by": by, "one_to_one": one_to_one, "seed": seed}
        counts = {"n_tokens": train.n_tokens, "n_held_out": test.n_tokens, "aligned_by_text": rows_b is not None}
        facts = finite(said | counts | facts)
        print_matching(facts, top)
        if output is not None:
            write_json(output, facts)
            console.print(f"wrote {escape(str(output))}")


def _compared(
    graphs: tuple[Any, Any], train: Any, train_b: Any, by: str, nulls: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The matches, most alike first, and how the other ways to compare see it."""
    from unweave.scoring import score_edges
    from unweave.universality import compare_edges
    from unweave.universality import match as match_nodes

    ways = {by: match_nodes(*graphs, train, train_b, by=by, nulls=nulls, edges=False, **options)}
    for way in OTHER_WAYS:
        if way != by:
            ways[way] = match_nodes(*graphs, train, train_b, by=way, edges=False, **options)
    scope, seed = options["scope"], options["seed"]
    of_a, of_b = (score_edges(g, d, scope, seed=seed) for g, d in zip(graphs, (train, train_b or train), strict=True))
    found = ways[by]
    worth_a, worth_b = (_worth(s, nodes) for s, nodes in ((of_a, found.nodes_a), (of_b, found.nodes_b)))
    pairs = [
        {**pair._asdict(), "p": found.p_of(pair), "worth_a": worth_a[pair.a], "worth_b": worth_b[pair.b]}
        for pair in sorted(found.pairs, key=lambda pair: -pair.similarity)
    ]
    compared = [
        {
            "by": way,
            "similarity": m.score,
            "p": m.p,
            "same_matches": sum(found.of.get(node) == target for node, target in m.of.items()),
            "n_matches": len(m.pairs),
            "edges": compare_edges(of_a, of_b, m.of, seed=seed)._asdict(),
        }
        for way, m in ways.items()
    ]
    return {"pairs": pairs, "unmatched": found.unmatched, "null": found.null, "ways": compared}


def _worth(scores: Any, nodes: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Of all nodes of these kinds, each one's share of what is written, in estimated nats."""
    nats = dict(zip(scores.graph.writers, scores.node_nats.tolist(), strict=True))
    own = {name: nats[name] for names in nodes.values() for name in names}
    total = sum(own.values()) or 1.0
    return {name: value / total for name, value in own.items()}


def _same_texts(
    sides: tuple[tuple[Any, str, Any], tuple[Any, str, Any]], data: str | None, context: int, n: int
) -> tuple[Any, Any, Any]:
    """(sequences for A; the same texts as B's tokens where those differ, else None; the scope)."""
    from unweave.universality import load_aligned

    (graph_a, source_a, tokenizer_a), (graph_b, source_b, tokenizer_b) = sides
    source = next((s for s in (source_a, source_b) if s.startswith("zoo:")), source_a)
    context_a, context_b = (min(context, g.info.get("n_ctx", context)) for g in (graph_a, graph_b))
    vocabularies = [None if t is None else t.get_vocab() for t in (tokenizer_a, tokenizer_b)]
    if vocabularies[0] == vocabularies[1]:
        kinds = [{k: g.info.get(k) for k in ("d_vocab", "d_input")} for g in (graph_a, graph_b)]
        if vocabularies[0] is None and kinds[0] != kinds[1]:
            raise InputError(f"A and B read different inputs and have no tokenizer to align them by: {kinds}")
        small = min((graph_a, graph_b), key=lambda g: g.info.get("d_vocab") or 0)
        rows = load_rows(small, source, data, tokenizer_a, min(context_a, context_b), n)
        return rows, None, zoo_scope(source)
    if tokenizer_a is None or tokenizer_b is None:
        raise InputError("only one of A and B has a tokenizer, so there is nothing to align their tokens by")
    if data is None:
        raise InputError("A and B have different tokenizers: give --data, a text that both can read")
    return (
        *load_aligned(data, tokenizer_a, tokenizer_b, context=context_a, context_b=context_b, limit=n),
        zoo_scope(source),
    )


def _stitched(
    graphs: tuple[Any, Any], pairs: Sequence[Any], train: Any, test: Any, scope: Any, seed: int
) -> list[dict[str, Any]]:
    """What A loses with each match at work in it, with another node of B, and with its own at the mean."""
    from unweave.progress import track
    from unweave.universality import stitch

    out = []
    for pair in track(pairs, "stitching"):
        found = stitch(graphs[0], pair["a"], graphs[1], pair["b"], train, test, scope, seed=seed, progress=False)
        losses = {
            "nats": found.loss.nats,
            "control_nats": None if found.control is None else found.control.nats,
            "mean_nats": found.loss.ablated_nats,
        }
        named = {"a": pair["a"], "b": pair["b"], "control": found.control_node, "n_numbers": found.n_numbers}
        out.append(named | {name: None if x is None else x._asdict() for name, x in losses.items()})
    return out


def print_matching(facts: Mapping[str, Any], top: int) -> None:
    """The matches, whether edges map, and stitching, from plain results."""
    how = "one to one" if facts["one_to_one"] else "each with the nearest"
    table = _table(f"nodes of A and B alike by {facts['by']}, {how}: {facts['n_tokens']:,} tokens", ("A", "B"))
    for name in ("alike", "margin", "p", "worth"):
        table.add_column(name, justify="right")
    for pair in facts["pairs"][:top]:
        margin = pair["margin"]
        tie = margin is not None and abs(margin) < TIE
        cells = (f"{pair['similarity']:.2f}", "tie" if tie else "–" if margin is None else f"{margin:.2f}")
        table.add_row(escape(pair["a"]), escape(pair["b"]), *cells, number(pair["p"], 2), share(pair["worth_a"]))
    console.print(table)
    if len(facts["pairs"]) > top:
        _say(f"{len(facts['pairs']) - top} more pairs, less alike")
    for side, names in zip("AB", facts["unmatched"], strict=True):
        if names:
            more = f" and {len(names) - SHOWN_UNMATCHED} more" if len(names) > SHOWN_UNMATCHED else ""
            _say(f"left over in {side}: {', '.join(names[:SHOWN_UNMATCHED])}{more}")
    _say("alike: 1 is the same; margin: over the next best (tie: one of several as good;")
    _say("below 0: another is more alike, but needed elsewhere);")
    _say("worth: of A's nodes' nats (estimated), the share of this one")
    if facts["null"]:
        _say("p: how often a node of that kind finds as good a match in B of shuffled weights")
    _print_ways(facts)
    if facts["stitched"]:
        _print_stitched(facts)
    elif facts["aligned_by_text"]:
        _say("no stitching: it needs the same tokens, and A and B have different tokenizers")


def _print_ways(facts: Mapping[str, Any]) -> None:
    table = _table("do edges between matches map, too? and by other ways to compare", ("by",))
    for name in ("alike", "p", "same matches", "edges", "permuted", "p of edges"):
        table.add_column(name, justify="right")
    for way in facts["ways"]:
        edges = way["edges"]
        same = f"{way['same_matches']} of {way['n_matches']}"
        figures = (number(edges["correlation"], 2), number(edges["permuted"], 2), number(edges["p"], 2))
        table.add_row(way["by"], number(way["similarity"], 2), number(way["p"], 2), same, *figures)
    console.print()
    console.print(table)
    n_edges = facts["ways"][0]["edges"]["n_edges"]
    _say(f"edges: rank correlation of the nats of {n_edges} edges in A and in B;")
    _say("permuted: matches shuffled within kinds; only what is above that counts")


def _print_stitched(facts: Mapping[str, Any]) -> None:
    table = _table(f"A with B's node in it: nats lost, {facts['n_held_out']:,} held-out tokens", ())
    table.add_column("A ← B", no_wrap=True)
    for name in ("match", "another", "mean"):
        table.add_column(name, justify="right")
    for row in facts["stitched"]:
        losses = ("–" if row[name] is None else with_interval(row[name]).replace(" ", "\n", 1) for name in LOSSES)
        table.add_row(escape(f"{row['a']}\n← {row['b']}"), *losses)
    console.print()
    console.print(table)
    _say("B's node works between linear maps fitted on other text, which can do part of it")
    _say("themselves: only what the match loses less than another of B speaks for it")
    _say("another: a random node of B; mean: A's own node at its mean, so without its work")


def _table(title: str, left: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    return table


def _say(text: str) -> None:
    console.print(f"[dim]{escape(text)}[/]", highlight=False)
