"""A partition of nodes into blocks, and how well it cuts a weighted graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from unweave.errors import InputError, ShapeError, UnknownNameError

__all__ = ["Partition", "between_blocks", "check_weights"]


@dataclass(frozen=True)
class Partition:
    """Which block every node is in. Equal where the blocks are equal, whatever they were numbered.

    Attributes:
        nodes: their names, all different.
        labels: the block of each node; renumbered 0, 1, ... in the order of the blocks' first nodes.

    Raises:
        InputError: not one label per node, no node at all, or a name twice.

    Example:
        >>> halves = Partition(("a", "b", "c"), (7, 7, 2))
        >>> halves["c"], halves.blocks
        (1, {'module.0': ('a', 'b'), 'module.1': ('c',)})
    """

    nodes: tuple[str, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.nodes or len(self.nodes) != len(self.labels):
            raise InputError(f"a partition needs one label per node, got {len(self.labels)} for {len(self.nodes)}")
        if len(set(self.nodes)) < len(self.nodes):
            twice = next(n for n in self.nodes if self.nodes.count(n) > 1)
            raise InputError(f"the node {twice!r} is in the partition twice; name each node once")
        number: dict[int, int] = {}
        labels = tuple(number.setdefault(int(label), len(number)) for label in self.labels)
        object.__setattr__(self, "labels", labels)

    @classmethod
    def from_blocks(cls, nodes: Sequence[str], blocks: Iterable[Iterable[str]]) -> Partition:
        """The partition with these blocks; nodes in none of them stay on their own.

        Raises:
            UnknownNameError: a block names a node that is not there.
            InputError: a node is in two blocks.

        Example:
            >>> Partition.from_blocks("abcd", [{"b", "d"}]).labels
            (0, 1, 2, 1)
        """
        known = set(nodes)
        label_of: dict[str, int] = {}
        for b, block in enumerate(blocks):
            for node in block:
                if node not in known:
                    raise UnknownNameError("node", node, nodes)
                if label_of.setdefault(node, b) != b:
                    raise InputError(f"{node} is in two blocks, {label_of[node]} and {b}; each node has one block")
        return cls(tuple(nodes), tuple(label_of.get(n, -1 - i) for i, n in enumerate(nodes)))

    def __getitem__(self, node: str) -> int:
        """The number of a node's block.

        Raises:
            UnknownNameError: no such node.
        """
        if node not in self._label_of:
            raise UnknownNameError("node", node, self.nodes)
        return self._label_of[node]

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self.nodes)

    @cached_property
    def _label_of(self) -> Mapping[str, int]:
        return dict(zip(self.nodes, self.labels, strict=True))

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return max(self.labels) + 1

    @property
    def is_trivial(self) -> bool:
        """Whether it groups nothing: at most one block holds more than one node."""
        return sum(len(block) > 1 for block in self.blocks.values()) < 2

    @cached_property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """The nodes of each block by its name ``module.NUMBER``, as :meth:`unweave.Graph.quotient` takes them."""
        out: dict[str, tuple[str, ...]] = {f"module.{b}": () for b in range(self.n_blocks)}
        for node, label in zip(self.nodes, self.labels, strict=True):
            out[f"module.{label}"] += (node,)
        return out

    def restricted(self, nodes: Iterable[str]) -> Partition:
        """The same blocks with only these nodes in them, in their own order.

        Raises:
            UnknownNameError: no such node.

        Example:
            >>> Partition(("a", "b", "c"), (0, 1, 1)).restricted(["c", "a"]).blocks
            {'module.0': ('c',), 'module.1': ('a',)}
        """
        names = tuple(nodes)
        return Partition(names, tuple(self[node] for node in names))

    def within(self, coarser: Partition) -> bool:
        """Whether every block lies in one block of the other: they are nested."""
        pairs = {(self[node], coarser[node]) for node in self.nodes}
        return len(pairs) == self.n_blocks

    def adjusted_rand(self, other: Partition) -> float:
        """The adjusted Rand index against another partition of the same nodes: 1 where they are equal, 0 by chance.

        Raises:
            InputError: the nodes differ.

        Example:
            >>> Partition(("a", "b", "c"), (0, 0, 1)).adjusted_rand(Partition(("a", "b", "c"), (5, 5, 3)))
            1.0

        Source:
            Hubert & Arabie 1985, "Comparing partitions".
        """
        if set(self.nodes) != set(other.nodes):
            raise InputError("partitions of different nodes cannot be compared; take .restricted(nodes) first")
        return float(adjusted_rand_score(self.labels, other.restricted(self.nodes).labels))

    def n_cut(self, weights: Float[Tensor, "nodes nodes"]) -> float:
        """The normalised cut: sum over blocks b of cut(b) / vol(b).

        cut(b) is the weight that leaves b and vol(b) the sum of its nodes' degrees. From 0 (nothing crosses) to the
        number of blocks; B blocks drawn at random give about B - 1. Blocks without any weight count 0.

        Args:
            weights: symmetric, not negative, zero diagonal.

        Source:
            Shi & Malik 2000, "Normalized Cuts and Image Segmentation"; as a measure of networks: Filan et al. 2021,
            "Clusterability in Neural Networks".
        """
        inside, volume = self._inside_and_volume(weights)
        return float(torch.where(volume > 0, (volume - inside) / volume, 0.0).sum())

    def relative_n_cut(self, weights: Float[Tensor, "nodes nodes"]) -> float:
        """(1 + n-cut) / B: comparable between numbers B of blocks; 1 for one block or a cut no better than chance."""
        return (1 + self.n_cut(weights)) / self.n_blocks

    def modularity(self, weights: Float[Tensor, "nodes nodes"]) -> float:
        """Newman's Q: sum over blocks of inside(b) / W - (vol(b) / W)^2, with W the sum of all degrees.

        0 for one block; below 1. 0 where there is no weight at all.

        Args:
            weights: symmetric, not negative, zero diagonal.

        Source:
            Newman & Girvan 2004, "Finding and evaluating community structure in networks".
        """
        inside, volume = self._inside_and_volume(weights)
        total = volume.sum()
        return float((inside / total - (volume / total).square()).sum()) if total > 0 else 0.0

    def _inside_and_volume(
        self, weights: Float[Tensor, "nodes nodes"]
    ) -> tuple[Float[Tensor, " blocks"], Float[Tensor, " blocks"]]:
        check_weights(weights, len(self))
        between = between_blocks(weights, self)
        return between.diagonal(), between.sum(1)


def between_blocks(nats: Float[Tensor, "nodes nodes"], partition: Partition) -> Float[Tensor, "blocks blocks"]:
    """The sum over the nodes of every two blocks, in float64 on the CPU; rows are summed to rows.

    Example:
        >>> between_blocks(torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]]), Partition(("a", "b", "c"), (0, 0, 1)))
        tensor([[ 4.,  6.],
                [11.,  0.]], dtype=torch.float64)
    """
    member = torch.nn.functional.one_hot(torch.tensor(partition.labels)).to(torch.float64)
    return member.T @ nats.detach().cpu().to(torch.float64) @ member


def check_weights(weights: Float[Tensor, "nodes nodes"], n_nodes: int) -> None:
    """Refuse what is no undirected weighted graph of so many nodes.

    Raises:
        ShapeError: a wrong number of nodes.
        InputError: a weight is negative, NaN or infinite, or the matrix is not symmetric with a zero diagonal.
    """
    if tuple(weights.shape) != (n_nodes, n_nodes):
        raise ShapeError(f"the weights of {n_nodes} nodes must be [{n_nodes}, {n_nodes}], got {tuple(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise InputError("weights of a graph must be finite and not negative; take the nats of a second-order score")
    if not torch.equal(weights, weights.T) or bool((weights.diagonal() != 0).any()):
        raise InputError("weights must be symmetric with a zero diagonal; take Communication.symmetric()")
