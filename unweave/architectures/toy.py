"""The zoo's transformers and models compiled by tracr: no normalisation, a table of positions."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from unweave.architectures.parts import attention_stage, embed_stage, mlp_stage, position_stage, read, unembed_stage
from unweave.graph import Graph, Read
from unweave.ops import Activation, Attention
from unweave.zoo.toy import ToyTransformer

__all__ = ["capture_toy"]


def capture_toy(model: ToyTransformer) -> Graph:
    """A :class:`unweave.zoo.toy.ToyTransformer` as a graph."""
    config = model.config
    n = config.n_heads
    stages = [embed_stage(model.W_E), position_stage(model.W_pos)]
    scale = config.attention_scale if config.attention_scale is not None else config.d_head**-0.5
    block: Any
    for i, block in enumerate(model.blocks):
        core = Attention(n, n, scale, causal=config.causal)
        qkv = (_heads(block.W_Q, block.b_Q), _heads(block.W_K, block.b_K), _heads(block.W_V, block.b_V))
        out = rearrange(block.W_O, "head width d -> d (head width)")
        stages.append(attention_stage(i, core, None, qkv, out, len(stages), block.b_O))
        if config.d_mlp:
            hidden = read(block.W_in.T, block.b_in, 1)
            mlp = Activation(config.activation)
            stages.append(mlp_stage(i, mlp, None, (hidden,), block.W_out.T, len(stages), block.b_out))
    stages.append(unembed_stage(config.n_layers, None, model.W_U.T, len(stages), model.b_U))
    info = {
        "name": config.name,
        "family": "toy",
        "n_layers": config.n_layers,
        "n_heads": n,
        "d_model": config.d_model,
        "d_vocab": config.d_vocab,
        "d_out": config.d_out,
        "n_ctx": config.n_ctx,
        "dtype": "float32",
    }
    return Graph(tuple(stages), info)


def _heads(weight: Tensor, bias: Tensor | None) -> Read:
    """A per-head weight ``[head d_model width]`` as one read of stacked blocks."""
    stacked = rearrange(weight, "head d width -> (head width) d")
    return read(stacked, None if bias is None else bias.flatten(), weight.shape[0])
