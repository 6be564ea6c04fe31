"""The local learning coefficient: how many parameters a model really uses at its minimum, by sampling around it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from torch.func import grad_and_value, vmap

from unweave import tree
from unweave.data import Batch, TokenData
from unweave.errors import InputError, NonFiniteError
from unweave.execution import check_inputs, trace
from unweave.graph import Graph
from unweave.measures.dimension import numbers_of
from unweave.measures.langevin import Chains, first_step, r_hat
from unweave.scope import Scope, divergence, loss, position_mask, require_positions

__all__ = ["LearningCoefficient", "graph_learning_coefficient", "learning_coefficient"]

LARGEST_R_HAT, LEAST_ACCEPTANCE = 1.1, 0.8

Loss = Callable[[Mapping[str, Tensor], Any], Tensor]


@dataclass(frozen=True, eq=False)
class LearningCoefficient:
    """An estimate with what tells whether to believe it.

    Attributes:
        value: n beta (mean loss of the chains - loss at the minimum).
        low, high: 95% interval, from the spread between chains (t distribution).
        excess: n beta (loss - loss at the minimum) along every chain, after burn-in.
        r_hat: between-chain over within-chain spread of the halves of the chains; 1 where they have mixed.
        acceptance: how often a Metropolis check accepts the steps.
        adjusted: whether it was heeded: then the chains' law is exact whatever the step size.
        step_size: of the Langevin steps, as set during burn-in.
        n_beta: n times the inverse temperature.
        localisation: gamma.
        n_parameters: how many were moved.
    """

    value: float
    low: float
    high: float
    excess: Float[Tensor, "chains draws"]
    r_hat: float
    acceptance: float
    adjusted: bool
    step_size: float
    n_beta: float
    localisation: float
    n_parameters: int

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons not to believe the value; empty if none was found, which proves nothing."""
        found = []
        if self.value < 0:
            found.append("negative: the chains found lower losses; this is no minimum of this loss")
        if self.r_hat > LARGEST_R_HAT:
            found.append(f"R-hat is {self.r_hat:.2f}: the chains have not mixed; take more draws and burn-in")
        if not self.adjusted and self.acceptance < LEAST_ACCEPTANCE:
            found.append(f"a Metropolis check accepts only {self.acceptance:.0%} of the steps; lower step_size")
        return tuple(found)

    def __repr__(self) -> str:
        warned = f"; {'; '.join(self.problems)}" if self.problems else ""
        return f"LearningCoefficient({self.value:.3g}, {self.low:.3g} to {self.high:.3g}{warned})"


def learning_coefficient(
    parameters: Mapping[str, Tensor],
    loss: Loss,
    data: Sequence[Tensor] | None = None,
    *,
    n: int,
    beta: float | None = None,
    localisation: float = 1.0,
    batch_size: int | None = None,
    chains: int = 4,
    draws: int = 500,
    burn_in: int = 500,
    thin: int = 1,
    step_size: float | None = None,
    preconditioned: bool = False,
    vectorised: bool = True,
    seed: int = 0,
) -> LearningCoefficient:
    """The local learning coefficient of a minimum w*: n beta (E[L(w)] - L(w*)).

    E is over w ~ exp(-n beta L(w) - localisation / 2 |w - w*|^2), sampled by chains of Langevin steps from w*:

    w <- w - step / 2 G (n beta grad L + localisation (w - w*)) + sqrt(step G) noise.

    For a regular model it is half the number of parameters; where directions in parameter space change nothing, or
    change the loss to higher order only, it is less. Models of equal loss are told apart by it: in Bayes, the one with
    the smaller coefficient wins as n grows (free energy n L + lambda log n).

    Without ``batch_size`` the loss is of all data and every step passes a Metropolis check (MALA): then the chains' law
    is exact. With it steps are stochastic gradients without a check (SGLD); what a check would accept is measured on
    every 10th batch and reported. Step size and preconditioner are set during burn-in and fixed afterwards.

    Args:
        parameters: w*, by name.
        loss: (parameters, batch) -> mean loss in nats per example; a pure function of torch operations.
        data: tensors with one row per example, of which batches are tuples; None where the loss needs none.
        n: the number of examples that sets the temperature.
        beta: inverse temperature, by default 1 / log n.
        localisation: gamma; ties chains to w*. Large values make flat directions count.
        batch_size: examples per step; None for all.
        draws: per chain after ``burn_in``, every ``thin``-th step.
        step_size: by default one at which a Metropolis check accepts 80% (with batches: 95%).
        preconditioned: RMSprop's: G = 1 / (root mean square gradient), else G = 1.
        vectorised: all chains at once by ``torch.func.vmap``; off for losses whose code asks for values.

    Returns:
        :class:`LearningCoefficient`.

    Raises:
        InputError: numbers that make no sense.
        NonFiniteError: the loss is NaN or infinite at w*, or the chains diverged.

    Cost:
        chains x (burn_in + draws x thin) gradients; with batches 2 losses more per draw. Memory: a few copies of the
        parameters per chain.

    Exact?
        An estimate at finite n: it tends to lambda with n like lambda - (m - 1) / log(n beta), where m is lambda's
        multiplicity (1 for regular models), and depends on ``localisation``. Chains on batches are hotter than they
        should be by their gradients' noise.

    Example:
        >>> import torch
        >>> start = {"w": torch.zeros(6)}
        >>> found = learning_coefficient(start, lambda p, _: (p["w"][:4] ** 2).sum(), n=10**6, draws=1000)
        >>> found.low < 2.0 < found.high  # 4 directions that matter, of 6
        True

    Source:
        Lau et al. 2023, "The Local Learning Coefficient: A Singularity-Aware Complexity Measure"; Watanabe 2013, "A
        Widely Applicable Bayesian Information Criterion"; preconditioner: Li et al. 2016, "Preconditioned Stochastic
        Gradient Langevin Dynamics", with Hitchcock & Hoogland 2025, "From Global to Local".
    """
    rows = 0 if data is None else len(data[0])
    _check(n, beta, localisation, batch_size, chains, draws, burn_in, thin, step_size, rows)
    layout = _Layout.of(parameters)

    def of_vector(vector: Tensor, batch: Any) -> Tensor:
        return loss(layout.split(vector), batch)

    def slope(points: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor]:
        batch = data if which is None or data is None else tuple(x[which] for x in data)
        each = grad_and_value(of_vector)
        if vectorised:
            return vmap(each, in_dims=(0, None if which is None else 0))(points, batch)
        found = [
            each(w, batch if which is None or batch is None else tuple(x[c] for x in batch))
            for c, w in enumerate(points)
        ]
        return torch.stack([g for g, _ in found]), torch.stack([v for _, v in found])

    generator = torch.Generator(layout.start.device).manual_seed(seed)

    def pick() -> Tensor | None:
        if batch_size is None:
            return None
        return torch.randint(rows, (chains, batch_size), generator=generator, device=layout.start.device)

    n_beta = n * (1 / math.log(n) if beta is None else beta)
    start = layout.start
    here = start.expand(chains, -1).clone()
    gradient, at_start = slope(here, None)
    if not bool(torch.isfinite(gradient).all() & torch.isfinite(at_start).all()):
        raise NonFiniteError("the loss or its gradient at the given parameters is NaN or infinite")
    first = first_step(lambda w: slope(w[None].expand_as(here), None)[0][0], start, n_beta, localisation)
    sampler = Chains(
        slope=slope,
        pick=pick,
        start=start,
        here=here,
        n_beta=n_beta,
        localisation=localisation,
        generator=generator,
        adjusted=batch_size is None,
        step_size=first if step_size is None else step_size,
        known=(gradient, at_start) if batch_size is None else None,
        scale=torch.ones_like(start),
        squares=torch.zeros_like(start),
    )
    sampler.warm_up(burn_in, step_size is None, preconditioned)
    excess, acceptance = sampler.sample(draws, thin)
    return _summary(sampler, excess, acceptance)


def _summary(sampler: Chains, excess: Float[Tensor, "chains draws"], acceptance: float) -> LearningCoefficient:
    means = excess.double().mean(1)
    wide = float(stats.t.ppf(0.975, len(means) - 1) * means.std() / math.sqrt(len(means)))
    value = float(means.mean())
    return LearningCoefficient(
        value=value,
        low=value - wide,
        high=value + wide,
        excess=excess,
        r_hat=r_hat(excess),
        acceptance=acceptance,
        adjusted=sampler.adjusted,
        step_size=sampler.step_size,
        n_beta=sampler.n_beta,
        localisation=sampler.localisation,
        n_parameters=len(sampler.start),
    )


def graph_learning_coefficient(
    graph: Graph, data: TokenData, scope: Scope | None = None, *, of: str = "behaviour", **options: Any
) -> LearningCoefficient:
    """The local learning coefficient of a graph's own numbers.

    Args:
        data: all of it is one batch: choose few sequences.
        scope: which positions count, and the divergence.
        of: "behaviour": the loss is the scope's divergence from what the graph computes now, whose minimum is always
            here; "next token": cross entropy of the next token, where the graph should be trained to the end.
        options: of :func:`learning_coefficient`; n is by default the number of positions in the scope.

    Returns:
        :class:`LearningCoefficient`.

    Raises:
        InputError: an unknown loss, or numbers that make no sense.
        EmptyDataError: no position is left in the scope.
        NonFiniteError: the chains diverged.

    Cost:
        chains x (burn_in + draws x thin) forward and backward passes over the data.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:two_tasks")
        >>> data = unweave.load_data("zoo:two_tasks", limit=32)
        >>> found = graph_learning_coefficient(graph, data, draws=20, burn_in=20, chains=2)
        >>> 0 < found.value < graph.n_parameters / 2
        True

    Source:
        The behavioural loss: Bushnaq et al. 2024, "Using Degeneracy in the Loss Landscape for Mechanistic
        Interpretability"; see also :func:`learning_coefficient`.
    """
    if of not in ("behaviour", "next token"):
        raise InputError(f"unknown loss {of!r}; known: behaviour, next token")
    scope = scope or Scope()
    count = require_positions(scope, data)
    batch = next(data.batches(len(data))).to(graph.device)
    with torch.no_grad():
        reference = trace(graph, check_inputs(graph, batch.inputs, batch.mask)).output

    def value(parameters: Mapping[str, Tensor], _: Any) -> Tensor:
        live = dataclasses.replace(graph, stages=tree.replace_tensors(graph.stages, parameters))
        output = trace(live, check_inputs(graph, batch.inputs, batch.mask)).output
        if of == "behaviour":
            return divergence(scope, reference, output, batch).sum() / count
        return _next_token(scope, output, batch)

    # the other divergences ask for values on their way
    vectorised = of == "behaviour" and scope.divergence == "gaussian"
    options = {"n": max(count, 3), "vectorised": vectorised} | options
    return learning_coefficient(numbers_of(graph), value, **options)


def _next_token(scope: Scope, output: Tensor, batch: Batch) -> Tensor:
    nats, known = loss(output, batch)
    counted = known & position_mask(scope, batch).to(known.device)
    return torch.where(counted, nats, 0.0).sum() / counted.sum().clamp(min=1)


def _check(n: int, beta: float | None, localisation: float, batch_size: int | None, *rest: Any) -> None:
    chains, draws, burn_in, thin, step_size, rows = rest
    if n < 3 or (beta is not None and not beta > 0) or not localisation >= 0:
        raise InputError(f"n must be 3 or more and beta positive, got n={n}, beta={beta}, localisation={localisation}")
    if chains < 2 or draws < 4 or burn_in < 0 or thin < 1:
        raise InputError(f"an estimate needs 2 chains of 4 draws or more, got {chains} of {draws} (thin={thin})")
    if step_size is not None and not step_size > 0:
        raise InputError(f"step_size must be positive, got {step_size}")
    if step_size is None and burn_in < 20:
        raise InputError(f"a step size is found during 20 steps of burn-in or more, got {burn_in}; or give step_size")
    if batch_size is not None and not 1 <= batch_size <= rows:
        raise InputError(f"batch_size must be from 1 to the {rows} rows of data, got {batch_size}")


@dataclass(frozen=True)
class _Layout:
    """Named tensors as one vector."""

    start: Float[Tensor, " parameters"]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> _Layout:
        if not parameters:
            raise InputError("there are no parameters to move")
        flat = torch.cat([t.detach().flatten() for t in parameters.values()])
        # bfloat16 would round small steps away
        return cls(flat if flat.dtype == torch.float64 else flat.float(), {k: t.shape for k, t in parameters.items()})

    def split(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        pieces = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
