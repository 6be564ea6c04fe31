"""What crosses between modules: how many nats, in which directions, and where in the data most.

Definitions. Blocks A and B, m_i the mean of what writer i writes. For a set of ports of B that hear the same writers of
A, u = sum over those writers of (y_i - m_i) is what crosses at a position, and g the sum of the gradients at those
ports. With the random cotangents of :func:`unweave.score_edges`, the interface A -> B is worth

    1/2 E[(sum over positions and such sets of g . u)^2] / tokens    nats per token,

the second order of the KL when all edges from A to B carry means at once. If only P u crosses, P = sum over j <= k of
(unit direction d_j) (reader r_j)^T, then g . (u - P u) stands in place of g . u: the nats lost. P minimises
tr(G D A D^T), D = 1 - P, with A the second moment of u and G that of g: it keeps the k leading singular directions of
G^1/2 A^1/2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from unweave.ablation import Means
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import Patch
from unweave.graph import Edge, Graph
from unweave.intervals import Estimate
from unweave.modules.crossings import Basis, Example, Examples, MomentTally, Wiring, WorthTally, basis, wire
from unweave.modules.patching import nats_per_token, patched_nats, refuse_resampling
from unweave.scope import Scope
from unweave.scoring import mean_and_error
from unweave.statistics import FisherPass, Sums, accumulate, collect_means

__all__ = ["Interface", "Interfaces", "always", "measure_interfaces"]


@dataclass(frozen=True, eq=False)
class Interface:
    """What block ``src`` sends to block ``dst``.

    Attributes:
        src, dst: the blocks.
        edges: every edge between them.
        nats: worth of all these edges together, in nats per token (second order), and its standard error ``se``.
        effect: the same measured: the divergence when all these edges carry means; None if not asked for.
        directions: unit vectors of the stream, the most valuable first.
        readers: what is sent has the coordinate reader . (y - mean) along a direction.
        direction_nats: nats lost without that direction alone.
        lost_nats: nats lost when only the first k directions cross, k = 0, 1, ...; ``lost_nats[0] == nats``.
        highest, lowest, random: for each of the first directions, tokens with the largest and smallest coordinates,
            and tokens drawn at random (the same for all interfaces).
    """

    src: str
    dst: str
    edges: tuple[Edge, ...]
    nats: float
    se: float
    directions: Float[Tensor, "k d_model"]
    readers: Float[Tensor, "k d_model"]
    direction_nats: Float[Tensor, " k"]
    lost_nats: Float[Tensor, " k1"]
    highest: tuple[tuple[Example, ...], ...]
    lowest: tuple[tuple[Example, ...], ...]
    random: tuple[tuple[Example, ...], ...]
    effect: Estimate | None = None

    def dimensions(self, share: float = 0.99) -> int | None:
        """The fewest directions that keep this share of the nats; None if those that were measured do not.

        Raises:
            InputError: the share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise InputError(f"share must be between 0 and 1, got {share}")
        enough = (self.lost_nats <= (1 - share) * self.lost_nats[0]).nonzero()
        return int(enough[0, 0]) if len(enough) else None

    def narrow(self, k: int, means: Means) -> dict[str, Patch]:
        """Patches for :func:`unweave.run` with which only the first k directions cross; the rest is at its mean.

        Raises:
            InputError: more directions than were measured.
        """
        if not 0 <= k <= len(self.directions):
            raise InputError(f"{self.src} -> {self.dst} has {len(self.directions)} measured directions, got k = {k}")
        through = self.readers[:k].T @ self.directions[:k]
        return {str(e): partial(_project, means[e.src], through) for e in self.edges}


def _project(mean: Tensor, through: Tensor, y: Tensor) -> Tensor:
    mean = mean[: y.shape[1]].to(y)
    return mean + (y - mean) @ through.to(y)


@dataclass(frozen=True, eq=False)
class Interfaces:
    """What crosses between the blocks of a partition.

    Attributes:
        graph: with its partition.
        interfaces: the most valuable first.
        means: what every writer writes on average.
        scope: the signal that the nats are about.
        n_sequences, n_tokens: on how much data.
    """

    graph: Graph
    interfaces: tuple[Interface, ...]
    means: Means
    scope: Scope
    n_sequences: int
    n_tokens: int

    def between(self, src: str, dst: str) -> Interface:
        """The interface from one block to another.

        Raises:
            UnknownNameError: nothing crosses between them.
        """
        known = {f"{i.src} -> {i.dst}": i for i in self.interfaces}
        if f"{src} -> {dst}" not in known:
            raise UnknownNameError("interface", f"{src} -> {dst}", known)
        return known[f"{src} -> {dst}"]

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: from, to, edges, nats, its error, measured nats, how many dimensions keep 95% and 99% of them."""
        return [
            {
                "from": i.src,
                "to": i.dst,
                "edges": len(i.edges),
                "nats": i.nats,
                "se_nats": i.se,
                "measured_nats": None if i.effect is None else i.effect.value,
                "dimensions_95": i.dimensions(0.95),
                "dimensions_99": i.dimensions(0.99),
            }
            for i in self.interfaces
        ]


def measure_interfaces(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    means: Means | None = None,
    max_directions: int = 64,
    n_examples: int = 10,
    n_shown: int = 4,
    samples: int = 2,
    measure_top: int = 0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Interfaces:
    """What crosses between every two blocks of ``graph.modules``: nats, directions, dimensions, top examples.

    Formulas: in the text of this module. A block that names no node is missing; a node that no module names is a block.

    Args:
        graph: with a partition (:meth:`Graph.quotient`).
        data: token sequences.
        scope: the signal that counts; by default the KL at all positions.
        means: of every writer; collected here (one more forward pass) when missing.
        max_directions: how many directions of each interface are measured (at most d_model).
        n_examples: how many tokens are kept at each end of a direction, and at random.
        n_shown: for how many directions of each interface.
        samples: cotangents per sequence.
        measure_top: the effects of so many interfaces are measured as well, those worth most.
        seed: of the cotangents and of the random tokens.

    Returns:
        :class:`Interfaces`.

    Raises:
        InputError: numbers that make no sense, streams of different widths, cut edges that hear another input, or a
            graph with a single block.
        EmptyDataError: no position is left in the scope.

    Cost:
        Two passes over the data of one forward and ``samples`` backward passes each (the first finds the directions,
        the second measures them), and one product of tokens x d_model x directions per interface; for each effect
        measured, one more forward pass. Memory: two
        matrices d_model x d_model for each block's distinct sets of writers and ports, and the examples; it does not
        grow with the data.

    Exact?
        Second order, as ``score_edges(method="fisher")``, and noisier, for whole sums over positions are squared.
        Directions minimise a proxy that takes u and g as independent; what they keep and lose is then taken without
        it. Where the output saturates (the zoo's induction model is sure of its answers) the second order is far too
        small: ask for ``measure_top``, :func:`narrowed_loss` and :func:`measured_width`, which measure the KL.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction").quotient({"input": ["embed", "pos_embed"]})
        >>> data = unweave.load_data("zoo:induction", limit=16)
        >>> found = measure_interfaces(graph, data, unweave.Scope(positions="answered"), measure_top=4)
        >>> found.between("blocks.0.attn.head.0", "blocks.1.attn.head.1").effect.value > 1  # the induction circuit
        True

    Source:
        Kronecker-factored Fisher: Martens & Grosse 2015.
    """
    if min(max_directions, samples, batch_size) < 1 or min(n_examples, n_shown, measure_top) < 0:
        raise InputError(
            "max_directions, samples and batch_size must be at least 1; n_examples, n_shown and measure_top at least 0"
        )
    refuse_resampling(graph)
    scope = scope or Scope()
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    wiring = wire(graph)
    means = collect_means(graph, data, **options) if means is None else means
    width = next(iter(means.values())).shape[1]

    def one_pass(measure: Any, description: str) -> Sums:
        step = FisherPass(graph, scope, samples, seed, (measure,))
        return accumulate(data, step, description=description, **options)

    moments = one_pass(partial(MomentTally, wiring, means, scope), "what modules send and hear")
    if float(moments["tokens"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    bases = [basis(moments, pair, min(max_directions, width), graph.device) for pair in wiring.pairs]
    examples = Examples(len(wiring.pairs), n_examples, n_shown, seed)
    worth = one_pass(partial(WorthTally, wiring, means, scope, bases, examples), "what crosses between modules")
    found = _results(wiring, bases, examples, worth, len(data))
    out = Interfaces(graph, found, means, scope, len(data), int(moments["tokens"]))
    return _with_effects(out, data, measure_top, seed, **options) if measure_top else out


def _with_effects(found: Interfaces, data: TokenData, top: int, seed: int, **options: Any) -> Interfaces:
    """The first ``top`` interfaces with what it costs that all their edges carry means."""
    silent = {f"{i.src} -> {i.dst}": i.narrow(0, found.means) for i in found.interfaces[:top]}
    patches = {name: partial(always, patch) for name, patch in silent.items()}
    nats = patched_nats(found.graph, data, found.scope, patches, **options)
    effects = [nats_per_token(nats[name], nats["tokens"], seed) for name in silent]
    measured = [dataclasses.replace(i, effect=e) for i, e in zip(found.interfaces, effects, strict=False)]
    return dataclasses.replace(found, interfaces=(*measured, *found.interfaces[top:]))


def always(patch: dict[str, Patch], batch: Batch) -> dict[str, Patch]:
    return patch


def _results(wiring: Wiring, bases: Sequence[Basis], examples: Examples, worth: Sums, n: int) -> tuple[Interface, ...]:
    (lost, se), (alone, _) = mean_and_error(worth, "lost", n), mean_and_error(worth, "alone", n)
    found = [
        Interface(
            *pair[:3],
            float(lost[p, 0]),
            float(se[p, 0]),
            *basis,
            alone[p, :-1],
            lost[p],
            examples.of(p, "highest"),
            examples.of(p, "lowest"),
            examples.of(p, "random"),
        )
        for p, (pair, basis) in enumerate(zip(wiring.pairs, bases, strict=True))
    ]
    return tuple(sorted(found, key=lambda i: -i.nats))
