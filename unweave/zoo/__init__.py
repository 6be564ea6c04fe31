"""Models whose mechanism is known: small enough to bundle, real enough to be worth decompiling."""

from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from unweave.errors import UnknownNameError
from unweave.files import read_json
from unweave.zoo import induction, modular_addition
from unweave.zoo.toy import ToyConfig, ToyTransformer

__all__ = ["ROOMS", "ToyConfig", "ToyTransformer", "known", "load", "room", "weights_folder"]

ROOMS: dict[str, ModuleType] = {"induction": induction, "modular_addition": modular_addition}


def room(name: str) -> ModuleType:
    """The module of a room.

    Raises:
        UnknownNameError: there is no such room.
    """
    if name not in ROOMS:
        raise UnknownNameError("zoo model", name, ROOMS)
    return ROOMS[name]


def weights_folder(name: str) -> Path:
    """Where a room's trained weights are."""
    room(name)
    return Path(str(resources.files("unweave.zoo"))) / "weights" / name


def load(name: str) -> ToyTransformer:
    """The trained model of a room.

    Example:
        >>> load("induction").config.n_layers
        2
    """
    return ToyTransformer.load(weights_folder(name))


def known(name: str) -> dict[str, Any]:
    """What is known of the mechanism of a room's trained model, as measured when it was trained.

    Example:
        >>> known("induction")["previous_token_heads"]
        ['blocks.0.attn.head.0']
    """
    return dict(read_json(weights_folder(name) / "config.json").get("known", {}))
