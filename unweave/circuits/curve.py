"""Faithfulness against circuit size, and its two integrals: CPR and CMD of the MIB benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unweave.ablation import Replacement
from unweave.circuits.circuit import connected
from unweave.circuits.distance import Prompts, per_prompt
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap
from unweave.scope import Scope
from unweave.scoring import EdgeScores

__all__ = ["SHARES", "FaithfulnessCurve", "faithfulness_curve", "faithfulness_of"]

# the circuit sizes of MIB, as shares of all edges
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness f of the top edges of a ranking at several sizes.

    Attributes:
        shares: of all edges.
        n_edges: edges left on paths from input to output.
        faithfulness: f at each size, with its interval over prompts.
        nats: divergence from the whole graph, nats per token.
        cpr: area under f over the share of edges, by the trapezoid rule (higher is better).
        cmd: area between f and 1 (lower is better).
    """

    shares: tuple[float, ...]
    n_edges: tuple[int, ...]
    faithfulness: tuple[Estimate, ...]
    nats: tuple[float, ...]
    cpr: float
    cmd: float

    def table(self) -> list[dict[str, Any]]:
        """One plain row per size."""
        columns = zip(self.shares, self.n_edges, self.faithfulness, self.nats, strict=True)
        return [{"share": s, "n_edges": n, "faithfulness": f._asdict(), "nats": d} for s, n, f, d in columns]


def faithfulness_of(full: Prompts, circuit: Prompts, empty: Prompts, scope: Scope, seed: int = 0) -> Estimate:
    """How much of what the whole graph does, over the empty circuit, a circuit does.

    With a logit difference m: f = (m(circuit) - m(empty)) / (m(full) - m(empty)), MIB's definition. With a
    divergence D: f = 1 - D(circuit) / D(empty). The interval is over prompts, resampled together.
    """
    if scope.divergence == "logit_difference":
        arrays = {"full": full.metric, "circuit": circuit.metric, "empty": empty.metric}
        return bootstrap(arrays, _share_of_difference, seed=seed)
    return bootstrap({"circuit": circuit.nats, "empty": empty.nats}, _share_of_nats, seed=seed)


def _share_of_difference(full: float, circuit: float, empty: float) -> float:
    return (circuit - empty) / (full - empty) if full != empty else float("nan")


def _share_of_nats(circuit: float, empty: float) -> float:
    return 1.0 - circuit / empty if empty > 0 else float("nan")


def faithfulness_curve(
    scores: EdgeScores | Mapping[float, torch.Tensor],
    graph: Graph,
    data: TokenData,
    scope: Scope,
    instead: Replacement,
    *,
    shares: Sequence[float] = SHARES,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> FaithfulnessCurve:
    """Measure the circuits made of the top edges of a ranking, at several sizes.

    Args:
        scores: a ranking; or, by share, the edges to keep.
        data: held-out prompts.
        shares: of all edges, rising, up to 1.

    Raises:
        InputError: shares that do not rise within (0, 1].
        EmptyDataError: the scope selects no position.

    Cost:
        One forward pass per size.

    Source:
        Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark": CPR = integral of f over the share of
        edges, CMD = integral of |1 - f|.
    """
    if not shares or sorted(set(shares)) != list(shares) or not 0 < shares[0] <= shares[-1] <= 1:
        raise InputError(f"shares must rise within (0, 1], got {tuple(shares)}")
    data = instead.paired(data, seed)
    kept = {}
    for share in shares:
        chosen = scores.top(round(share * graph.n_edges)) if isinstance(scores, EdgeScores) else scores[share]
        kept[share] = graph.edge_matrix if share == 1 else connected(graph, chosen)
    graphs = {f"{share}": instead.cut(graph, keep) for share, keep in kept.items()}
    graphs["empty"] = instead.cut(graph, torch.zeros_like(graph.edge_matrix))
    measured = per_prompt(graphs, graph, data, scope, batch_size=batch_size, progress=progress)
    rows = [measured[f"{share}"] for share in shares]
    f = tuple(faithfulness_of(measured["original"], row, measured["empty"], scope, seed) for row in rows)
    values, x = np.array([e.value for e in f]), np.array(shares)
    return FaithfulnessCurve(
        tuple(shares),
        tuple(int(kept[share].sum()) for share in shares),
        f,
        tuple(float(row.nats.sum() / row.tokens.sum()) for row in rows),
        float(np.trapezoid(values, x)),
        float(np.trapezoid(np.abs(1 - values), x)),
    )
