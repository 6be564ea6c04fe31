"""What a sparse dictionary is trained for.

In units in which inputs are centred and each token has a square of d on average, per token

    |y - x^|^2 / d + penalty * (number of latents above their threshold, or sum of latents) + 1/32 * auxiliary loss

The number of latents ("jumprelu") has straight-through gradients for the threshold: d/dt H(z - t) = -K((z - t) / w) / w
and d/dt JumpReLU = -t K((z - t) / w) / w, K the box of height 1 on [-1/2, 1/2]. "topk" keeps the k largest latents of
every token, "batchtopk" the k n largest of a piece of n tokens. The auxiliary loss lets latents that have not fired for
long reconstruct what the others leave out.
Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders"; Rajamanoharan et al. 2024, "Jumping Ahead:
Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders"; Bussmann et al. 2024, "BatchTopK Sparse
Autoencoders".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.features.recipes import Recipe

__all__ = ["Weights", "first_weights", "jump", "least_kept", "loss_of", "step"]

AUXILIARY = 1 / 32
FIRST_THRESHOLD = 0.1

Weights = dict[str, Tensor]


class _Jump(torch.autograd.Function):
    """JumpReLU with a straight-through gradient for the threshold."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(before, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(before > threshold, before, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        before, threshold = ctx.saved_tensors
        box = _box(before, threshold, ctx.bandwidth)
        return grad * (before > threshold), (-threshold * box * grad).sum(0), None


class _Step(torch.autograd.Function):
    """The Heaviside step with a straight-through gradient for the threshold alone."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(before, threshold)
        ctx.bandwidth = bandwidth
        return (before > threshold).to(before)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        before, threshold = ctx.saved_tensors
        return None, (-_box(before, threshold, ctx.bandwidth) * grad).sum(0), None


def _box(before: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((before - threshold).abs() < bandwidth / 2).to(before) / bandwidth


def jump(
    before: Float[Tensor, "tokens latents"], threshold: Float[Tensor, " latents"], bandwidth: float
) -> Float[Tensor, "tokens latents"]:
    """JumpReLU; its gradient is exact in ``before`` and straight-through in the threshold (module's text)."""
    out: Tensor = _Jump.apply(before, threshold, bandwidth)
    return out


def step(
    before: Float[Tensor, "tokens latents"], threshold: Float[Tensor, " latents"], bandwidth: float
) -> Float[Tensor, "tokens latents"]:
    """1 above the threshold, 0 else; straight-through gradient in the threshold, none in ``before``."""
    out: Tensor = _Step.apply(before, threshold, bandwidth)
    return out


def first_weights(recipe: Recipe, d_in: int, d_out: int, device: torch.device) -> Weights:
    """Random unit columns in the decoder, and the encoder its transpose where both are of one space."""
    generator = torch.Generator().manual_seed(recipe.seed)
    decoder = F.normalize(torch.randn(d_out, recipe.width, generator=generator), dim=0)
    encoder = decoder.T.clone()
    if d_in != d_out:
        encoder = F.normalize(torch.randn(recipe.width, d_in, generator=generator), dim=1)
    weights = {"encoder": encoder, "encoder_bias": torch.zeros(recipe.width), "decoder": decoder}
    weights["decoder_bias"] = torch.zeros(d_out)
    if recipe.kind == "jumprelu":
        weights["threshold"] = torch.full((recipe.width,), FIRST_THRESHOLD)
    return {name: w.to(device) for name, w in weights.items()}


def loss_of(
    weights: Weights,
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"],
    recipe: Recipe,
    rise: float,
    dead: Bool[Tensor, " latents"],
) -> tuple[Float[Tensor, ""], Bool[Tensor, " latents"]]:
    """(the loss, which latents fired), in the units of training.

    Args:
        rise: the share of the penalty that counts already.
        dead: latents that have not fired for long.
    """
    before = F.linear(x, weights["encoder"], weights["encoder_bias"])
    price = (recipe.penalty or 0.0) * rise
    if recipe.kind == "jumprelu":
        latents = jump(before, weights["threshold"], recipe.bandwidth)
        cost = price * step(before, weights["threshold"], recipe.bandwidth).sum(1).mean()
    elif recipe.kind == "relu":
        latents = before.relu()
        cost = price * latents.sum(1).mean()
    else:
        cost = before.new_zeros(())
        largest = _largest if recipe.kind == "topk" else _largest_of_all
        latents = largest(before, recipe.k or 1)
    left_over = y - F.linear(latents, weights["decoder"], weights["decoder_bias"])
    value = left_over.square().mean() + cost + AUXILIARY * _auxiliary(weights, before, left_over.detach(), dead)
    return value, (latents > 0).any(0)


def _largest(before: Float[Tensor, "tokens latents"], k: int) -> Float[Tensor, "tokens latents"]:
    top = before.topk(k, dim=1, sorted=False)
    return torch.zeros_like(before).scatter(1, top.indices, top.values.relu())


def _largest_of_all(before: Float[Tensor, "tokens latents"], k: int) -> Float[Tensor, "tokens latents"]:
    return torch.where(before >= least_kept(before.detach(), k), before, 0.0)


def least_kept(before: Float[Tensor, "tokens latents"], k: int) -> Float[Tensor, ""]:
    """The smallest of the k n largest positive latents of n tokens; infinite where none is positive."""
    best = before.flatten().topk(k * len(before), sorted=False).values
    return torch.where(best > 0, best, torch.inf).min()


def _auxiliary(weights: Weights, before: Tensor, left_over: Tensor, dead: Bool[Tensor, " latents"]) -> Tensor:
    """The share of what was left over that the best dead latents leave over in turn."""
    k = min(left_over.shape[1] // 2, int(dead.sum()))
    if k == 0:
        return before.new_zeros(())
    latents = _largest(torch.where(dead, before, -torch.inf), k)
    again = left_over - latents @ weights["decoder"].T
    return again.square().mean() / (left_over - left_over.mean(0)).square().mean().clamp(min=1e-12)
