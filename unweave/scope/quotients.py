"""Coarser outputs: classes of the next token."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.ops import wide

__all__ = ["Quotient", "wide"]

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
        logp = F.log_softmax(wide(logits), dim=-1)
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
