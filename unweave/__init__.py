"""unweave decompiles a trained neural network into a graph that a person can read, run and falsify.

The public names are imported when they are first used, so that ``import unweave`` and ``unweave --help``
are quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unweave.capture import capture, load_model, load_tokenizer
    from unweave.circuits import Circuit, find_circuit, prove
    from unweave.compression import channel_moments, compress, refine_factors
    from unweave.data import TokenData, load_data
    from unweave.dissection import Dissected, dissect
    from unweave.errors import UnweaveError
    from unweave.evaluation import Faithfulness, evaluate
    from unweave.execution import Run, run
    from unweave.graph import Edge, Graph
    from unweave.heads import score_heads
    from unweave.modules import Modules, find_modules
    from unweave.pipeline import Decompiled, decompile
    from unweave.report import write_report
    from unweave.scope import Quotient, Scope
    from unweave.scoring import EdgeScores, score_edges
    from unweave.statistics import collect_means
    from unweave.storage import load_graph, save_graph
    from unweave.subspaces import node_subspaces
    from unweave.tasks import Task, check_task, make_task

__version__ = "0.1.0"

_HOME = {
    "Circuit": "circuits",
    "Decompiled": "pipeline",
    "Dissected": "dissection",
    "Edge": "graph",
    "EdgeScores": "scoring",
    "Faithfulness": "evaluation",
    "Graph": "graph",
    "Modules": "modules",
    "Quotient": "scope",
    "Run": "execution",
    "Scope": "scope",
    "Task": "tasks",
    "TokenData": "data",
    "UnweaveError": "errors",
    "capture": "capture",
    "channel_moments": "compression",
    "check_task": "tasks",
    "collect_means": "statistics",
    "compress": "compression",
    "decompile": "pipeline",
    "dissect": "dissection",
    "evaluate": "evaluation",
    "find_circuit": "circuits",
    "find_modules": "modules",
    "load_data": "data",
    "load_graph": "storage",
    "load_model": "capture",
    "load_tokenizer": "capture",
    "make_task": "tasks",
    "node_subspaces": "subspaces",
    "prove": "circuits",
    "refine_factors": "compression",
    "run": "execution",
    "save_graph": "storage",
    "score_edges": "scoring",
    "score_heads": "heads",
    "write_report": "report",
}

__all__ = [
    "Circuit",
    "Decompiled",
    "Dissected",
    "Edge",
    "EdgeScores",
    "Faithfulness",
    "Graph",
    "Modules",
    "Quotient",
    "Run",
    "Scope",
    "Task",
    "TokenData",
    "UnweaveError",
    "__version__",
    "capture",
    "channel_moments",
    "check_task",
    "collect_means",
    "compress",
    "decompile",
    "dissect",
    "evaluate",
    "find_circuit",
    "find_modules",
    "load_data",
    "load_graph",
    "load_model",
    "load_tokenizer",
    "make_task",
    "node_subspaces",
    "prove",
    "refine_factors",
    "run",
    "save_graph",
    "score_edges",
    "score_heads",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unweave' has no attribute {name!r}")
    value = getattr(import_module(f"unweave.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This module's own type: a name that is both public and a file means the public one.

    Python sets ``unweave.capture`` to the submodule once that file is imported; without this the function of
    the same name would be gone after the first call of any other.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
