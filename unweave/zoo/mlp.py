"""Plain multilayer perceptrons of the zoo: ``nn.Sequential`` with its sizes in a config."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unweave.errors import CorruptFileError, InputError
from unweave.files import read_tensors, write_json, write_tensors
from unweave.zoo.toy import fill, read_config

__all__ = ["MODEL_TYPE", "MlpConfig", "linear_layers", "load_mlp", "make_mlp", "neuron_effects", "save_mlp"]

MODEL_TYPE = "unweave-mlp"
MAX_WIDTH = 1 << 20
MAX_LAYERS = 128


@dataclass(frozen=True)
class MlpConfig:
    """Sizes of a perceptron with a ReLU after every hidden layer that is not named linear.

    Attributes:
        widths: of the input, of each hidden layer, of the output.
        linear: the hidden layers, counted from 0, that have no ReLU.
    """

    widths: tuple[int, ...]
    name: str = "mlp"
    linear: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.widths, tuple) or not 2 <= len(self.widths) <= MAX_LAYERS:
            raise InputError(f"an MLP has from 2 to {MAX_LAYERS} widths (input, hidden layers, output)")
        if not all(type(n) is int and 0 < n < MAX_WIDTH for n in self.widths) or not isinstance(self.name, str):
            raise InputError(f"widths of an MLP must be positive integers below {MAX_WIDTH}, got {self.widths!r}")
        hidden = range(len(self.widths) - 2)
        if not isinstance(self.linear, tuple) or not all(type(k) is int and k in hidden for k in self.linear):
            raise InputError(f"linear layers must be among the {len(hidden)} hidden ones, got {self.linear!r}")

    @property
    def d_out(self) -> int:
        """How many logits there are."""
        return self.widths[-1]


def make_mlp(config: MlpConfig) -> nn.Sequential:
    """A fresh perceptron; ``nn.Linear`` initialises it.

    Example:
        >>> [type(layer).__name__ for layer in make_mlp(MlpConfig((2, 3, 4)))]
        ['Linear', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(config.widths)):
        layers.append(nn.Linear(before, after))
        if number < len(config.widths) - 2 and number not in config.linear:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def linear_layers(model: nn.Sequential) -> list[nn.Linear]:
    """The linear layers in order."""
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def _without_relu(model: nn.Sequential) -> list[int]:
    """The hidden layers, counted from 0, that no ReLU follows."""
    is_linear = [isinstance(layer, nn.Linear) for layer in model]
    places = [i for i, linear in enumerate(is_linear) if linear]
    return [number for number, i in enumerate(places[:-1]) if is_linear[i + 1]]


def save_mlp(model: nn.Sequential, folder: str | Path, **facts: Any) -> None:
    """Write config.json and model.safetensors; ``facts`` (what is known of the mechanism) go into the config."""
    folder = Path(folder)
    layers = linear_layers(model)
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    write_tensors(folder / "model.safetensors", model.state_dict())
    linear = _without_relu(model)
    shape = {"widths": widths, "linear": linear} if linear else {"widths": widths}
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **shape, **facts})


def load_mlp(folder: str | Path) -> nn.Sequential:
    """The perceptron saved in a folder, in evaluation mode.

    Raises:
        CorruptFileError: config and weights do not fit each other.
        NonFiniteError: a weight is NaN or infinite.
    """
    folder = Path(folder)
    config = read_config(folder, MODEL_TYPE, "an MLP of the zoo")
    widths = config.get("widths")
    if not isinstance(widths, list) or not all(type(n) is int for n in widths):
        raise CorruptFileError(f"{folder}/config.json: widths must be a list of integers, got {widths!r}")
    linear = config.get("linear", [])
    if not isinstance(linear, list):
        raise CorruptFileError(f"{folder}/config.json: linear must be a list of layers, got {linear!r}")
    try:
        settings = MlpConfig(tuple(widths), linear=tuple(linear))
    except InputError as error:
        raise CorruptFileError(f"{folder}/config.json: {error}") from error
    return fill(lambda: make_mlp(settings), read_tensors(folder / "model.safetensors")[0], str(folder))


@torch.no_grad()
def neuron_effects(
    model: nn.Sequential,
    inputs: Float[Tensor, "n features"],
    tasks: dict[str, Int[Tensor, " d_out"]],
) -> dict[str, dict[str, float]]:
    """By neuron and task: the KL, in nats, between the task's answers with and without the neuron. Brute force.

    One neuron at a time is set to its mean over the inputs, and the whole network is run again.

    Args:
        tasks: for each task, the class that each output stands for.

    Returns:
        ``{"layers.0.part.3": {"a": nats, "b": nats}, ...}`` of all hidden neurons.

    Raises:
        InputError: a hidden layer has no ReLU.
    """
    if _without_relu(model):
        raise InputError(f"hidden layers {_without_relu(model)} have no ReLU: there are no neurons to ablate")
    clean = _class_log_p(model(inputs), tasks)
    found: dict[str, dict[str, float]] = {}
    hidden = inputs
    for number, layer in enumerate(linear_layers(model)[:-1]):
        hidden = F.relu(layer(hidden))
        later = list(model)[2 * number + 2 :]
        for neuron in range(hidden.shape[1]):
            x = hidden.clone()
            x[:, neuron] = hidden[:, neuron].mean()
            for module in later:
                x = module(x)
            other = _class_log_p(x, tasks)
            found[f"layers.{number}.part.{neuron}"] = {
                task: float((p.exp() * (p - other[task])).sum(1).mean().clamp(min=0)) for task, p in clean.items()
            }
    return found


def _class_log_p(
    logits: Float[Tensor, "n d_out"], tasks: dict[str, Int[Tensor, " d_out"]]
) -> dict[str, Float[Tensor, "n _"]]:
    p = logits.double().softmax(1)
    return {task: (p @ F.one_hot(classes).double()).clamp(min=1e-30).log() for task, classes in tasks.items()}
