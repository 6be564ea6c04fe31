"""One table that says how far a graph is from its network: by data set, by kind of token, next to its baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from unweave.ablation import CORRUPTED, Means, Replacement, pair_at_random
from unweave.capture import capture
from unweave.circuits import Circuit
from unweave.circuits.proof import random_edges
from unweave.compression import ChannelMoments, channel_moments
from unweave.compression import baselines as published
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.evaluation import ALL, Faithfulness, evaluate_parts
from unweave.execution import uncut
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.statistics import collect_means

__all__ = ["CANDIDATE", "RANDOM", "TokenFilter", "Validation", "mark_tokens", "validate"]

# a label of the data, token ids, or a function of a batch
TokenFilter: TypeAlias = str | set[int] | frozenset[int] | Callable[[Batch], Tensor]

CANDIDATE = "candidate"
RANDOM = "random"
N_RANDOM = 5
# a baseline may be this much larger than the candidate: ranks are whole numbers
SLACK = 1.02

PLAIN: Mapping[str, Callable[[Graph, float], Graph]] = {
    "plain SVD": published.plain_svd,
    "magnitude": published.magnitude,
}
INFORMED: Mapping[str, Callable[[Graph, float, Mapping[int, ChannelMoments]], Graph]] = {
    "activation SVD": published.activation_svd,
    "Wanda": published.wanda,
    "SparseGPT-like": published.sparse_regression,
}


@dataclass(frozen=True, eq=False)
class Validation:
    """How far a graph and its baselines are from the network.

    Attributes:
        rows: data set -> type ("all" first) -> graph ("candidate", "original", "every channel at its mean", baselines)
            -> :class:`Faithfulness`; types without a token in a data set are left out.
        left_out: baseline -> why there is none of this size.
    """

    rows: Mapping[str, Mapping[str, Mapping[str, Faithfulness]]]
    left_out: Mapping[str, str]

    def table(self) -> list[dict[str, Any]]:
        """Plain rows, one per data set, type and graph, with the columns of :meth:`Faithfulness.table`."""
        return [
            {"data": data, "type": part, "graph": graph, **row.table()[0]}
            for data, parts in self.rows.items()
            for part, graphs in parts.items()
            for graph, row in graphs.items()
        ]

    def worst(self, decode: Callable[[list[int]], str], n: int = 10, graph: str = CANDIDATE) -> list[dict[str, Any]]:
        """The tokens of each data set where a graph is furthest from the network, as texts.

        Args:
            decode: what turns ids into text (a tokenizer's ``decode``).

        Returns:
            Plain rows: data, nats, sequence, position, text (up to that token), and what either says next.

        Raises:
            UnknownNameError: no such graph.
        """
        out = []
        for data, parts in self.rows.items():
            if graph not in parts[ALL]:
                raise UnknownNameError("validated graph", graph, parts[ALL])
            for nats, sequence, position, context, expected, said in parts[ALL][graph].worst[:n]:
                where = {"data": data, "nats": nats, "sequence": sequence, "position": position}
                texts = {"text": list(context), "network": [expected], "graph": [said]}
                out.append(where | {name: decode(ids) for name, ids in texts.items()})
        return out

    def beats(self, data: str, baseline: str, part: str = ALL) -> bool:
        """Whether the candidate's interval of the divergence is below a baseline's.

        Raises:
            UnknownNameError: no such data set, type or graph.
        """
        for what, name, known in (("data set", data, self.rows), ("type", part, self.rows.get(data, {}))):
            if name not in known:
                raise UnknownNameError(what, name, known)
        graphs = self.rows[data][part]
        if baseline not in graphs:
            raise UnknownNameError("validated graph", baseline, graphs)
        return graphs[CANDIDATE].kl_nats.high < graphs[baseline].kl_nats.low


def mark_tokens(name: str, chosen: TokenFilter) -> Callable[[Batch], Bool[Tensor, "batch pos"]]:
    """A function of a batch that marks the positions which a filter chooses.

    Args:
        chosen: a boolean label of the data or a function of a batch, each ``[batch]`` or ``[batch pos]``; or a set of
            token ids.

    Example:
        >>> import torch
        >>> from unweave.data import from_tensor
        >>> batch = next(from_tensor(torch.tensor([[3, 5, 3]])).batches())
        >>> mark_tokens("threes", {3})(batch).tolist()
        [[True, False, True]]
    """

    def marks(batch: Batch) -> Tensor:
        if isinstance(chosen, str):
            if chosen not in batch.labels:
                raise UnknownNameError("label", chosen, batch.labels or ["(the data has no labels)"])
            label = batch.labels[chosen]
            # a batch is as wide as its longest sequence, a label as wide as the data set's
            return label[:, : batch.mask.shape[1]] if label.ndim == 2 else label
        if isinstance(chosen, (set, frozenset)):
            if batch.inputs.is_floating_point():
                raise InputError(f"type {name!r} is a set of token ids, and the inputs are reals; give a function")
            return torch.isin(batch.inputs, torch.tensor(sorted(chosen), dtype=torch.long))
        return chosen(batch)

    def mark(batch: Batch) -> Tensor:
        got, shape = marks(batch), tuple(batch.mask.shape)
        if not isinstance(got, Tensor) or tuple(got.shape) not in (shape, shape[:1]):
            what = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ShapeError(f"type {name!r} must mark {shape[:1]} or {shape}, got {what}")
        return (got[:, None] if got.ndim == 1 else got).bool().expand(shape)

    return mark


def validate(
    candidate: Graph | Circuit,
    original: Graph | nn.Module | str | None,
    data: TokenData | Mapping[str, TokenData],
    *,
    scope: Scope | None = None,
    types: Mapping[str, TokenFilter] | None = None,
    baselines: Iterable[str] | None = None,
    calibration: TokenData | None = None,
    batch_size: int = 16,
    n_worst: int = 20,
    seed: int = 0,
    progress: bool | None = None,
) -> Validation:
    """How far a circuit or a compressed graph is from its network, on several data sets, next to its baselines.

    Args:
        candidate: what is validated.
        original: the network, as a graph or as anything :func:`unweave.capture` takes; None for a circuit's own.
        data: held-out sequences, or several sets of them by name (in and out of distribution). A graph whose cut edges
            hear another input gets the data's partners (label "corrupted"), or random ones where there are none.
        scope: the signal; a circuit's own by default.
        types: kinds of tokens that get rows of their own, within the scope: see :func:`mark_tokens`.
        baselines: for a circuit "random": 5 random circuits of as many edges. For a compressed graph, names of
            ``unweave.compression.baselines``, made at the same number of numbers: "plain SVD" and "magnitude", and with
            ``calibration`` "activation SVD", "Wanda", "SparseGPT-like". By default, those that need
            nothing more.
        calibration: sequences that candidates may know: for means and for the baselines that need activations. Means
            are of the first data set where it is missing, and a circuit's own where it has them.
        n_worst: how many of the worst tokens to keep.

    Returns:
        :class:`Validation`.

    Raises:
        InputError: a candidate of another network, no data, unknown baselines or baselines that need calibration data.
        EmptyDataError: the scope selects no position of a data set, or a type none in any.
        UnknownNameError, ShapeError: unusable types.

    Cost:
        One pass over each data set with one forward pass per graph, and one pass for means; memory flat.

    Exact?
        Means are; quantiles are read off a histogram whose bins are 1.2% wide. Intervals are 95%, over sequences.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=32)
        >>> small = unweave.compress(graph, data, size=0.5)
        >>> report = validate(small, graph, data, types={"answered": "answered"})
        >>> report.beats("data", "plain SVD")
        True
    """
    whole, graph = _graphs(candidate, original)
    sets = {"data": data} if isinstance(data, TokenData) else dict(data)
    if not sets:
        raise InputError("no data set was given: pass sequences to validate on")
    if scope is None and isinstance(candidate, Circuit):
        scope = candidate.scope
    known = calibration or next(iter(sets.values()))
    means = _means(candidate, whole, known, progress)
    rivals, left_out = _baselines(candidate, graph, whole, baselines, calibration, known, seed)
    marks = {name: mark_tokens(name, chosen) for name, chosen in (types or {}).items()}
    options: dict[str, Any] = {"batch_size": batch_size, "n_worst": n_worst, "seed": seed, "progress": progress}
    rows = {}
    for name, given in sets.items():
        paired = _paired(candidate, given, seed)
        every = {CANDIDATE: graph, **rivals}
        rows[name] = evaluate_parts(every, whole, paired, scope, marks, means=means, **options)
    empty = [name for name in marks if not any(name in parts for parts in rows.values())]
    if empty:
        raise EmptyDataError(f"type {empty[0]!r} has no token of the scope in any data set; leave it out or widen it")
    return Validation(rows, left_out)


def _graphs(candidate: Graph | Circuit, original: Graph | nn.Module | str | None) -> tuple[Graph, Graph]:
    """(the network, the candidate) as graphs."""
    graph = candidate.graph if isinstance(candidate, Circuit) else candidate
    if original is None:
        if not isinstance(candidate, Circuit):
            raise InputError("say which network the graph is compared with: original=...")
        return candidate.original, graph
    whole = original if isinstance(original, Graph) else capture(original)
    for fact in ("d_vocab", "d_out"):
        if whole.info.get(fact) != graph.info.get(fact):
            raise InputError(
                f"the candidate is of another network: its {fact} is {graph.info.get(fact)}, "
                f"the original's {whole.info.get(fact)}"
            )
    return whole, graph


def _paired(candidate: Graph | Circuit, data: TokenData, seed: int) -> TokenData:
    """The data with the partners that cut edges hear, where they hear another input."""
    if isinstance(candidate, Circuit):
        return candidate.instead.paired(data, seed)
    return pair_at_random(data, seed) if candidate.resample and CORRUPTED not in data.labels else data


def _means(candidate: Graph | Circuit, whole: Graph, data: TokenData, progress: bool | None) -> Means:
    """What channels write on average: the floor of the loss recovered, and what random circuits' edges carry."""
    if isinstance(candidate, Circuit) and candidate.instead.kind.startswith("mean") and candidate.instead.means:
        return candidate.instead.means
    return collect_means(whole, data, progress=progress)


def _baselines(
    candidate: Graph | Circuit,
    graph: Graph,
    whole: Graph,
    wanted: Iterable[str] | None,
    calibration: TokenData | None,
    known: TokenData,
    seed: int,
) -> tuple[dict[str, Graph], dict[str, str]]:
    """(graphs as large as the candidate, why some cannot be)."""
    size = graph.n_channel_parameters / max(whole.n_channel_parameters, 1)
    smaller = size < 1
    if wanted is None:
        wanted = (*((RANDOM,) if graph.is_cut else ()), *(PLAIN if smaller else ()))
    names = list(wanted)
    unknown = [name for name in names if name not in (RANDOM, *PLAIN, *INFORMED)]
    if unknown:
        raise UnknownNameError("baseline", unknown[0], [RANDOM, *PLAIN, *INFORMED])
    made = _random_circuits(candidate, graph, known, seed) if RANDOM in names else {}
    compressors = [name for name in names if name != RANDOM]
    if compressors and not smaller:
        raise InputError(f"baseline {compressors[0]!r} is for graphs that store fewer numbers; this one stores as many")
    small, left_out = _compressed(whole, size, compressors, calibration, seed)
    return made | small, left_out


def _compressed(
    whole: Graph, size: float, names: Iterable[str], calibration: TokenData | None, seed: int
) -> tuple[dict[str, Graph], dict[str, str]]:
    """(the network compressed by what others do, why some cannot)."""
    made: dict[str, Graph] = {}
    left_out: dict[str, str] = {}
    moments: Mapping[int, ChannelMoments] | None = None
    for name in names:
        if name in INFORMED and calibration is None:
            raise InputError(f"baseline {name!r} needs activations: pass calibration=...")
        if name in INFORMED and calibration is not None and moments is None:
            moments = channel_moments(whole, calibration, Scope(), seed=seed)
        try:
            small = PLAIN[name](whole, size) if name in PLAIN else INFORMED[name](whole, size, moments or {})
        except InputError as error:
            left_out[name] = str(error)
            continue
        share = small.n_channel_parameters / whole.n_channel_parameters
        if share > SLACK * size:
            left_out[name] = f"the smallest that it makes has {share:.1%} of the numbers, the candidate {size:.1%}"
        else:
            made[name] = small
    return made, left_out


def _random_circuits(candidate: Graph | Circuit, graph: Graph, known: TokenData, seed: int) -> dict[str, Graph]:
    """Random circuits of as many edges, between the same nodes and with the same ablation."""
    if not graph.is_cut:
        raise InputError("baseline 'random' is for circuits, and this graph has every edge")
    # not the network itself: a circuit may divide its nodes, by position or by part
    every = uncut(graph)
    if isinstance(candidate, Circuit):
        instead = candidate.instead
    elif graph.resample:
        instead = Replacement("resample")
    else:
        instead = Replacement("mean", collect_means(every, known, progress=False))
    generator = torch.Generator().manual_seed(seed)
    return {f"{RANDOM} {i}": instead.cut(every, random_edges(every, graph.n_edges, generator)) for i in range(N_RANDOM)}
