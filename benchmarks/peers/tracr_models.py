"""Compile more RASP programs with tracr, in the format of ../shared/models/tracr.

    python benchmarks/peers/tracr_models.py FOLDER [NAME ...]

Runs in an environment of its own with jax, dm-haiku, and tracr's source on the path (it is not on PyPI). True edges: a
writer and a reader are joined when the coordinates that the one writes and the other reads overlap, and the edge lies
on a path to the output.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

N_EXAMPLES = 256
TOO_SMALL = 1e-7


def programs() -> dict[str, tuple[rasp.SOp, list[Any], int]]:
    """name -> (program, vocabulary, longest sequence)."""
    letters = ["a", "b", "c", "d"]
    doubled = rasp.Map(lambda x: x * 2 + 1, rasp.tokens).named("doubled")
    return {
        "length": (lib.make_length(), letters, 6),
        "shuffle_dyck2": (lib.make_shuffle_dyck2(), ["(", ")", "{", "}"], 6),
        "sort": (lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=6, min_key=1), [1, 2, 3, 4, 5], 6),
        "sort_freq": (lib.make_sort_freq(max_seq_len=5), letters[:3], 5),
        "count_a": (lib.make_count(rasp.tokens, "a"), letters, 6),
        "count_less_freq": (lib.make_count_less_freq(2), letters[:3], 5),
        "reverse_long": (lib.make_reverse(rasp.tokens), letters, 9),
        "hist_of_doubled": (lib.make_hist().named("hist_of_doubled"), [1, 2, 3], 5),
        "doubled": (doubled, [1, 2, 3], 5),
    }


def weights_of(params: dict[str, Any], d_head: int, n_heads: int) -> dict[str, np.ndarray]:
    """The compiled parameters under the names of ../shared."""
    out = {
        "token_embed": np.asarray(params["token_embed"]["embeddings"]),
        "pos_embed": np.asarray(params["pos_embed"]["embeddings"]),
    }
    n_layers = 1 + max(int(k.split("layer_")[1].split("/")[0]) for k in params if "layer_" in k)
    for i in range(n_layers):
        for name, ours in {"query": "q", "key": "k", "value": "v"}.items():
            p = params[f"transformer/layer_{i}/attn/{name}"]
            w, b = np.asarray(p["w"]), np.asarray(p["b"])
            out[f"layers.{i}.attn.{ours}.weight"] = w.reshape(w.shape[0], n_heads, d_head).transpose(1, 0, 2).copy()
            out[f"layers.{i}.attn.{ours}.bias"] = b.reshape(n_heads, d_head)
        p = params[f"transformer/layer_{i}/attn/linear"]
        out[f"layers.{i}.attn.o.weight"] = np.asarray(p["w"]).reshape(n_heads, d_head, -1)
        out[f"layers.{i}.attn.o.bias"] = np.asarray(p["b"])
        for name, ours in {"linear_1": "in", "linear_2": "out"}.items():
            p = params[f"transformer/layer_{i}/mlp/{name}"]
            out[f"layers.{i}.mlp.{ours}.weight"] = np.asarray(p["w"])
            out[f"layers.{i}.mlp.{ours}.bias"] = np.asarray(p["b"])
    return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in out.items()}


def true_edges(w: dict[str, np.ndarray], n_layers: int, n_heads: int) -> list[list[str]]:
    """Edges whose written and read coordinates overlap, on a path to the output."""

    def any_(x: np.ndarray, axis: int) -> np.ndarray:
        return (np.abs(x) > TOO_SMALL).any(axis)

    writes, reads, order = {}, {}, ["token_embed", "pos_embed"]
    writes["token_embed"], writes["pos_embed"] = any_(w["token_embed"], 0), any_(w["pos_embed"], 0)
    for i in range(n_layers):
        for h in range(n_heads):
            name = f"layers.{i}.attn.{h}"
            order.append(name)
            for port in "qkv":
                reads[name, port] = any_(w[f"layers.{i}.attn.{port}.weight"][h], 1)
            writes[name] = any_(w[f"layers.{i}.attn.o.weight"][h], 0)
        order.append(f"layers.{i}.mlp")
        reads[f"layers.{i}.mlp", "in"] = any_(w[f"layers.{i}.mlp.in.weight"], 1)
        writes[f"layers.{i}.mlp"] = any_(w[f"layers.{i}.mlp.out.weight"], 0)
    reads["unembed", "in"] = any_(w["unembed"], 1)

    def depth(name: str) -> tuple[int, int]:
        if name.endswith("embed"):
            return (99, 0) if name == "unembed" else (-1, 0)
        _, layer, part, *_ = name.split(".")
        return int(layer), 0 if part == "attn" else 1

    edges = [(s, d, p) for (d, p), r in reads.items() for s in order if depth(s) < depth(d) and (writes[s] & r).any()]
    alive, grown = {"unembed"}, True
    while grown:
        new = {s for s, d, _ in edges if d in alive} - alive
        alive, grown = alive | new, bool(new)
    return sorted([s, d, p] for s, d, p in edges if d in alive)


def main(folder: str, names: list[str]) -> None:
    every = programs()
    for name in names or every:
        program, vocabulary, longest = every[name]
        model = compiling.compile_rasp_to_model(
            program, vocab=set(vocabulary), max_seq_len=longest, compiler_bos="BOS", causal=False
        )
        config = model.model_config
        w = weights_of(model.params, config.key_size, config.num_heads)
        out_map = model.output_encoder
        d_model = w["token_embed"].shape[1]
        labels = list(model.residual_labels)
        w["unembed"] = unembedding(model, program, labels, d_model)
        rows, rng = [], random.Random(0)
        for _ in range(N_EXAMPLES):
            n = rng.randint(2, longest)
            ids = ["BOS", *(rng.choice(vocabulary) for _ in range(n))]
            decoded = model.apply(ids).decoded
            rows.append({"input": ids, "output": [None, *(jsonable(x) for x in decoded[1:])]})
        encoding = model.input_encoder.encoding_map
        tokens = [t for t, _ in sorted(encoding.items(), key=lambda kv: kv[1])]
        outputs = None
        if getattr(out_map, "encoding_map", None):
            outputs = [o for o, _ in sorted(out_map.encoding_map.items(), key=lambda kv: kv[1])]
        plain = {
            "name": name,
            "n_layers": config.num_layers,
            "n_heads": config.num_heads,
            "d_head": config.key_size,
            "d_model": d_model,
            "d_mlp": config.mlp_hidden_size,
            "activation": "relu",
            "causal": False,
            "layer_norm": False,
            "max_len_with_bos": longest + 1,
            "tokens": tokens,
            "outputs": outputs,
            "residual_labels": labels,
            "true_edges": true_edges(w, config.num_layers, config.num_heads),
        }
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        save_file(w, target / "model.safetensors")
        (target / "config.json").write_text(json.dumps(plain, indent=1))
        (target / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(name, config.num_layers, "layers", d_model, "wide", len(plain["true_edges"]), "true edges", flush=True)


def jsonable(x: Any) -> Any:
    return x.item() if hasattr(x, "item") else x


def unembedding(model: Any, program: rasp.SOp, labels: list[str], d_model: int) -> np.ndarray:
    """The projection of the stream on the output's coordinates."""
    values = getattr(model.output_encoder, "encoding_map", None)
    ordered = sorted(values, key=values.get) if values else []
    wanted = [f"{program.label}:{value}" for value in ordered] or [program.label]
    out = np.zeros((d_model, len(wanted)), dtype=np.float32)
    for column, label in enumerate(wanted):
        out[labels.index(label), column] = 1.0
    return out


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
