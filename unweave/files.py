"""Writing files and folders so that nothing is ever lost or half-written, and checkpoints of long passes.

Everything is written under a temporary name beside its place, pushed to the disk and renamed: whoever looks,
after a kill or a full disk too, finds the old content or the new. A kill can leave a hidden ``.name.*.part``
behind; nothing reads it, and it may be deleted.

Reading is for files nobody vouches for: plain JSON of bounded size and depth, and safetensors; never code.
"""

from __future__ import annotations

import ctypes
import glob
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unweave.errors import CorruptFileError, InputError, StorageError

__all__ = [
    "Checkpoint",
    "decode_json",
    "encode_json",
    "read_json",
    "read_tensors",
    "write_atomic",
    "write_bytes",
    "write_folder",
    "write_json",
    "write_tensors",
    "write_text",
]

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_JSON_DEPTH = 64
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of Linux's renameat2


# ---- writing -------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then rename it over: old or new, never half.

    Folders on the way are made. Ctrl-C goes through, after the temporary file is removed.

    Raises:
        StorageError: it could not be written (a full disk, no permission); the old file is untouched.
    """
    path = Path(path)
    temporary = _beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the user's umask asks for: safetensors makes its files private
        write(temporary)
        temporary.chmod(mode)
        _sync_file(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}; nothing was changed") from error
    finally:
        with suppress(OSError):  # it is gone, or its folder never was
            temporary.unlink()


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder next to ``folder``, then put it in place of what was there.

    A folder that exists is exchanged in one step on Linux. Elsewhere, and on file systems that cannot, it
    takes two renames; a kill just between them leaves the old folder whole as ``.name.*.old``.

    Raises:
        StorageError: it could not be written; what was there before is untouched.
    """
    folder = Path(os.path.realpath(folder))  # through a link: replace what it leads to, not the link
    temporary = _beside(folder, "part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        _sync_folder(temporary)
        _put_in_place(temporary, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        reason = error.__cause__ or error  # the cause of a StorageError speaks of no temporary name
        raise StorageError(f"cannot write {folder}: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        StorageError: it could not be written; the old file is untouched.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Raises:
        InputError: the text holds a lone surrogate, which UTF-8 cannot.
        StorageError: it could not be written; the old file is untouched.
    """
    write_bytes(path, _utf8(text))


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data as JSON, atomically.

    Raises:
        InputError: the value is not plain data, or holds NaN or infinity.
        StorageError: it could not be written; the old file is untouched.
    """
    write_bytes(path, encode_json(value))


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, atomically; from any device, in any strides, bit by bit.

    Raises:
        InputError: a name or dtype that the format does not have.
        StorageError: it could not be written; the old file is untouched.

    Cost:
        A second copy of the tensors while it lasts.
    """
    if "__metadata__" in tensors:
        raise InputError("no tensor can be named '__metadata__': safetensors keeps its notes there")
    # a copy, since the format refuses views of one storage, and tensors read by read_tensors are such views
    plain = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    try:
        write_atomic(path, lambda temporary: save_file(plain, str(temporary), dict(metadata or {})))
    except (KeyError, UnicodeEncodeError) as error:
        raise InputError(f"cannot write {path}: safetensors has no dtype or name {error}") from error


def encode_json(value: Any) -> bytes:
    """Plain data as JSON in UTF-8.

    Raises:
        InputError: the value is not plain data, or holds NaN or infinity.

    Example:
        >>> decode_json(encode_json({"kl_nats": 0.1}), "here")
        {'kl_nats': 0.1}
    """
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"not plain JSON data (finite numbers, strings, lists, dicts): {error}") from error
    return _utf8(text)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of the text is a lone surrogate; replace it") from error


def _beside(path: Path, ending: str) -> Path:
    """A name of its own in the same folder, hence on the same file system; hidden, and never too long."""
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.{ending}"


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can, and the content is safe: only the rename could be lost
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(new: Path, folder: Path) -> None:
    """Make ``folder`` name what ``new`` named; what was there before, ``new`` names then, or it is gone."""
    if not folder.exists():
        os.replace(new, folder)
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    if _exchange(new, folder):
        return
    old = _beside(folder, "old")
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        if not folder.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange what two names stand for, in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


# ---- reading -------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """Read a JSON file nobody vouches for.

    Raises:
        StorageError: it cannot be read.
        CorruptFileError: too large, too deep, not UTF-8, not JSON, or a number that is not finite.
    """
    path = Path(path)
    try:
        _need_file(path)
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    return decode_json(content, str(path))


def decode_json(content: bytes, where: str) -> Any:
    """Plain data from JSON nobody vouches for; ``where`` names it in messages.

    Raises:
        CorruptFileError: too large, too deep, not UTF-8, not JSON, or a number that is not finite.

    Cost:
        Up to about 20 times the size of the content in memory: at most 1.4 GB.
    """
    if len(content) > MAX_JSON_BYTES:
        raise CorruptFileError(f"{where} is larger than {MAX_JSON_BYTES} bytes, too large for JSON here")
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_number, parse_float=_finite_number)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is not valid JSON: {error}") from error
    level = _containers([value])
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for item in level for inner in _containers(item)]
        if not level:
            return value
    raise CorruptFileError(f"{where} is nested more than {MAX_JSON_DEPTH} deep")


def _containers(item: dict[str, Any] | list[Any]) -> list[dict[str, Any] | list[Any]]:
    children = item.values() if isinstance(item, dict) else item
    return [child for child in children if isinstance(child, (dict, list))]


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file nobody vouches for (the format runs no code).

    The tensors are on the CPU, mapped into memory and read when first looked at; changing one does not change
    the file.

    Raises:
        StorageError: it cannot be read.
        CorruptFileError: its header is broken or does not fit its size.
    """
    path = Path(path)
    try:
        _need_file(path)
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is not a valid safetensors file: {error}") from error


def _need_file(path: Path) -> None:
    if not path.is_file():  # a named pipe would be waited on for ever
        raise StorageError(f"{path} is not a file" if path.exists() else f"{path} does not exist")


# ---- checkpoints ---------------------------------------------------------------------------------------


class Checkpoint:
    """The sums of a long pass, kept in one file so that a killed pass resumes where it stopped.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saver = Checkpoint(Path(folder) / "sums.safetensors", "what is computed, on which data")
        ...     saver.save({"total": torch.ones(2)}, {"next_batch": 7})
        ...     tensors, state = saver.load()
        >>> tensors["total"].tolist(), state["next_batch"]
        ([1.0, 1.0], 7)
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved, or None when nothing was.

        Raises:
            InputError: the file belongs to another pass, or is no checkpoint.
            CorruptFileError: it is broken.
        """
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
        except CorruptFileError as error:
            raise CorruptFileError(f"the checkpoint {error}; delete it to start afresh") from error
        if not {"fingerprint", "state"} <= set(metadata):
            raise InputError(f"{self.path} is not a checkpoint of unweave; choose another path")
        if metadata["fingerprint"] != self.fingerprint:
            raise InputError(f"{self.path} is of another pass or other data; delete it to start afresh")
        try:
            state = decode_json(metadata["state"].encode(), "its state")
        except CorruptFileError as error:
            raise CorruptFileError(f"{self.path}: {error}; delete it to start afresh") from error
        if not isinstance(state, dict):
            raise CorruptFileError(f"{self.path}: its state is not an object; delete it to start afresh")
        return tensors, state

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace what is saved, tensors and state together.

        Raises:
            InputError: the state is not plain JSON data.
            StorageError: it could not be written; what was saved before is untouched.
        """
        text = encode_json(dict(state)).decode()
        write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, "state": text})

    def clear(self) -> None:
        """Forget it, the pass is done; what a kill in the middle of :meth:`save` left behind goes too."""
        self.path.unlink(missing_ok=True)
        for left in self.path.parent.glob(f".{glob.escape(self.path.name[:40])}.????????.part"):
            left.unlink(missing_ok=True)
