"""What both scripts share: our models in TransformerLens, prompts, and scores in EAP's JSON.

Runs in the peers' environments, where unweave is not installed. Heads that share keys and values get their own copy
of them: TransformerLens' own ways to ungroup them differ between versions, and auto-circuit knows none.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

TOLERANCE = 1e-4


class Prompts(NamedTuple):
    """Clean and corrupted tokens ``[n pos]``; at ``end`` the model should prefer ``correct`` to ``wrong`` (``[n]``)."""

    clean: Tensor
    corrupted: Tensor
    end: Tensor
    correct: Tensor
    wrong: Tensor


def read_prompts(path: Path) -> Prompts:
    """From .safetensors or .json with these five names."""
    data = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    return Prompts(*(torch.as_tensor(data[name]).long() for name in Prompts._fields))


def load_model(folder: Path, tokens: Tensor) -> tuple[HookedTransformer, float]:
    """The model of a folder, and by how much its logits are off; at most 1e-4."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    if config["model_type"] == "unweave-toy":
        model, reference = _toy(config, weights), _toy_logits(weights, tokens)
    elif config["model_type"] == "llama":
        model, reference = _llama(config, weights), _hugging_face_logits(folder, config, tokens)
    else:
        raise SystemExit(f"{folder} is a {config['model_type']}; llama and unweave-toy are known here")
    with torch.no_grad():
        off = float((model(tokens) - reference).abs().max())
    print(f"largest difference of a logit: {off:.2e} (logits up to {float(reference.abs().max()):.1f})")
    if not off < TOLERANCE:
        raise SystemExit(f"the converted model is not the model: its logits differ by {off:.2e}")
    return model, off


def _make(weights: Mapping[str, Tensor], **config: Any) -> HookedTransformer:
    hooks = dict(use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True)
    model = HookedTransformer(HookedTransformerConfig(device="cpu", seed=0, **hooks, **config))
    state = model.state_dict()
    constants = {name for name in state if name.rpartition(".")[2] in ("mask", "IGNORE", "rotary_sin", "rotary_cos")}
    assert set(state) - constants == set(weights), set(state) ^ set(weights) ^ constants
    model.load_state_dict(dict(weights), strict=False)
    return model.eval()


def _heads(weight: Tensor, n_heads: int, n_kv: int, d_head: int) -> Tensor:
    """``[head d_model d_head]`` of a weight ``[n_kv * d_head, d_model]``, shared heads repeated."""
    return weight.reshape(n_kv, d_head, -1).transpose(1, 2).repeat_interleave(n_heads // n_kv, 0)


def _llama(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> HookedTransformer:
    n, d = config["num_attention_heads"], config["hidden_size"]
    d_head, n_kv = config.get("head_dim") or d // n, config.get("num_key_value_heads") or n
    d_mlp, d_vocab = config["intermediate_size"], config["vocab_size"]
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e4)}
    if rope.get("rope_type", "default") != "default" or config.get("attention_bias") or config.get("mlp_bias"):
        raise SystemExit("only a plain Llama is converted here: no scaled rotary embedding, no biases")
    embed = weights["model.embed_tokens.weight"]
    out = {"embed.W_E": embed, "ln_final.w": weights["model.norm.weight"], "unembed.b_U": torch.zeros(d_vocab)}
    out["unembed.W_U"] = weights.get("lm_head.weight", embed).T
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        for x, blocks in (("q", n), ("k", n_kv), ("v", n_kv)):
            weight = weights[f"{theirs}self_attn.{x}_proj.weight"]
            out[f"{ours}attn.W_{x.upper()}"] = _heads(weight, n, blocks, d_head)
            out[f"{ours}attn.b_{x.upper()}"] = torch.zeros(n, d_head)
        out[f"{ours}attn.W_O"] = weights[f"{theirs}self_attn.o_proj.weight"].T.reshape(n, d_head, d)
        out |= {f"{ours}attn.b_O": torch.zeros(d), f"{ours}mlp.b_in": torch.zeros(d_mlp)}
        out |= {f"{ours}mlp.b_out": torch.zeros(d), f"{ours}ln1.w": weights[f"{theirs}input_layernorm.weight"]}
        out[f"{ours}ln2.w"] = weights[f"{theirs}post_attention_layernorm.weight"]
        for x, y in (("gate", "W_gate"), ("up", "W_in"), ("down", "W_out")):
            out[f"{ours}mlp.{y}"] = weights[f"{theirs}mlp.{x}_proj.weight"].T
    return _make(
        out,
        n_layers=config["num_hidden_layers"],
        n_heads=n,
        d_model=d,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=d_vocab,
        n_ctx=config["max_position_embeddings"],
        act_fn=config["hidden_act"],
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=config["rms_norm_eps"],
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=rope["rope_theta"],
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
    )


def _hugging_face_logits(folder: Path, config: Mapping[str, Any], tokens: Tensor) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.from_pretrained(folder)
    if "rope_parameters" in config:  # transformers 4 has it elsewhere
        theirs.rope_theta = config["rope_parameters"]["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(folder, config=theirs).float().eval()
    with torch.no_grad():
        return model(tokens).logits


def _toy(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> HookedTransformer:
    """The zoo's attention-only transformer; EAP's format wants MLPs, so it gets some of one neuron, all zero."""
    if config["d_mlp"]:
        raise SystemExit("only an attention-only toy transformer is converted here")
    n_heads, d, d_head = config["n_heads"], config["d_model"], config["d_head"]
    out = {"embed.W_E": weights["W_E"], "pos_embed.W_pos": weights["W_pos"]}
    out |= {"unembed.W_U": weights["W_U"], "unembed.b_U": weights["b_U"]}
    for i in range(config["n_layers"]):
        for x in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            out[f"blocks.{i}.attn.{x}"] = weights[f"blocks.{i}.{x}"]
        out |= {f"blocks.{i}.mlp.W_in": torch.zeros(d, 1), f"blocks.{i}.mlp.b_in": torch.zeros(1)}
        out |= {f"blocks.{i}.mlp.W_out": torch.zeros(1, d), f"blocks.{i}.mlp.b_out": torch.zeros(d)}
    scale = config["attention_scale"]
    return _make(
        out,
        n_layers=config["n_layers"],
        n_heads=n_heads,
        d_model=d,
        d_head=d_head,
        d_mlp=1,
        d_vocab=config["d_vocab"],
        d_vocab_out=config["d_out"],
        n_ctx=config["n_ctx"],
        act_fn="relu",
        normalization_type=None,
        attn_scale=math.sqrt(d_head) if scale is None else 1 / scale,
    )


def _toy_logits(weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The toy transformer in plain torch."""
    n, i = tokens.shape[1], 0
    x = weights["W_E"][tokens] + weights["W_pos"][:n]
    while f"blocks.{i}.W_Q" in weights:
        w = {name.rpartition(".")[2]: t for name, t in weights.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (torch.einsum("btd,hdw->bhtw", x, w[f"W_{y}"]) + w[f"b_{y}"][:, None] for y in "QKV")
        pattern = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        pattern = pattern.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum("bhtw,hwd->btd", pattern @ v, w["W_O"]) + w["b_O"]
        i += 1
    return x @ weights["W_U"] + weights["b_U"]


def logit_difference(logits: Tensor, prompts: Prompts) -> Tensor:
    """Correct minus wrong at the end of each prompt ``[n]``."""
    at_end = logits[torch.arange(len(prompts.end)), prompts.end]
    picked = at_end.gather(1, torch.stack([prompts.correct, prompts.wrong], 1))
    return picked[:, 0] - picked[:, 1]


def timed(score: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds it took."""
    started = time.perf_counter()
    result = score()
    return result, time.perf_counter() - started


def write_scores(
    path: Path, model: HookedTransformer, scores: Mapping[str, float], kept: Mapping[str, bool], **facts: Any
) -> None:
    """EAP's graph JSON, which unweave.export.from_eap_json reads; facts go under "unweave"."""
    cfg = model.cfg
    nodes = ["input", *(f"a{i}.h{h}" for i in range(cfg.n_layers) for h in range(cfg.n_heads))]
    nodes += [*(f"m{i}" for i in range(cfg.n_layers)), "logits"]
    sizes = {"n_layers": cfg.n_layers, "n_heads": cfg.n_heads, "d_model": cfg.d_model}
    data = {
        "cfg": sizes | {"parallel_attn_mlp": bool(cfg.parallel_attn_mlp)},
        "nodes": {name: {"in_graph": True} for name in nodes},
        "edges": {name: {"score": score, "in_graph": kept.get(name, True)} for name, score in scores.items()},
        "unweave": {"version": 1, "threads": torch.get_num_threads(), **facts},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    print(
        f"{path.name}: {facts['seconds']:.2f} s, {sum(kept.get(n, True) for n in scores)} of {len(scores)} edges kept"
    )


def arguments(description: str, methods: tuple[str, ...]) -> argparse.Namespace:
    """The command line of both scripts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="a folder: a Llama in Hugging Face's format, or a toy transformer")
    parser.add_argument("prompts", type=Path, help=".safetensors or .json: " + ", ".join(Prompts._fields))
    parser.add_argument("out", type=Path, help="a folder; one METHOD.json each")
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--steps", type=int, default=5, help="of the integrated gradients")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threshold-exponent", type=int, default=-2, help="ACDC's threshold is 10 to this")
    parser.add_argument("--epochs", type=int, default=20, help="of edge pruning")
    parser.add_argument("--edges", type=int, default=200, help="the size that edge pruning aims for")
    given = parser.parse_args()
    torch.set_num_threads(1)
    return given
