"""Known phenomena, each trained again from nothing and held against the published figure.

To add one: a file here with ``measure(seeds) -> list[Quantity]`` and a ``PHENOMENON``, and a line in ``PHENOMENA``.
"""

from unweave.retrodiction import (
    composition,
    equivariance,
    grokking,
    groups,
    head_matching,
    induction,
    learning_coefficient,
    packing,
    polygons,
    superposition,
)
from unweave.retrodiction.claims import Phenomenon, Quantity, over_seeds
from unweave.retrodiction.reproducing import reproduce

__all__ = ["PHENOMENA", "Phenomenon", "Quantity", "over_seeds", "reproduce"]

PHENOMENA: dict[str, Phenomenon] = {
    "superposition": superposition.PHENOMENON,
    "packing": packing.PHENOMENON,
    "polygons": polygons.PHENOMENON,
    "grokking": grokking.PHENOMENON,
    "groups": groups.PHENOMENON,
    "induction": induction.PHENOMENON,
    "head_matching": head_matching.PHENOMENON,
    "learning_coefficient": learning_coefficient.PHENOMENON,
    "composition": composition.PHENOMENON,
    "equivariance": equivariance.PHENOMENON,
}
