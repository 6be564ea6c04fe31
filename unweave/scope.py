"""Which signal is to be explained: inputs, positions, an output quotient and a divergence."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.data import Batch
from unweave.errors import InputError, ShapeError, UnknownNameError

__all__ = ["Quotient", "Scope", "agreement", "divergence", "fisher_cotangent", "loss", "metric", "position_mask"]

Divergence = Literal["kl", "gaussian", "logit_difference"]
Positions = str | tuple[int, ...] | Callable[[Batch], Tensor]


@dataclass(frozen=True, eq=False)
class Quotient:
    """A map from outputs to coarser classes: only which class comes next has to be explained.

    Attributes:
        classes: the class of every output.
        names: the classes' names.
    """

    classes: Int[Tensor, " d_out"]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.classes.ndim != 1 or len(self.names) < 2:
            raise InputError("a quotient needs one class per output and at least two classes")
        if int(self.classes.min()) < 0 or int(self.classes.max()) >= len(self.names):
            raise InputError(f"class ids must be between 0 and {len(self.names) - 1}")

    @classmethod
    def from_function(cls, function: Callable[[str], Hashable], tokens: Sequence[str]) -> Quotient:
        """Classes are the values a function takes on token strings.

        Example:
            >>> Quotient.from_function(str.isupper, ["a", "B"]).names
            ('False', 'True')
        """
        values = [function(token) for token in tokens]
        names = sorted({str(v) for v in values})
        return cls(torch.tensor([names.index(str(v)) for v in values]), tuple(names))

    @classmethod
    def from_sets(cls, sets: Mapping[str, Iterable[int]], d_out: int) -> Quotient:
        """Classes are sets of ids; what is in none is "other".

        Raises:
            InputError: an id is in two sets or outside the outputs.
        """
        classes = torch.full((d_out,), len(sets))
        for number, (name, ids) in enumerate(sets.items()):
            for i in ids:
                if not 0 <= i < d_out:
                    raise InputError(f"id {i} of class {name!r} is outside the {d_out} outputs")
                if int(classes[i]) != len(sets):
                    raise InputError(f"id {i} is in two classes, {list(sets)[int(classes[i])]!r} and {name!r}")
                classes[i] = number
        other = bool((classes == len(sets)).any())
        return cls(classes, (*sets, "other") if other else tuple(sets))

    @classmethod
    def from_regex(cls, patterns: str | Mapping[str, str], tokens: Sequence[str]) -> Quotient:
        """Classes by the first pattern that a token string matches (``re.search``); the rest is "other"."""
        named = {"match": patterns} if isinstance(patterns, str) else dict(patterns)
        try:
            compiled = {name: re.compile(pattern) for name, pattern in named.items()}
        except re.error as error:
            raise InputError(f"not a regular expression: {error}") from error

        def first(token: str) -> int:
            return next((i for i, p in enumerate(compiled.values()) if p.search(token)), len(compiled))

        classes = torch.tensor([first(token) for token in tokens])
        return cls(classes, (*named, "other"))

    def log_probs(self, logits: Float[Tensor, "... d_out"]) -> Float[Tensor, "... classes"]:
        """log of the summed probability of each class; -inf becomes -1e4 for an empty one."""
        if logits.shape[-1] != len(self.classes):
            raise ShapeError(f"the quotient covers {len(self.classes)} outputs and the logits have {logits.shape[-1]}")
        logp = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)
        classes = self.classes.to(logits.device)
        shape = (*logp.shape[:-1], len(self.names))
        index = classes.expand(logp.shape)
        top = torch.full(shape, -1e4, dtype=logp.dtype, device=logp.device)
        top = top.scatter_reduce(-1, index, logp.detach(), "amax", include_self=True)
        summed = torch.zeros(shape, dtype=logp.dtype, device=logp.device)
        summed = summed.scatter_add(-1, index, (logp - top.gather(-1, index)).exp())
        return top + summed.clamp(min=1e-30).log()


@dataclass(frozen=True, eq=False)
class Scope:
    """The signal an explanation is about.

    Attributes:
        positions: "all", "last" (each sequence's last real token), positions by number (negative ones from the
            end of each sequence), the name of a boolean label ``[batch pos]`` of the data, or a function of the
            batch that marks positions.
        quotient: only the classes of outputs count; None for all outputs.
        divergence: "kl" (nats), "gaussian" (half squared difference: nats of a unit-variance Gaussian, for numeric
            outputs) or "logit_difference" (half squared change of the mean logit difference between the ids
            labelled "correct" and "wrong").
        description: for people.
    """

    positions: Positions = "all"
    quotient: Quotient | None = None
    divergence: Divergence = "kl"
    description: str = "every next-token prediction"

    def __post_init__(self) -> None:
        if self.divergence not in ("kl", "gaussian", "logit_difference"):
            raise InputError(f"unknown divergence {self.divergence!r}; known: kl, gaussian, logit_difference")
        if self.quotient is not None and self.divergence != "kl":
            raise InputError("an output quotient goes with the divergence 'kl'")


def position_mask(scope: Scope, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """The positions of a batch that the scope looks at; always real tokens.

    Raises:
        UnknownNameError: positions name a label the data does not have.
        InputError: a position is outside every sequence of the batch.
    """
    lengths = batch.mask.sum(1, keepdim=True)
    pos = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    if callable(scope.positions):
        marked = scope.positions(batch).bool()
        if marked.shape != batch.mask.shape:
            raise ShapeError(f"positions(batch) must have shape {tuple(batch.mask.shape)}, got {tuple(marked.shape)}")
    elif scope.positions == "all":
        marked = torch.ones_like(batch.mask)
    elif scope.positions == "last":
        marked = pos == lengths - 1
    elif isinstance(scope.positions, str):
        if scope.positions not in batch.labels:
            raise UnknownNameError("label of positions", scope.positions, ["all", "last", *batch.labels])
        marked = batch.labels[scope.positions][:, : len(pos)].bool()
    else:
        wanted = torch.tensor(scope.positions, device=batch.mask.device)
        absolute = torch.where(wanted < 0, lengths + wanted, wanted.expand(len(lengths), -1))
        if bool(((absolute < 0) | (absolute >= lengths)).all()):
            raise InputError(f"the positions {scope.positions} are outside every sequence of the batch")
        marked = (pos[None, :, None] == absolute[:, None, :]).any(-1)
    return marked & batch.mask


def _log_probs(scope: Scope, logits: Tensor) -> Tensor:
    if scope.quotient is not None:
        return scope.quotient.log_probs(logits)
    return F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)


def divergence(
    scope: Scope, reference: Float[Tensor, "batch pos d_out"], logits: Float[Tensor, "batch pos d_out"], batch: Batch
) -> Float[Tensor, "batch pos"]:
    """Nats by which ``logits`` differ from ``reference`` at each position; zero outside the scope.

    kl: sum over outputs (or classes) of p_ref (log p_ref - log p). gaussian: 1/2 sum (a - b)^2.
    logit_difference: 1/2 (m_ref - m)^2, see :class:`Scope`.
    """
    if reference.shape != logits.shape:
        raise ShapeError(f"logits of shapes {tuple(reference.shape)} and {tuple(logits.shape)} cannot be compared")
    if scope.divergence == "gaussian":
        value = 0.5 * (reference - logits).float().square().sum(-1)
    elif scope.divergence == "logit_difference":
        value = 0.5 * (_difference(reference, batch) - _difference(logits, batch)).square()
    else:
        a, b = _log_probs(scope, reference), _log_probs(scope, logits)
        value = (a.exp() * (a - b)).sum(-1).clamp(min=0)
    return torch.where(position_mask(scope, batch).to(value.device), value, 0.0)


def _difference(logits: Float[Tensor, "batch pos d_out"], batch: Batch) -> Float[Tensor, "batch pos"]:
    """Mean logit of the ids labelled "correct" minus that of those labelled "wrong"."""

    def mean_logit(name: str) -> Tensor:
        if name not in batch.labels:
            raise UnknownNameError("label", name, batch.labels or ["(the data has no labels)"])
        ids = batch.labels[name].to(logits.device)
        ids = ids[:, None] if ids.ndim == 1 else ids
        if int(ids.max()) >= logits.shape[-1] or bool((ids < -1).any()):
            raise InputError(f"label {name!r} holds id {int(ids.max())}, outside the {logits.shape[-1]} outputs")
        picked = logits.float().gather(-1, ids.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1))
        real = (ids >= 0).float()[:, None]
        return (picked * real).sum(-1) / real.sum(-1).clamp(min=1)

    return mean_logit("correct") - mean_logit("wrong")


def metric(scope: Scope, logits: Float[Tensor, "batch pos d_out"], batch: Batch) -> Float[Tensor, " batch"]:
    """The logit difference of each sequence, averaged over the scope's positions."""
    mask = position_mask(scope, batch).to(logits.device).float()
    return (_difference(logits, batch) * mask).sum(1) / mask.sum(1).clamp(min=1)


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
    random signs e_y, which has the same covariance and lighter tails. With a quotient, labels are classes.
    gaussian: a random sign per output. logit_difference: a random sign per position times d m / d logits.
    """
    mask = position_mask(scope, batch).to(logits.device)[..., None]
    if scope.divergence == "gaussian":
        return torch.where(mask, _signs(logits, generator), 0.0)
    if scope.divergence == "logit_difference":
        with torch.enable_grad():
            leaf = logits.detach().float().requires_grad_()
            (grad,) = torch.autograd.grad(_difference(leaf, batch).sum(), leaf)
        return torch.where(mask, grad * _signs(grad[..., :1], generator), 0.0)
    p = torch.softmax(logits.float(), -1)
    quotient = scope.quotient
    q = p if quotient is None else _log_probs(scope, logits).exp()
    if kind == "sampled":
        drawn = torch.multinomial(q.flatten(0, -2), 1, generator=generator).view(*q.shape[:-1], 1)
        weights = torch.zeros_like(q).scatter(-1, drawn, 1.0)
    else:
        weights = q.sqrt() * _signs(q, generator)
    # sum over labels y of weight_y * d log q(y) / d logits = weight_class(v) p_v / q_class(v) - p_v sum of weights
    spread = weights if quotient is None else (weights / q.clamp(min=1e-30))[..., quotient.classes.to(p.device)] * p
    return torch.where(mask, spread - p * weights.sum(-1, keepdim=True), 0.0)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=generator.device, dtype=torch.int8)
    return (2 * bits - 1).to(device=like.device, dtype=torch.float32)


def loss(logits: Float[Tensor, "batch pos d_vocab"], batch: Batch) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """(cross entropy of the next token, where there is one): the last real token of a text has none."""
    value = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.inputs[:, 1:].to(logits.device), reduction="none")
    real = (batch.mask[:, :-1] & batch.mask[:, 1:]).to(logits.device)
    return F.pad(torch.where(real, value, 0.0), (0, 1)), F.pad(real, (0, 1))


def agreement(reference: Float[Tensor, "batch pos d_out"], logits: Float[Tensor, "batch pos d_out"]) -> Bool[Tensor, "batch pos"]:
    """Where both put the same output first."""
    return reference.argmax(-1) == logits.argmax(-1)


def describe(scope: Scope) -> dict[str, Any]:
    """The scope as plain data, for reports (a function is named, not stored)."""
    positions = getattr(scope.positions, "__name__", "function") if callable(scope.positions) else scope.positions
    classes = None if scope.quotient is None else list(scope.quotient.names)
    return {"positions": positions, "classes": classes, "divergence": scope.divergence, "description": scope.description}
