"""How many dimensions each edge of a circuit needs: edges are narrowed until the divergence would leave its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from unweave.circuits.circuit import Circuit, Trial
from unweave.circuits.distance import Distance
from unweave.circuits.sizes import edge_sides
from unweave.compression.factors import spectrum
from unweave.data import Batch, TokenData
from unweave.errors import InputError
from unweave.execution import Trace
from unweave.graph import Edge, Graph
from unweave.progress import counter
from unweave.scoring import measure_edges, port_gradients
from unweave.statistics import FisherPass, Gradients, Sums, Tally, accumulate

__all__ = ["narrow_circuit"]

DIRECTIONS = ("fisher", "variance")
# so many edges at once when second moments are taken; bounds memory, not the result
EDGES_AT_ONCE = 64
# share of the dimensions left that one round tries to give up, at first
FIRST_REMOVAL = 0.25
# bisection steps over the price of a number
BISECTIONS = 12


def narrow_circuit(
    circuit: Circuit,
    data: TokenData,
    *,
    kl_nats: float | None = None,
    directions: str = "fisher",
    samples: int = 4,
    max_trials: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Circuit:
    """The same circuit with edges that keep as few dimensions as a divergence allows.

    Which dimensions: an edge from writer i to port j loses about 1/2 E[(g_j . (1 - P)(y_i - r_i))^2] nats when it keeps
    the projection P. With E[g g^T] weighted by |y - r|^2 and E[(y - r)(y - r)^T] by |g|^2 (the Kronecker factors of
    the joint second moment), the best P of each rank is a truncated SVD, see :func:`spectrum`. How many: each edge's
    measured effect inside the circuit is shared out over its directions, dimensions are given up in the order of nats
    per number stored, and every step is accepted on a measurement. An edge that keeps k dimensions takes
    k (written + read) numbers, a whole one written x read; an edge is narrowed only where that saves numbers.

    Args:
        circuit: of whole edges, from :func:`find_circuit`.
        data: the prompts that it was found on.
        kl_nats: the divergence allowed, nats per token; by default 1.25 times the circuit's.
        directions: "fisher", as above; or "variance": the principal components of y - r, whatever its reader feels, the
            baseline to compare with.
        samples: cotangents per prompt.
        max_trials: measurements at most.

    Returns:
        :class:`Circuit` with a narrow graph: ``graph.dimensions`` says how many dimensions each edge keeps.

    Raises:
        InputError: the circuit is narrow already, has no edge, or is itself above ``kl_nats``.

    Cost:
        One pass of ``samples`` backward passes, (edges / 2) forward passes and up to ``max_trials`` more.

    Exact?
        The stated nats are measured. The choice is greedy.

    Example:
        >>> import unweave
        >>> from unweave.circuits import narrow_circuit
        >>> graph, scope = unweave.capture("zoo:induction"), unweave.Scope(positions="answered")
        >>> data = unweave.load_data("zoo:induction", limit=32)
        >>> circuit = unweave.find_circuit(graph, data, scope, faithfulness=0.95)
        >>> narrow = narrow_circuit(circuit, data)
        >>> narrow.n_numbers < circuit.n_numbers / 2
        True
    """
    if directions not in DIRECTIONS:
        raise InputError(f"directions must be one of {', '.join(DIRECTIONS)}, got {directions!r}")
    if circuit.graph.is_narrow or circuit.n_edges == 0:
        raise InputError("narrow a circuit of whole edges, with at least one of them")
    target = 1.25 * circuit.nats if kl_nats is None else kl_nats
    if circuit.nats > target:
        raise InputError(
            f"the circuit is {circuit.nats:.3g} nats away with whole edges, above the {target:.3g} allowed"
        )
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    data = circuit.instead.paired(data, seed)
    own = measure_edges(circuit.graph, data, circuit.scope, circuit.kept, circuit.instead, **options)
    step = FisherPass(circuit.graph, circuit.scope, samples, seed, (_EdgeMoments(circuit),))
    sums = accumulate(data, step, description="dimensions of edges", **options)
    ladders = _ladders(circuit, sums, own.nats[circuit.kept].tolist(), directions)
    distance = Distance(circuit.original, data, circuit.scope, circuit.instead, batch_size)
    with counter("measuring dimensions", max_trials, show=progress) as count:
        search = _Narrowing(circuit, distance, ladders, target, max_trials, count)
        ranks, nats = search.cheapest()
    graph = search.graph_of(ranks)
    kept = graph.edge_matrix
    trials = (*circuit.trials, *search.trials)
    return dataclasses.replace(circuit, graph=graph, kept=kept, nats=nats, trials=trials)


# ---- which dimensions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EdgeMoments:
    """Second moments of every edge of a circuit, as a measure of a :class:`FisherPass`."""

    circuit: Circuit

    def __call__(self, t: Trace, batch: Batch) -> Tally:
        sent = self.circuit.instead.sent(t.graph, batch, t.counterfactual)
        return _MomentTally(self.circuit, t, port_gradients(t), sent)


@dataclass
class _MomentTally:
    circuit: Circuit
    t: Trace
    gradient_of: Callable[[int, str, Gradients], Tensor]
    sent: list[Tensor]
    gathered: Sums = field(default_factory=dict)

    @torch.no_grad()
    def add(self, gradients: Gradients) -> None:
        at, y = -1, torch.empty(0)
        for s, name, nodes, writers in _by_port(self.circuit):
            g = self.gradient_of(s, name, gradients).flatten(1, 2)
            if s != at:  # all ports of a stage may hear the same
                at, y = s, self._differences(s)
            felt, seen = [], []
            for n, w in zip(nodes.split(EDGES_AT_ONCE), writers.split(EDGES_AT_ONCE), strict=True):
                felt.append(_weighted(g[n], y[w].square().sum(-1)))
                seen.append(_weighted(y[w], g[n].square().sum(-1)))
            for kind, value in (("felt", torch.cat(felt)), ("seen", torch.cat(seen))):
                key = f"{s}.{name}.{kind}"
                self.gathered[key] = self.gathered.get(key, 0.0) + value

    def _differences(self, s: int) -> Float[Tensor, "writer token d"]:
        """y_i - r_i of all that a stage may hear."""
        lo, hi = self.t.graph.stages[s].visible
        written = rearrange(self.t.written(lo, hi).float(), "b w t d -> w b t d")
        shape = written.shape[1:]
        replaced = [x.expand(-1, *shape) for x in self.sent[lo:hi]]
        return (written - torch.cat(replaced)).flatten(1, 2)

    def sums(self) -> Sums:
        return self.gathered


def _weighted(x: Float[Tensor, "edge token d"], weight: Float[Tensor, "edge token"]) -> Float[Tensor, "edge d d"]:
    """The sum over tokens of weight x x^T."""
    return (x * weight[..., None]).mT @ x


def _by_port(circuit: Circuit) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """(stage, port, node of the stage and visible writer of each edge), in the order of the circuit's edges."""
    graph = circuit.original
    for s, stage in enumerate(graph.stages):
        for port in stage.ports:
            row = graph.port_starts[s, port.name]
            nodes, writers = circuit.kept[row : row + len(stage.nodes), graph.visible_writers(s)].nonzero(as_tuple=True)
            if len(nodes):
                yield s, port.name, nodes.to(graph.device), writers.to(graph.device)


class _Ladder(NamedTuple):
    """What an edge may keep: nothing, 1, 2, ... dimensions, or all.

    Attributes:
        left, right: factors of the widest projection; the first k columns and rows are the projection of rank k.
        nats: what is lost below each rung: with 0, 1, ... dimensions.
        numbers: what each rung takes; the last is the whole edge's.
    """

    edge: Edge
    left: Float[Tensor, "d k"]
    right: Float[Tensor, "k d"]
    nats: list[float]
    numbers: list[int]


def _ladders(circuit: Circuit, sums: Sums, own: list[float], directions: str) -> list[_Ladder]:
    written, read = edge_sides(circuit.original)
    effect = dict(zip(circuit.edges, own, strict=True))
    graph, ladders = circuit.original, []
    for s, name, nodes, writers in _by_port(circuit):
        names, stage = graph.writers[graph.visible_writers(s)], graph.stages[s]
        pairs = zip(nodes.tolist(), writers.tolist(), sums[f"{s}.{name}.felt"], sums[f"{s}.{name}.seen"], strict=True)
        for n, w, felt, seen in pairs:
            if directions == "variance":
                felt = torch.eye(len(felt), dtype=felt.dtype, device=felt.device)
            edge = Edge(names[w], stage.nodes[n], name)
            ladders.append(_ladder(edge, felt, seen, effect[edge], written[edge.src], read[edge.dst, name]))
    return ladders


def _ladder(edge: Edge, felt: Tensor, seen: Tensor, nats: float, written: int, read: int) -> _Ladder:
    eye = torch.eye(len(felt), dtype=torch.float64, device=felt.device)
    found = spectrum(eye, seen.double(), felt.double())
    widest = max(0, (written * read - 1) // (written + read))  # more dimensions take more than the whole edge
    share = found.nats / found.nats.sum().clamp(min=1e-300)
    lost = nats * (1.0 - torch.cat([share.new_zeros(1), share.cumsum(0)])[: widest + 1]).clamp(min=0)
    numbers = [k * (written + read) for k in range(widest + 1)] + [written * read]
    return _Ladder(edge, found.left[:, :widest].float(), found.right[:widest].float(), [*lost.tolist(), 0.0], numbers)


# ---- how many ---------------------------------------------------------------------------------------------------


@dataclass
class _Narrowing:
    """Rungs for every edge, measured. A choice is a tuple: the rung of each ladder."""

    circuit: Circuit
    distance: Distance
    ladders: list[_Ladder]
    target: float
    max_trials: int
    count: Any
    trials: list[Trial] = field(default_factory=list)
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    @property
    def spent(self) -> bool:
        return len(self.trials) >= self.max_trials

    def graph_of(self, ranks: tuple[int, ...]) -> Graph:
        """The circuit with every edge on its rung."""
        chosen = list(zip(self.ladders, ranks, strict=True))
        gone = [ladder.edge for ladder, k in chosen if k == 0]
        graph = self.circuit.graph
        if gone:
            graph = self.circuit.instead.cut(graph, graph.edge_matrix & ~graph.mark_edges(gone))
        some: dict[Edge | str, Any] = {
            x.edge: (x.left[:, :k], x.right[:k]) for x, k in chosen if 0 < k < len(x.numbers) - 1
        }
        return self.circuit.instead.narrow(graph, some) if some else graph

    def measure(self, ranks: tuple[int, ...]) -> float:
        """Nats per token of a choice."""
        if ranks not in self.known:
            self.known[ranks] = self.distance.of_graph(self.graph_of(ranks))
            self.trials.append(Trial(sum(k > 0 for k in ranks), self.known[ranks]))
            self.count()
        return self.known[ranks]

    def cheapest(self) -> tuple[tuple[int, ...], float]:
        """The choice of fewest numbers found within the target."""
        whole = tuple(len(x.numbers) - 1 for x in self.ladders)
        best = whole
        low, high = 0.0, max((x.nats[0] for x in self.ladders), default=0.0)
        for _ in range(BISECTIONS):  # over the price of a number, the same for all edges
            price = high if low == 0.0 else (low * high) ** 0.5
            ranks = tuple(_rung(x, price) for x in self.ladders)
            if self.measure(ranks) <= self.target and self._numbers(ranks) <= self._numbers(best):
                low, best = price, ranks
                if price == high:
                    break
            else:
                high = price
                low = low or price / 1e6
        return self._descend(best)

    def _numbers(self, ranks: tuple[int, ...]) -> int:
        return sum(x.numbers[k] for x, k in zip(self.ladders, ranks, strict=True))

    def _descend(self, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
        """Step down single rungs, the cheapest first, many at once while that works."""
        stuck: set[tuple[int, int]] = set()
        n = max(1, int(FIRST_REMOVAL * len(ranks)))
        while not self.spent:
            steps = [(self._price(e, k), e) for e, k in enumerate(ranks) if k > 0 and (e, k) not in stuck]
            if not steps:
                break
            n = min(n, len(steps))
            lower = list(ranks)
            for _, e in sorted(steps)[:n]:
                lower[e] -= 1
            if self.measure(tuple(lower)) <= self.target:
                ranks = tuple(lower)
            elif n == 1:
                e = min(steps)[1]
                stuck.add((e, ranks[e]))
            else:
                n = max(1, n // 2)
        return ranks, self.measure(ranks)

    def _price(self, e: int, k: int) -> float:
        """Nats lost per number saved when edge e steps down from rung k."""
        x = self.ladders[e]
        return (x.nats[k - 1] - x.nats[k]) / max(x.numbers[k] - x.numbers[k - 1], 1)


def _rung(ladder: _Ladder, price: float) -> int:
    """The rung that costs least when a number costs ``price`` nats."""
    costs = [nats + price * numbers for nats, numbers in zip(ladder.nats, ladder.numbers, strict=True)]
    return costs.index(min(costs))
