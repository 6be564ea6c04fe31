"""Token sequences: from files, hub data sets and zoo rooms to batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from unweave import zoo
from unweave.errors import CorruptFileError, EmptyDataError, InputError, MissingExtraError, ShapeError, StorageError
from unweave.progress import track

__all__ = ["Batch", "TokenData", "float_data", "from_tensor", "load_data"]

SUFFIXES = (".jsonl", ".npy", ".safetensors", ".txt")


@dataclass(frozen=True, eq=False)
class Batch:
    """A few sequences, padded on the right.

    Attributes:
        inputs: token ids ``[batch pos]``, or reals ``[batch pos features]``.
        mask: True where a token is real.
        labels: anything known per sequence, batch first.
        index: each sequence's number in the data set.
    """

    inputs: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos features"]
    mask: Bool[Tensor, "batch pos"]
    labels: Mapping[str, Tensor]
    index: Int[Tensor, " batch"]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        labels = {name: value.to(device) for name, value in self.labels.items()}
        return Batch(self.inputs.to(device), self.mask.to(device), labels, self.index.to(device))


@dataclass(frozen=True, eq=False)
class TokenData:
    """Sequences of one data set, all in memory as 32-bit ids.

    Attributes:
        tokens: ids ``[n pos]`` padded on the right with 0 (or reals ``[n pos features]``).
        mask: True where a token is real.
        labels: anything known per sequence.
        documents: which document each sequence was cut from.
        source: where it came from, for people.
        dropped: how many documents were too short to use.
    """

    tokens: Int[Tensor, "n pos"] | Float[Tensor, "n pos features"]
    mask: Bool[Tensor, "n pos"]
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Int[Tensor, " n"] | None = None
    source: str = ""
    dropped: int = 0

    def __post_init__(self) -> None:
        if self.tokens.shape[:2] != self.mask.shape:
            raise ShapeError(f"mask must have shape {tuple(self.tokens.shape[:2])}, got {tuple(self.mask.shape)}")
        for name, value in self.labels.items():
            if len(value) != len(self.tokens):
                raise ShapeError(f"label {name!r} has {len(value)} rows for {len(self.tokens)} sequences")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.mask.sum())

    def batches(self, batch_size: int = 16, *, start: int = 0, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Batches in order, or shuffled; ``start`` skips that many batches (to resume)."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            order = order[torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))]
        for rows in order.split(batch_size)[start:] if len(self) else ():
            longest = max(int(self.mask[rows].sum(1).max()), 1)
            inputs = self.tokens[rows, :longest]
            inputs = inputs if inputs.is_floating_point() else inputs.long()
            labels = {name: value[rows] for name, value in self.labels.items()}
            yield Batch(inputs, self.mask[rows, :longest], labels, rows)

    def select(self, which: Tensor | Sequence[int] | slice) -> TokenData:
        """Some of the sequences, by number, boolean mask or slice."""
        rows = torch.arange(len(self))[which if isinstance(which, (Tensor, slice)) else torch.tensor(list(which))]
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            labels={name: value[rows] for name, value in self.labels.items()},
            documents=None if self.documents is None else self.documents[rows],
        )

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[TokenData, TokenData]:
        """(calibration, held out), disjoint; no document is on both sides.

        Raises:
            InputError: the share is not between 0 and 1.
            EmptyDataError: too few documents for two parts.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out must be between 0 and 1, got {held_out}")
        documents = self.documents if self.documents is not None else torch.arange(len(self))
        names = documents.unique()
        if len(names) < 2:
            raise EmptyDataError(f"{self.source or 'the data'} holds {len(names)} document(s); a held-out split needs 2")
        shuffled = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
        cut = min(max(1, round(held_out * len(names))), len(names) - 1)
        held = torch.isin(documents, shuffled[:cut])
        return self.select(~held), self.select(held)

    def fingerprint(self) -> str:
        """A hash of the content, to tell whether a checkpoint belongs to it."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        digest.update(self.mask.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def from_tensor(
    tokens: Tensor, mask: Tensor | None = None, labels: Mapping[str, Tensor] | None = None, source: str = "tensor"
) -> TokenData:
    """Token ids ``[n pos]`` as a data set.

    Example:
        >>> from_tensor(torch.tensor([[1, 2, 3]])).n_tokens
        3
    """
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ShapeError(f"token ids must be integers [n, pos], got {tokens.dtype} {tuple(tokens.shape)}")
    mask = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask.bool()
    return TokenData(tokens.to(torch.int32), mask, dict(labels or {}), source=source)


def float_data(x: Float[Tensor, "n features"], labels: Mapping[str, Tensor] | None = None) -> TokenData:
    """Real vectors as a data set of sequences of one position, for plain MLPs."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ShapeError(f"inputs must be reals [n, features], got {x.dtype} {tuple(x.shape)}")
    return TokenData(x[:, None], torch.ones(len(x), 1, dtype=torch.bool), dict(labels or {}), source="reals")


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
    progress: bool | None = None,
) -> TokenData:
    """Sequences from a file, a folder of files, a hub data set or a zoo room.

    ``.txt`` is one document per paragraph group (split at blank lines twice or more), ``.jsonl`` one document per
    line (``text_field``, or a list of ids under "tokens"), ``.npy`` ids ``[n pos]`` or ``[n]``, ``.safetensors``
    "tokens" with an optional "mask". Documents longer than ``context`` are cut into consecutive windows;
    documents of a single token are dropped and counted.

    Args:
        tokenizer: what turns text into ids (a Hugging Face tokenizer).
        context: the longest sequence.
        limit: stop after so many sequences.
        where: keep only lines of a .jsonl whose fields have these values, such as ``{"split": "validation"}``.
        vocabulary: ids must be below it.
        split: of a hub data set.

    Raises:
        EmptyDataError: nothing usable is left; says what was dropped.
        InputError: text without a tokenizer, bad lines, ids out of range.
        StorageError: no such file.
        MissingExtraError: a hub data set without the ``datasets`` package.

    Example:
        >>> load_data("zoo:induction", limit=4).tokens.shape
        torch.Size([4, 48])
    """
    name = str(source)
    if name.startswith("zoo:"):
        module = zoo.room(name.removeprefix("zoo:"))
        tokens, answered = module.data(limit) if limit else module.data()
        return from_tensor(tokens, labels={"answered": answered}, source=name)
    documents = _documents(name, text_field, dict(where or {}), split)
    data = _pack(documents, tokenizer, context, limit, name, progress)
    top = int(data.tokens.max())
    if vocabulary is not None and (top >= vocabulary or int(data.tokens.min()) < 0):
        row = int((data.tokens >= vocabulary).any(1).nonzero()[0, 0]) if top >= vocabulary else 0
        raise InputError(
            f"{name}: sequence {row} holds token id {top}, outside the vocabulary of {vocabulary}; "
            "was it made with another tokenizer?"
        )
    return data


def _documents(name: str, text_field: str, where: dict[str, Any], split: str) -> Iterator[str | list[int]]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise EmptyDataError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _documents(str(file), text_field, where, split)
    elif path.is_file():
        readers: dict[str, Callable[[Path], Iterator[str | list[int]]]]
        readers = {".txt": _read_txt, ".npy": _read_npy, ".safetensors": _read_safetensors}
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_field, where)
        elif path.suffix in readers:
            yield from readers[path.suffix](path)
        else:
            raise InputError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    elif path.suffix in SUFFIXES or name.startswith(("/", ".", "~")):
        raise StorageError(f"{path} does not exist")
    else:
        yield from _read_hub(name, text_field, split)


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: a bad byte at offset {error.start}") from error


def _read_txt(path: Path) -> Iterator[str]:
    text = _decode(path, path.read_bytes())
    for part in text.replace("\r\n", "\n").split("\n\n\n"):
        if part.strip():
            yield part.strip("\n")


def _read_jsonl(path: Path, text_field: str, where: dict[str, Any]) -> Iterator[str | list[int]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(_decode(path, raw))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON: {error.msg}") from error
            if not isinstance(row, dict) or (text_field not in row and "tokens" not in row):
                raise InputError(f"{path}:{number}: needs an object with {text_field!r} or 'tokens'")
            if any(row.get(key) != value for key, value in where.items()):
                continue
            yield _content(row, text_field, f"{path}:{number}")


def _content(row: dict[str, Any], text_field: str, place: str) -> str | list[int]:
    value = row[text_field] if text_field in row else row["tokens"]
    if isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value)):
        return value
    raise InputError(f"{place}: must be text or a list of token ids, got {type(value).__name__}")


def _read_npy(path: Path) -> Iterator[list[int]]:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise CorruptFileError(f"{path}: not a plain .npy array: {error}") from error
    yield from _rows(path, array, None)


def _read_safetensors(path: Path) -> Iterator[list[int]]:
    try:
        arrays = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptFileError(f"{path}: not a valid safetensors file: {error}") from error
    if "tokens" not in arrays:
        raise InputError(f"{path} has no tensor named 'tokens'; it has {sorted(arrays)[:5]}")
    yield from _rows(path, arrays["tokens"], arrays.get("mask"))


def _rows(path: Path, array: Any, mask: Any) -> Iterator[list[int]]:
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path}: token ids must be integers [n, pos] or [n], got {array.dtype} {array.shape}")
    for i, row in enumerate(array[None] if array.ndim == 1 else array):
        yield (row if mask is None else row[mask[i].astype(bool)]).tolist()


def _read_hub(name: str, text_field: str, split: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"reading the hub data set {name!r} (no such file here)") from error
    for row in datasets.load_dataset(name, split=split, streaming=True):
        if text_field not in row:
            raise InputError(f"{name}: its rows have no field {text_field!r}; they have {sorted(row)}")
        yield row[text_field]


def _pack(
    documents: Iterable[str | list[int]],
    tokenizer: Any,
    context: int | None,
    limit: int | None,
    source: str,
    progress: bool | None,
) -> TokenData:
    rows: list[np.ndarray] = []
    origin: list[int] = []
    dropped = seen = 0
    encode = _encoder(tokenizer, source)
    for number, document in enumerate(track(documents, f"reading {Path(source).name}", show=progress)):
        seen += 1
        ids = np.asarray(encode(document) if isinstance(document, str) else document, dtype=np.int32)
        pieces = [ids[i : i + context] for i in range(0, len(ids), context)] if context else [ids]
        usable = [piece for piece in pieces if len(piece) > 1]
        dropped += not usable
        rows += usable
        origin += [number] * len(usable)
        if limit is not None and len(rows) >= limit:
            rows, origin = rows[:limit], origin[:limit]
            break
    if not rows:
        why = f"{dropped} of {seen} documents have fewer than 2 tokens" if seen else "it is empty, or no line matches"
        raise EmptyDataError(f"{source}: nothing to read: {why}")
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int32)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = True
    return TokenData(tokens, mask, {}, torch.tensor(origin), source, dropped)


def _encoder(tokenizer: Any, source: str) -> Callable[[str], list[int]]:
    if tokenizer is None:

        def refuse(text: str) -> list[int]:
            raise InputError(
                f"{source} holds text and there is no tokenizer: give a model folder that has one, pass tokenizer=..., "
                "or give token ids (.npy, .safetensors, or 'tokens' in .jsonl)"
            )

        return refuse
    return lambda text: tokenizer(text, truncation=False, verbose=False)["input_ids"]
