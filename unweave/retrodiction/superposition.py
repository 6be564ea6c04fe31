"""Superposition: what toy models make of sparse features, beside Elhage et al. 2022 and the decomposition papers.

Everything is read off the captured graph: the columns of what "layers.0" reads are the directions of the features. A
feature counts as represented where its direction has a squared length above 1/2. Where several starts are trained, the
one with the lowest loss on fresh inputs is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from unweave.capture import capture
from unweave.data import float_data
from unweave.features import dimensionality, node_components, recovery
from unweave.graph import Graph
from unweave.retrodiction.claims import Claim, Phenomenon, Quantity, over_claims
from unweave.scope import Scope
from unweave.zoo import superposition as toy
from unweave.zoo.mlp import linear_layers

__all__ = ["PHENOMENON", "Claim", "directions", "graphs", "measure", "phase_border", "trained"]

STARTS = 6
STEPS = 3000
FRESH = 8000
REPRESENTED = 0.5
BORDERS = (0.5, 1.0)

PICTURE = "a picture and its account, no number: "
CLAIMS = {
    "dense": Claim("features represented, 5 in 2 dimensions, dense", "2: the most important, orthogonal", (1.9, 2.1)),
    "sparsity 0.8": Claim(
        "features represented, 5 in 2 dimensions, sparsity 0.8", "4: two antipodal pairs", (3.6, 4.4)
    ),
    "sparsity 0.9": Claim("features represented, 5 in 2 dimensions, sparsity 0.9", "5: a pentagon", (4.6, 5.0)),
    "degrees": Claim("pentagon: largest error of a neighbour's angle, degrees", "72 degrees apart", (0.0, 3.0)),
    "pentagon": Claim("pentagon: mean dimensionality of its features", "2/5", (0.38, 0.42)),
    "border": Claim(
        "density of the phase change / that of the closed form",
        PICTURE + "theory and training have the same phases",
        (0.8, 1.25),
        "lengths and biases of the closed form are not optimised",
    ),
    "jump": Claim(
        "largest step of the weaker feature's squared length at the change", PICTURE + "discontinuous", (0.3, math.inf)
    ),
    "top": Claim("features represented, 20 in 5 dimensions, dense", "5, as principal components would", (4.5, 5.5)),
    "ordered": Claim(
        "share of pairs in which the less important feature is not represented alone",
        PICTURE + "by importance",
        (0.95, 1.0),
    ),
    "gained": Claim(
        "features represented at sparsity 0.97 less those when dense, 20 in 5",
        PICTURE + "more with sparsity",
        (1.0, 15.0),
    ),
    "5-2 MMCS": Claim("parts of W, 5-2, inputs turned at random: MMCS", "1.000 +- 0.000 (not turned)", (0.99, 1.001)),
    "5-2 ML2R": Claim("parts of W, 5-2, inputs turned at random: ML2R", "0.993 +- 0.002 (not turned)", (0.98, 1.02)),
    "40-10 MMCS": Claim("parts of W, 40-10, inputs turned: MMCS", "1.000 +- 0.000 (not turned)", (0.99, 1.001)),
    "40-10 ML2R": Claim("parts of W, 40-10, inputs turned: ML2R", "1.010 +- 0.007 (not turned)", (0.98, 1.02)),
}


def measure(seeds: Sequence[int]) -> list[Quantity]:
    """Train all of it for each seed and hold it against the papers."""
    return over_claims(CLAIMS, [_figures(seed) for seed in seeds])


def phase_border(importance: float) -> float:
    """The density below which two features share one dimension, x^ = ReLU(+-(x_1 - x_2)), rather than one having it.

    With importance 1 and r: sharing errs by min(x_1, x_2) in both, (1 + r) p^2 / 6; owning leaves the variance of the
    other, r (p / 3 - p^2 / 4). They are equal at p = 4 r / (2 + 5 r). Lengths and biases are not optimised.

    Example:
        >>> round(phase_border(1.0), 3)
        0.571
    """
    return 4 * importance / (2 + 5 * importance)


def _figures(seed: int) -> dict[str, float]:
    """The figures of CLAIMS, of one seed."""
    falling = 0.9 ** torch.arange(5.0)
    densities = {"dense": 1.0, "sparsity 0.8": 0.2, "sparsity 0.9": 0.1}
    shown = {name: float((_lengths(_best(p, falling, 2, seed)) > REPRESENTED).sum()) for name, p in densities.items()}
    five = _best(0.05, torch.ones(5), 2, seed)
    forty = _best(0.05, torch.ones(40), 10, seed, starts=1)
    parts = _recovered("5-2", five, 5, seed) | _recovered("40-10", forty, 40, seed)
    return shown | _pentagon(five) | _phase_change(seed) | _by_importance(seed) | parts


def _pentagon(graph: Graph) -> dict[str, float]:
    w = directions(graph)
    angles = torch.rad2deg(torch.atan2(w[1], w[0])).sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 360 - angles[-1:]])
    return {"degrees": float((gaps - 72).abs().max()), "pentagon": float(dimensionality(w).mean())}


def directions(graph: Graph) -> Float[Tensor, "hidden features"]:
    return graph.stages[graph.where["layers.0"][0]].ports[0].reads[0].map.dense().detach()


def _lengths(graph: Graph) -> Float[Tensor, " features"]:
    return directions(graph).square().sum(0)


def trained(density: Tensor, importance: Tensor, hidden: int, seed: int, **options: int) -> toy.Instances:
    *_, (_, _, models) = toy.train_instances(density, importance, hidden, seed=seed, **{"steps": STEPS, **options})
    return models


def graphs(models: toy.Instances) -> list[Graph]:
    return [capture(toy.as_model(w, b)) for w, b in zip(*models, strict=True)]


def _picked(models: toy.Instances, density: Tensor, importance: Tensor, starts: int, seed: int) -> toy.Instances:
    """Of each density, the start with the lowest loss on fresh inputs; starts of one density stand together."""
    fresh = toy.features(FRESH, density, len(importance), torch.Generator().manual_seed(10_000 + seed))
    losses = rearrange(toy.losses(models, fresh, importance), "(d s) -> d s", s=starts)
    best = torch.arange(len(losses)) * starts + losses.argmin(1)
    return toy.Instances(models.weights[best], models.biases[best])


def _best(density: float, importance: Tensor, hidden: int, seed: int, starts: int = STARTS) -> Graph:
    p = torch.full((starts,), density)
    return graphs(_picked(trained(p, importance, hidden, seed), p, importance, starts, seed))[0]


def _phase_change(seed: int, starts: int = 3) -> dict[str, float]:
    """Two features in one dimension: where the second comes in as density falls, and how suddenly."""
    ratios, steps = [], []
    for r in BORDERS:
        grid = phase_border(r) * torch.logspace(-0.3, 0.24, 19)
        p, importance = grid.repeat_interleave(starts), torch.tensor([1.0, r])
        models = _picked(trained(p, importance, 1, seed, batch=256), p, importance, starts, seed)
        weaker = torch.stack([_lengths(graph).min() for graph in graphs(models)])
        shared = grid[weaker > REPRESENTED]
        ratios.append(float(shared.max()) / phase_border(r) if len(shared) else math.nan)
        steps.append(float(weaker.diff().abs().max()))
    return {"border": sum(ratios) / len(ratios), "jump": min(steps)}


def _by_importance(seed: int) -> dict[str, float]:
    """20 features of importance 0.7^i in 5 dimensions at four densities."""
    p, importance = torch.tensor([1.0, 0.3, 0.1, 0.03]), 0.7 ** torch.arange(20.0)
    shown = torch.stack([_lengths(g) > REPRESENTED for g in graphs(trained(p, importance, 5, seed))])
    first, second = torch.triu_indices(20, 20, 1)
    ordered = (shown[:, first] >= shown[:, second]).float().mean()
    counts = shown.sum(1)
    return {"top": float(counts[0]), "ordered": float(ordered), "gained": float(counts[-1] - counts[0])}


def _recovered(name: str, graph: Graph, n: int, seed: int) -> dict[str, float]:
    """MMCS and ML2R of the parts found where the inputs are turned at random, so that no feature is a coordinate."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    x = toy.features(4000, torch.tensor([0.05]), n, generator)[0]
    w = directions(graph)
    model = toy.as_model(w, _bias(graph))
    linear_layers(model)[0].weight.data = w @ turn.T
    scope = Scope(divergence="gaussian")
    turned = capture(model)
    found = node_components(turned, "layers.0", float_data(x @ turn.T), scope=scope, seed=seed, progress=False)
    match = recovery(found, directions(turned), turn)
    return {f"{name} MMCS": match.mmcs, f"{name} ML2R": match.ml2r}


def _bias(graph: Graph) -> Float[Tensor, " features"]:
    bias = graph.stages[graph.where["layers.1"][0]].ports[0].reads[0].bias
    assert bias is not None
    return bias.detach()


PHENOMENON = Phenomenon(
    "Sparse features share dimensions: phase change, polytopes, the important first",
    "Elhage et al. 2022, Toy Models of Superposition; components: Bushnaq et al. 2025",
    measure,
    minutes=4.0,
)
