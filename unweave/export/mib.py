"""Submissions to MIB's circuit track: one folder per task and model, in EAP's graph JSON.

The rules checked here: at least two tasks and two models; in each folder either one file of importances, that is
scores of all edges, or nine circuits of at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50% of the edges. The server
refuses without a word, so check before sending.

Source: Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Bool
from torch import Tensor

from unweave.errors import CorruptFileError, InputError, StorageError, UnknownNameError
from unweave.export.eap import EapFile, read_eap_json, to_eap_json
from unweave.export.grid import Grid, Scores
from unweave.files import write_folder
from unweave.graph import Graph

__all__ = ["MODELS", "PERCENTAGES", "TASKS", "MibEntry", "check_mib", "to_mib"]

TASKS = ("ioi", "mcqa", "arithmetic-addition", "arithmetic-subtraction", "arc-easy", "arc-challenge")
MODELS = ("gpt2", "qwen2.5", "gemma2", "llama3", "interpbench")
PERCENTAGES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True, eq=False)
class MibEntry:
    """What is submitted for one task and model: the scores of all edges, or nine circuits by their percentage.

    Attributes:
        graph: the model; not a circuit of it.
        circuits: for each of :data:`PERCENTAGES`, the edges in the circuit ``[ports writers]``.
    """

    graph: Graph
    scores: Scores | None = None
    circuits: Mapping[float, Bool[Tensor, "ports writers"]] = field(default_factory=dict)


def to_mib(folder: str | Path, entries: Mapping[str, MibEntry]) -> Path:
    """Write a submission; all of it or nothing, after :func:`check_mib`.

    Args:
        folder: made; it must not exist, or be empty.
        entries: by ``TASK_MODEL``, such as "ioi_gpt2".

    Returns:
        The folder.

    Raises:
        InputError: an entry has neither scores nor circuits, or both, or the submission breaks a rule.
        StorageError: the folder is not empty, or cannot be written.

    Example:
        >>> import tempfile, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> entry = MibEntry(graph, scores=graph.edge_matrix.float())
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = to_mib(place + "/ours", {"ioi_gpt2": entry, "mcqa_qwen2.5": entry})
        ...     check_mib(folder)
        {'ioi_gpt2': 'importances', 'mcqa_qwen2.5': 'importances'}
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} exists; choose another name")
    for name, entry in entries.items():
        _split_name(name)
        if (entry.scores is None) == (not entry.circuits):
            raise InputError(f"{name} needs either scores or circuits, one of the two")
        if entry.circuits and sorted(entry.circuits) != list(PERCENTAGES):
            raise InputError(f"{name}: circuits are needed at {PERCENTAGES} %, got {sorted(entry.circuits)}")

    def write(temporary: Path) -> None:
        for name, entry in entries.items():
            if entry.scores is not None:
                to_eap_json(entry.graph, temporary / name / "importances.json", entry.scores)
            for percentage, kept in entry.circuits.items():
                to_eap_json(entry.graph, temporary / name / f"{percentage:g}.json", in_graph=kept)
        try:
            check_mib(temporary)
        except CorruptFileError as error:
            # what we wrote ourselves: the entries are at fault, and the temporary folder means nothing to a reader
            raise InputError(str(error).replace(f"{temporary}/", "")) from error

    write_folder(folder, write)
    return folder


def check_mib(folder: str | Path) -> dict[str, str]:
    """Hold a submission against the rules.

    Returns:
        For each task and model, "importances" or "circuits".

    Raises:
        StorageError: there is no such folder.
        CorruptFileError: a rule is broken; says which and where.

    Exact?
        The rules as published; the server may have more. Node and neuron scores and ``.pt`` files, which it
        takes too, are not checked here and refused.

    Example:
        See :func:`to_mib`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}")
    found, grids = {}, dict[str, Grid]()
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or place.name.startswith("."):
            continue  # a README, or git's own folder
        try:
            _, model = _split_name(place.name)
        except InputError as error:
            raise CorruptFileError(f"{place}: {error}") from error
        found[place.name], grid = _check_entry(place)
        if grids.setdefault(model, grid) != grid:
            raise CorruptFileError(f"{place} is of {grid}, but another folder of {model} is of {grids[model]}")
    for what, side in (("tasks", 0), ("models", 1)):
        names = sorted({_split_name(name)[side] for name in found})
        if len(names) < 2:
            raise CorruptFileError(f"{folder}: at least two {what} are needed, got {', '.join(names) or 'none'}")
    return found


def _split_name(name: str) -> tuple[str, str]:
    task, _, model = name.rpartition("_")
    if task not in TASKS:
        raise UnknownNameError("MIB task (in TASK_MODEL)", task or name, TASKS)
    if model not in MODELS:
        raise UnknownNameError("MIB model (in TASK_MODEL)", model, MODELS)
    return task, model


def _check_entry(place: Path) -> tuple[str, Grid]:
    paths = sorted(place.iterdir())
    odd = [path.name for path in paths if path.suffix != ".json" or not path.is_file()]
    if odd:
        raise CorruptFileError(f"{place}: {odd[0]!r} is not a .json file")
    if len(paths) not in (1, len(PERCENTAGES)):
        raise CorruptFileError(f"{place} holds {len(paths)} files: one of scores, or nine circuits, are needed")
    files = [read_eap_json(path) for path in paths]
    if any(file.grid != files[0].grid for file in files):
        raise CorruptFileError(f"{place}: its files are of models of different sizes")
    if len(files) == 1:
        _check_importances(paths[0], files[0])
        return "importances", files[0].grid
    _check_circuits(place, files)
    return "circuits", files[0].grid


def _check_importances(path: Path, file: EapFile) -> None:
    scores = file.scores[file.grid.real]
    if len(scores) and bool((scores == scores[0]).all()):
        raise CorruptFileError(f"{path}: all edges have the score {float(scores[0]):g}; that ranks nothing")


def _check_circuits(place: Path, files: Sequence[EapFile]) -> None:
    """The k-th smallest circuit must fit the k-th percentage, whatever the files are called."""
    total = files[0].grid.n_edges
    for percentage, edges in zip(PERCENTAGES, sorted(int(file.in_graph.sum()) for file in files), strict=True):
        if edges > percentage / 100 * total:
            got = f"the circuit for {percentage:g}% has {edges} of {total} edges ({100 * edges / total:.3g}%)"
            raise CorruptFileError(f"{place}: {got}")
