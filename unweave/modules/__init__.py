"""Modules: blocks of nodes, what crosses between them, what each does alone, and what may stand in for it."""

from unweave.modules.ablating import ModuleEffects, ablate_modules
from unweave.modules.centrality import AgainstNull, Traffic, centralisation
from unweave.modules.communication import Communication, measure_communication
from unweave.modules.components import SharedSubspace, SharedSubspaces, shared_subspaces
from unweave.modules.found import Modules
from unweave.modules.grouping import group_neurons
from unweave.modules.interfaces import Interface, Interfaces, measure_interfaces
from unweave.modules.nulls import reinitialise, rewire, shuffle_weights
from unweave.modules.participation import Reuse, reuse
from unweave.modules.partition import Partition
from unweave.modules.patching import blocks_of
from unweave.modules.recording import RecordedInterface, record_interface, run_module
from unweave.modules.replacing import Replaced, ReplacementLoss, replace_module, replacement_loss
from unweave.modules.search import find_modules, modules_of
from unweave.modules.standins import ModuleInputs
from unweave.modules.swapping import Swaps, swap_interfaces
from unweave.modules.widths import measured_width, narrowed_loss

__all__ = [
    "AgainstNull",
    "Communication",
    "Interface",
    "Interfaces",
    "ModuleEffects",
    "ModuleInputs",
    "Modules",
    "Partition",
    "RecordedInterface",
    "Replaced",
    "ReplacementLoss",
    "Reuse",
    "SharedSubspace",
    "SharedSubspaces",
    "Swaps",
    "Traffic",
    "ablate_modules",
    "blocks_of",
    "centralisation",
    "measure_communication",
    "find_modules",
    "group_neurons",
    "measure_interfaces",
    "measured_width",
    "modules_of",
    "narrowed_loss",
    "record_interface",
    "reinitialise",
    "replace_module",
    "replacement_loss",
    "reuse",
    "rewire",
    "run_module",
    "shared_subspaces",
    "shuffle_weights",
    "swap_interfaces",
]
