"""What single heads do, and what travels along composed paths: virtual weights, circuits of heads, effects of paths."""

from unweave.freezing import FROZEN, freeze
from unweave.paths.circuits import OVCircuit, QKCircuit, ov_circuit, qk_circuit
from unweave.paths.composition import Composition, composition
from unweave.paths.effects import PathEffect, direct_effect, path_effect
from unweave.paths.expansion import PathExpansion, expand_paths
from unweave.paths.weights import virtual_weight

__all__ = [
    "FROZEN",
    "Composition",
    "OVCircuit",
    "PathEffect",
    "PathExpansion",
    "QKCircuit",
    "composition",
    "direct_effect",
    "expand_paths",
    "freeze",
    "ov_circuit",
    "path_effect",
    "qk_circuit",
    "virtual_weight",
]
