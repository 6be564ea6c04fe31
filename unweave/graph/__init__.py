"""The central type: an immutable graph of channels that read from, and add to, a shared state; and its verbs."""

from unweave.graph.graph import CHANNEL_KINDS, Ablation, Graph
from unweave.graph.parts import Edge, Port, Read, Stage, Wires
from unweave.graph.unrolling import at_positions

__all__ = ["CHANNEL_KINDS", "Ablation", "Edge", "Graph", "Port", "Read", "Stage", "Wires", "at_positions"]
