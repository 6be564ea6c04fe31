"""``unweave features``: dictionaries of one place at several sizes, beside bases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from unweave.cli.application import app, console, errors
from unweave.cli.inputs import graph_of, load_rows, words_of, zoo_scope
from unweave.cli.options import Context, Data, Seed
from unweave.cli.tables import number, plain_interval, share

__all__ = ["features", "print_features"]

WIDTHS = [128, 512, 2048]
WORDS_PRINTED = 10


@app.command()
def features(
    model: Annotated[str, typer.Argument(help="A model, or a folder made by 'unweave decompile'.")],
    node: Annotated[
        str, typer.Option("--node", "-n", help="blocks.0.mlp, blocks.0.attn, NODE.code or 'before NODE' (the stream).")
    ],
    data: Data = None,
    width: Annotated[
        list[int] | None, typer.Option("--width", "-w", help="Latents (the default: 128, 512 and 2048); repeatable.")
    ] = None,
    kind: Annotated[str, typer.Option(help="topk, batchtopk, jumprelu or relu.")] = "topk",
    k: Annotated[int, typer.Option(help="Active latents per token (topk, batchtopk).")] = 8,
    penalty: Annotated[float, typer.Option(help="Share of the variance that an active latent must be worth.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Steps of Adam.")] = 2000,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at its highest.")] = 3e-3,
    tokens: Annotated[int, typer.Option(help="Activations to train on, at most.")] = 200_000,
    describe: Annotated[bool, typer.Option(help="Describe every latent in words, with scores.")] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("features"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is this command's.")] = False,
    context: Context = 128,
    sequences: Annotated[int, typer.Option(help="How many sequences to read; those held out are of them.")] = 2048,
    held_out: Annotated[int, typer.Option(help="How many sequences to measure on.")] = 64,
    seed: Seed = 0,
) -> None:
    """Train dictionaries of what NODE writes, hold them against bases, and write them as SAELens reads them."""
    with errors():
        from unweave.features import Recipe, check_survey_destination, find_site, survey_features

        check_survey_destination(output, overwrite)
        graph, source, tokenizer = graph_of(model)
        site = find_site(graph, node)
        own = {"k": k} if kind in ("topk", "batchtopk") else {"penalty": penalty}
        options: dict[str, Any] = {"kind": kind, "steps": steps, "learning_rate": learning_rate, "seed": seed, **own}
        recipes = {f"{kind}-{w}": Recipe(w, **options) for w in sorted(set(width or WIDTHS))}
        rows = load_rows(graph, source, data, tokenizer, context, sequences)
        train, test = rows.split(held_out=held_out, seed=seed)
        in_words = describe and site.kind != "stream" and graph.info.get("d_vocab") is not None
        found = survey_features(
            graph,
            node,
            train,
            test,
            recipes,
            scope=zoo_scope(source),
            tokens=tokens,
            describe_all=in_words,
            token_strings=words_of(graph, tokenizer) if in_words else None,
            seed=seed,
        )
        provenance = {"model": model, "data": rows.source, "recipes": {n: vars(r) for n, r in recipes.items()}}
        found.save(output, model_name=source or model, more={"provenance": provenance})
        print_features(found.facts())
        console.print(f"\nwrote [bold]{escape(str(output))}/[/]: {', '.join(recipes)}, features.json")


def print_features(facts: Mapping[str, Any]) -> None:
    """The table of one place, and the latents whose words score best, from plain results."""
    n = facts["rows"][0]["n_tokens"]
    table = Table(title=f"{escape(facts['where'])}: {n:,} held-out tokens", title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("latents", "loss recovered", "variance", "L0", "dead", "kurtosis", "words"):
        table.add_column(name, justify="right")
    for row in facts["rows"]:
        recovered = plain_interval(row["loss_recovered"], percent=True)
        if row["loss_recovered"]["value"] is None:  # no next token: the same from the divergence
            recovered = plain_interval(row["kl_recovered"], percent=True)
        cells = (share(row["variance_explained"]), number(row["l0"]), share(row["dead"]), number(row["kurtosis"]))
        words = number(row.get("description_score"), 2)
        table.add_row(escape(row["name"]), f"{row['n_latents']:,}", recovered, *cells, words)
    console.print(table)
    console.print(_privilege(facts["privilege"]), highlight=False, soft_wrap=True)
    for pair in facts["splitting"]:
        text = f"{share(pair['recovered'])} of {pair['small']} are in {pair['large']} too, {share(pair['split'])} split"
        console.print(f"{text}; {share(pair['new'])} of the larger are new", highlight=False, soft_wrap=True)
    for name, rows in facts["words"].items():
        if "-" in name and "random" not in name and rows:
            console.print(f"\n[bold]{escape(name)}[/]: the words that score best (held-out R²)")
            for row in rows[:WORDS_PRINTED]:
                console.print(f"  {row['direction']:>5}  {row['score']:.2f}  {escape(row['label'])}", soft_wrap=True)


def _privilege(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "a single number: no basis to speak of"
    beside = f"{number(found['rotated_mean'])} ± {number(found['rotated_std'], 2)} of random rotations"
    return f"kurtosis of the coordinates: {number(found['kurtosis'])}, {beside} (z = {number(found['z'], 2)})"
