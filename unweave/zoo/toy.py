"""A small transformer with nothing in the way: no normalisation, a table of positions, weights per head.

The zoo's language models are trained in it, and models compiled by tracr load into it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unweave.errors import CorruptFileError, InputError, NonFiniteError
from unweave.files import read_json, read_tensors, write_json, write_tensors

__all__ = ["ToyConfig", "ToyTransformer"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class ToyConfig:
    """Sizes and options of a :class:`ToyTransformer`.

    Attributes:
        d_mlp: hidden neurons per layer; 0 for attention only.
        d_out: outputs per position.
        attention_scale: what scores are multiplied with; None for 1 / sqrt(d_head).
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_out: int
    n_ctx: int
    activation: str = "relu"
    causal: bool = True
    attention_scale: float | None = None
    name: str = "toy"

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_heads, self.d_model, self.d_head, self.d_vocab, self.d_out, self.n_ctx)
        if not all(isinstance(n, int) and 0 < n < 1 << 20 for n in sizes) or not 0 <= self.d_mlp < 1 << 20:
            raise InputError(f"sizes of a toy transformer must be positive integers, got {self}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"unknown activation {self.activation!r}; known: {sorted(ACTIVATIONS)}")


class Block(nn.Module):
    """One layer: attention, then the MLP if there is one; weights are row-vector maps x @ W, head by head."""

    def __init__(self, c: ToyConfig) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-2]))

        def bias(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.config = c
        self.W_Q, self.W_K, self.W_V = (weight(c.n_heads, c.d_model, c.d_head) for _ in range(3))
        self.b_Q, self.b_K, self.b_V = (bias(c.n_heads, c.d_head) for _ in range(3))
        self.W_O = nn.Parameter(torch.randn(c.n_heads, c.d_head, c.d_model) / math.sqrt(c.n_heads * c.d_head))
        self.b_O = bias(c.d_model)
        if c.d_mlp:
            self.W_in, self.b_in = weight(c.d_model, c.d_mlp), bias(c.d_mlp)
            self.W_out, self.b_out = weight(c.d_mlp, c.d_model), bias(c.d_model)

    def forward(
        self, x: Float[Tensor, "batch pos d"], hidden: Bool[Tensor, "#batch #pos pos"]
    ) -> Float[Tensor, "batch pos d"]:
        c = self.config
        q, k, v = (
            torch.einsum("btd,hdw->bhtw", x, w) + b[:, None]
            for w, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V))
        )
        scale = c.attention_scale if c.attention_scale is not None else c.d_head**-0.5
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden[:, None], -math.inf)
        x = x + torch.einsum("bhtw,hwd->btd", scores.softmax(-1) @ v, self.W_O) + self.b_O
        if c.d_mlp:
            x = x + ACTIVATIONS[c.activation](x @ self.W_in + self.b_in) @ self.W_out + self.b_out
        return x


class ToyTransformer(nn.Module):
    """Embedding + positions -> blocks -> linear readout, without any norm."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        c = self.config = config
        self.W_E = nn.Parameter(torch.randn(c.d_vocab, c.d_model) / math.sqrt(c.d_model))
        self.W_pos = nn.Parameter(torch.randn(c.n_ctx, c.d_model) / math.sqrt(c.d_model))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.W_U = nn.Parameter(torch.randn(c.d_model, c.d_out) / math.sqrt(c.d_model))
        self.b_U = nn.Parameter(torch.zeros(c.d_out))

    def forward(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_out"]:
        """Logits; keys where ``attention_mask`` is 0 are never attended to."""
        n = input_ids.shape[1]
        if n > self.config.n_ctx:
            raise InputError(f"a sequence of {n} tokens is longer than the context of {self.config.n_ctx}")
        hidden = torch.zeros(1, n, n, dtype=torch.bool, device=input_ids.device)
        if self.config.causal:
            hidden = hidden | torch.ones_like(hidden).triu(1)
        if attention_mask is not None:
            hidden = (hidden | ~attention_mask.bool()[:, None, :]) & ~torch.eye(n, dtype=torch.bool, device=hidden.device)
        x = self.W_E[input_ids] + self.W_pos[:n]
        for block in self.blocks:
            x = block(x, hidden)
        return x @ self.W_U + self.b_U

    def save(self, folder: str | Path, **facts: Any) -> None:
        """Write config.json and model.safetensors; ``facts`` (what is known of the mechanism) go into the config."""
        folder = Path(folder)
        write_tensors(folder / "model.safetensors", self.state_dict())
        write_json(folder / "config.json", {"model_type": "unweave-toy", **dataclasses.asdict(self.config), **facts})

    @classmethod
    def load(cls, folder: str | Path) -> ToyTransformer:
        """The model saved in a folder.

        Raises:
            CorruptFileError: config and weights do not fit each other.
            NonFiniteError: a weight is NaN or infinite.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("model_type") != "unweave-toy":
            raise CorruptFileError(f"{folder}/config.json is not that of a toy transformer")
        known = {f.name for f in dataclasses.fields(ToyConfig)}
        try:
            model = cls(ToyConfig(**{k: v for k, v in config.items() if k in known}))
            state = read_tensors(folder / "model.safetensors")[0]
            model.load_state_dict({name: t.float() for name, t in state.items()})
        except (TypeError, RuntimeError, InputError) as error:
            raise CorruptFileError(f"{folder}: weights and config do not fit: {str(error).splitlines()[0]}") from error
        for name, tensor in model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{folder}: the weight {name} holds NaN or inf")
        return model.eval()
