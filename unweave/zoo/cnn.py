"""Small convolutional networks of the zoo: ``nn.Sequential`` with its sizes in a config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unweave.errors import CorruptFileError, InputError
from unweave.files import read_tensors, write_json, write_tensors
from unweave.zoo.toy import fill, read_config

__all__ = ["CNN_TYPE", "CnnConfig", "load_cnn", "make_cnn", "save_cnn"]

CNN_TYPE = "unweave-cnn"
MOST = 1 << 12


@dataclass(frozen=True)
class CnnConfig:
    """Sizes of a network of convolutions, each with a ReLU; halved after all but the last, which gives its largest.

    Attributes:
        image: channels, rows and columns of what it reads (as one vector).
        maps: of each convolution.
        kernels: rows, and columns, of its kernels.
        d_out: how many logits there are.
    """

    image: tuple[int, int, int]
    maps: tuple[int, ...]
    kernels: tuple[int, ...]
    d_out: int
    name: str = "cnn"

    def __post_init__(self) -> None:
        if not isinstance(self.image, tuple) or len(self.image) != 3 or not isinstance(self.maps, tuple):
            raise InputError(f"an image has channels, rows and columns, got {self.image!r}; maps must be a tuple")
        if not isinstance(self.kernels, tuple) or len(self.kernels) != len(self.maps) or not self.maps:
            raise InputError(f"each convolution has maps and kernels, got {self.maps!r} and {self.kernels!r}")
        sizes = (*self.image, *self.maps, *self.kernels, self.d_out)
        if not all(type(n) is int and 0 < n < MOST for n in sizes) or not isinstance(self.name, str):
            raise InputError(f"sizes of a CNN must be positive integers below {MOST}, got {sizes!r}")
        if min(self.map_sizes[-1]) < 1:
            raise InputError(f"images of {self.image[1:]} are too small for kernels of {self.kernels}")

    @property
    def map_sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each convolution's maps, before they are pooled."""
        found: list[tuple[int, int]] = []
        size = self.image[1:]
        for kernel in self.kernels:
            size = (size[0] - kernel + 1, size[1] - kernel + 1)
            found.append(size)
            size = (size[0] // 2, size[1] // 2)
        return tuple(found)


def make_cnn(config: CnnConfig) -> nn.Sequential:
    """A fresh network; PyTorch initialises it.

    Example:
        >>> [type(m).__name__ for m in make_cnn(CnnConfig((1, 6, 6), (4,), (3,), 2))]
        ['Unflatten', 'Conv2d', 'ReLU', 'MaxPool2d', 'Flatten', 'Linear']
    """
    layers: list[nn.Module] = [nn.Unflatten(1, config.image)]
    before = config.image[0]
    for i, (after, kernel) in enumerate(zip(config.maps, config.kernels, strict=True)):
        window = config.map_sizes[i] if i == len(config.maps) - 1 else (2, 2)
        layers += [nn.Conv2d(before, after, kernel), nn.ReLU(), nn.MaxPool2d(window)]
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, config.d_out))


def save_cnn(model: nn.Sequential, folder: str | Path, **facts: Any) -> None:
    """Write config.json and model.safetensors; ``facts`` (what is known of the mechanism) go into the config."""
    folder = Path(folder)
    first, last = model[0], model[-1]
    assert isinstance(first, nn.Unflatten)
    assert isinstance(last, nn.Linear)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    channels, rows, columns = (int(n) for n in first.unflattened_size)
    maps, kernels = (tuple(m.out_channels for m in convolutions), tuple(m.kernel_size[0] for m in convolutions))
    config = asdict(CnnConfig((channels, rows, columns), maps, kernels, last.out_features))
    del config["name"]
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", {"model_type": CNN_TYPE, **config, **facts})


def load_cnn(folder: str | Path) -> nn.Sequential:
    """The network saved in a folder, in evaluation mode.

    Raises:
        CorruptFileError: config and weights do not fit each other.
        NonFiniteError: a weight is NaN or infinite.
    """
    folder = Path(folder)
    config = read_config(folder, CNN_TYPE, "a CNN of the zoo")
    lists = [config.get(name) for name in ("image", "maps", "kernels")]
    if not all(isinstance(value, list) for value in lists):
        raise CorruptFileError(f"{folder}/config.json: image, maps and kernels must be lists")
    image, maps, kernels = (tuple(value or ()) for value in lists)
    try:
        settings = CnnConfig(image, maps, kernels, config.get("d_out", 0))
    except InputError as error:
        raise CorruptFileError(f"{folder}/config.json: {error}") from error
    return fill(lambda: make_cnn(settings), read_tensors(folder / "model.safetensors")[0], str(folder))
