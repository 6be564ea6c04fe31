"""Modules ablated alone and in pairs.

effect(A) is the divergence, in nats per token, between the network and itself with all edges out of A's nodes ablated;
interaction(A, B) = effect(A and B) - effect(A) - effect(B): 0 where the two do not depend on each other, below 0 where
one is lost with the other anyway (a chain), above 0 where one stands in for the other (backup). Both are compared with
random sets of nodes that have as many nodes in every stage as the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from unweave.ablation import Means, Replacement
from unweave.circuits.distance import per_prompt
from unweave.data import TokenData
from unweave.errors import InputError, UnknownNameError
from unweave.graph import Graph
from unweave.intervals import Estimate
from unweave.modules.patching import blocks_of, nats_per_token, refuse_resampling
from unweave.scope import Scope
from unweave.statistics import replacement

__all__ = ["Ablated", "ModuleEffects", "Nodes", "ablate_modules", "random_sets", "writing_blocks"]

Nodes = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Ablated:
    """What ablating one or two modules costs.

    Attributes:
        blocks: which.
        nats: the effect, in nats per token.
        interaction: effect of both - sum of their effects; None for one module.
        random_nats, random_interactions: the same for random sets of nodes, as many in every stage.
        percentile: the share of random sets with a smaller effect (equal ones count half); NaN without random sets,
            as for a module that fills its stages.
        interaction_percentile: the share of random pairs with a smaller interaction in absolute value.
    """

    blocks: tuple[str, ...]
    nats: Estimate
    interaction: Estimate | None
    random_nats: tuple[float, ...]
    random_interactions: tuple[float, ...]

    @property
    def percentile(self) -> float:
        return _percentile(self.nats.value, self.random_nats)

    @property
    def interaction_percentile(self) -> float:
        if self.interaction is None:
            return float("nan")
        return _percentile(abs(self.interaction.value), tuple(abs(x) for x in self.random_interactions))


@dataclass(frozen=True, eq=False)
class ModuleEffects:
    """Modules ablated alone and in pairs.

    Attributes:
        alone: by block.
        pairs: by two blocks, in the order of the graph.
        kind: what ablated edges carry.
        n_sequences, n_tokens: on how much data.
    """

    alone: Mapping[str, Ablated]
    pairs: Mapping[tuple[str, str], Ablated]
    kind: str
    n_sequences: int
    n_tokens: int

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: modules, nats with interval, percentile among random sets, and the same of the interaction."""
        return [_effect_row(a) for a in (*self.alone.values(), *self.pairs.values())]


def _effect_row(a: Ablated) -> dict[str, Any]:
    inter = a.interaction
    return {
        "modules": " + ".join(a.blocks),
        **a.nats.columns("nats"),
        "percentile": a.percentile,
        "interaction_nats": None if inter is None else inter.value,
        "interaction_nats_low": None if inter is None else inter.low,
        "interaction_nats_high": None if inter is None else inter.high,
        "interaction_percentile": a.interaction_percentile,
    }


def _percentile(value: float, others: Sequence[float]) -> float:
    if not others:
        return float("nan")
    table = np.array(others)
    # rounding must not order sets that are one and the same
    same = np.isclose(table, value, rtol=1e-6, atol=1e-12)
    return float(((table < value) & ~same).mean() + 0.5 * same.mean())


def ablate_modules(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    blocks: Iterable[str] | None = None,
    ablation: str = "mean",
    means: Means | None = None,
    pairs: bool = True,
    n_random: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> ModuleEffects:
    """Ablate every module alone and every two together: what each is worth, and how far their worths do not add up.

    Formulas: in the text of this module.

    Args:
        graph: with a partition; a node outside all modules is a block by itself.
        data: token sequences.
        scope: the signal that counts; by default the KL at all positions.
        blocks: which; by default all of which every node writes.
        ablation: what ablated edges carry, see :class:`unweave.ablation.Replacement`.
        means: for the ablations that need them; collected here when missing.
        pairs: whether to ablate two at a time.
        n_random: random sets of nodes for every module and pair (disjoint ones for the two of a pair).
        seed: of the random sets and of the bootstrap.

    Returns:
        :class:`ModuleEffects`, with 95% intervals over sequences.

    Raises:
        UnknownNameError: no such block.
        InputError: a block with the output in it, or a cut graph that hears other inputs.
        EmptyDataError: the scope selects no position.

    Cost:
        (1 + n_random) forward passes for every module, (1 + 3 n_random) for every pair.

    Exact?
        Effects are measured. A module that fills its stages has no other set like it, and so no percentile.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction").quotient({"input": ["embed", "pos_embed"]})
        >>> data, scope = unweave.load_data("zoo:induction", limit=16), unweave.Scope(positions="answered")
        >>> found = ablate_modules(graph, data, scope, n_random=2)
        >>> chain = found.pairs["blocks.0.attn.head.0", "blocks.1.attn.head.1"]
        >>> chain.nats.value > 3 and chain.interaction.value < -3  # one is of no use without the other
        True

    Source:
        Grabisch & Roubens 1999 (interaction among players in cooperative games), for two.
    """
    refuse_resampling(graph)
    scope = scope or Scope()
    if n_random < 0:
        raise InputError(f"n_random must be at least 0, got {n_random}")
    chosen = writing_blocks(graph, blocks)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    instead, data = replacement(graph, data, ablation, means=means, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    groups: list[tuple[str, ...]] = [(b,) for b in chosen]
    groups += list(combinations(chosen, 2)) if pairs else []
    sets: dict[frozenset[str], Graph] = {}
    drawn: dict[tuple[str, ...], list[list[Nodes]]] = {}
    for group in groups:
        own = [chosen[b] for b in group]
        drawn[group] = [own, *random_sets(graph, own, n_random, generator)]
        for some in drawn[group]:
            for part in (*some, tuple(n for nodes in some for n in nodes)):
                if frozenset(part) not in sets:
                    sets[frozenset(part)] = _silenced(graph, instead, part)
    names = {nodes: str(i) for i, nodes in enumerate(sets)}
    graphs = {names[nodes]: cut for nodes, cut in sets.items()}
    measured = per_prompt(graphs, graph, data, scope, description="ablating modules", **options)
    nats = {nodes: measured[name].nats for nodes, name in names.items()}
    tokens = measured["original"].tokens
    effects = {g: _ablated(g, some, nats, tokens, seed) for g, some in drawn.items()}
    return ModuleEffects(
        {g[0]: e for g, e in effects.items() if len(g) == 1},
        {(g[0], g[1]): e for g, e in effects.items() if len(g) == 2},
        instead.kind,
        len(data),
        int(tokens.sum()),
    )


def writing_blocks(graph: Graph, wanted: Iterable[str] | None) -> dict[str, Nodes]:
    """The nodes of the blocks wanted, or of all that have no output in them."""
    known = blocks_of(graph)
    able = {b: nodes for b, nodes in known.items() if set(nodes) <= set(graph.writers)}
    if wanted is None:
        return able
    out = {}
    for block in wanted:
        if block not in known:
            raise UnknownNameError("module", block, known)
        if block not in able:
            raise InputError(f"module {block!r} holds the output, which writes nothing; leave it out of blocks=")
        out[block] = able[block]
    return out


def _silenced(graph: Graph, instead: Replacement, nodes: Iterable[str]) -> Graph:
    """The graph with all edges out of some nodes ablated."""
    gone = set(nodes)
    return instead.cut(graph, graph.edge_matrix & torch.tensor([w not in gone for w in graph.writers]))


def random_sets(graph: Graph, own: Sequence[Nodes], n: int, generator: torch.Generator) -> list[list[Nodes]]:
    """Disjoint random sets of nodes, n times; the k-th has as many nodes in every stage as ``own[k]``.

    What was drawn by chance and is the modules themselves is left out: where nothing else is possible, nothing is left.
    """
    drawn = [_draw_sets(graph, own, generator) for _ in range(n)]
    return [sets for sets in drawn if [set(nodes) for nodes in sets] != [set(nodes) for nodes in own]]


def _draw_sets(graph: Graph, own: Sequence[Nodes], generator: torch.Generator) -> list[Nodes]:
    out: list[list[str]] = [[] for _ in own]
    for s, stage in enumerate(graph.stages):
        order = iter(torch.randperm(len(stage.nodes), generator=generator).tolist())
        for nodes, drawn in zip(own, out, strict=True):
            drawn.extend(stage.nodes[next(order)] for n in nodes if graph.where[n][0] == s)
    return [tuple(drawn) for drawn in out]


def _ablated(
    group: tuple[str, ...],
    sets: list[list[Nodes]],
    nats: Mapping[frozenset[str], np.ndarray],
    tokens: np.ndarray,
    seed: int,
) -> Ablated:
    whole = [nats[frozenset(n for nodes in some for n in nodes)] for some in sets]
    apart = [np.sum([nats[frozenset(nodes)] for nodes in some], axis=0) for some in sets]
    inter = [w - a for w, a in zip(whole, apart, strict=True)] if len(group) == 2 else []
    return Ablated(
        group,
        nats_per_token(whole[0], tokens, seed),
        nats_per_token(inter[0], tokens, seed) if inter else None,
        tuple(float(w.sum() / tokens.sum()) for w in whole[1:]),
        tuple(float(i.sum() / tokens.sum()) for i in inter[1:]),
    )
