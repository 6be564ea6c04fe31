"""Results as one self-contained HTML page that opens from disk.

The page is a template, a style sheet and a script (the folder viewer) with the data beside them as JSON. Token
strings come from strangers, so data is only ever text: it is escaped for its place here, the script writes text
and never markup, and the page's own policy forbids every other script, every other style and all network access.

The classes below are the format. A field marked ``NotRequired`` may be left out and a number may be None (or NaN,
which becomes None): the page then says "n/a". Fields that are not listed are kept and ignored.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from unweave.errors import InputError
from unweave.files import write_text

__all__ = ["ReportData", "render_report", "validate_report_data", "write_report"]

MAX_EDGES = 10_000
MAX_DEPTH = 32

Number = float | None


class Interval(TypedDict):
    """A mean over held-out data with its 95% interval."""

    value: Number
    low: Number
    high: Number


class ModelFacts(TypedDict):
    """The model that was decompiled."""

    name: str
    family: str
    n_layers: Number
    n_heads: Number
    d_model: Number
    d_vocab: NotRequired[Number]
    n_parameters: Number


class ScopeFacts(TypedDict):
    """What was explained, and on how much data."""

    description: str
    divergence: str
    n_tokens_calibration: Number
    n_tokens_held_out: Number
    n_sequences_calibration: NotRequired[Number]
    n_sequences_held_out: NotRequired[Number]


class FaithfulnessRow(TypedDict):
    """One graph or baseline against the model; the row named "original" is the model itself.

    ``size`` is the share of the channels' numbers that is stored, 1 for the model.
    """

    name: str
    baseline: bool
    kl_nats: Interval
    top1_agreement: Interval
    loss_nats: NotRequired[Interval]
    loss_recovered: NotRequired[Interval]
    kl_p99: NotRequired[Number]
    kl_p999: NotRequired[Number]
    kl_max: NotRequired[Number]
    size: NotRequired[Number]
    n_parameters: NotRequired[Number]
    flops_per_token: NotRequired[Number]
    size_bits: NotRequired[Number]


class WorstToken(TypedDict):
    """A held-out token where graph and model part: the text before it, itself, and what each predicts next."""

    context: str
    token: str
    kl_nats: Number
    model_prediction: str
    graph_prediction: str


class CurvePoint(TypedDict):
    """Divergence at one size."""

    size: float
    kl_nats: Number
    low: Number
    high: Number


class Curve(TypedDict):
    """Divergence against size for one method; without ``baseline`` the first curve is ours."""

    name: str
    baseline: NotRequired[bool]
    points: list[CurvePoint]


class WriteDirection(TypedDict):
    """A direction that a node writes, and the outputs it raises and lowers most."""

    dimension: int
    nats: Number
    promotes: list[tuple[str, Number]]
    suppresses: list[tuple[str, Number]]


class ReadDirection(TypedDict):
    """A direction that a port reads, and the input tokens that lie furthest along it."""

    port: str
    dimension: int
    nats: Number
    tokens: list[tuple[str, Number]]


class NodeFacts(TypedDict):
    """One node; ``layer`` is -1 for embeddings and n_layers for the output.

    ``spectra`` and ``ranks`` have the keys "write" and "read.<port>"; a spectrum is nats per direction, largest first.
    """

    name: str
    kind: Literal["embed", "attn", "head", "mlp", "unembed", "other"]
    layer: int
    ports: list[str]
    score_nats: Number
    score_se: Number
    n_parameters: NotRequired[Number]
    ranks: NotRequired[dict[str, int]]
    spectra: NotRequired[dict[str, list[Number]]]
    writes: NotRequired[list[WriteDirection]]
    reads: NotRequired[list[ReadDirection]]


class EdgeFacts(TypedDict):
    """One edge: nodes by their place in ``nodes``; ``kept`` is true unless said otherwise."""

    src: int
    dst: int
    port: str
    nats: Number
    se: Number
    measured: bool
    kept: NotRequired[bool]


class ProofRow(TypedDict):
    """One thing that a circuit had to show."""

    what: str
    value: Number
    low: Number
    high: Number


class PredictionPoint(TypedDict):
    """One edge ablated alone: what was attributed to it, and what was measured, in nats per token."""

    edge: str
    attributed: Number
    measured: Number
    kept: bool


class ModuleBand(TypedDict):
    """What one block says to another: blocks by their number among the labels, nats per token (second order)."""

    src: int
    dst: int
    nats: Number


class PartitionFacts(TypedDict):
    """One partition of the nodes: the block of each, numbered from 0, and what describing it takes.

    ``inside``, ``heard`` and ``sent`` are the nats that each block keeps to itself, hears and sends; ``bands`` are the
    strongest between blocks.
    """

    labels: list[int]
    bits: Number
    modularity: Number
    n_cut: Number
    inside: list[Number]
    heard: list[Number]
    sent: list[Number]
    bands: list[ModuleBand]


class NullTestRow(TypedDict):
    """A statistic of the search against the same search on graphs without modules."""

    null: str
    statistic: str
    value: Number
    null_mean: Number
    null_sd: Number
    z: Number
    percentile: Number
    p: Number
    n_null: int


class TokenInContext(TypedDict):
    """A token, the text before it, and its coordinate along a direction."""

    context: str
    token: str
    coordinate: Number


class InterfaceDirection(TypedDict):
    """One direction that crosses between blocks, with the tokens at its two ends."""

    nats: Number
    highest: list[TokenInContext]
    lowest: list[TokenInContext]


class InterfaceRow(TypedDict):
    """An interface of the measured partition: second-order nats, measured effect, dimensions for 95% of each."""

    src: int
    dst: int
    edges: int
    nats: Number
    se: Number
    measured: Interval | None
    dimensions: int | None
    measured_dimensions: int | None
    directions: list[InterfaceDirection]


class ModuleEffectRow(TypedDict):
    """One or two blocks ablated: the effect, its percentile among random sets of nodes and the median of those."""

    blocks: list[int]
    nats: Interval
    n_random: int
    random: Number
    percentile: Number
    interaction: Interval | None
    interaction_percentile: Number


class NullFigure(TypedDict):
    """A figure beside its null."""

    value: Number
    null_mean: Number
    null_sd: Number
    z: Number
    percentile: Number


class TrafficFacts(TypedDict):
    """How central the communication is; ``busiest`` holds (node, traffic in nats, betweenness)."""

    gini: NullFigure
    hub: NullFigure
    busiest: list[tuple[str, Number, Number]]


class ModulesFacts(TypedDict):
    """The search for modules. ``chosen`` and ``measured`` are places in ``hierarchy``, by number of blocks.

    ``interfaces`` and ``effects`` belong to the partition measured. ``significant`` is None if no null was drawn.
    ``idle`` nodes, by place, say and hear nothing; together they are one more block of every partition, not counted.
    """

    significant: bool | None
    level: Number
    tokens: Number
    chosen: int
    measured: int | None
    hierarchy: list[PartitionFacts]
    tests: list[NullTestRow]
    interfaces: list[InterfaceRow]
    effects: list[ModuleEffectRow]
    traffic: NotRequired[TrafficFacts]
    idle: NotRequired[list[int]]


class ReportData(TypedDict):
    """Everything the page shows. At least one row of ``faithfulness`` is neither a baseline nor "original"; where there
    are ``modules``, it may be empty: nodes that are only grouped compute what they did.

    ``size_of`` says what sizes are shares of: the channels' numbers (a compressed graph), or edges (a circuit, with
    its ``proof``).
    """

    format: Literal["unweave-report"]
    version: Literal[1]
    title: str
    model: ModelFacts
    scope: ScopeFacts
    faithfulness: list[FaithfulnessRow]
    worst_tokens: list[WorstToken]
    rate_distortion: list[Curve]
    size_of: NotRequired[Literal["numbers", "edges"]]
    proof: NotRequired[list[ProofRow]]
    predictions: NotRequired[list[PredictionPoint]]
    modules: NotRequired[ModulesFacts]
    nodes: list[NodeFacts]
    edges: list[EdgeFacts]
    provenance: NotRequired[dict[str, Any]]


# ---- checking -------------------------------------------------------------------------------------------


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
    return copy


def _check_edges(edges: list[EdgeFacts], n_nodes: int) -> None:
    if len(edges) > MAX_EDGES:
        raise InputError(f"report data: edges has {len(edges)} entries, at most {MAX_EDGES}; keep the strongest")
    for i, edge in enumerate(edges):
        for end, node in (("src", edge["src"]), ("dst", edge["dst"])):
            if not 0 <= node < n_nodes:
                got = f"got {node}, but there are {n_nodes} nodes"
                raise InputError(f"report data: edges[{i}].{end} is the place of a node in 'nodes', {got}")


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


# ---- rendering ------------------------------------------------------------------------------------------


def render_report(data: Mapping[str, Any]) -> str:
    """The page for the results of :func:`unweave.decompile`, as one HTML string.

    Args:
        data: see :class:`ReportData`.

    Raises:
        InputError: the data are not of that form; says which field.
    """
    checked = validate_report_data(data)
    script, style = bundle("main.js"), _asset("style.css")
    parts = {
        # half a surrogate pair is a Python string but no text that a file could hold
        "TITLE": escape(checked["title"].encode("utf-8", "replace").decode("utf-8")),
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embedded(checked),
    }
    # one pass, so that a mark inside the data stays what it is
    return re.sub("|".join(f"%{mark}%" for mark in parts), lambda m: parts[m[0].strip("%")], _asset("template.html"))


def write_report(data: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page, atomically, and return its path.

    Raises:
        InputError: the data are not of the right form; nothing is written.
        StorageError: the file cannot be written; an old one is untouched.
    """
    write_text(path, render_report(data))
    return Path(path)


IMPORT = re.compile(r'^import \{[$\w, ]+\} from "\./(\w+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?function |const |let |class )", re.MULTILINE)


def bundle(entry: str) -> str:
    """The viewer's modules as one: each once, after those it imports, without its import and export words.

    The browser opens the page from disk, where modules cannot import files. It is enough that every import is on
    one line without ``as``, and that no two modules use the same top-level name; a test holds both.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        for needed in IMPORT.findall(_asset(name)):
            visit(needed)
        order.append(name)

    visit(entry)
    return "\n".join(f"// {name}\n{EXPORT.sub('', IMPORT.sub('', _asset(name)))}" for name in order)


def _embedded(data: ReportData) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (resources.files("unweave") / "viewer" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The content's hash as the page's policy states it."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
