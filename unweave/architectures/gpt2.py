"""GPT-2: learned positions, LayerNorm, one fused q/k/v matrix, biases everywhere."""

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

__all__ = ["capture_gpt2"]


def capture_gpt2(model: Any) -> Graph:
    """A Hugging Face GPT-2 language model as a graph."""
    config, body = model.config, model.transformer
    stages = [embed_stage(body.wte.weight), position_stage(body.wpe.weight)]
    n = config.num_attention_heads
    for i, block in enumerate(body.h):
        attn = block.attn
        # Conv1D stores [in, out]: transposed views keep the tensors tied to the model's
        weights, biases = attn.c_attn.weight.T.chunk(3), attn.c_attn.bias.chunk(3)
        q, k, v = (read(w, b, n) for w, b in zip(weights, biases, strict=True))
        scale = attn.head_dim**-0.5 if config.scale_attn_weights else 1.0
        scale /= i + 1 if config.scale_attn_by_inverse_layer_idx else 1
        core, norm = Attention(n, n, scale), layer_norm(block.ln_1)
        stages.append(attention_stage(i, core, norm, (q, k, v), attn.c_proj.weight.T, len(stages), attn.c_proj.bias))
        mlp = activation(config.activation_function, config.model_type)
        hidden = read(block.mlp.c_fc.weight.T, block.mlp.c_fc.bias, 1)
        norm, out = layer_norm(block.ln_2), block.mlp.c_proj
        stages.append(mlp_stage(i, mlp, norm, (hidden,), out.weight.T, len(stages), out.bias))
    head = model.lm_head
    stages.append(unembed_stage(len(body.h), layer_norm(body.ln_f), head.weight, len(stages), head.bias))
    return Graph(tuple(stages), hf_info(model, config.max_position_embeddings))
