"""Learning coefficients of the polygons that features make in two dimensions, where one feature is on at a time.

x^ = ReLU(W^T W x + b), inputs are one feature, each as often as the others, uniform on [0, 1]; the loss is
1/2 |x - x^|^2. Features end on the corners of a regular polygon; those left over have W_i = 0, with b_i > 0, the best
constant ("+"), or b_i < 0, where their output is 0 whatever the input (dead).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from unweave.measures import learning_coefficient
from unweave.retrodiction.claims import Phenomenon, Quantity, over_seeds

__all__ = ["PHENOMENON", "Polygon", "loss_of_single_features", "measure", "single_features", "trained_polygons"]

SOURCE = (
    "Chen, Lau, Mendel, Wei & Murfet 2023, Dynamical versus Bayesian Phase Transitions in a Toy Model of Superposition"
)
WITHIN_TENTH = (0.9, 1.1)
STARTS, STEPS, RATE, SPREAD, LOWEST_BIAS = 32, 2500, 0.02, 0.5, -0.3
ALIVE, REGULAR = 0.3, 1e-3
N, LOCALISATION = 10**7, 100.0
CHAINS, BURN_IN, DRAWS, THIN = 48, 600, 100, 5
# by batches; STEP is the step times n beta: with larger ones, or smaller batches, chains are hotter than they should be
EXAMPLES, BATCH, N_BATCHES, STEP = 100_000, 4096, 10**5, 0.2
KINDS = ((5, "5"), (5, "4+"), (5, "4 and 1 dead"), (6, "6"), (6, "5+"), (6, "5 and 1 dead"))
BY_BATCHES = ((5, "5"),)


class Polygon(NamedTuple):
    """What features in two dimensions came to.

    Attributes:
        corners: features on a regular polygon.
        constant: features whose output is a constant above 0.
        dead: features whose output is 0.
    """

    corners: int
    constant: int
    dead: int

    @classmethod
    def of(cls, weight: Float[Tensor, "2 features"], bias: Float[Tensor, " features"]) -> Polygon | None:
        """The polygon of W's columns; None where it is not regular.

        Example:
            >>> Polygon.of(torch.tensor([[1.0, 0.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, -1.0, 0.0]]), -torch.ones(5))
            Polygon(corners=4, constant=0, dead=1)
        """
        lengths = weight.norm(dim=0)
        alive = lengths > ALIVE
        corners = int(alive.sum())
        if corners < 2:
            return None
        angles = torch.atan2(weight[1, alive], weight[0, alive]).sort().values
        gaps = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]])
        uneven = max(float((gaps - 2 * math.pi / corners).abs().max()), float(lengths[alive].std()))
        constant = int((~alive & (bias > 0)).sum())
        return None if uneven > REGULAR else cls(corners, constant, len(bias) - corners - constant)

    @property
    def coefficient(self) -> float:
        """The local learning coefficient of a polygon of four corners or more, with at most one feature left over.

        Half the number of directions in which the loss rises: all of W and b but the rotation; from five corners on,
        where all outputs have slack, not those of a dead feature (W_i and b_i) either. In a square the biases are 0
        and any W_i makes some output positive: only a dead feature's b_i is free. A square's loss has kinks, but rises
        like a positive function of degree 2, for which lambda is half the number of its arguments too.

        Example:
            >>> Polygon(5, 0, 0).coefficient, Polygon(6, 0, 0).coefficient, Polygon(5, 0, 1).coefficient
            (7.0, 8.5, 7.0)
        """
        free = 3 if self.corners > 4 else 1
        return (3 * sum(self) - 1 - free * self.dead) / 2

    def __str__(self) -> str:
        return f"{self.corners}{'+' * self.constant}{f' and {self.dead} dead' if self.dead else ''}"


def loss_of_single_features(
    weight: Float[Tensor, "*many hidden features"], bias: Float[Tensor, "*many features"]
) -> Float[Tensor, "*many"]:
    """E 1/2 |x - ReLU(W^T W x + b)|^2 in closed form.

    With g = W_i . W_j, p = ReLU(g + b_j) and q = ReLU(b_j), output j is on over the share s = (p - q) / g of x in
    [0, 1] (1 where both are positive), and the integral of its square over x is s (p^2 + p q + q^2) / 3.

    Example:
        >>> float(loss_of_single_features(torch.zeros(2, 5), torch.zeros(5)))  # 1/2 E x^2
        0.16666666666666666
    """
    overlaps = einsum(weight.double(), weight.double(), "... h i, ... h j -> ... i j")
    bias = bias.double()
    low = bias[..., None, :].expand_as(overlaps)
    p, q = (overlaps + low).relu(), low.relu()
    share = torch.where((p > 0) & (q > 0), 1.0, (p - q) / torch.where(overlaps == 0, 1.0, overlaps))
    squares = share * (p * p + p * q + q * q) / 3
    own, top = (x.diagonal(dim1=-2, dim2=-1) for x in (overlaps, p))
    # the integral of x times output i where the input is x in i
    partly = top.square() * (2 * top - 3 * bias) / (6 * torch.where(own == 0, 1.0, own).square())
    along = torch.where(bias > 0, own / 3 + bias / 2, partly)
    return ((1 / 3 - 2 * along).sum(-1) + squares.sum((-1, -2))) / (2 * bias.shape[-1])


def single_features(n: int, n_features: int, seed: int) -> Float[Tensor, "n features"]:
    """Inputs with one feature on, uniform on [0, 1]; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, n_features, dtype=torch.float64)
    which = torch.randint(n_features, (n,), generator=generator)
    x[torch.arange(n), which] = torch.rand(n, generator=generator, dtype=torch.float64)
    return x


def trained_polygons(
    n_features: int, seed: int, starts: int = STARTS, steps: int = STEPS
) -> tuple[Float[Tensor, "starts 2 features"], Float[Tensor, "starts features"]]:
    """(W, b) trained on the loss of infinitely many inputs from random starts, the lowest loss first; float64."""
    generator = torch.Generator().manual_seed(seed)

    weight = SPREAD * torch.randn(starts, 2, n_features, generator=generator, dtype=torch.float64)
    bias = LOWEST_BIAS * torch.rand(starts, n_features, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    bias.requires_grad_()
    optimiser = torch.optim.Adam([weight, bias], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 - step / steps) ** 3 + 1e-6)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of_single_features(weight, bias).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    order = loss_of_single_features(weight, bias).argsort()
    return weight.detach()[order], bias.detach()[order]


def measure(seeds: Sequence[int]) -> list[Quantity]:
    """Of each seed, the first start that came to each kind of polygon; kinds that no start came to are left out."""
    ratios: dict[tuple[int, str], list[float]] = {kind: [] for kind in KINDS}
    by_batches: list[float] = []
    for seed in seeds:
        for n_features in sorted({n for n, _ in KINDS}):
            for name, (polygon, start) in _reached(n_features, seed).items():
                if (n_features, name) in KINDS:
                    ratios[n_features, name].append(_of_loss(start, seed) / polygon.coefficient)
                if (n_features, name) in BY_BATCHES:
                    by_batches.append(_of_batches(start, seed) / polygon.coefficient)
    published = "half the directions in which the loss rises (theory; the paper's table was not at hand)"
    rows = [
        over_seeds(
            f"{n} features, polygon {name}: estimate / known",
            published,
            WITHIN_TENTH,
            found,
            "on the loss of infinitely many inputs",
        )
        for (n, name), found in ratios.items()
        if found
    ]
    named = " and ".join(name for _, name in BY_BATCHES)
    note = f"batches of {BATCH}, n = {N_BATCHES}"
    return [
        *rows,
        over_seeds(
            f"polygon {named} by stochastic gradients: estimate / known", published, WITHIN_TENTH, by_batches, note
        ),
    ]


def _reached(n_features: int, seed: int) -> dict[str, tuple[Polygon, dict[str, Tensor]]]:
    """The polygons that training came to, by name, each with the W and b of the first start that did."""
    found: dict[str, tuple[Polygon, dict[str, Tensor]]] = {}
    for w, b in zip(*trained_polygons(n_features, seed), strict=True):
        polygon = Polygon.of(w, b)
        if polygon is not None:
            found.setdefault(str(polygon), (polygon, {"w": w, "b": b}))
    return found


def _of_loss(start: Mapping[str, Tensor], seed: int) -> float:
    found = learning_coefficient(
        start,
        lambda p, _: loss_of_single_features(p["w"], p["b"]),
        n=N,
        localisation=LOCALISATION,
        chains=CHAINS,
        burn_in=BURN_IN,
        draws=DRAWS,
        thin=THIN,
        seed=seed,
    )
    return found.value


def _of_batches(start: Mapping[str, Tensor], seed: int) -> float:
    def loss(p: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        x = batch[0]
        return ((x @ p["w"].mT @ p["w"] + p["b"]).relu() - x).square().sum(-1).mean() / 2

    found = learning_coefficient(
        start,
        loss,
        (single_features(EXAMPLES, len(start["b"]), 3000 + seed),),
        n=N_BATCHES,
        batch_size=BATCH,
        step_size=STEP * math.log(N_BATCHES) / N_BATCHES,
        chains=CHAINS // 4,
        burn_in=BURN_IN,
        draws=DRAWS,
        thin=THIN,
        seed=seed,
    )
    return found.value


PHENOMENON = Phenomenon(
    "Learning coefficients of the polygons that single features make in two dimensions", SOURCE, measure, minutes=8.0
)
