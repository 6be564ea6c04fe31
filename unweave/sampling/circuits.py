"""Circuits nobody asked for: the words, the serving part and the proof of every kind of data that was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unweave.ablation import Means
from unweave.circuits import Circuit, Proof, find_circuit, prove
from unweave.data import TokenData
from unweave.drivers.describing import describe_values
from unweave.drivers.descriptions import Description
from unweave.errors import EmptyDataError, InputError
from unweave.graph import Graph
from unweave.sampling.finding import find_types, place_types
from unweave.sampling.query import Usage
from unweave.sampling.types import DataType, DataTypes
from unweave.sampling.usage import record_usage
from unweave.scope import Scope
from unweave.statistics import collect_means

__all__ = ["TypeCircuit", "TypeSurvey", "circuits_of_types", "survey_types"]


@dataclass(frozen=True, eq=False)
class TypeCircuit:
    """What is known of one found kind of data.

    Attributes:
        kind: the kind, on the data that it was found on.
        held_out: the same on held-out data.
        words: which tokens are of it, in words, scored on held-out texts: ``label`` is None where no rule beats the
            same search on shifted marks.
        circuit: the part of the graph that serves its tokens.
        proof: on held-out data.
    """

    kind: DataType
    held_out: DataType
    words: Description
    circuit: Circuit
    proof: Proof

    def row(self) -> dict[str, Any]:
        """One plain row: type, words and their score, sizes, and what the proof says."""
        return {
            "type": self.kind.name,
            "tokens": int(self.kind.tokens.sum()),
            "tokens_held_out": int(self.held_out.tokens.sum()),
            "agreement": self.kind.agreement,
            "words": self.words.text,
            "labelled": self.words.label is not None,
            "words_r2": self.words.score,
            "words_auroc": self.words.auroc,
            "parts": self.kind.top(5),
            "n_edges": self.circuit.n_edges,
            "edges": [str(edge) for edge in self.circuit.edges],
            "faithfulness_found": self.circuit.faithfulness,
            "proof": self.proof.table(),
        }


class TypeSurvey(NamedTuple):
    """What :func:`survey_types` found.

    Attributes:
        types: the kinds, marked on ``data``.
        data: the texts that they were found on.
        circuits: see :func:`circuits_of_types`.
    """

    types: DataTypes
    data: TokenData
    circuits: tuple[TypeCircuit, ...]


def circuits_of_types(
    graph: Graph,
    types: DataTypes,
    data: TokenData,
    usage_held_out: Usage,
    held_out: TokenData,
    scope: Scope | None = None,
    *,
    faithfulness: float = 0.8,
    means: Means | None = None,
    token_strings: list[str] | None = None,
    most_sequences: int = 32,
    n_random: int = 20,
    n_subsets: int = 10,
    max_trials: int = 400,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[TypeCircuit, ...]:
    """For every found kind of data: words, its own circuit, and a proof on held-out data.

    A kind's scope is the outputs at its tokens. On held-out data these are the tokens whose own usage is of the kind;
    neither factors, words nor circuits have seen them.

    Args:
        types: of :func:`unweave.sampling.find_types`, on usage of ``data``.
        data: the texts they were found on; circuits are searched on those of their texts that hold the kind.
        usage_held_out: usage of the held-out texts, recorded with the same settings.
        held_out: other texts.
        scope: that the usage was recorded with.
        faithfulness: that circuits have to reach on ``data``, see :func:`unweave.find_circuit`.
        means: what ablated edges carry; of all of ``data`` when missing.
        token_strings: for words that speak of strings.
        most_sequences: texts with the kind, drawn at random, that a circuit is searched, and proved, on.
        n_random, n_subsets: see :func:`unweave.prove`.
        max_trials: see :func:`unweave.find_circuit`.

    Returns:
        One :class:`TypeCircuit` per type, in their order; none where nothing was found. A type of which the held-out
        texts hold no token of the scope is left out.

    Raises:
        InputError: labelled types, or usage of other parts.
        ShapeError: usage of other data.
        EmptyDataError: too few texts for words.

    Cost:
        Per type one search and one proof, on at most ``most_sequences`` texts each.

    Exact?
        Faithfulness is measured; that the tokens are a kind rests on usage, which is of second order and noisy.

    Example:
        >>> import tempfile, unweave
        >>> from unweave.sampling import find_types, record_usage
        >>> graph, scope = unweave.capture("zoo:three_tasks"), unweave.Scope(positions="answered")
        >>> data, held_out = unweave.load_data("zoo:three_tasks", limit=128).split(held_out=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first, other = (
        ...         record_usage(graph, texts, scope, f"{folder}/{n}", level="edge")
        ...         for n, texts in enumerate((data, held_out))
        ...     )
        ...     types = find_types(first, units="sequence", most=4)
        ...     found = circuits_of_types(graph, types, data, other, held_out, scope, n_random=3, n_subsets=2)
        >>> [kind.proof.faithfulness.value > 0.7 for kind in found]
        [True, True, True]
    """
    if not types.types:
        return ()
    if most_sequences < 1:
        raise InputError(f"most_sequences must be at least 1, got {most_sequences}")
    placed = place_types(types, usage_held_out)
    marked, marked_out = types.marked(data, scope), placed.marked(held_out, scope)
    words = _words(types, data, placed, held_out, token_strings, seed)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    if means is None:
        means = collect_means(graph, data, batch_size=batch_size, progress=progress)
    found = []
    for kind, other, said in zip(types.types, placed.types, words, strict=True):
        texts, unseen = _holding(marked, kind, most_sequences, seed), _holding(marked_out, kind, most_sequences, seed)
        if not len(texts) or not len(unseen):
            continue
        budget: dict[str, Any] = {"faithfulness": faithfulness, "means": means, "max_trials": max_trials}
        circuit = find_circuit(graph, texts, kind.scope(scope), **budget, **options)
        if circuit.n_edges == 0:
            raise EmptyDataError(f"{kind.name} needs no edge: with none, its outputs stay within the budget")
        proof = prove(circuit, unseen, n_random=n_random, n_subsets=n_subsets, **options)
        found.append(TypeCircuit(kind, other, said, circuit, proof))
    return tuple(found)


def survey_types(
    graph: Graph,
    data: TokenData,
    folder: str | Path,
    scope: Scope | None = None,
    *,
    units: str = "token",
    relative: bool = False,
    samples: int = 8,
    most: int = 8,
    held_out: float = 0.5,
    max_units: int = 2000,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> TypeSurvey:
    """All of it in one go: usage of edges, types on one part of the texts, circuits, and proofs on the other part.

    Args:
        data: at least some dozen texts; whole documents are held out.
        folder: where usage is kept, in ``found`` and ``held out``; a killed recording goes on.
        units, relative, most, max_units: see :func:`unweave.sampling.find_types`.
        samples: cotangents; few make usage noisy, and fewer types are then told apart.
        held_out: the share of the texts that types and circuits do not see.
        options: of :func:`circuits_of_types`.

    Returns:
        :class:`TypeSurvey`; without types or circuits where usage falls into none.

    Cost:
        Two recordings at level "edge", one factorisation, and per type a search and a proof.
    """
    seen, unseen = data.split(held_out=held_out, seed=seed)
    shared: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    recording: dict[str, Any] = {"level": "edge", "samples": samples, **shared}
    recording["strings"] = options.get("token_strings")
    usage = record_usage(graph, seen, scope, Path(folder) / "found", **recording)
    other = record_usage(graph, unseen, scope, Path(folder) / "held out", **recording)
    finding: dict[str, Any] = {"units": units, "relative": relative, "most": most, "max_units": max_units}
    types = find_types(usage, **finding, seed=seed, progress=progress)
    return TypeSurvey(types, seen, circuits_of_types(graph, types, seen, other, unseen, scope, **options, **shared))


def _holding(marked: TokenData, kind: DataType, most: int, seed: int) -> TokenData:
    """Texts in which a token of the kind counts, at most so many, drawn at random."""
    rows = marked.labels[kind.name].any(1).nonzero()[:, 0]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return marked.select(rows[order[:most]].sort().values)


def _words(
    types: DataTypes, data: TokenData, placed: DataTypes, held_out: TokenData, strings: list[str] | None, seed: int
) -> tuple[Description, ...]:
    own, other = ({kind.name: kind.tokens.float() for kind in side.types} for side in (types, placed))
    return describe_values(own, data, other, held_out, token_strings=strings, seed=seed).items
