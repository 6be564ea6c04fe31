"""Ways to propose partitions of a weighted graph: each returns a hierarchy from few blocks to many.

They only propose; :mod:`unweave.modules.criterion` chooses and :mod:`unweave.modules.nulls` judge.
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import torch
from jaxtyping import Float, Int
from scipy.linalg import qr
from torch import Tensor

from unweave.modules.partition import Partition, check_weights

__all__ = ["PARTITIONERS", "louvain_partitions", "sbm_partitions", "spectral_partitions"]

# of Louvain: from coarse to fine
RESOLUTIONS = (0.5, 0.7, 1.0, 1.4, 2.0)
# affinity added to every pair, as a share of the mean: parts that nothing joins keep an order
LEAST_AFFINITY = 1e-6
# above so many blocks, several are joined at a time
FEW_BLOCKS = 48
LEAST_GAIN = 1e-9

Weights = Float[Tensor, "nodes nodes"]


def spectral_partitions(nodes: tuple[str, ...], weights: Weights, max_blocks: int, seed: int = 0) -> list[Partition]:
    """Least normalised cuts into 2, 3, ... ``max_blocks`` blocks, relaxed to eigenvectors of the Laplacian.

    As scikit-learn's ``SpectralClustering(assign_labels="cluster_qr")``, with one decomposition for all numbers of
    blocks.

    Args:
        weights: symmetric, not negative, zero diagonal.

    Source:
        Shi & Malik 2000; labels from the eigenvectors by pivoted QR (Damle et al. 2019), which needs no starts at
        random.

    Example:
        >>> two_pairs = torch.tensor([[0, 1, 0, 0], [1, 0, 0.1, 0], [0, 0.1, 0, 1], [0, 0, 1, 0]])
        >>> spectral_partitions(("a", "b", "c", "d"), two_pairs, 2)[0].labels
        (0, 0, 1, 1)
    """
    check_weights(weights, len(nodes))
    w = weights.detach().cpu().to(torch.float64)
    if float(w.sum()) == 0:
        return []
    w = w + LEAST_AFFINITY * w.mean()
    scale = w.sum(0).rsqrt()
    vectors = torch.linalg.eigh(w * scale[:, None] * scale)[1].flip(1)
    counts = range(2, min(max_blocks, len(nodes)) + 1)
    return [Partition(nodes, tuple(_round_vectors(vectors[:, :k] * scale[:, None]).tolist())) for k in counts]


def _round_vectors(vectors: Float[Tensor, "nodes blocks"]) -> Int[Tensor, " nodes"]:
    """The block of each node: its largest coordinate in the basis of the nodes that lie furthest apart."""
    pivots = qr(vectors.T.numpy(), mode="r", pivoting=True)[1][: vectors.shape[1]]
    u, _, v = torch.linalg.svd(vectors[torch.from_numpy(pivots).long()].T)
    return (vectors @ u @ v).abs().argmax(1)


def louvain_partitions(nodes: tuple[str, ...], weights: Weights, max_blocks: int, seed: int = 0) -> list[Partition]:
    """Greatest modularity, from coarse to fine resolution.

    Args:
        weights: symmetric, not negative, zero diagonal.

    Source:
        Blondel et al. 2008, "Fast unfolding of communities in large networks"; resolution: Reichardt & Bornholdt
        2006.

    Example:
        >>> two_pairs = torch.tensor([[0, 1, 0, 0], [1, 0, 0.1, 0], [0, 0.1, 0, 1], [0, 0, 1, 0]])
        >>> louvain_partitions(("a", "b", "c", "d"), two_pairs, 2)[0].labels
        (0, 0, 1, 1)
    """
    check_weights(weights, len(nodes))
    if float(weights.sum()) == 0:
        return []
    network = nx.from_numpy_array(weights.detach().cpu().to(torch.float64).numpy())
    found = []
    for resolution in RESOLUTIONS:
        blocks = nx.community.louvain_communities(network, resolution=resolution, seed=seed)
        named = Partition.from_blocks(nodes, ([nodes[i] for i in block] for block in blocks))
        if 1 < named.n_blocks <= max_blocks and named not in found:
            found.append(named)
    return found


def sbm_partitions(
    nodes: tuple[str, ...], weights: Weights, max_blocks: int, seed: int = 0, *, expected: Weights | None = None
) -> list[Partition]:
    """Degree-corrected stochastic block model: blocks of nodes that talk alike, joined one after the other.

    The weight between i and j is taken to be Poisson with mean omega_(block i, block j) e_ij; at the best omega the
    log-likelihood is, up to what does not depend on the blocks::

        G(P) = 1/2 sum over blocks r, s of M_rs log(M_rs / E_rs)

    with M and E the sums of weights and of ``expected`` between blocks. Blocks are joined where G falls least, from
    all nodes apart down to two blocks; at each number of blocks from ``max_blocks`` down, single nodes then move
    while G rises. How many blocks there are is left to the criterion, a description length. With e_ij = what
    strengths, execution order and layers explain (:func:`unweave.modules.nulls.expected_nats`), layers alone make no
    blocks.

    Args:
        weights: symmetric, not negative, zero diagonal.
        expected: the same for what is expected of nodes without blocks; d_i d_j / sum of d by default.
        seed: not used: nothing is drawn.

    Cost:
        O(n^3) for the joins, O(n B^3) for each move.

    Source:
        Karrer & Newman 2011, "Stochastic blockmodels and community structure in networks"; joining: Peixoto 2014,
        "Efficient Monte Carlo and greedy heuristic for the inference of stochastic block models". Own code:
        graph-tool is LGPL.

    Example:
        >>> two_pairs = torch.tensor([[0, 1, 0, 0], [1, 0, 0.1, 0], [0, 0.1, 0, 1], [0, 0, 1, 0]])
        >>> sbm_partitions(("a", "b", "c", "d"), two_pairs, 2)[0].labels
        (0, 0, 1, 1)
    """
    check_weights(weights, len(nodes))
    w = weights.detach().cpu().to(torch.float64)
    if float(w.sum()) == 0:
        return []
    e = w.sum(0)[:, None] * w.sum(0) / w.sum() if expected is None else expected.detach().cpu().to(torch.float64)
    e = e - e.diagonal().diag()
    labels = torch.arange(len(nodes))
    found: list[Partition] = []
    for count in _counts(len(nodes), max_blocks):
        labels = _join_blocks(labels, w, e, count)
        if count <= max_blocks:
            labels = _move_nodes(labels, w, e)
            found.append(Partition(nodes, tuple(labels.tolist())))
    return found[::-1]


def _counts(n: int, max_blocks: int) -> list[int]:
    """Numbers of blocks on the way down to two: in strides first, one by one at the end."""
    counts = []
    while n > 2:
        n = n - 1 if n <= max(FEW_BLOCKS, max_blocks) else max(FEW_BLOCKS, max_blocks, 4 * n // 5)
        counts.append(n)
    return counts


def _gain(m: Tensor, e: Tensor) -> Tensor:
    """m log(m / e), entry by entry; 0 where nothing was measured."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(m > 0, m * (m.clamp(min=tiny) / e.clamp(min=tiny)).log(), 0.0)


def _between(labels: Int[Tensor, " nodes"], *matrices: Tensor) -> list[Float[Tensor, "blocks blocks"]]:
    member = torch.nn.functional.one_hot(labels).to(torch.float64)
    return [member.T @ matrix @ member for matrix in matrices]


def _join_blocks(labels: Int[Tensor, " nodes"], w: Weights, e: Weights, count: int) -> Int[Tensor, " nodes"]:
    """``count`` blocks left: the cheapest joins first, no block twice in one round."""
    while (n := int(labels.max()) + 1) > count:
        r, s = torch.triu_indices(n, n, 1)
        cost = _join_costs(*_between(labels, w, e))[r, s]
        into = torch.arange(n)
        order, joined, left = cost.argsort(stable=True), set[int](), n - count
        for a, b in zip(r[order].tolist(), s[order].tolist(), strict=True):
            if not joined & {a, b}:
                into[b], left = a, left - 1
                joined |= {a, b}
            if not left:
                break
        labels = torch.unique(into[labels], return_inverse=True)[1]
    return labels


def _join_costs(m: Float[Tensor, "blocks blocks"], e: Float[Tensor, "blocks blocks"]) -> Float[Tensor, "blocks blocks"]:
    """How much G falls when blocks r and s are joined."""
    apart = _gain(m, e)
    joined = _gain(m[:, None] + m, e[:, None] + e)  # [r, s, t]: blocks r and s as one, against t
    own = joined.diagonal(dim1=0, dim2=2).T  # [r, s]: against t = r
    others = apart.sum(1)[:, None] + apart.sum(1) - (joined.sum(2) - own - own.T)
    inside_m = m.diagonal()[:, None] + m.diagonal() + 2 * m
    inside_e = e.diagonal()[:, None] + e.diagonal() + 2 * e
    # rows r and s hold their own corner too, which counts half
    corner = apart.diagonal()[:, None] + apart.diagonal() + 2 * apart
    return others - corner / 2 - _gain(inside_m, inside_e) / 2


def _move_nodes(labels: Int[Tensor, " nodes"], w: Weights, e: Weights) -> Int[Tensor, " nodes"]:
    """The best move of one node, again and again while G rises; no block is emptied."""
    n, n_blocks = len(labels), int(labels.max()) + 1
    for _ in range(n):
        member = torch.nn.functional.one_hot(labels, n_blocks).to(torch.float64)
        m, e_between = (_moved(member, labels, matrix) for matrix in (w, e))
        rise = _gain(m, e_between).sum((2, 3)) / 2
        alone = member.sum(0)[labels] == 1
        rise[alone] = rise[torch.arange(n), labels].max()
        here = float(rise[0, labels[0]])
        best = int(rise.argmax())
        if not float(rise.flatten()[best]) > here + LEAST_GAIN * (1 + abs(here)):
            break
        labels = labels.clone()
        labels[best // n_blocks] = best % n_blocks
    return labels


def _moved(
    member: Float[Tensor, "nodes blocks"], labels: Int[Tensor, " nodes"], weights: Weights
) -> Float[Tensor, "nodes blocks blocks blocks"]:
    """``[v, s]``: the sums between blocks were node v in block s."""
    towards = weights @ member
    change = torch.eye(member.shape[1], dtype=torch.float64) - member[:, None]  # [v, s]: +1 at s, -1 where v is
    added = torch.einsum("vsa,vb->vsab", change, towards)
    return member.T @ towards + added + added.transpose(2, 3)


PARTITIONERS: dict[str, Callable[..., list[Partition]]] = {
    "spectral": spectral_partitions,
    "louvain": louvain_partitions,
    "sbm": sbm_partitions,
}
