"""EAP's picture of a transformer, which its files, MIB's and auto-circuit's share: what writes against what reads.

Sources are ``input``, then per layer the heads ``a{L}.h{H}`` and the MLP ``m{L}``; targets are per layer the q, k and v
of all heads (``a{L}.h{H}<q>``) and the MLP, and at last ``logits``. The picture has no room for anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError
from unweave.graph import Graph, Stage
from unweave.scoring import EdgeScores

__all__ = ["Grid", "Layout", "Scores", "layout_of", "score_matrix"]

Scores = EdgeScores | Float[Tensor, "ports writers"]


@dataclass(frozen=True)
class Grid:
    """All nodes and edges of a transformer of this size.

    Attributes:
        parallel: the MLP of a layer does not hear that layer's heads.
    """

    n_layers: int
    n_heads: int
    d_model: int
    parallel: bool

    @property
    def n_edges(self) -> int:
        """How many edges :attr:`real` has, without making it."""
        before = [1 + layer * (self.n_heads + 1) for layer in range(self.n_layers + 1)]
        own = 0 if self.parallel else self.n_heads
        return sum(n * (3 * self.n_heads + 1) + own for n in before[:-1]) + before[-1]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of what writes."""
        layers = ([*(f"a{i}.h{h}" for h in range(self.n_heads)), f"m{i}"] for i in range(self.n_layers))
        return ("input", *(name for layer in layers for name in layer))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of what reads."""
        layers = (
            [*(f"a{i}.h{h}<{x}>" for x in "qkv" for h in range(self.n_heads)), f"m{i}"] for i in range(self.n_layers)
        )
        return (*(name for layer in layers for name in layer), "logits")

    @cached_property
    def real(self) -> Bool[Tensor, "sources targets"]:
        """Which target comes after which source."""
        heads, layers = self.n_heads, torch.arange(self.n_layers)
        # heads of layer i write at time 2i and read what was written before; its MLP writes at 2i + 1
        written = torch.stack([*(2 * layers,) * heads, 2 * layers + 1], 1).flatten()
        mlp = 2 * layers + (0 if self.parallel else 1)
        read = torch.stack([*(2 * layers,) * (3 * heads), mlp], 1).flatten()
        start, end = torch.tensor([-1]), torch.tensor([2 * self.n_layers])
        return torch.cat([start, written])[:, None] < torch.cat([read, end])

    def name_edges(self, marked: Bool[Tensor, "sources targets"]) -> list[str]:
        """``SRC->DST`` for every marked pair, sources first."""
        return [f"{self.sources[i]}->{self.targets[j]}" for i, j in marked.nonzero().tolist()]


@dataclass(frozen=True)
class Layout:
    """Where the writers and ports of a graph are in the grid; all embeddings are at ``input``."""

    grid: Grid
    source_of: Int[Tensor, " writers"]
    target_of: Int[Tensor, " ports"]

    @property
    def inputs(self) -> list[int]:
        """The writers that are merged into ``input``."""
        return (self.source_of == 0).nonzero()[:, 0].tolist()

    def merge(self, values: Float[Tensor, "ports writers"]) -> Float[Tensor, "sources targets"]:
        """Sums of what falls on the same edge of the grid."""
        n = len(self.grid.targets)
        out = values.new_zeros(len(self.grid.sources) * n)
        place = self.source_of * n + self.target_of[:, None]
        return out.index_add_(0, place.flatten(), values.flatten()).unflatten(0, (-1, n))

    def spread(self, values: Tensor) -> Tensor:
        """The value of each of our edges ``[ports writers]``, from a table ``[sources targets]``."""
        return values[self.source_of, self.target_of[:, None]]


def layout_of(graph: Graph) -> Layout:
    """The place of a graph in the grid.

    Raises:
        InputError: a node that the grid has no place for, such as a part of a refined node.
    """
    heads = [len(stage.nodes) for stage in graph.stages if stage.kind == "attn"]
    if not heads:
        raise InputError(f"EAP's format is for transformers; {graph!r} has no attention heads")
    n_layers, n_heads = 1 + max(stage.layer for stage in graph.stages[:-1]), heads[0]
    if not 0 < n_layers < len(graph.stages):
        raise InputError(f"{graph.nodes[-2]} says it is in layer {n_layers - 1}: there are not that many stages")
    for s, stage in enumerate(graph.stages):
        _check_stage(stage, n_heads, last=s == len(graph.stages) - 1)
    write = graph.stages[0].write
    assert write is not None
    grid = Grid(n_layers, n_heads, write.d_out, _is_parallel(graph))
    source_at = {name: i for i, name in enumerate(grid.sources)}
    target_at = {name: i for i, name in enumerate(grid.targets)}
    sources = [name for stage in graph.stages[:-1] for name in _names(stage)]
    targets = [
        f"{name}<{port.name}>" if stage.kind == "attn" else name
        for stage in graph.stages
        for port in stage.ports
        for name in _names(stage)
    ]
    if len(set(targets)) < len(targets):
        raise InputError("two stages of this graph are the attention, or the MLP, of one layer")
    layout = Layout(grid, torch.tensor([source_at[n] for n in sources]), torch.tensor([target_at[n] for n in targets]))
    _check_edges(graph, layout)
    return layout


def _names(stage: Stage) -> Sequence[str]:
    if stage.kind == "attn":
        return [f"a{stage.layer}.h{h}" for h in range(len(stage.nodes))]
    return {"embed": ["input"], "mlp": [f"m{stage.layer}"]}.get(stage.kind, ["logits"])


def _check_stage(stage: Stage, n_heads: int, last: bool) -> None:
    node, ports = stage.nodes[0], "".join(port.name for port in stage.ports)
    expected = {
        "embed": ((node,), ""),
        "attn": (tuple(f"blocks.{stage.layer}.attn.head.{h}" for h in range(n_heads)), "qkv"),
        "mlp": ((f"blocks.{stage.layer}.mlp",), "in"),
        "unembed": ((node,), "in"),
    }
    fits = stage.kind in expected and (stage.nodes, ports) == expected[stage.kind] and last == (stage.kind == "unembed")
    if not fits or (stage.kind in ("attn", "mlp") and stage.layer < 0):
        odd = next((n for n in stage.nodes if ".part." in n), node)
        raise InputError(
            f"EAP's format knows an input, {n_heads} heads and one MLP per layer, and logits; {odd!r} is none of "
            "these; export the graph as it was before it was refined, or with to_dot, to_graphml or save_graph"
        )


def _is_parallel(graph: Graph) -> bool:
    """No MLP hears the heads of its own layer, and there are such pairs."""
    at = {(stage.layer, stage.kind): s for s, stage in enumerate(graph.stages)}
    pairs = [(at[layer, "attn"], s) for (layer, kind), s in at.items() if kind == "mlp" and (layer, "attn") in at]
    return bool(pairs) and not any(a in range(*graph.stages[m].visible) for a, m in pairs)


def _check_edges(graph: Graph, layout: Layout) -> None:
    extra = graph.possible_edges & ~layout.spread(layout.grid.real)
    if bool(extra.any()):
        raise InputError(f"EAP's format has no edge {graph.name_edges(extra)[0]}")


def score_matrix(graph: Graph, scores: Scores | None) -> Float[Tensor, "ports writers"]:
    """Scores as numbers on the CPU, NaN where there are none.

    Raises:
        ShapeError: they are not of this graph.
        InputError: a score is infinite.
    """
    if scores is None:
        return torch.full(graph.possible_edges.shape, torch.nan, dtype=torch.float64)
    if isinstance(scores, EdgeScores) and (scores.graph.ports, scores.graph.writers) != (graph.ports, graph.writers):
        raise ShapeError(f"the scores are of {scores.graph!r}, whose nodes are not those of {graph!r}")
    values = (scores.nats if isinstance(scores, EdgeScores) else scores).detach().cpu().double()
    if values.shape != graph.possible_edges.shape:
        expected = tuple(graph.possible_edges.shape)
        raise ShapeError(f"scores must be {expected} (ports x writers), got {tuple(values.shape)}")
    if bool(values.isinf().any()):
        raise InputError(f"the score of {graph.name_edges(values.isinf())[0]} is infinite")
    return values
