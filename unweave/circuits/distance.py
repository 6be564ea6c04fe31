"""How far cut graphs are from the whole one, on the same data, per prompt."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave.ablation import Replacement, batch_trace, counterfactual_trace
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, NonFiniteError
from unweave.execution import Trace
from unweave.files import Checkpoint
from unweave.graph import Graph
from unweave.progress import track
from unweave.scope import Scope, agreement, divergence, metric, position_mask
from unweave.statistics import SECONDS_BETWEEN_CHECKPOINTS, identify

__all__ = ["Distance", "Prompts", "per_prompt"]

# what every measurement needs anew is kept between them up to this many numbers; beyond, it is computed again
NUMBERS_KEPT = 64_000_000


class Prompts(NamedTuple):
    """Sums over each prompt's positions in the scope.

    Attributes:
        nats: divergence from the whole graph ``[n]``.
        tokens: positions in the scope ``[n]``.
        same: positions where both put the same output first ``[n]``.
        metric: the logit difference ``[n]``; zero where the data has no answers.
    """

    nats: np.ndarray
    tokens: np.ndarray
    same: np.ndarray
    metric: np.ndarray


class Distance:
    """Measures candidates: the divergence, in nats per token, of a set of edges from the whole graph.

    With a checkpoint, what was measured is kept in a file every half minute, so that a search that was killed goes the
    same way again without measuring anew.
    """

    def __init__(
        self,
        graph: Graph,
        data: TokenData,
        scope: Scope,
        instead: Replacement,
        batch_size: int = 16,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.graph, self.scope, self.instead = graph, scope, instead
        self.known: dict[str, float] = {}
        self.saved, self.saver = time.monotonic(), None
        if checkpoint is not None:
            self.saver = Checkpoint(Path(checkpoint), identify(data, "circuit", graph, scope, instead))
            found = self.saver.load()
            self.known = {} if found is None else dict(found[1]["known"])
        self.batches = list(data.batches(batch_size))
        self.tokens = sum(int(position_mask(scope, batch).sum()) for batch in self.batches)
        if self.tokens == 0:
            raise EmptyDataError("the scope selects no position of this data set")
        positions = data.tokens.shape[0] * data.tokens.shape[1]
        written = sum(len(s.nodes) * s.write.d_out for s in graph.stages if s.write is not None)
        self._references: dict[int, Tensor] | None = {} if positions * graph.info["d_out"] <= NUMBERS_KEPT else None
        self._others: dict[int, Trace] | None = {} if positions * written <= NUMBERS_KEPT else None

    @torch.no_grad()
    def reference(self, number: int) -> Float[Tensor, "batch pos d_out"]:
        """The whole graph's logits on a batch."""
        if self._references is None or number not in self._references:
            made = batch_trace(self.graph, self.batches[number]).output
            if self._references is None:
                return made
            self._references[number] = made
        return self._references[number]

    @torch.no_grad()
    def other(self, number: int) -> Trace | None:
        """The whole graph's run on a batch's partners, where ablated edges carry that."""
        if self.instead.means is not None:
            return None
        if self._others is None or number not in self._others:
            made = counterfactual_trace(self.graph, self.batches[number])
            if self._others is None:
                return made
            self._others[number] = made
        return self._others[number]

    def of(self, keep: Bool[Tensor, "ports writers"]) -> float:
        """Nats per token when only these edges are kept.

        Raises:
            NonFiniteError: the cut graph's output is not finite.
        """
        key = hashlib.sha256(keep.numpy().tobytes()).hexdigest()[:24]
        if key not in self.known:
            self.known[key] = self.of_graph(self.instead.cut(self.graph, keep))
        if self.saver is not None and time.monotonic() - self.saved > SECONDS_BETWEEN_CHECKPOINTS:
            self.saver.save({}, {"known": self.known})
            self.saved = time.monotonic()
        return self.known[key]

    def done(self) -> None:
        """Forget the checkpoint: the search is over."""
        if self.saver is not None:
            self.saver.clear()

    @torch.no_grad()
    def of_graph(self, cut: Graph) -> float:
        """Nats per token of a graph cut out of the whole one.

        Raises:
            NonFiniteError: its output is not finite.
        """
        total = 0.0
        for number, batch in enumerate(self.batches):
            logits = batch_trace(cut, batch, other=self.other(number)).output
            total += float(divergence(self.scope, self.reference(number), logits, batch).double().sum())
        if not math.isfinite(total):
            raise NonFiniteError("a cut graph gave NaN or inf; use another ablation")
        return total / self.tokens


@torch.no_grad()
def per_prompt(
    graphs: Mapping[str, Graph],
    original: Graph,
    data: TokenData,
    scope: Scope,
    *,
    batch_size: int = 16,
    description: str = "measuring circuits",
    progress: bool | None = None,
) -> dict[str, Prompts]:
    """Every graph against the original on the same prompts; the original itself is added under the name "original".

    Raises:
        EmptyDataError: the scope selects no position.
    """
    every = {"original": original, **graphs}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in every}
    total = -(-len(data) // batch_size)
    for batch in track(data.batches(batch_size), description, total, show=progress):
        reference = batch_trace(original, batch).output
        other = counterfactual_trace(original, batch) if any(g.resample for g in graphs.values()) else None
        for name, graph in every.items():
            logits = reference if name == "original" else batch_trace(graph, batch, other=other).output
            rows[name].append(_row(scope, batch, reference, logits))
    tables = {name: np.concatenate(parts, axis=1) for name, parts in rows.items()}
    if tables["original"][1].sum() == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    return {name: Prompts(*table) for name, table in tables.items()}


def _row(scope: Scope, batch: Batch, reference: Tensor, logits: Tensor) -> np.ndarray:
    mask = position_mask(scope, batch).to(logits.device)
    nats = divergence(scope, reference, logits, batch).sum(1)
    same = (agreement(reference, logits) & mask).sum(1)
    asked = "correct" in batch.labels and "wrong" in batch.labels
    value = metric(scope, logits, batch) if asked else torch.zeros_like(nats)
    columns = [nats, mask.sum(1), same, value]
    return torch.stack([c.double() for c in columns]).cpu().numpy()
