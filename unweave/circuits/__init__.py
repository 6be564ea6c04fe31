"""Circuits: the part of a network that does one thing, exactly enough to trust, and the proof of it."""

from unweave.circuits.circuit import Circuit, connected
from unweave.circuits.curve import SHARES, FaithfulnessCurve, faithfulness_curve
from unweave.circuits.dimensions import narrow_circuit
from unweave.circuits.proof import Proof, prove
from unweave.circuits.search import find_circuit

__all__ = [
    "SHARES",
    "Circuit",
    "FaithfulnessCurve",
    "Proof",
    "connected",
    "faithfulness_curve",
    "find_circuit",
    "narrow_circuit",
    "prove",
]
