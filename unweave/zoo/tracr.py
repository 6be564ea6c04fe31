"""Transformers compiled from RASP programs by tracr: every edge that matters is known.

Source: Lindner et al. 2023, "Tracr: Compiled Transformers as a Laboratory for Interpretability".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import CorruptFileError
from unweave.files import read_json, read_tensors
from unweave.graph import Edge
from unweave.zoo.toy import ToyConfig, ToyTransformer

__all__ = ["load_tracr", "tracr_examples", "true_edges"]


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "residual_labels" not in config:
        raise CorruptFileError(f"{folder}/config.json is not that of a compiled tracr model")
    if config.get("layer_norm"):
        raise CorruptFileError(f"{folder}: tracr models with layer norm are not supported")
    return config


def load_tracr(folder: str | Path) -> ToyTransformer:
    """A compiled model as a :class:`ToyTransformer`.

    Raises:
        CorruptFileError: a weight is missing or has the wrong shape.
    """
    folder = Path(folder)
    config = _config(folder)
    weights, _ = read_tensors(folder / "model.safetensors")
    try:
        d_out = weights["unembed"].shape[1]
        model = ToyTransformer(
            ToyConfig(
                n_layers=config["n_layers"],
                n_heads=config["n_heads"],
                d_model=config["d_model"],
                d_head=config["d_head"],
                d_mlp=config["d_mlp"],
                d_vocab=weights["token_embed"].shape[0],
                d_out=d_out,
                n_ctx=weights["pos_embed"].shape[0],
                activation=config["activation"],
                causal=config["causal"],
                name=config["name"],
            )
        )
        state = model.state_dict()
        for name, empty in state.items():
            absent = name == "b_U"  # the compiler's readout has no bias
            state[name] = torch.zeros_like(empty) if absent else weights[_tracr_name(name)].reshape(empty.shape)
        model.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CorruptFileError(f"{folder}: weights and config do not fit: {error}") from error
    return model.eval()


def _tracr_name(name: str) -> str:
    """The name in the compiler's file of one of our weights."""
    plain = {"W_E": "token_embed", "W_pos": "pos_embed", "W_U": "unembed"}
    if name in plain:
        return plain[name]
    _, layer, weight = name.split(".")
    kind, part = weight.split("_")
    where = {"Q": "attn.q", "K": "attn.k", "V": "attn.v", "O": "attn.o", "in": "mlp.in", "out": "mlp.out"}[part]
    return f"layers.{layer}.{where}.{'weight' if kind == 'W' else 'bias'}"


def tracr_examples(
    folder: str | Path,
) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"], Float[Tensor, "n pos"]]:
    """(tokens, mask, outputs) of the examples, padded; an output of None is NaN, a word is its number in "outputs"."""
    folder = Path(folder)
    config = _config(folder)
    index = {token: i for i, token in enumerate(config["tokens"])}
    words = {str(word): float(i) for i, word in enumerate(config["outputs"] or ())}
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    longest = max(len(row["input"]) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    outputs = torch.full((len(rows), longest), torch.nan)
    for i, row in enumerate(rows):
        n = len(row["input"])
        tokens[i, :n] = torch.tensor([index[str(token)] for token in row["input"]])
        mask[i, :n] = True
        values = [torch.nan if v is None else words[str(v)] if words else float(v) for v in row["output"]]
        outputs[i, :n] = torch.tensor(values)
    return tokens, mask, outputs


def true_edges(folder: str | Path) -> tuple[Edge, ...]:
    """The edges the compiler made, by unweave's names."""

    def node(name: str) -> str:
        if name in ("token_embed", "pos_embed", "unembed"):
            return {"token_embed": "embed", "pos_embed": "pos_embed", "unembed": "unembed"}[name]
        _, layer, kind, *head = name.split(".")
        return f"blocks.{layer}.attn.head.{head[0]}" if kind == "attn" else f"blocks.{layer}.mlp"

    return tuple(
        Edge(node(src), node(dst), port if port in "qkv" else "in") for src, dst, port in _config(Path(folder))["true_edges"]
    )
