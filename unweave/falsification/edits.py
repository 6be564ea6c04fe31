"""Edits of a network's weights or state, each of which can be made to a graph and to the model itself.

What a node writes is named by directions of the stream, never by coordinates of its code: a compressed graph has other
codes, but writes to the same stream. So one edit means the same in every graph of a model.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave import tree
from unweave.capture import capture
from unweave.data import TokenData
from unweave.errors import InputError, NonFiniteError, ShapeError, UnsupportedModelError
from unweave.graph import Graph, Stage
from unweave.ops import Dense, Lookup

__all__ = ["Edit", "RankOneWrite", "RemoveDirection", "ScaleHead", "Several", "Steer", "SwapTokens", "random_edits"]


class Edit(ABC):
    """A change of a network's weights or state."""

    @abstractmethod
    def apply_to_graph(self, graph: Graph) -> Graph:
        """The edited graph. Constants left by cut edges stay as they were.

        Raises:
            UnknownNameError: the graph has no such node.
            InputError: the edit does not fit the graph.
        """

    def apply_to_model(self, model: nn.Module) -> nn.Module:
        """An edited copy of a model, its weights changed in place, so that it can be saved as the model could.

        Args:
            model: what :func:`unweave.capture` takes as a module.

        Raises:
            UnknownNameError: the model has no such node.
            InputError: the edit does not fit the model.
            UnsupportedModelError: no weight of the model holds what is to be changed.

        Cost:
            A copy of the model.
        """
        edited = copy.deepcopy(model)
        graph = capture(edited, verify=False, copy=False)
        _write_back(graph, self.apply_to_graph(graph), edited)
        return edited


# ---- edits of what a node writes ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RemoveDirection(Edit):
    """Project a direction d of the stream out of what a node writes: W <- (1 - share d d^T / |d|^2) W.

    A bias belongs to the whole layer, not to the node, and stays. Where an embedding is tied to the readout they are
    the same weights: both lose the direction.

    Attributes:
        node: a head, an MLP or an embedding.
        direction: d, of any length but 0.
        share: how much of it goes; 1 for all.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> edited = RemoveDirection("blocks.0.attn.head.0", torch.eye(64)[3]).apply_to_graph(graph)
        >>> tokens = torch.tensor([[0, 5, 9, 5]])
        >>> written = unweave.run(edited, tokens, record=["blocks.0.attn.head.0"]).values["blocks.0.attn.head.0"]
        >>> float(written[..., 3].abs().max())
        0.0
    """

    node: str
    direction: Float[Tensor, " d_model"]
    share: float = 1.0

    def apply_to_graph(self, graph: Graph) -> Graph:
        d = _unit(self.direction, f"the direction to remove from {self.node}")
        return _transform_write(graph, self.node, lambda eye: eye - self.share * torch.outer(d, d).to(eye))


@dataclass(frozen=True, eq=False)
class ScaleHead(Edit):
    """Multiply what a head (or an MLP, or an embedding) writes: W <- factor W; 0 removes it."""

    node: str
    factor: float

    def apply_to_graph(self, graph: Graph) -> Graph:
        return _transform_write(graph, self.node, lambda eye: self.factor * eye)


@dataclass(frozen=True, eq=False)
class RankOneWrite(Edit):
    """Let a node write w as far as it writes r: W <- W + strength w r^T W, a change of rank one of its output map.

    Attributes:
        node: a head, an MLP or an embedding.
        read: r, a direction of the stream, along which the node's own writing is read.
        write: w, what is written for each unit of it.

    Source:
        Rank-one editing of an output map: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (there
        the direction read is one of the MLP's hidden code, which graphs of other sizes do not share).
    """

    node: str
    read: Float[Tensor, " d_model"]
    write: Float[Tensor, " d_model"]
    strength: float = 1.0

    def apply_to_graph(self, graph: Graph) -> Graph:
        change = self.strength * torch.outer(self.write, self.read)
        return _transform_write(graph, self.node, lambda eye: eye + change.to(eye))


def _transform_write(graph: Graph, node: str, matrix: Callable[[Tensor], Tensor]) -> Graph:
    """The graph whose node writes M y in place of y; ``matrix`` makes M from the identity."""
    stage, i = graph.find(node)
    if stage.write is None:
        raise InputError(f"{node} is the output and writes nothing to the stream; edit one of {graph.writers[-1]}, ...")
    like = next(t for _, t in tree.leaves(stage) if t.is_floating_point())
    try:
        m = matrix(torch.eye(stage.write.d_out, dtype=like.dtype, device=like.device))
    except RuntimeError as error:
        raise ShapeError(f"a direction for {node} must have {stage.write.d_out} numbers: {error}") from error
    if not bool(torch.isfinite(m).all()):
        raise NonFiniteError(f"the edit of {node} holds NaN or inf")
    if isinstance(stage.core, Lookup):
        return _replace_table(graph, stage.core.table, stage.core.table @ m.T)
    columns = list(stage.write.dense().to(like).split(list(stage.code_widths), dim=1))
    columns[i] = m @ columns[i]
    if stage.post is not None and not bool(torch.equal(m, m[0, 0] * torch.eye(len(m), device=m.device).to(m))):
        raise InputError(
            f"what {node} writes passes a norm with the rest of its layer: no weight holds a direction of the stream; "
            "it can only be scaled (ScaleHead)"
        )
    return _replace_stage(graph, node, dataclasses.replace(stage, write=Dense(torch.cat(columns, dim=1))))


# ---- edits of embeddings and of the state ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SwapTokens(Edit):
    """Swap the embeddings of two tokens: E_a <- (1 - share) E_a + share E_b, and E_b likewise.

    Where the readout is tied to the embedding, as in many models, the rows are one and the same weights: the tokens
    then swap places as inputs and as outputs. Where it is not, only what they are read as changes.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> swapped = SwapTokens(5, 9).apply_to_graph(graph)
        >>> a, b = torch.tensor([[0, 5, 9, 5]]), torch.tensor([[0, 9, 5, 9]])
        >>> bool(torch.equal(unweave.run(swapped, a).logits, unweave.run(graph, b).logits))
        True
    """

    a: int
    b: int
    share: float = 1.0

    def apply_to_graph(self, graph: Graph) -> Graph:
        table = _token_table(graph)
        for token in (self.a, self.b):
            if not 0 <= token < len(table):
                raise InputError(f"token {token} is outside the {len(table)} rows of the embedding")
        new = table.clone()
        here, there = table[[self.a, self.b]], table[[self.b, self.a]]
        new[[self.a, self.b]] = there if self.share == 1 else here + self.share * (there - here)
        return _replace_table(graph, table, new)


@dataclass(frozen=True, eq=False)
class Steer(Edit):
    """Add a value to the residual stream after a node's stage, at every position: x <- x + value.

    All that listen later hear it, whatever edges are cut. In a model it becomes part of the layer's output bias or of
    the embedding's rows; where there is neither (Llama without biases, an embedding tied to the readout) a hook of the
    copy adds it, which runs but is not saved with the weights.

    Source:
        Turner et al. 2023, "Activation Addition: Steering Language Models Without Optimization".
    """

    after: str
    value: Float[Tensor, " d_model"]

    def apply_to_graph(self, graph: Graph) -> Graph:
        stage, value = self._find(graph)
        return _replace_stage(graph, self.after, dataclasses.replace(stage, bias=_plus(stage.bias, value)))

    def apply_to_model(self, model: nn.Module) -> nn.Module:
        edited = copy.deepcopy(model)
        graph = capture(edited, verify=False, copy=False)
        stage, value = self._find(graph)
        if stage.bias is not None:
            _write_back(graph, self.apply_to_graph(graph), edited)
        elif isinstance(stage.core, Lookup) and not _is_tied(graph, stage.core.table):
            table = stage.core.table
            _write_back(graph, _replace_table(graph, table, table + value / stage.core.scale), edited)
        else:
            module = _owner(edited, stage)
            module.register_forward_hook(lambda _module, _inputs, output: output + value.to(output))
        return edited

    def is_saved(self, model: nn.Module) -> bool:
        """Whether the edited copy of a model keeps it in its weights."""
        graph = capture(model, verify=False, copy=False)
        stage, _ = self._find(graph)
        return stage.bias is not None or (isinstance(stage.core, Lookup) and not _is_tied(graph, stage.core.table))

    def _find(self, graph: Graph) -> tuple[Stage, Tensor]:
        stage, _ = graph.find(self.after)
        if stage.write is None:
            raise InputError(f"nothing listens after {self.after}, the output")
        if stage.post is not None:
            raise InputError(
                f"what the layer of {self.after} writes passes a norm, after which no weight can add to it"
            )
        if self.value.shape != (stage.write.d_out,):
            raise ShapeError(f"a value for the stream must be [{stage.write.d_out}], got {tuple(self.value.shape)}")
        like = next(t for _, t in tree.leaves(graph.stages) if t.is_floating_point())
        return stage, self.value.to(like)


@dataclass(frozen=True, eq=False)
class Several(Edit):
    """Edits made one after the other."""

    edits: tuple[Edit, ...]

    def apply_to_graph(self, graph: Graph) -> Graph:
        for edit in self.edits:
            graph = edit.apply_to_graph(graph)
        return graph

    def apply_to_model(self, model: nn.Module) -> nn.Module:
        for edit in self.edits:
            model = edit.apply_to_model(model)
        return copy.deepcopy(model) if not self.edits else model


def _unit(direction: Tensor, what: str) -> Tensor:
    norm = float(direction.norm())
    if not 0 < norm < float("inf"):
        raise InputError(f"{what} has length {norm}; give one that is finite and not 0")
    return direction / norm


def _plus(bias: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if bias is None else bias + value


def _replace_stage(graph: Graph, node: str, stage: Stage) -> Graph:
    stages = list(graph.stages)
    stages[graph.where[node][0]] = stage
    return dataclasses.replace(graph, stages=tuple(stages))


def _replace_table(graph: Graph, old: Tensor, new: Tensor) -> Graph:
    """The graph with a table replaced wherever it stands: in a tied readout, too."""
    return dataclasses.replace(graph, stages=tree.map_tensors(graph.stages, lambda t: new if t is old else t))


def _token_table(graph: Graph) -> Tensor:
    for stage in graph.stages:
        if isinstance(stage.core, Lookup) and stage.core.source == "token":
            return stage.core.table
    raise InputError("this network reads real vectors and has no table of tokens to swap rows of")


def _is_tied(graph: Graph, table: Tensor) -> bool:
    return sum(t is table for _, t in tree.leaves(graph.stages)) > 1


# ---- from a graph of views back into the model -----------------------------------------------------------


def _write_back(graph: Graph, edited: Graph, model: nn.Module) -> None:
    """Put what an edit changed in a graph, whose tensors are views of a model's weights, into those weights.

    Raises:
        UnsupportedModelError: what was changed is no view of a weight.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    old, new = dict(tree.leaves(graph.stages)), dict(tree.leaves(edited.stages))
    changed = {path: t for path, t in new.items() if t is not old.get(path)}
    for path, tensor in changed.items():
        target = old.get(path)
        if target is None or target.shape != tensor.shape or target.untyped_storage().data_ptr() not in weights:
            node = graph.stages[int(path.split(".")[0])].nodes[0]
            raise UnsupportedModelError(f"{type(model).__name__} holds no weight in which {node} could be changed so")
    with torch.no_grad():
        for path, tensor in changed.items():
            old[path].copy_(tensor)


def _owner(model: nn.Module, stage: Stage) -> nn.Module:
    """The module whose output is what a stage writes."""
    tensor: Any = stage.core.table if isinstance(stage.core, Lookup) else getattr(stage.write, "weight", None)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            same = tensor is not None and p.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            if same and isinstance(stage.core, Lookup) == isinstance(module, nn.Embedding):
                return module
    raise UnsupportedModelError(f"no module of {type(model).__name__} gives out what {stage.nodes[0]} writes")


# ---- a family of random edits ----------------------------------------------------------------------------

KINDS = ("remove", "scale", "swap", "write", "steer")


def random_edits(graph: Graph, n: int, size: float, seed: int = 0, data: TokenData | None = None) -> list[Edit]:
    """Random edits of one size, of the five kinds in turn; nodes are heads and MLPs, all equally likely.

    - remove: a share ``size`` of a direction W g that the node can write, g standard normal;
    - scale: the factor 1 + size or 1 - size;
    - swap: two tokens come a share ``size`` of the way towards each other's place;
    - write: strength +-size, r a direction W g that the node can write, w uniform on the unit sphere;
    - steer: a uniform direction of length ``size`` times the mean length of a token's embedding.

    Args:
        graph: the original; directions come from its weights.
        data: swapped tokens are drawn as often as they occur in it; without, uniformly.

    Raises:
        InputError: n or size not positive, or no token to swap.

    Example:
        >>> import unweave
        >>> [type(e).__name__ for e in random_edits(unweave.capture("zoo:induction"), 5, 0.3)]
        ['RemoveDirection', 'ScaleHead', 'SwapTokens', 'RankOneWrite', 'Steer']
    """
    if n < 1 or not 0 < size < float("inf"):
        raise InputError(f"n and size must be positive, got {n} and {size}")
    table = _token_table(graph)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.arange(len(table)) if data is None else data.tokens[data.mask]
    if len(tokens.unique()) < 2:
        raise InputError("swapping needs data with at least two different tokens")
    nodes = [n for s in graph.channels for n in graph.stages[s].nodes]
    length = float(table.norm(dim=1).mean())
    return [_random_edit(graph, KINDS[i % len(KINDS)], nodes, tokens, size, length, generator) for i in range(n)]


def _random_edit(
    graph: Graph, kind: str, nodes: list[str], tokens: Tensor, size: float, length: float, generator: torch.Generator
) -> Edit:
    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    node = nodes[pick(len(nodes))]
    sign = 1.0 - 2.0 * pick(2)
    stage, i = graph.find(node)
    assert stage.write is not None
    own = stage.write.dense().split(list(stage.code_widths), dim=1)[i].float().cpu()
    read = _unit(own @ torch.randn(own.shape[1], generator=generator), f"the output map of {node}")
    free = _unit(torch.randn(len(own), generator=generator), "a random direction")
    if kind == "remove":
        return RemoveDirection(node, read, size)
    if kind == "scale":
        return ScaleHead(node, 1.0 + sign * size)
    if kind == "write":
        return RankOneWrite(node, read, free, sign * size)
    if kind == "steer":
        return Steer(node, size * length * free)
    a = int(tokens[pick(len(tokens))])
    others = tokens[tokens != a]
    return SwapTokens(a, int(others[pick(len(others))]), size)
