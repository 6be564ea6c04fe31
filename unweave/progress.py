"""Progress bars for anything that may take longer than a second or two."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["counter", "track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None, *, show: bool | None = None) -> Iterator[T]:
    """Yield the items while a bar on stderr says how far we are.

    Args:
        total: how many there will be, where ``len(items)`` does not say.
        show: force the bar on or off; by default it is on when stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield from items
        return
    with _bar() as bar:
        yield from bar.track(items, total=total, description=description)


@contextlib.contextmanager
def counter(description: str, total: int, *, show: bool | None = None) -> Iterator[Callable[[], None]]:
    """A bar for work that takes at most ``total`` steps; calling what it gives counts one."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda: None
        return
    with _bar() as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
