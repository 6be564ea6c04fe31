"""A small transformer with nothing in the way: no normalisation, a table of positions, weights per head.

The zoo's language models are trained in it, and models compiled by tracr load into it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unweave.errors import CorruptFileError, InputError, NonFiniteError
from unweave.files import read_json, read_tensors, write_json, write_tensors

__all__ = ["ToyConfig", "ToyTransformer", "fill", "from_weights", "per_head", "read_config"]

M = TypeVar("M", bound=nn.Module)

MAX_SIZE = 1 << 20
MAX_LAYERS = 128
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
        if not all(type(n) is int and 0 < n < MAX_SIZE for n in sizes):
            raise InputError(f"sizes of a toy transformer must be positive integers below {MAX_SIZE}, got {self}")
        if type(self.d_mlp) is not int or not 0 <= self.d_mlp < MAX_SIZE:
            raise InputError(f"d_mlp must be an integer, 0 for attention only, got {self.d_mlp!r}")
        if self.n_layers > MAX_LAYERS:
            raise InputError(f"a toy transformer has at most {MAX_LAYERS} layers, got {self.n_layers}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"unknown activation {self.activation!r}; known: {sorted(ACTIVATIONS)}")
        self._check_options()

    def _check_options(self) -> None:
        if type(self.causal) is not bool or not isinstance(self.name, str):
            raise InputError(f"causal must be true or false and name a string, got {self.causal!r} and {self.name!r}")
        scale = self.attention_scale
        if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
            raise InputError(f"attention_scale must be a finite number or none, got {scale!r}")


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

    def pattern(
        self, x: Float[Tensor, "batch pos d"], hidden: Bool[Tensor, "#batch #pos pos"]
    ) -> Float[Tensor, "batch head pos pos"]:
        """Where each head looks: softmax over keys of q . k times the scale, ``hidden`` pairs left out."""
        c = self.config
        q, k = per_head(x, self.W_Q, self.b_Q), per_head(x, self.W_K, self.b_K)
        scale = c.attention_scale if c.attention_scale is not None else c.d_head**-0.5
        return (q @ k.transpose(-1, -2) * scale).masked_fill(hidden[:, None], -math.inf).softmax(-1)

    def forward(
        self, x: Float[Tensor, "batch pos d"], hidden: Bool[Tensor, "#batch #pos pos"]
    ) -> Float[Tensor, "batch pos d"]:
        """The residual stream after this layer."""
        c = self.config
        mixed = self.pattern(x, hidden) @ per_head(x, self.W_V, self.b_V)
        x = x + torch.einsum("bhtw,hwd->btd", mixed, self.W_O) + self.b_O
        if c.d_mlp:
            x = x + ACTIVATIONS[c.activation](x @ self.W_in + self.b_in) @ self.W_out + self.b_out
        return x


def per_head(
    x: Float[Tensor, "batch pos d"], weight: Float[Tensor, "head d width"], bias: Float[Tensor, "head width"]
) -> Float[Tensor, "batch head pos width"]:
    """The row-vector map x @ weight + bias of every head."""
    return torch.einsum("btd,hdw->bhtw", x, weight) + bias[:, None]


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
        """Logits at every position.

        Args:
            input_ids: tokens; position 0 is the first column, padding counts.
            attention_mask: 1 for a real token, 0 for padding, which no other position ever attends to
                (a padded position still sees itself, so that its row of the softmax is not empty).

        Raises:
            InputError: the sequence is longer than the context.
        """
        x, hidden = self._start(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, hidden)
        return x @ self.W_U + self.b_U

    def patterns(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None
    ) -> list[Float[Tensor, "batch head pos pos"]]:
        """Where every head of every layer looks.

        Example:
            >>> config = ToyConfig(1, 2, 4, 2, 0, d_vocab=5, d_out=5, n_ctx=3)
            >>> [tuple(p.shape) for p in ToyTransformer(config).patterns(torch.tensor([[1, 2, 3]]))]
            [(1, 2, 3, 3)]
        """
        x, hidden = self._start(input_ids, attention_mask)
        found = []
        for block in self.blocks:
            found.append(cast(Block, block).pattern(x, hidden))
            x = block(x, hidden)
        return found

    def _start(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The embedded tokens, and which (query, key) pairs are hidden."""
        n = input_ids.shape[1]
        if n > self.config.n_ctx:
            raise InputError(f"a sequence of {n} tokens is longer than the context of {self.config.n_ctx}")
        hidden = torch.zeros(1, n, n, dtype=torch.bool, device=input_ids.device)
        if self.config.causal:
            hidden = hidden | torch.ones_like(hidden).triu(1)
        if attention_mask is not None:
            itself = torch.eye(n, dtype=torch.bool, device=hidden.device)
            hidden = (hidden | ~attention_mask.bool()[:, None, :]) & ~itself
        return self.W_E[input_ids] + self.W_pos[:n], hidden

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
        config = read_config(folder, "unweave-toy", "a toy transformer")
        known = {f.name for f in dataclasses.fields(ToyConfig)}
        try:
            settings = ToyConfig(**{k: v for k, v in config.items() if k in known})
        except (TypeError, InputError) as error:
            raise CorruptFileError(f"{folder}/config.json: {error}") from error
        return from_weights(settings, read_tensors(folder / "model.safetensors")[0], str(folder))


def from_weights(config: ToyConfig, weights: Mapping[str, Tensor], where: str) -> ToyTransformer:
    """A transformer, in float32 and evaluation mode, from weights nobody vouches for.

    Args:
        where: what the weights come from, for the error.

    Raises:
        CorruptFileError: weights and config do not fit each other.
        NonFiniteError: a weight is NaN or infinite.
    """
    return fill(lambda: ToyTransformer(config), weights, where)


def read_config(folder: Path, model_type: str, what: str) -> dict[str, Any]:
    """The config in a folder of the zoo, of a model of this type.

    Raises:
        CorruptFileError: it is that of no such model, or broken.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != model_type:
        raise CorruptFileError(f"{folder}/config.json is not that of {what}")
    return config


def fill(make: Callable[[], M], weights: Mapping[str, Tensor], where: str) -> M:
    """A model given weights nobody vouches for; in float32 and evaluation mode.

    Raises:
        CorruptFileError: weights and model do not fit each other.
        NonFiniteError: a weight is NaN or infinite.
    """
    # on "meta" nothing is allocated: a config that lies about its sizes costs no memory
    with torch.device("meta"):
        model = make()
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in weights.items()}
    wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    if wrong:
        name = wrong[0]
        raise CorruptFileError(
            f"{where}: weights and config do not fit: {name} is {got.get(name, 'absent')} in the weights and "
            f"{expected.get(name, 'absent')} in the config ({len(wrong)} such); write the folder again"
        )
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{where}: the weight {name} holds NaN or inf; train or compile the model again")
    model.load_state_dict({name: t.to(torch.float32, copy=True) for name, t in weights.items()}, assign=True)
    return model.eval()
