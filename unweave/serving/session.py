"""The graphs that are served, and the answers they give: plain data, one question at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import CORRUPTED, Means
from unweave.capture import capture
from unweave.data import Batch, TokenData
from unweave.errors import InputError, UnweaveError
from unweave.execution import run
from unweave.generation import encode_prompt
from unweave.graph import Graph
from unweave.ops import Attention
from unweave.pipeline import token_strings
from unweave.report import ReportData, validate_report_data
from unweave.scope import Scope, divergence
from unweave.serving.question import LIMITS, Question
from unweave.serving.reading import Reading, measure_node, one_text, patches, read_text
from unweave.statistics import collect_means
from unweave.storage import load_graph, load_results

__all__ = ["BusyError", "Served", "Session", "open_graph"]

TOP = 5
EDGES_SHOWN = 24
EXAMPLES = 24
READINGS_KEPT = 4
# the largest table of positions x ports x writers that a text may need
LARGEST_TABLE = 60_000_000
LONGEST_WAIT_S = 60.0


class BusyError(UnweaveError):
    """Another question is being answered and the wait was too long."""


@dataclass(frozen=True, eq=False)
class Served:
    """A graph on the page: what it is called, what is known of it, and what its ablated nodes send.

    Attributes:
        means: None to take the means over each text itself.
    """

    name: str
    graph: Graph
    results: ReportData | None = None
    means: Means | None = None

    def means_on(self, batch: Batch) -> Means:
        """What its ablated nodes send on a text."""
        if self.means is not None:
            return self.means
        return collect_means(self.graph, TokenData(batch.inputs, batch.mask), progress=False)

    def facts(self) -> dict[str, Any]:
        """Its nodes and sizes, as plain data."""
        graph, nodes = self.graph, []
        for stage in graph.stages:
            ports = [port.name for port in stage.ports]
            head = isinstance(stage.core, Attention)
            common = {"kind": stage.kind, "layer": stage.layer, "ports": ports, "head": head}
            nodes += [{"name": name, "writes": stage.write is not None, **common} for name in stage.nodes]
        return {
            "name": self.name,
            "nodes": nodes,
            "n_edges": graph.n_edges,
            "n_parameters": graph.n_parameters,
            "resample": graph.resample,
            "narrow": graph.is_narrow,
            "results": self.results,
        }


def open_graph(source: str | Path, data: TokenData | None = None) -> Served:
    """A graph folder with its results, or a model captured whole.

    Args:
        data: texts over which the means of ablated nodes are taken; None for the means over each text itself.

    Raises:
        StorageError: no such folder or model.
        InputError: the graph reads no tokens.
    """
    folder = Path(source)
    stored = (folder / "graph.json").is_file() or (folder.is_dir() and not (folder / "config.json").is_file())
    graph = load_graph(folder) if stored else capture(source)
    results = _results(folder) if stored else None
    if "d_vocab" not in graph.info:
        raise InputError(f"{source} reads real vectors and no tokens; a text page needs a graph that reads tokens")
    means = collect_means(graph, data, progress=False) if data is not None and len(data) else None
    return Served(folder.resolve().name if folder.is_dir() else str(source), graph, results, means)


def _apart(served: Sequence[Served]) -> Iterator[Served]:
    """The same, with different names."""
    for k, one in enumerate(served):
        twice = any(one.name == other.name for other in served[:k])
        yield dataclasses.replace(one, name=f"{one.name} ({k + 1})") if twice else one


def _results(folder: Path) -> ReportData | None:
    """The results of a folder; None where there are none that a page could show."""
    try:
        return validate_report_data(load_results(folder))
    except InputError:
        return None


class Session:
    """One or two graphs that read the same tokens, and all that a page needs to ask them.

    Raises:
        InputError: the graphs differ in vocabulary.
    """

    def __init__(self, served: Sequence[Served], tokenizer: Any = None, data: TokenData | None = None) -> None:
        sizes = [(s.graph.info["d_vocab"], s.graph.info.get("d_out", s.graph.info["d_vocab"])) for s in served]
        if len(set(sizes)) > 1:
            raise InputError(f"both graphs must read and write the same tokens, got vocabularies {sizes}")
        self.served, self.tokenizer, self.data = tuple(_apart(served)), tokenizer, data
        self.strings = token_strings(tokenizer, max(sizes[0]))
        self._lock = threading.Lock()
        self._reading = lru_cache(READINGS_KEPT)(self._read)

    @property
    def most_tokens(self) -> int:
        """The longest text that every graph can read, and that fits in memory."""
        table = max(len(s.graph.ports) * len(s.graph.writers) for s in self.served)
        contexts = [s.graph.info.get("n_ctx", LIMITS["tokens"]) for s in self.served]
        return max(1, min(LIMITS["tokens"], *contexts, LARGEST_TABLE // max(table, 1)))

    def facts(self) -> dict[str, Any]:
        """The graphs and the limits, for the page."""
        limits = {**LIMITS, "tokens": self.most_tokens}
        means = "the text itself" if self.data is None else f"{len(self.data)} example texts"
        graphs = [s.facts() for s in self.served]
        return {"graphs": graphs, "limits": limits, "tokenizer": self.tokenizer is not None, "means_over": means}

    def texts(self) -> list[str]:
        """Example texts, in the form that the page takes: of the data, or where the graph was worst."""
        if self.data is not None:
            few = range(min(EXAMPLES, len(self.data)))
            rows = [self.data.tokens[i][self.data.mask[i]][: self.most_tokens].tolist() for i in few]
            if self.tokenizer is None:
                return [" ".join(map(str, row)) for row in rows]
            return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        results = self.served[0].results
        if results is None or self.tokenizer is None:
            return []
        worst = [row["context"] + row["token"] for row in results["worst_tokens"][:EXAMPLES]]
        return [text for text in dict.fromkeys(worst) if text.strip()]

    def answer(self, question: Question) -> dict[str, Any]:
        """Run a text through all graphs, with and without the ablations.

        Raises:
            InputError: a text too long or with unknown tokens, or a part that cannot be ablated.
            UnknownNameError: a node or edge that the first graph does not have.
            BusyError: the wait for another answer was too long.

        Cost:
            One forward and eight backward passes per graph on a new text; forward passes only for new ablations.
        """
        ids, other = self._ids(question.text), None
        if question.counterfactual is not None:
            other = self._ids(question.counterfactual)
        batch = one_text(ids, other)
        if question.positions is not None and max(question.positions) >= len(ids):
            raise InputError(f"position {max(question.positions)} is outside the text of {len(ids)} tokens")
        with self._one_at_a_time():
            return self._answer(question, ids, other, batch)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=LONGEST_WAIT_S):
            raise BusyError("another text is still being run; try again in a minute")
        try:
            yield
        finally:
            self._lock.release()

    def _ids(self, text: str | tuple[int, ...]) -> tuple[int, ...]:
        ids = text if isinstance(text, tuple) else tuple(encode_prompt(text, self.tokenizer)[0].tolist())
        if len(ids) > self.most_tokens:
            raise InputError(f"the text has {len(ids)} tokens, at most {self.most_tokens} are allowed here")
        vocabulary = self.served[0].graph.info["d_vocab"]
        if max(ids) >= vocabulary:
            raise InputError(f"token id {max(ids)} is outside the vocabulary of {vocabulary}")
        return tuple(ids)

    def _read(
        self, which: int, ids: tuple[int, ...], other: tuple[int, ...] | None, positions: tuple[int, ...] | None
    ) -> tuple[Means, Tensor, Reading | None]:
        """(means, logits, use) of a graph on a text; no use where edges are narrow."""
        served, batch = self.served[which], one_text(ids, other)
        means = served.means_on(batch)
        if served.graph.is_narrow:
            with torch.no_grad():
                out = run(served.graph, batch.inputs, counterfactual=batch.labels.get(CORRUPTED))
            return means, out.logits[0], None
        reading = read_text(served.graph, batch, means, Scope(positions or "all"))
        return means, reading.logits, reading

    def _answer(
        self, question: Question, ids: tuple[int, ...], other: tuple[int, ...] | None, batch: Batch
    ) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        logits: list[Tensor] = []
        graphs = []
        for which, served in enumerate(self.served):
            means, clean, reading = self._reading(which, ids, other, question.positions)
            clean_at = len(runs)
            runs.append({"graph": which, "ablated": [], "against": None if which == 0 else 0})
            logits.append(clean)
            asked = _Asked(served, batch, means, question, first=which == 0)
            changed, pattern = asked.ablated()
            if changed is not None:
                runs.append({"graph": which, "ablated": list(asked.names), "against": clean_at})
                logits.append(changed)
            graphs.append({**_use(served.graph, reading, question.node), **asked.node_facts(pattern)})
        for described, output in zip(runs, logits, strict=True):
            against = described["against"]
            described["kl_nats"] = None if against is None else _numbers(_kl(logits[against], output, batch))
        tokens = [{"id": i, "text": self.strings[i]} for i in ids]
        return {"tokens": tokens, "runs": runs, "predictions": self._predictions(logits), "graphs": graphs}

    def _predictions(self, logits: Sequence[Float[Tensor, "pos d_out"]]) -> list[list[dict[str, Any]]]:
        """For every token, what any of the runs puts among the first few, with its probability in each run."""
        p = torch.stack([torch.softmax(x.float(), -1) for x in logits]).cpu()
        best = p.topk(min(TOP, p.shape[-1]), dim=-1).indices
        out = []
        for t in range(p.shape[1]):
            ids = best[:, t].flatten().unique()
            ids = ids[p[:, t, ids].amax(0).argsort(descending=True)]
            rows = zip(ids.tolist(), p[:, t, ids].T, strict=True)
            out.append([{"id": i, "text": self.strings[i], "p": _numbers(row)} for i, row in rows])
        return out


@dataclass(frozen=True)
class _Asked:
    """What a question asks of one graph; of the second one only what it has."""

    served: Served
    batch: Batch
    means: Means
    question: Question
    first: bool

    @property
    def names(self) -> tuple[str, ...]:
        """What is ablated in this graph."""
        if self.first:
            return self.question.ablate
        graph = self.served.graph
        present = {*graph.writers, *map(str, graph.edges)} - set(map(str, graph.dimensions))
        return tuple(name for name in self.question.ablate if name in present)

    @property
    def node(self) -> str | None:
        """The node looked at, if this graph has it."""
        name = self.question.node
        if name is None or (name not in self.served.graph.where and not self.first):
            return None
        self.served.graph.find(name)
        return name

    @torch.no_grad()
    def ablated(self) -> tuple[Tensor | None, Tensor | None]:
        """(logits with the ablations, the node's attention pattern); None where there is nothing to tell."""
        graph, node, names = self.served.graph, self.node, self.names
        head = node is not None and isinstance(graph.find(node)[0].core, Attention)
        if not names and not head:
            return None, None
        patch = patches(graph, names, self.means, self.batch.inputs.shape[1])
        record = [f"{node}.pattern"] if head else []
        other = self.batch.labels.get(CORRUPTED)
        out = run(graph, self.batch.inputs, record=record, patch=patch, counterfactual=other)
        pattern = out.values[record[0]][0] if record else None
        return (out.logits[0] if names else None), pattern

    def node_facts(self, pattern: Tensor | None) -> dict[str, Any]:
        """What is known of the node looked at alone."""
        measured = None
        if self.question.measure and self.node is not None and self.served.graph.find(self.node)[0].write is not None:
            scope = Scope(self.question.positions or "all")
            nats = measure_node(self.served.graph, self.batch, self.node, self.means, scope)
            measured = _numbers(nats)
        return {"pattern": None if pattern is None else [_numbers(row) for row in pattern], "measured": measured}


def _use(graph: Graph, reading: Reading | None, node: str | None) -> dict[str, Any]:
    """The use of every node, and of the strongest edges (of one node, if one is looked at)."""
    if reading is None:
        return {"use": None, "edges": None}
    totals = reading.edges.sum(0)
    if node in graph.where:
        mine = torch.zeros_like(totals, dtype=torch.bool)
        mine[[j for j, port in enumerate(graph.ports) if port.rpartition(".")[0] == node]] = True
        if node in graph.writers:
            mine[:, graph.writers.index(node)] = True
        totals = totals * mine
    best = totals.flatten().topk(min(EDGES_SHOWN, totals.numel()))
    rows = [divmod(i, totals.shape[1]) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True) if v]
    edges = [
        {"src": graph.writers[i], "port": graph.ports[j], "use": _numbers(reading.edges[:, j, i])} for j, i in rows
    ]
    use: Mapping[str, Any] = dict(zip(graph.writers, map(_numbers, reading.nodes.T), strict=True))
    return {"use": use, "edges": edges}


def _kl(
    reference: Float[Tensor, "pos d_out"], logits: Float[Tensor, "pos d_out"], batch: Batch
) -> Float[Tensor, " pos"]:
    return divergence(Scope(), reference[None], logits[None].to(reference), batch)[0]


def _numbers(values: Float[Tensor, " n"]) -> list[float | None]:
    """Numbers as short as a page needs them; None for what is no number."""
    return [float(f"{v:.4g}") if v == v and abs(v) != float("inf") else None for v in values.tolist()]
