"""How much room features have: how they overlap and share dimensions, from their directions alone.

Source: Elhage et al. 2022 (Toy Models of Superposition: dimensionality, interference, features per dimension).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["dimensionality", "features_per_dimension", "interference"]


def interference(directions: Float[Tensor, "d features"]) -> Float[Tensor, "features features"]:
    """(w_i . w_j)^2 / |w_i|^2: how much of feature j is seen by who listens to i; 0 on the diagonal, float64.

    Example:
        >>> interference(torch.tensor([[2.0, -1.0], [0.0, 0.0]])).tolist()
        [[0.0, 1.0], [4.0, 0.0]]
    """
    return _overlaps(directions).fill_diagonal_(0)


def dimensionality(directions: Float[Tensor, "d features"]) -> Float[Tensor, " features"]:
    """The share of a dimension that each feature owns: D_i = |w_i|^2 / sum_j (w_i . w_j / |w_i|)^2; float64.

    1 where a feature shares its direction with none, 1/2 for antipodal pairs, 2/5 in a pentagon, 0 for a direction
    of length 0. The sum over features is at most the number of dimensions.

    Source: Elhage et al. 2022, "Feature dimensionality".

    Example:
        >>> dimensionality(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()
        [0.5, 0.5, 1.0]
    """
    overlaps = _overlaps(directions)
    return torch.where(overlaps.diagonal() > 0, overlaps.diagonal() / overlaps.sum(1).clamp(min=1e-300), 0.0)


def features_per_dimension(directions: Float[Tensor, "d features"]) -> float:
    """|W|_F^2 / d, which counts features where those represented have length 1; its inverse is D* of the paper.

    Example:
        >>> features_per_dimension(torch.tensor([[1.0, -1.0]]))
        2.0
    """
    return float(directions.double().square().sum()) / len(directions)


def _overlaps(directions: Float[Tensor, "d features"]) -> Float[Tensor, "features features"]:
    w = directions.double()
    lengths = w.norm(dim=0)
    return torch.where(lengths > 0, w.T / lengths.clamp(min=1e-300)[:, None] @ w, 0.0).square()
