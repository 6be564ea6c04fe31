"""Modules: blocks of nodes, what crosses between them, what each does alone, and what may stand in for it."""

from unweave.modules.checks import ModuleEffects, Swaps, ablate_modules, swap_interfaces
from unweave.modules.interfaces import Interface, Interfaces, measure_interfaces, measured_width, narrowed_loss
from unweave.modules.patching import blocks_of
from unweave.modules.recording import RecordedInterface, record_interface, run_module
from unweave.modules.replacing import Replaced, ReplacementLoss, replace_module, replacement_loss
from unweave.modules.standins import ModuleInputs

__all__ = [
    "Interface",
    "Interfaces",
    "ModuleEffects",
    "ModuleInputs",
    "RecordedInterface",
    "Replaced",
    "ReplacementLoss",
    "Swaps",
    "ablate_modules",
    "blocks_of",
    "measure_interfaces",
    "measured_width",
    "narrowed_loss",
    "record_interface",
    "replace_module",
    "replacement_loss",
    "run_module",
    "swap_interfaces",
]
