"""Logistic probes: the classifier that maximises the likelihood of the labels, its penalty chosen on held-out ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from unweave.errors import EmptyDataError, InputError, NonFiniteError
from unweave.probes.fitting import LinearProbe, moments_probe

__all__ = ["PENALTIES", "choose_penalty", "fit_logistic", "logistic_probe"]

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# share of the labels, the last ones, that choose the penalty
VALIDATION = 0.2
ITERATIONS = 300

Weights = Float[np.ndarray, "classes width_1"]


def fit_logistic(
    x: Float[Tensor, "n width"], label: Int[Tensor, " n"], classes: int, penalty: float, start: Weights | None = None
) -> tuple[Float[Tensor, "classes width"], Float[Tensor, " classes"], Weights]:
    """Multinomial logistic regression: minimises over W and b

        mean_i -log softmax(W z_i + b)_{y_i} + penalty / 2 (|W|^2 + |b|^2),   z = (x - mean) / s,

    s^2 the mean variance of the coordinates of x. All classes have scores, those that never came, too.

    Args:
        penalty: above 0, so that there is one minimum, and no probability is zero.
        start: what a fit before this one returned last.

    Returns:
        (weight and bias in terms of x, float64; the same in terms of z, to start the next fit from).

    Raises:
        InputError: fewer than 2 classes, a label out of range, or a penalty that is not positive.
        EmptyDataError: no labels.
        NonFiniteError: an activation is NaN or infinite.

    Cost:
        Some tens of products of n x width x classes (at most 300), L-BFGS in float64.

    Exact?
        To the tolerance of L-BFGS.

    Example:
        >>> x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]])
        >>> weight, bias, _ = fit_logistic(x, torch.tensor([0, 0, 1, 1]), 2, 0.01)
        >>> bool(weight[1] > 0 > weight[0]), bool(bias.abs().max() < 1e-6)
        (True, True)
    """
    _check(x, label, classes, penalty)
    wide = x.double().cpu()
    mean = wide.mean(0)
    scale = float((wide - mean).square().mean().sqrt()) or 1.0
    z = torch.cat([(wide - mean) / scale, torch.ones(len(wide), 1).double()], dim=1).numpy()
    truth = np.eye(classes)[label.cpu().numpy()]
    # in coordinates in which the loss curves alike in all directions, tens of steps suffice
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    sizes = np.sqrt(values.clip(min=0) + penalty)
    rows = z @ (vectors / sizes)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        turned = flat.reshape(classes, -1)
        logs, weight = log_softmax(rows @ turned.T, axis=1), turned / sizes
        slope = (np.exp(logs) - truth).T @ rows / len(rows) + penalty * weight / sizes
        return float(-(truth * logs).sum() / len(rows) + penalty / 2 * (weight**2).sum()), slope.ravel()

    first = np.zeros((classes, z.shape[1])) if start is None else start @ vectors * sizes
    options: dict[str, Any] = {"maxiter": ITERATIONS, "gtol": 1e-6, "ftol": 1e-12}
    found: np.ndarray = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options).x
    own = (found.reshape(classes, -1) / sizes) @ vectors.T
    weight = torch.from_numpy(own[:, :-1].copy()) / scale
    return weight, torch.from_numpy(own[:, -1].copy()) - weight @ mean, own


def _check(x: Tensor, label: Tensor, classes: int, penalty: float) -> None:
    if classes < 2 or not (penalty > 0 and math.isfinite(penalty)):
        raise InputError(f"give at least 2 classes and a positive penalty, got {classes} and {penalty}")
    if len(x) == 0:
        raise EmptyDataError("a probe needs labelled positions; give more data")
    if int(label.min()) < 0 or int(label.max()) >= classes:
        raise InputError(f"labels must be 0..{classes - 1}, got {int(label.min())}..{int(label.max())}")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("an activation is NaN or infinite; run the graph in float32")


def choose_penalty(x: Float[Tensor, "n width"], label: Int[Tensor, " n"], classes: int) -> float:
    """The one of :data:`PENALTIES` under which a fit to the first 80% says the last 20% best; the largest of few."""
    n = len(x) - math.ceil(VALIDATION * len(x))
    if n == 0:
        return PENALTIES[0]
    losses, own = [], None
    for penalty in PENALTIES:
        weight, bias, own = fit_logistic(x[:n], label[:n], classes, penalty, own)
        outputs = x[n:].double().cpu() @ weight.T + bias
        losses.append(float(torch.nn.functional.cross_entropy(outputs, label[n:].cpu().long())))
    return PENALTIES[int(np.argmin(losses))]


def logistic_probe(x: Float[Tensor, "n width"], label: Int[Tensor, " n"], classes: int) -> LinearProbe:
    """A logistic probe of all labels, with the penalty that :func:`choose_penalty` takes.

    Args:
        x, label: in an order in which the last fifth is of other sequences than the rest.

    Raises:
        InputError, EmptyDataError, NonFiniteError: see :func:`fit_logistic`.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = logistic_probe(x, (x[:, 0] > 0).long(), 2)
        >>> float((probe.predict(x) == (x[:, 0] > 0)).double().mean()) > 0.95
        True
    """
    weight, bias, _ = fit_logistic(x, label, classes, choose_penalty(x, label, classes))
    plain = moments_probe(x, torch.nn.functional.one_hot(label.long(), classes).double(), classes)
    return dataclasses.replace(plain, weight=weight.to(x.device), bias=bias.to(x.device))
