"""Usage: how many nats the outputs owe to what a node, an edge or a code dimension carries at one token.

For a part a (an edge i -> port j, a node i, or dimension k of a node's code) and a token t, with y_i(t) what node i
writes there and m_i its mean,

    usage_a(t) = 1/2 E[(J_a(t)^T c . (y_i(t) - m_i))^2],

c a random cotangent whose covariance is the Fisher information of the scope's outputs: to second order, the nats that
all outputs of the scope lose together when, at this token alone, the part carries its mean. J_a is the derivative of
the outputs by what port j hears (edge) or by what the node writes (node, and dimension, where the difference is
w_ik (c_ik(t) - its mean)).

Usage stands where something is *written*, not at the output token it serves: one backward pass then gives all tokens
at once, while the other reading needs one pass per output token. In the last layer the two are the same. Summed over
the tokens of a text, it leaves out products between tokens, which :func:`unweave.score_edges` keeps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from pyarrow import parquet
from torch import Tensor

from unweave.ablation import Means
from unweave.data import Batch, TokenData
from unweave.errors import InputError, StorageError
from unweave.files import read_json, write_atomic, write_json
from unweave.graph import Graph
from unweave.progress import track
from unweave.sampling.measures import column_names, measure_of
from unweave.sampling.query import MANIFEST, Usage, part_path
from unweave.scope import Scope, describe, position_mask, require_positions
from unweave.statistics import FisherPass

__all__ = ["LEVELS", "record_usage"]

LEVELS = ("node", "edge", "dimension")
# what one file holds at most: bounds memory, and what a kill can lose
NUMBERS_PER_PART = 1 << 24
TOKENS_PER_PART = 1 << 15


def record_usage(
    graph: Graph,
    data: TokenData,
    scope: Scope | None,
    folder: str | Path,
    *,
    level: str = "node",
    means: Means | None = None,
    strings: Sequence[str] | None = None,
    samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Usage:
    """Usage of every part at every token (the module's text has the formula), kept in a folder of Parquet files.

    A pass that was killed goes on where it stopped when it is called again with the same arguments, and what it writes
    is then bit by bit what it would have written in one go.

    Args:
        graph: captured, cut or compressed; whole at level "dimension".
        data: token sequences; their labels ``[n]`` and ``[n pos]`` are kept with the tokens.
        scope: the outputs that count; None for the KL at all positions.
        folder: made if need be.
        level: "node" (every writer), "edge" or "dimension" (of every writer's code: ``node[k]``).
        means: what each writer writes on average (:func:`unweave.collect_means`); collected when missing.
        strings: the text of every token id, for people (:func:`unweave.pipeline.token_strings`).
        samples: cotangents; one gives a value whose standard error is 1.4 times itself, n that over the root of n.
        batch_size: sequences per pass.
        seed: of the cotangents.

    Returns:
        :class:`Usage`, nats by token and part.

    Raises:
        InputError: an unknown level, or a folder that holds something else or the usage of other data.
        EmptyDataError: the scope selects no position.
        UnsupportedModelError: dimensions of a layer whose writes pass another norm (Gemma).
        NonFiniteError: names the node and batch.

    Cost:
        One forward pass for the means, one more and ``samples`` backward passes; at level "edge" one product of
        ports x d_model x writers per token as well. Disk: 4 bytes per token and part before compression. Memory: one
        batch and one part file, whatever the size of the data.

    Exact?
        An unbiased estimate of the second-order term, which is too small for the few largest effects.

    Example:
        >>> import tempfile, unweave
        >>> graph, data = unweave.capture("zoo:three_tasks"), unweave.load_data("zoo:three_tasks", limit=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     usage = record_usage(graph, data, unweave.Scope(positions="answered"), folder)
        ...     usage.n_tokens, usage.columns[2], len(usage.top("blocks.0.mlp", 3))
        (96, 'blocks.0.attn.head.0', 3)
    """
    if level not in LEVELS:
        raise InputError(f"unknown level {level!r} of usage; choose one of {', '.join(LEVELS)}")
    if samples < 1 or batch_size < 1:
        raise InputError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
    scope, folder = scope or Scope(), Path(folder)
    require_positions(scope, data)
    columns = column_names(graph, level)
    plan = {
        "format": 1,
        "level": level,
        "columns": columns,
        "labels": _labels(data),
        "scope": describe(scope),
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "batches_per_part": _batches_per_part(data, batch_size, len(columns)),
        "n_sequences": len(data),
        "n_pos": int(data.tokens.shape[1]),
        "strings": list(strings) if strings is not None else None,
    }
    plan["fingerprint"] = _fingerprint(graph, data, scope, means, plan)
    if _start(folder, plan):
        return Usage(folder)
    measure = measure_of(graph, data, scope, folder, level, means, batch_size, progress)
    step = FisherPass(graph, scope, samples, seed, (measure,))
    _write_parts(folder, plan, data, step, progress)
    for left in folder.glob(".*.part"):
        left.unlink(missing_ok=True)
    write_json(folder / MANIFEST, {**plan, "complete": True})
    return Usage(folder)


def _labels(data: TokenData) -> dict[str, str]:
    """By label that is a number per sequence or token: which of the two."""
    shapes = {name: tuple(value.shape) for name, value in data.labels.items()}
    kinds = {(len(data),): "sequence", tuple(data.mask.shape): "token"}
    return {name: kinds[shape] for name, shape in shapes.items() if shape in kinds}


def _batches_per_part(data: TokenData, batch_size: int, n_columns: int) -> int:
    tokens = batch_size * data.tokens.shape[1]
    return int(max(1, min(TOKENS_PER_PART // tokens, NUMBERS_PER_PART // (tokens * n_columns))))


def _fingerprint(graph: Graph, data: TokenData, scope: Scope, means: Means | None, plan: dict[str, Any]) -> str:
    """A hash of all that the usage depends on."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    digest.update(data.fingerprint().encode())
    quotient = [] if scope.quotient is None else [scope.quotient.classes]
    tensors = [*graph.tensors, graph.edge_matrix, *quotient, *(value for _, value in sorted((means or {}).items()))]
    marks = (position_mask(scope, batch) for batch in data.batches(256))
    for tensor in _chain(tensors, marks):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _chain(*parts: Any) -> Iterator[Tensor]:
    for part in parts:
        yield from part


def _start(folder: Path, plan: dict[str, Any]) -> bool:
    """Prepare the folder; whether all is there already."""
    path = folder / MANIFEST
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict) or found.get("fingerprint") != plan["fingerprint"]:
            raise InputError(
                f"{folder} holds the usage of another graph, data set, scope or setting; choose another folder, "
                "or delete it to start afresh"
            )
        return bool(found.get("complete"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and holds no usage; choose a folder of its own")
    write_json(path, {**plan, "complete": False})
    return False


def _write_parts(folder: Path, plan: dict[str, Any], data: TokenData, step: FisherPass, progress: bool | None) -> None:
    """Parts that are there already are left as they are: each is put in place whole."""
    size, per_part = plan["batch_size"], plan["batches_per_part"]
    n_batches = -(-len(data) // size)
    n_parts = -(-n_batches // per_part)
    done = next((k for k in range(n_parts) if not part_path(folder, k).exists()), n_parts)
    rows: list[dict[str, np.ndarray]] = []
    batches = data.batches(size, start=done * per_part)
    start = done * per_part
    for number, batch in enumerate(track(batches, "usage", n_batches - start, show=progress), start + 1):
        rows.append(_rows(batch, step(batch)["usage"], plan["labels"]))
        if number % per_part == 0 or number == n_batches:
            _write_part(part_path(folder, (number - 1) // per_part), rows)
            rows = []


def _rows(batch: Batch, usage: Float[Tensor, "batch pos part"], labels: dict[str, str]) -> dict[str, np.ndarray]:
    """One row for every real token of the batch, with columns named by number."""
    mask = batch.mask.cpu()
    sequence, position = mask.nonzero(as_tuple=True)
    tokens = torch.full(mask.shape, -1) if batch.inputs.is_floating_point() else batch.inputs.cpu()
    out = {"sequence": batch.index[sequence].int(), "position": position.int(), "token": tokens[mask].int()}
    for k, (name, kind) in enumerate(labels.items()):
        value = batch.labels[name].cpu()
        value = value[sequence] if kind == "sequence" else value[:, : mask.shape[1]][mask]
        out[f"l{k}"] = value if value.dtype == torch.bool or not value.is_floating_point() else value.double()
    return {name: value.numpy() for name, value in out.items()} | {"usage": usage.float().cpu()[mask].numpy()}


def _write_part(path: Path, rows: list[dict[str, np.ndarray]]) -> None:
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    usage = np.ascontiguousarray(joined.pop("usage").T)
    table = pa.table({**joined, **{f"u{k}": column for k, column in enumerate(usage)}})

    def write(temporary: Path) -> None:
        try:
            # noise in 32 bits: compression would take time and save nothing
            packed = {name: "zstd" if name in joined else "none" for name in table.column_names}
            parquet.write_table(table, temporary, row_group_size=len(table), compression=packed, use_dictionary=False)
        except pa.ArrowException as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    write_atomic(path, write)
