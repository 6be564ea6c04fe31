"""Which node of one network is which of another: assigned by behaviour, tested on edges and against networks of noise.

Nodes of a kind (heads, MLPs; layers may differ) are assigned one to one so that the sum of their similarities is
largest (Hungarian method). Edges take no part in that, so they test it: what an edge between two nodes of A is worth
should be what the edge between their matches in B is worth. Nulls: nodes of B permuted within their kind (for the
edges), B with its weights shuffled or drawn anew (for the similarities).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

from unweave.ablation import Means
from unweave.data import Batch, TokenData
from unweave.errors import InputError, UnknownNameError
from unweave.graph import Graph
from unweave.modules.nulls import NETWORK_NULLS
from unweave.scope import Scope, position_mask
from unweave.scoring import EdgeScores, score_edges
from unweave.statistics import Sums, accumulate, collect_means
from unweave.universality.aligning import Units, check_pairs, paired_batch
from unweave.universality.behaviour import Effects, correlation, head_patterns, products, same_outputs
from unweave.universality.similarity import (
    SIMILARITIES,
    Signals,
    centred,
    collect_moments,
    common_kinds,
    kept_run,
    of_kind,
)

__all__ = ["BY", "EdgeAgreement", "Matching", "NodePair", "compare_edges", "match", "similarities"]

BY = ("behaviour", "patterns", "effects", *SIMILARITIES)
KINDS = ("attn", "mlp")


class NodePair(NamedTuple):
    """Two nodes said to be the same.

    Attributes:
        similarity: what the assignment maximised.
        margin: by how much it exceeds the best that either of them has with any other node (A's node, where several
            may have the same match).
    """

    a: str
    b: str
    similarity: float
    margin: float


class EdgeAgreement(NamedTuple):
    """Whether edges map where their nodes do.

    Attributes:
        correlation: Spearman's, over the edges of A between matched nodes, of nats in A and in B (0 where B has none).
        p: how often nodes of B permuted within their kind agree as well; 1 / (permutations + 1) at least.
        n_edges: how many edges were compared.
        permuted: the mean correlation of those permuted matchings. It is high where kinds and layers alone say which
            edges are strong; only what ``correlation`` has beyond it speaks for the matching.
    """

    correlation: float
    p: float
    n_edges: int
    permuted: float


@dataclass(frozen=True, eq=False)
class Matching:
    """What was matched with what.

    Attributes:
        pairs: the nodes matched, in A's order.
        by: what made them alike, see :func:`match`.
        similarity: by kind, between all nodes of A and of B.
        nodes_a, nodes_b: by kind, the names of its rows and columns.
        edges: whether the edges map, too; None where not asked for.
        null: the mean similarity of matches with each network of noise.
        null_pairs: by kind, the similarities of all those matches.
    """

    pairs: tuple[NodePair, ...]
    by: str
    similarity: dict[str, Float[Tensor, "a b"]]
    nodes_a: dict[str, tuple[str, ...]]
    nodes_b: dict[str, tuple[str, ...]]
    edges: EdgeAgreement | None = None
    null: tuple[float, ...] = field(default=())
    null_pairs: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean similarity of matched nodes."""
        return float(np.mean([pair.similarity for pair in self.pairs]))

    @property
    def p(self) -> float:
        """How often a network of noise is matched as well, (1 + those) / (1 + all); NaN where none was asked for."""
        as_well = sum(value >= self.score for value in self.null)
        return (1 + as_well) / (1 + len(self.null)) if self.null else float("nan")

    def p_of(self, pair: NodePair) -> float:
        """How often a node of its kind finds a match as alike in a network of noise; NaN where none was asked for."""
        kind = next(kind for kind, names in self.nodes_a.items() if pair.a in names)
        drawn = self.null_pairs.get(kind, ())
        as_well = sum(value >= pair.similarity for value in drawn)
        return (1 + as_well) / (1 + len(drawn)) if drawn else float("nan")

    @property
    def of(self) -> dict[str, str]:
        """The match in B of each node of A that has one."""
        return {pair.a: pair.b for pair in self.pairs}

    @property
    def unmatched(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The nodes of A, and of B, that are left over."""
        taken = {name for pair in self.pairs for name in (("a", pair.a), ("b", pair.b))}
        a, b = ([n for names in side.values() for n in names] for side in (self.nodes_a, self.nodes_b))
        return tuple(n for n in a if ("a", n) not in taken), tuple(n for n in b if ("b", n) not in taken)

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: a, b, similarity, margin."""
        return [pair._asdict() for pair in self.pairs]


def match(
    graph_a: Graph,
    graph_b: Graph,
    data: TokenData,
    data_b: TokenData | None = None,
    *,
    by: str = "behaviour",
    scope: Scope | None = None,
    edges: bool = True,
    nulls: int = 0,
    null: str = "shuffled",
    least: float | None = None,
    one_to_one: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Matching:
    """Match the nodes of two networks by what they do on the same texts, then see whether their edges map.

    Args:
        graph_a, graph_b: of any seeds, sizes or families.
        data_b: the same texts as B's tokens (:func:`unweave.universality.align_tokens`); by default ``data``.
        by: "patterns" (where heads look), "effects" (what the output loses without the node), "cka", "svcca",
            "procrustes" (what is written), or "behaviour": the mean of patterns (for heads), effects and CKA.
        scope: the signal that counts: effects are compared at its positions (its output quotient and divergence are
            for edges alone), edges are scored for it; by default the KL at all positions. Give it where the network
            was trained to answer at some positions only: what it says elsewhere differs from seed to seed.
        edges: score the edges of both and compare them.
        nulls: how many copies of B made of noise to match A with.
        null: "shuffled" or "reinitialised" weights.
        least: no pair below this similarity; by default every node that can be has a match.
        one_to_one: else every node of A has the node of B most like it, and several may have the same: for networks in
            which not equally many nodes share a role, where one to one some must be matched wrongly.

    Returns:
        :class:`Matching`.

    Raises:
        UnknownNameError: no such way to compare, or null.
        InputError: nothing to match, or the two data sets are not aligned.

    Cost:
        For effects, a forward pass for every node of either; else one. Two edge scores. Every null: B's part again.

    Exact?
        The assignment is the best there is; where similarities tie (``margin`` 0), one of the best. Similarities are
        correlations over these texts, exact but for "effects" of vocabularies above 256, which are seen through 256
        random sums.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=8)
        >>> match(graph, graph, data, by="patterns").of["blocks.1.attn.head.1"]
        'blocks.1.attn.head.1'

    Source:
        Kuhn 1955 (Hungarian method); Li et al. 2016, "Convergent Learning" (assignment of units between networks).
    """
    if null not in NETWORK_NULLS:
        raise UnknownNameError("null network", null, NETWORK_NULLS)
    if nulls < 0:
        raise InputError(f"nulls must be at least 0, got {nulls}")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    found = similarities(graph_a, graph_b, data, data_b, by=by, scope=scope, **options)
    names = {kind: (Signals(graph_a, kind).nodes, Signals(graph_b, kind).nodes) for kind in found}
    pairs = tuple(p for kind, s in found.items() for p in assign(s, *names[kind], least, one_to_one))
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    null_pairs: dict[str, tuple[float, ...]] = {kind: () for kind in found}
    for _ in range(nulls):
        noise = NETWORK_NULLS[null](graph_b, generator)
        drawn = similarities(graph_a, noise, data, data_b, by=by, scope=scope, **options)
        matched = {kind: assign(s, *names[kind], None, one_to_one) for kind, s in drawn.items()}
        scores.append(_mean([p for pairs in matched.values() for p in pairs]))
        null_pairs = {kind: (*null_pairs[kind], *(p.similarity for p in matched[kind])) for kind in matched}
    agreement = None
    if edges and pairs:
        scored = [
            score_edges(g, d, scope, seed=seed, **options) for g, d in ((graph_a, data), (graph_b, data_b or data))
        ]
        agreement = compare_edges(scored[0], scored[1], {p.a: p.b for p in pairs}, seed=seed)
    nodes_a, nodes_b = ({kind: pair[side] for kind, pair in names.items()} for side in (0, 1))
    return Matching(pairs, by, found, nodes_a, nodes_b, agreement, tuple(scores), null_pairs)


def _mean(pairs: list[NodePair]) -> float:
    return float(np.mean([p.similarity for p in pairs]))


def assign(
    similarity: Float[Tensor, "a b"],
    nodes_a: tuple[str, ...],
    nodes_b: tuple[str, ...],
    least: float | None,
    one_to_one: bool = True,
) -> list[NodePair]:
    """The one-to-one assignment with the largest sum, or for each node of A the one of B most like it."""
    values = similarity.numpy()
    out = []
    chosen = linear_sum_assignment(values, maximize=True) if one_to_one else (range(len(values)), values.argmax(1))
    for i, j in zip(*chosen, strict=True):
        others = np.delete(values[i], j)
        if one_to_one:
            others = np.concatenate([others, np.delete(values[:, j], i)])
        margin = float(values[i, j] - others.max()) if len(others) else float("inf")
        out.append(NodePair(nodes_a[i], nodes_b[j], float(values[i, j]), margin))
    return [p for p in out if least is None or p.similarity >= least]


# ---- similarities -----------------------------------------------------------------------------------------


def similarities(
    graph_a: Graph,
    graph_b: Graph,
    data: TokenData,
    data_b: TokenData | None = None,
    *,
    by: str = "behaviour",
    scope: Scope | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> dict[str, Float[Tensor, "a b"]]:
    """By kind of node, how alike all nodes of A and of B are; see :func:`match`.

    Raises:
        UnknownNameError: no such way to compare.
        InputError: nothing to compare, or the two data sets are not aligned.
    """
    if by not in BY:
        raise UnknownNameError("way to compare nodes", by, BY)
    check_pairs(data, data_b)
    kinds = common_kinds(graph_a, graph_b, KINDS)
    if by == "patterns":
        kinds = {kind: pair for kind, pair in kinds.items() if kind == "attn"}
        if not kinds:
            raise InputError("only attention heads have patterns, and these graphs have none; compare by 'effects'")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    effects: dict[str, tuple[Effects, Effects]] = {}
    if by in ("behaviour", "effects"):
        means_a, means_b = collect_means(graph_a, data, **options), collect_means(graph_b, data_b or data, **options)
        effects = _effects(kinds, means_a, means_b, not same_outputs(graph_a, graph_b, data_b))
    step = _Comparison(graph_a, graph_b, data_b, by, kinds, effects, scope or Scope())
    sums = accumulate(data, step, description="comparing nodes", **options)
    return {kind: _combine(kind, sums, by, *(s.nodes for s in pair)) for kind, pair in kinds.items()}


def _effects(
    kinds: dict[str, tuple[Signals, Signals]], means_a: Means, means_b: Means, scalar: bool
) -> dict[str, tuple[Effects, Effects]]:
    return {
        kind: (Effects(a.graph, a.nodes, means_a, scalar), Effects(b.graph, b.nodes, means_b, scalar))
        for kind, (a, b) in kinds.items()
    }


@dataclass(frozen=True, eq=False)
class _Comparison:
    """A step for :func:`accumulate`: all sums that a way to compare needs."""

    graph_a: Graph
    graph_b: Graph
    data_b: TokenData | None
    by: str
    kinds: dict[str, tuple[Signals, Signals]]
    effects: dict[str, tuple[Effects, Effects]]
    scope: Scope

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sums:
        both = (batch, paired_batch(batch, self.data_b))
        graphs = (self.graph_a, self.graph_b)
        a, b = (Units.of(x, self.data_b is not None, g.device) for x, g in zip(both, graphs, strict=True))
        out: Sums = {}
        if self.by in ("behaviour", *SIMILARITIES):
            runs = kept_run(self.graph_a, both[0]), kept_run(self.graph_b, both[1])
            for kind, pair in self.kinds.items():
                out |= _named(f"{kind} written", collect_moments(*pair, runs, (a, b)))
        counted = a.where(position_mask(self.scope, both[0])).cpu() & b.where(position_mask(self.scope, both[1])).cpu()
        asked_a, asked_b = (dataclasses.replace(u, mask=counted.to(u.mask.device)) for u in (a, b))
        for kind, (of_a, of_b) in self.effects.items():
            out |= _named(f"{kind} effects", products(of_a(both[0], asked_a), of_b(both[1], asked_b)))
        if "attn" in self.kinds and self.by in ("behaviour", "patterns"):
            found = (head_patterns(g, x, u) for g, x, u in zip(graphs, both, (a, b), strict=True))
            out |= _named("attn patterns", products(*found))
        return out


def _named(prefix: str, sums: Sums) -> Sums:
    return {f"{prefix} {name}": value for name, value in sums.items()}


def _combine(
    kind: str, sums: Sums, by: str, nodes_a: tuple[str, ...], nodes_b: tuple[str, ...]
) -> Float[Tensor, "a b"]:
    found = {}
    for name in ("patterns", "effects", "written"):
        part = of_kind(sums, f"{kind} {name}")
        if part and name == "written":
            found[name] = SIMILARITIES["cka" if by == "behaviour" else by](centred(part, nodes_a, nodes_b))
        elif part:
            found[name] = correlation(part)
    return torch.stack(list(found.values())).mean(0)


# ---- edges ------------------------------------------------------------------------------------------------


def compare_edges(
    scores_a: EdgeScores, scores_b: EdgeScores, match_of: dict[str, str], *, permutations: int = 499, seed: int = 0
) -> EdgeAgreement:
    """Whether edges between matched nodes are worth alike; the other writers and the output match by name.

    Args:
        match_of: B's node for each node of A.

    Returns:
        :class:`EdgeAgreement`; NaN where fewer than three edges can be compared or all are worth the same.

    Raises:
        UnknownNameError: a node that the scores do not have.
    """
    a, b = scores_a.graph, scores_b.graph
    for name, target in match_of.items():
        a.find(name), b.find(target)
    rest = {n: n for n in a.nodes if n not in match_of and n in b.nodes and n not in match_of.values()}
    kind = {n: stage.kind for stage in a.stages for n in stage.nodes}
    nodes = [*match_of, *(n for n in rest if kind[n] not in KINDS)]
    targets = [match_of.get(n, n) for n in nodes]
    at = {n: i for i, n in enumerate(nodes)}
    ports = [p for p in a.ports if p.rpartition(".")[0] in at]
    names = sorted({p.rpartition(".")[2] for p in ports})
    nats_a, nats_b = (_by_name(s, order, names) for s, order in ((scores_a, nodes), (scores_b, targets)))
    is_edge = ~np.isnan(nats_a)
    if is_edge.sum() < 3:
        return EdgeAgreement(float("nan"), float("nan"), int(is_edge.sum()), float("nan"))
    nats_b = np.nan_to_num(nats_b)
    ranks = _standardised(nats_a[is_edge])
    observed = float(ranks @ _standardised(nats_b[is_edge]))
    rng = np.random.default_rng(seed)
    kinds = np.array([kind[n] for n in nodes])
    drawn = []
    for _ in range(permutations):
        order = np.arange(len(nodes))
        for k in KINDS:
            order[kinds == k] = rng.permutation(order[kinds == k])
        drawn.append(float(ranks @ _standardised(nats_b[:, order][:, :, order][is_edge])))
    as_well = sum(value >= observed - 1e-12 for value in drawn)
    p = float("nan") if np.isnan(observed) else (1 + as_well) / (1 + permutations)
    return EdgeAgreement(observed, p, int(is_edge.sum()), float(np.mean(drawn)))


def _by_name(scores: EdgeScores, nodes: list[str], ports: list[str]) -> Float[np.ndarray, "port reader writer"]:
    """Nats of every edge between some nodes, in their order; NaN where there is none."""
    graph = scores.graph
    out = np.full((len(ports), len(nodes), len(nodes)), np.nan)
    row = {p: j for j, p in enumerate(graph.ports)}
    column = {w: i for i, w in enumerate(graph.writers)}
    writers = [k for k, n in enumerate(nodes) if n in column]
    for number, port in enumerate(ports):
        readers = [k for k, n in enumerate(nodes) if f"{n}.{port}" in row]
        rows = [row[f"{nodes[k]}.{port}"] for k in readers]
        values = scores.nats[rows][:, [column[nodes[k]] for k in writers]].double().cpu().numpy()
        out[np.ix_([number], readers, writers)] = values[None]
    return out


def _standardised(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks of mean 0 and length 1; NaN where all are the same."""
    ranks = rankdata(values) - (len(values) + 1) / 2
    length = np.linalg.norm(ranks)
    return ranks / length if length > 0 else np.full_like(ranks, np.nan)
