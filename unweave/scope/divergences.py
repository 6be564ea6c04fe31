"""How far two outputs are apart under a scope, and the gradients that measure it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.data import Batch
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.ops import wide
from unweave.scope.scopes import Scope, position_mask

__all__ = ["agreement", "divergence", "fisher_cotangent", "loss", "metric"]


def _log_probs(scope: Scope, logits: Tensor) -> Tensor:
    if scope.quotient is not None:
        return scope.quotient.log_probs(logits)
    return F.log_softmax(wide(logits), dim=-1)


def _check_shape(logits: Tensor, batch: Batch) -> None:
    if logits.ndim != 3 or logits.shape[:2] != batch.mask.shape:
        raise ShapeError(f"logits must have shape {(*batch.mask.shape, 'outputs')}, got {tuple(logits.shape)}")


def divergence(
    scope: Scope, reference: Float[Tensor, "batch pos d_out"], logits: Float[Tensor, "batch pos d_out"], batch: Batch
) -> Float[Tensor, "batch pos"]:
    """Nats by which ``logits`` differ from ``reference`` at each position; zero outside the scope.

    kl: sum over outputs (or classes) of p_ref (log p_ref - log p). gaussian: 1/2 sum (a - b)^2.
    logit_difference: 1/2 (m_ref - m)^2, see :class:`Scope`.

    Returns:
        float32, or float64 for float64 logits. The KL is inf where an output that the reference allows has a logit
        of -inf.

    Raises:
        ShapeError: the shapes of reference, logits and batch differ.
        InputError, UnknownNameError: unusable labels (logit_difference).

    Exact?
        Yes, but for rounding: a KL that comes out below 0 is set to 0.
    """
    if reference.shape != logits.shape:
        raise ShapeError(f"logits of shapes {tuple(reference.shape)} and {tuple(logits.shape)} cannot be compared")
    _check_shape(logits, batch)
    if scope.divergence == "gaussian":
        value = 0.5 * (wide(reference) - wide(logits)).square().sum(-1)
    elif scope.divergence == "logit_difference":
        value = 0.5 * (_difference(reference, batch) - _difference(logits, batch)).square()
    else:
        value = _kl(_log_probs(scope, reference), _log_probs(scope, logits))
    return torch.where(position_mask(scope, batch).to(value.device), value, 0.0)


def _kl(a: Float[Tensor, "batch pos labels"], b: Float[Tensor, "batch pos labels"]) -> Float[Tensor, "batch pos"]:
    value = (a.exp() * (a - b)).sum(-1)
    if bool(value.isnan().any()):
        # 0 log 0 = 0: an output the reference rules out (a logit of -inf) does not count; rare, hence afterwards
        value = (a.exp() * (a - b).masked_fill(a == -torch.inf, 0.0)).sum(-1)
    return value.clamp(min=0)


def _difference(logits: Float[Tensor, "batch pos d_out"], batch: Batch) -> Float[Tensor, "batch pos"]:
    """Mean logit of the ids labelled "correct" minus that of those labelled "wrong"."""
    return _mean_logit(logits, batch, "correct") - _mean_logit(logits, batch, "wrong")


def _mean_logit(logits: Float[Tensor, "batch pos d_out"], batch: Batch, name: str) -> Float[Tensor, "batch pos"]:
    if name not in batch.labels:
        raise UnknownNameError("label", name, batch.labels or ["(the data has no labels)"])
    ids = batch.labels[name].to(logits.device)
    ids = ids[:, None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != len(logits) or ids.is_floating_point():
        raise ShapeError(
            f"label {name!r} must be ids [{len(logits)}] or sets of them [{len(logits)} k], "
            f"got {batch.labels[name].dtype} {tuple(batch.labels[name].shape)}"
        )
    bad = (ids < -1) | (ids >= logits.shape[-1])
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0, 0])
        raise InputError(
            f"label {name!r} of sequence {int(batch.index[row])} holds id {int(ids[bad][0])}, "
            f"outside the {logits.shape[-1]} outputs"
        )
    real = ids >= 0
    if not bool(real.any(1).all()):
        row = int((~real.any(1)).nonzero()[0, 0])
        raise InputError(f"label {name!r} of sequence {int(batch.index[row])} is an empty set: it needs an id")
    index = ids.long().clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    picked = torch.where(real[:, None], wide(logits.gather(-1, index)), 0.0)
    return picked.sum(-1) / real.sum(-1, keepdim=True)


def metric(scope: Scope, logits: Float[Tensor, "batch pos d_out"], batch: Batch) -> Float[Tensor, " batch"]:
    """The logit difference of each sequence, averaged over the scope's positions (0 where it has none).

    m = mean over positions of (mean logit of the ids labelled "correct" - mean logit of those labelled "wrong").

    Raises:
        InputError, ShapeError, UnknownNameError: unusable labels.
    """
    _check_shape(logits, batch)
    mask = position_mask(scope, batch).to(logits.device)
    return torch.where(mask, _difference(logits, batch), 0.0).sum(1) / mask.sum(1).clamp(min=1)


def fisher_cotangent(
    scope: Scope,
    logits: Float[Tensor, "batch pos d_out"],
    batch: Batch,
    generator: torch.Generator,
    kind: Literal["rademacher", "sampled"] = "rademacher",
) -> Float[Tensor, "batch pos d_out"]:
    """A random cotangent c with E[c c^T] = the Fisher information of the scope's output in the logits.

    For the KL it is diag(p) - p p^T. "sampled" draws a label y from the output and takes the gradient of
    log p(y), as the definition says; "rademacher" takes sum over labels of sqrt(p_y) e_y grad log p(y) with
    random signs e_y, which has the same covariance and lighter tails. With a quotient, labels are classes c, and
    d log q_c / d logit_v = p_v / q_c [v in c] - p_v. gaussian: a random sign per output. logit_difference: a random
    sign per position times d m / d logits; ``kind`` plays no part in these two.

    Returns:
        Zero outside the scope; no gradient flows through it. float32, or float64 for float64 logits.

    Raises:
        InputError: an unknown kind, or unusable labels (logit_difference).
        ShapeError: logits and batch do not fit.
    """
    if kind not in ("rademacher", "sampled"):
        raise InputError(f"unknown kind {kind!r} of cotangent; known: rademacher, sampled")
    _check_shape(logits, batch)
    logits = wide(logits.detach())
    mask = position_mask(scope, batch).to(logits.device)[..., None]
    if scope.divergence == "gaussian":
        return torch.where(mask, _signs(logits, generator), 0.0)
    if scope.divergence == "logit_difference":
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            (grad,) = torch.autograd.grad(_difference(leaf, batch).sum(), leaf)
        return torch.where(mask, grad * _signs(grad[..., :1], generator), 0.0)
    p = torch.softmax(logits, dim=-1)
    q = p if scope.quotient is None else scope.quotient.log_probs(logits).exp()
    weights = _label_weights(q, generator, kind)
    # sum over labels y of weight_y d log q_y / d logit_v = weight_class(v) p_v / q_class(v) - p_v sum of weights
    spread = weights
    if scope.quotient is not None:
        classes = scope.quotient.classes.long().to(p.device)
        spread = (weights / q.clamp(min=1e-30))[..., classes] * p
    return torch.where(mask, spread - p * weights.sum(-1, keepdim=True), 0.0)


def _label_weights(q: Float[Tensor, "batch pos labels"], generator: torch.Generator, kind: str) -> Tensor:
    """Random w with E[w w^T] = diag(q)."""
    if kind == "rademacher":
        return q.sqrt() * _signs(q, generator)
    drawn = torch.multinomial(q.flatten(0, 1).to(generator.device), 1, generator=generator)
    return torch.zeros_like(q).scatter(-1, drawn.to(q.device).unflatten(0, q.shape[:2]), 1.0)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=generator.device, dtype=torch.int8)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def loss(
    logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Cross entropy of the next token, in nats: -log p(token at pos + 1).

    Returns:
        (values, where there is a next token): the last real token of a text has none, and its value is 0.

    Raises:
        InputError: inputs that are no tokens, or a token outside the outputs.
        ShapeError: logits and batch do not fit.
    """
    _check_shape(logits, batch)
    if batch.inputs.is_floating_point():
        raise InputError("inputs that are reals have no next token; compare with divergence() instead")
    real = (batch.mask[:, :-1] & batch.mask[:, 1:]).to(logits.device)
    # whatever id fills the padding may be outside the outputs
    targets = batch.inputs[:, 1:].to(logits.device).masked_fill(~real, 0)
    bad = (targets < 0) | (targets >= logits.shape[-1])
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0, 0])
        raise InputError(
            f"sequence {int(batch.index[row])} holds token {int(targets[bad][0])}, "
            f"outside the {logits.shape[-1]} outputs"
        )
    value = F.cross_entropy(wide(logits[:, :-1]).transpose(1, 2), targets, reduction="none")
    return F.pad(torch.where(real, value, 0.0), (0, 1)), F.pad(real, (0, 1))


def agreement(
    reference: Float[Tensor, "batch pos d_out"], logits: Float[Tensor, "batch pos d_out"]
) -> Bool[Tensor, "batch pos"]:
    """Where both put the same output first (top-1 agreement); of equal logits, the first output counts.

    Raises:
        ShapeError: the shapes differ.
    """
    if reference.shape != logits.shape:
        raise ShapeError(f"logits of shapes {tuple(reference.shape)} and {tuple(logits.shape)} cannot be compared")
    return reference.argmax(-1) == logits.argmax(-1)
