"""A hypothesis about what a network computes: named variables, each a function of others."""

from __future__ import annotations

import graphlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError, UnknownNameError

__all__ = ["INPUTS", "CausalModel"]

# what functions may ask for besides variables
INPUTS = ("tokens", "mask")
Patch = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CausalModel:
    """A small program over named variables that a network may or may not implement.

    A variable's parents are the names of its function's parameters: other variables, ``tokens`` (ids) or ``mask``
    (True where a token is real); parameters with a default that name neither are left alone. A value is a whole
    number or a real per sequence or per position.

    Attributes:
        variables: name -> function. It is given whole batches, ``tokens`` ``[batch pos]``, and returns ``[batch]`` or
            ``[batch pos]``.
        output: the variable that is the answer. Whole numbers are output ids (or classes of the scope's quotient),
            and -1 where the hypothesis says nothing; reals are the value of a network with one output, NaN where
            it says nothing.
        per_example: functions are given one sequence at a time, as plain Python: ``tokens`` is a list of its real
            tokens, a value is a number or a list with one per token, and None stands for -1 or NaN.

    Raises:
        InputError: a cycle, a variable called like an input, or a function whose parameters have no names.
        UnknownNameError: a parent or the output is no variable; lists the closest.

    Example:
        >>> import torch
        >>> model = CausalModel(
        ...     {"sum": lambda tokens: tokens[0] + tokens[1], "answer": lambda sum: sum % 10},
        ...     output="answer",
        ...     per_example=True,
        ... )
        >>> base, source = torch.tensor([[7, 8]]), torch.tensor([[2, 1]])
        >>> model.run(base)["answer"], model.interchange(base, source, ["sum"])["answer"]
        (tensor([5]), tensor([3]))

    Source:
        Geiger et al. 2021, "Causal Abstractions of Neural Networks".
    """

    variables: Mapping[str, Callable[..., Any]]
    output: str
    per_example: bool = False

    def __post_init__(self) -> None:
        for name in self.variables:
            if name in INPUTS:
                raise InputError(f"a variable cannot be called {name!r}, which is an input; give it another name")
        if self.output not in self.variables:
            raise UnknownNameError("variable", self.output, self.variables)
        assert self.order  # refuses cycles

    @cached_property
    def parents(self) -> Mapping[str, tuple[str, ...]]:
        """What each variable is a function of."""
        return {name: self._parents(name, function) for name, function in self.variables.items()}

    def _parents(self, name: str, function: Callable[..., Any]) -> tuple[str, ...]:
        known = (*self.variables, *INPUTS)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise InputError(f"the function of {name!r} does not tell its parameters: {error}; use a lambda") from error
        if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise InputError(f"the function of {name!r} must name its parents as parameters, got {list(parameters)}")
        asked = [p.name for p in parameters if p.name in known or p.default is p.empty]
        for parent in asked:
            if parent not in known:
                raise UnknownNameError(f"variable or input (a parent of {name!r})", parent, known)
        return tuple(asked)

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The variables, parents first."""
        try:
            sorted_ = tuple(graphlib.TopologicalSorter(self.parents).static_order())
        except graphlib.CycleError as error:
            raise InputError(f"variables depend on each other in a cycle: {' -> '.join(error.args[1])}") from error
        return tuple(name for name in sorted_ if name in self.variables)

    def require(self, names: Iterable[str]) -> None:
        """Check that these are variables.

        Raises:
            UnknownNameError: one is not; lists the closest.
        """
        for name in names:
            if name not in self.variables:
                raise UnknownNameError("variable", name, self.variables)

    def run(self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None = None) -> dict[str, Tensor]:
        """The value of every variable.

        Raises:
            ShapeError: a function returns something else than a number per sequence or per position.
        """
        return self.intervene(tokens, {}, mask)

    def intervene(
        self,
        tokens: Int[Tensor, "batch pos"],
        patch: Mapping[str, Patch],
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Tensor]:
        """The value of every variable when some are set.

        Args:
            patch: by variable, a function from the value it would have to the value that it gets.

        Raises:
            UnknownNameError: no such variable.
            ShapeError: a function returns something else than a number per sequence or per position.
        """
        self.require(patch)
        mask = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device) if mask is None else mask
        values = {"tokens": tokens, "mask": mask}
        for name in self.order:
            value = self._each(name, values) if self.per_example else self._batch(name, values)
            values[name] = patch[name](value) if name in patch else value
        return {name: values[name] for name in self.order}

    def interchange(
        self,
        base: Int[Tensor, "batch pos"],
        source: Int[Tensor, "batch pos"],
        variables: Iterable[str],
        base_mask: Bool[Tensor, "batch pos"] | None = None,
        source_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Tensor]:
        """The value of every variable on ``base`` when some have the values that they have on ``source``.

        Values per position are swapped where both sequences have a token.

        Raises:
            UnknownNameError: no such variable.
            ShapeError: a function returns something else than a number per sequence or per position.
        """
        variables = list(variables)
        self.require(variables)
        given = self.run(source, source_mask)
        both = torch.ones(base.shape, dtype=torch.bool, device=base.device)
        for mask in (base_mask, source_mask):
            both = both if mask is None else both & mask

        def swapped(name: str) -> Patch:
            return lambda value: given[name] if value.ndim == 1 else torch.where(both, given[name], value)

        return self.intervene(base, {name: swapped(name) for name in variables}, base_mask)

    def _batch(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A variable of the whole batch at once."""
        value = self.variables[name](**{parent: values[parent] for parent in self.parents[name]})
        tokens = values["tokens"]
        if not isinstance(value, Tensor) or value.shape not in (tokens.shape, tokens.shape[:1]) or value.is_complex():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the variable {name!r} must be numbers [batch] or [batch pos], here {tuple(tokens.shape[:1])} or "
                f"{tuple(tokens.shape)}, got {got}; for a function of one sequence say per_example=True"
            )
        return value if value.is_floating_point() else value.long()

    def _each(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A variable of one sequence after the other."""
        mask = values["mask"]
        plain = {p: _plain(values[p], mask) for p in self.parents[name]}
        lengths = mask.sum(1).tolist()
        rows = [self.variables[name](**{p: plain[p][i] for p in plain}) for i in range(len(lengths))]
        lists = [isinstance(row, list | tuple) for row in rows]
        if any(lists) != all(lists):
            raise ShapeError(f"the variable {name!r} is a list on some sequences and a number on others")
        flat = [item for row in rows for item in (row if any(lists) else [row])]
        dtype = _number_type(name, flat)
        nothing = math.nan if dtype.is_floating_point else -1
        filled = torch.tensor([nothing if item is None else item for item in flat], dtype=dtype, device=mask.device)
        if not any(lists):
            return filled
        wrong = next(((row, n) for row, n in zip(rows, lengths, strict=True) if len(row) != n), None)
        if wrong is not None:
            raise ShapeError(f"the variable {name!r} must have one value per token: {wrong[1]}, got {len(wrong[0])}")
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, filled)


def _plain(value: Tensor, mask: Bool[Tensor, "batch pos"]) -> list[Any]:
    """A value as one number or list per sequence, padding left out."""
    if value.ndim == 1:
        return list(value.tolist())
    return [list(compress(row, real)) for row, real in zip(value.tolist(), mask.tolist(), strict=True)]


def _number_type(name: str, items: list[Any]) -> torch.dtype:
    """Real if any value is, else whole."""
    other = next((item for item in items if item is not None and not isinstance(item, int | float)), None)
    if other is not None:
        raise ShapeError(f"the variable {name!r} must be a number, got {other!r}; number its values")
    return torch.float32 if any(isinstance(item, float) for item in items) else torch.int64
