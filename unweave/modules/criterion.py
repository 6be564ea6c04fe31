"""Which of many partitions is best: the one whose interfaces describe the communication in the fewest bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError
from unweave.graph import Graph
from unweave.modules.communication import Communication
from unweave.modules.partition import Partition

__all__ = ["Criterion", "Description", "possible_pairs"]

# candidates times pairs that are looked at together; bounds memory, not the result
AT_ONCE = 1 << 20
LEAST_GAIN_BITS = 1e-9


def possible_pairs(graph: Graph) -> Bool[Tensor, "nodes nodes"]:
    """``[j, i]``: whether some port of node j could hear node i, were nothing cut: what execution order allows.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> possible_pairs(graph)[graph.nodes.index("unembed")].sum() == len(graph.nodes) - 1
        tensor(True)
    """
    place = {name: i for i, name in enumerate(graph.nodes)}
    readers = torch.tensor([place[port.rsplit(".", 1)[0]] for port in graph.ports])
    writers = torch.tensor([place[writer] for writer in graph.writers])
    out = torch.zeros(len(place), len(place), dtype=torch.bool)
    port, writer = graph.possible_edges.nonzero(as_tuple=True)
    out[readers[port], writers[writer]] = True
    return out


@dataclass(frozen=True)
class Description:
    """What it takes to describe the communication through a partition.

    Attributes:
        partition_bits: to say which node is in which block; infinite where blocks talk less inside than between.
        inner_bits: to list the kept edges inside blocks, and for these edges.
        interface_bits: the same between blocks.
        lost_inside_bits, lost_bits: for what the dropped edges inside and between blocks would have said.
        lost_inside_nats, lost_nats: the same in nats per token; the latter are lost through the interfaces.
        n_inner, n_kept_inside: possible edges inside blocks, and how many are kept.
        n_between, n_kept: the same between blocks.
    """

    partition_bits: float
    inner_bits: float
    interface_bits: float
    lost_inside_bits: float
    lost_bits: float
    lost_inside_nats: float
    lost_nats: float
    n_inner: int
    n_kept_inside: int
    n_between: int
    n_kept: int

    @property
    def bits(self) -> float:
        """All of it."""
        listed = self.partition_bits + self.inner_bits + self.interface_bits
        return listed + self.lost_inside_bits + self.lost_bits


@dataclass(frozen=True, eq=False)
class Criterion:
    """The description length, in bits, of a communication graph seen through a partition.

    The edges that execution order allows fall in two lists, those inside blocks and those between blocks::

        L(P) = partition + list(inside) + list(between)

        list(edges) = log2(c + 1) + log2(c choose k) + sum of b_e over the k kept edges out of these c
                      + sum of tokens * nats_e / ln 2 over the dropped ones
        partition = log2 p(n) + log2 (n! / (product of block sizes! * product over sizes of how many blocks have it!))

    A list says how many edges are kept, which, and what they are; what a dropped edge carried is lost on every token.
    The kept edges are those that make L least, which sorting by (tokens * nats_e / ln 2 - b_e) finds exactly, since a
    list costs the same whichever k edges are on it. Two lists are shorter than one where most edges inside blocks are
    kept and few between: inside a block everything may talk to everything and little has to be said about who does;
    an interface is a short list. Blocks that talk less inside than between (layers) are no modules: L is infinite.
    p(n) is the number of ways to write n as a sum: the block sizes are named first, then which nodes they hold, so that
    a few blocks beside many nodes on their own are cheap to name. One block and all nodes apart have one list and cost
    the same; they compete with the rest, and a network without modules is described best by them.

    b_e = log2(tokens) / 2 bits, the price of one parameter measured on so many tokens; times the edge's effective
    dimensions where ``by_dimension`` is set.

    Attributes:
        communication: of the graph.
        possible: which pairs execution order allows, ``[reader, writer]``.
        tokens: how many tokens the description must serve.
        by_dimension: whether an edge costs b_e for each dimension shared (at least one).

    Raises:
        InputError: fewer than 2 tokens, or nats that are negative or not finite, or where no edge is possible.
        ShapeError: possible does not fit the nodes.

    Cost:
        O(n^2) per partition after sorting n^2 pairs once.

    Exact?
        The list of kept edges is the best one. Nats of dropped edges are added up: the second order without what
        edges do together.

    Source:
        Rissanen 1978, "Modeling by shortest data description"; Gruenwald 2007, "The Minimum Description Length
        Principle".
    """

    communication: Communication
    possible: Bool[Tensor, "nodes nodes"]
    tokens: int
    by_dimension: bool = False

    def __post_init__(self) -> None:
        nats, n = self.communication.nats, len(self.communication.nodes)
        if tuple(self.possible.shape) != (n, n) or tuple(nats.shape) != (n, n):
            raise ShapeError(f"possible and nats of {n} nodes must be [{n}, {n}], got {tuple(self.possible.shape)}")
        if not self.tokens >= 2:
            raise InputError(f"a description must serve at least 2 tokens, got {self.tokens}; say tokens=...")
        if not bool(torch.isfinite(nats).all()) or bool((nats < 0).any()):
            raise InputError("nats must be finite and not negative; measure them with the Fisher")
        if bool((nats[~self.possible.to(nats.device)] != 0).any()):
            raise InputError("there are nats between nodes that execution order keeps apart; is this the same graph?")

    @cached_property
    def _pairs(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Float[Tensor, " pairs"], Tensor]:
        """(reader, writer, bits to keep, bits lost when dropped) of the possible edges, best to keep first."""
        reader, writer = self.possible.cpu().nonzero(as_tuple=True)
        nats = self.communication.nats.detach().cpu().to(torch.float64)[reader, writer]
        lost = self.tokens * nats / math.log(2)
        price = torch.full_like(lost, math.log2(self.tokens) / 2)
        if self.by_dimension:
            shared = self.communication.dimensions.detach().cpu().to(torch.float64)[reader, writer]
            price = price * shared.clamp(min=1.0)
        order = (price - lost).argsort(stable=True)
        return reader[order], writer[order], price[order], lost[order]

    def bits(self, labels: Int[Tensor, "candidates nodes"]) -> Float[Tensor, " candidates"]:
        """L of many partitions at once, given as labels from 0 to n - 1 (infinite where modules talk more between)."""
        pieces = max(1, labels.shape[0] * max(1, len(self._pairs[0])) // AT_ONCE)
        return torch.cat([sum(self._parts(piece)[:5]) for piece in labels.tensor_split(pieces)])  # type: ignore[misc]

    def describe(self, partition: Partition) -> Description:
        """L of one partition, part by part."""
        if partition.nodes != self.communication.nodes:
            raise InputError("the partition is one of other nodes; take the communication's nodes")
        parts = [float(part[0]) for part in self._parts(torch.tensor([partition.labels]))]
        named, inner, interface, lost_inside, lost = parts[:5]
        nats, counts = math.log(2) / self.tokens, [int(part) for part in parts[5:]]
        return Description(named, inner, interface, lost_inside, lost, lost_inside * nats, lost * nats, *counts)

    def _parts(self, labels: Int[Tensor, "candidates nodes"]) -> tuple[Tensor, ...]:
        """(bits of the partition, of both lists, of what both drop; sizes of the lists and edges kept in each)."""
        reader, writer, _, _ = self._pairs
        cross = labels[:, reader] != labels[:, writer]
        inner, between = self._list(~cross), self._list(cross)
        # blocks that talk less inside than between are no modules: their lists must not pay
        n_inner, k_inner, n_cross, k_cross = inner[2], inner[3], between[2], between[3]
        apart = k_inner * n_cross < k_cross * n_inner
        extra = torch.where(apart, math.inf, 0.0)
        named = _partition_bits(labels) + extra
        return named, inner[0], between[0], inner[1], between[1], n_inner, k_inner, n_cross, k_cross

    def _list(self, among: Bool[Tensor, "candidates pairs"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(bits of the best list of kept edges, bits lost on the others, how many pairs, how many kept)."""
        _, _, price, lost = self._pairs
        here = among.to(torch.float64)
        first = torch.zeros(len(here), 1, dtype=torch.float64)
        n_pairs = here.sum(1, keepdim=True)
        # column k of each: after the k best pairs, those of the other list passed over
        kept = torch.cat([first, here.cumsum(1)], 1)
        paid = torch.cat([first, (here * price).cumsum(1)], 1) + _log2_choose(n_pairs, kept)
        gone = (here @ lost)[:, None] - torch.cat([first, (here * lost).cumsum(1)], 1)
        best = (paid + gone).argmin(1, keepdim=True)
        listed = paid.gather(1, best) + torch.log2(n_pairs + 1)
        dropped = gone.gather(1, best).clamp(min=0.0)
        return listed[:, 0], dropped[:, 0], n_pairs[:, 0], kept.gather(1, best)[:, 0]

    def improve(self, partition: Partition, max_sweeps: int = 10) -> Partition:
        """Move single nodes between blocks, or out into blocks of their own, and join blocks, while L falls.

        Args:
            max_sweeps: rounds in which every move is tried.

        Returns:
            A partition that no single one of these steps improves (unless the rounds ran out).

        Cost:
            O(n B + B^2) descriptions per round for B blocks.
        """
        labels = torch.tensor(partition.labels)
        for _ in range(max_sweeps):
            here = float(self.bits(labels[None])[0])
            steps = torch.cat([_moves(labels), _joins(labels)])
            found = self.bits(steps)
            better = int(found.argmin())
            if not float(found[better]) < here - LEAST_GAIN_BITS:
                break
            labels = self._best_together(labels, steps[found.argsort()][: int((found < here - LEAST_GAIN_BITS).sum())])
        return Partition(partition.nodes, tuple(labels.tolist()))

    def _best_together(self, labels: Tensor, steps: Tensor) -> Tensor:
        """The best of taking the first step, the first two, ... of steps that each help alone."""
        together = [labels]
        for step in steps[: len(labels)]:
            together.append(torch.where(step != labels, step, together[-1]))
        taken = torch.stack(together[1:])
        return torch.unique(taken[int(self.bits(taken).argmin())], return_inverse=True)[1]

    def table(self, partitions: tuple[Partition, ...]) -> list[dict[str, Any]]:
        """The curve: one plain row per partition."""
        rows = []
        for partition in partitions:
            d = self.describe(partition)
            row = {"blocks": partition.n_blocks, "bits": d.bits, "partition_bits": d.partition_bits}
            row |= {"inner_bits": d.inner_bits, "interface_bits": d.interface_bits}
            row |= {"lost_inside_bits": d.lost_inside_bits, "lost_bits": d.lost_bits, "lost_nats": d.lost_nats}
            rows.append(row | {"kept_inside": d.n_kept_inside, "kept_between": d.n_kept})
        return rows


def _moves(labels: Int[Tensor, " nodes"]) -> Int[Tensor, "steps nodes"]:
    """Every node in every other block, or in a new one."""
    n = len(labels)
    n_targets = min(int(labels.max()) + 2, n)
    steps = labels.repeat(n, n_targets, 1)
    every = torch.arange(n)
    steps[every, :, every] = torch.arange(n_targets)
    return steps.flatten(0, 1)


def _joins(labels: Int[Tensor, " nodes"]) -> Int[Tensor, "steps nodes"]:
    """Every two blocks as one."""
    n_blocks = int(labels.max()) + 1
    a, b = torch.triu_indices(n_blocks, n_blocks, 1)
    return torch.where(labels == b[:, None], a[:, None], labels)


def _log2_choose(n: Tensor, k: Tensor) -> Tensor:
    return (torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)) / math.log(2)


def _partition_bits(labels: Int[Tensor, "candidates nodes"]) -> Float[Tensor, " candidates"]:
    """log2 p(n) + log2 of the number of partitions with these block sizes."""
    n = labels.shape[1]
    sizes = torch.zeros(len(labels), n, dtype=torch.long).scatter_add_(1, labels, torch.ones_like(labels))
    how_many = torch.zeros(len(labels), n + 1, dtype=torch.long).scatter_add_(1, sizes, torch.ones_like(sizes))[:, 1:]
    orders = torch.lgamma(sizes.double() + 1).sum(1) + torch.lgamma(how_many.double() + 1).sum(1)
    return math.log2(_integer_partitions(n)) + (math.lgamma(n + 1) - orders).clamp(min=0.0) / math.log(2)


@lru_cache(maxsize=64)
def _integer_partitions(n: int) -> int:
    """In how many ways n is a sum of positive integers, order aside."""
    ways = [1] + [0] * n
    for part in range(1, n + 1):
        for total in range(part, n + 1):
            ways[total] += ways[total - part]
    return ways[n]
