"""Modules: who talks to whom, through which subspaces, how central the traffic is, and MLPs in groups of neurons."""

from unweave.modules.communication import Communication, communication
from unweave.modules.components import SharedSubspace, SharedSubspaces, shared_subspaces
from unweave.modules.grouping import group_neurons
from unweave.modules.traffic import AgainstNull, Reuse, Traffic, centralisation, reuse

__all__ = [
    "AgainstNull",
    "Communication",
    "Reuse",
    "SharedSubspace",
    "SharedSubspaces",
    "Traffic",
    "centralisation",
    "communication",
    "group_neurons",
    "reuse",
    "shared_subspaces",
]
