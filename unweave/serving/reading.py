"""What a graph does on one text: which nodes and edges are used on which token, and what changes without them.

The *use* of writer i at position t is the second-order term of the divergence that replacing what i writes at t, and
only there, by its mean m_i would cause, summed over the scope's positions, in nats:

    u_i(t) = 1/2 E[(sum over ports j that hear i of g_j(t) . (y_i(t) - m_i(t)))^2]

with g_j the gradient of a random cotangent whose covariance is the Fisher information of the output, as in
:mod:`unweave.scoring`; an edge's use has one port in the sum. It is an estimate; :func:`measure_node` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import CORRUPTED, Means, Replacement
from unweave.data import Batch
from unweave.errors import InputError
from unweave.execution import Patch, run
from unweave.graph import Edge, Graph
from unweave.scope import Scope, divergence, fisher_cotangent
from unweave.scoring import products_by_token
from unweave.statistics import differentiable_trace, gradients_of

__all__ = ["Reading", "one_text", "patches", "measure_node", "read_text"]

# how many tokens one pass over ablated copies of a text may hold
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Reading:
    """What a graph used on one text, in nats.

    Attributes:
        logits: the graph's output.
        nodes: the use of every writer at every position.
        edges: the use of every edge at every position of its writer; 0 where there is no edge.
    """

    logits: Float[Tensor, "pos d_out"]
    nodes: Float[Tensor, "pos writers"]
    edges: Float[Tensor, "pos ports writers"]


def one_text(ids: Sequence[int], counterfactual: Sequence[int] | None = None) -> Batch:
    """A batch of one text, and of what cut edges hear instead in a graph whose cut edges are resampled.

    Raises:
        InputError: the counterfactual is of another length.
    """
    inputs = torch.tensor([list(ids)], dtype=torch.int64)
    labels = {}
    if counterfactual is not None:
        if len(counterfactual) != len(ids):
            raise InputError(f"the counterfactual has {len(counterfactual)} tokens and the text {len(ids)}; make it so")
        labels[CORRUPTED] = torch.tensor([list(counterfactual)], dtype=torch.int64)
    return Batch(inputs, torch.ones_like(inputs, dtype=torch.bool), labels, torch.zeros(1, dtype=torch.int64))


def read_text(
    graph: Graph, batch: Batch, means: Means, scope: Scope | None = None, *, samples: int = 8, seed: int = 0
) -> Reading:
    """The use of every node and edge at every token of one text.

    Args:
        batch: one text, see :func:`one_text`.
        means: what each writer writes on average.
        scope: whose positions and divergence count; all positions by default.
        samples: cotangents.

    Raises:
        InputError: the graph has narrow edges, or a resampling graph got no counterfactual.

    Cost:
        One forward and ``samples`` backward passes; memory for pos x ports x writers numbers.

    Exact?
        Second order, estimated from ``samples`` random cotangents.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> means = unweave.collect_means(graph, unweave.load_data("zoo:induction", limit=16))
        >>> read_text(graph, one_text([0, 7, 3, 9, 7]), means).nodes.shape == (5, len(graph.writers))
        True
    """
    if graph.is_narrow:
        raise InputError("edges of this graph carry only some dimensions; measure nodes one by one instead")
    scope = scope or Scope()
    t = differentiable_trace(graph, batch)
    products = products_by_token(t, Replacement("mean", means).sent(graph, batch))
    generator = torch.Generator(graph.device).manual_seed(seed)
    n_pos = batch.inputs.shape[1]
    nodes = torch.zeros(n_pos, len(graph.writers), device=graph.device)
    edges = torch.zeros(n_pos, len(graph.ports), len(graph.writers), device=graph.device)
    for sample in range(samples):
        cotangent = fisher_cotangent(scope, t.output.detach(), batch, generator)
        product = products(gradients_of(t, t.output, cotangent, retain=sample < samples - 1))[0]
        nodes += product.sum(1).square() / (2 * samples)
        edges += product.square() / (2 * samples)
    return Reading(t.output[0].detach(), nodes, edges)


def patches(graph: Graph, names: Iterable[str], means: Means, n_pos: int) -> dict[str, Patch]:
    """What :func:`unweave.run` has to patch so that nodes (``"blocks.0.mlp"``) and edges
    (``"embed->blocks.0.mlp.in"``) send their means.

    Raises:
        UnknownNameError: no such node or edge.
        InputError: a cut edge, or one that carries only some dimensions.
    """
    out: dict[str, Patch] = {}
    for name in names:
        edge = Edge.parse(name) if "->" in name else None
        if edge is not None:
            graph.mark_edges([edge])
        node = name if edge is None else edge.src
        if graph.find(node)[0].write is None:
            raise InputError(f"{node} is the output: there is nothing behind it to ablate")
        if edge is not None and edge in graph.dimensions:
            raise InputError(f"{edge} carries only some dimensions; ablate its nodes instead")
        out[name] = means[node][:n_pos]
    return out


@torch.no_grad()
def measure_node(
    graph: Graph, batch: Batch, node: str, means: Means, scope: Scope | None = None
) -> Float[Tensor, " pos"]:
    """The divergence, in nats summed over the scope's positions, when a node says its mean at one position alone.

    Returns:
        One measured number for every position.

    Raises:
        UnknownNameError: no such node.
        InputError: the output, or a resampling graph without a counterfactual.

    Cost:
        One copy of the text per position.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> means = unweave.collect_means(graph, unweave.load_data("zoo:induction", limit=16))
        >>> bool((measure_node(graph, one_text([0, 7, 3, 9, 7]), "embed", means) >= 0).all())
        True
    """
    scope = scope or Scope()
    n_pos = batch.inputs.shape[1]
    (mean,) = patches(graph, [node], means, n_pos).values()
    assert isinstance(mean, Tensor)
    clean = run(graph, batch.inputs, counterfactual=batch.labels.get(CORRUPTED)).logits
    found = []
    for rows in torch.eye(n_pos, dtype=torch.bool).split(max(1, TOKENS_AT_ONCE // n_pos)):
        copies, here = _copies(batch, len(rows)), rows[..., None].to(graph.device)

        def replace(y: Tensor, here: Tensor = here) -> Tensor:
            return torch.where(here, mean.to(y), y)

        logits = run(graph, copies.inputs, patch={node: replace}, counterfactual=copies.labels.get(CORRUPTED)).logits
        found.append(divergence(scope, clean.expand_as(logits), logits, copies).sum(1))
    return torch.cat(found)


def _copies(batch: Batch, n: int) -> Batch:
    labels = {name: value.expand(n, -1) for name, value in batch.labels.items()}
    return Batch(batch.inputs.expand(n, -1), batch.mask.expand(n, -1), labels, batch.index.expand(n))
