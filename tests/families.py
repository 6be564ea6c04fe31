"""Tiny random models of every family and every option that changes what is computed.

A new family adds its config here and inherits the whole battery (exactness, cutting, scoring, storage).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

BASE: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
LLAMA = BASE | dict(intermediate_size=48, num_key_value_heads=2)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LONG = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.1] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=32,
)
GEMMA = LLAMA | dict(head_dim=16, sliding_window=5)

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2-scaled-by-layer": lambda: hf.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2-untied": lambda: hf.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**BASE, intermediate_size=48),
    "gpt_neox-partial": lambda: hf.GPTNeoXConfig(
        **BASE,
        intermediate_size=48,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25),
    ),
    "gpt_neox-sequential": lambda: hf.GPTNeoXConfig(**BASE, intermediate_size=48, use_parallel_residual=False),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
        max_position_embeddings=64,
        intermediate_size=48,
    ),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "llama-tied-biased": lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: hf.LlamaConfig(
        **LLAMA, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    ),
    "llama-dynamic": lambda: hf.LlamaConfig(
        **LLAMA, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    ),
    "llama-yarn": lambda: hf.LlamaConfig(**LLAMA, rope_parameters=YARN),
    "llama-llama3": lambda: hf.LlamaConfig(**LLAMA, rope_parameters=LLAMA3),
    "llama-longrope": lambda: hf.LlamaConfig(**LLAMA, rope_parameters=LONG),
    "llama-multi-query": lambda: hf.LlamaConfig(**(LLAMA | dict(num_key_value_heads=1))),
    "mistral-window": lambda: hf.MistralConfig(**LLAMA, sliding_window=5),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen2-window": lambda: hf.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(
        **GEMMA, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GEMMA, query_pre_attn_scalar=20, layer_types=["sliding_attention", "full_attention"]
    ),
}


def random_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The family's tiny model, its weights all random (norm gains and biases too) so that nothing hides at 0 or 1."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
    return model.to(dtype).eval()
