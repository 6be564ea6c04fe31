"""Many sparse features in few dimensions: how many dimensions each gets, at the size of Elhage et al. 2022.

Everything is read off the captured graph: the columns of what "layers.0" reads are the directions of the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.features import dimensionality, features_per_dimension
from unweave.retrodiction.claims import Claim, Phenomenon, Quantity, over_claims
from unweave.retrodiction.superposition import directions, graphs, trained

__all__ = ["CLAIMS", "INVERSE_DENSITIES", "PHENOMENON", "measure"]

FEATURES, HIDDEN = 400, 30
BATCH, STEPS = 256, 4000
INVERSE_DENSITIES = (1.0, 2.2, 2.8, 3.6, 4.4, 10.0)
# digon, triangle, tetrahedron, pentagon, square antiprism, and a dimension of one's own
NAMED = (1 / 2, 2 / 3, 3 / 4, 2 / 5, 3 / 8, 1.0)
NEAR, SEEN = 0.02, 0.3

PICTURE = "a picture and its account, no number: "
CLAIMS = {
    "own": Claim("dimensions per feature, uniform, dense", PICTURE + "sticks at 1", (0.9, 1.1)),
    "plateau": Claim(
        "largest distance of dimensions per feature from 1/2 over a factor of 2 in density",
        PICTURE + "sticks at 1/2",
        (0.0, 0.05),
        "the factor of 2 is ours, not the paper's",
    ),
    "steepness": Claim(
        "steepness of dimensions per feature in density, 1/2.8 to 1/3.6, over the lesser of both sides'",
        PICTURE + "sticks at 1/2",
        (0.0, 0.5),
        "1 without a plateau; range written after a pilot on another seed",
    ),
    "halves": Claim(
        f"share with dimensionality 1/2 +- 0.02 at density 1/2.2, of features above {SEEN}",
        PICTURE + "antipodal pairs",
        (0.5, 1.0),
    ),
    "named": Claim(
        f"share within 0.02 of 3/8, 2/5, 1/2, 2/3, 3/4 or 1, of features above {SEEN}",
        PICTURE + "clusters",
        (0.5, 1.0),
        "uniform values in [0.3, 1] would give 0.29",
    ),
}


def measure(seeds: Sequence[int]) -> list[Quantity]:
    """Train a model per density for each seed and hold the lot against the paper."""
    return over_claims(CLAIMS, [_figures(seed) for seed in seeds])


def _figures(seed: int) -> dict[str, float]:
    """The figures of CLAIMS, of one seed."""
    p = 1 / torch.tensor(INVERSE_DENSITIES)
    models = trained(p, torch.ones(FEATURES), HIDDEN, seed, batch=BATCH, steps=STEPS)
    columns = [directions(graph) for graph in graphs(models)]
    per_feature = [1 / features_per_dimension(w) for w in columns]
    found = torch.stack([dimensionality(w) for w in columns])
    return {
        "own": per_feature[0],
        "plateau": _sticks(per_feature),
        "steepness": _steepness(per_feature),
        "halves": _near(found[INVERSE_DENSITIES.index(2.2)], (1 / 2,)),
        "named": _near(found, NAMED),
    }


def _near(dimensionalities: Float[Tensor, "*densities features"], values: Sequence[float]) -> float:
    """The share that is near one of the values, of the features that are seen at all; NaN if none is."""
    seen = dimensionalities[dimensionalities > SEEN]
    return float(((seen[:, None] - seen.new_tensor(values)).abs().min(1).values < NEAR).double().mean())


def _sticks(per_feature: Sequence[float]) -> float:
    """The least, over spans of at least a factor of 2 in density, of the largest distance from 1/2."""
    inverse = INVERSE_DENSITIES
    spans = [(i, j) for i in range(len(inverse)) for j in range(len(inverse)) if inverse[j] >= 2 * inverse[i]]
    return min(max(abs(v - 0.5) for v in per_feature[i : j + 1]) for i, j in spans)


def _steepness(per_feature: Sequence[float]) -> float:
    """|d log D / d log density| from 1/2.8 to 1/3.6, over the lesser of that of the spans on either side."""
    at = INVERSE_DENSITIES.index(2.8)
    before, here, after = (
        abs(math.log(per_feature[i] / per_feature[i + 1]) / math.log(INVERSE_DENSITIES[i + 1] / INVERSE_DENSITIES[i]))
        for i in (at - 1, at, at + 1)
    )
    return here / min(before, after)


PHENOMENON = Phenomenon(
    "Many features in few dimensions: how many dimensions each gets",
    "Elhage et al. 2022, Toy Models of Superposition (400 features in 30 dimensions)",
    measure,
    minutes=8.0,
)
