"""Llama and its likes: Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text).

They differ in biases, q/k norms, norms after attention and MLP, soft caps, windows and scales of the
embedding, all of which are read off the modules themselves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from unweave.architectures.parts import (
    activation,
    attention_stage,
    embed_stage,
    hf_info,
    mlp_stage,
    read,
    rms_norm,
    rotary,
    unembed_stage,
)
from unweave.errors import UnsupportedModelError
from unweave.graph import Graph, Stage
from unweave.ops import Attention, Readout

__all__ = ["capture_llama"]


def capture_llama(model: Any) -> Graph:
    """Any Llama-like causal language model of Hugging Face as a graph."""
    config, body = model.config, model.model
    gemma = config.model_type.startswith("gemma")
    if gemma and any(block.self_attn.o_proj.bias is not None for block in body.layers):
        # the norm behind it would make the constant depend on what the heads write
        raise UnsupportedModelError(f"{config.model_type} with attention_bias=True is not supported")
    limits = [rotary(body.rotary_emb, config, _rope_key(config, i))[1] for i in range(config.num_hidden_layers)]
    scale = config.hidden_size**0.5 if gemma else 1.0
    stages = [embed_stage(body.embed_tokens.weight, scale)]
    for i, block in enumerate(body.layers):
        stages.append(_attention(config, body, i, block, gemma, len(stages)))
        stages.append(_mlp(config, i, block, gemma, len(stages)))
    head = model.lm_head
    core = Readout(softcap=getattr(config, "final_logit_softcapping", None))
    norm = rms_norm(body.norm, gemma)
    stages.append(unembed_stage(config.num_hidden_layers, norm, head.weight, len(stages), head.bias, core))
    return Graph(tuple(stages), hf_info(model, min(limits)))


def _rope_key(config: Any, layer: int) -> str | None:
    """Gemma 3 keeps one set of rotary parameters per layer type."""
    nested = any(isinstance(v, dict) for v in config.rope_parameters.values())
    return config.layer_types[layer] if nested else None


def _window(config: Any, layer: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def _attention(config: Any, body: Any, i: int, block: Any, gemma: bool, visible: int) -> Stage:
    attn = block.self_attn
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    core = Attention(
        n_heads,
        n_kv,
        float(attn.scaling),
        causal=bool(attn.is_causal),
        window=_window(config, i),
        # Gemma 3's config has it too, but its attention never applies it
        softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        rotary=rotary(body.rotary_emb, config, _rope_key(config, i))[0],
        q_norm=rms_norm(attn.q_norm, gemma) if hasattr(attn, "q_norm") else None,
        k_norm=rms_norm(attn.k_norm, gemma) if hasattr(attn, "k_norm") else None,
    )
    q, k, v = (
        read(linear.weight, linear.bias, blocks)
        for linear, blocks in ((attn.q_proj, n_heads), (attn.k_proj, n_kv), (attn.v_proj, n_kv))
    )
    post = rms_norm(block.post_attention_layernorm, gemma) if gemma else None
    norm = rms_norm(block.input_layernorm, gemma)
    return attention_stage(i, core, norm, (q, k, v), attn.o_proj.weight, visible, attn.o_proj.bias, post)


def _mlp(config: Any, i: int, block: nn.Module, gemma: bool, visible: int) -> Stage:
    mlp: Any = block.mlp
    name: Any = getattr(config, "hidden_activation", None) if gemma else config.hidden_act
    before: Any = block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm
    post = rms_norm(block.post_feedforward_layernorm, gemma) if gemma else None
    reads = tuple(read(linear.weight, linear.bias, 1) for linear in (mlp.gate_proj, mlp.up_proj))
    core = activation(name, config.model_type)
    return mlp_stage(i, core, rms_norm(before, gemma), reads, mlp.down_proj.weight, visible, mlp.down_proj.bias, post)
