"""What each of several scopes needs of a network, and what drops out where the question gets coarser."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.circuits import find_circuit
from unweave.circuits.distance import per_prompt
from unweave.coarsening.lattice import Lattice, lattice
from unweave.compression import channel_moments, compress
from unweave.compression.allocation import mean_divergence
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Edge, Graph
from unweave.intervals import Estimate, bootstrap_ratio
from unweave.ops import LinearMap, LowRank
from unweave.scope import Scope, describe, require_positions

__all__ = ["BY", "Need", "Needs", "Search", "Step", "Violation", "dimensions", "needed", "what_it_needs"]

BY = ("edges", "dimensions")


@dataclass(frozen=True, eq=False)
class Need:
    """The smallest graph found for one scope.

    Attributes:
        graph: with the other edges cut, or with narrower channels.
        by: "edges" or "dimensions".
        size: how many edges, or how many numbers its channels store.
        share: of all edges, or of the original's numbers.
        nats: its divergence on the calibration data, nats per token of the scope.
        kl_nats: the same on held-out data, with its interval over sequences.
        nodes: those that edges join, or whose code is not empty; the output among them.
        edges: its edges.
        dimensions: of every channel node, see :func:`dimensions`.
        n_sequences, n_tokens: of the held-out data, in the scope.
    """

    graph: Graph
    by: str
    size: int
    share: float
    nats: float
    kl_nats: Estimate
    nodes: tuple[str, ...]
    edges: frozenset[Edge]
    dimensions: Mapping[str, int]
    n_sequences: int
    n_tokens: int

    @property
    def modules(self) -> tuple[str, ...]:
        """The blocks of :attr:`Graph.modules` with a node that is needed."""
        return tuple(dict.fromkeys(self.graph.modules[n] for n in self.nodes if n in self.graph.modules))


@dataclass(frozen=True)
class Step:
    """What drops out between a scope and a coarser one, and what the coarser one takes in its place.

    Attributes:
        finer, coarser: the scopes' names.
        nodes, modules, edges: needed by the finer, not by the coarser.
        new_nodes, new_edges: the other way round: the two were searched apart.
        dimensions: by channel, the finer's minus the coarser's, where they differ.
    """

    finer: str
    coarser: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]
    edges: tuple[str, ...]
    new_nodes: tuple[str, ...]
    new_edges: tuple[str, ...]
    dimensions: Mapping[str, int]


@dataclass(frozen=True)
class Violation:
    """A coarser scope for which a larger graph was found.

    Attributes:
        sizes: of the finer's graph and of the coarser's.
        proven: the smallest graphs themselves cannot do this: both scopes look at the same positions, where forgetting
            only brings outputs closer, so that the finer's graph would do. Then the search is at fault. With fewer
            positions the mean is over other tokens, and a larger graph may be needed.
    """

    finer: str
    coarser: str
    sizes: tuple[int, int]
    proven: bool


@dataclass(frozen=True, eq=False)
class Needs:
    """What scopes need.

    Attributes:
        lattice: the scopes in their order.
        kl_nats: the budget of each, on calibration data.
        needs: by scope, finer ones first.
        steps: one for each step of the lattice.
        violations: pairs of the lattice against the order of sizes.
    """

    lattice: Lattice
    kl_nats: float
    needs: Mapping[str, Need]
    steps: tuple[Step, ...]
    violations: tuple[Violation, ...]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per scope: size, error with interval, and what the scopes one step finer need besides."""
        rows = []
        for name, need in self.needs.items():
            dropped = {
                s.finer: {"nodes": list(s.nodes), "modules": list(s.modules), "dimensions": dict(s.dimensions)}
                for s in self.steps
                if s.coarser == name
            }
            rows.append({"scope": name, **facts(need), "dropped_from": dropped})
        return rows


def facts(need: Need) -> dict[str, Any]:
    """A need as plain data."""
    return {
        "by": need.by,
        "size": need.size,
        "share": need.share,
        "nats_calibration": need.nats,
        "kl_nats": need.kl_nats._asdict(),
        "n_sequences": need.n_sequences,
        "n_tokens": need.n_tokens,
        "nodes": len(need.nodes),
    }


@dataclass(frozen=True)
class Search:
    """How the smallest graph within a budget is looked for.

    Attributes:
        kl_nats: nats per token to allow on calibration data.
        ablation, method, frozen, max_trials: of :func:`find_circuit`, by edges.
        form, samples: of :func:`compress`, by dimensions.
        checkpoint: a folder where the passes keep what they have.
    """

    kl_nats: float = 0.01
    ablation: str = "mean"
    method: str = "auto"
    frozen: str = "none"
    max_trials: int = 400
    form: str = "low-rank"
    samples: int = 2
    batch_size: int = 16
    seed: int = 0
    progress: bool | None = None
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        if not (self.kl_nats > 0 and math.isfinite(self.kl_nats)):
            raise InputError(f"kl_nats must be a positive number, got {self.kl_nats}")

    @property
    def passes(self) -> dict[str, Any]:
        """Options that every pass over data takes."""
        return {"batch_size": self.batch_size, "progress": self.progress}

    def file(self, scope: Scope, by: str) -> Path | None:
        """Where the pass for a scope keeps what it has."""
        if self.checkpoint is None:
            return None
        classes = None if scope.quotient is None else scope.quotient.classes.tolist()
        text = repr((describe(scope), classes, by, dataclasses.replace(self, checkpoint=None, progress=None)))
        folder = Path(self.checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{by}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def what_it_needs(
    graph: Graph,
    data: TokenData,
    scopes: Mapping[str, Scope],
    kl_nats: float = 0.01,
    by: str = "edges",
    *,
    held_out: float | int | TokenData = 0.5,
    claims: Iterable[tuple[str, str]] = (),
    seed: int = 0,
    **options: Any,
) -> Needs:
    """For each of several scopes the smallest graph found within a budget, and what drops out from finer to coarser.

    - by "edges": :func:`find_circuit` with the budget; the size is in edges.
    - by "dimensions": :func:`compress` with the budget; the size is in numbers that the channels store, and every
      channel has its rank: the dimensions that it reads and writes.

    Args:
        graph: whole.
        data: split into calibration and held-out data; or calibration data, if ``held_out`` are data.
        scopes: by name.
        kl_nats: nats per token of the scope to allow on calibration data.
        held_out: a share of the documents, or data.
        claims: see :func:`lattice`.
        options: of :class:`Search`: ablation, method, frozen, max_trials (edges); form, samples (dimensions);
            batch_size, progress, and ``checkpoint``, a folder: each pass that can resume keeps a file there.

    Returns:
        :class:`Needs`.

    Raises:
        InputError: an unknown way to count, a claim that does not hold, a budget out of range or out of reach.
        EmptyDataError: a scope selects no position.

    Cost:
        That of :func:`find_circuit` or :func:`compress` per scope, and one pass over the held-out data each.

    Exact?
        Errors are measured. Sizes are of the smallest graphs *found*, each on its own: where one is larger than that of
        a finer scope, :attr:`Needs.violations` says so.

    Example:
        >>> import torch, unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=24)
        >>> upper = unweave.Quotient.from_function(lambda token: int(token) >= 24, [str(i) for i in range(48)])
        >>> scopes = {"which token?": unweave.Scope("answered"), "above 24?": unweave.Scope("answered", upper)}
        >>> found = what_it_needs(graph, data, scopes, kl_nats=0.1, by="dimensions")
        >>> found.needs["above 24?"].size < found.needs["which token?"].size
        True
    """
    if by not in BY:
        raise InputError(f"by must be one of {', '.join(BY)}, got {by!r}")
    search = Search(kl_nats=kl_nats, seed=seed, **options)
    train, held = (data, held_out) if isinstance(held_out, TokenData) else data.split(held_out, seed)
    order = lattice(scopes, data, claims)
    needs = {name: needed(graph, train, held, scope, by, search) for name, scope in order.scopes.items()}
    steps = tuple(_step(a, b, needs[a], needs[b]) for a, b in order.steps)
    return Needs(order, kl_nats, needs, steps, _violations(order, data, needs))


def needed(graph: Graph, train: TokenData, held: TokenData, scope: Scope, by: str, search: Search) -> Need:
    """The smallest graph found for one scope on calibration data, measured on held-out data.

    Raises:
        EmptyDataError: the scope selects no position of one of them.
    """
    tokens = [require_positions(scope, part) for part in (train, held)]
    file, seed, passes = search.file(scope, by), search.seed, search.passes
    if by == "edges":
        circuit = find_circuit(
            graph,
            train,
            scope,
            kl_nats=search.kl_nats,
            ablation=search.ablation,
            method=search.method,
            frozen=search.frozen,
            max_trials=search.max_trials,
            seed=seed,
            checkpoint=file,
            **passes,
        )
        small, nodes, edges = circuit.graph, circuit.nodes, circuit.edges
        size, share, nats = circuit.n_edges, circuit.n_edges / graph.n_edges, circuit.nats
        held = circuit.instead.paired(held, seed)
    else:
        kept = None if file is None else str(file)
        moments = channel_moments(graph, train, scope, samples=search.samples, seed=seed, checkpoint=kept, **passes)
        given: dict[str, Any] = {"kl_nats": search.kl_nats, "form": search.form, "moments": moments}
        small = compress(graph, train, scope, **given, **passes)
        size, edges = small.n_channel_parameters, graph.edges
        share, nats = size / graph.n_channel_parameters, mean_divergence(graph, small, train, scope, search.batch_size)
        nodes = tuple(n for n in graph.nodes if small.find(n)[0].write is None or _written(small, n) > 0)
    row = per_prompt({"small": small}, graph, held, scope, **passes)["small"]
    error = bootstrap_ratio(row.nats, row.tokens, seed)
    return Need(small, by, size, share, nats, error, nodes, frozenset(edges), dimensions(small), len(held), tokens[1])


# ---- dimensions -----------------------------------------------------------------------------------------


def dimensions(graph: Graph) -> dict[str, int]:
    """How many dimensions every attention head and MLP writes (by node) and reads (by port).

    They are the widths and ranks in which the graph stores its maps, not numerical ranks: those of a captured model are
    the full ones. A gated MLP reads with two maps, whose dimensions count together, up to the stream's.

    Example:
        >>> import unweave
        >>> dimensions(unweave.capture("zoo:induction"))["blocks.0.attn.head.1.k"]
        32
    """
    out = {}
    for stage in (graph.stages[s] for s in graph.channels):
        for i, node in enumerate(stage.nodes):
            out[node] = _written(graph, node)
            for port in stage.ports:
                blocks = [(read, read.widths[i * len(read.widths) // len(stage.nodes)]) for read in port.reads]
                read_dims = sum(min(width, _rank(read.map)) for read, width in blocks)
                out[f"{node}.{port.name}"] = min(read_dims, port.reads[0].map.d_in)
    return out


def _written(graph: Graph, node: str) -> int:
    stage, i = graph.find(node)
    assert stage.write is not None
    return min(stage.code_widths[i], _rank(stage.write))


def _rank(map_: LinearMap) -> int:
    return map_.left.shape[1] if isinstance(map_, LowRank) else min(map_.d_in, map_.d_out)


# ---- down the lattice -----------------------------------------------------------------------------------


def _step(finer: str, coarser: str, a: Need, b: Need) -> Step:
    changed = {name: a.dimensions[name] - b.dimensions[name] for name in a.dimensions}
    return Step(
        finer,
        coarser,
        tuple(n for n in a.nodes if n not in b.nodes),
        tuple(m for m in a.modules if m not in b.modules),
        tuple(sorted(map(str, a.edges - b.edges))),
        tuple(n for n in b.nodes if n not in a.nodes),
        tuple(sorted(map(str, b.edges - a.edges))),
        {name: change for name, change in changed.items() if change},
    )


def _violations(order: Lattice, data: TokenData, needs: Mapping[str, Need]) -> tuple[Violation, ...]:
    tokens = {name: require_positions(scope, data) for name, scope in order.scopes.items()}
    return tuple(
        Violation(a, b, (needs[a].size, needs[b].size), tokens[a] == tokens[b])
        for a, b in order.pairs
        if needs[b].size > needs[a].size
    )
