"""Find modules: partitions that several methods propose and one criterion chooses, held against null models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from unweave.data import TokenData
from unweave.errors import InputError, UnknownNameError
from unweave.graph import Graph
from unweave.modules.candidates import Search, most_blocks, without_idle
from unweave.modules.communication import Communication, measure_communication
from unweave.modules.criterion import Criterion, possible_pairs
from unweave.modules.found import Modules
from unweave.modules.nulls import NETWORK_NULLS, rewire
from unweave.modules.partition import Partition
from unweave.modules.partitioners import PARTITIONERS
from unweave.modules.significance import STATISTICS, null_test
from unweave.progress import track
from unweave.scope import Scope, require_positions

__all__ = ["find_modules", "modules_of"]

# a description serves at least so many tokens, whatever few data there are; as `unweave modules` takes where it can
LEAST_TOKENS = 1024


def find_modules(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    methods: Sequence[str] = ("spectral", "louvain", "sbm"),
    nulls: Sequence[str] = ("rewired",),
    untrained: Callable[[int], Graph] | None = None,
    n_null: int = 100,
    n_networks: int = 20,
    max_blocks: int | None = None,
    tokens: int | None = None,
    by_dimension: bool = False,
    level: float = 0.05,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Modules:
    """Group the nodes of a graph into modules, if it has any.

    The communication between nodes is measured once and taken relative to what each node says and hears
    (:meth:`~unweave.modules.Communication.relative`); nodes that no edge joins to any other are idle and set aside.
    Every method proposes a hierarchy of partitions of the undirected graph; the criterion
    (:class:`~unweave.modules.criterion.Criterion`: bits to describe the blocks and their interfaces) chooses one,
    improved step by step. One block competes with the rest. Then the same search runs on graphs without modules, and
    its best statistics there are compared with those here; the best over the whole search, so that p is valid whatever
    was tried.

    Args:
        graph: refine its MLPs first where modules may hold parts of them.
        methods: of "spectral", "louvain", "sbm"; see :mod:`unweave.modules.partitioners`.
        nulls: of "rewired" (the measured graph, rewired; cheap), "shuffled" and "reinitialised" (weights permuted or
            drawn anew in every tensor, measured again); see :mod:`unweave.modules.nulls`.
        untrained: seed -> an untrained network of the same nodes: one more null, "untrained".
        n_null: rewired graphs; n_networks: networks of each of the other nulls.
        max_blocks: the most blocks proposed; by default a third of the nodes, at least 2 and at most 12.
        tokens: how many tokens the description must serve; by default those in the scope, at least 1,024.
            More tokens keep weaker edges.
        by_dimension: whether an edge's price grows with the dimensions it uses.
        level: of the tests.
        samples, batch_size, progress: of the measurement.
        seed: of everything drawn.

    Returns:
        :class:`Modules`; the same for the same seed.

    Raises:
        UnknownNameError: an unknown method or null.
        InputError: numbers that make no sense, or too few null samples for the level.

    Cost:
        One measurement of the communication, n_networks more for each null other than "rewired"; a search per null
        sample, some 30 ms for 24 nodes.

    Exact?
        The proposals are heuristics. p is exact for a null whose samples are exchangeable with the graph; strengths
        and layers are kept by the rewired null, no more.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> modules = find_modules(graph, data, n_null=19)
        >>> modules.significant(), sorted(modules.p)
        (False, [('rewired', 'modularity'), ('rewired', 'n_cut'), ('rewired', 'saved_bits')])
    """
    _check(methods, nulls, n_null, n_networks if untrained or set(nulls) - {"rewired"} else None, level)
    measuring: dict[str, Any] = {"samples": samples, "batch_size": batch_size}
    if tokens is None:
        tokens = max(LEAST_TOKENS, require_positions(scope or Scope(), data))
    measured = measure_communication(graph, data, scope, seed=seed, progress=progress, **measuring)
    possible = possible_pairs(graph)
    criterion = without_idle(Criterion(measured.relative(), possible, tokens, by_dimension))
    search = Search(tuple(methods), most_blocks(max_blocks, len(graph.nodes)), seed)
    samples_of: dict[str, list[Criterion]] = {}
    if "rewired" in nulls:
        samples_of["rewired"] = _rewired(criterion, n_null, seed)
    for null, make in _network_nulls(graph, nulls, untrained).items():
        found = []
        for number in track(range(n_networks), f"networks without modules ({null})", n_networks, show=progress):
            other = make(seed + number)
            if other.nodes != graph.nodes:
                raise InputError(f"an {null} network has other nodes than the graph; make and refine it the same way")
            told = measure_communication(other, data, scope, seed=seed, progress=False, **measuring)
            found.append(without_idle(Criterion(told.relative(), possible_pairs(other), tokens, by_dimension)))
        samples_of[null] = found
    return _judge(graph, measured, criterion, search, samples_of, level, progress)


def modules_of(
    measured: Communication,
    possible: Bool[Tensor, "nodes nodes"],
    *,
    tokens: int,
    methods: Sequence[str] = ("spectral", "louvain", "sbm"),
    n_null: int = 100,
    max_blocks: int | None = None,
    by_dimension: bool = False,
    level: float = 0.05,
    seed: int = 0,
    progress: bool | None = None,
) -> Modules:
    """:func:`find_modules` where the communication is known already: against rewired graphs only.

    Args:
        measured: nats per token between the nodes.
        possible: ``[reader, writer]``: which pairs execution order allows.

    Raises:
        UnknownNameError, InputError: as :func:`find_modules`.

    Example:
        >>> import torch
        >>> nats = torch.zeros(6, 6)
        >>> nats[1, 0] = nats[2, 1] = nats[2, 0] = nats[4, 3] = nats[5, 4] = nats[5, 3] = 0.1
        >>> told = Communication(tuple("abcdef"), nats, torch.ones(6, 6), (0, 1, 2, 0, 1, 2))
        >>> possible = torch.ones(6, 6, dtype=torch.bool).tril(-1)
        >>> modules_of(told, possible, tokens=1000, n_null=19).partition.labels
        (0, 0, 0, 1, 1, 1)
    """
    _check(methods, ("rewired",), n_null, None, level)
    criterion = without_idle(Criterion(measured.relative(), possible, tokens, by_dimension))
    search = Search(tuple(methods), most_blocks(max_blocks, len(measured.nodes)), seed)
    rewired = {"rewired": _rewired(criterion, n_null, seed)}
    return _judge(None, measured, criterion, search, rewired, level, progress)


def _check(methods: Sequence[str], nulls: Sequence[str], n_null: int, n_networks: int | None, level: float) -> None:
    for what, names, known in (("method", methods, [*PARTITIONERS]), ("null", nulls, ["rewired", *NETWORK_NULLS])):
        for name in names:
            if name not in known:
                raise UnknownNameError(what, name, known)
    if not methods:
        raise InputError(f"no method was named; choose some of {', '.join(PARTITIONERS)}")
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    for name, n in (("n_null", n_null if "rewired" in nulls else None), ("n_networks", n_networks)):
        if n is not None and not 1 / (1 + n) <= level:
            least = math.ceil(1 / level) - 1
            raise InputError(f"{name}={n} null samples cannot reach the level {level}; take at least {least}")


def _rewired(criterion: Criterion, n_null: int, seed: int) -> list[Criterion]:
    generator = torch.Generator().manual_seed(seed)
    drawn = rewire(criterion.communication, criterion.possible, n_null, generator, criterion.kept)
    return [without_idle(dataclasses.replace(criterion, communication=told)) for told in drawn]


def _network_nulls(
    graph: Graph, nulls: Sequence[str], untrained: Callable[[int], Graph] | None
) -> dict[str, Callable[[int], Graph]]:
    def changed(null: str) -> Callable[[int], Graph]:
        return lambda seed: NETWORK_NULLS[null](graph, torch.Generator().manual_seed(seed))

    made = {null: changed(null) for null in nulls if null != "rewired"}
    return made if untrained is None else made | {"untrained": untrained}


def _judge(
    graph: Graph | None,
    measured: Communication,
    criterion: Criterion,
    search: Search,
    samples_of: Mapping[str, list[Criterion]],
    level: float,
    progress: bool | None,
) -> Modules:
    candidates = search.candidates(criterion)
    bits = search.bits(criterion, candidates)
    by_count: dict[int, Partition] = {}
    for partition in sorted(candidates, key=lambda p: bits[p]):
        if bits[partition] < math.inf:
            by_count.setdefault(partition.n_blocks, partition)
    hierarchy = tuple(by_count[count] for count in sorted(by_count))
    # a tie is no reason for modules: one block is first
    chosen = min(hierarchy, key=lambda p: bits[p])
    here, tests = search.best(criterion, candidates), []
    for null, samples in samples_of.items():
        shown = track(samples, f"searching {null} graphs", len(samples), show=progress)
        there = [search.best(sample, search.candidates(sample)) for sample in shown]
        tests += [null_test(null, name, here[name], [found[name] for found in there]) for name in STATISTICS]
    whole = Partition.from_blocks(measured.nodes, chosen.blocks.values())
    grouped = None if graph is None else graph.quotient(whole.blocks)
    return Modules(grouped, measured, whole, hierarchy, criterion, tuple(tests), level)
