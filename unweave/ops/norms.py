"""Normalisations in front of a port, with their vector-Jacobian products in closed form.

The closed form is what lets one backward pass give the gradient at every port of every head apart,
without copying the residual stream once per port in the forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unweave import tree

__all__ = ["LayerNorm", "Norm", "RMSNorm", "norm_bias", "wide"]


class Norm(ABC):
    """A normalisation over the last dimension."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normalised x, gain and bias included."""

    @abstractmethod
    def standardise(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
        """(n, s): x before gain and bias, and the factor it was divided by, as 1 / standard deviation.

        With them a read W of the norm has the Jacobian s F (I - n n^T / d), where F = :meth:`fold` (W).
        """

    @abstractmethod
    def fold(self, weight: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """A read's weight with the linear part of the norm (gain, centring) multiplied in."""

    def vjp(self, x: Float[Tensor, "... d"], g: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """J(x)^T g, where J is the Jacobian of ``apply`` at x; x and g broadcast."""
        normed, inverse = self.standardise(x)
        g = self.fold(g)
        return inverse * (g - normed * (g * normed).mean(-1, keepdim=True))

    @property
    def is_linear(self) -> bool:
        """Whether the scale is held, so that the Jacobian is s F alone."""
        return False

    def for_nodes(self, nodes: Int[Tensor, " n"]) -> Norm:
        """The norm in front of a row of nodes picked, with repetition, out of a stage's."""
        return self

    @property
    def n_parameters(self) -> int:
        return sum(t.numel() for t in tree.tensors(self).values())


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@tree.register
@dataclass(frozen=True, eq=False)
class RMSNorm(Norm):
    """gain * x / sqrt(mean(x^2) + eps). Source: Zhang & Sennrich 2019.

    ``gain_in_float32`` multiplies before rounding back to the input's precision (Gemma) instead of after
    (Llama); in float32 both are the same.
    """

    gain: Float[Tensor, " d"]
    eps: float
    gain_in_float32: bool = False

    def scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The factor that ``apply`` multiplies x with, coordinate by coordinate."""
        return (self.gain * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def apply(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        widened = wide(x)
        normed = widened * torch.rsqrt(widened.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.gain_in_float32:
            return (normed * wide(self.gain)).to(x.dtype)
        return self.gain * normed.to(x.dtype)

    def standardise(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * inverse, inverse

    def fold(self, weight: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return weight * self.gain


@tree.register
@dataclass(frozen=True, eq=False)
class LayerNorm(Norm):
    """gain * (x - mean(x)) / sqrt(var(x) + eps) + bias. Source: Ba et al. 2016."""

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"] | None
    eps: float

    def apply(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)

    def standardise(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
        centred = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)
        return centred * inverse, inverse

    def fold(self, weight: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        weight = weight * self.gain
        return weight - weight.mean(-1, keepdim=True)


def norm_bias(norm: Norm | None, like: Float[Tensor, "... d"]) -> Float[Tensor, " d"]:
    """The constant that a norm adds, whatever it hears."""
    if isinstance(norm, LayerNorm) and norm.bias is not None:
        return norm.bias.to(like)
    return like.new_zeros(like.shape[-1])
