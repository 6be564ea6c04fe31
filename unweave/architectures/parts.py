"""Pieces that the families share: each turns a few PyTorch modules into a stage.

A family is a function ``nn.Module -> Graph`` that puts these together; see ``llama.py`` for the pattern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unweave.errors import UnsupportedModelError
from unweave.graph import Port, Read, Stage
from unweave.ops import (
    ACTIVATIONS,
    Activation,
    Attention,
    Dense,
    Identity,
    LayerNorm,
    Lookup,
    Norm,
    Readout,
    RMSNorm,
    Rotary,
)

__all__ = [
    "activation",
    "attention_stage",
    "embed_stage",
    "hf_info",
    "layer_norm",
    "mlp_stage",
    "position_stage",
    "read",
    "rms_norm",
    "rotary",
    "unembed_stage",
]

# Hugging Face's names of activations that have another name here
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "swish": "silu",
}


def activation(name: str, model_type: str) -> Activation:
    """The activation a config names, or a refusal."""
    ours = HF_ACTIVATIONS.get(name, name)
    if ours not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{model_type}: activation {name!r} is not supported; supported: {sorted(ACTIVATIONS)}. "
            "Add it to ACTIVATIONS in unweave/ops/cores.py"
        )
    return Activation(ours)


def read(weight: Tensor, bias: Tensor | None, blocks: int) -> Read:
    """A read of ``blocks`` equal blocks from a weight ``[outputs, d_model]``."""
    return Read(Dense(weight), (weight.shape[0] // blocks,) * blocks, bias)


def layer_norm(module: nn.LayerNorm) -> LayerNorm:
    """A LayerNorm with its gain and bias."""
    return LayerNorm(module.weight, module.bias, module.eps)


def embed_stage(table: Tensor, scale: float = 1.0) -> Stage:
    """The token embedding."""
    d = table.shape[1]
    return Stage(("embed",), "embed", -1, (), Lookup(table, "token", scale), Identity(d), (d,), (0, 0))


def position_stage(table: Tensor) -> Stage:
    """A learned table of positions."""
    d = table.shape[1]
    return Stage(("pos_embed",), "embed", -1, (), Lookup(table, "position"), Identity(d), (d,), (0, 0))


def attention_stage(
    layer: int,
    core: Attention,
    norm: Norm | None,
    qkv: tuple[Read, Read, Read],
    out: Tensor,
    visible: int,
    bias: Tensor | None = None,
    post: Norm | None = None,
) -> Stage:
    """The heads of one layer, each a node; they hear the first ``visible`` stages."""
    names = tuple(f"blocks.{layer}.attn.head.{h}" for h in range(core.n_heads))
    ports = tuple(Port(name, (r,), norm) for name, r in zip("qkv", qkv, strict=True))
    widths = (out.shape[1] // core.n_heads,) * core.n_heads
    return Stage(names, "attn", layer, ports, core, Dense(out), widths, (0, visible), bias, post)


def mlp_stage(
    layer: int,
    core: Activation,
    norm: Norm | None,
    reads: tuple[Read, ...],
    out: Tensor,
    visible: int,
    bias: Tensor | None = None,
    post: Norm | None = None,
) -> Stage:
    """The MLP of one layer, one node; two reads (gate, up) when gated."""
    port = Port("in", reads, norm)
    return Stage(
        (f"blocks.{layer}.mlp",), "mlp", layer, (port,), core, Dense(out), (out.shape[1],), (0, visible), bias, post
    )


def unembed_stage(
    layer: int, norm: Norm | None, weight: Tensor, visible: int, bias: Tensor | None = None, core: Readout | None = None
) -> Stage:
    """The output: logits read from the stream."""
    port = Port("in", (read(weight, bias, 1),), norm)
    return Stage(("unembed",), "unembed", layer, (port,), core or Readout(), None, (weight.shape[0],), (0, visible))


def rotary(module: Any, config: Any, layer_type: str | None = None) -> tuple[Rotary, int]:
    """The rotary embedding of a Hugging Face model and the longest context for which it is exact.

    Frequencies are taken as the model's own module computed them, so every variant whose frequencies do not
    depend on the input's length is exact; "dynamic" and "longrope" are exact up to the original context, and
    the graph refuses longer inputs.
    """
    parameters = config.rope_parameters
    parameters = parameters[layer_type] if layer_type is not None else parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"):
        raise UnsupportedModelError(
            f"{config.model_type}: rope_type {kind!r} is not supported; supported: default, linear, dynamic, yarn, "
            "longrope, llama3"
        )
    limit = config.max_position_embeddings
    if kind in ("dynamic", "longrope"):
        limit = parameters.get("original_max_position_embeddings") or limit
    prefix = f"{layer_type}_" if layer_type is not None else ""
    frequency = getattr(module, f"{prefix}original_inv_freq").detach().float()
    scaling = float(getattr(module, f"{prefix}attention_scaling"))
    return Rotary(frequency.clone(), scaling), int(limit)


def hf_info(model: Any, n_ctx: int) -> dict[str, Any]:
    """The plain facts about a Hugging Face model that a graph carries."""
    config = model.config
    return {
        "name": getattr(config, "_name_or_path", "") or config.model_type,
        "family": config.model_type,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_vocab": int(model.get_input_embeddings().weight.shape[0]),
        "d_out": int(model.get_output_embeddings().weight.shape[0]),
        "n_ctx": n_ctx,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def rms_norm(module: Any, gain_in_float32: bool = False) -> RMSNorm:
    """A Hugging Face RMSNorm; Gemma's stores its gain minus one."""
    eps = getattr(module, "variance_epsilon", None)
    eps = module.eps if eps is None else eps
    gain = module.weight.detach()
    if gain_in_float32:
        return RMSNorm(1.0 + gain.float() if gain.dtype != torch.float32 else 1.0 + gain, eps, True)
    return RMSNorm(gain, eps)
