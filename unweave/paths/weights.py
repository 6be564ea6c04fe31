"""The matrices of single nodes, and the virtual weight between two of them.

A node hears n(x) = s (F x) + b, where F is the linear part of its norm (gain, centring), b its bias and s the
scale, which depends on the whole stream. Everything here folds F into the reads and leaves s and b out: what is
left is linear. A norm behind a layer's writes (Gemma) is treated alike: its gain is folded, its scale left out.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.graph import Edge, Graph, Port, Stage
from unweave.ops import Attention, LinearMap, Lookup, LowRank, Readout, RMSNorm, Stacked, wide

__all__ = [
    "check_table",
    "check_token_ids",
    "embedded_tokens",
    "find_head",
    "node_bias",
    "node_read",
    "node_write",
    "port_of",
    "readout_weight",
    "virtual_weight",
]

# numbers in one matrix: 256 MB of float32
LARGEST_TABLE = 1 << 26


def virtual_weight(
    graph: Graph,
    edge: Edge | str,
    *,
    read: int = 0,
    codes: bool = False,
    tokens: Int[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "r_dst r_src"]:
    """W = W_read F W_write: how the code of the writer enters what the port reads, the stream left out.

    Rows are the outputs of the port's read for that node (one head's block; the block it shares, where heads share
    keys and values), for the output node its logits (before its scale and cap). Columns are the coordinates of the
    writer's code; for an embedding its tokens, for a table of positions its positions, for real inputs the features.

    Args:
        edge: ``"blocks.0.attn.head.1->blocks.1.attn.head.0.k"``.
        read: which read of the port (a gated MLP has two: gate, up).
        codes: where a read or a write is of low rank, use its rank coordinates in place of its outputs (inputs).
        tokens: only these columns of an embedding, by id.

    Returns:
        In float32, or float64 for a graph of float64.

    Raises:
        UnknownNameError: an unknown node or port.
        InputError: no such edge, the edge is cut, no such read, or more than 2^26 numbers.
        ShapeError: tokens are no ids.

    Cost:
        One product of the two matrices.

    Exact?
        Of the linear part, yes: gain and centring of the norms are folded in. The norm's scale (one factor per
        position) and its bias are left out, and so is the read's bias.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> virtual_weight(graph, "blocks.0.attn.head.0->blocks.1.attn.head.1.k").shape
        torch.Size([32, 32])

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    edge = Edge.parse(edge) if isinstance(edge, str) else edge
    if bool((graph.mark_edges([edge]) & ~graph.edge_matrix).any()):
        raise InputError(f"{edge} is cut in this graph, so nothing travels along it; ask the uncut graph")
    stage, i = graph.find(edge.dst)
    reading = node_read(stage, i, edge.port, read, codes=codes)
    source, j = graph.find(edge.src)
    if tokens is not None and not isinstance(source.core, Lookup):
        raise InputError(f"tokens= picks columns of an embedding, and {edge.src} is none; leave it out")
    writing = node_write(source, j, codes=codes, tokens=tokens)
    check_table(len(reading), writing.shape[1])
    return reading @ writing.to(reading)


def check_table(rows: int, columns: int) -> None:
    """Refuse a matrix too large to be wanted.

    Raises:
        InputError: it has more than 2^26 numbers.
    """
    if rows * columns > LARGEST_TABLE:
        raise InputError(
            f"a matrix of {rows} x {columns} numbers was asked for, and {LARGEST_TABLE} is the limit; choose tokens "
            "with tokens="
        )


def port_of(stage: Stage, name: str) -> Port:
    """The port of a stage by name.

    Raises:
        UnknownNameError: no such port.
    """
    for port in stage.ports:
        if port.name == name:
            return port
    raise UnknownNameError("port", f"{stage.nodes[0]}.{name}", [f"{stage.nodes[0]}.{p.name}" for p in stage.ports])


def find_head(graph: Graph, head: str) -> tuple[Stage, int, Attention]:
    """The stage of a head, its place in it, and the stage's attention.

    Raises:
        UnknownNameError: no attention head has that name.
    """
    heads = [n for stage in graph.stages if isinstance(stage.core, Attention) for n in stage.nodes]
    if head not in heads:
        raise UnknownNameError("attention head", head, heads)
    stage, i = graph.find(head)
    return stage, i, cast(Attention, stage.core)


def _rows(stage: Stage, i: int, widths: tuple[int, ...]) -> tuple[int, slice]:
    """The block that node i reads, and its rows in the read map."""
    block = i * len(widths) // len(stage.nodes)
    start = sum(widths[:block])
    return block, slice(start, start + widths[block])


def node_read(
    stage: Stage, i: int, port: str, read: int = 0, *, folded: bool = True, codes: bool = False
) -> Float[Tensor, "width d_model"]:
    """One node's own rows of a read map, the linear part of the norm multiplied in.

    Args:
        folded: False for the bare matrix.
        codes: the rank coordinates of a read of low rank in place of its outputs.

    Raises:
        UnknownNameError: no such port.
        InputError: no such read.
    """
    where = port_of(stage, port)
    if not 0 <= read < len(where.reads):
        raise InputError(f"port {stage.nodes[i]}.{port} has {len(where.reads)} read(s), and read {read} was asked for")
    reads = where.reads[read]
    block, rows = _rows(stage, i, reads.widths)
    linear: LinearMap = reads.map
    if isinstance(linear, Stacked) and [m.d_out for m in linear.maps] == list(reads.widths):
        linear, rows = linear.maps[block], slice(None)
    weight = linear.right.dense() if codes and isinstance(linear, LowRank) else linear.dense()[rows]
    weight = wide(weight)
    return where.norm.fold(weight) if folded and where.norm is not None else weight


def node_bias(stage: Stage, i: int, port: str, read: int = 0) -> Float[Tensor, " width"]:
    """One node's part of a read's bias; zeros where there is none."""
    reads = port_of(stage, port).reads[read]
    _, rows = _rows(stage, i, reads.widths)
    if reads.bias is None:
        return torch.zeros(rows.stop - rows.start, device=stage.device)
    return wide(reads.bias)[rows]


def node_write(
    stage: Stage, i: int, *, codes: bool = False, tokens: Int[Tensor, " tokens"] | None = None
) -> Float[Tensor, "d_model width"]:
    """One node's own columns of the write map; of an embedding, what it writes for each token or position.

    Args:
        codes: the rank coordinates of a write of low rank in place of the code's.
        tokens: only these rows of an embedding's table.
    """
    assert stage.write is not None
    if isinstance(stage.core, Lookup):
        table = stage.core.table
        if tokens is not None:
            table = table[check_token_ids(tokens, len(table)).to(table.device)]
        weight = wide(stage.write.apply(table * stage.core.scale)).T
    elif codes and isinstance(stage.write, LowRank):
        weight = wide(stage.write.left)
    else:
        start = sum(stage.code_widths[:i])
        dense = stage.write.dense().to(stage.device)  # the identity does not know where it is
        weight = wide(dense[:, start : start + stage.code_widths[i]])
    if isinstance(stage.post, RMSNorm):
        weight = stage.post.fold(weight.T).T
    return weight


def check_token_ids(tokens: Tensor, vocabulary: int) -> Int[Tensor, " tokens"]:
    """Token ids, after checking that they are some.

    Raises:
        ShapeError: not integers ``[tokens]``.
        InputError: one is outside the vocabulary, or there are none.
    """
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ShapeError(f"token ids must be integers [tokens], got {tokens.dtype} {tuple(tokens.shape)}")
    if len(tokens) == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InputError(f"tokens must be ids from 0 to {vocabulary - 1}, at least one, got {tokens.tolist()[:8]}")
    return tokens


def embedded_tokens(
    graph: Graph, tokens: Int[Tensor, " tokens"] | None, position: int | None = None
) -> Float[Tensor, "tokens d_model"]:
    """What the embedding writes for each token (all of them when None), the learned position added if one is given.

    Raises:
        InputError: the graph embeds no tokens, or has no such position.
        ShapeError: tokens are no ids.
    """
    tables = {s.core.source: s for s in graph.stages if isinstance(s.core, Lookup)}
    if "token" not in tables:
        raise InputError("this graph embeds no tokens, so it has no circuits in token space; use the factors")
    x = node_write(tables["token"], 0, tokens=tokens).T
    if position is None or "position" not in tables:
        return x
    written = node_write(tables["position"], 0).T
    if not 0 <= position < len(written):
        raise InputError(f"position {position} is outside the table of {len(written)} positions")
    return x + written[position]


def readout_weight(graph: Graph, outputs: Int[Tensor, " outputs"] | None = None) -> Float[Tensor, "outputs d_model"]:
    """The readout with the linear part of the final norm multiplied in, and the readout's scale.

    Args:
        outputs: only these rows.

    Raises:
        ShapeError, InputError: outputs are no ids.
    """
    last = graph.stages[-1]
    weight = node_read(last, 0, last.ports[0].name)
    if outputs is not None:
        weight = weight[check_token_ids(outputs, len(weight)).to(weight.device)]
    return weight * last.core.scale if isinstance(last.core, Readout) else weight
