"""Every exception unweave raises on purpose.

The tree::

    UnweaveError
    ├── InputError            (also a ValueError)  data or an argument is not usable
    │   ├── ShapeError        a tensor has the wrong shape
    │   ├── EmptyDataError    no text, no token, no position is left to look at
    │   └── UnknownNameError  (also a KeyError) no node, edge, port or family has that name
    ├── GraphError            (also a ValueError)  a graph breaks one of its own rules
    ├── UnsupportedModelError (also a TypeError)   the model cannot be captured exactly
    ├── NonFiniteError        (also an ArithmeticError)  NaN or inf in weights or activations
    ├── StorageError          (also an OSError)    a folder or file cannot be read or written
    │   └── CorruptFileError  its content is broken, hostile or of another version
    └── MissingExtraError     (also an ImportError)  an optional package is not installed

A message says what is wrong, where, what was got and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CorruptFileError",
    "EmptyDataError",
    "GraphError",
    "InputError",
    "MissingExtraError",
    "NonFiniteError",
    "ShapeError",
    "StorageError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UnweaveError",
]


class UnweaveError(Exception):
    """The root of every error unweave raises on purpose."""


class InputError(UnweaveError, ValueError):
    """Data or an argument is not usable."""


class ShapeError(InputError):
    """A tensor has the wrong shape."""


class EmptyDataError(InputError):
    """No text, no token or no position is left to look at."""


class UnknownNameError(InputError, KeyError):
    """No node, edge, port or family has that name; the closest ones are listed."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        self.closest = close
        hint = ", ".join(close) if close else "there are none"
        super().__init__(f"no {what} is named {name!r}; the closest: {hint}")

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class GraphError(UnweaveError, ValueError):
    """A graph breaks one of its own rules."""


class UnsupportedModelError(UnweaveError, TypeError):
    """The model cannot be captured exactly."""


class NonFiniteError(UnweaveError, ArithmeticError):
    """NaN or inf in weights or activations."""


class StorageError(UnweaveError, OSError):
    """A folder or file cannot be read or written."""


class CorruptFileError(StorageError):
    """The content of a file is broken, hostile or of another version."""


class MissingExtraError(UnweaveError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; run: pip install 'unweave[{extra}]'"
        )
