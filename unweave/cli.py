"""The command line: one command per verb. Heavy imports happen inside commands, so that --help is instant."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unweave import __version__
from unweave.errors import UnweaveError

if TYPE_CHECKING:
    from unweave.graph import Graph

__all__ = ["app", "main"]

app = typer.Typer(
    name="unweave",
    help="Decompile a neural network into a graph that a person can read, run and falsify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
stderr = Console(stderr=True)
_debug = False

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


@app.callback(invoke_without_command=True)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Options of every command."""
    global _debug
    _debug = debug
    if version:
        console.print(f"unweave {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors of ours in one line; a traceback only with --debug."""
    try:
        yield
    except UnweaveError as error:
        if _debug:
            raise
        stderr.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stderr.print("interrupted; nothing was written over")
        raise typer.Exit(130) from None


@app.command()
def decompile(
    model: Model,
    data: Data = None,
    kl_nats: Annotated[float | None, typer.Option(help="Nats per token to allow (the default: 0.05).")] = None,
    size: Annotated[float | None, typer.Option(help="Share of the channels' numbers to keep, instead.")] = None,
    form: Annotated[str, typer.Option(help="low-rank (narrow channels) or sparse (single weights).")] = "low-rank",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("graph"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is a graph's.")] = False,
    context: Context = 128,
    sequences: Sequences = 128,
    held_out: Annotated[int, typer.Option(help="How many sequences to test on.")] = 64,
    refine: Annotated[int, typer.Option(help="KL training steps after the closed form.")] = 0,
    measure: Annotated[int, typer.Option(help="How many of the largest edges to measure exactly.")] = 50,
    classes: Annotated[
        str | None, typer.Option(help="Regular expression: explain only whether the next token matches.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Decompile MODEL into an executable, compressed graph; write it with a report to a folder."""
    with _errors():
        from unweave.capture import load_tokenizer
        from unweave.pipeline import decompile as run_pipeline
        from unweave.report import write_report
        from unweave.storage import check_destination

        check_destination(output, overwrite)
        scope = _class_scope(model, classes, load_tokenizer(model)) if classes else None
        result = run_pipeline(
            model,
            data,
            size=size,
            kl_nats=kl_nats,
            form=form,
            scope=scope,
            context=context,
            sequences=sequences,
            held_out=held_out,
            refine_steps=refine,
            measure_top=measure,
            seed=seed,
        )
        result.report["provenance"]["command"] = " ".join(["unweave", *map(shlex.quote, sys.argv[1:])])
        result.save(output, overwrite=overwrite)
        write_report(result.report, output / "report.html")
        _print_summary(result.report)
        console.print(
            f"\nwrote [bold]{escape(str(output))}/[/]: graph.json, weights.safetensors, results.json, report.html"
        )


def _class_scope(model: str, pattern: str, tokenizer: Any) -> Any:
    from unweave.capture import capture
    from unweave.pipeline import token_strings
    from unweave.scope import Quotient, Scope

    tokens = token_strings(tokenizer, capture(model, verify=False).info["d_out"])
    return Scope(quotient=Quotient.from_regex(pattern, tokens), description=f"whether the next token matches {pattern}")


@app.command()
def circuit(
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="A ready-made task (see --list), or a .jsonl file.")] = "",
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
    prompts: Annotated[int, typer.Option(help="How many prompts to make; half of them are for the proof.")] = 128,
    list_: Annotated[bool, typer.Option("--list", help="List the ready-made tasks and stop.")] = False,
    seed: Seed = 0,
) -> None:
    """Find the part of MODEL that does a task, prove it on other prompts, and write it to a folder."""
    with _errors():
        from unweave.dissection import dissect
        from unweave.errors import InputError
        from unweave.report import write_report
        from unweave.storage import check_destination
        from unweave.tasks import list_tasks

        if list_:
            for name, text in list_tasks().items():
                console.print(f"[bold]{escape(name)}[/]: {escape(text)}")
            return
        if not task:
            raise InputError(f"give --task: a .jsonl file, or one of {', '.join(list_tasks())}")
        check_destination(output, overwrite)
        budget = {"edges": edges, "kl_nats": kl_nats, "faithfulness": faithfulness}
        options = {"ablation": ablation, "metric": metric, "level": level, "positions": positions, "frozen": frozen}
        found = dissect(model, task, prompts=prompts, seed=seed, **budget, **options)  # type: ignore[arg-type]
        found.report["provenance"]["command"] = " ".join(["unweave", *map(shlex.quote, sys.argv[1:])])
        found.save(output, overwrite=overwrite)
        write_report(found.report, output / "report.html")
        _print_circuit(found.report)
        console.print(f"\nwrote [bold]{escape(str(output))}/[/]: the circuit as a graph, results.json, report.html")


@app.command()
def modules(
    model: Annotated[str, typer.Argument(help="A model, or a folder made by 'unweave decompile'.")],
    data: Data = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("modules"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is a graph's.")] = False,
    blocks: Annotated[
        int | None, typer.Option(help="Measure the partition into so many blocks, not the one chosen.")
    ] = None,
    neurons: Annotated[
        str, typer.Option(help="MLPs in groups that are alike (auto), whole, single neurons, or so many groups.")
    ] = "auto",
    nulls: Annotated[
        str, typer.Option(help="Networks without modules to hold against: rewired, shuffled, reinitialised; by commas.")
    ] = "rewired",
    n_null: Annotated[int, typer.Option(help="How many rewired ones.")] = 50,
    n_random: Annotated[int, typer.Option(help="Random sets of nodes that each module is held against.")] = 20,
    context: Context = 128,
    sequences: Annotated[
        int | None, typer.Option(help="How many sequences to find modules on (the default: 64, or 1,024 answers).")
    ] = None,
    held_out: Annotated[int, typer.Option(help="How many sequences to measure effects on.")] = 32,
    seed: Seed = 0,
) -> None:
    """Group MODEL into modules, held against nulls; measure what each does and what crosses between them."""
    with _errors():
        from unweave.modularisation import modularise
        from unweave.report import write_report
        from unweave.storage import check_destination

        check_destination(output, overwrite)
        found = modularise(
            model,
            data,
            blocks=blocks,
            neurons=int(neurons) if neurons.isdecimal() else neurons,
            nulls=tuple(null.strip() for null in nulls.split(",") if null.strip()),
            n_null=n_null,
            n_random=n_random,
            context=context,
            sequences=sequences,
            held_out=held_out,
            seed=seed,
        )
        found.report["provenance"]["command"] = " ".join(["unweave", *map(shlex.quote, sys.argv[1:])])
        found.save(output, overwrite=overwrite)
        write_report(found.report, output / "report.html")
        _print_modules(found.report)
        console.print(f"\nwrote [bold]{escape(str(output))}/[/]: the grouped graph, results.json, report.html")


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
    """Edit MODEL, save it, and compare what its compressed graph predicted with what the edit did."""
    with _errors():
        from unweave.capture import capture, load_model, load_tokenizer
        from unweave.compression import compress
        from unweave.errors import InputError
        from unweave.falsification import predict_edit, read_edit, save_edited

        tokenizer = load_tokenizer(model)
        change = read_edit(remove or (), scale or (), swap, tokenizer)
        original = load_model(model)
        graph = capture(original)
        change.apply_to_graph(graph)  # refused before anything is computed
        if data is not None or model.startswith("zoo:"):
            rows = _load(graph, model, data, tokenizer, context, sequences + held_out)
            if len(rows) <= held_out:
                raise InputError(f"{len(rows)} sequences are too few to calibrate and hold {held_out} out")
            calibration, held = rows.split(held_out=held_out, seed=seed)
            scope = _zoo_scope(model)
            small = compress(graph, calibration, scope, size=size, form=form, seed=seed)
            predicted = predict_edit(small, change, held, scope).loss_nats
            measured = predict_edit(graph, change, held, scope).loss_nats
            console.print(f"change in loss, nats per token: predicted {predicted:+.4f}, measured {measured:+.4f}")
        save_edited(change, original, output, tokenizer)
        console.print(f"wrote {escape(str(output))}")


@app.command()
def show(
    folder: Folder,
    edges: Annotated[int, typer.Option(help="How many of the strongest edges to list.")] = 15,
) -> None:
    """Print a graph: its nodes, how far it is from the model, and its strongest edges."""
    with _errors():
        from unweave.storage import load_graph, load_results

        graph = load_graph(folder)
        console.print(escape(str(graph)), highlight=False)
        results = load_results(folder)
        if results.get("modules"):
            _print_modules(results)
        elif results.get("proof"):
            _print_circuit(results, edges)
        elif results:
            _print_summary(results, edges)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="A model, or a folder made by 'unweave decompile'.")],
    data: Data = None,
    method: Annotated[str, typer.Option(help="fisher, eap, eap-ig or exact.")] = "fisher",
    samples: Annotated[int, typer.Option(help="Cotangents per sequence (fisher).")] = 2,
    steps: Annotated[int, typer.Option(help="Integration steps (eap-ig).")] = 5,
    frozen: Frozen = "none",
    measure: Annotated[int, typer.Option(help="How many of the largest edges to measure exactly.")] = 0,
    top: Annotated[int, typer.Option(help="How many edges to print.")] = 25,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all scores as JSON.")] = None,
    context: Context = 128,
    sequences: Sequences = 64,
    seed: Seed = 0,
) -> None:
    """Score every edge of a model or graph, in nats per token."""
    with _errors():
        from unweave.files import write_json
        from unweave.scoring import score_edges
        from unweave.storage import finite

        graph, source, tokenizer = _graph_of(model)
        rows = _load(graph, source, data, tokenizer, context, sequences)
        scope = _zoo_scope(source)
        options: dict[str, Any] = {"method": method, "samples": samples, "steps": steps, "measure_top": measure}
        scores = score_edges(graph, rows, scope, seed=seed, frozen=frozen, **options)
        held = "nothing frozen" if frozen == "none" else f"{frozen} frozen"
        console.print(_edge_table(scores.table(top), f"{graph.n_edges} edges, {method}, {held}"))
        if output is not None:
            write_json(output, finite({"method": method, "frozen": frozen, "edges": scores.table()}))
            console.print(f"wrote {escape(str(output))}")


@app.command()
def audit(
    folder: Folder,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="Where the original is now, if it moved.")] = None,
    top: Annotated[int, typer.Option(help="How many rows of each table to print.")] = 8,
    search: Annotated[int, typer.Option(help="Also search worse inputs, running so many; 0 for none.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything as JSON.")] = None,
    context: Context = 128,
    sequences: Sequences = 256,
    seed: Seed = 0,
) -> None:
    """Find where a graph disagrees with its model: the worst tokens, what they share, the parts that carry it."""
    with _errors():
        from unweave.audit import audit as run_audit
        from unweave.audit import search_inputs
        from unweave.capture import capture, load_tokenizer
        from unweave.errors import InputError
        from unweave.files import write_json
        from unweave.pipeline import token_strings
        from unweave.storage import finite, load_graph

        graph = load_graph(folder)
        source = model or _source(graph)
        if not source:
            raise InputError("an audit compares with the original model: say where it is with --model")
        original, tokenizer = capture(source, verify=False), load_tokenizer(source)
        rows = _load(graph, source, data, tokenizer, context, sequences)
        found = run_audit(graph, original, rows, _zoo_scope(source))
        plain = found.tables()
        tokens = token_strings(tokenizer, max(graph.info.get("d_vocab", 0), graph.info["d_out"]))
        _print_audit(plain, tokens, top)
        if search:
            hits = search_inputs(graph, original, rows, budget=search, seed=seed)
            plain["search"] = {"start_nats": hits.start_nats, "hits": [hit._asdict() for hit in hits.hits]}
            _print_hits(plain["search"], tokens, top)
        if output is not None:
            write_json(output, finite(plain))
            console.print(f"wrote {escape(str(output))}")


@app.command()
def report(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; by default report.html in the folder.")
    ] = None,
) -> None:
    """Write a graph's report as one self-contained HTML file."""
    with _errors():
        from unweave.errors import StorageError
        from unweave.report import write_report
        from unweave.storage import load_results

        results = load_results(folder)
        if not results:
            raise StorageError(f"{folder} has no results.json; make the folder with 'unweave decompile'")
        path = output or folder / "report.html"
        write_report(results, path)
        console.print(f"wrote {escape(str(path))}")


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
    with _errors():
        from unweave.capture import capture, load_tokenizer
        from unweave.generation import encode_prompt, generate
        from unweave.storage import load_graph

        graph = load_graph(folder)
        source = model or _source(graph)
        tokenizer = load_tokenizer(source) if source else None
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


@app.command()
def serve(
    folder: Folder,
    with_: Annotated[
        str | None, typer.Option("--with", help="A second graph folder, or a model: the same texts through both.")
    ] = None,
    data: Data = None,
    model: Annotated[str | None, typer.Option(help="Where the original is now, for its tokenizer.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default, only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8765,
    context: Context = 128,
    sequences: Sequences = 128,
) -> None:
    """Serve a live page on a graph: a text, what is used on each token, and what changes when a part is ablated."""
    with _errors():
        from unweave.capture import load_tokenizer
        from unweave.serving import serve as run_server
        from unweave.storage import load_graph

        graph = load_graph(folder)
        source = model or _source(graph)
        tokenizer = load_tokenizer(source) if source else None
        examples = None
        if data is not None or source.startswith("zoo:"):
            examples = _load(graph, source, data, tokenizer, context, sequences)
        if host not in ("127.0.0.1", "localhost", "::1"):
            stderr.print("[yellow]others can reach this page, read the graph and use this machine's processor[/]")
        console.print(f"serving {escape(str(folder))} on http://{escape(host)}:{port}/ (Ctrl-C stops it)")
        run_server(folder, host, port, with_, tokenizer=tokenizer, data=examples)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)


def _source(graph: Graph) -> str:
    """Where the folder says its model is, if that is on this machine: folders from others do not start downloads."""
    source = str(graph.info.get("model") or "")
    if source and not source.startswith("zoo:") and not Path(source).is_dir():
        stderr.print(
            f"[yellow]the original {escape(source)} is not on this machine; unweave run takes it from --model[/]"
        )
        return ""
    return source


def _graph_of(model: str) -> tuple[Graph, str, Any]:
    """(graph, where the model is, tokenizer) of a model or of a graph folder."""
    from unweave.capture import capture, load_tokenizer
    from unweave.storage import load_graph

    if (Path(model) / "graph.json").is_file():
        graph = load_graph(model)
        source = _source(graph)
        return graph, source, load_tokenizer(source) if source else None
    return capture(model), model, load_tokenizer(model)


def _load(graph: Graph, source: str, data: str | None, tokenizer: Any, context: int, limit: int) -> Any:
    from unweave.data import load_data
    from unweave.errors import InputError

    if data is None and not source.startswith("zoo:"):
        raise InputError("give --data: a .txt, .jsonl, .npy or .safetensors file, a folder of them, or a hub data set")
    context = min(context, graph.info.get("n_ctx", context))
    return load_data(data or source, tokenizer, context=context, limit=limit, vocabulary=graph.info.get("d_vocab"))


def _zoo_scope(source: str) -> Any:
    from unweave.scope import Scope

    return Scope(positions="answered") if source.startswith("zoo:") else None


# ---- tables ---------------------------------------------------------------------------------------------


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1%}"


def _with_interval(value: Mapping[str, Any]) -> str:
    if value["value"] is None or value["value"] != value["value"]:
        return "–"
    digits = 2 if value["value"] >= 1e-3 else 1
    return f"{_number(value['value'], 2)} [dim]{_number(value['low'], digits)}–{_number(value['high'], digits)}[/]"


def _print_summary(results: Mapping[str, Any], edges: int = 8) -> None:
    """The faithfulness table and the strongest edges, from plain results."""
    table = Table(title=f"{escape(results['title'])}: held-out faithfulness", title_justify="left")
    table.add_column("", no_wrap=True, max_width=26)
    for name in ("size", "KL, nats/token", "top-1", "99.9%"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["faithfulness"]:
        bold = "[bold]" if row["name"] == "decompiled graph" else ""
        table.add_row(
            f"{bold}{escape(row['name'])}",
            f"{row['size']:.0%}" if row.get("size") is not None else "–",
            _with_interval(row["kl_nats"]),
            _share(row["top1_agreement"]["value"]),
            _number(row["kl_p999"], 2),
        )
    console.print(table)
    if edges and results.get("edges"):
        console.print(_edge_table(_named_edges(results, results["edges"][:edges]), "strongest edges"))


def _print_circuit(results: Mapping[str, Any], edges: int = 20) -> None:
    """A circuit's proof and its edges, from plain results."""
    table = Table(title=f"{escape(results['title'])}: proof on held-out prompts", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    for row in results["proof"]:
        table.add_row(escape(row["what"]), _with_interval(row) if row["low"] is not None else _number(row["value"]))
    console.print(table)
    kept = [e for e in results["edges"] if e["kept"]]
    console.print(_edge_table(_named_edges(results, kept[:edges]), f"{len(kept)} edges, with their own effect"))


MODULES_PRINTED, INTERFACES_PRINTED = 24, 12


def _print_modules(results: Mapping[str, Any]) -> None:
    """What a search for modules found, from plain results."""
    facts = results["modules"]
    console.print(_verdict(facts), soft_wrap=True, highlight=False)
    if facts["measured"] is not None:
        console.print(_module_table(results))
        console.print(_interface_table(facts))
    table = Table(title="against networks without modules", title_justify="left")
    for name in ("null", "statistic", "value", "there", "z", "p"):
        table.add_column(name, justify="left" if name == "statistic" else "right", no_wrap=True)
    for t in facts["tests"]:
        there = f"{_number(t['null_mean'])} ± {_number(t['null_sd'], 2)}"
        name = t["statistic"].replace("_", " ")
        table.add_row(t["null"], name, _number(t["value"]), there, _number(t["z"]), _number(t["p"], 2))
    console.print(table)


def _verdict(facts: Mapping[str, Any]) -> str:
    """Whether there are modules, in a sentence."""
    bits = [partition["bits"] for partition in facts["hierarchy"]]
    idle = len(facts.get("idle", ()))
    n_blocks = [max(partition["labels"]) + (0 if idle else 1) for partition in facts["hierarchy"]]
    chosen, measured = facts["chosen"], facts["measured"]
    p = max((t["p"] for t in facts["tests"] if t["statistic"] == "saved_bits"), default=None)
    alone = n_blocks[chosen] in (1, len(facts["hierarchy"][0]["labels"]) - idle)
    if alone:
        text = "[bold]No modules are significant[/]: no partition describes the communication in fewer bits than none"
    elif facts["significant"]:
        text = f"[bold]{n_blocks[chosen]} modules[/] save {bits[0] - bits[chosen]:.1f} bits"
    else:
        text = f"[bold]No modules are significant[/]: {n_blocks[chosen]} blocks save {bits[0] - bits[chosen]:.1f} bits"
    text += f" (p = {_number(p, 2)})." if p is not None else "; nothing was held against a null."
    if measured is not None and measured != chosen:
        more = bits[measured] - bits[chosen]
        text += f" Measured below: {n_blocks[measured]} blocks, {more:.1f} bits more than the choice; not modules."
    return text + (f" {idle} nodes say and hear nothing: 'idle' below." if idle else "")


def _module_table(results: Mapping[str, Any]) -> Table:
    """Blocks of the measured partition: nodes, what they hear and send, and their own effect."""
    facts, names = results["modules"], [node["name"] for node in results["nodes"]]
    partition = facts["hierarchy"][facts["measured"]]
    effects = {row["blocks"][0]: row for row in facts["effects"] if len(row["blocks"]) == 1}
    table = Table(title="blocks, nats per token; effect measured on held-out data", title_justify="left")
    table.add_column("block", no_wrap=True)
    table.add_column("nodes", overflow="fold")
    for name in ("inside", "in", "out", "effect", "percentile"):
        table.add_column(name, justify="right", no_wrap=name not in ("effect", "percentile"))
    for b in range(min(MODULES_PRINTED, len(partition["inside"]))):
        members = [name for name, label in zip(names, partition["labels"], strict=True) if label == b]
        told = (_number(partition[key][b]) for key in ("inside", "heard", "sent"))
        row = effects.get(b)
        own = ("–", "–") if row is None else (_with_interval(row["nats"]), _percentile(row))
        text = f"{len(members)}: {_short(members[0])}" + (f" … {_short(members[-1])}" if len(members) > 1 else "")
        table.add_row("idle" if b == _idle_block(facts) else f"module.{b}", escape(text), *told, *own)
    if len(partition["inside"]) > MODULES_PRINTED:
        table.add_row("…", f"{len(partition['inside']) - MODULES_PRINTED} more blocks", *["…"] * 5)
    return table


def _idle_block(facts: Mapping[str, Any]) -> int:
    """The block of the nodes that say and hear nothing, in the partition measured; -1 if there are none."""
    return facts["hierarchy"][facts["measured"]]["labels"][facts["idle"][0]] if facts.get("idle") else -1


def _short(node: str) -> str:
    """As on the page: 3.h5 and 3.mlp."""
    return re.sub(
        r"^blocks\.(\d+)\.(?:attn\.head\.(?=\d)|(?=mlp))", lambda m: f"{m[1]}." + "h" * ("head" in m[0]), node
    )


def _percentile(row: Mapping[str, Any]) -> str:
    """Among random sets of nodes; a block that fills its stages has no other set like it."""
    return "–" if not row["n_random"] else f"{row['percentile']:.0f}"


def _interface_table(facts: Mapping[str, Any]) -> Table:
    title = "interfaces: nats per token and dimensions that keep 95%, estimated and measured on held-out data"
    table = Table(title=title, title_justify="left")
    table.add_column("interface", no_wrap=True)
    for name in ("edges", "nats", "measured", "dimensions", "measured"):
        table.add_column(name, justify="right")
    idle = _idle_block(facts)
    rows = [row for row in facts["interfaces"] if idle not in (row["src"], row["dst"])]
    for row in rows[:INTERFACES_PRINTED]:
        dimensions = ("–" if row[key] is None else str(row[key]) for key in ("dimensions", "measured_dimensions"))
        measured = "–" if row["measured"] is None else _with_interval(row["measured"])
        name = f"module.{row['src']} → module.{row['dst']}"
        table.add_row(name, str(row["edges"]), _number(row["nats"]), measured, *dimensions)
    return table


def _print_audit(found: Mapping[str, Any], tokens: list[str], top: int) -> None:
    """The worst tokens, the clusters and the parts of an audit, from its tables."""

    def outputs(pairs: Any) -> str:
        return escape(" ".join(f"{tokens[i]!r} {value:+.2f}" for i, value in pairs[:3]))

    mean = f"{_number(found['kl_nats'])} nats per token over {found['n_tokens']:,} tokens"
    table = Table(title=f"worst tokens ({mean})", title_justify="left")
    for name in ("nats", "sequence", "cluster", "context", "model says", "graph says"):
        table.add_column(name, justify="right" if name in ("nats", "sequence", "cluster") else "left", overflow="fold")
    for row in found["tokens"][:top]:
        text = "".join(tokens[i] for i in row["context"][-8:])
        where = (str(row["sequence"]), str(row["cluster"]))
        table.add_row(
            _number(row["nats"]), *where, escape(text), *(escape(tokens[row[k]]) for k in ("model_says", "graph_says"))
        )
    console.print(table)
    table = Table(title="clusters", title_justify="left")
    for name in ("nats per token", "tokens", "model says more", "model says less", "contexts share"):
        table.add_column(name)
    for row in found["clusters"][:top]:
        shared = [f"{tokens[i]!r} {back} back {share:.0%}" for back, i, share in row["shared"] if share >= 0.5]
        table.add_row(
            _number(row["mean_nats"]),
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
        table.add_row(*(cell for part in (a, b) for cell in (escape(part["name"]), _number(part["restored_nats"]))))
    console.print(table)


def _print_hits(found: Mapping[str, Any], tokens: list[str], top: int) -> None:
    """The inputs that a search found."""
    table = Table(title=f"search (the data's worst: {_number(found['start_nats'])} nats)", title_justify="left")
    table.add_column("nats", justify="right")
    table.add_column("up to there", overflow="fold")
    for hit in found["hits"][:top]:
        table.add_row(_number(hit["nats"]), escape("".join(tokens[i] for i in hit["tokens"][: hit["position"] + 1])))
    console.print(table)


def _named_edges(results: Mapping[str, Any], edges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = [node["name"] for node in results["nodes"]]
    return [
        {"edge": f"{names[e['src']]}->{names[e['dst']]}.{e['port']}"} | {k: e[k] for k in ("nats", "se", "measured")}
        for e in edges
    ]


def _edge_table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=f"{escape(title)}, nats per token", title_justify="left")
    table.add_column("edge", overflow="fold", min_width=44)
    table.add_column("nats", justify="right")
    table.add_column("± se", justify="right")
    table.add_column("")
    for row in rows:
        kind = "measured" if row["measured"] else "estimated"
        table.add_row(escape(row["edge"]), _number(row["nats"]), _number(row["se"], 2), f"[dim]{kind}[/]")
    return table


def main() -> None:
    """The entry point of the ``unweave`` command."""
    try:
        app()
    except UnweaveError as error:  # only with --debug, which asked for the traceback
        stderr.print_exception()
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
