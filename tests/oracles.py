"""The plainest executor there is: loops over stages, nodes, ports and edges, dense matrices, explicit softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unweave.execution import uncut
from unweave.graph import Graph, Port, Stage
from unweave.ops import Activation, Attention, Lookup, Readout
from unweave.ops.cores import ACTIVATIONS


def naive_run(graph: Graph, tokens: Tensor, mask: Tensor | None = None, counterfactual: Tensor | None = None):
    """(logits, what each node writes, what each port hears), batch element by batch element."""
    other = naive_run(uncut(graph), counterfactual, mask)[1] if graph.resample else None
    n_batch, n_pos = tokens.shape
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    written: dict[str, Tensor] = {}
    heard: dict[str, Tensor] = {}
    logits = None
    for s, stage in enumerate(graph.stages):
        names = graph.writers[graph.visible_writers(s)]
        biases = [graph.stages[i].bias for i in range(*stage.visible) if graph.stages[i].bias is not None]
        raw = []
        for i, node in enumerate(stage.nodes):
            reads = []
            for port in stage.ports:
                x = torch.zeros(n_batch, n_pos, port.reads[0].map.d_in, dtype=port.reads[0].map.dense().dtype)
                x = x + sum(biases) if biases else x
                for w, name in enumerate(names):
                    if port.edges is None or port.edges[i, w]:
                        x = x + written[name]
                    elif other is not None:
                        x = x + other[name]
                if port.offset is not None:
                    x = x + port.offset[i][:n_pos]
                heard[f"{node}.{port.name}"] = x
                reads += _reads(stage, port, i, x)
            code = _code(stage, i, reads, tokens, mask)
            if stage.write is None:
                logits = code
                continue
            start = sum(stage.code_widths[:i])
            columns = stage.write.dense()[:, start : start + stage.code_widths[i]].to(code)
            raw.append(code @ columns.T)
        total = sum(raw) if raw else None
        for node, y in zip(stage.nodes, raw, strict=False):
            if stage.post is not None:
                y = y * stage.post.gain * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + stage.post.eps)
            written[node] = y
    return logits, written, heard


def _reads(stage: Stage, port: Port, i: int, x: Tensor) -> list[Tensor]:
    n = x if port.norm is None else port.norm.apply(x)
    out = []
    for read in port.reads:
        block = i // (len(stage.nodes) // len(read.widths))
        start = sum(read.widths[:block])
        rows = slice(start, start + read.widths[block])
        a = n @ read.map.dense()[rows].T
        out.append(a if read.bias is None else a + read.bias[rows])
    return out


def _code(stage: Stage, i: int, reads: list[Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
    core = stage.core
    if isinstance(core, Lookup):
        if core.source == "position":
            return core.table[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)
        return core.table[tokens] * core.scale
    if isinstance(core, Activation):
        hidden = ACTIVATIONS[core.name](reads[0])
        return hidden * reads[1] if len(reads) == 2 else hidden
    if isinstance(core, Readout):
        a = reads[0] * core.scale
        return a if core.softcap is None else core.softcap * torch.tanh(a / core.softcap)
    assert isinstance(core, Attention)
    return _attend(core, *reads, mask)


def _attend(core: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q = q if core.q_norm is None else core.q_norm.apply(q)
    k = k if core.k_norm is None else core.k_norm.apply(k)
    if core.rotary is not None:
        q, k = _rotate(core, q), _rotate(core, k)
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            scores = []
            for u in range(q.shape[1]):
                seen = bool(mask[b, u]) and (u <= t or not core.causal)
                seen = seen and (core.window is None or abs(t - u) < core.window)
                score = float("-inf")
                if seen or u == t:
                    score = (q[b, t] @ k[b, u]) * core.scale
                    score = score if core.softcap is None else core.softcap * torch.tanh(score / core.softcap)
                scores.append(torch.as_tensor(score, dtype=q.dtype))
            out[b, t] = torch.softmax(torch.stack(scores), 0) @ v[b]
    return out


def _rotate(core: Attention, x: Tensor) -> Tensor:
    out = x.clone()
    planes = len(core.rotary.inv_freq)
    for t in range(x.shape[1]):
        for p in range(planes):
            angle = t * float(core.rotary.inv_freq[p])
            c, s = math.cos(angle) * core.rotary.scaling, math.sin(angle) * core.rotary.scaling
            a, b = x[:, t, p], x[:, t, planes + p]
            out[:, t, p], out[:, t, planes + p] = a * c - b * s, b * c + a * s
    return out
