"""Interfaces swapped: what a module A writes (or hears from outside) is taken from another sequence.

Everything else stays. The change of a block B is sum |y' - y|^2 / (2 sum |y - mean|^2) over its nodes and all
positions: 0 if B writes what it wrote, 1 if it writes as if on an unrelated input. Only what depends on A may change,
and what the edges say should; random sets of nodes with as many in every stage are the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.ablation import batch_trace, counterfactual_trace, pair_at_random
from unweave.data import Batch, TokenData
from unweave.errors import InputError
from unweave.execution import Trace
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap
from unweave.modules.ablating import Nodes, random_sets, writing_blocks
from unweave.modules.patching import blocks_of, nats_per_token
from unweave.progress import track
from unweave.scope import Scope, divergence, position_mask, require_positions
from unweave.scoring import EdgeScores, score_edges
from unweave.statistics import collect_means

__all__ = ["Swapped", "Swaps", "swap_interfaces"]

Swap = Literal["writes", "hears"]


# a change below it is none: float32 leaves about 1e-12 of the square
ROUNDING = 1e-8


@dataclass(frozen=True, eq=False)
class Swapped:
    """What changes when one module's interface comes from another sequence.

    Attributes:
        block: whose interface.
        nats: the change of the output, in nats per token.
        change: by other block, how much what it writes changed (see the text of this module).
        predicted: the blocks that should change: those that edges above the threshold lead to.
        downstream: those that any edges lead to; nothing else can change.
        random_changes: by other block, its change for each random set of nodes of the same size.
        threshold: from where on a change counts.
    """

    block: str
    nats: Estimate
    change: Mapping[str, Estimate]
    predicted: frozenset[str]
    downstream: frozenset[str]
    random_changes: Mapping[str, tuple[float, ...]]
    threshold: float

    @property
    def changed(self) -> frozenset[str]:
        """The blocks that did change."""
        return frozenset(b for b, c in self.change.items() if c.value > self.threshold)

    @property
    def agreement(self) -> float:
        """The share of the other blocks that were predicted to change and did, or neither; NaN if there are none."""
        return _agreement(self.predicted, {b: c.value for b, c in self.change.items()}, self.threshold)

    @property
    def random_agreements(self) -> tuple[float, ...]:
        """How well the same prediction fits what changed for each random set."""
        n = max((len(v) for v in self.random_changes.values()), default=0)
        tables = [{b: v[i] for b, v in self.random_changes.items()} for i in range(n)]
        return tuple(_agreement(self.predicted, table, self.threshold) for table in tables)


def _agreement(predicted: frozenset[str], change: Mapping[str, float], threshold: float) -> float:
    right = [(b in predicted) == (c > threshold) for b, c in change.items()]
    return float(np.mean(right)) if right else float("nan")


@dataclass(frozen=True, eq=False)
class Swaps:
    """Every module's interface swapped, one after the other.

    Attributes:
        swapped: by block.
        what: "writes" or "hears".
        n_sequences: on how many.
    """

    swapped: Mapping[str, Swapped]
    what: str
    n_sequences: int

    @property
    def violations(self) -> list[tuple[str, str]]:
        """(module swapped, block changed) where no edges lead from one to the other; must be none."""
        return [
            (s.block, b)
            for s in self.swapped.values()
            for b, change in s.change.items()
            if b not in s.downstream and change.value > ROUNDING
        ]

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: module, nats, predicted, changed, agreement, mean agreement for random sets."""
        return [
            {
                "module": s.block,
                "nats": s.nats.value,
                "predicted": sorted(s.predicted),
                "changed": sorted(s.changed),
                "agreement": s.agreement,
                "random": float(np.mean(s.random_agreements)) if s.random_agreements else None,
            }
            for s in self.swapped.values()
        ]


def swap_interfaces(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    what: str = "writes",
    blocks: Iterable[str] | None = None,
    scores: EdgeScores | None = None,
    edge_nats: float = 1e-3,
    changed: float = 0.01,
    n_random: int = 5,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Swaps:
    """Take each module's interface from another sequence, and see whether what changes is what the edges say.

    Every sequence is paired with another one of the data, drawn at random. Then the edges out of the module ("writes"),
    or those into it from outside ("hears"), carry what they carry on the partner; the change of every other block is
    measured as in the text of this module.

    Args:
        graph: whole, with a partition.
        data: at least two sequences, of one length where possible: a shorter partner's padding counts as its tokens.
        scope: for the nats of the output and the edges' scores.
        what: "writes" or "hears".
        blocks: which to swap; by default all of which every node writes.
        scores: of the edges; by default second-order, on this data. Where outputs saturate, measure some.
        edge_nats: an edge worth more leads to a predicted change; nats per token.
        changed: from which change on a block counts as changed.
        n_random: random sets of as many nodes in every stage, for every module.

    Returns:
        :class:`Swaps`.

    Raises:
        UnknownNameError: no such block.
        InputError: fewer than two sequences, a graph that is cut, or a block with the output in it.
        EmptyDataError: the scope selects no position.

    Cost:
        2 + blocks x (1 + n_random) forward passes, and the scores. Memory: two numbers per sequence for every block and
        pass.

    Exact?
        What changes is measured. The prediction asks of every edge alone whether it matters to the output; a block
        that changes without mattering counts as a disagreement.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction").quotient({"input": ["embed", "pos_embed"]})
        >>> data, scope = unweave.load_data("zoo:induction", limit=16), unweave.Scope(positions="answered")
        >>> found = swap_interfaces(graph, data, scope)
        >>> found.violations
        []
        >>> sorted(found.swapped["blocks.0.attn.head.0"].changed)
        ['blocks.1.attn.head.1']

    Source:
        Interchange interventions: Geiger et al. 2021, "Causal Abstractions of Neural Networks".
    """
    if what not in get_args(Swap):
        raise InputError(f"what must be one of {', '.join(get_args(Swap))}, got {what!r}")
    if n_random < 0 or edge_nats < 0 or changed < 0:
        raise InputError("n_random, edge_nats and changed must be at least 0")
    if graph.is_cut:
        raise InputError("swapping needs a graph that is whole: edges cut to constants carry nothing to swap")
    scope = scope or Scope()
    chosen = writing_blocks(graph, blocks)
    require_positions(scope, data)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    scores = scores or score_edges(graph, data, scope, seed=seed, **options)
    if scores.nats.shape != graph.edge_matrix.shape:
        raise InputError("the scores are of another graph's edges; score this one")
    generator = torch.Generator().manual_seed(seed)
    graph_blocks = blocks_of(graph)
    own = {b: [nodes, *(r[0] for r in random_sets(graph, [nodes], n_random, generator))] for b, nodes in chosen.items()}
    cuts = {(b, i): _swapped_edges(graph, nodes, what) for b, sets in own.items() for i, nodes in enumerate(sets)}
    seen = _measure_changes(graph, pair_at_random(data, seed), scope, cuts, **options)
    swapped = {}
    for b, nodes in chosen.items():
        others = [o for o in seen.spread if o != b]
        likely, possible = (_reached(graph, nodes, what, keep) for keep in (scores.above(edge_nats), graph.edge_matrix))
        swapped[b] = Swapped(
            b,
            nats_per_token(seen.nats[b, 0], seen.tokens, seed),
            {o: seen.change((b, 0), o, seed) for o in others},
            frozenset(o for o in others if likely & set(graph_blocks[o])),
            frozenset(o for o in others if possible & set(graph_blocks[o])),
            {o: tuple(seen.change((b, i), o, seed).value for i in range(1, len(own[b]))) for o in others},
            changed,
        )
    return Swaps(swapped, what, len(data))


def _swapped_edges(graph: Graph, nodes: Nodes, what: str) -> Graph:
    """The graph in which the edges between some nodes and the rest carry what they carry on another input."""
    crossing = graph.edge_matrix & _crosses(graph, nodes, what)
    return graph.restrict(graph.edge_matrix & ~crossing, ablation="resample")


def _crosses(graph: Graph, nodes: Nodes, what: str) -> Bool[Tensor, "ports writers"]:
    """Which edges lead out of a set of nodes ("writes"), or into it ("hears")."""
    ports = torch.tensor([p.rpartition(".")[0] in nodes for p in graph.ports])[:, None]
    writers = torch.tensor([w in nodes for w in graph.writers])
    return ~ports & writers if what == "writes" else ports & ~writers


def _reached(graph: Graph, nodes: Nodes, what: str, keep: Bool[Tensor, "ports writers"]) -> set[str]:
    """The nodes that a swap reaches along the edges in ``keep``."""
    port_node = [p.rpartition(".")[0] for p in graph.ports]
    fresh = (keep & _crosses(graph, nodes, what)).any(1)
    out = {n for n, hit in zip(port_node, fresh.tolist(), strict=True) if hit}
    for stage in graph.stages:
        for node in stage.nodes:
            rows = torch.tensor([n == node for n in port_node])
            if bool((keep[rows] & torch.tensor([w in out for w in graph.writers])).any()):
                out.add(node)
        # a norm of what a whole layer writes makes each of its nodes depend on all others
        if stage.post is not None and out & set(stage.nodes):
            out |= set(stage.nodes)
    return out


@dataclass(frozen=True, eq=False)
class _Changes:
    """Per sequence, for each swap: nats of the output, and the squared change of what each block writes."""

    nats: Mapping[tuple[str, int], np.ndarray]
    moved: Mapping[tuple[str, int], Mapping[str, np.ndarray]]
    spread: Mapping[str, np.ndarray]
    tokens: np.ndarray

    def change(self, swap: tuple[str, int], block: str, seed: int) -> Estimate:
        arrays = {"moved": self.moved[swap][block], "spread": self.spread[block]}
        return bootstrap(arrays, lambda moved, spread: moved / max(2 * spread, 1e-12), seed=seed)


@torch.no_grad()
def _measure_changes(
    graph: Graph,
    data: TokenData,
    scope: Scope,
    cuts: Mapping[tuple[str, int], Graph],
    *,
    batch_size: int,
    progress: bool | None,
) -> _Changes:
    blocks = writing_blocks(graph, None)
    means = collect_means(graph, data, batch_size=batch_size, progress=progress)
    mean = torch.stack([means[w] for w in graph.writers]).double()
    member = torch.tensor([[w in nodes for nodes in blocks.values()] for w in graph.writers]).double().to(graph.device)
    rows: dict[tuple[str, int] | str, list[Tensor]] = {}
    nats: dict[tuple[str, int], list[Tensor]] = {}
    total = -(-len(data) // batch_size)
    for batch in track(data.batches(batch_size), "swapping interfaces", total, show=progress):
        clean, other = batch_trace(graph, batch, keep=True), counterfactual_trace(graph, batch)
        written = _all_writes(clean)
        rows.setdefault("spread", []).append(_squares(written - mean, batch) @ member)
        rows.setdefault("tokens", []).append(position_mask(scope, batch).sum(1, keepdim=True).double())
        for swap, cut in cuts.items():
            t = batch_trace(cut, batch, keep=True, other=other)
            rows.setdefault(swap, []).append(_squares(_all_writes(t) - written, batch) @ member)
            nats.setdefault(swap, []).append(divergence(scope, clean.output, t.output, batch).sum(1).double())
    tables = {key: torch.cat(parts).cpu().numpy() for key, parts in rows.items()}

    def by_block(key: tuple[str, int] | str) -> dict[str, np.ndarray]:
        return dict(zip(blocks, tables[key].T, strict=True))

    return _Changes(
        {swap: torch.cat(parts).cpu().numpy() for swap, parts in nats.items()},
        {swap: by_block(swap) for swap in cuts},
        by_block("spread"),
        tables["tokens"][:, 0],
    )


def _all_writes(t: Trace) -> Float[Tensor, "batch writer pos d_model"]:
    return torch.cat([t.node_writes(s) for s in range(len(t.graph.stages) - 1)], dim=1).double()


def _squares(x: Float[Tensor, "batch writer pos d_model"], batch: Batch) -> Float[Tensor, "batch writer"]:
    """Squared length, summed over real positions."""
    return torch.einsum("bwtd,bwtd,bt->bw", x, x, batch.mask.to(x))
