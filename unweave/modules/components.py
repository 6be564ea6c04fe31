"""Through which subspaces of the stream nodes talk: private lines, broadcasts, and what is between them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx as nx
import torch
from jaxtyping import Bool, Float, Int
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from unweave.ablation import Means
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.modules.communication import talk
from unweave.modules.directions import Directions
from unweave.scope import Scope

__all__ = ["KINDS", "SharedSubspace", "SharedSubspaces", "shared_subspaces"]

KINDS = ("private line", "shared", "broadcast")
# so many effective writers, and readers, are few
FEW = 2.0
# who writes or reads so large a share of a line's nats uses it
USER_SHARE = 0.1
# lines that hold so much of all nats are looked at, and a subspace joins its users if it holds so much
COVERED, JOINING = 0.99, 0.01
MOST_LINES = 1024


@dataclass(frozen=True, eq=False)
class SharedSubspace:
    """Directions of the stream with the same users.

    Attributes:
        directions: ``[k d_model]``, unit vectors, the most valuable first.
        nats: what travels through it, in nats per token.
        writers, readers: the nats that each node writes into it, or reads from it; the largest first.
        possible_readers: how many nodes hear one of its users that write.
        effective_writers, effective_readers: exp of the entropy of their shares.
        kind: "broadcast": read by more than 2 effective readers and by at least half of the possible ones;
            "private line": at most 2 effective writers and 2 effective readers; otherwise "shared".
    """

    directions: Float[Tensor, "k d_model"]
    nats: float
    writers: Mapping[str, float]
    readers: Mapping[str, float]
    possible_readers: int
    effective_writers: float
    effective_readers: float
    kind: str


@dataclass(frozen=True, eq=False)
class SharedSubspaces:
    """All shared subspaces of a graph.

    Attributes:
        subspaces: the one with most nats first.
        components: the nodes joined by subspaces other than broadcasts that hold at least 1% of all nats, as connected
            sets in execution order. (A broadcast would join everything.)
        nats: of everything that travels in the graph, per token.
        covered: the share of it that the lines looked at hold.
        overlap: from which overlap on two lines counted as one.
        chance: the 95th percentile of the overlap of lines in random directions, heard by the same readers. Above
            ``overlap``, two writers of one line need not have agreed on it: it is all that their readers can hear.
    """

    subspaces: tuple[SharedSubspace, ...]
    components: tuple[tuple[str, ...], ...]
    nats: float
    covered: float
    overlap: float
    chance: float

    def of_kind(self, kind: str) -> tuple[SharedSubspace, ...]:
        """Those of one kind.

        Raises:
            InputError: an unknown kind.
        """
        if kind not in KINDS:
            raise InputError(f"unknown kind {kind!r} of subspace; choose one of {', '.join(KINDS)}")
        return tuple(s for s in self.subspaces if s.kind == kind)

    def table(self, k: int | None = None) -> list[dict[str, Any]]:
        """The k subspaces with most nats as plain rows."""
        return [
            {
                "kind": s.kind,
                "nats": s.nats,
                "dimensions": len(s.directions),
                "writers": dict(s.writers),
                "readers": dict(s.readers),
                "effective_writers": s.effective_writers,
                "effective_readers": s.effective_readers,
                "possible_readers": s.possible_readers,
            }
            for s in self.subspaces[:k]
        ]


def shared_subspaces(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    overlap: float = 0.5,
    means: Means | None = None,
    samples: int = 2,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | None = None,
) -> SharedSubspaces:
    """The subspaces of the residual stream through which nodes talk, who uses each, and the nodes they join.

    1. *Lines.* What writer i writes is split into lines A_i z_k, z_k the right singular vectors of the virtual weights
       from i to all its readers stacked (weighted as in :func:`unweave.modules.communication`), so that no two lines
       of i mix in what is felt. Line k is worth n[j, k] = nats[j, i] |B_j A_i z_k|^2 / |B_j A_i|^2 to reader j.
    2. *Overlap.* Let h_k be the vectors B_j A_i z_k of all readers in a row, scaled to |h_k|^2 = sum over j of n[j, k].
       The overlap of two lines is (h_k . h_l)^2 / (|h_k|^2 |h_l|^2): 1 if every reader feels them alike. Lines are one
       where the mean overlap of two groups of them (average linkage) is above ``overlap``.
    3. *Subspaces.* Lines with the same users (writers, readers with at least 10% of its nats) make one subspace.

    Args:
        overlap: from which overlap on two lines are one, above 0 and below 1.
        means, samples, batch_size, seed, checkpoint: see :func:`unweave.modules.communication`.

    Returns:
        :class:`SharedSubspaces`.

    Raises:
        InputError: the graph has no single residual stream (a plain MLP), no edge of it is worth anything, or the
            overlap is out of range.
        EmptyDataError: the scope selects no position.

    Cost:
        One :func:`unweave.modules.communication`, an eigendecomposition per writer, and at most 1024 lines to cluster.

    Exact?
        The nats of a pair are shared out to its lines as its dimensions are, see there. The lines that hold the last
        percent of all nats are left out.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> found = shared_subspaces(graph, data, unweave.Scope(positions="answered"))
        >>> ["blocks.0.attn.head.0"] in [list(line.writers) for line in found.of_kind("private line")]
        True

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (subspaces of the stream as bandwidth);
        Merullo et al. 2024, "Talking Heads: Understanding Inter-Layer Communication in Transformer Language Models".
    """
    if not 0 < overlap < 1:
        raise InputError(f"overlap must be above 0 and below 1, got {overlap}")
    if any(stage.visible[0] != 0 for stage in graph.stages):
        raise InputError("this graph has no residual stream that all nodes share; shared_subspaces looks at one")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "checkpoint": checkpoint}
    nats, found = talk(graph, data, scope, means=means, samples=samples, seed=seed, **options)
    if float(nats.sum()) == 0:
        raise InputError("no node of this graph is worth anything to another in this scope: nothing is shared")
    lines = _lines(graph, nats, found)
    random = torch.randn(lines.along.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    apart = lines.writer[:, None] != lines.writer
    null = _overlaps(_felt(found, random.to(lines.along), lines.scale)[0])[apart]
    chance = float(null.quantile(0.95)) if len(null) else 0.0
    group = _cluster(_overlaps(lines.felt), overlap)
    subspaces = _subspaces(graph, lines, group, nats)
    total = float(nats.sum())
    components = _components(graph, subspaces, total)
    return SharedSubspaces(subspaces, components, total, float(lines.nats.sum()) / total, overlap, chance)


class _Lines(NamedTuple):
    """Lines of all writers: direction, place of its writer, nats by reader, what is felt, and its scale by reader."""

    along: Float[Tensor, "line d_model"]
    writer: Int[Tensor, " line"]
    nats: Float[Tensor, "node line"]
    felt: Float[Tensor, "read line"]
    scale: Float[Tensor, "node line"]


def _lines(graph: Graph, nats: Float[Tensor, "nodes nodes"], found: Directions) -> _Lines:
    along, writer, start = [], [], 0
    for s, stage in enumerate(graph.stages[:-1]):
        written = found.written[s]
        assert written is not None
        readers = [b for z, b in enumerate(found.felt) if b is not None and s < graph.stages[z].visible[1]]
        second = torch.stack([torch.einsum("nrd,nre->de", b, b) for b in readers]).sum(0)
        _, vectors = torch.linalg.eigh(written.transpose(1, 2) @ second @ written)
        found_here = (written @ vectors).transpose(1, 2)
        along.append(found_here.flatten(0, 1))
        writer.append(start + torch.arange(len(stage.nodes)).repeat_interleave(found_here.shape[1]))
        start += len(stage.nodes)
    lines, owner = torch.cat(along), torch.cat(writer)
    one = torch.ones(len(graph.nodes), len(lines), dtype=torch.float64)
    felt = _felt(found, lines, one)[1]
    by_writer = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64).index_add_(1, owner, felt)
    scale = torch.where(by_writer > 0, nats / by_writer.clamp(min=torch.finfo(torch.float64).tiny), 0.0)[:, owner]
    worth = felt * scale
    order = worth.sum(0).argsort(descending=True, stable=True)
    enough = int((worth.sum(0)[order].cumsum(0) < COVERED * worth.sum()).sum()) + 1
    best = order[: min(enough, MOST_LINES)]
    scale = scale[:, best].sqrt()
    return _Lines(lines[best], owner[best], worth[:, best], _felt(found, lines[best], scale)[0], scale)


def _felt(
    found: Directions, lines: Float[Tensor, "line d_model"], scale: Float[Tensor, "node line"]
) -> tuple[Float[Tensor, "read line"], Float[Tensor, "node line"]]:
    """(what every read of every node feels of every line, its square norm by node), times a scale."""
    rows, norms, start = [], [], 0
    for written, felt in zip(found.written, found.felt, strict=True):
        known = written if felt is None else felt
        assert known is not None
        here = slice(start, start + len(known))
        start += len(known)
        if felt is None:
            norms.append(torch.zeros_like(scale[here]))
            continue
        heard = (felt @ lines.to(felt).T).cpu() * scale[here][:, None]
        rows.append(heard.flatten(0, 1))
        norms.append(heard.square().sum(1))
    return torch.cat(rows), torch.cat(norms)


def _overlaps(felt: Float[Tensor, "read line"]) -> Float[Tensor, "line line"]:
    unit = torch.nn.functional.normalize(felt, dim=0)
    return (unit.T @ unit).square().clamp(max=1)


def _cluster(overlaps: Float[Tensor, "line line"], threshold: float) -> Int[Tensor, " line"]:
    if len(overlaps) < 2:
        return torch.zeros(len(overlaps), dtype=torch.long)
    model = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1 - threshold
    )
    return torch.as_tensor(model.fit_predict((1 - overlaps).numpy())).long()


def _subspaces(
    graph: Graph, lines: _Lines, group: Int[Tensor, " line"], nats: Float[Tensor, "nodes nodes"]
) -> tuple[SharedSubspace, ...]:
    n, groups = len(graph.nodes), int(group.max()) + 1
    worth = lines.nats.sum(0)
    written = torch.zeros(groups, n, dtype=torch.float64).index_put_((group, lines.writer), worth, accumulate=True)
    read = torch.zeros(groups, n, dtype=torch.float64).index_add_(0, group, lines.nats.T)
    # groups of lines that the same nodes use
    users = torch.cat([_uses(written), _uses(read)], 1)
    same = torch.unique(users, dim=0, return_inverse=True)[1]
    out = []
    for k in range(int(same.max()) + 1):
        here = same == k
        mine = here[group].nonzero()[:, 0]
        mine = mine[worth[mine].argsort(descending=True)]
        directions = torch.nn.functional.normalize(lines.along[mine], dim=1).float().cpu()
        out.append(_describe(graph, directions, written[here].sum(0), read[here].sum(0), nats))
    return tuple(sorted(out, key=lambda s: -s.nats))


def _uses(shares: Float[Tensor, "group node"]) -> Bool[Tensor, "group node"]:
    return shares >= USER_SHARE * shares.sum(1, keepdim=True)


def _describe(
    graph: Graph, directions: Tensor, written: Float[Tensor, " node"], read: Float[Tensor, " node"], nats: Tensor
) -> SharedSubspace:
    possible = int((nats[:, _uses(written[None])[0]] > 0).any(1).sum())
    n_writers, n_readers = _effective(written), _effective(read)
    if n_readers > FEW and n_readers >= possible / 2:
        kind = "broadcast"
    else:
        kind = "private line" if n_writers <= FEW and n_readers <= FEW else "shared"
    total = float(read.sum())
    return SharedSubspace(
        directions, total, _named(graph, written), _named(graph, read), possible, n_writers, n_readers, kind
    )


def _named(graph: Graph, nats: Float[Tensor, " node"]) -> dict[str, float]:
    used = _uses(nats[None])[0]
    return {graph.nodes[i]: float(nats[i]) for i in nats.argsort(descending=True).tolist() if used[i]}


def _effective(nats: Float[Tensor, " node"]) -> float:
    """exp of the entropy of the shares: how many there would be, were all equal."""
    return float(torch.special.entr(nats / nats.sum()).sum().exp())


def _components(graph: Graph, subspaces: tuple[SharedSubspace, ...], total: float) -> tuple[tuple[str, ...], ...]:
    joined: Any = nx.Graph()
    for s in subspaces:
        if s.kind != "broadcast" and s.nats >= JOINING * total:
            nx.add_path(joined, dict.fromkeys(itertools.chain(s.writers, s.readers)))
    place = {name: i for i, name in enumerate(graph.nodes)}
    found = [tuple(sorted(c, key=place.__getitem__)) for c in nx.connected_components(joined)]
    return tuple(sorted(found, key=lambda c: place[c[0]]))
