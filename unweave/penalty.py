"""Penalties that make a network in training easy to take apart: add one, times a strength, to any loss.

None of them needs a graph: they take the model or its weight matrices, and are differentiable in the weights.

- :func:`edge_nats_penalty`: how many single weights carry nats of output (few weights);
- :func:`cut_penalty`: how much weight runs between places that are far apart (few connections between modules);
- :func:`rank_penalty`: how many directions the matrices use (narrow channels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from unweave.errors import InputError, NonFiniteError, ShapeError, UnknownNameError

__all__ = ["SPECTRAL_KINDS", "cut_penalty", "edge_nats", "edge_nats_penalty", "rank_penalty"]

SPECTRAL_KINDS = ("log-det", "nuclear")


# ---- nats ------------------------------------------------------------------------------------------------


def edge_nats(
    model: nn.Module,
    inputs: Tensor,
    *,
    where: Bool[Tensor, "batch pos"] | None = None,
    labels: Int[Tensor, "batch *pos"] | None = None,
    names: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """What each weight is worth, in nats per sequence, to second order.

    nats(w) = 1/2 E[(w d log p(y) / d w)^2], with y drawn from the model's own output p at every position: the
    second-order term of the KL between the model and the model without w. (The first-order term vanishes.)

    Args:
        model: gives logits ``[batch classes]`` or ``[batch pos classes]``, or an object that has them as ``logits``.
            Whatever couples the sequences of a batch (batch norm in training mode) or draws at random (dropout) has
            to be switched off.
        inputs: what the model is called with, batch first.
        where: which positions count; all of them when missing.
        labels: y, drawn here when missing.
        names: of the parameters to score; by default those with at least two dimensions, biases left out.
        generator: of the labels, on the device of the logits.

    Returns:
        By name of the parameter, a tensor of its shape; differentiable in all parameters that ask for it (twice,
        so activations with a kink contribute nothing there).

    Raises:
        UnknownNameError: no parameter of that name.
        ShapeError: logits, labels and ``where`` do not fit each other, or there is no sequence.
        NonFiniteError: a logit is NaN or infinite.

    Cost:
        A forward and a backward pass, and memory for the gradient of every weight for every sequence: a few dozen
        sequences per step do.

    Exact?
        The second order of cutting one weight to zero, estimated from one label per position: unbiased.

    Example:
        >>> model = nn.Linear(2, 3, bias=False)
        >>> nats = edge_nats(model, torch.randn(8, 2))
        >>> nats["weight"].shape, bool((nats["weight"] >= 0).all())
        (torch.Size([3, 2]), True)

    Source:
        LeCun et al. 1989, "Optimal Brain Damage"; with the Fisher information in place of the Hessian.
    """
    parameters = dict(model.named_parameters())
    chosen = _chosen(parameters, names)
    rest = {name: p for name, p in parameters.items() if name not in chosen} | dict(model.named_buffers())
    labels = _labels(model, inputs, labels, generator)
    if where is not None and where.shape != labels.shape:
        raise ShapeError(f"where must mark {tuple(labels.shape)} labels, got {tuple(where.shape)}")
    counts = torch.ones_like(labels, dtype=torch.bool) if where is None else where.to(labels.device)

    def log_p(weights: Mapping[str, Tensor], x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
        logits = _logits(functional_call(model, {**rest, **weights}, (x[None],)))[0]
        told = F.log_softmax(logits, -1).gather(-1, y[..., None])[..., 0]
        return torch.where(counted, told, 0.0).sum()

    gradients = vmap(grad(log_p), in_dims=(None, 0, 0, 0))(chosen, inputs, labels, counts)
    return {name: 0.5 * weight.square() * gradients[name].square().mean(0) for name, weight in chosen.items()}


def edge_nats_penalty(
    model: nn.Module,
    inputs: Tensor,
    *,
    floor: float = 1e-4,
    where: Bool[Tensor, "batch pos"] | None = None,
    labels: Int[Tensor, "batch *pos"] | None = None,
    names: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """A soft count of the weights worth more than ``floor`` nats.

    sum over weights of log(1 + nats(w) / floor), with nats as in :func:`edge_nats`: a weight worth far less than
    ``floor`` costs next to nothing, one worth e times as much as another costs about 1 more. Small weights feel it
    most, so that few large ones remain; a plain sum of nats would shrink them all.

    Args:
        floor: nats below which a weight hardly counts: about the divergence to be allowed over the number of weights.
        model, inputs, where, labels, names, generator: see :func:`edge_nats`.

    Raises:
        InputError: ``floor`` is not positive.

    Cost:
        See :func:`edge_nats`; its backward pass costs about three times as much.

    Exact?
        Differentiable; unbiased as to nats, slightly low as to their logarithm (Jensen) for small batches.

    Example:
        >>> import unweave
        >>> from unweave import zoo
        >>> model, data = zoo.load("modular_addition"), unweave.load_data("zoo:modular_addition", limit=4)
        >>> last = data.labels["answered"]
        >>> bool(edge_nats_penalty(model, data.tokens.long(), where=last) > 0)
        True
    """
    if not (floor > 0 and math.isfinite(floor)):
        raise InputError(f"floor must be a positive number of nats, got {floor}")
    nats = edge_nats(model, inputs, where=where, labels=labels, names=names, generator=generator)
    return torch.stack([(n / floor).log1p().sum() for n in nats.values()]).sum()


def _chosen(parameters: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[str, Tensor]:
    if names is None:
        names = [name for name, p in parameters.items() if p.ndim >= 2]
    for name in names:
        if name not in parameters:
            raise UnknownNameError("parameter", name, parameters)
    if not names:
        raise InputError("the model has no weight matrix to score; name the parameters in names=")
    return {name: parameters[name] for name in names}


def _logits(out: object) -> Tensor:
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(f"the model must give logits, or an object that has them; got a {type(out).__name__}")
    return logits


@torch.no_grad()
def _labels(
    model: nn.Module, inputs: Tensor, given: Tensor | None, generator: torch.Generator | None
) -> Int[Tensor, "batch *pos"]:
    """The labels given, after a check of their shape, or some drawn from what the model says."""
    if len(inputs) == 0:
        raise ShapeError("the batch holds no sequence; nothing can be scored on it")
    logits = _logits(model(inputs))
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("the model's logits hold NaN or inf; lower the learning rate or the penalty's strength")
    if given is None:
        p = logits.float().softmax(-1)
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator)[:, 0].reshape(p.shape[:-1])
    if given.shape != logits.shape[:-1] or given.is_floating_point():
        raise ShapeError(
            f"labels must be integers {tuple(logits.shape[:-1])}, one for each of the model's outputs; got "
            f"{given.dtype} {tuple(given.shape)}"
        )
    return given


# ---- cuts ------------------------------------------------------------------------------------------------


def cut_penalty(
    weights: Sequence[Float[Tensor, "_ _"]], places: Sequence[Float[Tensor, "_ dims"]], *, normalised: bool = False
) -> Float[Tensor, ""]:
    """How much weight connects places that are far apart.

    sum over matrices and entries of |W_ij| d(p_i, p_j), with d = 1/2 sum over coordinates |p_i - p_j|. Where places
    are coordinates (neurons on a line, say), this is wiring length, and modules appear wherever it is cheap; where
    they are one-hot groups, d is 0 within a group and 1 between groups, and the sum is the mass of the cut; soft
    groups (rows that sum to 1) may be trained along.

    Args:
        weights: matrices ``[out, in]``, each reading what the one before gives (activations between them).
        places: where the units are: of the first matrix's inputs, then of each matrix's outputs.
        normalised: divide by the mass sum |W_ij|, so that shrinking all weights alike gains nothing: the share of
            mass that is cut, or the mean length of a connection.

    Returns:
        A number, differentiable in weights and places (with slope 0 at a weight of 0).

    Raises:
        ShapeError: places and matrices do not fit each other.

    Cost:
        One pass over the weights.

    Exact?
        Yes.

    Example:
        >>> sides = torch.eye(2)[[0, 0, 1]]
        >>> weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]])
        >>> float(cut_penalty([weight], [sides, torch.eye(2)]))
        3.0

    Source:
        Liu et al. 2023, "Seeing is Believing: Brain-Inspired Modular Training for Mechanistic Interpretability".
    """
    if len(places) != len(weights) + 1 or not weights:
        raise ShapeError(f"{len(weights)} matrices need places for {len(weights) + 1} rows of units, got {len(places)}")
    cut, mass = [], []
    for k, weight in enumerate(weights):
        before, after = places[k].to(weight), places[k + 1].to(weight)
        if weight.shape != (len(after), len(before)):
            raise ShapeError(
                f"matrix {k} has shape {tuple(weight.shape)}, but places name {len(after)} outputs and {len(before)} "
                "inputs; give matrices as [out, in], as nn.Linear stores them"
            )
        distance = 0.5 * (after[:, None] - before).abs().sum(-1)
        cut.append((weight.abs() * distance).sum())
        mass.append(weight.abs().sum())
    total = torch.stack(cut).sum()
    return total / torch.stack(mass).sum().clamp(min=torch.finfo(total.dtype).tiny) if normalised else total


# ---- ranks -----------------------------------------------------------------------------------------------


def rank_penalty(
    matrices: Sequence[Float[Tensor, "..."]], *, kind: str = "log-det", floor: float = 1e-2
) -> Float[Tensor, ""]:
    """A soft count of the directions that matrices use.

    With s their singular values, "log-det" is the sum of log(1 + (s / floor)^2) = log det(1 + W^T W / floor^2), which
    counts directions stronger than ``floor``, one that is e times stronger about 2 more; "nuclear" is the sum of s,
    convex, which also shrinks what stays.

    Args:
        matrices: ``[... rows columns]``: weights, or the products that matter: for attention ``W_V @ W_O`` and
            ``W_Q @ W_K.mT`` per head, whose rank is the head's whatever basis its code is written in.
        kind: "log-det" or "nuclear".
        floor: the strength below which a direction hardly counts ("log-det").

    Returns:
        A number, differentiable where singular values are positive ("nuclear") or everywhere ("log-det").

    Raises:
        InputError: an unknown kind, a floor that is not positive, or no matrix.
        ShapeError: a tensor of fewer than two dimensions.

    Cost:
        A decomposition per matrix: O(rows columns min(rows, columns)).

    Exact?
        Yes.

    Example:
        >>> float(rank_penalty([torch.diag(torch.tensor([3.0, 1.0]))], kind="nuclear"))
        4.0

    Source:
        Fazel, Hindi and Boyd 2003, "Log-det Heuristic for Matrix Rank Minimization".
    """
    if kind not in SPECTRAL_KINDS:
        raise InputError(f"unknown kind {kind!r} of rank penalty; known: {', '.join(SPECTRAL_KINDS)}")
    if not (floor > 0 and math.isfinite(floor)):
        raise InputError(f"floor must be a positive number, got {floor}")
    if not matrices:
        raise InputError("give at least one matrix to the rank penalty")
    for matrix in matrices:
        if matrix.ndim < 2:
            raise ShapeError(f"a matrix has at least two dimensions, got {tuple(matrix.shape)}; leave biases out")
    return torch.stack([_spectral(m if m.dtype == torch.float64 else m.float(), kind, floor) for m in matrices]).sum()


def _spectral(matrix: Float[Tensor, "*stack rows columns"], kind: str, floor: float) -> Float[Tensor, ""]:
    if kind == "nuclear":
        return torch.linalg.svdvals(matrix).sum()
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    gram = wide @ wide.mT / floor**2
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Cholesky's diagonal: stable, and differentiable where singular values are equal or zero
    return 2 * torch.linalg.cholesky(eye + gram).diagonal(dim1=-2, dim2=-1).log().sum()
