"""Find the smallest circuit for a budget: attributions propose, measurements decide."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from unweave.ablation import Means
from unweave.circuits.circuit import Circuit
from unweave.circuits.dimensions import narrow_circuit
from unweave.circuits.distance import Distance
from unweave.circuits.moves import Search
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.freezing import check_frozen
from unweave.graph import Graph
from unweave.progress import counter
from unweave.scope import Scope
from unweave.scoring import EdgeScores, score_edges
from unweave.statistics import replacement

__all__ = ["find_circuit"]

LEVELS = ("edge", "node", "subspace")
# so many edges can all be measured
FEW_EDGES = 256
# how much of the budget the whole edges may take when they are narrowed afterwards
WHOLE_SHARE = 0.8


def find_circuit(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    edges: int | None = None,
    kl_nats: float | None = None,
    faithfulness: float | None = None,
    ablation: str = "mean",
    means: Means | None = None,
    method: str = "auto",
    scores: EdgeScores | None = None,
    frozen: str = "none",
    level: str = "edge",
    samples: int = 4,
    max_trials: int = 400,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
) -> Circuit:
    """The part of a graph that does what the scope asks, within a budget; its error is measured, never estimated.

    Edges are ranked by their scores. The smallest prefix of the ranking that meets the budget is found by bisection;
    then edges are removed, cheapest first, in pieces that halve when one fails, until no single edge can go; then some
    are exchanged (out: those whose removal is predicted to cost least; in: those whose return is predicted to gain
    most, by the gradient of the divergence at the circuit itself) as long as the measured divergence falls, and so on.
    Every step is accepted on a measurement over ``data`` only. Edges on no path to the output are dropped.

    Args:
        graph: with all its edges; captured or compressed.
        data: prompts; with the label "corrupted" for counterfactual ablation.
        scope: by default every next-token prediction.
        edges: keep at most so many; or
        kl_nats: stay within so many nats per token of the scope (of its divergence); or
        faithfulness: reach 1 - nats / nats of the empty circuit.
        ablation, means: what ablated edges carry, see :class:`Replacement`.
        method, samples: how edges are scored at first, see :func:`score_edges`; "auto" measures every edge ("exact")
            of a graph with at most 256, where an attribution saves little and can miss saturated edges, and takes
            "fisher" otherwise.
        scores: known already.
        frozen: what the scores and the gradients that guide the search hold, see :func:`score_edges`; measurements hold
            nothing. With ``scores``, what these hold.
        level: "edge"; "node": all edges between the nodes kept, and nodes are what is chosen; or "subspace": an edge
            may keep only some dimensions (:func:`narrow_circuit`, from a circuit of whole edges, a little closer).
        max_trials: measurements at most; the search stops there with what it has.
        seed: of scores and of resampling.
        checkpoint: a file that keeps what was measured, so that a killed search resumes; removed at the end.

    Returns:
        :class:`Circuit`; test it on other data with :func:`prove`.

    Raises:
        InputError: not exactly one budget, one out of range or out of reach, or a graph with cut edges.

    Cost:
        One scoring pass and up to ``max_trials`` forward passes of the cut graph over the data.

    Exact?
        The stated nats are measured. That no smaller circuit exists is not claimed: the choice is greedy; at level
        "edge" with a budget in nats, no single edge can be removed unless ``max_trials`` ran out.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=32)
        >>> circuit = unweave.find_circuit(graph, data, unweave.Scope(positions="answered"), faithfulness=0.9)
        >>> circuit.n_edges < graph.n_edges
        True

    Source:
        Greedy selection on measured effects: Conmy et al. 2023 (ACDC); ranking by attribution: Syed et al. 2023.
    """
    _check(graph, edges, kl_nats, faithfulness, level)
    _check_held(frozen, scores)
    scope = scope or Scope()
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    instead, data = replacement(graph, data, ablation, means=means, seed=seed, **options)
    if method == "auto":
        method = "exact" if graph.n_edges <= FEW_EDGES else "fisher"
    if scores is None:
        given: dict[str, Any] = {"ablation": ablation, "means": instead.means, "method": method, "frozen": frozen}
        scores = score_edges(graph, data, scope, samples=samples, seed=seed, **given, **options)
    distance = Distance(graph, data, scope, instead, batch_size, checkpoint)
    with counter("measuring circuits", max_trials, show=progress) as count:
        search = Search(distance, scores, level, max_trials, count)
        empty = search.measure(torch.zeros_like(graph.edge_matrix))
        if edges is not None:
            kept, nats = search.of_size(edges, empty)
        else:
            target = kl_nats if kl_nats is not None else (1.0 - (faithfulness or 0.0)) * empty
            kept, nats = search.within(target * (WHOLE_SHARE if level == "subspace" else 1.0))
    distance.done()
    found = Circuit(instead.cut(graph, kept), graph, kept, scope, instead, scores, nats, empty, tuple(search.trials))
    if level != "subspace":
        return found
    return narrow_circuit(found, data, kl_nats=None if edges is not None else target, seed=seed, **options)


def _check(graph: Graph, edges: int | None, nats: float | None, faithfulness: float | None, level: str) -> None:
    if sum(b is not None for b in (edges, nats, faithfulness)) != 1:
        raise InputError("give exactly one budget: edges=, kl_nats= or faithfulness=")
    if edges is not None and not 1 <= edges <= graph.n_edges:
        raise InputError(f"edges must be between 1 and the graph's {graph.n_edges}, got {edges}")
    if nats is not None and not (nats >= 0 and math.isfinite(nats)):
        raise InputError(f"kl_nats must be at least 0, got {nats}")
    if faithfulness is not None and not 0 < faithfulness <= 1:
        raise InputError(f"faithfulness must be above 0 and at most 1, got {faithfulness}")
    if level not in LEVELS:
        raise InputError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if graph.is_cut:
        raise InputError("this graph has cut edges already; give the whole graph, a circuit is found in one go")


def _check_held(frozen: str, scores: EdgeScores | None) -> None:
    check_frozen(frozen)
    if scores is not None and frozen not in ("none", scores.frozen):
        raise InputError(f"frozen={frozen!r} does not fit the scores given, which hold: {scores.frozen}; leave it out")
