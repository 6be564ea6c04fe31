"""The plainest executor of a graph that one can write: loops over stages, nodes, ports and writers.

It shares no code with unweave's executor: matrices are dense, attention is an explicit softmax over pairs of
positions, every node's input is summed writer by writer. Slow, and easy to believe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unweave.graph import Graph, Port, Read, Stage
from unweave.ops import Attention, LayerNorm, RMSNorm, Rotary

SQRT_2 = math.sqrt(2.0)
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / SQRT_2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "identity": lambda x: x,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
}


@dataclass
class NaiveRun:
    """Logits, and every value of the run by name: ``NODE``, ``NODE.port``, ``NODE.code``, ``HEAD.pattern``."""

    logits: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)


def naive_run(
    graph: Graph,
    inputs: Tensor,
    mask: Tensor | None = None,
    alternative: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> NaiveRun:
    """Run a graph by the book; cut edges hear what their writer sends on ``alternative``, where that is given."""
    other = None
    if alternative is not None:
        other = naive_run(_without_cuts(graph), alternative, mask, None, dtype)
    out: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for s, stage in enumerate(graph.stages):
        for i, node in enumerate(stage.nodes):
            for port in stage.ports:
                out[f"{node}.{port.name}"] = _heard(graph, s, i, port, written, other, inputs, dtype)
        for node, code, pattern in _codes(stage, out, inputs, mask, dtype):
            out[f"{node}.code"] = code
            if pattern is not None:
                out[f"{node}.pattern"] = pattern
        if stage.write is not None:
            written |= _writes(stage, out)
    return NaiveRun(out[f"{graph.stages[-1].nodes[0]}.code"], out | written)


def _without_cuts(graph: Graph) -> Graph:
    stages = [
        Stage(**(_fields(s) | {"ports": tuple(Port(p.name, p.reads, p.norm) for p in s.ports)})) for s in graph.stages
    ]
    return Graph(tuple(stages), graph.info)


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _heard(
    graph: Graph,
    s: int,
    i: int,
    port: Port,
    written: dict[str, Tensor],
    other: NaiveRun | None,
    inputs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """What node i of stage s hears at a port: writer by writer, then biases, then what cut edges left."""
    batch, n_pos = inputs.shape[:2]
    heard = graph.stages[slice(*graph.stages[s].visible)]
    assert heard[0].write is not None
    x, column = torch.zeros(batch, n_pos, heard[0].write.d_out, dtype=dtype), 0
    for earlier in heard:
        for writer in earlier.nodes:
            if port.edges is None or bool(port.edges[i, column]):
                x = x + written[writer]
            elif other is not None:
                x = x + other.values[writer]
            column += 1
        if earlier.bias is not None:
            x = x + earlier.bias.to(dtype)
    if port.offset is not None:
        constant = port.offset[i].to(dtype)
        x = x + (constant if len(constant) == 1 else constant[:n_pos])
    return x


def naive_norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm from its formula."""
    if isinstance(norm, RMSNorm):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.gain.to(x.dtype)
    assert isinstance(norm, LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + norm.eps) * norm.gain.to(x.dtype)
    return scaled if norm.bias is None else scaled + norm.bias.to(x.dtype)


def _read(stage: Stage, i: int, port: Port, read: Read, x: Tensor) -> Tensor:
    """One read of node i: its block of rows of the dense matrix."""
    normed = x if port.norm is None else naive_norm(port.norm, x)
    block = i * len(read.widths) // len(stage.nodes)
    first = sum(read.widths[:block])
    rows = slice(first, first + read.widths[block])
    out = normed @ read.map.dense()[rows].to(x.dtype).T
    return out if read.bias is None else out + read.bias[rows].to(x.dtype)


def _codes(
    stage: Stage, values: dict[str, Tensor], inputs: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(node, code, attention pattern or None) of every node."""
    core: Any = stage.core
    for i, node in enumerate(stage.nodes):
        reads = [_read(stage, i, p, r, values[f"{node}.{p.name}"]) for p in stage.ports for r in p.reads]
        kind = type(core).__name__
        if kind == "Attention":
            pattern = naive_pattern(core, reads[0], reads[1], mask)
            yield node, pattern @ reads[2], pattern
        elif kind == "Activation":
            hidden = PLAIN_ACTIVATIONS[core.name](reads[0])
            yield node, hidden * reads[1] if len(reads) == 2 else hidden, None
        elif kind == "Readout":
            logits = reads[0] * core.scale
            yield (
                node,
                logits if core.softcap is None else core.softcap * torch.tanh(logits / core.softcap),
                None,
            )
        elif kind == "FloatInput":
            yield node, inputs.to(dtype), None
        else:
            table = core.table.to(dtype)
            rows = torch.arange(inputs.shape[1]).expand(inputs.shape) if core.source == "position" else inputs
            yield node, table[rows] * (1.0 if core.source == "position" else core.scale), None


def naive_pattern(core: Attention, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention probabilities of one head, q and k ``[batch pos width]``, one pair of positions at a time."""
    q, k = (x if norm is None else naive_norm(norm, x) for x, norm in ((q, core.q_norm), (k, core.k_norm)))
    if core.rotary is not None:
        q, k = naive_rotary(core.rotary, q), naive_rotary(core.rotary, k)
    scores = core.scale * torch.einsum("bqw,bkw->bqk", q, k)
    if core.softcap is not None:
        scores = core.softcap * torch.tanh(scores / core.softcap)
    weights = scores.exp() * naive_visible(core, len(q), q.shape[1], mask)
    return weights / weights.sum(-1, keepdim=True)


def naive_visible(core: Attention, batch: int, n_pos: int, mask: Tensor | None = None) -> Tensor:
    """1 where a query may look at a key, pair by pair; every position may look at itself."""
    seen = torch.zeros(batch, n_pos, n_pos)
    for b in range(batch):
        for query in range(n_pos):
            for key in range(n_pos):
                later = core.causal and key > query
                far = core.window is not None and abs(query - key) >= core.window
                padded = mask is not None and not bool(mask[b, key])
                seen[b, query, key] = float(query == key or not (later or far or padded))
    return seen


def naive_rotary(rotary: Rotary, x: Tensor) -> Tensor:
    """Turn coordinates (i, planes + i) of ``[batch pos width]`` by pos * inv_freq[i], plane by plane."""
    planes, out = len(rotary.inv_freq), x.clone()
    for i in range(planes):
        # angles in float32, as models are trained: the rounding is part of the function
        angle = torch.arange(x.shape[1]).float() * rotary.inv_freq[i].float()
        cos = (angle.cos() * rotary.scaling).to(x.dtype)
        sin = (angle.sin() * rotary.scaling).to(x.dtype)
        a, b = x[..., i], x[..., planes + i]
        out[..., i], out[..., planes + i] = a * cos - b * sin, a * sin + b * cos
    return out


def _writes(stage: Stage, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each node of a stage writes: its columns of the dense matrix times its code, then the common norm."""
    assert stage.write is not None
    writes, first = {}, 0
    for node, width in zip(stage.nodes, stage.code_widths, strict=True):
        code = values[f"{node}.code"]
        writes[node] = code @ stage.write.dense()[:, first : first + width].to(code.dtype).T
        first += width
    if stage.post is not None:
        assert isinstance(stage.post, RMSNorm)
        total = sum(writes.values(), torch.zeros(()))
        size = torch.sqrt((total * total).mean(-1, keepdim=True) + stage.post.eps)
        writes = {node: w / size * stage.post.gain.to(w.dtype) for node, w in writes.items()}
    return writes
