"""What commands are given: a model or a folder, and data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from unweave.cli.application import stderr
from unweave.errors import InputError

if TYPE_CHECKING:
    from unweave.graph import Graph

__all__ = ["graph_of", "load_rows", "open_folder", "pair_of", "source_of", "token_kinds", "words_of", "zoo_scope"]


def source_of(graph: Graph) -> str:
    """Where the folder says its model is, if that is on this machine: folders from others do not start downloads."""
    source = str(graph.info.get("model") or "")
    if source and not source.startswith("zoo:") and not Path(source).is_dir():
        stderr.print(
            f"[yellow]the original {escape(source)} is not on this machine; unweave run takes it from --model[/]"
        )
        return ""
    return source


def open_folder(folder: str | Path, model: str | None = None) -> tuple[Graph, str, Any]:
    """(graph, where the original is or "", tokenizer or None) of a graph folder.

    Args:
        model: where the original is now, if it moved.
    """
    from unweave.capture import load_tokenizer
    from unweave.storage import load_graph

    graph = load_graph(folder)
    source = model or source_of(graph)
    return graph, source, load_tokenizer(source) if source else None


def graph_of(model: str) -> tuple[Graph, str, Any]:
    """(graph, where the model is, tokenizer) of a model or of a graph folder."""
    from unweave.capture import capture, load_tokenizer

    if (Path(model) / "graph.json").is_file():
        return open_folder(model)
    return capture(model), model, load_tokenizer(model)


def pair_of(folder: Path, model: str | None) -> tuple[Graph, Graph, str, Any]:
    """(graph, original, where that is, tokenizer) of a graph folder.

    Args:
        model: where the original is now, if it moved.

    Raises:
        InputError: the original is not where the folder says.
    """
    from unweave.capture import capture

    graph, source, tokenizer = open_folder(folder, model)
    if not source:
        raise InputError("this compares with the original model: say where it is with --model")
    return graph, capture(source, verify=False), source, tokenizer


def words_of(graph: Graph, tokenizer: Any) -> list[str]:
    """The text of every token id and output."""
    from unweave.pipeline import token_strings

    return token_strings(tokenizer, max(graph.info.get("d_vocab", 0), graph.info["d_out"]))


def token_kinds(by: Sequence[str], tokens: Sequence[str]) -> dict[str, str | set[int]]:
    """Kinds of tokens by name: of LABEL=REGEX the ids whose text matches, of LABEL alone the name of the data's label.

    Raises:
        InputError: written otherwise, a name twice, or an expression that is none or matches no token.
    """
    from unweave.scope import Quotient

    kinds: dict[str, str | set[int]] = {}
    for text in by:
        name, equals, pattern = text.partition("=")
        if not name or name in kinds or (equals and not pattern):
            raise InputError(f"a kind of token is written LABEL=REGEX, each label once, got {text!r}")
        if not equals:
            kinds[name] = name
            continue
        classes = Quotient.from_regex({name: pattern}, tokens).classes
        kinds[name] = set((classes == 0).nonzero()[:, 0].tolist())
    return kinds


def load_rows(
    graph: Graph, source: str, data: str | None, tokenizer: Any, context: int, limit: int, *, held_out: bool = False
) -> Any:
    """Sequences for a graph: of the given data, or of its zoo room; held out, others than a graph was made from."""
    from unweave.data import load_data

    if data is None and not source.startswith("zoo:"):
        raise InputError("give --data: a .txt, .jsonl, .npy or .safetensors file, a folder of them, or a hub data set")
    context = min(context, graph.info.get("n_ctx", context))
    name = data or source
    split = "validation" if held_out and name.startswith("zoo:") else "train"
    vocabulary = graph.info.get("d_vocab")
    return load_data(name, tokenizer, context=context, limit=limit, vocabulary=vocabulary, split=split)


def zoo_scope(source: str) -> Any:
    from unweave.scope import Scope

    return Scope(positions="answered") if source.startswith("zoo:") else None
