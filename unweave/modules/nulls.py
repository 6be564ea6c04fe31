"""What a network without modules would look like: the same strengths rewired, weights shuffled, weights drawn anew.

Nothing is a module because an algorithm returned it: every search finds some partition in every graph. A partition
means something where graphs that share all but the modules (sizes, layers, strengths of nodes) give worse ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor

from unweave import tree
from unweave.graph import Graph
from unweave.modules.communication import Communication
from unweave.ops import Lookup

__all__ = ["NETWORK_NULLS", "expected_nats", "reinitialise", "rewire", "shuffle_weights"]

FITTING_STEPS = 40


def shuffle_weights(graph: Graph, generator: torch.Generator) -> Graph:
    """The graph with the entries of every linear map and table permuted, each among themselves.

    Every tensor keeps its numbers and loses its structure; tied tensors stay tied; biases, norms and edges stay.
    Zeros that a :class:`~unweave.ops.Masked` map leaves out stay out.

    Source:
        Filan et al. 2021, "Clusterability in Neural Networks" (shuffled within layers).

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> shuffled = shuffle_weights(graph, torch.Generator().manual_seed(0))
        >>> a, b = (g.find("blocks.0.attn.head.0")[0].write.dense() for g in (graph, shuffled))
        >>> torch.equal(a, b), torch.equal(a.flatten().sort()[0], b.flatten().sort()[0])
        (False, True)
    """

    def shuffled(weight: Tensor) -> Tensor:
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        return weight.flatten()[order].reshape(weight.shape)

    return _replace_weights(graph, shuffled)


def reinitialise(graph: Graph, generator: torch.Generator) -> Graph:
    """The graph with every linear map and table drawn anew from a normal of the same mean and deviation.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> reinitialise(graph, torch.Generator().manual_seed(0)).n_parameters == graph.n_parameters
        True
    """

    def drawn(weight: Tensor) -> Tensor:
        wide = weight.detach().float()
        noise = torch.randn(weight.shape, generator=generator).to(wide)
        return (wide.mean() + wide.std(correction=0) * noise).to(weight.dtype)

    return _replace_weights(graph, drawn)


def _replace_weights(graph: Graph, function: Callable[[Tensor], Tensor]) -> Graph:
    maps: list[Any] = [read.map for stage in graph.stages for port in stage.ports for read in port.reads]
    maps += [stage.write for stage in graph.stages]
    maps += [stage.core.table for stage in graph.stages if isinstance(stage.core, Lookup)]
    weights = {id(t) for _, t in tree.leaves(maps) if t.is_floating_point()}
    return dataclasses.replace(
        graph, stages=tree.map_tensors(graph.stages, lambda t: function(t) if id(t) in weights else t)
    )


def expected_nats(communication: Communication, possible: Bool[Tensor, "nodes nodes"]) -> Float[Tensor, "nodes nodes"]:
    """What each pair would say if it mattered only who reads, who writes and how many layers lie between.

    e[j, i] = r_j w_i d(layer_j - layer_i) on possible pairs, with the factors fitted by iterative proportional
    fitting so that every node reads and writes, and every distance carries, as many nats as were measured.

    Exact?
        After 40 steps the sums agree to a few parts in a thousand, wherever zeros let them agree at all.
    """
    nats, distance = _nats(communication), _distances(communication)
    out = possible.cpu().to(torch.float64)
    flat, n_distances = distance.flatten(), int(distance.max()) + 1

    def by_distance(x: Tensor) -> Tensor:
        return torch.zeros(n_distances, dtype=torch.float64).index_add_(0, flat, x.flatten())

    wanted = by_distance(nats)
    for _ in range(FITTING_STEPS):
        out = out * _ratio(wanted, by_distance(out))[distance]
        out = out * _ratio(nats.sum(0), out.sum(0))
        out = out * _ratio(nats.sum(1), out.sum(1))[:, None]
    return out


def _ratio(wanted: Tensor, got: Tensor) -> Tensor:
    return torch.where(got > 0, wanted / got.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def rewire(
    communication: Communication, possible: Bool[Tensor, "nodes nodes"], count: int, generator: torch.Generator
) -> list[Communication]:
    """Communication graphs with the same weights, readers, writers and layers, and otherwise random.

    The degree-preserving rewiring of a weighted graph in execution order, by ranks. The nats of all possible pairs
    are replaced by normal scores u (ties share theirs), u[j, i] = reads_j + writes_i + far_(layer_j - layer_i) +
    rest is fitted by least squares, the rest is rotated at random (a Gaussian vector of the same length in the same
    space), and the measured nats are dealt out again in the order of the new scores. So every node reads and writes
    as before, by mean score; neighbouring layers that talk much do so still: layers are not modules; and the weights
    are the very same, sparse and heavy-tailed as they were. (Fitting sums of nats instead would give each outlier to
    its node, and nulls that are too even.)

    Args:
        count: how many to draw.

    Returns:
        Copies with other nats.

    Cost:
        O(count n^2); no data, no run.

    Exact?
        A test against it is exact where normal scores are additive and Gaussian; sums of nats are kept only roughly.

    Source:
        For graphs without weights: Maslov & Sneppen 2002, "Specificity and stability in topology of protein
        networks";
        rotations: Langsrud 2005, "Rotation tests".
    """
    nats = _nats(communication)
    reader, writer = possible.cpu().nonzero(as_tuple=True)
    distance = _distances(communication)[reader, writer]
    weights = nats[reader, writer]
    scores = _normal_scores(weights)
    rest = _without_means(scores[None], (reader, writer, distance))
    noise = torch.randn(count, len(scores), generator=generator, dtype=torch.float64)
    noise = _without_means(noise, (reader, writer, distance))
    noise = noise * (rest.norm() / noise.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny))
    drawn = torch.zeros(count, *nats.shape, dtype=torch.float64)
    dealt = torch.empty(count, len(weights), dtype=torch.float64)
    order = (scores - rest + noise).argsort(1)
    drawn[:, reader, writer] = dealt.scatter_(1, order, weights.sort()[0].expand(count, -1))
    return [dataclasses.replace(communication, nats=n) for n in drawn]


def _normal_scores(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """What a normal variable has at each value's rank; ties get their mean rank."""
    ranks = torch.from_numpy(rankdata(values.numpy()))
    return torch.special.ndtri((ranks - 0.5) / max(1, len(ranks)))


def _without_means(values: Float[Tensor, "count pairs"], groupings: tuple[Int[Tensor, " pairs"], ...]) -> Tensor:
    """What is left of the values when no group of any grouping has a mean other than 0."""
    for _ in range(FITTING_STEPS):
        for group in groupings:
            n_groups = int(group.max()) + 1
            sums = torch.zeros(len(values), n_groups, dtype=torch.float64).index_add_(1, group, values)
            sizes = torch.bincount(group, minlength=n_groups).clamp(min=1)
            values = values - (sums / sizes)[:, group]
    return values


def _nats(communication: Communication) -> Float[Tensor, "nodes nodes"]:
    return communication.nats.detach().cpu().to(torch.float64)


def _distances(communication: Communication) -> Int[Tensor, "nodes nodes"]:
    layer = torch.tensor(communication.layer)
    distance = layer[:, None] - layer
    return distance - distance.min()


NETWORK_NULLS: dict[str, Callable[[Graph, torch.Generator], Graph]] = {
    "shuffled": shuffle_weights,
    "reinitialised": reinitialise,
}
