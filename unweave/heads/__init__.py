"""What single heads do: detectors of the kinds of heads that are known, each score against a null."""

from unweave.heads.detectors import DETECTORS, Detector, Evidence, View
from unweave.heads.scores import HeadScores
from unweave.heads.survey import score_heads

__all__ = ["DETECTORS", "Detector", "Evidence", "HeadScores", "View", "score_heads"]
