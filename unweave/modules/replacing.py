"""Put something simpler in a module's place and measure what that costs.

Whoever can write down in a few lines what a module does, so that the network hardly notices, has understood it. The
measure is the divergence between the network and itself with the module replaced, in nats per token, beside that with
the module at its mean: how much there was to explain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.ablation import Means
from unweave.data import Batch, TokenData
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.execution import Patch, run
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap
from unweave.modules.patching import nats_per_token, patched_nats, refuse_resampling, writing_nodes
from unweave.modules.standins import LinearMaps, MeanOf, ModuleFunction, ModuleInputs, Tables, fit_linear, fit_tables
from unweave.scope import Scope
from unweave.statistics import collect_means

__all__ = ["SIMPLE", "Replaced", "ReplacementLoss", "replace_module", "replacement_loss"]

SIMPLE = ("mean", "linear", "lookup", "lookup of pairs")


@dataclass(frozen=True, eq=False)
class Replaced:
    """A graph in which something else does a module's work.

    Attributes:
        graph: whole.
        block, nodes: the module and its nodes.
        by: "mean", "linear", "lookup", "lookup of pairs", or the name of the function.
        function: what writes in the module's place: given :class:`ModuleInputs`, the sum of what its ``nodes`` write
            (``[batch pos d_model]``, or what broadcasts to it), or a mapping that says it for each of them.
        means: what every node of the module writes on average; empty where no data was given.
        n_numbers: how many numbers are stored; 0 for a function of the user's.
    """

    graph: Graph
    block: str
    nodes: tuple[str, ...]
    by: str
    function: ModuleFunction
    means: Means = field(default_factory=dict)
    n_numbers: int = 0

    def patches(self, batch: Batch) -> dict[str, Patch]:
        """Patches for a run on this batch, by the names of :func:`unweave.run`; good for one run only."""
        device = self.graph.device
        memory = _Memory(self, batch.inputs.to(device), batch.mask.to(device))
        ports = [port for port in self.graph.ports if port.rpartition(".")[0] in self.nodes]
        out: dict[str, Patch] = {port: partial(memory.hear, port) for port in ports}
        return out | {n: partial(memory.write, n) for n in self.nodes}

    def run(self, inputs: Tensor, mask: Tensor | None = None) -> Float[Tensor, "batch pos d_out"]:
        """Logits with the module replaced.

        Raises:
            InputError, ShapeError: as :func:`unweave.run`, or what the function gives cannot be written.
        """
        real = torch.ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return run(
            self.graph, inputs, mask, patch=self.patches(Batch(inputs, real, {}, torch.arange(len(inputs))))
        ).logits


class _Memory:
    """What a module has heard and written in one run, for whoever writes in its place."""

    def __init__(self, replaced: Replaced, inputs: Tensor, mask: Tensor) -> None:
        self.replaced, self.inputs, self.mask = replaced, inputs, mask
        self.heard: dict[str, Tensor] = {}
        self.written: dict[str, Tensor] = {}

    def hear(self, port: str, x: Tensor) -> Tensor:
        self.heard[port] = x
        return x

    def write(self, node: str, y: Tensor) -> Tensor:
        if node not in self.written:
            self.written |= self._ask(node, y)
        return self.written[node]

    def _ask(self, node: str, y: Tensor) -> dict[str, Tensor]:
        """What all the module's nodes beside this one write."""
        graph, block = self.replaced.graph, self.replaced.block
        stage = graph.where[node][0]
        nodes = tuple(n for n in self.replaced.nodes if graph.where[n][0] == stage)
        positions = torch.arange(y.shape[1], device=y.device)
        given = self.replaced.function(
            ModuleInputs(graph, nodes, self.inputs, self.mask, positions, dict(self.heard), dict(self.written))
        )
        if isinstance(given, Mapping):
            if set(given) != set(nodes):
                raise InputError(f"what replaces {block!r} must say what {list(nodes)} write, got {list(given)}")
            return {n: _as_written(given[n], y, n) for n in nodes}
        # the sum may stand in any of them: whoever hears one hears all
        return {nodes[0]: _as_written(given, y, nodes[0])} | {n: torch.zeros_like(y) for n in nodes[1:]}


def _as_written(given: object, like: Tensor, node: str) -> Tensor:
    fits = isinstance(given, Tensor) and given.ndim <= 3
    if fits and isinstance(given, Tensor):
        padded = (1,) * (3 - given.ndim) + tuple(given.shape)
        if all(a in (1, b) for a, b in zip(padded, like.shape, strict=True)):
            return given.to(like).expand_as(like)
    got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    raise ShapeError(f"what is written in place of {node} must have shape {tuple(like.shape)}, got {got}")


# ---- the simple ones, fitted ------------------------------------------------------------------------------


def replace_module(
    graph: Graph,
    block: str,
    by: str | ModuleFunction,
    data: TokenData | None = None,
    *,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Replaced:
    """Put something simpler in the place of a module.

    - "mean": what each node writes on average: nothing is left to explain with.
    - "linear": for every stage of the module, ridge regression from what its nodes read (normalised, with a constant)
      to what they write, position by position.
    - "lookup": a table of what is written on average at each token; the mean at tokens that the data lacks.
    - "lookup of pairs": the same for each previous and current token; pairs that the data lacks go by the token.
    - a function of :class:`ModuleInputs` -> what the nodes write: the sum ``[batch pos d_model]``, or a mapping from
      each node to its own. A module with nodes in several stages asks it once for each stage, in order.

    Args:
        graph: with a partition; a node outside all modules is a block by itself.
        data: to fit on; "mean", "linear" and the tables need it.

    Returns:
        :class:`Replaced`; see :func:`replacement_loss`.

    Raises:
        UnknownNameError: no such block, or nothing known by that name to replace it with.
        InputError: no data where it is needed, a module with the output in it, or a cut graph that hears other inputs.

    Cost:
        One forward pass for the means, another to fit. The regression keeps a square matrix of (d_model x distinct
        inputs) for every stage of the module; a table one row for each token or pair seen.

    Exact?
        Where the graph is cut, a function should give a mapping: a sum is written by the first node alone.

    Example:
        >>> import torch, unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=32)
        >>> def look_back(module):  # what the previous-token head would write if it looked there and nowhere else
        ...     written = module.values("blocks.0.attn.head.0")
        ...     return torch.cat([written[:, :1], written[:, :-1]], dim=1)
        >>> replaced = replace_module(graph, "blocks.0.attn.head.0", look_back)
        >>> replacement_loss(replaced, data, unweave.Scope(positions="answered")).nats.value < 0.01
        True
    """
    refuse_resampling(graph)
    nodes = writing_nodes(graph, block)
    if not callable(by) and by not in SIMPLE:
        raise UnknownNameError("simple replacement", str(by), SIMPLE)
    if data is None and not callable(by):
        raise InputError(f"{by!r} is fitted: pass data=..., calibration data apart from what the loss is measured on")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    means = {} if data is None else _means_of(graph, nodes, data, **options)
    if callable(by):
        return Replaced(graph, block, nodes, getattr(by, "__name__", type(by).__name__), by, means)
    assert data is not None
    fitted: MeanOf | LinearMaps | Tables
    if by == "mean":
        fitted = MeanOf(means)
    elif by == "linear":
        fitted = fit_linear(graph, nodes, data, **options)
    else:
        fitted = fit_tables(graph, nodes, data, by == "lookup of pairs", **options)
    return Replaced(graph, block, nodes, by, fitted, means, fitted.n_numbers)


def _means_of(graph: Graph, nodes: tuple[str, ...], data: TokenData, **options: Any) -> dict[str, Tensor]:
    means = collect_means(graph, data, **options)
    return {n: means[n] for n in nodes}


# ---- what it costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplacementLoss:
    """What a replacement loses.

    Attributes:
        block, by: what was replaced, and by what.
        nats: divergence from the network itself, in nats per token of the scope.
        ablated_nats: the same with the module at its mean: how much there was to explain.
        explained: 1 - nats / ablated_nats.
        n_numbers: what the replacement stores.
        n_sequences, n_tokens: on how much data.
    """

    block: str
    by: str
    nats: Estimate
    ablated_nats: Estimate
    explained: Estimate
    n_numbers: int
    n_sequences: int
    n_tokens: int

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: what, value, low, high, unit."""
        figures = (
            ("nats lost", self.nats, "nats"),
            ("nats lost at the mean", self.ablated_nats, "nats"),
            ("explained", self.explained, "share"),
        )
        return [{"what": name, **figure._asdict(), "unit": unit} for name, figure, unit in figures]


def replacement_loss(
    replaced: Replaced,
    data: TokenData,
    scope: Scope | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> ReplacementLoss:
    """What a network loses when something simpler does a module's work: D(network || replaced), per token.

    Args:
        data: held-out sequences. Where the replacement was made without data, the mean is taken on these.
        scope: the signal that counts; by default the KL at all positions.
        seed: of the bootstrap over sequences.

    Returns:
        :class:`ReplacementLoss`, with 95% intervals.

    Raises:
        EmptyDataError: the scope selects no position.

    Cost:
        Three forward passes (four where the mean is taken here).

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:modular_addition")
        >>> fit, held_out = unweave.load_data("zoo:modular_addition", limit=256).split(held_out=0.5)
        >>> scope = unweave.Scope(positions="answered")
        >>> table = replacement_loss(replace_module(graph, "blocks.0.mlp", "lookup", fit), held_out, scope)
        >>> table.explained.value < 0.5  # the MLP hears "=" there, whatever is to be added
        True
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    means = replaced.means or _means_of(replaced.graph, replaced.nodes, data, **options)
    silent = dataclasses.replace(replaced, function=MeanOf(means))
    patches = {"replaced": replaced.patches, "ablated": silent.patches}
    nats = patched_nats(replaced.graph, data, scope or Scope(), patches, description="running it replaced", **options)
    arrays = {"lost": nats["replaced"], "all": nats["ablated"]}
    return ReplacementLoss(
        replaced.block,
        replaced.by,
        nats_per_token(nats["replaced"], nats["tokens"], seed),
        nats_per_token(nats["ablated"], nats["tokens"], seed),
        bootstrap(arrays, lambda **total: 1 - total["lost"] / max(total["all"], 1e-12), seed=seed),
        replaced.n_numbers,
        len(data),
        int(nats["tokens"].sum()),
    )
