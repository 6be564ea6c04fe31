"""What a convolutional model calls when it runs: its functions in order, read off one run rather than off its modules.

Every function of PyTorch that a model calls passes :class:`_Recorder`, so residual connections, functional
activations and any order of modules look alike. Only functions listed here may touch what is computed from the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unweave.errors import UnsupportedModelError

__all__ = ["ACTIVATION_CALLS", "POOLING_CALLS", "Call", "record_calls"]

POOL = ("kernel_size", "stride", "padding")
# by a function's name: its arguments after the tensor that flows, in PyTorch's order
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "adaptive_avg_pool2d": ("output_size",),
    "add": ("other", "alpha"),
    "avg_pool2d": (*POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    "batch_norm": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "conv2d": ("weight", "bias", "stride", "padding", "dilation", "groups"),
    "gelu": ("approximate",),
    "leaky_relu": ("negative_slope",),
    "linear": ("weight", "bias"),
    "max_pool2d": (*POOL, "dilation", "ceil_mode", "return_indices"),
    "mean": ("dim", "keepdim"),
    "pad": ("pad", "mode", "value"),
    "relu": (),
    "sigmoid": (),
    "silu": (),
    "tanh": (),
}
ACTIVATION_CALLS = ("gelu", "leaky_relu", "relu", "sigmoid", "silu", "tanh")
POOLING_CALLS = ("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "mean")
SHAPES = ("contiguous", "flatten", "reshape", "squeeze", "unflatten", "view")
NOTHING_IN_EVALUATION = ("alpha_dropout", "dropout", "dropout1d", "dropout2d", "feature_dropout")
# a function that has another name under the hood
ALIASES = {"__add__": "add", "__iadd__": "add", "__radd__": "add", "_max_pool2d": "max_pool2d"}
EXAMPLES = 2


@dataclass(frozen=True)
class Call:
    """A function called on what flows from the image.

    Attributes:
        function: its name in :data:`ARGUMENTS`, "image" or "reshape".
        sources: the numbers of the calls whose results it takes.
        settings: its other arguments, by name.
        shape: of its result, without the batch.
        name: of the module whose weights it uses; "" if none.
    """

    function: str
    sources: tuple[int, ...]
    settings: Mapping[str, Any]
    shape: tuple[int, ...]
    name: str = ""


class _Recorder(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str], image: Tensor) -> None:
        super().__init__()
        self.names = names
        self.calls = [Call("image", (), {}, tuple(image.shape[1:]))]
        self.number = {id(image): 0}
        self.alive: list[Tensor] = [image]  # so that no number is taken by another tensor
        self.refusal: UnsupportedModelError | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.refusal is None and any(id(x) in self.number for x in _tensors((args, tuple((kwargs or {}).values())))):
            try:
                self._follow(getattr(func, "__name__", str(func)), args, kwargs or {}, out)
            except UnsupportedModelError as error:
                self.refusal = error  # raised here, an operator would take it for one that it may handle
        return out

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, Tensor):
            self.calls.append(self._read(ALIASES.get(name, name.removesuffix("_")), args, kwargs, out))
            self.number[id(out)] = len(self.calls) - 1
            self.alive.append(out)
        elif next(_tensors((out,)), None) is not None:
            raise UnsupportedModelError(
                f"the model calls {name!r}, which takes feature maps apart; this is not captured"
            )

    def _read(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Call:
        first, shape = kwargs.get("input", args[0] if args else None), tuple(out.shape[1:])
        if out.shape[:1] != (EXAMPLES,):
            raise UnsupportedModelError(f"the model calls {function!r}, which mixes images or drops them")
        if function in NOTHING_IN_EVALUATION and not (isinstance(first, Tensor) and torch.equal(first, out)):
            raise UnsupportedModelError(
                f"the model calls {function!r}, which drops numbers at random in evaluation too"
            )
        if function in NOTHING_IN_EVALUATION or function in SHAPES:
            return Call("reshape", self._sources(function, (first,)), {}, shape)
        if function not in ARGUMENTS:
            raise UnsupportedModelError(
                f"the model calls {function!r} on what it computes from the image, which cannot be captured; "
                f"supported: {', '.join(sorted((*ARGUMENTS, *SHAPES)))}"
            )
        settings = dict(zip(ARGUMENTS[function], args[1:], strict=False)) | kwargs
        settings = {k: v for k, v in settings.items() if k not in ("inplace", "input")}
        takes = (first, settings.pop("other")) if function == "add" else (first,)
        weight = settings.get("weight")
        name = self.names.get(id(weight), "") if function in ("conv2d", "linear") else ""
        return Call(function, self._sources(function, takes), settings, shape, name)

    def _sources(self, function: str, takes: tuple[Any, ...]) -> tuple[int, ...]:
        if not all(id(x) in self.number for x in takes):
            raise UnsupportedModelError(
                f"the model calls {function!r} on what it computes from the image and on something else, which cannot "
                "be captured; only sums of two feature maps of the image can"
            )
        return tuple(self.number[id(x)] for x in takes)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@torch.no_grad()
def record_calls(model: nn.Module, d_input: int) -> tuple[tuple[Call, ...], int]:
    """(what a model calls on an image given as a vector, in order; the number of the call that makes the logits).

    Raises:
        UnsupportedModelError: a function that is not in :data:`ARGUMENTS`, or no logits come out.

    Cost:
        One forward pass over two images.
    """
    like = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(EXAMPLES, d_input, generator=generator).to(like)
    names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    recorder = _Recorder(names, image)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with recorder:
            out: Any = model(image)
    except RuntimeError as error:
        if recorder.refusal is not None:
            raise recorder.refusal from error
        raise UnsupportedModelError(
            f"the model does not run on the images that nn.Unflatten announces: {error}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if recorder.refusal is not None:
        raise recorder.refusal
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    number = recorder.number.get(id(logits))
    if number is None or len(recorder.calls[number].shape) != 1:
        shape = "none" if number is None else str(recorder.calls[number].shape)
        raise UnsupportedModelError(
            f"the network must end with one vector of logits per image, got {shape}: end it with Flatten and Linear"
        )
    return tuple(recorder.calls), number
