"""How much of an input's output travels through parts that the explanation left out: a score for new inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.ablation import batch_trace
from unweave.audit.disagreement import check_pair
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError
from unweave.graph import Graph
from unweave.scope import Scope, divergence, position_mask

__all__ = ["AnomalyScore"]


@dataclass(frozen=True, eq=False)
class AnomalyScore:
    """A calibrated alarm for inputs on which a model does what its explanation does not know.

    score(x) = max over the scope's tokens t of D(model(x)_t, graph(x)_t), in nats: what the parts left out change.

    Attributes:
        graph, original: the explanation, and the model.
        scope: the signal explained.
        threshold: scores above it are alarms.
        false_alarms: the share of clean texts that raise one, at most, on average over calibrations.
        clean: the sorted scores of the clean texts it was calibrated on.
    """

    graph: Graph
    original: Graph
    scope: Scope
    threshold: float
    false_alarms: float
    clean: Float[Tensor, " n"]

    @classmethod
    def fit(
        cls,
        graph: Graph,
        original: Graph,
        data: TokenData,
        scope: Scope | None = None,
        *,
        false_alarms: float = 0.01,
        batch_size: int = 64,
    ) -> AnomalyScore:
        """Calibrate the threshold on clean texts.

        The threshold is the k-th smallest of n clean scores, k = ceil((n + 1) (1 - false_alarms)): a new clean text
        exceeds it with probability at most ``false_alarms``, if it comes from where the others came from.

        Args:
            data: clean texts that the graph was not fitted on.
            false_alarms: the level, above 0 and below 1.

        Raises:
            InputError: a level out of range, too few texts for it, or graphs that cannot be compared.
            EmptyDataError: a text has no token in the scope.

        Cost:
            One pass of both graphs over the data.

        Exact?
            The level holds exactly, whatever the distribution of scores, for texts exchangeable with ``data``. Nothing
            is promised of detection: a behaviour that the graph still computes raises no alarm, and what a crude graph
            gets wrong everywhere hides the rest. Fit a small one and let it learn clean texts again
            (:func:`unweave.audit.relearn`): it then comes near the model only where clean texts go. An alarm says that
            a text is not like those; texts that are odd without a secret are not either.

        Example:
            >>> import unweave
            >>> graph = unweave.capture("zoo:induction")
            >>> fitted, clean = unweave.load_data("zoo:induction", limit=48).split(held_out=0.5)
            >>> small = unweave.compress(graph, fitted, size=0.5)
            >>> scorer = AnomalyScore.fit(small, graph, clean, unweave.Scope(positions="answered"), false_alarms=0.1)
            >>> bool(scorer.threshold >= scorer.clean.median())
            True

        Source: Vovk et al. 2005, "Algorithmic Learning in a Random World" (conformal quantiles); Christiano et al.
            2022, "Mechanistic anomaly detection and ELK".
        """
        check_pair(graph, original)
        if not 0 < false_alarms < 1:
            raise InputError(f"false_alarms must be above 0 and below 1, got {false_alarms}")
        k = math.ceil((len(data) + 1) * (1 - false_alarms) - 1e-9)
        if k > len(data):
            raise InputError(
                f"{len(data)} clean texts cannot hold a level of {false_alarms}; "
                f"give at least {math.ceil(1 / false_alarms - 1 - 1e-9)}, or allow more false alarms"
            )
        bare = cls(graph, original, scope or Scope(), math.inf, false_alarms, torch.zeros(0))
        clean = bare.score_data(data, batch_size=batch_size).sort().values
        return cls(graph, original, bare.scope, float(clean[k - 1]), false_alarms, clean)

    def score(
        self,
        inputs: Tensor,
        mask: Bool[Tensor, "batch pos"] | None = None,
        labels: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The score of each input, in nats; -inf for one without a token in the scope.

        Args:
            inputs: token ids ``[batch pos]``, or reals ``[batch pos features]``.
            mask: True where a token is real.
            labels: where the scope's positions are a label.

        Cost:
            One run of both graphs.
        """
        real = torch.ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
        return self._score(Batch(inputs.cpu(), real, labels or {}, torch.arange(len(inputs))))

    def score_data(self, data: TokenData, *, batch_size: int = 64) -> Float[Tensor, " n"]:
        """The score of each text of a data set.

        Raises:
            EmptyDataError: a text has no token in the scope, or there is none.
        """
        if len(data) == 0:
            raise EmptyDataError("the data set holds no sequence to score")
        scores = torch.cat([self._score(batch) for batch in data.batches(batch_size)])
        if bool(scores.isneginf().any()):
            row = int(scores.isneginf().nonzero()[0, 0])
            raise EmptyDataError(f"sequence {row} has no token in the scope; select those that do")
        return scores

    def alarm(
        self,
        inputs: Tensor,
        mask: Bool[Tensor, "batch pos"] | None = None,
        labels: Mapping[str, Tensor] | None = None,
    ) -> Bool[Tensor, " batch"]:
        """Which inputs score above the threshold; arguments as for :meth:`score`."""
        return self.score(inputs, mask, labels) > self.threshold

    def p_values(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """(1 + number of clean scores at least as large) / (1 + number of clean scores)."""
        below: Int[Tensor, " batch"] = torch.searchsorted(self.clean, scores.to(self.clean))
        return (1 + len(self.clean) - below).double() / (1 + len(self.clean))

    @torch.no_grad()
    def _score(self, batch: Batch) -> Float[Tensor, " batch"]:
        reference = batch_trace(self.original, batch).output
        logits = batch_trace(self.graph, batch).output.to(reference.device)
        nats = divergence(self.scope, reference, logits, batch).double().cpu()
        marked = position_mask(self.scope, batch).cpu()
        # what cannot be computed must not pass as clean
        return nats.masked_fill(nats.isnan(), math.inf).masked_fill(~marked, -math.inf).amax(1)
