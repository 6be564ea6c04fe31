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

from unweave.data import Batch, TokenData
from unweave.errors import CorruptFileError, EmptyDataError, InputError, ShapeError, UnknownNameError

__all__ = [
    "Quotient",
    "Scope",
    "agreement",
    "describe",
    "divergence",
    "fisher_cotangent",
    "loss",
    "metric",
    "position_mask",
    "require_positions",
]

Divergence = Literal["kl", "gaussian", "logit_difference"]
Positions = str | tuple[int, ...] | Callable[[Batch], Tensor]
DIVERGENCES = ("kl", "gaussian", "logit_difference")

# stands for log 0 where -inf would make NaN of 0 * log 0
LOG_ZERO = -1e4


@dataclass(frozen=True, eq=False)
class Quotient:
    """A map from outputs to coarser classes: only which class comes next has to be explained.

    Attributes:
        classes: the class of every output.
        names: the classes' names, all different.

    Raises:
        InputError: all outputs in one class, a class id without a name, or a name twice.
    """

    classes: Int[Tensor, " d_out"]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.classes.ndim != 1 or len(self.classes) == 0 or self.classes.is_floating_point():
            raise InputError(f"classes must be integers [d_out], got {self.classes.dtype} {tuple(self.classes.shape)}")
        if len(self.classes.unique()) < 2:
            raise InputError("a quotient needs at least two classes that are not empty: nothing is left to explain")
        if len(set(self.names)) < len(self.names):
            raise InputError(f"the classes' names must differ, got {list(self.names)}")
        if int(self.classes.min()) < 0 or int(self.classes.max()) >= len(self.names):
            raise InputError(f"class ids must be between 0 and {len(self.names) - 1}")

    def __repr__(self) -> str:
        return f"Quotient({len(self.classes)} outputs in {len(self.names)} classes: {', '.join(self.names[:8])})"

    @classmethod
    def from_function(cls, function: Callable[[str], Hashable], tokens: Sequence[str]) -> Quotient:
        """Classes are the values a function takes on token strings.

        Raises:
            InputError: the function takes one value only, or two that are written alike (1 and "1").

        Example:
            >>> Quotient.from_function(str.isupper, ["a", "B"]).names
            ('False', 'True')
        """
        values = [function(token) for token in tokens]
        distinct = sorted(set(values), key=str)
        number = {value: i for i, value in enumerate(distinct)}
        return cls(torch.tensor([number[v] for v in values]), tuple(str(v) for v in distinct))

    @classmethod
    def from_sets(
        cls,
        sets: Mapping[str, Iterable[int | str]] | Sequence[Iterable[int | str]],
        outputs: int | Sequence[str],
        names: Sequence[str] | None = None,
    ) -> Quotient:
        """Classes are sets of outputs; what is in none is "other".

        Args:
            sets: by name, or in a list; outputs are given by id or, if ``outputs`` is a list, by token string.
            outputs: how many outputs there are, or the token string of each.
            names: of the sets, when they come in a list.

        Raises:
            InputError: an output is in two sets or is none of the outputs.

        Example:
            >>> Quotient.from_sets([{"a", "b"}, {3}], ["a", "b", "c", "d"], names=["letters", "last"]).classes
            tensor([0, 0, 2, 1])
        """
        named = _named_sets(sets, names)
        labels = list(named)
        strings = None if isinstance(outputs, int) else list(outputs)
        d_out = outputs if isinstance(outputs, int) else len(outputs)
        ids_of: dict[str, list[int]] = {}
        for i, token in enumerate(strings or []):
            ids_of.setdefault(token, []).append(i)
        classes = [len(named)] * d_out
        for number, (name, members) in enumerate(named.items()):
            for i in {i for member in members for i in _ids(member, name, d_out, ids_of)}:
                if classes[i] != len(named):
                    raise InputError(f"output {i} is in two classes, {labels[classes[i]]!r} and {name!r}")
                classes[i] = number
        other = ("other",) if len(named) in classes else ()
        return cls(torch.tensor(classes), (*labels, *other))

    @classmethod
    def from_regex(cls, patterns: str | Mapping[str, str], tokens: Sequence[str]) -> Quotient:
        """Classes by the first pattern that a token string matches (``re.search``); the rest is "other".

        Raises:
            InputError: not a regular expression, or one that no token is left to match.

        Example:
            >>> Quotient.from_regex({"digit": "^[0-9]$", "space": " "}, ["1", " x", "y"]).names
            ('digit', 'space', 'other')
        """
        named = {"match": patterns} if isinstance(patterns, str) else dict(patterns)
        try:
            compiled = {name: re.compile(pattern) for name, pattern in named.items()}
        except re.error as error:
            raise InputError(f"not a regular expression: {error.pattern!r}: {error}") from error

        def first(token: str) -> int:
            return next((i for i, p in enumerate(compiled.values()) if p.search(token)), len(compiled))

        classes = [first(token) for token in tokens]
        for i, (name, pattern) in enumerate(named.items()):
            if i not in classes:
                raise InputError(
                    f"no token is left for class {name!r}: {pattern!r} matches none, or earlier ones take them"
                )
        other = ("other",) if len(named) in classes else ()
        return cls(torch.tensor(classes), (*named, *other))

    @property
    def is_identity(self) -> bool:
        """Whether every output is a class of its own, so that nothing is forgotten."""
        return len(self.classes.unique()) == len(self.classes)

    def coarsen(self, function: Mapping[str, str] | Callable[[str], str]) -> Quotient:
        """The quotient of this quotient: classes whose names map to the same name become one.

        Args:
            function: old name -> new name; a mapping leaves out the names that stay.

        Raises:
            UnknownNameError: the mapping names a class that does not exist.
            InputError: fewer than two classes are left.

        Example:
            >>> fine = Quotient.from_function(str, ["a", "b", "c"])
            >>> fine.coarsen({"a": "vowel", "b": "rest", "c": "rest"}).classes
            tensor([0, 1, 1])
        """
        if isinstance(function, Mapping):
            for name in function:
                if name not in self.names:
                    raise UnknownNameError("class", name, self.names)
            new = [function.get(name, name) for name in self.names]
        else:
            new = [function(name) for name in self.names]
        names = tuple(dict.fromkeys(new))
        number = torch.tensor([names.index(name) for name in new], device=self.classes.device)
        return Quotient(number[self.classes.long()], names)

    def log_probs(self, logits: Float[Tensor, "... d_out"]) -> Float[Tensor, "... classes"]:
        """log of the summed probability of each class: log sum over its outputs v of softmax(logits)_v.

        Returns:
            float32, or float64 for float64 logits; about -1e4 for a class without outputs or of -inf logits only.

        Raises:
            ShapeError: the logits have another number of outputs.
        """
        if logits.shape[-1:] != self.classes.shape:
            raise ShapeError(
                f"the quotient covers {len(self.classes)} outputs and the logits have shape {tuple(logits.shape)}; "
                "make it from the token strings of this model"
            )
        logp = F.log_softmax(_wide(logits), dim=-1)
        shape = (*logp.shape[:-1], len(self.names))
        index = self.classes.long().to(logits.device).expand(logp.shape)
        top = torch.full(shape, LOG_ZERO, dtype=logp.dtype, device=logp.device)
        top = top.scatter_reduce(-1, index, logp.detach(), "amax", include_self=True)
        summed = torch.zeros(shape, dtype=logp.dtype, device=logp.device)
        summed = summed.scatter_add(-1, index, (logp - top.gather(-1, index)).exp())
        return top + summed.clamp(min=1e-30).log()


def _named_sets(sets: Any, names: Sequence[str] | None) -> dict[str, list[int | str]]:
    if isinstance(sets, Mapping):
        if names is not None:
            raise InputError("names= is for sets in a list; these have names already")
        named = dict(sets)
    else:
        names = [f"set {i}" for i in range(len(sets))] if names is None else list(names)
        if len(names) != len(sets) or len(set(names)) < len(names):
            raise InputError(f"{len(sets)} sets need as many different names, got {list(names)}")
        named = dict(zip(names, sets, strict=True))
    for name, members in named.items():
        if isinstance(members, str):
            raise InputError(f"class {name!r} must be a set of ids or token strings, got the string {members!r}")
    return {name: list(members) for name, members in named.items()}


def _ids(member: int | str, name: str, d_out: int, ids_of: Mapping[str, list[int]]) -> list[int]:
    """The outputs that one member of a set stands for; several tokens may be written alike."""
    if isinstance(member, str):
        if not ids_of:
            raise InputError(f"class {name!r} holds the string {member!r}: pass the token strings as outputs=")
        if member not in ids_of:
            raise UnknownNameError("token", member, ids_of)
        return ids_of[member]
    if not 0 <= int(member) < d_out:
        raise InputError(f"id {member} of class {name!r} is outside the {d_out} outputs")
    return [int(member)]


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
            labelled "correct" and "wrong": ids ``[batch]``, or sets of them ``[batch k]`` padded with -1).
        description: for people.

    Raises:
        InputError: an unknown divergence, unusable positions, or a quotient where there are no classes.
    """

    positions: Positions = "all"
    quotient: Quotient | None = None
    divergence: Divergence = "kl"
    description: str = "every next-token prediction"

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise InputError(f"unknown divergence {self.divergence!r}; known: {', '.join(DIVERGENCES)}")
        if self.quotient is not None and self.divergence != "kl":
            raise InputError("an output quotient goes with the divergence 'kl'")
        p = self.positions
        numbers = isinstance(p, tuple) and len(p) > 0 and all(type(i) is int for i in p)
        if not (numbers or isinstance(p, str) or callable(p)):
            raise InputError(
                f"positions must be 'all', 'last', a label's name, a tuple of whole numbers or a function, got {p!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """The scope as plain data that ``json.dumps`` takes.

        Raises:
            InputError: positions is a function, which cannot be saved.

        Example:
            >>> Scope.from_json(Scope(positions=(0, -1)).to_json()).positions
            (0, -1)
        """
        if callable(self.positions):
            name = getattr(self.positions, "__name__", "a function")
            raise InputError(
                f"a scope whose positions are a function ({name}) cannot be saved; store its marks as a boolean label "
                "[n pos] of the data and give the label's name"
            )
        quotient = None
        if self.quotient is not None:
            quotient = {"classes": self.quotient.classes.tolist(), "names": list(self.quotient.names)}
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        return {
            "positions": positions,
            "quotient": quotient,
            "divergence": self.divergence,
            "description": self.description,
        }

    @classmethod
    def from_json(cls, plain: Any) -> Scope:
        """The inverse of :meth:`to_json`, for files nobody vouches for.

        Raises:
            CorruptFileError: it is not what :meth:`to_json` writes.
        """
        fields = {"positions", "quotient", "divergence", "description"}
        if not isinstance(plain, dict) or set(plain) != fields:
            raise CorruptFileError(f"a stored scope is an object with exactly the fields {sorted(fields)}")
        positions = plain["positions"]
        try:
            quotient = None if plain["quotient"] is None else _stored_quotient(plain["quotient"])
            positions = tuple(positions) if isinstance(positions, list) else positions
            return cls(positions, quotient, plain["divergence"], str(plain["description"]))
        except InputError as error:
            raise CorruptFileError(f"a stored scope is broken: {error}") from error


def _stored_quotient(plain: Any) -> Quotient:
    classes = plain.get("classes") if isinstance(plain, dict) else None
    names = plain.get("names") if isinstance(plain, dict) else None
    if not isinstance(classes, list) or not all(type(i) is int and 0 <= i < 2**31 for i in classes):
        raise InputError("a quotient's classes must be a list of class ids")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("a quotient's names must be a list of strings")
    return Quotient(torch.tensor(classes, dtype=torch.int64), tuple(names))


def position_mask(scope: Scope, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """The positions of a batch that the scope looks at; always real tokens.

    Raises:
        UnknownNameError: positions name a label the data does not have.
        ShapeError: a label or a function does not mark ``[batch pos]``.
        InputError: positions by number are outside every sequence of this batch.
    """
    marked = _marked(scope, batch)
    if isinstance(scope.positions, tuple) and not bool(marked.any()):
        raise InputError(f"the positions {scope.positions} are outside every sequence of the batch")
    return marked


def _marked(scope: Scope, batch: Batch) -> Bool[Tensor, "batch pos"]:
    lengths = batch.mask.sum(1, keepdim=True)
    pos = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    if callable(scope.positions):
        marked = _marks("positions(batch)", scope.positions(batch), batch)
    elif scope.positions == "all":
        marked = torch.ones_like(batch.mask)
    elif scope.positions == "last":
        marked = pos == lengths - 1
    elif isinstance(scope.positions, str):
        if scope.positions not in batch.labels:
            raise UnknownNameError("label of positions", scope.positions, ["all", "last", *batch.labels])
        # a batch is as wide as its longest sequence, a label as wide as the data set's
        label = batch.labels[scope.positions]
        marked = _marks(f"the label {scope.positions!r}", label[:, : len(pos)] if label.ndim == 2 else label, batch)
    else:
        wanted = torch.tensor(scope.positions, device=batch.mask.device)
        absolute = torch.where(wanted < 0, lengths + wanted, wanted.expand(len(lengths), -1))
        marked = (pos[None, :, None] == absolute[:, None, :]).any(-1)
    return marked & batch.mask


def _marks(what: str, marks: Tensor, batch: Batch) -> Bool[Tensor, "batch pos"]:
    if marks.shape != batch.mask.shape:
        raise ShapeError(f"{what} must have shape {tuple(batch.mask.shape)}, got {tuple(marks.shape)}")
    return marks.to(batch.mask.device).bool()


def require_positions(scope: Scope, data: TokenData, batch_size: int = 256) -> int:
    """How many positions of a data set the scope looks at, whatever batch they are in.

    Raises:
        EmptyDataError: none: there is nothing to explain.

    Cost:
        One pass over the ids; no model is run.

    Example:
        >>> from unweave.data import from_tensor
        >>> require_positions(Scope(positions="last"), from_tensor(torch.ones(3, 5, dtype=torch.int64)))
        3
    """
    count = sum(int(_marked(scope, batch).sum()) for batch in data.batches(batch_size))
    if count == 0:
        where = describe(scope)["positions"]
        longest = int(data.lengths.max()) if len(data) else 0
        raise EmptyDataError(
            f"the scope's positions ({where}) select nothing in {data.source or 'the data'}: {len(data)} sequences, "
            f"the longest of {longest} tokens; choose positions within them"
        )
    return count


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_probs(scope: Scope, logits: Tensor) -> Tensor:
    if scope.quotient is not None:
        return scope.quotient.log_probs(logits)
    return F.log_softmax(_wide(logits), dim=-1)


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
        value = 0.5 * (_wide(reference) - _wide(logits)).square().sum(-1)
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
    picked = torch.where(real[:, None], _wide(logits.gather(-1, index)), 0.0)
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
    logits = _wide(logits.detach())
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
    value = F.cross_entropy(_wide(logits[:, :-1]).transpose(1, 2), targets, reduction="none")
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


def describe(scope: Scope) -> dict[str, Any]:
    """The scope as plain data, for reports (a function is named, not stored)."""
    positions = getattr(scope.positions, "__name__", "function") if callable(scope.positions) else scope.positions
    return {
        "positions": positions,
        "classes": None if scope.quotient is None else list(scope.quotient.names),
        "divergence": scope.divergence,
        "description": scope.description,
    }
