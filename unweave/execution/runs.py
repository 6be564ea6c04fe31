"""``unweave.run``: a graph on inputs, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.execution.hooks import BEFORE, Patch
from unweave.execution.plans import plan_of
from unweave.execution.stages import trace
from unweave.graph import Graph
from unweave.ops import Attention, Context

__all__ = ["Run", "check_inputs", "run", "uncut"]


@dataclass(frozen=True)
class Run:
    """What a run returns.

    Attributes:
        logits: ``[batch pos d_out]``.
        values: what was recorded, by name.
    """

    logits: Float[Tensor, "batch pos d_out"]
    values: Mapping[str, Tensor]


def run(
    graph: Graph,
    inputs: Tensor,
    mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None = None,
    *,
    record: Iterable[str] = (),
    patch: Mapping[str, Patch] | None = None,
    counterfactual: Tensor | None = None,
) -> Run:
    """Run a graph on inputs; record and patch any value on the way. Gradients flow.

    Args:
        inputs: token ids ``[batch pos]``, or reals ``[batch pos features]`` where the network reads those.
        mask: 1 or True where a token is real (right or left padding).
        record: names of values to return: a node (``"blocks.0.attn.head.1"``: what it writes), a port
            (``"blocks.0.attn.head.1.q"``: what it hears, before its norm), ``NODE.code``, ``HEAD.pattern``,
            ``before NODE`` (the residual stream; patched for that node's stage and all after it, in an uncut graph).
        patch: values to set, as a tensor or a function of the value, by the same names; an edge
            (``"embed->blocks.0.mlp.in"``) is patched for its one reader only.
        counterfactual: other inputs of the same shape, needed by a graph whose cut edges are resampled.

    Returns:
        A :class:`Run`.

    Raises:
        InputError: ids out of range, a sequence longer than the context, a cut edge patched.
        ShapeError: inputs, mask or patch of the wrong shape.
        UnknownNameError: an unknown name; lists the closest.

    Cost:
        One forward pass; an uncut graph costs what the model costs.

    Exact?
        Yes, up to floating-point summation order.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> tokens = torch.tensor([[0, 5, 9, 5]])
        >>> out = unweave.run(graph, tokens, record=["blocks.0.attn.head.0.pattern"])
        >>> out.values["blocks.0.attn.head.0.pattern"].shape
        torch.Size([1, 4, 4])
    """
    context = check_inputs(graph, inputs, mask)
    names = frozenset(record)
    _check_names(graph, names, patch or {})
    other = None
    if graph.resample:
        if counterfactual is None:
            raise InputError("this graph's cut edges hear another input: pass counterfactual=...")
        if counterfactual.shape != inputs.shape:
            raise ShapeError(f"counterfactual must have shape {tuple(inputs.shape)}, got {tuple(counterfactual.shape)}")
        apart = bool(names or patch) or any(plan.each_needed for plan in plan_of(graph).stages)
        other = trace(uncut(graph), check_inputs(graph, counterfactual, mask), apart=apart)
    out = trace(graph, context, record=names, patch=patch, counterfactual=other)
    return Run(out.output, out.values)


def uncut(graph: Graph) -> Graph:
    """The graph with every edge restored and every constant removed; the graph itself where nothing was cut."""
    if not graph.resample and not any(p.is_cut for s in graph.stages for p in s.ports):
        return graph
    whole = {"edges": None, "offset": None, "wires": None}
    stages = tuple(
        dataclasses.replace(s, ports=tuple(dataclasses.replace(p, **whole) for p in s.ports))  # type: ignore[arg-type]
        for s in graph.stages
    )
    return dataclasses.replace(graph, stages=stages, resample=False)


def check_inputs(graph: Graph, inputs: Tensor, mask: Tensor | None = None) -> Context:
    """The context of a run, after checking that the graph can read these inputs."""
    features = graph.info.get("d_input")
    if features is None:
        if inputs.ndim != 2 or inputs.is_floating_point() or inputs.dtype == torch.bool:
            raise ShapeError(f"token ids must be integers [batch, pos], got {inputs.dtype} {tuple(inputs.shape)}")
    elif inputs.ndim != 3 or inputs.shape[2] != features:
        raise ShapeError(f"inputs must be reals [batch, pos, {features}], got {tuple(inputs.shape)}")
    if inputs.shape[0] == 0 or inputs.shape[1] == 0:
        raise ShapeError(f"inputs are empty: {tuple(inputs.shape)}")
    limit = graph.info.get("n_ctx")
    if limit is not None and inputs.shape[1] > limit:
        raise InputError(f"a sequence of {inputs.shape[1]} tokens is longer than the context of {limit}; cut it")
    vocabulary = graph.info.get("d_vocab")
    if features is None and vocabulary is not None:
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= vocabulary:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocabulary}")
    if mask is not None:
        if mask.shape != inputs.shape[:2]:
            raise ShapeError(f"mask must have shape {tuple(inputs.shape[:2])}, got {tuple(mask.shape)}")
        mask = mask.to(device=graph.device, dtype=torch.bool)
        mask = None if bool(mask.all()) else mask
    return Context(inputs.to(graph.device), mask)


def _check_names(graph: Graph, record: frozenset[str], patch: Mapping[str, Patch]) -> None:
    known = set(graph.nodes) | set(graph.ports)
    known |= {f"{n}.code" for n in graph.nodes}
    known |= {f"{n}.pattern" for s in graph.stages if isinstance(s.core, Attention) for n in s.nodes}
    known -= set(graph.stages[-1].nodes)
    known |= {f"{BEFORE}{n}" for s in graph.stages if s.visible[1] > s.visible[0] for n in s.nodes}
    for name in (*record, *(n for n in patch if "->" not in n)):
        if name not in known:
            raise UnknownNameError("value", name, sorted(known))
    if graph.is_cut and any(name.startswith(BEFORE) for name in patch):
        raise InputError(
            "where edges are cut, readers hear different sums and no one stream can be patched; patch ports"
        )
    edges = [n for n in patch if "->" in n]
    cut = graph.mark_edges(edges) & ~graph.edge_matrix
    if bool(cut.any()):
        raise InputError(f"{graph.name_edges(cut)[0]} is cut in this graph and cannot be patched; patch an uncut graph")
