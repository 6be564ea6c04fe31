"""GPT-Neo (and the TinyStories models): unscaled attention, local windows in every other layer."""

from __future__ import annotations

from typing import Any

from unweave.architectures.parts import (
    activation,
    attention_stage,
    embed_stage,
    hf_info,
    layer_norm,
    mlp_stage,
    position_stage,
    read,
    unembed_stage,
)
from unweave.graph import Graph
from unweave.ops import Attention

__all__ = ["capture_gpt_neo"]


def capture_gpt_neo(model: Any) -> Graph:
    """A Hugging Face GPT-Neo language model as a graph."""
    config, body = model.config, model.transformer
    stages = [embed_stage(body.wte.weight), position_stage(body.wpe.weight)]
    n = config.num_attention_heads
    for i, block in enumerate(body.h):
        attn = block.attn.attention
        window = config.window_size if attn.attention_type == "local" else None
        core = Attention(n, n, 1.0, window=window)
        q, k, v = (read(m.weight, m.bias, n) for m in (attn.q_proj, attn.k_proj, attn.v_proj))
        out = attn.out_proj
        stages.append(attention_stage(i, core, layer_norm(block.ln_1), (q, k, v), out.weight, len(stages), out.bias))
        hidden, out = read(block.mlp.c_fc.weight, block.mlp.c_fc.bias, 1), block.mlp.c_proj
        mlp = activation(config.activation_function, config.model_type)
        stages.append(mlp_stage(i, mlp, layer_norm(block.ln_2), (hidden,), out.weight, len(stages), out.bias))
    head = model.lm_head
    stages.append(unembed_stage(len(body.h), layer_norm(body.ln_f), head.weight, len(stages), head.bias))
    return Graph(tuple(stages), hf_info(model, config.max_position_embeddings))
