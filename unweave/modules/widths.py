"""Interfaces narrowed to a few directions, and what that costs, measured."""

from __future__ import annotations

from functools import partial
from typing import Any

from unweave.data import TokenData
from unweave.errors import InputError
from unweave.intervals import Estimate
from unweave.modules.interfaces import Interfaces, always
from unweave.modules.patching import nats_per_token, patched_nats

__all__ = ["measured_width", "narrowed_loss"]


def narrowed_loss(
    found: Interfaces,
    data: TokenData,
    src: str,
    dst: str,
    k: int,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """The measured loss, in nats per token, when only the first k directions cross from one block to another.

    Cost:
        Two forward passes, with one patch for every edge between the blocks.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=16)
        >>> from unweave.modules import measure_interfaces
        >>> found = measure_interfaces(graph, data, max_directions=16)
        >>> ends = "blocks.0.attn.head.0", "blocks.1.attn.head.1"
        >>> narrowed_loss(found, data, *ends, 16).value < narrowed_loss(found, data, *ends, 1).value
        True
    """
    patch = found.between(src, dst).narrow(k, found.means)
    patches = {"narrow": partial(always, patch)}
    nats = patched_nats(found.graph, data, found.scope, patches, batch_size=batch_size, progress=progress)
    return nats_per_token(nats["narrow"], nats["tokens"], seed)


def measured_width(
    found: Interfaces, data: TokenData, src: str, dst: str, share: float = 0.99, **options: Any
) -> int | None:
    """The fewest directions that keep this share of an interface's effect, measured; None if all that there are do not.

    k such that the loss with k directions is at most (1 - share) of the loss with none, found by bisection.

    Args:
        share: between 0 and 1.
        options: of :func:`narrowed_loss`.

    Raises:
        InputError: the share is not between 0 and 1.
        UnknownNameError: nothing crosses between these blocks.

    Cost:
        About log2(directions) times that of :func:`narrowed_loss`.

    Exact?
        It takes the loss to fall with k, which directions that interfere need not do.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=16)
        >>> from unweave.modules import measure_interfaces
        >>> found = measure_interfaces(graph, data)
        >>> 4 < measured_width(found, data, "blocks.0.attn.head.0", "blocks.1.attn.head.1", 0.9) <= 32
        True
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be between 0 and 1, got {share}")

    def loss(k: int) -> float:
        return narrowed_loss(found, data, src, dst, k, **options).value

    allowed = (1 - share) * loss(0)
    low, high = -1, len(found.between(src, dst).directions)
    if loss(high) > allowed:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= allowed else (middle, high)
    return high
