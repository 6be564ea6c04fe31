"""Closed forms: what to keep of one matrix, one head's values, one MLP's neurons, and what it costs in nats.

All in float64 with eigendecompositions and a relative cutoff: second moments from data are singular as a rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.ops import Dense, LinearMap, LowRank, Pivoted

__all__ = [
    "Elimination",
    "Spectrum",
    "compensated_write",
    "eliminate_neurons",
    "pivot",
    "root",
    "spectrum",
    "to_map",
    "worth",
]

CUTOFF = 1e-10
# the share of all nats of a matrix below which a direction is worth nothing: the cutoff and float32 leave as much
ROUNDING = 1e-9


def root(matrix: Float[Tensor, "n n"], damping: float = 1e-6) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """(M^1/2, M^-1/2) of a positive semi-definite matrix, after adding ``damping`` times its mean eigenvalue."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp(min=0) + damping * values.clamp(min=0).mean() + CUTOFF * values.abs().max() + 1e-300
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def worth(singular: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """What directions of these singular values are worth, in nats: s^2 / 2, and nothing where that is rounding."""
    nats = 0.5 * singular.square()
    return torch.where(nats > ROUNDING * nats.sum(), nats, 0.0)


class Spectrum(NamedTuple):
    """A matrix seen through what it reads and what is felt of it.

    Attributes:
        left: ``[out k]`` and right ``[k in]``: keeping the first r of both gives the best rank-r matrix.
        nats: what each of the k directions is worth, in nats per token, descending.
    """

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]
    nats: Float[Tensor, " k"]


def spectrum(
    weight: Float[Tensor, "out in"], inputs2: Float[Tensor, "in in"], felt2: Float[Tensor, "out out"]
) -> Spectrum:
    """Minimise tr(G D A D^T) over matrices W - D of each rank: the SVD of G^1/2 W A^1/2.

    Args:
        weight: W.
        inputs2: A, the second moment of what W reads.
        felt2: G, the second moment of the gradient at what it gives.
    """
    weight = weight.double()
    felt, unfelt = root(felt2)
    u, s, _ = torch.linalg.svd(felt @ weight @ root(inputs2, 0.0)[0], full_matrices=False)
    # the projector G^-1/2 U_r U_r^T G^1/2 applied to W needs no inverse of A
    return Spectrum(unfelt @ u, u.T @ felt @ weight, worth(s))


class Elimination(NamedTuple):
    """Neurons in the order in which they are given up.

    Attributes:
        order: the first one to go first.
        nats: what has been lost once the first k have gone (index 0: nothing).
    """

    order: Int[Tensor, " neurons"]
    nats: Float[Tensor, " neurons_plus_one"]


def eliminate_neurons(
    write: Float[Tensor, "d neurons"], code2: Float[Tensor, "neurons neurons"], written2: Float[Tensor, "d d"]
) -> Elimination:
    """Give up neurons one by one, the cheapest first, the others taking over what can be regressed from them.

    Removing neuron j costs 1/2 (w_j^T G w_j) / P_jj, with P the inverse covariance of the neurons left and w_j its
    write vector as compensated so far; then w_i -= w_j P_ji / P_jj.
    Source: Hassibi & Stork 1993 (optimal brain surgeon), with the Fisher-weighted loss of the output.
    """
    n = write.shape[1]
    w, felt = write.double().clone(), root(written2)[0]
    precision = root(code2, 1e-4)[1]
    precision = precision @ precision
    w = felt @ w
    order, lost = [], [0.0]
    alive = torch.ones(n, dtype=torch.bool, device=w.device)
    for _ in range(n):
        diagonal = precision.diagonal().clamp(min=1e-300)
        cost = torch.where(alive, 0.5 * w.square().sum(0) / diagonal, torch.inf)
        j = int(cost.argmin())
        order.append(j)
        lost.append(lost[-1] + float(cost[j]))
        row = precision[j] / diagonal[j]
        w = w - torch.outer(w[:, j], row)
        precision = precision - torch.outer(precision[:, j], row)
        alive[j] = False
    return Elimination(torch.tensor(order, device=w.device), torch.tensor(lost, dtype=torch.float64))


def compensated_write(
    write: Float[Tensor, "d neurons"], code2: Float[Tensor, "neurons neurons"], kept: Int[Tensor, " kept"]
) -> Float[Tensor, "d kept"]:
    """The write matrix of the neurons kept, with the others regressed on them."""
    damped = code2 + 1e-4 * code2.diagonal().mean() * torch.eye(len(code2), dtype=code2.dtype, device=code2.device)
    coefficients = torch.linalg.solve(damped[kept][:, kept], damped[kept])
    return write.double() @ coefficients.T


def pivot(right: Float[Tensor, "rank d"]) -> tuple[Float[Tensor, "rank rank"], Pivoted]:
    """(B, P) with right = B P and P the identity on ``rank`` well-conditioned columns (QR with pivoting).

    Pivots are sought in an orthonormal basis of the rows, so that P is well-conditioned whatever ``right`` is: where
    its rows depend on each other, B is singular, and nothing is divided by what rounding has left of them.
    """
    rank, d = right.shape
    rows, scales = torch.linalg.qr(right.double().T)
    work = rows.T.clone()
    columns: list[int] = []
    left = torch.ones(d, dtype=torch.bool, device=right.device)
    for _ in range(rank):
        norms = torch.where(left, work.square().sum(0), -1.0)
        j = int(norms.argmax())
        columns.append(j)
        left[j] = False
        axis = work[:, j] / work[:, j].norm().clamp(min=1e-300)
        work = work - torch.outer(axis, axis @ work)
    pivots = torch.tensor(sorted(columns), dtype=torch.long, device=right.device)
    others = left.nonzero()[:, 0]
    square = rows.T[:, pivots]
    return scales.T @ square, Pivoted(torch.linalg.solve(square, rows.T[:, others]), pivots, others)


def to_map(left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"], dtype: torch.dtype) -> LinearMap:
    """left @ right stored in as few numbers as possible: dense at full rank, pivoted below."""
    rank = right.shape[0]
    if rank >= min(left.shape[0], right.shape[1]):
        return Dense((left @ right).to(dtype))
    basis, pivoted = pivot(right)
    return LowRank((left @ basis).to(dtype), Pivoted(pivoted.rest.to(dtype), pivoted.pivots, pivoted.others))
