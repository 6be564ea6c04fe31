"""A source and a tokenizer to sequences: what ``unweave.load_data`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from unweave import zoo
from unweave.data.reading import Piece, open_array, open_npy, pieces
from unweave.data.tokens import TokenData, check_ids, float_data, from_tensor, refuse_below
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.progress import track

__all__ = ["load_data"]

# rooms draw their texts: one seed per split
ROOM_SEEDS = {"train": 1, "validation": 2, "test": 3}


def load_data(
    source: str | Path,
    tokenizer: Any = None,
    *,
    context: int | None = None,
    limit: int | None = None,
    text_field: str = "text",
    where: Mapping[str, Any] | None = None,
    vocabulary: int | None = None,
    split: str = "train",
    bos: bool | None = None,
    progress: bool | None = None,
) -> TokenData:
    """Sequences from a file, a folder of files, a hub data set or a zoo room.

    ``.txt`` holds documents with two or more blank lines between them; ``.jsonl`` one document per line
    (``text_field``, or a list of ids under "tokens"); ``.npy`` ids ``[n pos]`` (a document per row) or ``[n]`` (one
    document), or reals ``[n ...]`` (a vector or image each, for networks without a vocabulary); ``.safetensors``
    "tokens" ``[n pos]`` or ``[n]``, with an optional "mask" ``[n pos]`` or "lengths" ``[n]``. A name that is no
    path, or begins with "hub:", is a hub data set. Documents longer than ``context`` are cut into consecutive
    windows; a last window of a single token is left out, and documents of which nothing is left are counted as
    dropped.

    Args:
        tokenizer: what turns text into ids (a Hugging Face tokenizer).
        context: the longest sequence.
        limit: stop after so many sequences.
        text_field: where the text is in a line of .jsonl or a row of a hub data set.
        where: keep only lines or rows whose fields have these values, such as ``{"split": "validation"}``.
        vocabulary: ids must be below it.
        split: of a hub data set; of a zoo room "train", "validation" or "test", each drawn afresh.
        bos: whether each text document starts with the tokenizer's beginning-of-sequence token (only its first
            window has it); None for what the tokenizer does by itself.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        EmptyDataError: nothing usable is left; says what was dropped.
        InputError: text without a tokenizer, bad lines, text that is not UTF-8, ids out of range.
        UnknownNameError: no such zoo room, or no such split of one.
        StorageError: no such file, or it cannot be read.
        CorruptFileError: a broken .npy or .safetensors file.
        MissingExtraError: a hub data set without the ``datasets`` package.

    Cost:
        One pass over the files up to ``limit``. Memory: the ids kept (32 bits, twice while they are packed) and the
        longest line, or 1 MiB of text. A ``.npy`` of signed integers ``[n pos]`` that fits the context is
        mapped, not read.

    Exact?
        A document of more than 1 MiB in a .txt is tokenised in pieces cut at line ends: tokens at those seams may
        differ from those of the whole, and the tokenizer adds its special tokens to every piece.

    Example:
        >>> load_data("zoo:induction", limit=4).tokens.shape
        torch.Size([4, 48])
    """
    refuse_below("context", context, 2)
    refuse_below("limit", limit, 1)
    name = str(source)
    if name.startswith("zoo:"):
        module = zoo.room(name.removeprefix("zoo:"))
        if split not in ROOM_SEEDS:
            raise UnknownNameError("split of a zoo room", split, ROOM_SEEDS)
        seed = ROOM_SEEDS[split]
        inputs, answered = module.data(limit, seed) if limit else module.data(seed=seed)
        if inputs.is_floating_point():
            return dataclasses.replace(float_data(inputs, {"answered": answered}), source=name)
        labels = module.labels(inputs) if hasattr(module, "labels") else {}
        return from_tensor(inputs, labels={"answered": answered, **labels}, source=name, vocabulary=vocabulary)
    if vocabulary is None and (reals := _real_npy(Path(name).expanduser(), limit)) is not None:
        return reals
    mapped = _map_npy(Path(name).expanduser(), context, limit, vocabulary)
    if mapped is not None:
        return mapped
    found = track(pieces(name, text_field, dict(where or {}), split), f"reading {Path(name).name}", show=progress)
    return _pack(found, _encoder(tokenizer, bos, name), context, limit, vocabulary, name)


def _real_npy(path: Path, limit: int | None) -> TokenData | None:
    """Vectors or images ``[n ...]`` of reals, flattened to one vector each; None if the file holds anything else."""
    if path.suffix != ".npy" or not path.is_file() or path.stat().st_size == 0:
        return None
    array = open_array(path)
    if array.ndim < 2 or not np.issubdtype(array.dtype, np.floating):
        return None
    rows = torch.from_numpy(np.array(array[:limit], np.float32))
    return dataclasses.replace(float_data(rearrange(rows, "n ... -> n (...)")), source=str(path))


def _map_npy(path: Path, context: int | None, limit: int | None, vocabulary: int | None) -> TokenData | None:
    """A data set straight from the disk, where the file's rows can be used as they are."""
    if path.suffix != ".npy" or not path.is_file() or path.stat().st_size == 0:
        return None
    array = open_npy(path)
    usable = array.ndim == 2 and len(array) > 0 and 2 <= array.shape[1] <= (context or array.shape[1])
    if not usable or array.dtype not in (np.int16, np.int32, np.int64) or not array.dtype.isnative:
        return None
    array = array[:limit]
    check_ids(array, vocabulary, str(path))
    tokens = torch.from_numpy(array)
    mask = torch.ones(1, 1, dtype=torch.bool).expand(tokens.shape)
    return TokenData(tokens, mask, {}, torch.arange(len(array)), str(path), 0, vocabulary)


def _pack(
    pieces: Iterable[Piece],
    encode: Callable[[str], list[int]],
    context: int | None,
    limit: int | None,
    vocabulary: int | None,
    source: str,
) -> TokenData:
    rows: list[np.ndarray] = []
    origin: list[int] = []
    seen = 0
    for first, content in pieces:
        seen += first
        ids = np.asarray(encode(content), dtype=np.int64) if isinstance(content, str) else content
        for window in _windows(ids, context):
            check_ids(window[None], vocabulary, source, first_row=len(rows))
            rows.append(window.astype(np.int32))
            origin.append(seen - 1)
            if len(rows) == limit:
                break
        if len(rows) == limit:
            break
    dropped = seen - len(set(origin))
    if not rows:
        why = f"{dropped} of {seen} documents have fewer than 2 tokens" if seen else "it is empty, or no line matches"
        raise EmptyDataError(f"{source}: nothing to read: {why}")
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int32)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = True
    return TokenData(tokens, mask, {}, torch.tensor(origin), source, dropped, vocabulary)


def _windows(ids: np.ndarray, context: int | None) -> Iterator[np.ndarray]:
    """Consecutive windows; a single token predicts nothing and is left out."""
    for start in range(0, len(ids) - 1, context or max(len(ids), 1)):
        yield ids[start : start + context] if context else ids


def _encoder(tokenizer: Any, bos: bool | None, source: str) -> Callable[[str], list[int]]:
    def refuse(text: str) -> list[int]:
        raise InputError(
            f"{source} holds text and there is no tokenizer: give a model folder that has one, pass tokenizer=..., "
            "or give token ids (.npy, .safetensors, or 'tokens' in .jsonl)"
        )

    if tokenizer is None:
        return refuse
    start = getattr(tokenizer, "bos_token_id", None)
    if bos and start is None:
        raise InputError("bos=True, but the tokenizer has no beginning-of-sequence token; leave bos out")

    def encode(text: str) -> list[int]:
        ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if bos is None or start is None:
            return ids
        without = ids[1:] if ids[:1] == [start] else ids
        return [start, *without] if bos else without

    return encode
