"""A graph is a tree of frozen dataclasses whose leaves are tensors and plain values.

Everything that moves, stores or trains a graph goes through the four functions here, so that a new op
only has to be a dataclass: it is saved, loaded, moved between devices and refined without further code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from unweave.errors import CorruptFileError

__all__ = ["leaves", "map_tensors", "pack", "register", "replace_tensors", "tensors", "unpack"]

T = TypeVar("T")

_REGISTERED: dict[str, type] = {}


def register(cls: type[T]) -> type[T]:
    """Class decorator: make a frozen dataclass, by its name, a legal branch of the tree.

    Only registered classes are ever built from a file, which is what makes loading untrusted folders safe.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} must be a dataclass to be registered")
    if _REGISTERED.setdefault(cls.__name__, cls) is not cls:
        raise TypeError(f"a class named {cls.__name__} is registered already")
    return cls


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name)
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from ((str(i), item) for i, item in enumerate(value))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every (path, tensor) of a tree, in a fixed order; a tensor used twice is met twice."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, child in _children(value):
        yield from leaves(child, f"{path}.{name}" if path else name)


def tensors(value: Any) -> dict[str, Tensor]:
    """The distinct tensors of a tree by the path where each is met first (tied weights appear once)."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for path, tensor in leaves(value):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[path] = tensor
    return out


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """The same tree with every tensor replaced by ``function(tensor)``; ties are kept."""
    done: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = function(tensor)
        return done[id(tensor)]

    return _rebuild(value, once)


def replace_tensors(value: T, by_path: Mapping[str, Tensor]) -> T:
    """The same tree with the tensors first met at the given paths replaced, wherever they occur."""
    by_id = {id(t): by_path[path] for path, t in tensors(value).items() if path in by_path}
    return _rebuild(value, lambda tensor: by_id.get(id(tensor), tensor))


def _rebuild(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for name, child in _children(value):
            new = _rebuild(child, function)
            if new is not child:
                changed[name] = new
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, Mapping):
        return {name: _rebuild(child, function) for name, child in value.items()}
    if isinstance(value, (tuple, list)):
        new = type(value)(_rebuild(child, function) for child in value)
        return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
    return value


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree as plain JSON data plus the tensors it refers to by name.

    Returns:
        (plain, weights): ``plain`` holds ``{"tensor": path}`` where a tensor stood and
        ``{"type": name, ...fields}`` where a registered dataclass stood.
    """
    weights = tensors(value)
    path_of = {id(t): path for path, t in weights.items()}

    def plain(item: Any) -> Any:
        if isinstance(item, Tensor):
            return {"tensor": path_of[id(item)]}
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            name = type(item).__name__
            if _REGISTERED.get(name) is not type(item):
                raise TypeError(f"{name} is not registered and cannot be stored; decorate it with @tree.register")
            return {"type": name} | {key: plain(child) for key, child in _children(item)}
        if isinstance(item, Mapping):
            return {"dict": {key: plain(child) for key, child in item.items()}}
        if isinstance(item, (tuple, list)):
            return [plain(child) for child in item]
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        raise TypeError(f"a value of type {type(item).__name__} cannot be stored in a graph")

    return plain(value), weights


def unpack(plain: Any, weights: Mapping[str, Tensor], where: str = "graph") -> Any:
    """The inverse of :func:`pack`, for files nobody vouches for.

    Raises:
        CorruptFileError: an unknown type, a missing field or a tensor that is not there.
    """
    if isinstance(plain, list):
        return tuple(unpack(item, weights, f"{where}[{i}]") for i, item in enumerate(plain))
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        if not isinstance(plain["tensor"], str) or plain["tensor"] not in weights:
            raise CorruptFileError(f"{where}: the tensor {plain['tensor']!r} is not in the weights file")
        return weights[plain["tensor"]]
    if "dict" in plain:
        if not isinstance(plain["dict"], dict):
            raise CorruptFileError(f"{where}: 'dict' must hold an object")
        return {key: unpack(item, weights, f"{where}.{key}") for key, item in plain["dict"].items()}
    return _unpack_registered(plain, weights, where)


def _unpack_registered(plain: dict[str, Any], weights: Mapping[str, Tensor], where: str) -> Any:
    name = plain.get("type")
    cls = _REGISTERED.get(name) if isinstance(name, str) else None
    if cls is None:
        raise CorruptFileError(f"{where}: unknown type {plain.get('type')!r}; known: {sorted(_REGISTERED)}")
    fields = {field.name for field in dataclasses.fields(cls)}
    given = set(plain) - {"type"}
    if given - fields:
        raise CorruptFileError(f"{where}: {cls.__name__} has no field {sorted(given - fields)}")
    values = {name: unpack(plain[name], weights, f"{where}.{name}") for name in given}
    try:
        return cls(**values)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CorruptFileError(f"{where}: not a valid {cls.__name__}: {error}") from error
