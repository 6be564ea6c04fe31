"""Progress bars for anything that may take longer than a second or two."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["track"]

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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=description)
