"""What stands between a node's reads and its code: lookup, attention, pointwise non-linearity, readout.

All tensors are ``[batch node pos width]``: one core computes all the nodes of a stage at once. Widths that
differ between nodes (after compression) are padded with zeros to the widest.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave import tree
from unweave.errors import InputError
from unweave.ops.norms import RMSNorm

__all__ = ["ACTIVATIONS", "Activation", "Attention", "Context", "Core", "FloatInput", "Lookup", "Readout", "Rotary"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass
class Context:
    """One run's inputs, and what stages may share while it lasts.

    Attributes:
        inputs: token ids ``[batch pos]``, or floats ``[batch pos features]`` for networks without tokens.
        mask: True where a token is real; None when all are.
    """

    inputs: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos features"]
    mask: Bool[Tensor, "batch pos"] | None = None
    shared: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def n_pos(self) -> int:
        return self.inputs.shape[1]

    def once(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """``make()``, computed at most once per run for each key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def expand(self, copies: int) -> Context:
        """The context of the same inputs repeated ``copies`` times along the batch (copy-major)."""
        mask = None if self.mask is None else self.mask.repeat(copies, 1)
        return Context(self.inputs.repeat(copies, *([1] * (self.inputs.ndim - 1))), mask)


class Core(ABC):
    """The non-linear middle of a stage."""

    @abstractmethod
    def forward(
        self, reads: tuple[Float[Tensor, "batch node pos _"], ...], context: Context
    ) -> Float[Tensor, "batch node pos width"]:
        """Codes of all nodes from all that they read."""

    def forward_rows(
        self, reads: tuple[Float[Tensor, "batch row pos _"], ...], row_of: Int[Tensor, " nodes"], context: Context
    ) -> Float[Tensor, "batch node pos width"]:
        """Codes of all nodes, where node n reads row ``row_of[n]``."""
        return self.forward(tuple(read[:, row_of] for read in reads), context)

    def for_nodes(self, nodes: Int[Tensor, " n"]) -> Core:
        """The core of a row of nodes picked, with repetition, out of the stage's."""
        return self

    @property
    def n_parameters(self) -> int:
        """Numbers stored in the core itself, weights of reads and writes apart."""
        return 0


@tree.register
@dataclass(frozen=True, eq=False)
class Lookup(Core):
    """code = scale * table[token], or table[position]."""

    table: Float[Tensor, "rows d_model"]
    source: str = "token"
    scale: float = 1.0

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        if self.source == "position":
            rows = self.table[: context.n_pos]
            return repeat(rows, "pos d -> batch 1 pos d", batch=context.inputs.shape[0])
        rows = self.table[context.inputs]
        if self.scale != 1.0:
            rows = rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)
        return rearrange(rows, "batch pos d -> batch 1 pos d")

    @property
    def n_parameters(self) -> int:
        return self.table.numel()


@tree.register
@dataclass(frozen=True, eq=False)
class FloatInput(Core):
    """code = the input itself, for networks that read real vectors.

    Attributes:
        size: how many numbers an input has.
        n_nodes: how many nodes share them out in equal blocks: the colours of an image.
    """

    size: int
    n_nodes: int = 1

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        if not context.inputs.is_floating_point() or context.inputs.shape[-1] != self.size:
            raise InputError(
                f"this graph reads real vectors [batch, pos, {self.size}], got {context.inputs.dtype} of shape "
                f"{tuple(context.inputs.shape)}"
            )
        return rearrange(context.inputs, "batch pos (node w) -> batch node pos w", node=self.n_nodes)


@tree.register
@dataclass(frozen=True, eq=False)
class Activation(Core):
    """code = act(a), or act(gate) * up when there are two reads."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise InputError(f"unknown activation {self.name!r}; known: {sorted(ACTIVATIONS)}")

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        hidden = ACTIVATIONS[self.name](reads[0])
        return hidden * reads[1] if len(reads) == 2 else hidden


@tree.register
@dataclass(frozen=True, eq=False)
class Readout(Core):
    """code = the network's output, softly capped if asked: cap * tanh(a / cap)."""

    softcap: float | None = None
    scale: float = 1.0

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        (logits,) = reads
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@tree.register
@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding on the first ``2 * planes`` coordinates of a head, halves apart.

    Coordinates (i, planes + i) turn by the angle pos * inv_freq[i]; cos and sin are multiplied by ``scaling``
    (YaRN, LongRoPE). Source: Su et al. 2021.
    """

    inv_freq: Float[Tensor, " planes"]
    scaling: float = 1.0

    def tables(self, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each ``[pos planes]``, made once per run."""

        def table(function: Callable[[Tensor], Tensor]) -> Tensor:
            pos = torch.arange(context.n_pos, device=self.inv_freq.device).float()
            angles = pos[:, None] * self.inv_freq.float()
            return (function(angles) * self.scaling).to(dtype)

        key = (id(self.inv_freq), self.scaling, dtype)
        return context.once((*key, "cos"), lambda: table(torch.cos)), context.once(
            (*key, "sin"), lambda: table(torch.sin)
        )

    def turn(self, x: Float[Tensor, "batch node pos width"], context: Context) -> Float[Tensor, "batch node pos width"]:
        cos, sin = self.tables(context, x.dtype)
        planes = cos.shape[-1]
        # one split, whose backward is one concatenation: slices would each write a tensor of zeros
        a, b, *rest = x.split([planes, planes, x.shape[-1] - 2 * planes][: 2 + (x.shape[-1] > 2 * planes)], dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, *rest), dim=-1)


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


@tree.register
@dataclass(frozen=True, eq=False)
class Attention(Core):
    """code_h = softmax(mask(cap(scale * q_h k_h^T))) v_h for every head h.

    Attributes:
        n_heads: the nodes of the stage: query heads, or their parts, which share a pattern.
        n_kv_heads: key-value heads; query head h uses number h * n_kv_heads // n_heads.
        scale: what scores are multiplied with.
        causal: whether a position sees only itself and earlier ones.
        window: how many positions a query sees, itself included; None for all.
        softcap: scores become cap * tanh(score / cap).
    """

    n_heads: int
    n_kv_heads: int
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    rotary: Rotary | None = None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def for_nodes(self, nodes: Int[Tensor, " n"]) -> Core:
        return dataclasses.replace(self, n_heads=len(nodes), n_kv_heads=len(nodes))

    def queries_and_keys(self, q: Tensor, k: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """q and k after their norms and rotations, one of each per node."""
        if self.q_norm is not None:
            q = self.q_norm.apply(q)
        if self.k_norm is not None:
            k = self.k_norm.apply(k)
        if self.rotary is not None:
            q, k = self.rotary.turn(q, context), self.rotary.turn(k, context)
        return self._per_query_head(q), self._per_query_head(k)

    def _per_query_head(self, x: Float[Tensor, "batch blocks pos width"]) -> Float[Tensor, "batch node pos width"]:
        copies = self.n_heads // x.shape[1]
        return x if copies <= 1 else repeat(x, "b n t w -> b (n c) t w", c=copies)

    def visible(self, context: Context) -> Bool[Tensor, "#batch 1 pos pos"] | None:
        """Which keys each query may see; None where plain causal (or full) attention says it all."""
        n = context.n_pos
        windowed = self.window is not None and self.window < n
        if context.mask is None and not windowed:
            return None

        def make() -> Tensor:
            pos = torch.arange(n, device=context.inputs.device)
            distance = pos[:, None] - pos
            seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                seen = seen & (distance.abs() < self.window)
            if context.mask is not None:
                # a padded query sees itself, so that no row is empty; what it writes is never read
                seen = (seen & context.mask[:, None, :]) | (distance == 0)
            return seen[:, None] if seen.ndim == 3 else seen[None, None]

        return context.once(("visible", self.causal, self.window), make)

    def pattern(self, q: Tensor, k: Tensor, context: Context) -> Float[Tensor, "batch node query key"]:
        """Attention probabilities, from raw q and k reads."""
        q, k = self.queries_and_keys(q, k, context)
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        seen = self.visible(context)
        if seen is None and self.causal:
            seen = torch.ones(context.n_pos, context.n_pos, dtype=torch.bool, device=q.device).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)

    def mix(self, pattern: Tensor, v: Tensor) -> Float[Tensor, "batch node pos width"]:
        """Codes from a given attention pattern."""
        return pattern @ self._per_query_head(v)

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        q, k, v = reads
        if self.softcap is not None:
            return self.mix(self.pattern(q, k, context), v)
        q, k = self.queries_and_keys(q, k, context)
        seen = self.visible(context)
        causal = self.causal and seen is None
        v = self._per_query_head(v)
        # the fused kernels want queries, keys and values of one width; zeros change nothing
        q, k, padded = (_widen(x, max(q.shape[-1], v.shape[-1])) for x in (q, k, v))
        codes = F.scaled_dot_product_attention(q, k, padded, attn_mask=seen, is_causal=causal, scale=self.scale)
        return codes[..., : v.shape[-1]]

    @property
    def n_parameters(self) -> int:
        return sum(norm.n_parameters for norm in (self.q_norm, self.k_norm) if norm is not None)
