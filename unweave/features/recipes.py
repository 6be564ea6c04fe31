"""How a dictionary is trained."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.errors import InputError

__all__ = ["KINDS", "Recipe"]

KINDS = ("topk", "batchtopk", "jumprelu", "relu")


@dataclass(frozen=True)
class Recipe:
    """How a dictionary is trained.

    Attributes:
        width: how many latents.
        kind: their activation, one of :data:`KINDS`.
        k: active latents per token, for "topk"; on average, for "batchtopk".
        penalty: for "jumprelu", the share of the variance that one active latent must be worth; for "relu", what a
            latent's size costs.
        rise: the share of the steps over which the penalty rises to its full height.
        steps: of Adam.
        tokens: per step.
        learning_rate: at its highest.
        bandwidth: w, for "jumprelu", in the units of training.
        dead_after: a latent that has not fired for so many steps is dead.
        seed: of the first weights and of the order of tokens.
    """

    width: int
    kind: str = "topk"
    k: int | None = None
    penalty: float | None = None
    rise: float = 0.05
    steps: int = 4000
    tokens: int = 1024
    learning_rate: float = 1e-3
    bandwidth: float = 0.1
    dead_after: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r} of dictionary; choose one of {', '.join(KINDS)}")
        counts = (self.width, self.steps, self.tokens, self.dead_after)
        if min(counts) < 1 or not self.learning_rate > 0 or not self.bandwidth > 0:
            raise InputError(f"sizes, steps and rates must be positive, got {self}")
        sparse = self.kind in ("topk", "batchtopk")
        if sparse != (self.k is not None) or not 1 <= (self.k or 1) <= self.width:
            raise InputError(f"'topk' and 'batchtopk' need k of 1..{self.width}, the others none; got {self.k!r}")
        if sparse == (self.penalty is not None) or not (self.penalty or 0) >= 0:
            raise InputError(f"'jumprelu' and 'relu' need a penalty of at least 0, others none; got {self.penalty!r}")
        if not 0 <= self.rise <= 1:
            raise InputError(f"rise is a share of the steps, 0 to 1, got {self.rise}")
