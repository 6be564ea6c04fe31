"""MLPs into groups of neurons that read, write and fire alike, so that a module can hold part of an MLP."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from unweave.compression.moments import ChannelMoments, channel_moments
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph, Stage
from unweave.scope import Scope

__all__ = ["NeuronGroups", "cluster_neurons", "group_neurons", "neuron_similarity"]

# below this modularity a network is not taken to have communities: Newman & Girvan's rule of thumb
LEAST_MODULARITY = 0.3


class NeuronGroups(NamedTuple):
    """A clustering of neurons.

    Attributes:
        groups: the neurons of each group, in order; groups ordered by their first neuron.
        modularity: of the similarities under these groups.
    """

    groups: tuple[tuple[int, ...], ...]
    modularity: float


def group_neurons(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    groups: int | str = "auto",
    most_groups: int = 8,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> Graph:
    """The graph with every MLP refined into groups of neurons; what it computes is unchanged.

    Neurons are alike (:func:`neuron_similarity`) that read the same directions of the data, write directions of which
    the output feels the same, and fire together; they are clustered by :func:`cluster_neurons`.

    Args:
        groups: how many groups each MLP is split into, or "auto": the number, up to ``most_groups``, whose clustering
            has the greatest modularity; an MLP stays whole where that is below 0.3.
        samples, batch_size, seed, checkpoint: of the pass over the data, see :func:`unweave.channel_moments`.

    Returns:
        A graph with nodes ``NODE.part.k`` in the place of every MLP that was split.

    Raises:
        InputError: the graph has no MLP, cut edges or split nodes, or more groups are asked for than there are neurons.
        EmptyDataError: the scope selects no position.

    Cost:
        One forward and ``samples`` backward passes; per MLP an eigendecomposition of neurons x neurons, and in "auto"
        as many clusterings as ``most_groups``.

    Exact?
        The graph is, up to the order of sums. Similarities are estimated from the data and the cotangents.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:modular_addition")
        >>> data = unweave.load_data("zoo:modular_addition", limit=64)
        >>> finer = group_neurons(graph, data, groups=3)
        >>> [n for n in finer.nodes if "mlp" in n]
        ['blocks.0.mlp.part.0', 'blocks.0.mlp.part.1', 'blocks.0.mlp.part.2']
    """
    stages = [s for s, stage in enumerate(graph.stages) if stage.kind == "mlp" and stage.write is not None]
    if not stages:
        raise InputError("the graph has no MLP, so there are no neurons to group")
    if most_groups < 1:
        raise InputError(f"most_groups must be at least 1, got {most_groups}")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "checkpoint": checkpoint}
    moments = channel_moments(graph, data, scope or Scope(), samples=samples, seed=seed, **options)
    parts = {}
    for s in stages:
        alike = neuron_similarity(graph.stages[s], moments[s])
        found = cluster_neurons(alike, groups, most_groups=most_groups)
        parts[graph.stages[s].nodes[0]] = found.groups
    return graph.refine(parts)


def neuron_similarity(stage: Stage, moments: ChannelMoments) -> Float[Tensor, "neurons neurons"]:
    """How alike the neurons of an MLP are: the mean of three squared correlations, from 0 to 1.

    - reads: of the input weights under the covariance C of the (normalised) input, (f_k C f_l)^2 / (f_k C f_k)(f_l C
      f_l); for a gated MLP, the mean over its reads;
    - writes: of the output weights under the second moment G of the gradient at what the MLP writes, w_k G w_l
      likewise;
    - firing: of the codes, over tokens.

    A neuron that never varies, or that nothing feels, is like no other there. The diagonal is 0.
    """
    (port,) = stage.ports
    assert stage.write is not None
    inputs2 = moments.inputs2[port.name]
    weights = [read.map.dense().to(inputs2) for read in port.reads]
    reads = torch.stack([_squared_correlations(w @ inputs2 @ w.T) for w in weights]).mean(0)
    write = stage.write.dense().to(moments.written2)
    if stage.post is not None:
        write = stage.post.fold(write.T).T
    writes = _squared_correlations(write.T @ moments.written2 @ write)
    alike = torch.stack([reads, writes, _squared_correlations(moments.code2)]).mean(0).cpu()
    return alike.fill_diagonal_(0.0)


def _squared_correlations(second: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    size = second.diagonal().clamp(min=0)
    # what rounding leaves of a variance of nothing is no variance
    known = size > 1e-12 * size.max()
    both = torch.outer(size, size)
    return torch.where(torch.outer(known, known), second.square() / both.clamp(min=1e-300), 0.0).clamp(max=1.0)


def cluster_neurons(
    similarity: Float[Tensor, "neurons neurons"], groups: int | str = "auto", *, most_groups: int = 8
) -> NeuronGroups:
    """Spectral clustering: Ward's linkage of the unit rows of the k leading eigenvectors of D^-1/2 S D^-1/2.

    "auto" takes the k of the greatest modularity Q = sum over groups of (share of similarity inside - (share of
    similarity that ends in it)^2), or a single group where Q stays below 0.3.

    Raises:
        InputError: not a number of groups from 1 to the number of neurons, or "auto".

    Exact?
        No: neither the least cut nor the greatest modularity can be found fast. Ward's linkage has no random start.

    Example:
        >>> import torch
        >>> similarity = torch.tensor([[0, 0.1, 0.9], [0.1, 0, 0.1], [0.9, 0.1, 0]])
        >>> cluster_neurons(similarity, 2).groups
        ((0, 2), (1,))

    Source:
        Ng, Jordan & Weiss 2001, "On Spectral Clustering"; Newman & Girvan 2004, "Finding and evaluating community
        structure in networks" (modularity, and 0.3 as what strong structure begins with).
    """
    n = len(similarity)
    if groups != "auto" and not (isinstance(groups, int) and 1 <= groups <= n):
        raise InputError(f"{n} neurons cannot be put into {groups!r} groups; choose 1 to {n}, or 'auto'")
    counts = [groups] if isinstance(groups, int) else range(1, min(most_groups, n) + 1)
    # a trace of likeness everywhere keeps neurons without any from dividing by zero
    alike = similarity.double() + 1e-9
    scale = alike.sum(1).rsqrt()
    vectors = torch.linalg.eigh(alike * torch.outer(scale, scale))[1].flip(1)
    found = [_cut(vectors, alike, k) for k in counts]
    best = max(found, key=lambda f: f.modularity)
    return found[0] if groups == "auto" and best.modularity < LEAST_MODULARITY else best


def _cut(
    vectors: Float[Tensor, "neurons neurons"], similarity: Float[Tensor, "neurons neurons"], k: int
) -> NeuronGroups:
    n = len(similarity)
    labels = torch.zeros(n, dtype=torch.long)
    if k > 1:
        rows = torch.nn.functional.normalize(vectors[:, :k], dim=1)
        labels = torch.as_tensor(AgglomerativeClustering(k, linkage="ward").fit_predict(rows.numpy())).long()
    members = [tuple((labels == g).nonzero()[:, 0].tolist()) for g in range(k)]
    return NeuronGroups(tuple(sorted(members)), _modularity(similarity, labels, k))


def _modularity(similarity: Float[Tensor, "neurons neurons"], labels: Int[Tensor, " neurons"], k: int) -> float:
    of = torch.nn.functional.one_hot(labels, k).to(similarity)
    between = of.T @ similarity @ of / similarity.sum()
    return float(between.trace() - between.sum(1).square().sum())
