"""What others do, at their usual allocations, so that every figure of ours has company.

Each takes a graph and a share of the channels' numbers and gives the same share to every matrix: as a plain product
of two factors, r (m + n) numbers for rank r, or as single weights, one bit per position counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave import tree
from unweave.compression.factors import root
from unweave.compression.masks import Metric, largest, solve
from unweave.compression.matrices import Matrix, Place, channel_matrices, with_matrices
from unweave.compression.moments import ChannelMoments
from unweave.compression.refinement import trainable
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.execution import check_inputs, trace
from unweave.graph import Graph, Stage
from unweave.ops import Dense, LinearMap, LowRank, Masked, mask_numbers

__all__ = [
    "BASELINES",
    "activation_svd",
    "fisher_rows",
    "magnitude",
    "pca_slicing",
    "plain_svd",
    "row_fisher_svd",
    "sparse_regression",
    "wanda",
]

Weights = Callable[[int, str, int], tuple[Tensor | None, Tensor | None]]


def _with_maps(graph: Graph, change: Callable[[int, str, int, LinearMap], LinearMap]) -> Graph:
    """The graph with every channel matrix changed; reads are named by port and number, writes "write" and 0."""
    matrices = channel_matrices(graph)
    return with_matrices(graph, {p: Matrix(change(*p, old.map), old.bias) for p, old in matrices.items()})


def _uniform(graph: Graph, size: float, weights: Weights) -> Graph:
    """Truncated SVDs of D_out W D_in at one share for every matrix, the weightings undone afterwards."""

    def change(s: int, port: str, r: int, old: LinearMap) -> LinearMap:
        w = old.dense().double()
        rank = int(_matrix_share(graph, size) * w.numel() / sum(w.shape))
        if rank >= min(w.shape):
            return old
        out, into = weights(s, port, r)
        left = torch.eye(w.shape[0], dtype=w.dtype) if out is None else out
        right = torch.eye(w.shape[1], dtype=w.dtype) if into is None else into
        u, sv, v = torch.linalg.svd(left @ w @ right, full_matrices=False)
        a = torch.linalg.lstsq(left, u[:, :rank] * sv[:rank].sqrt()).solution
        b = torch.linalg.lstsq(right.T, v[:rank].T * sv[:rank].sqrt()).solution.T
        dtype = old.dense().dtype
        return LowRank(a.to(dtype).contiguous(), Dense(b.to(dtype).contiguous()))

    return _with_maps(graph, change)


def _matrix_share(graph: Graph, size: float) -> float:
    """The share of the matrices' numbers, once norms and biases have theirs."""
    matrices = sum(m.map.n_parameters for m in channel_matrices(graph).values())
    return (size * graph.n_channel_parameters - (graph.n_channel_parameters - matrices)) / matrices


def plain_svd(graph: Graph, size: float) -> Graph:
    """Truncated SVD of every matrix."""
    return _uniform(graph, size, lambda s, port, r: (None, None))


def activation_svd(graph: Graph, size: float, moments: Mapping[int, ChannelMoments]) -> Graph:
    """SVD of W A^1/2 with A the (uncentred) second moment of what W reads.

    Source: Wang et al. 2024, "SVD-LLM".
    """

    def weights(s: int, port: str, r: int) -> tuple[Tensor | None, Tensor | None]:
        return None, root(_uncentred(moments, (s, port, r)))[0]

    return _uniform(graph, size, weights)


def _uncentred(moments: Mapping[int, ChannelMoments], place: Place) -> Tensor:
    """The second moment of what a matrix reads."""
    s, port, _ = place
    m = moments[s]
    mean = m.code if port == "write" else m.inputs[port]
    centred = m.code2 if port == "write" else m.inputs2[port]
    return centred + torch.outer(mean, mean)


def fisher_rows(graph: Graph, data: TokenData, batch_size: int = 4) -> dict[tuple[int, str, int], Tensor]:
    """Per matrix and output row, the summed squared gradients of the language-model loss."""
    weights = {path: t.detach().clone().requires_grad_() for path, t in trainable(graph).items()}
    live = dataclasses.replace(graph, stages=tree.replace_tensors(graph.stages, weights))
    squares = {path: torch.zeros_like(w, dtype=torch.float64) for path, w in weights.items()}
    for batch in data.batches(batch_size):
        with torch.enable_grad():
            logits = trace(live, check_inputs(graph, batch.inputs, batch.mask)).output[:, :-1]
            real = batch.mask[:, 1:]
            value = F.cross_entropy(logits[real], batch.inputs[:, 1:][real])
        for path, g in zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True):
            squares[path] += g.double().square()
    out = {}
    for path, square in squares.items():
        name = path.split(".")
        if name[-1] == "weight" and name[1] == "ports":
            out[int(name[0]), graph.stages[int(name[0])].ports[int(name[2])].name, int(name[4])] = square.sum(1)
        elif name[-1] == "weight" and name[1] == "write":
            out[int(name[0]), "write", 0] = square.sum(1)
    return out


def row_fisher_svd(graph: Graph, size: float, rows: Mapping[tuple[int, str, int], Tensor]) -> Graph:
    """SVD of D W with D the root of each row's summed squared gradients.

    Source: Hsu et al. 2022, "Language model compression with weighted low-rank factorization" (FWSVD).
    """

    def weights(s: int, port: str, r: int) -> tuple[Tensor | None, Tensor | None]:
        row = rows[s, port, r]
        return torch.diag((row / row.mean() + 1e-6).sqrt()), None

    return _uniform(graph, size, weights)


def pca_slicing(graph: Graph, size: float, moments: Mapping[int, ChannelMoments]) -> tuple[Graph, set[str], int]:
    """Every channel reads, and writes, only the leading principal directions of the (normalised) stream.

    The idea of Ashkboos et al. 2024 ("SliceGPT"): with k directions, a read stores out x k numbers, a write
    k x in, and each channel a k x k change of basis for the stream that goes around it; the bases themselves are
    absorbed. As there, a write is cut to the directions of the next reader.

    Returns:
        (graph, the paths of the numbers that count and may be trained, how many numbers that is).
    """
    stages = sorted(moments)
    d = next(iter(moments[stages[0]].inputs.values())).shape[0]
    bases = {}
    for s in stages:
        port = graph.stages[s].ports[0].name
        second = moments[s].inputs2[port] + torch.outer(moments[s].inputs[port], moments[s].inputs[port])
        bases[s] = torch.linalg.eigh(second)[1].flip(1)
    after = dict(zip(stages, [*stages[1:], stages[-1]], strict=True))
    fixed = graph.n_channel_parameters - sum(_numbers(graph.stages[s], d) for s in stages)
    k = max(
        k
        for k in range(1, d + 1)
        if fixed + sum(_numbers(graph.stages[s], k) + k * k for s in stages) <= size * graph.n_channel_parameters
        or k == 1
    )

    def change(s: int, port: str, r: int, old: LinearMap) -> LinearMap:
        w = old.dense()
        if port == "write":
            basis = bases[after[s]][:, :k].to(w)
            return LowRank(basis.contiguous(), Dense(basis.T @ w))
        basis = bases[s][:, :k].to(w)
        return LowRank(w @ basis, Dense(basis.T.contiguous()))

    sliced = _with_maps(graph, change)
    paths = set()
    for path in trainable(sliced):
        write = path.split(".")[1] == "write"
        if path.endswith("right.weight") == write and path.endswith(("left", "right.weight")):
            paths.add(path)
    return sliced, paths, fixed + sum(_numbers(graph.stages[s], k) + k * k for s in stages)


def _numbers(stage: Stage, k: int) -> int:
    """Numbers of a channel's matrices when the stream has k dimensions."""
    assert stage.write is not None
    return k * (sum(r.map.d_out for p in stage.ports for r in p.reads) + stage.write.d_in)


def _masked(graph: Graph, size: float, keep: Callable[[Place, Tensor, int], tuple[Tensor, Tensor]]) -> Graph:
    """Every matrix with the same share of its weights: ``keep`` gives (weights, mask) for a number of them."""
    share = _matrix_share(graph, size)

    def change(s: int, port: str, r: int, old: LinearMap) -> LinearMap:
        weight = old.dense()
        count = int(share * weight.numel()) - mask_numbers(*weight.shape)
        if count < 0:
            raise InputError(f"size {size:.3g} is smaller than masks, biases and norms alone; ask for more")
        new, mask = keep((s, port, r), weight, count)
        return Masked.keep(new.to(weight), mask)

    return _with_maps(graph, change)


def magnitude(graph: Graph, size: float) -> Graph:
    """The weights of every matrix that are largest in magnitude, as they are.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    """
    return _masked(graph, size, lambda place, weight, count: (weight, largest([weight], count)[0]))


def wanda(graph: Graph, size: float, moments: Mapping[int, ChannelMoments]) -> Graph:
    """In every row, the weights of the largest |W_ij| sqrt(E x_j^2), as they are.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """

    def keep(place: Place, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        worth = weight.abs() * _uncentred(moments, place).diagonal().clamp(min=0).sqrt().to(weight)
        top = worth.topk(count // len(weight), dim=1).indices
        return weight, torch.zeros_like(weight, dtype=torch.bool).scatter(1, top, True)

    return _masked(graph, size, keep)


def sparse_regression(graph: Graph, size: float, moments: Mapping[int, ChannelMoments]) -> Graph:
    """Every matrix on its own: the sparse W' of the least E |W x - W' x|^2, x the original's inputs.

    The published objective of SparseGPT, solved by our ADMM (as in Boza 2024) and not by its column-by-column
    elimination, nor layer after layer on compressed inputs: G = I, uncentred inputs of the original, no constants.
    Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
    """

    def keep(place: Place, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        seen = _uncentred(moments, place)
        metric = Metric.of(weight, seen, torch.eye(len(weight), dtype=seen.dtype, device=seen.device))
        (values,), (mask,) = solve([metric], count)
        return metric.weight(values), mask

    return _masked(graph, size, keep)


BASELINES: dict[str, str] = {
    "plain SVD": "truncated SVD, uniform ranks",
    "activation SVD": "SVD-LLM's activation-whitened SVD, uniform ranks",
    "row-Fisher SVD": "FWSVD, uniform ranks",
    "PCA slicing": "SliceGPT's idea, uniform width",
    "magnitude": "the largest weights of every matrix",
    "Wanda": "weights by magnitude times input norm, in every row",
    "SparseGPT-like": "SparseGPT's objective solved by ADMM, one matrix at a time",
}
