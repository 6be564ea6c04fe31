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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unweave import zoo
from unweave.errors import CorruptFileError, EmptyDataError, InputError, MissingExtraError, ShapeError, StorageError
from unweave.progress import track

__all__ = ["Batch", "TokenData", "float_data", "from_tensor", "load_data", "numbered_lines"]

SUFFIXES = (".jsonl", ".npy", ".safetensors", ".txt")
# a longer text document is tokenised in pieces cut at line ends, so that no file has to fit in memory
PIECE_CHARACTERS = 1 << 20
# rows checked or hashed at once, so that a memory-mapped data set is never read as a whole
ROWS_AT_ONCE = 4096

# (is it the first piece of a document, its text or its ids)
Piece = tuple[bool, str | np.ndarray]


@dataclass(frozen=True, eq=False)
class Batch:
    """A few sequences, padded on the right.

    Attributes:
        inputs: token ids ``[batch pos]`` (int64), or reals ``[batch pos features]``.
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
    """Sequences of one data set: ids of at most 64 bits, in memory (32 bits) or mapped from a .npy file.

    Attributes:
        tokens: ids ``[n pos]`` padded on the right with 0 (or reals ``[n pos features]``).
        mask: True where a token is real; each row is True, then False.
        labels: anything known per sequence.
        documents: which document each sequence was cut from.
        source: where it came from, for people.
        dropped: how many documents were too short to use.
        vocabulary_size: what the ids were checked against, if anything.

    Raises:
        ShapeError: mask, labels and documents do not fit the tokens.
        InputError: the padding is not on the right.
    """

    tokens: Int[Tensor, "n pos"] | Float[Tensor, "n pos features"]
    mask: Bool[Tensor, "n pos"]
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    documents: Int[Tensor, " n"] | None = None
    source: str = ""
    dropped: int = 0
    vocabulary_size: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape[:2] != self.mask.shape:
            raise ShapeError(f"mask must have shape {tuple(self.tokens.shape[:2])}, got {tuple(self.mask.shape)}")
        for name, value in self.labels.items():
            if value.shape[:1] != self.tokens.shape[:1]:
                raise ShapeError(f"label {name!r} has shape {tuple(value.shape)} for {len(self.tokens)} sequences")
        if self.documents is not None and self.documents.shape != self.tokens.shape[:1]:
            raise ShapeError(f"documents must name one for each of {len(self.tokens)} sequences")
        for start, rows in _row_blocks(self.mask):
            gap = (rows[:, 1:] & ~rows[:, :-1]).any(1)
            if bool(gap.any()):
                row = start + int(gap.nonzero()[0, 0])
                raise InputError(f"sequence {row} has a real token after padding; move its padding to the right")

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        what = "tokens" if self.tokens.ndim == 2 else f"vectors of {self.tokens.shape[2]} numbers"
        labels = f", labels {', '.join(self.labels)}" if self.labels else ""
        source = f" from {self.source}" if self.source else ""
        return f"TokenData({len(self)} sequences of up to {self.tokens.shape[1]} {what}{source}{labels})"

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """How many real tokens each sequence has."""
        return self.mask.sum(1)

    @property
    def n_tokens(self) -> int:
        """How many real tokens there are."""
        return int(self.mask.sum())

    def batches(self, batch_size: int = 16, *, start: int = 0, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Batches in order, or shuffled; ``start`` skips that many batches (to resume).

        A batch is as wide as its longest sequence.

        Raises:
            InputError: ``batch_size`` below 1 or ``start`` below 0.
        """
        _refuse_below("batch_size", batch_size, 1)
        _refuse_below("start", start, 0)
        order = torch.arange(len(self))
        if shuffle_seed is not None:
            order = order[torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))]
        for rows in order.split(batch_size)[start:] if len(self) else ():
            longest = max(int(self.mask[rows].sum(1).max()), 1)
            inputs = self.tokens[rows, :longest]
            inputs = inputs if inputs.is_floating_point() else inputs.long()
            labels = {name: value[rows] for name, value in self.labels.items()}
            yield Batch(inputs, self.mask[rows, :longest], labels, rows)

    def select(self, which: Tensor | Sequence[int] | slice | Callable[[Batch], Tensor]) -> TokenData:
        """Some of the sequences: by number, boolean mask, slice, or a function of a batch that marks sequences.

        Raises:
            InputError: a number is outside the data set, or a mask has the wrong length.

        Example:
            >>> data = from_tensor(torch.tensor([[1, 2], [3, 4]]))
            >>> data.select(lambda batch: batch.inputs[:, 0] > 2).tokens.tolist()
            [[3, 4]]
        """
        if callable(which):
            marks = [which(batch).bool() for batch in self.batches(ROWS_AT_ONCE)]
            which = torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)
        if isinstance(which, slice):
            rows = torch.arange(len(self))[which]
        else:
            which = which if isinstance(which, Tensor) else torch.tensor(list(which), dtype=_index_dtype(which))
            rows = _row_numbers(which, len(self))
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            labels={name: value[rows] for name, value in self.labels.items()},
            documents=None if self.documents is None else self.documents[rows],
        )

    def split(self, held_out: float | int = 0.1, seed: int = 0) -> tuple[TokenData, TokenData]:
        """(calibration, held out), disjoint; no document is on both sides. The same for the same seed.

        Args:
            held_out: a share of the documents (a float between 0 and 1), or a number of sequences (an int):
                whole documents are drawn until there are that many.
            seed: which documents are drawn.

        Raises:
            InputError: the share is not between 0 and 1, or the number is below 1.
            EmptyDataError: too few documents for two parts.
        """
        if isinstance(held_out, int):
            _refuse_below("held_out", held_out, 1)
        elif not 0 < held_out < 1:
            raise InputError(f"held_out must be between 0 and 1, got {held_out}")
        documents = self.documents if self.documents is not None else torch.arange(len(self))
        names, sizes = documents.unique(return_counts=True)
        if len(names) < 2:
            raise EmptyDataError(
                f"{self.source or 'the data'} holds {len(names)} document(s) and a held-out split needs 2; give more "
                "documents (two blank lines between them in .txt, one per line in .jsonl, one per row in .npy)"
            )
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        if isinstance(held_out, int):
            cut = int((sizes[order].cumsum(0) < held_out).sum()) + 1
            if cut >= len(names):
                raise EmptyDataError(f"{held_out} sequences held out of {len(self)} would leave none; hold out fewer")
        else:
            cut = min(max(1, round(held_out * len(names))), len(names) - 1)
        held = torch.isin(documents, names[order[:cut]])
        return self.select(~held), self.select(held)

    def fingerprint(self) -> str:
        """A hash of tokens, mask and labels, to tell whether a checkpoint belongs to them."""
        digest = hashlib.sha256()
        for name, value in {"": self.tokens, " mask": self.mask, **dict(sorted(self.labels.items()))}.items():
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            for _, rows in _row_blocks(value):
                # bytes, since numpy has no bfloat16
                flat = rows.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _row_blocks(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), ROWS_AT_ONCE):
        yield start, x[start : start + ROWS_AT_ONCE]


def _refuse_below(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def _index_dtype(which: Sequence[int]) -> torch.dtype:
    return torch.bool if len(which) and all(isinstance(i, (bool, np.bool_)) for i in which) else torch.int64


def _row_numbers(which: Tensor, n: int) -> Int[Tensor, " rows"]:
    """Row numbers from numbers (negative ones from the end) or a boolean mask."""
    which = which.cpu()
    if which.dtype == torch.bool:
        if which.shape != (n,):
            raise InputError(f"a boolean mask over {n} sequences must have shape ({n},), got {tuple(which.shape)}")
        return which.nonzero()[:, 0]
    if which.ndim != 1 or which.is_floating_point():
        raise InputError(f"sequences are chosen by integers [n], got {which.dtype} {tuple(which.shape)}")
    outside = which[(which < -n) | (which >= n)]
    if len(outside):
        raise InputError(f"there is no sequence {int(outside[0])}: the data set holds {n}")
    return which.long() % max(n, 1)


def from_tensor(
    tokens: Tensor,
    mask: Tensor | None = None,
    labels: Mapping[str, Tensor] | None = None,
    source: str = "tensor",
    vocabulary: int | None = None,
) -> TokenData:
    """Token ids ``[n pos]`` as a data set.

    Args:
        mask: nonzero where a token is real, padding on the right; all of them when missing.
        labels: anything known per sequence, sequences first.
        vocabulary: ids must be below it.

    Raises:
        ShapeError: not integers ``[n pos]``, or mask or labels do not fit.
        InputError: an id is negative or outside the vocabulary, or padding is not on the right.

    Example:
        >>> from_tensor(torch.tensor([[1, 2, 3]])).n_tokens
        3
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ShapeError(f"token ids must be integers [n, pos], got {tokens.dtype} {tuple(tokens.shape)}")
    tokens = tokens.detach().cpu()
    mask = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    if mask.shape != tokens.shape:
        raise ShapeError(f"mask must have shape {tuple(tokens.shape)}, got {tuple(mask.shape)}")
    # what stands in the padding means nothing (-100 is common) and must not reach an embedding
    tokens = tokens.masked_fill(~mask, 0)
    _check_ids(tokens.numpy(), vocabulary, source)
    return TokenData(tokens.to(torch.int32), mask, dict(labels or {}), source=source, vocabulary_size=vocabulary)


def float_data(x: Float[Tensor, "n features"], labels: Mapping[str, Tensor] | None = None) -> TokenData:
    """Real vectors as a data set of sequences of one position, for plain MLPs.

    Raises:
        ShapeError: not reals ``[n features]``.
        InputError: NaN or inf.

    Example:
        >>> next(float_data(torch.zeros(3, 5)).batches(2)).inputs.shape
        torch.Size([2, 1, 5])
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ShapeError(f"inputs must be reals [n, features], got {x.dtype} {tuple(x.shape)}")
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        raise InputError(f"input {int((~finite).nonzero()[0, 0])} holds NaN or inf; drop it or mend it")
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
    bos: bool | None = None,
    progress: bool | None = None,
) -> TokenData:
    """Sequences from a file, a folder of files, a hub data set or a zoo room.

    ``.txt`` holds documents with two or more blank lines between them; ``.jsonl`` one document per line
    (``text_field``, or a list of ids under "tokens"); ``.npy`` ids ``[n pos]`` (a document per row) or ``[n]`` (one
    document); ``.safetensors`` "tokens" ``[n pos]`` or ``[n]``, with an optional "mask" ``[n pos]`` or "lengths"
    ``[n]``. A name that is no path, or begins with "hub:", is a hub data set. Documents longer than ``context`` are
    cut into consecutive windows; a last window of a single token is left out, and documents of which nothing is left
    are counted as dropped.

    Args:
        tokenizer: what turns text into ids (a Hugging Face tokenizer).
        context: the longest sequence.
        limit: stop after so many sequences.
        text_field: where the text is in a line of .jsonl or a row of a hub data set.
        where: keep only lines or rows whose fields have these values, such as ``{"split": "validation"}``.
        vocabulary: ids must be below it.
        split: of a hub data set.
        bos: whether each text document starts with the tokenizer's beginning-of-sequence token (only its first
            window has it); None for what the tokenizer does by itself.
        progress: show a bar; by default where stderr is a terminal.

    Raises:
        EmptyDataError: nothing usable is left; says what was dropped.
        InputError: text without a tokenizer, bad lines, text that is not UTF-8, ids out of range.
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
    _refuse_below("context", context, 2)
    _refuse_below("limit", limit, 1)
    name = str(source)
    if name.startswith("zoo:"):
        module = zoo.room(name.removeprefix("zoo:"))
        inputs, answered = module.data(limit) if limit else module.data()
        if inputs.is_floating_point():
            return dataclasses.replace(float_data(inputs, {"answered": answered}), source=name)
        labels = module.labels(inputs) if hasattr(module, "labels") else {}
        return from_tensor(inputs, labels={"answered": answered, **labels}, source=name, vocabulary=vocabulary)
    mapped = _map_npy(Path(name).expanduser(), context, limit, vocabulary)
    if mapped is not None:
        return mapped
    pieces = track(_pieces(name, text_field, dict(where or {}), split), f"reading {Path(name).name}", show=progress)
    return _pack(pieces, _encoder(tokenizer, bos, name), context, limit, vocabulary, name)


# ---- readers: each yields pieces of documents -----------------------------------------------------------


def _pieces(name: str, text_field: str, where: dict[str, Any], split: str) -> Iterator[Piece]:
    path = Path(name).expanduser()
    if name.startswith("hub:"):
        yield from _read_hub(name.removeprefix("hub:"), text_field, where, split)
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not files:
            raise EmptyDataError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _read_file(file, text_field, where)
    elif path.is_file():
        yield from _read_file(path, text_field, where)
    elif path.suffix in SUFFIXES or name.startswith(("/", ".", "~")):
        raise StorageError(f"{path} does not exist")
    else:
        yield from _read_hub(name, text_field, where, split)


def _read_file(path: Path, text_field: str, where: dict[str, Any]) -> Iterator[Piece]:
    readers: dict[str, Callable[[Path], Iterator[Piece]]]
    readers = {".txt": _read_txt, ".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, text_field, where)
    elif path.suffix not in readers:
        raise InputError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    elif path.stat().st_size > 0:
        yield from readers[path.suffix](path)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line of a UTF-8 file, one in memory at a time."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}:{number} is not UTF-8: a bad byte at offset {offset + error.start} of the file; "
                        "save it as UTF-8"
                    ) from error
                offset += len(raw)
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _read_txt(path: Path) -> Iterator[Piece]:
    kept: list[str] = []
    blanks: list[str] = []
    first, size = True, 0
    for _, raw in numbered_lines(path):
        line = raw.rstrip("\r\n")
        if not line.strip():
            blanks.append(line)
            continue
        ends = len(blanks) >= 2
        if kept and (ends or size > PIECE_CHARACTERS):
            yield first, "\n".join(kept) + ("" if ends else "\n")
            kept, first, size = [] if ends else blanks, ends, 0
        elif kept:
            kept += blanks
        kept.append(line)
        size += len(line) + 1
        blanks = []
    if kept:
        yield first, "\n".join(kept)


def _read_jsonl(path: Path, text_field: str, where: dict[str, Any]) -> Iterator[Piece]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or (text_field not in row and "tokens" not in row):
            raise InputError(f"{path}:{number}: needs an object with {text_field!r} or 'tokens'")
        if all(row.get(key) == value for key, value in where.items()):
            yield True, _content(row[text_field] if text_field in row else row["tokens"], f"{path}:{number}")


def _content(value: Any, place: str) -> str | np.ndarray:
    try:
        if isinstance(value, str):
            value.encode("utf-8")
            return value
        if isinstance(value, list) and all(type(i) is int for i in value):
            return np.array(value, dtype=np.int64)
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half of a surrogate pair at character {error.start} is no text") from error
    except OverflowError as error:
        raise InputError(f"{place}: a token id has more than 64 bits") from error
    raise InputError(f"{place}: must be text or a list of token ids, got {type(value).__name__}")


def _open_npy(path: Path) -> np.ndarray:
    try:
        # copy on write: nothing is read before it is used, and the file is never changed
        array = np.load(path, allow_pickle=False, mmap_mode="c")
    except (ValueError, OSError, EOFError) as error:
        raise CorruptFileError(f"{path}: not a plain .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CorruptFileError(f"{path}: an archive of arrays, not one .npy array")
    return _integer_ids(path, array)


def _integer_ids(path: Path, array: np.ndarray) -> np.ndarray:
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path}: token ids must be integers [n, pos] or [n], got {array.dtype} {array.shape}")
    return array


def _map_npy(path: Path, context: int | None, limit: int | None, vocabulary: int | None) -> TokenData | None:
    """A data set straight from the disk, where the file's rows can be used as they are."""
    if path.suffix != ".npy" or not path.is_file() or path.stat().st_size == 0:
        return None
    array = _open_npy(path)
    usable = array.ndim == 2 and len(array) > 0 and 2 <= array.shape[1] <= (context or array.shape[1])
    if not usable or array.dtype not in (np.int16, np.int32, np.int64) or not array.dtype.isnative:
        return None
    array = array[:limit]
    _check_ids(array, vocabulary, str(path))
    tokens = torch.from_numpy(array)
    mask = torch.ones(1, 1, dtype=torch.bool).expand(tokens.shape)
    return TokenData(tokens, mask, {}, torch.arange(len(array)), str(path), 0, vocabulary)


def _read_npy(path: Path) -> Iterator[Piece]:
    array = _open_npy(path)
    for row in array[None] if array.ndim == 1 else array:
        yield True, row


def _read_safetensors(path: Path) -> Iterator[Piece]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = sorted(file.keys())
            arrays = {name: file.get_tensor(name) for name in ("tokens", "mask", "lengths") if name in names}
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise CorruptFileError(f"{path}: not a valid safetensors file: {error}") from error
    if "tokens" not in arrays:
        raise InputError(f"{path} has no tensor named 'tokens'; it has {names[:5]}")
    tokens = np.atleast_2d(_integer_ids(path, arrays["tokens"]))
    mask = _stored_mask(path, tokens, arrays)
    for row, real in zip(tokens, mask, strict=True):
        yield True, row[real]


def _stored_mask(path: Path, tokens: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if "mask" in arrays:
        mask = np.atleast_2d(arrays["mask"]).astype(bool)
        if mask.shape != tokens.shape:
            raise ShapeError(f"{path}: 'mask' must have the shape of 'tokens', {tokens.shape}, got {mask.shape}")
        return mask
    lengths = np.atleast_1d(arrays.get("lengths", np.full(len(tokens), tokens.shape[1])))
    if lengths.shape != tokens.shape[:1] or ((lengths < 0) | (lengths > tokens.shape[1])).any():
        raise ShapeError(f"{path}: 'lengths' must be {len(tokens)} numbers from 0 to {tokens.shape[1]}")
    return np.arange(tokens.shape[1]) < lengths[:, None]


def _read_hub(name: str, text_field: str, where: dict[str, Any], split: str) -> Iterator[Piece]:
    try:
        import datasets
    except ImportError as error:
        purpose = f"reading the hub data set {name!r} (there is no such file here)"
        raise MissingExtraError("datasets", "datasets", purpose) from error
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the hub data set {name!r}, split {split!r}, cannot be opened: {error}") from error
    for number, row in enumerate(rows):
        if text_field not in row:
            raise InputError(f"{name}: its rows have no field {text_field!r}; they have {sorted(row)}")
        if all(row.get(key) == value for key, value in where.items()):
            yield True, _content(row[text_field], f"{name}, row {number}")


# ---- from pieces to sequences ---------------------------------------------------------------------------


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
            _check_ids(window[None], vocabulary, source, first_row=len(rows))
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


def _check_ids(rows: np.ndarray, vocabulary: int | None, source: str, first_row: int = 0) -> None:
    top = 2**31 if vocabulary is None else vocabulary
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        bad = np.argwhere((block < 0) | (block >= top))
        if len(bad):
            row, pos = bad[0]
            raise InputError(
                f"{source}: sequence {first_row + start + row} holds token id {block[row, pos]} at position {pos}, "
                f"outside the vocabulary of {top}; was it made with another tokenizer?"
            )


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
