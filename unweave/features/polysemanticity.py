"""How many features drive each neuron."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.errors import ShapeError

__all__ = ["Polysemanticity", "polysemanticity"]


class Polysemanticity(NamedTuple):
    """How many features drive each neuron.

    Attributes:
        features: (sum_i a_i)^2 / sum_i a_i^2 with a_i = w_i^2 E f_i^2: 1 to the number of features; NaN if none does.
        null: the mean over neurons for neurons rotated at random, one per rotation, ascending.
        percentile: the share of rotations whose mean is below that of these neurons; near 0: the neurons are special.
    """

    features: Float[Tensor, " neurons"]
    null: Float[Tensor, " rotations"]
    percentile: float


def polysemanticity(
    weights: Float[Tensor, "neurons features"],
    power: Float[Tensor, " _"],
    *,
    rotations: int = 100,
    seed: int = 0,
) -> Polysemanticity:
    """How many features drive a neuron (a participation ratio), against neurons in random directions of their space.

    For kinds of data instead of features, see :func:`unweave.modules.traffic`.

    Args:
        weights: how strongly each feature drives each neuron, as written by a decoder.
        power: E f^2 of each feature ``[features]``.

    Raises:
        ShapeError: power is not one number per feature.

    Example:
        >>> polysemanticity(torch.eye(3), torch.ones(3), rotations=20).features.tolist()
        [1.0, 1.0, 1.0]
    """
    if power.shape != weights.shape[1:] or rotations < 1:
        raise ShapeError(f"power must have {weights.shape[1]} numbers, got {tuple(power.shape)}; {rotations} rotations")
    scaled = weights.double() * power.double().sqrt()
    own = _participation(scaled)
    generator = torch.Generator().manual_seed(seed)
    n = len(scaled)
    normal = torch.randn(rotations, n, n, generator=generator, dtype=torch.float64).to(scaled.device)
    turned, r = torch.linalg.qr(normal)
    # without the signs, QR does not draw rotations evenly
    turned = turned * r.diagonal(dim1=1, dim2=2).sign()[:, None]
    null = _participation(turned @ scaled).nanmean(1).sort().values
    return Polysemanticity(own, null, float((null < own.nanmean()).double().mean()))


def _participation(weights: Float[Tensor, "*some neurons features"]) -> Float[Tensor, "*some neurons"]:
    shares = weights.square()
    return shares.sum(-1).square() / shares.square().sum(-1)
