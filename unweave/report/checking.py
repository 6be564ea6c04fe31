"""Report data held against the format, with the place of whatever does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

from unweave.errors import InputError
from unweave.report.facts import ReportData
from unweave.report.figures import Number
from unweave.report.modules import ModulesFacts
from unweave.report.nodes import DriverFacts, EdgeFacts, ExampleFacts, PatternFacts

__all__ = ["MAX_EDGES", "validate_report_data"]

MAX_EDGES = 10_000
MAX_DEPTH = 32
MAX_KERNEL = 32


def validate_report_data(data: Mapping[str, Any]) -> ReportData:
    """Check report data against :class:`ReportData` and return a plain copy, NaN and infinity as None.

    Raises:
        InputError: a field is missing or of the wrong type, an edge names no node or an interface no block, there are
            more than 10,000 edges, or no row of the faithfulness table is a graph; says which field and what it got.

    Example:
        >>> validate_report_data({"format": "unweave-report", "version": 1, "title": 3})
        Traceback (most recent call last):
        ...
        unweave.errors.InputError: report data: title must be a string, got int (3)
    """
    copy = _plain(data)
    _checker(ReportData)(copy, "")
    rows = copy["faithfulness"]
    needed = bool(rows) or "modules" not in copy
    if needed and not any(not row["baseline"] and row["name"] != "original" for row in rows):
        got = ", ".join(row["name"] for row in rows) or "no row"
        raise InputError(f"report data: faithfulness needs a row that is neither a baseline nor 'original', got {got}")
    _check_edges(copy["edges"], len(copy["nodes"]))
    if "modules" in copy:
        _check_modules(copy["modules"], len(copy["nodes"]))
    if "drivers" in copy:
        _check_drivers(copy["drivers"], len(copy["nodes"]))
    for k, kind in enumerate(copy.get("kinds", ())):
        for name in ("nodes", "edges"):
            if len(kind[name]) != len(copy[name]):
                got = f"got {len(kind[name])} for {len(copy[name])}"
                raise InputError(f"report data: kinds[{k}].{name} is one number for each of {name!r}, {got}")
    return copy


def _check_edges(edges: list[EdgeFacts], n_nodes: int) -> None:
    if len(edges) > MAX_EDGES:
        raise InputError(f"report data: edges has {len(edges)} entries, at most {MAX_EDGES}; keep the strongest")
    for i, edge in enumerate(edges):
        for end, node in (("src", edge["src"]), ("dst", edge["dst"])):
            if not 0 <= node < n_nodes:
                got = f"got {node}, but there are {n_nodes} nodes"
                raise InputError(f"report data: edges[{i}].{end} is the place of a node in 'nodes', {got}")
        if len({len(row) for row in edge.get("pairs", [[0]])} - {0}) != 1:
            raise InputError(f"report data: edges[{i}].pairs must be rows of one length, one for each direction read")
        if "kernel" in edge:
            _check_kernel(f"edges[{i}].kernel", edge["kernel"])


def _check_kernel(where: str, rows: list[list[Any]]) -> None:
    widths = {len(row) for row in rows}
    if len(widths) != 1 or not 1 <= max(widths) <= MAX_KERNEL or len(rows) > MAX_KERNEL:
        got = f"got {len(rows)} rows of {', '.join(map(str, sorted(widths)[:4])) or 'nothing'}"
        raise InputError(
            f"report data: {where} must be 1 to {MAX_KERNEL} rows of one length of 1 to {MAX_KERNEL}, {got}"
        )


def _check_drivers(facts: DriverFacts, n_nodes: int) -> None:
    texts, strings = facts["texts"], facts["strings"]
    for t, text in enumerate(texts):
        for place in text:
            _check_place(f"drivers.texts[{t}]", place, len(strings), "strings")
    for d, direction in enumerate(facts["directions"]):
        where = f"drivers.directions[{d}]"
        _check_place(f"{where}.node", direction["node"], n_nodes, "nodes")
        for e, example in enumerate(direction["examples"]):
            _check_window(f"{where}.examples[{e}]", example, texts, len(example["around"]))
    for p, pattern in enumerate(facts["patterns"]):
        _check_place(f"drivers.patterns[{p}].node", pattern["node"], n_nodes, "nodes")
        _check_window(f"drivers.patterns[{p}]", pattern, texts, len(pattern["rows"]))


def _check_window(where: str, row: ExampleFacts | PatternFacts, texts: list[list[int]], width: int) -> None:
    """The tokens from ``start`` on are in the text, and the one looked at is among them."""
    _check_place(f"{where}.text", row["text"], len(texts), "texts")
    start, stop, length = row["start"], row["start"] + width, len(texts[row["text"]])
    if not 0 <= start <= row["position"] < stop <= length:
        got = f"got tokens {start} to {stop - 1} around {row['position']} of {length}"
        raise InputError(f"report data: {where} must be a window of its text around its position, {got}")


def _check_modules(facts: ModulesFacts, n_nodes: int) -> None:
    hierarchy = facts["hierarchy"]
    for name, place in (("chosen", facts["chosen"]), ("measured", facts["measured"])):
        if place is not None:
            _check_place(f"modules.{name}", place, len(hierarchy), "partitions")
    for k, partition in enumerate(hierarchy):
        where, labels = f"modules.hierarchy[{k}]", partition["labels"]
        n_blocks = max(labels, default=-1) + 1
        if len(labels) != n_nodes or set(labels) != set(range(n_blocks)):
            got = f"got {len(labels)} labels from {min(labels, default=None)} to {n_blocks - 1} for {n_nodes} nodes"
            raise InputError(f"report data: {where}.labels is one block per node, numbered from 0, {got}")
        for name in ("inside", "heard", "sent"):
            n = len(partition[name])  # type: ignore[literal-required]
            if n != n_blocks:
                raise InputError(f"report data: {where}.{name} is one number per block, got {n} for {n_blocks}")
        _check_blocks(f"{where}.bands", [[b["src"], b["dst"]] for b in partition["bands"]], n_blocks)
    measured = [] if facts["measured"] is None else hierarchy[facts["measured"]]["labels"]
    n_blocks = max(measured, default=-1) + 1
    _check_blocks("modules.interfaces", [[i["src"], i["dst"]] for i in facts["interfaces"]], n_blocks)
    _check_blocks("modules.effects", [row["blocks"] for row in facts["effects"]], n_blocks)


def _check_blocks(where: str, rows: list[list[int]], n_blocks: int) -> None:
    for i, row in enumerate(rows):
        for block in row:
            _check_place(f"{where}[{i}]", block, n_blocks, "blocks")


def _check_place(where: str, place: int, n: int, what: str) -> None:
    if not 0 <= place < n:
        raise InputError(f"report data: {where} must be a place among the {what}, got {place} of {n}")


def _plain(data: Any) -> Any:  # noqa: C901 - one branch per kind of value
    """A copy that JSON can hold."""

    def copy(value: Any, where: str, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, int):
            return int(value) if value.bit_length() < 1000 else None
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        if depth > MAX_DEPTH:
            raise InputError(f"report data: {where} is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            return {named(k, where): copy(v, f"{where}.{k}" if where else k, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [copy(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        kind = type(value).__name__
        raise InputError(f"report data: {where} holds a {kind}; give plain numbers, strings, lists and dicts")

    def named(key: Any, where: str) -> str:
        if isinstance(key, str):
            return str(key)
        raise InputError(f"report data: {where or 'it'} has the key {key!r}; keys are strings")

    return copy(data, "", 0)


Checker = Callable[[Any, str], None]


@cache
def _checker(kind: Any) -> Checker:
    """A function that holds plain data against a type of the format, with everything inside them."""
    fits, inside = _fitting(kind), _inside(kind)

    def check(value: Any, where: str) -> None:
        if not fits(value):
            got = repr(value[:60] if isinstance(value, str) else value)[:70]
            where = where or "it"
            raise InputError(f"report data: {where} must be {_word(kind)}, got {type(value).__name__} ({got})")
        if inside is not None:
            inside(value, where)

    return check


def _fitting(kind: Any) -> Callable[[Any], bool]:
    """Whether a value is of a type, its inside left aside."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: True
    if origin is Literal:
        return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    if origin is tuple:
        return lambda value: type(value) is list and len(value) == len(arguments)
    if origin is UnionType and kind != Number:
        return lambda value: any(_fitting(k)(value) for k in arguments)
    if kind is NoneType:
        return lambda value: value is None
    if origin is list:
        return lambda value: type(value) is list
    if origin is dict or is_typeddict(kind):
        return lambda value: type(value) is dict
    # True is no number, and a whole number is a number
    allowed = {float: {float, int}, Number: {float, int, type(None)}}.get(kind, {kind})
    return lambda value: type(value) in allowed


def _inside(kind: Any) -> Checker | None:
    """Checks the parts of a container."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return _fields(kind)
    if origin is UnionType:
        inner = next((check for k in arguments if (check := _inside(k)) is not None), None)
        return inner and (lambda value, where: None if value is None else inner(value, where))
    if origin not in (tuple, list, dict):
        return None
    checks = [_checker(k) for k in arguments]

    def parts(value: Any, where: str) -> None:
        if origin is dict:
            for name, part in value.items():
                checks[1](part, f"{where}[{name!r}]")
        else:
            for i, part in enumerate(value):
                checks[i if origin is tuple else 0](part, f"{where}[{i}]")

    return parts


def _fields(kind: Any) -> Checker:
    """Checks the fields of a TypedDict."""
    hints = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
    types = {name: get_args(hint)[0] if name in optional else hint for name, hint in hints.items()}
    checks = {name: _checker(hint) for name, hint in types.items()}

    def fields(value: dict[str, Any], where: str) -> None:
        for name, check in checks.items():
            if name in value:
                check(value[name], f"{where}.{name}" if where else name)
            elif name not in optional:
                what = f"{where or 'it'} lacks {name!r}, {_word(types[name])}"
                raise InputError(f"report data: {what} (see unweave.report.{kind.__name__})")

    return fields


def _word(kind: Any) -> str:
    """A type of the format, for people."""
    origin = get_origin(kind)
    if origin is UnionType and kind != Number:
        return " or ".join("None" if k is NoneType else _word(k) for k in get_args(kind))
    if origin is Literal:
        return " or ".join(repr(allowed) for allowed in get_args(kind))
    if origin is tuple:
        return f"a list of {len(get_args(kind))}: " + ", ".join(_word(k) for k in get_args(kind))
    if origin is list:
        return "a list"
    if origin is dict or is_typeddict(kind):
        return "a dict"
    return {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}.get(
        kind, "a number or None"
    )
