"""Numbers and intervals in a page's data."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["Interval", "Number"]

Number = float | None


class Interval(TypedDict):
    """A mean over held-out data with its 95% interval."""

    value: Number
    low: Number
    high: Number
