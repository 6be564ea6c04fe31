"""Writing files so that nothing is ever lost or half-written, and checkpoints of long passes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unweave.errors import CorruptFileError, InputError, StorageError

__all__ = ["Checkpoint", "read_json", "read_tensors", "write_atomic", "write_json", "write_tensors", "write_text"]

MAX_JSON_BYTES = 64 * 1024 * 1024


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then rename it over: old or new, never half.

    Raises:
        StorageError: it could not be written (a full disk, no permission); the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_atomic(path, lambda p: _write_bytes(p, text.encode("utf-8")))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data as JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomic(path, lambda p: save_file(plain, str(p), dict(metadata or {})))


def read_json(path: str | Path) -> Any:
    """Read a JSON file nobody vouches for.

    Raises:
        StorageError: it cannot be read.
        CorruptFileError: too large, not UTF-8 or not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CorruptFileError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from error
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist") from error
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot read {path}: {error}") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file nobody vouches for (the format runs no code).

    Raises:
        StorageError: it does not exist.
        CorruptFileError: its header or size is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise StorageError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise CorruptFileError(f"{path} is not a valid safetensors file: {error}") from error


class Checkpoint:
    """The sums of a long pass, kept in one file so that a killed pass resumes where it stopped."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved, or None when nothing was.

        Raises:
            InputError: the file belongs to another pass.
            CorruptFileError: it is broken.
        """
        if not self.path.exists():
            return None
        tensors, metadata = read_tensors(self.path)
        if metadata.get("fingerprint") != self.fingerprint:
            raise InputError(f"{self.path} is the checkpoint of another pass or other data; delete it to start afresh")
        try:
            return tensors, json.loads(metadata["state"])
        except (KeyError, json.JSONDecodeError) as error:
            raise CorruptFileError(f"{self.path}: its state is missing or broken; delete it to start afresh") from error

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace what is saved."""
        write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, "state": json.dumps(state)})

    def clear(self) -> None:
        """Forget it: the pass is done."""
        self.path.unlink(missing_ok=True)
