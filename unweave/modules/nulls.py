"""What a network without modules would look like: the same strengths rewired, weights shuffled, weights drawn anew.

Nothing is a module because an algorithm returned it: every search finds some partition in every graph. A partition
means something where graphs that share all but the modules (sizes, layers, strengths of nodes) give worse ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave import tree
from unweave.graph import Graph
from unweave.modules.communication import Communication
from unweave.ops import Lookup

__all__ = ["NETWORK_NULLS", "expected_nats", "reinitialise", "rewire", "shuffle_weights"]

FITTING_STEPS = 40
TRIES_PER_EDGE = 10


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
    communication: Communication,
    possible: Bool[Tensor, "nodes nodes"],
    count: int,
    generator: torch.Generator,
    kept: Bool[Tensor, "nodes nodes"] | None = None,
) -> list[Communication]:
    """Communication graphs with the same weights, readers, writers and layers, and otherwise random.

    Two edges i -> j and k -> l with writers, or readers, in one layer become k -> j and i -> l, again and again; what
    the pairs (k, j) and (i, l) said instead (little: they are no edges) goes to (i, j) and (k, l). So every node
    reads and writes as many edges as before, its reads say just what they said, every two layers are joined by as many
    edges, and nothing is said that execution order forbids. Layers and busy nodes are not modules.

    Args:
        count: how many to draw.
        kept: ``[reader, writer]``: what counts as an edge; by default whatever says anything at all.

    Returns:
        Copies with other nats.

    Cost:
        Ten tries for every edge, all copies at once; no data, no run.

    Exact?
        Every graph of these degrees is as likely in the long run; ten tries per edge are many in practice. What a node
        writes is kept in number and not in weight.

    Source:
        Maslov & Sneppen 2002, "Specificity and stability in topology of protein networks".
    """
    nats = _nats(communication)
    edge = (nats > 0 if kept is None else kept.cpu()) & possible.cpu()
    free = (possible.cpu() & ~edge).numpy()[None].repeat(count, 0)
    drawn = nats.numpy()[None].repeat(count, 0)
    at = edge.nonzero().numpy()[None].repeat(count, 0)
    layer = np.array(communication.layer)
    rng = np.random.default_rng(int(torch.randint(1 << 62, (1,), generator=generator)))
    every = np.arange(count)
    for _ in range(TRIES_PER_EDGE * at.shape[1]):
        a, b = rng.integers(at.shape[1], size=(2, count))
        (j, i), (m, k) = at[every, a].T, at[every, b].T
        alike = (layer[i] == layer[k]) | (layer[j] == layer[m])
        r = (alike & free[every, j, k] & free[every, m, i]).nonzero()[0]
        a, b, j, i, m, k = (x[r] for x in (a, b, j, i, m, k))
        drawn[r, j, i], drawn[r, j, k] = drawn[r, j, k], drawn[r, j, i]
        drawn[r, m, k], drawn[r, m, i] = drawn[r, m, i], drawn[r, m, k]
        free[r, j, i] = free[r, m, k] = True
        free[r, j, k] = free[r, m, i] = False
        at[r, a, 1], at[r, b, 1] = k, i
    return [dataclasses.replace(communication, nats=torch.from_numpy(n)) for n in drawn]


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
