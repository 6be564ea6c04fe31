"""Transformers compiled from RASP programs by tracr: every edge that matters is known.

Source: Lindner et al. 2023, "Tracr: Compiled Transformers as a Laboratory for Interpretability".
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import CorruptFileError, InputError, StorageError
from unweave.files import read_json, read_tensors
from unweave.graph import Edge
from unweave.zoo.toy import ToyConfig, ToyTransformer, from_weights

__all__ = ["load_tracr", "tracr_examples", "true_edges"]

SETTINGS = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "activation", "causal", "name")


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "residual_labels" not in config:
        raise CorruptFileError(f"{folder}/config.json is not that of a compiled tracr model")
    if config.get("layer_norm"):
        raise CorruptFileError(f"{folder}: tracr models with layer norm are not supported; compile it without")
    if not isinstance(config.get("tokens"), list) or not isinstance(config.get("outputs"), list | None):
        raise CorruptFileError(f"{folder}/config.json: tokens must be a list, and outputs a list or null")
    return config


def load_tracr(folder: str | Path) -> ToyTransformer:
    """A compiled model as a :class:`ToyTransformer`: bidirectional, no norm, a table of positions.

    The scores' scale is 1 / sqrt(d_head); the readout has no bias (zeros here); a numeric output is one column.

    Raises:
        StorageError: a file is missing or cannot be read.
        CorruptFileError: a setting or weight is missing, or they do not fit each other.
        NonFiniteError: a weight is NaN or infinite.
    """
    folder = Path(folder)
    config = _config(folder)
    weights, _ = read_tensors(folder / "model.safetensors")
    try:
        settings = ToyConfig(
            **{name: config[name] for name in SETTINGS},
            d_vocab=weights["token_embed"].shape[0],
            d_out=weights["unembed"].shape[1],
            n_ctx=weights["pos_embed"].shape[0],
        )
    except (KeyError, IndexError, TypeError, InputError) as error:
        raise CorruptFileError(f"{folder}: a setting or weight is missing or wrong: {error}") from error
    ours = {_our_name(name): tensor for name, tensor in weights.items()}
    _check_tokens(folder, config, settings)
    return from_weights(settings, {**ours, "b_U": torch.zeros(settings.d_out)}, str(folder))


def _check_tokens(folder: Path, config: dict[str, Any], settings: ToyConfig) -> None:
    if len(config["tokens"]) != settings.d_vocab:
        raise CorruptFileError(f"{folder}: {len(config['tokens'])} tokens, but {settings.d_vocab} rows in token_embed")
    if len(config["outputs"] or [""]) != settings.d_out:
        raise CorruptFileError(f"{folder}: {len(config['outputs'])} outputs, but {settings.d_out} columns in unembed")


def _our_name(name: str) -> str:
    """Our name for a weight of the compiler's file (a name it never writes stays, and is refused later)."""
    plain = {"token_embed": "W_E", "pos_embed": "W_pos", "unembed": "W_U"}
    if name in plain:
        return plain[name]
    match = re.fullmatch(r"layers\.(\d+)\.(attn|mlp)\.(q|k|v|o|in|out)\.(weight|bias)", name)
    if match is None:
        return name
    layer, _, part, kind = match.groups()
    return f"blocks.{layer}.{'W' if kind == 'weight' else 'b'}_{part.upper() if part in 'qkvo' else part}"


def tracr_examples(
    folder: str | Path,
) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"], Float[Tensor, "n pos"]]:
    """(tokens, mask, outputs) of the examples, padded at the right.

    ``outputs`` is the compiled model's answer at each position: a number, or for words its index in the config's
    "outputs" (what argmax of the logits gives); NaN where it has none (BOS, padding).

    Raises:
        StorageError: a file is missing.
        CorruptFileError: an example is broken, or has a token or output that the config does not list.
    """
    folder = Path(folder)
    config = _config(folder)
    index = {str(token): i for i, token in enumerate(config["tokens"])}
    words = {str(word): float(i) for i, word in enumerate(config["outputs"] or ())}
    rows = [_example(folder, number, line, index, words) for number, line in enumerate(_lines(folder), 1)]
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    outputs = torch.full((len(rows), longest), torch.nan)
    for i, (ids, values) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = True
        outputs[i, : len(ids)] = torch.tensor(values)
    return tokens, mask, outputs


def _lines(folder: Path) -> list[str]:
    path = folder / "examples.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8: {error}") from error
    if not lines:
        raise CorruptFileError(f"{path} holds no examples")
    return lines


def _example(
    folder: Path, number: int, line: str, index: dict[str, int], words: dict[str, float]
) -> tuple[list[int], list[float]]:
    """Token ids and outputs of one line."""
    try:
        row = json.loads(line)
        ids = [index[str(token)] for token in row["input"]]
        values = [math.nan if v is None else words[str(v)] if words else float(v) for v in row["output"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder}/examples.jsonl, line {number}: not a usable example: {error!r}") from error
    if not ids or len(ids) != len(values):
        raise CorruptFileError(
            f"{folder}/examples.jsonl, line {number}: {len(ids)} tokens, {len(values)} outputs; want as many"
        )
    return ids, values


def true_edges(folder: str | Path) -> tuple[Edge, ...]:
    """The edges the compiler made, by unweave's names.

    Raises:
        CorruptFileError: the config lists none, or one that cannot be read.
    """
    folder = Path(folder)
    try:
        triples = [(str(src), str(dst), str(port)) for src, dst, port in _config(folder)["true_edges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder}/config.json: true_edges is missing or broken: {error!r}") from error
    return tuple(Edge(_node(folder, src), _node(folder, dst), port) for src, dst, port in triples)


def _node(folder: Path, name: str) -> str:
    """unweave's name for a node of the compiler's."""
    plain = {"token_embed": "embed", "pos_embed": "pos_embed", "unembed": "unembed"}
    if name in plain:
        return plain[name]
    match = re.fullmatch(r"layers\.(\d+)\.(?:attn\.(\d+)|mlp)", name)
    if match is None:
        raise CorruptFileError(f"{folder}/config.json: true_edges names an unknown node {name!r}")
    layer, head = match.groups()
    return f"blocks.{layer}.mlp" if head is None else f"blocks.{layer}.attn.head.{head}"
