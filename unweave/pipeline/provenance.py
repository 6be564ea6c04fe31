"""When, for how long and with which versions something was computed."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any

import torch

from unweave import __version__
from unweave.data import TokenData

__all__ = ["provenance_of", "stamp"]


def provenance_of(
    model: Any, data: Any, budget: Mapping[str, Any], steps: int, seed: int, started: float
) -> dict[str, Any]:
    """From what, to what budget, when and with which versions a graph was made."""
    return {
        "model": model if isinstance(model, str) else str(getattr(model, "name_or_path", model)),
        "data": data.source if isinstance(data, TokenData) else str(data or model),
        "budget": dict(budget),
        "refine_steps": steps,
        **stamp(seed, started),
    }


def stamp(seed: int, started: float) -> dict[str, Any]:
    """When, for how long and with which versions something was computed."""
    return {
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "unweave_version": __version__,
        "torch_version": torch.__version__,
        "wall_s": round(time.time() - started, 1),
    }
