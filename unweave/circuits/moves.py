"""From one candidate circuit to the next: edges are filled in, exchanged and removed, and each result is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.circuits.circuit import Trial, connected
from unweave.circuits.distance import Distance
from unweave.errors import InputError
from unweave.freezing import stop_gradients
from unweave.graph import Graph
from unweave.scope import divergence
from unweave.scoring import EdgeScores, edge_products
from unweave.statistics import differentiable_trace, gradients_of

__all__ = ["Search"]

# sizes tried at first, as shares of all edges
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# share of a circuit's edges that one round tries to exchange, and to remove, at first
FIRST_EXCHANGE = 0.25
FIRST_REMOVAL = 0.5
# exchanges tried between two rounds of removal
EXCHANGES = 12
# for a budget in edges: how many targets in nats are tried, down to this share of the empty circuit's nats
TARGETS = 6
LEAST_TARGET = 1e-4
# stands for a cost that nothing outweighs
NEVER = 1e30


@dataclass
class Search:
    """Candidates measured so far, and the moves from one to the next. Units are edges, or nodes at that level."""

    distance: Distance
    scores: EdgeScores
    level: str
    max_trials: int
    count: Callable[[], None]
    trials: list[Trial] = field(default_factory=list)
    counted: set[bytes] = field(default_factory=set)
    slopes: dict[bytes, Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.distance.graph

    @property
    def n_trials(self) -> int:
        return len(self.trials)

    @property
    def spent(self) -> bool:
        return self.n_trials >= self.max_trials

    def measure(self, keep: Bool[Tensor, "ports writers"]) -> float:
        """Nats per token of a candidate; one met again is not a new trial."""
        nats, key = self.distance.of(keep), keep.numpy().tobytes()
        if key not in self.counted:
            self.counted.add(key)
            self.trials.append(Trial(int(keep.sum()), nats))
            self.count()
        return nats

    # ---- units: what is chosen ----------------------------------------------------------------------------

    def edges_of(self, units: Bool[Tensor, " units"]) -> Bool[Tensor, "ports writers"]:
        """The edges that a choice of units keeps, those that reach no output dropped: they do nothing."""
        if self.level != "node":
            keep = torch.zeros_like(self.graph.edge_matrix)
            keep[self.graph.edge_matrix] = units
        else:
            keep = self.graph.edge_matrix & units[self.port_node][:, None] & units[self.writer_node][None]
        return connected(self.graph, keep, fed=False)

    def units_of(self, edges: Bool[Tensor, "ports writers"]) -> Bool[Tensor, " units"]:
        """The units that a set of edges needs."""
        if self.level != "node":
            return edges[self.graph.edge_matrix]
        units = torch.zeros(len(self.graph.nodes), dtype=torch.bool)
        units[self.port_node[edges.any(1)]] = True
        units[self.writer_node[edges.any(0)]] = True
        return units

    @property
    def n_units(self) -> int:
        """How many units there are to choose from."""
        return len(self.graph.nodes) if self.level == "node" else self.graph.n_edges

    @cached_property
    def port_node(self) -> Int[Tensor, " ports"]:
        at = {name: i for i, name in enumerate(self.graph.nodes)}
        return torch.tensor([at[port.rsplit(".", 1)[0]] for port in self.graph.ports])

    @cached_property
    def writer_node(self) -> Int[Tensor, " writers"]:
        at = {name: i for i, name in enumerate(self.graph.nodes)}
        return torch.tensor([at[name] for name in self.graph.writers])

    def worth(self, nats: Float[Tensor, "ports writers"]) -> Float[Tensor, " units"]:
        """Nats by unit, from nats by edge."""
        nats = nats.nan_to_num(0.0).abs()
        if self.level != "node":
            return nats[self.graph.edge_matrix]
        worth = torch.zeros(len(self.graph.nodes))
        worth[self.writer_node] = nats.amax(0)
        worth[-1] = NEVER  # the output is always there
        return worth

    # ---- a first circuit from the ranking -----------------------------------------------------------------

    def of_size(self, n_edges: int, empty: float) -> tuple[Bool[Tensor, "ports writers"], float]:
        """The closest circuit found of at most ``n_edges`` edges: out of the ranking, and by bisection over targets."""
        prefix = self._prefix(n_edges)
        found = [self.exchange(prefix, self.measure(prefix))] if bool(prefix.any()) else []
        low, high = LEAST_TARGET * empty, empty
        for _ in range(TARGETS):
            if self.spent:
                break
            target = math.sqrt(low * high)
            keep, nats = self.within(target)
            if 0 < int(keep.sum()) <= n_edges:
                found.append(self.exchange(*self.fill(keep, nats, n_edges)))
                high = target
            else:
                low = target
        if not found:
            raise InputError(f"no circuit of {n_edges} edges was found; allow more edges or more trials")
        return min(found, key=lambda pair: pair[1])

    def fill(self, keep: Tensor, nats: float, n_edges: int) -> tuple[Bool[Tensor, "ports writers"], float]:
        """Add units, those predicted to gain most first, while they bring the circuit closer and there is room."""
        n = n_edges
        while not self.spent and int(keep.sum()) < n_edges:
            units = self.units_of(keep)
            _, gain = self._predict(keep)
            n = max(1, min(n, n_edges - int(keep.sum())))
            units[torch.where(units, -math.inf, gain).argsort(descending=True)[:n]] = True
            edges = self.edges_of(units)
            if int(edges.sum()) <= n_edges and self.measure(edges) < nats:
                keep, nats = edges, self.measure(edges)
            elif n == 1:
                break
            else:
                n //= 2
        return keep, nats

    def _prefix(self, n_edges: int) -> Bool[Tensor, "ports writers"]:
        """The longest prefix of the ranking that comes to at most ``n_edges`` edges on paths."""
        order = self.worth(self.scores.nats).argsort(descending=True)
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._count(order[:middle]) <= n_edges else (low, middle - 1)
        return self.edges_of(self._mark(order[:low]))

    def _count(self, units: Int[Tensor, " k"]) -> int:
        return int(self.edges_of(self._mark(units)).sum())

    def _mark(self, units: Int[Tensor, " k"]) -> Bool[Tensor, " units"]:
        marked = torch.zeros(self.n_units, dtype=torch.bool)
        marked[units] = True
        return marked

    def within(self, target: float) -> tuple[Bool[Tensor, "ports writers"], float]:
        """The smallest circuit found whose measured divergence is at most ``target``."""
        order = self.worth(self.scores.nats).argsort(descending=True)
        sizes = [*sorted({max(1, round(share * len(order))) for share in GRID}), len(order)]
        low = 0
        for high in sizes:
            keep = self.edges_of(self._mark(order[:high]))
            if self.measure(keep) <= target:
                break
            low = high
        else:
            raise InputError(f"even the whole graph is above {target:.3g} nats: allow at least rounding, about 1e-6")
        while high - low > 1:
            middle = (low + high) // 2
            candidate = self.edges_of(self._mark(order[:middle]))
            if self.measure(candidate) <= target:
                high, keep = middle, candidate
            else:
                low = middle
        return self.shrink(keep, target)

    # ---- moves --------------------------------------------------------------------------------------------

    def exchange(
        self, keep: Tensor, nats: float, moves: int | None = None
    ) -> tuple[Bool[Tensor, "ports writers"], float]:
        """Exchange units for others as long as the divergence falls; the number of edges does not grow."""
        size, share = int(keep.sum()), FIRST_EXCHANGE
        last = self.max_trials if moves is None else min(self.max_trials, self.n_trials + moves)
        while self.n_trials < last:
            units = self.units_of(keep)
            cost, gain = self._predict(keep)
            n = max(1, int(share * int(units.sum())))
            leaving = torch.where(units, cost, math.inf).argsort()[:n]
            entering = torch.where(units, -math.inf, gain).argsort(descending=True)[:n]
            candidate = units.clone()
            candidate[leaving], candidate[entering] = False, True
            edges = self.edges_of(candidate)
            better = int(edges.sum()) <= size and self.measure(edges) < nats
            if better:
                keep, nats = edges, self.measure(edges)
            elif n == 1:
                break
            else:
                share /= 2
        return keep, nats

    def shrink(self, keep: Tensor, target: float) -> tuple[Bool[Tensor, "ports writers"], float]:
        """Remove and exchange in turn until nothing more can go."""
        keep, nats = self.remove(keep, self.measure(keep), target)
        while not self.spent:
            before = int(keep.sum())
            keep, nats = self.remove(*self.exchange(keep, nats, EXCHANGES), target)
            if int(keep.sum()) >= before:
                break
        return keep, nats

    def remove(self, keep: Tensor, nats: float, target: float) -> tuple[Bool[Tensor, "ports writers"], float]:
        """Remove units, the cheapest first, while the divergence stays within the target."""
        needed = torch.zeros_like(self.units_of(keep))
        n = max(1, int(FIRST_REMOVAL * int(self.units_of(keep).sum())))
        while not self.spent:
            units = self.units_of(keep)
            open_ = units & ~needed
            if not bool(open_.any()):
                break
            cost, _ = self._predict(keep)
            n = min(n, int(open_.sum()))
            leaving = torch.where(open_, cost, math.inf).argsort()[:n]
            candidate = units.clone()
            candidate[leaving] = False
            edges = self.edges_of(candidate)
            if bool(edges.any()) and self.measure(edges) <= target:
                keep, nats = edges, self.measure(edges)
            elif n == 1:
                needed[leaving] = True
            else:
                n = max(1, n // 2)
        return keep, nats

    def _predict(self, keep: Tensor) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
        """(what removing each unit is predicted to cost, what returning it is predicted to gain), in nats."""
        key = keep.numpy().tobytes()
        if key not in self.slopes:
            self.slopes = {key: self._slope(keep)}  # only the circuit at hand is asked for again
        slope = self.slopes[key]
        # the first order is taken at the circuit, the second is that of the whole graph
        curvature = self.scores.nats.nan_to_num(0.0).abs()
        cost, gain = torch.where(keep, curvature - slope, 0.0), torch.where(keep, 0.0, -slope - curvature)
        if self.level != "node":
            return cost[self.graph.edge_matrix], gain[self.graph.edge_matrix]
        return self._by_node(cost, NEVER), self._by_node(gain, -NEVER)

    def _by_node(self, nats: Tensor, output: float) -> Float[Tensor, " units"]:
        """The sum over a node's edges out; the output itself never leaves and never enters."""
        sums = torch.full((len(self.graph.nodes),), output)
        sums[self.writer_node] = nats.sum(0)
        return sums

    def _slope(self, keep: Tensor) -> Float[Tensor, "ports writers"]:
        """The first-order change of the divergence, in nats per token, when an edge carries what its writer writes."""
        d = self.distance
        cut, total = stop_gradients(d.instead.cut(self.graph, keep), self.scores.frozen), torch.zeros(keep.shape)
        for number, batch in enumerate(d.batches):
            other = d.other(number)
            t = differentiable_trace(cut, batch, other=other)
            value = divergence(d.scope, d.reference(number), t.output, batch).sum()
            total += edge_products(t, d.instead.sent(self.graph, batch, other), gradients_of(t, value)).sum(0).cpu()
        return total / d.tokens
