"""Chains of Langevin steps around a point: samples of exp(-n beta loss - localisation / 2 distance^2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.errors import NonFiniteError

__all__ = ["Chains", "Slope", "first_step", "r_hat"]

# acceptance that the step size is set to; 57%, best for laws of one scale, leaves chains stuck where a singular law is
# steepest (w1^2 w2^2: 0.30 instead of 0.33); without a check, every step that would be refused brings bias
TARGET_ADJUSTED, TARGET_UNADJUSTED = 0.8, 0.95
CHECK_EVERY = 10
STEP_GAIN, NUDGE = 2.0, 1e-3
MEMORY, DAMPING = 0.97, 0.1

# (points [chains, parameters], which examples [chains, batch] or None) -> (gradients, losses [chains])
Slope = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass
class Chains:
    """Chains of Langevin steps around a point.

    Attributes:
        here: where they are.
        known: gradient and loss there, where they do not change with the batch.
        scale: G, the diagonal preconditioner.
        squares: the running mean of squared gradients, of which G is made.
    """

    slope: Slope
    pick: Callable[[], Tensor | None]
    start: Float[Tensor, " parameters"]
    here: Float[Tensor, "chains parameters"]
    n_beta: float
    localisation: float
    generator: torch.Generator
    adjusted: bool
    step_size: float
    known: tuple[Tensor, Tensor] | None
    scale: Float[Tensor, " parameters"]
    squares: Float[Tensor, " parameters"]

    def warm_up(self, steps: int, adapt: bool, preconditioned: bool) -> None:
        """Leave the minimum, and find the step size and G on the way."""
        target = TARGET_ADJUSTED if self.adjusted else TARGET_UNADJUSTED
        for k in range(steps):
            chance, gradient = self.advance(check=adapt)
            if adapt:
                self.step_size *= math.exp(STEP_GAIN * (chance - target) / (k + 1) ** 0.6)
            if preconditioned:
                self.squares = MEMORY * self.squares + (1 - MEMORY) * gradient.square().mean(0)
                root = self.squares.sqrt()  # its overall size, and the correction of its start, cancel
                self.scale = 1 / (root / root.mean().clamp(min=1e-30) + DAMPING)

    def sample(self, draws: int, thin: int) -> tuple[Float[Tensor, "chains draws"], float]:
        """(n beta (loss - loss at the start) along the chains, share of steps accepted)."""
        excess, accepted = self.here.new_empty(len(self.here), draws), []
        for k in range(draws * thin):
            if k % thin == 0:
                excess[:, k // thin] = self.excess()
            if self.adjusted or k % CHECK_EVERY == 0:
                accepted.append(self.advance(check=True)[0])
            else:
                self.advance(check=False)
        return excess, sum(accepted) / len(accepted)

    def excess(self) -> Float[Tensor, " chains"]:
        """n beta (loss - loss at the start): on one batch for both, so that most of its noise cancels."""
        which = self.pick()
        loss = self.slope(self.here, which)[1] if self.known is None else self.known[1]
        base = self.slope(self.start.expand_as(self.here), which)[1]
        found = self.n_beta * (loss - base)
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                f"chains at step size {self.step_size:.2e} diverged to a loss of NaN or infinity; give a smaller "
                "step_size, or raise localisation"
            )
        return found

    def advance(self, *, check: bool) -> tuple[float, Tensor]:
        """Take a step; returns the mean chance that a Metropolis check accepts it (1 without), and the gradients."""
        which = self.pick()
        gradient, loss = self.slope(self.here, which) if self.known is None else self.known
        noise = torch.randn(self.here.shape, generator=self.generator, device=self.here.device, dtype=self.here.dtype)
        there = self._drift(self.here, gradient) + (self.step_size * self.scale).sqrt() * noise
        chance = torch.ones_like(loss)
        if check or self.adjusted:
            new = self.slope(there, which)
            log_chance = self._log_law(there, new[1]) - self._log_law(self.here, loss)
            log_chance += self._log_step(there, new[0], self.here) - self._log_step(self.here, gradient, there)
            chance = log_chance.clamp(max=0).exp().nan_to_num(0.0)
        if self.adjusted:
            taken = torch.rand(len(chance), generator=self.generator, device=chance.device) < chance
            there = torch.where(taken[:, None], there, self.here)
            self.known = torch.where(taken[:, None], new[0], gradient), torch.where(taken, new[1], loss)
        self.here = there
        return float(chance.mean()), gradient

    def _drift(self, w: Tensor, gradient: Tensor) -> Tensor:
        pull = self.n_beta * gradient + self.localisation * (w - self.start)
        return w - self.step_size / 2 * self.scale * pull

    def _log_law(self, w: Tensor, loss: Tensor) -> Tensor:
        return -self.n_beta * loss - self.localisation / 2 * (w - self.start).square().sum(1)

    def _log_step(self, w: Tensor, gradient: Tensor, to: Tensor) -> Tensor:
        return -((to - self._drift(w, gradient)).square() / (2 * self.step_size * self.scale)).sum(1)


def first_step(gradient_at: Callable[[Tensor], Tensor], start: Tensor, n_beta: float, localisation: float) -> float:
    """One over the curvature along a random direction, roughly: the search for the step size begins there."""
    nudge = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).to(start)
    nudge *= NUDGE / nudge.norm()
    curvature = (gradient_at(start + nudge) - gradient_at(start)).norm() / NUDGE
    return 1.0 / max(n_beta * float(curvature) + localisation, 1e-12)


def r_hat(values: Float[Tensor, "chains draws"]) -> float:
    """Split R-hat: sqrt of (within + between variance of half chains) / within."""
    half = values.shape[1] // 2
    pieces = torch.cat([values[:, :half], values[:, -half:]]).double()
    within, between = pieces.var(1).mean(), pieces.mean(1).var()
    return float(((1 - 1 / half) + between / within).sqrt()) if float(within) > 0 else 1.0
