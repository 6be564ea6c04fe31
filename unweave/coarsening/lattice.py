"""The order of output quotients and of scopes: who asks for more.

A quotient is a partition of the outputs. It is *finer* than another if outputs that it puts in one class are in one
class of the other, too: then the other is a function of it. Finer is above: the full logits are the top. A scope is
above another if it asks for a finer quotient at no fewer positions, by the same divergence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import networkx as nx
import torch
from jaxtyping import Bool, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from unweave.data import TokenData
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.scope import Positions, Quotient, Scope, describe, position_mask

__all__ = ["Lattice", "join", "lattice", "meet", "refines"]


# ---- partitions of the outputs --------------------------------------------------------------------------


def refines(a: Quotient | None, b: Quotient | None) -> bool:
    """Whether ``a`` is at least as fine as ``b``: the class in ``b`` is a function of the class in ``a``.

    Args:
        a, b: quotients of the same outputs; None for the outputs themselves.

    Raises:
        ShapeError: they are of different numbers of outputs.

    Cost:
        One sort of the outputs.

    Example:
        >>> digits = Quotient.from_sets({"odd": [1, 3], "even": [0, 2]}, 5)
        >>> digit = digits.coarsen({"odd": "digit", "even": "digit"})
        >>> refines(digits, digit), refines(digit, digits), refines(None, digits)
        (True, False, True)
    """
    if a is None:
        return True
    if b is None:
        return a.is_identity
    return _split_pair(a, b) is None


def join(a: Quotient, b: Quotient) -> Quotient:
    """The coarsest quotient that refines both: two outputs are one if they are one in ``a`` and in ``b``.

    Classes are named "x & y", in the order of their pairs; of two quotients of which one refines the other, the finer.

    Raises:
        ShapeError: they are of different numbers of outputs.

    Example:
        >>> a, b = Quotient(torch.tensor([0, 0, 1, 1]), ("x", "y")), Quotient(torch.tensor([0, 1, 1, 1]), ("p", "q"))
        >>> join(a, b).names
        ('x & p', 'x & q', 'y & q')
    """
    if refines(a, b) or refines(b, a):
        return a if refines(a, b) else b
    pairs, classes = _pairs(a, b).unique(dim=0, return_inverse=True)
    return Quotient(classes, _distinct(f"{a.names[i]} & {b.names[j]}" for i, j in pairs.tolist()))


def meet(a: Quotient, b: Quotient) -> Quotient:
    """The finest quotient that both refine: two outputs are one if a chain of classes of ``a`` and ``b`` joins them.

    Classes are named after the classes of ``a`` in them, "x | y"; of two quotients of which one refines the other, the
    coarser.

    Raises:
        ShapeError: they are of different numbers of outputs.
        InputError: the chains join everything: there is no question that both answer.

    Example:
        >>> a = Quotient(torch.tensor([0, 1, 1, 2]), ("x", "y", "z"))
        >>> b = Quotient(torch.tensor([0, 0, 1, 2]), ("p", "q", "r"))
        >>> meet(a, b).names
        ('x | y', 'z')
    """
    if refines(a, b) or refines(b, a):
        return b if refines(a, b) else a
    pairs = _pairs(a, b).unique(dim=0).cpu()
    rows, columns, size = pairs[:, 0], pairs[:, 1] + len(a.names), len(a.names) + len(b.names)
    links = coo_array((torch.ones(len(pairs)).numpy(), (rows.numpy(), columns.numpy())), shape=(size, size))
    component = torch.from_numpy(connected_components(links, directed=False)[1]).long()
    used, number = component[rows].unique(return_inverse=True)
    if len(used) < 2:
        raise InputError(
            "these quotients have no question in common: chains of classes that overlap join all outputs; "
            "ask for one of them, or coarsen one by hand (Quotient.coarsen)"
        )
    members: dict[int, dict[str, None]] = {}
    for i, k in zip(rows.tolist(), number.tolist(), strict=True):
        members.setdefault(k, {})[a.names[i]] = None
    classes = torch.searchsorted(used, component[a.classes.cpu().long()]).to(a.classes.device)
    return Quotient(classes, _distinct(" | ".join(members[k]) for k in range(len(used))))


def _pairs(a: Quotient, b: Quotient) -> Int[Tensor, "outputs 2"]:
    """Both classes of every output."""
    if a.classes.shape != b.classes.shape:
        raise ShapeError(
            f"quotients of {len(a.classes)} and of {len(b.classes)} outputs cannot be compared; make both from the "
            "token strings of one model"
        )
    return torch.stack([a.classes.long(), b.classes.long().to(a.classes.device)], dim=1)


def _split_pair(a: Quotient, b: Quotient) -> tuple[int, int] | None:
    """Two outputs that are one in ``a`` and not in ``b``: why ``b`` is no function of ``a``."""
    pairs = _pairs(a, b)
    order = (pairs[:, 0] * len(b.names) + pairs[:, 1]).argsort(stable=True)
    one, other = pairs[order[:-1]], pairs[order[1:]]
    split = ((one[:, 0] == other[:, 0]) & (one[:, 1] != other[:, 1])).nonzero()[:, 0]
    return (int(order[split[0]]), int(order[split[0] + 1])) if len(split) else None


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    listed = list(names)
    if len(set(listed)) == len(listed):
        return tuple(listed)
    return tuple(f"{i}: {name}" for i, name in enumerate(listed))


# ---- the order of scopes --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lattice:
    """Named scopes in their partial order.

    Attributes:
        scopes: by name, a finer one always before a coarser one.
        pairs: every (finer, coarser).
        steps: those pairs with no scope between: the lines of a Hasse diagram.
    """

    scopes: Mapping[str, Scope]
    pairs: tuple[tuple[str, str], ...]
    steps: tuple[tuple[str, str], ...]

    def above(self, finer: str, coarser: str) -> bool:
        """Whether the first asks for all that the second asks for, and more."""
        return (finer, coarser) in self.pairs

    def table(self) -> list[dict[str, Any]]:
        """One plain row per scope: name, what it asks for, and the scopes one step down."""
        return [
            {"scope": name, **describe(scope), "coarser": [b for a, b in self.steps if a == name]}
            for name, scope in self.scopes.items()
        ]


def lattice(
    scopes: Mapping[str, Scope], data: TokenData | None = None, claims: Iterable[tuple[str, str]] = ()
) -> Lattice:
    """The partial order of scopes.

    a is above b if the quotient of a refines that of b, the positions of b are among those of a, and both measure by
    the same divergence. Then b is a question about the answer to a.

    Args:
        scopes: by name.
        data: on which positions are compared. Without it only what the words say is known: everything is within
            "all", numbers within more numbers.
        claims: pairs (finer, coarser) that are refused if they do not hold.

    Raises:
        InputError: no scope, a claim that does not hold, or two names for one scope.
        UnknownNameError: a claim about a name that is not there.
        ShapeError: quotients of different outputs.

    Cost:
        A sort of the outputs per pair of scopes; with ``data`` one pass over its ids.

    Example:
        >>> classes = Quotient.from_sets({"a": [0, 1], "b": [2, 3]}, 5)
        >>> question = classes.coarsen({"b": "no", "other": "no"})
        >>> scopes = {"a or not?": Scope(quotient=question), "classes": Scope(quotient=classes), "logits": Scope()}
        >>> lattice(scopes).steps
        (('logits', 'classes'), ('classes', 'a or not?'))
    """
    if not scopes:
        raise InputError("give at least one named scope")
    within = None if data is None else _within_on(scopes, data)
    names, order = list(scopes), nx.DiGraph()
    order.add_nodes_from(names)
    reasons = {(a, b): _why_not(scopes, a, b, within) for a, b in permutations(names, 2)}
    order.add_edges_from(pair for pair, reason in reasons.items() if reason is None)
    for a, b in order.edges:
        if order.has_edge(b, a):
            raise InputError(f"{a!r} and {b!r} are one scope under two names; leave one out")
    for finer, coarser in claims:
        for name in (finer, coarser):
            if name not in scopes:
                raise UnknownNameError("scope", name, scopes)
        if (reason := reasons.get((finer, coarser), "they are the same")) is not None:
            raise InputError(f"{coarser!r} is not coarser than {finer!r}: {reason}")
    place = {name: i for i, name in enumerate(names)}
    sorted_names = list(nx.lexicographical_topological_sort(order, key=place.__getitem__))
    at = {name: i for i, name in enumerate(sorted_names)}

    def in_order(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(pairs, key=lambda pair: (at[pair[0]], at[pair[1]])))

    reduced = nx.transitive_reduction(order)
    return Lattice({n: scopes[n] for n in sorted_names}, in_order(order.edges), in_order(reduced.edges))


def _why_not(scopes: Mapping[str, Scope], finer: str, coarser: str, within: Tensor | None) -> str | None:
    """Why one scope is not at least as fine as another; None where it is."""
    a, b, names = scopes[finer], scopes[coarser], list(scopes)
    if a.divergence != b.divergence:
        return f"they measure by {a.divergence!r} and {b.divergence!r}"
    if not refines(a.quotient, b.quotient):
        return _why_no_function(a.quotient, b.quotient)
    if within is None:
        known = _within_by_name(b.positions, a.positions)
        return None if known else "whether its positions are among the other's only data can tell; give data"
    inside = bool(within[names.index(coarser), names.index(finer)])
    return None if inside else "it looks at positions of the data that the other does not look at"


def _why_no_function(a: Quotient | None, b: Quotient | None) -> str:
    assert a is not None
    if b is None:
        return f"its every output counts and the other knows {len(a.classes.unique())} classes"
    found = _split_pair(a, b)
    assert found is not None
    i, j = found
    return (
        f"outputs {i} and {j} are both {a.names[int(a.classes[i])]!r} there, but {b.names[int(b.classes[i])]!r} and "
        f"{b.names[int(b.classes[j])]!r} here; split that class, or merge these"
    )


def _within_by_name(inner: Positions, outer: Positions) -> bool:
    inner, outer = ((-1,) if p == "last" else p for p in (inner, outer))
    if isinstance(inner, tuple) and isinstance(outer, tuple):
        return set(inner) <= set(outer)
    return outer == "all" or inner == outer


def _within_on(scopes: Mapping[str, Scope], data: TokenData) -> Bool[Tensor, "scopes scopes"]:
    """Whether the positions of the first are among those of the second, in all of the data."""
    within = torch.ones(len(scopes), len(scopes), dtype=torch.bool)
    for batch in data.batches(256):
        marks = torch.stack([position_mask(scope, batch) for scope in scopes.values()]).flatten(1).float()
        within &= (marks @ (1 - marks).T == 0).cpu()
    return within
