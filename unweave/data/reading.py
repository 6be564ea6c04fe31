"""Documents, text or ids, from files, folders, zoo rooms and hub data sets, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from unweave.errors import CorruptFileError, EmptyDataError, InputError, MissingExtraError, ShapeError, StorageError

__all__ = ["Piece", "SUFFIXES", "numbered_lines", "open_array", "open_npy", "pieces"]

SUFFIXES = (".jsonl", ".npy", ".safetensors", ".txt")


# a longer text document is tokenised in pieces cut at line ends, so that no file has to fit in memory
PIECE_CHARACTERS = 1 << 20


# (is it the first piece of a document, its text or its ids)
Piece = tuple[bool, str | np.ndarray]


def pieces(name: str, text_field: str, where: dict[str, Any], split: str) -> Iterator[Piece]:
    """(is it a document's first piece, its text or its ids) of whatever ``name`` names."""
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


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped."""
    try:
        # copy on write: nothing is read before it is used, and the file is never changed
        array = np.load(path, allow_pickle=False, mmap_mode="c")
    except (ValueError, OSError, EOFError) as error:
        raise CorruptFileError(f"{path}: not a plain .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CorruptFileError(f"{path}: an archive of arrays, not one .npy array")
    return array


def open_npy(path: Path) -> np.ndarray:
    """Token ids of a .npy file, mapped."""
    return _integer_ids(path, open_array(path))


def _integer_ids(path: Path, array: np.ndarray) -> np.ndarray:
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path}: token ids must be integers [n, pos] or [n], got {array.dtype} {array.shape}")
    return array


def _read_npy(path: Path) -> Iterator[Piece]:
    array = open_npy(path)
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
