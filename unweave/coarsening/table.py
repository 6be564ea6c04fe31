"""Subset and quotient together: a table of what is needed on which inputs for which question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from unweave.coarsening.needs import BY, Need, Search, needed
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, ShapeError
from unweave.graph import Graph
from unweave.scope import Positions, Quotient, Scope

__all__ = ["Subset", "subset_by_quotient"]

Subset = TokenData | Positions | Callable[[Batch], Tensor]
# the name of the size in a row, by what is counted
SIZE_OF = {"edges": "edges", "dimensions": "parameters"}


def subset_by_quotient(
    graph: Graph,
    data: TokenData,
    subsets: Mapping[str, Subset],
    quotients: Mapping[str, Quotient | None],
    kl_nats: float = 0.01,
    *,
    by: tuple[str, ...] = BY,
    held_out: float | int | TokenData = 0.5,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """The size and the error of the smallest graphs found, for every subset of the inputs and every quotient.

    Args:
        graph: whole.
        data: split once into calibration and held-out data, the same for all cells (but for subsets that are data).
        subsets: by name: positions of a :class:`Scope` ("all", "last", numbers, a label, a function that marks
            ``[batch pos]``), a function that marks sequences ``[batch]``, or other data, which are split alike.
        quotients: by name; None for the full logits.
        kl_nats: nats per token to allow on calibration data, in every cell.
        by: what is counted: "edges" (:func:`find_circuit`), "dimensions" (:func:`compress`), or both.
        held_out: a share of the documents, or data.
        options: as in :func:`unweave.coarsening.what_it_needs`.

    Returns:
        One plain row per cell, subset by subset: subset, quotient, n_sequences and n_tokens (held out); and with edges
        (how many), edges_share, edges_nats (held out: value, low, high), edges_nats_calibration; the same for
        parameters (numbers that the channels store).

    Raises:
        InputError: no subset or quotient, an unknown way to count, a budget out of range or out of reach.
        EmptyDataError: a subset is empty; says which.
        ShapeError: a function marks neither sequences nor positions.

    Cost:
        Per cell that of :func:`find_circuit` and of :func:`compress`.

    Exact?
        Errors are measured; sizes are of the smallest graphs found. The same for the same seed.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=24)
        >>> upper = unweave.Quotient.from_function(lambda token: int(token) >= 24, [str(i) for i in range(48)])
        >>> subsets, quotients = {"answered": "answered"}, {"which token?": None, "above 24?": upper}
        >>> rows = subset_by_quotient(graph, data, subsets, quotients, 0.1, by=("dimensions",))
        >>> [row["quotient"] for row in rows]
        ['which token?', 'above 24?']
    """
    if not subsets or not quotients:
        raise InputError("give at least one subset and one quotient, by name")
    if not by or not set(by) <= set(BY):
        raise InputError(f"by must be some of {', '.join(BY)}, got {by!r}")
    search, rows = Search(kl_nats=kl_nats, seed=seed, **options), []
    for name, subset in subsets.items():
        parts, positions = _taken(name, subset, data, held_out, seed)
        for asked, quotient in quotients.items():
            scope = Scope(positions, quotient, description=f"{asked}, {name}")
            try:
                found = {count: needed(graph, *parts, scope, count, search) for count in by}
            except EmptyDataError as error:
                error.add_note(f"in the subset {name!r}")
                raise
            rows.append({"subset": name, "quotient": asked, **_cell(found)})
    return rows


def _cell(found: Mapping[str, Need]) -> dict[str, Any]:
    need = next(iter(found.values()))
    row: dict[str, Any] = {"n_sequences": need.n_sequences, "n_tokens": need.n_tokens}
    for count, need in found.items():
        size = SIZE_OF[count]
        row |= {size: need.size, f"{size}_share": need.share, f"{size}_nats": need.kl_nats._asdict()}
        row[f"{size}_nats_calibration"] = need.nats
    return row


def _taken(
    name: str, subset: Subset, data: TokenData, held_out: float | int | TokenData, seed: int
) -> tuple[tuple[TokenData, TokenData], Positions]:
    """(calibration and held-out data, positions) of a subset."""
    if isinstance(subset, TokenData):
        if isinstance(held_out, TokenData):
            held_out = len(held_out) / (len(held_out) + len(data))
        return subset.split(held_out, seed), "all"
    parts = (data, held_out) if isinstance(held_out, TokenData) else data.split(held_out, seed)
    if not callable(subset):
        return parts, subset
    first = next(data.batches(1), None)
    marks = None if first is None else subset(first)
    if marks is None or marks.ndim not in (1, 2):
        got = "no data" if marks is None else tuple(marks.shape)
        raise ShapeError(f"the subset {name!r} must mark sequences [batch] or positions [batch pos], got {got}")
    if marks.ndim == 2:
        return parts, subset
    train, held = (part.select(subset) for part in parts)
    for part, what in ((train, "calibration"), (held, "held-out")):
        if len(part) == 0:
            raise EmptyDataError(f"the subset {name!r} holds no sequence of the {what} data; widen it or give more")
    return (train, held), "all"
