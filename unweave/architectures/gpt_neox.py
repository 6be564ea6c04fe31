"""GPT-NeoX and Pythia: attention and MLP side by side, rotary embedding on part of each head."""

from __future__ import annotations

from typing import Any

from unweave.architectures.parts import (
    activation,
    attention_stage,
    embed_stage,
    hf_info,
    layer_norm,
    mlp_stage,
    read,
    rotary,
    unembed_stage,
)
from unweave.graph import Graph, Read
from unweave.ops import Attention, Dense

__all__ = ["capture_gpt_neox"]


def capture_gpt_neox(model: Any) -> Graph:
    """A Hugging Face GPT-NeoX language model as a graph."""
    config, body = model.config, model.gpt_neox
    positions, limit = rotary(body.rotary_emb, config)
    n = config.num_attention_heads
    stages = [embed_stage(body.embed_in.weight)]
    for i, block in enumerate(body.layers):
        attn, before = block.attention, len(stages)
        core = Attention(n, n, float(attn.scaling), rotary=positions)
        qkv = _split(attn.query_key_value.weight, attn.query_key_value.bias, n)
        norm, out = layer_norm(block.input_layernorm), attn.dense
        stages.append(attention_stage(i, core, norm, qkv, out.weight, before, out.bias))
        # in a parallel block the MLP does not hear the heads of its own layer
        seen = before if block.use_parallel_residual else len(stages)
        mlp, out = activation(config.hidden_act, config.model_type), block.mlp.dense_4h_to_h
        hidden = read(block.mlp.dense_h_to_4h.weight, block.mlp.dense_h_to_4h.bias, 1)
        norm = layer_norm(block.post_attention_layernorm)
        stages.append(mlp_stage(i, mlp, norm, (hidden,), out.weight, seen, out.bias))
    head, norm = model.get_output_embeddings(), layer_norm(body.final_layer_norm)
    stages.append(unembed_stage(len(body.layers), norm, head.weight, len(stages), head.bias))
    return Graph(tuple(stages), hf_info(model, limit))


def _split(weight: Any, bias: Any, n_heads: int) -> tuple[Read, Read, Read]:
    """The fused matrix holds q, k and v of each head side by side."""
    d_head = weight.shape[0] // (3 * n_heads)

    def part(j: int) -> Read:
        w = weight.unflatten(0, (n_heads, 3, d_head))[:, j].flatten(0, 1)
        b = None if bias is None else bias.unflatten(0, (n_heads, 3, d_head))[:, j].flatten()
        return Read(Dense(w), (d_head,) * n_heads, b)

    return part(0), part(1), part(2)
