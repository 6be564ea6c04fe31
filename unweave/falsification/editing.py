"""Edits from what a person types, and edited models as folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave import zoo
from unweave.capture import quiet_transformers
from unweave.errors import InputError, StorageError, UnsupportedModelError
from unweave.falsification.edits import Edit, RemoveDirection, ScaleHead, Several, Steer, SwapTokens
from unweave.files import read_tensors, write_folder
from unweave.zoo.toy import ToyTransformer

__all__ = ["read_edit", "save_edited"]


def read_edit(
    remove: Sequence[str] = (), scale: Sequence[str] = (), swap: tuple[str, str] | None = None, tokenizer: Any = None
) -> Several:
    """The edits that the command line names: removals, then scalings, then a swap.

    Args:
        remove: ``NODE:FILE`` each, FILE one vector in ``.npy`` or ``.safetensors``.
        scale: ``NODE=FACTOR`` each.
        swap: two tokens, by text if there is a tokenizer, or by id.

    Raises:
        InputError: none is given, or one is not of that form.
        StorageError: a file cannot be read.

    Example:
        >>> read_edit(scale=["blocks.1.attn.head.0=0.5"]).edits
        (ScaleHead(node='blocks.1.attn.head.0', factor=0.5),)
    """
    edits: list[Edit] = []
    for text in remove:
        node, colon, file = text.partition(":")
        if not (node and colon and file):
            raise InputError(f"a removal is written NODE:FILE, got {text!r}")
        edits.append(RemoveDirection(node, _read_vector(Path(file))))
    for text in scale:
        node, _, factor = text.rpartition("=")
        try:
            edits.append(ScaleHead(node, float(factor)))
        except ValueError as error:
            raise InputError(
                f"a scaling is written NODE=FACTOR, such as blocks.1.attn.head.0=0.5, got {text!r}"
            ) from error
    if swap is not None:
        edits.append(SwapTokens(*(_token(text, tokenizer) for text in swap)))
    if not edits:
        raise InputError("say what to edit: --remove NODE:FILE, --scale NODE=FACTOR or --swap A B")
    return Several(tuple(edits))


def _read_vector(path: Path) -> Float[Tensor, " d_model"]:
    if path.suffix == ".safetensors":
        tensors = list(read_tensors(path)[0].values())
        if len(tensors) != 1:
            raise InputError(f"{path} must hold one vector, it holds {len(tensors)} tensors")
        vector = tensors[0]
    elif path.suffix == ".npy":
        try:
            vector = torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"cannot read {path}: {error}") from error
    else:
        raise InputError(f"a direction is a .npy or .safetensors file, got {path}")
    if vector.ndim != 1 or not vector.is_floating_point():
        raise InputError(f"{path} must hold one vector of reals, it holds {vector.dtype} {tuple(vector.shape)}")
    return vector.float()


def _token(text: str, tokenizer: Any) -> int:
    ids = [] if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    if text.isdecimal():
        return int(text)
    known = f"it is {len(ids)} tokens" if ids else "this model has no tokenizer"
    raise InputError(f"{text!r} is not one token ({known}); give a token's id")


def save_edited(edit: Edit, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Edit a copy of a model and save it in the model's own format, with the tokenizer's files if there are any.

    Raises:
        StorageError: the folder holds something already, or cannot be written.
        UnsupportedModelError: an edit of the state that no weight of the model can hold.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} holds something already; give a new or empty folder")
    for part in edit.edits if isinstance(edit, Several) else (edit,):
        if isinstance(part, Steer) and not part.is_saved(model):
            raise UnsupportedModelError(f"no weight of {type(model).__name__} adds to the stream after {part.after}")
    edited: Any = edit.apply_to_model(model)

    def write(temporary: Path) -> None:
        if isinstance(edited, ToyTransformer | nn.Sequential):
            zoo.save(edited, temporary)
            return
        with quiet_transformers():
            edited.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

    write_folder(folder, write)
