"""A linear probe from sums over the data: regression for numbers, discriminants for classes, both in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.errors import EmptyDataError, InputError, NonFiniteError, ShapeError

__all__ = ["LinearProbe", "ProbeSums", "fit_probe", "moments_probe", "probe_sums"]

ProbeSums = Mapping[str, Tensor]
# singular values below this share of the largest are rounding
RANK_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """outputs = weight x + bias: the number, or a score for each class.

    Attributes:
        weight, bias: ``[out width]``, ``[out]``, float64.
        classes: how many; 0 for a number.
        mean, covariance: of the activations it was fitted on.
        label_mean: the number's mean, or the share of each class.
    """

    weight: Float[Tensor, "out width"]
    bias: Float[Tensor, " out"]
    classes: int
    mean: Float[Tensor, " width"]
    covariance: Float[Tensor, "width width"]
    label_mean: Float[Tensor, " out"]

    def outputs(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows out"]:
        """The number, or every class's score (log-probability up to a constant), in float64."""
        return x.double() @ self.weight.to(x.device).T + self.bias.to(x.device)

    def predict(self, x: Float[Tensor, "*rows width"]) -> Tensor:
        """The number, or the class of the highest score."""
        out = self.outputs(x)
        return out.argmax(-1) if self.classes else out[..., 0]

    def directions(self, rank: int | None = None) -> Float[Tensor, "rank width"]:
        """The directions that it reads, orthonormal, the strongest first: what it tells classes apart by.

        Args:
            rank: at most so many; by default all that differ from rounding.

        Raises:
            InputError: a rank below 1.
        """
        if rank is not None and rank < 1:
            raise InputError(f"rank must be at least 1, got {rank}")
        weight = self.weight
        if self.classes:
            seen = self.label_mean > 0
            weight = weight[seen] - weight[seen].mean(0)
        _, values, rows = torch.linalg.svd(weight, full_matrices=False)
        return rows[values > RANK_TOLERANCE * values.max().clamp(min=1e-300)][:rank]


def probe_sums(
    x: Float[Tensor, "batch pos width"], labels: Float[Tensor, "batch pos k"], said: Bool[Tensor, "batch pos"]
) -> dict[str, Tensor]:
    """The sums that :func:`fit_probe` needs, over the positions with a label; sums of parts of the data add up.

    Args:
        labels: a column per class (1 or 0), or the number.

    Raises:
        NonFiniteError: an activation is NaN or infinite.
    """
    rows, columns = x[said].double(), labels.to(x.device)[said].double()
    if not bool(rows.isfinite().all()):
        raise NonFiniteError("an activation is NaN or infinite; run the graph in float32")
    return {
        "n": torch.tensor(float(len(rows)), dtype=torch.float64),
        "x": rows.sum(0),
        "xx": rows.T @ rows,
        "y": columns.sum(0),
        "yx": columns.T @ rows,
    }


def fit_probe(sums: ProbeSums, classes: int, ridge: float = 1e-4) -> LinearProbe:
    """The best linear probe for these sums.

    With C the covariance of x, m its mean and r = ridge tr(C) / width: a number is ridge regression, w = (C + r 1)^-1
    cov(x, y). Classes are linear discriminants: with m_c and p_c the mean and share of class c and S = C - sum_c p_c
    (m_c - m)(m_c - m)^T the covariance within classes, the score of c is m_c^T (S + r 1)^-1 (x - m_c / 2) + log p_c.

    Args:
        sums: from :func:`probe_sums`, added up.
        classes: how many; 0 for a number.
        ridge: how much of the mean variance is added to every direction.

    Raises:
        EmptyDataError: no labelled position, or one class only.
        InputError: a ridge that is not positive.
        ShapeError: not one column per class.

    Cost:
        One solve of width x width; memory for the sums does not grow with the data.

    Exact?
        Up to rounding. Discriminants are the best classifier where classes are normal with one covariance; elsewhere
        logistic regression may read a little more.

    Example:
        >>> x = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]]])
        >>> probe = fit_probe(probe_sums(x, 2 * x[..., :1], torch.ones(1, 3, dtype=torch.bool)), 0, ridge=1e-9)
        >>> [round(v, 4) for v in probe.weight[0].abs().tolist()]
        [2.0, 0.0]

    Source:
        Fisher 1936; Hoerl and Kennard 1970.
    """
    if not (ridge > 0 and math.isfinite(ridge)):
        raise InputError(f"ridge must be positive, got {ridge}")
    if len(sums["y"]) != (classes or 1):
        raise ShapeError(f"{len(sums['y'])} columns of labels do not fit {classes} classes")
    n = sums["n"]
    if float(n) == 0 or (classes and int((sums["y"] > 0).sum()) < 2):
        raise EmptyDataError("a probe needs labelled positions, of two classes at least; give more data")
    mean, label_mean = sums["x"] / n, sums["y"] / n
    covariance = sums["xx"] / n - torch.outer(mean, mean)
    added = (ridge * covariance.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(mean)).to(covariance)
    if not classes:
        shared = sums["yx"] / n - label_mean[:, None] * mean
        weight = torch.linalg.solve(covariance + added, shared.T).T
        return LinearProbe(weight, label_mean - weight @ mean, 0, mean, covariance, label_mean)
    seen = label_mean > 0
    # a class that never came is given the mean, and a score that never wins
    means = torch.where(seen[:, None], sums["yx"] / sums["y"].clamp(min=1)[:, None], mean)
    off = (means - mean) * label_mean.sqrt()[:, None]
    weight = torch.linalg.solve(covariance - off.T @ off + added, means.T).T
    bias = label_mean.log() - 0.5 * (weight * means).sum(1)
    return LinearProbe(weight, bias, classes, mean, covariance, label_mean)


def moments_probe(x: Float[Tensor, "n width"], labels: Float[Tensor, "n k"], classes: int) -> LinearProbe:
    """A probe that says nothing yet, with the mean, the covariance and the label's mean that every probe keeps."""
    mean, label_mean = x.double().mean(0), labels.double().mean(0)
    off = x.double() - mean
    zero = torch.zeros(labels.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    return LinearProbe(zero, zero[:, 0], classes, mean, off.T @ off / len(x), label_mean)
