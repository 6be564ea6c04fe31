"""Sparse dictionaries: latents of an activation, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave import tree
from unweave.errors import InputError, ShapeError

__all__ = ["LATENT_ACTIVATIONS", "Dictionary"]

LATENT_ACTIVATIONS = ("identity", "jumprelu", "relu", "topk")


@tree.register
@dataclass(frozen=True, eq=False)
class Dictionary:
    """Latents of an activation, f = act(E x + e), and what they say of it, x^ = D f + d.

    act is "relu"; "topk": relu of the k largest, the rest zero; "jumprelu": z where z > threshold, else zero;
    "identity": a basis, a change of coordinates. A transcoder says of what a layer writes, from what it reads.

    Attributes:
        encoder, encoder_bias: E and e.
        decoder, decoder_bias: D and d.
        activation: one of :data:`LATENT_ACTIVATIONS`.
        k: of "topk".
        threshold: of "jumprelu".
        is_transcoder: whether x^ is of the layer's output and x its normalised input.

    Raises:
        InputError: an unknown activation, or k or the threshold is missing or does not fit.
        ShapeError: tensors that do not fit each other.
    """

    encoder: Float[Tensor, "latents d_in"]
    encoder_bias: Float[Tensor, " latents"]
    decoder: Float[Tensor, "d_out latents"]
    decoder_bias: Float[Tensor, " d_out"]
    activation: str = "relu"
    k: int | None = None
    threshold: Float[Tensor, " latents"] | None = None
    is_transcoder: bool = False

    def __post_init__(self) -> None:
        if self.activation not in LATENT_ACTIVATIONS:
            raise InputError(f"unknown activation {self.activation!r} of latents; known: {LATENT_ACTIVATIONS}")
        n, d_out = self.encoder.shape[0], self.decoder.shape[0]
        fits = self.encoder_bias.shape == (n,) and self.decoder.shape == (d_out, n) and n > 0
        if not fits or self.decoder_bias.shape != (d_out,) or (not self.is_transcoder and d_out != self.d_in):
            shapes = [tuple(t.shape) for t in (self.encoder, self.encoder_bias, self.decoder, self.decoder_bias)]
            raise ShapeError(
                f"encoder [latents d_in], its bias, decoder [d_out latents] and its bias do not fit: {shapes}"
            )
        if (self.activation == "topk") != (self.k is not None) or not 1 <= (self.k or 1) <= n:
            raise InputError(f"k goes with 'topk' and must be 1..{n}, got {self.k!r} for {self.activation!r}")
        given = None if self.threshold is None else tuple(self.threshold.shape)
        if given != ((n,) if self.activation == "jumprelu" else None):
            raise InputError(f"'jumprelu' needs a threshold for each of {n} latents, others none; got {given}")

    @property
    def n_latents(self) -> int:
        """How many latents there are."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """The width of what is encoded."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """The width of what is decoded."""
        return self.decoder.shape[0]

    def to(self, like: Tensor) -> Dictionary:
        """The dictionary on another tensor's device and in its precision."""
        return tree.map_tensors(self, lambda t: t.to(like))

    def active(self, before: Float[Tensor, "... latents"]) -> Bool[Tensor, "... latents"]:
        """Which latents pass what E x + e gives them; the others are zero."""
        if self.activation == "identity":
            return torch.ones_like(before, dtype=torch.bool)
        if self.threshold is not None:
            return before > self.threshold
        if self.k is None:
            return before > 0
        best = before.topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(before, dtype=torch.bool).scatter(-1, best, True) & (before > 0)

    def activate(self, before: Float[Tensor, "... latents"]) -> Float[Tensor, "... latents"]:
        """The latents, from E x + e."""
        return before if self.activation == "identity" else torch.where(self.active(before), before, 0.0)

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... latents"]:
        """The latents of x."""
        return self.activate(torch.nn.functional.linear(x, self.encoder, self.encoder_bias))

    def decode(self, latents: Float[Tensor, "... latents"]) -> Float[Tensor, "... d_out"]:
        """What the latents say."""
        return torch.nn.functional.linear(latents, self.decoder, self.decoder_bias)

    @property
    def n_parameters(self) -> int:
        """Stored numbers."""
        return sum(t.numel() for t in tree.tensors(self).values())
