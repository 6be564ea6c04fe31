"""The two-eye retina: is there an object on the left *and* one on the right?

Eight pixels, two columns of two for each eye. On the left, an object is three or more black pixels, or one or two black
ones in the left column only; on the right it is the mirror image. The two eyes share nothing until the last hidden
layer, so the network's modules are "left", "right" and what joins them.

Training alone does not find them (about half of the weights' mass in the first two layers then crosses from one eye to
the other), so the network is modular *by construction*: there, weights that would cross are held at zero; only the
last hidden layer's neurons read both eyes.

Source: Kashtan and Alon 2005, "Spontaneous evolution of modularity and network motifs"; Clune, Mouret and Lipson 2013,
"The evolutionary origins of modularity".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unweave.zoo.mlp import MlpConfig, linear_layers, make_mlp, neuron_effects

__all__ = ["CONFIG", "EYES", "all_images", "both", "crossing", "data", "known", "objects", "train"]

CONFIG = MlpConfig((8, 16, 12, 8, 2), name="zoo:retina")
STEPS = 2000
EYES = ("left", "right")


def all_images() -> Bool[Tensor, "256 8"]:
    """Every image: the left eye's four pixels (its left column, then its right one), then the right eye's."""
    return torch.tensor(list(product([False, True], repeat=8)))


def objects(images: Bool[Tensor, "n 8"]) -> dict[str, Bool[Tensor, " n"]]:
    """Whether each eye sees an object.

    Example:
        >>> one_pixel_each = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0]]).bool()
        >>> {eye: seen.tolist() for eye, seen in objects(one_pixel_each).items()}
        {'left': [True], 'right': [False]}
    """
    left, right = images[:, :4], images[:, 4:].flip(1)  # the right eye in a mirror
    return {eye: _sees_object(half) for eye, half in (("left", left), ("right", right))}


def _sees_object(half: Bool[Tensor, "n 4"]) -> Bool[Tensor, " n"]:
    outer, inner = half[:, :2].sum(1), half[:, 2:].sum(1)
    return (outer + inner >= 3) | ((outer >= 1) & (inner == 0))


def both(images: Bool[Tensor, "n 8"]) -> Bool[Tensor, " n"]:
    """Whether both eyes see an object."""
    seen = objects(images)
    return seen["left"] & seen["right"]


def data(n: int | None = None, seed: int = 1) -> tuple[Float[Tensor, "n 8"], Bool[Tensor, "n 1"]]:
    """(images as -1 and 1, answered): all 256 in random order, or the first ``n`` of them."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:n]
    return 2.0 * all_images()[order] - 1, torch.ones(len(order), 1, dtype=torch.bool)


def sides(width: int) -> Int[Tensor, " width"]:
    """0 for the half of a layer that belongs to the left eye, 1 for the other."""
    return (torch.arange(width) >= width // 2).long()


def crossing() -> list[Bool[Tensor, "_ _"]]:
    """By layer, which weights join the two eyes and are held at zero: none in the last two layers."""
    masks = [sides(after)[:, None] != sides(before) for before, after in pairwise(CONFIG.widths)]
    return [mask & (k < 2) for k, mask in enumerate(masks)]


def known(model: nn.Sequential) -> dict[str, Any]:
    """What is known of the mechanism: the module of every neuron that matters, and how well the task is solved.

    "left" and "right" are by construction; "both" are the neurons of the last hidden layer that read both eyes. Neurons
    whose ablation costs less than 1e-4 nats are in none.
    """
    images = all_images()
    x = 2.0 * images - 1
    effects = neuron_effects(model, x, {"seen": torch.tensor([0, 1])})
    modules: dict[str, list[str]] = {"left": [], "right": [], "both": []}
    for name, nats in effects.items():
        layer, neuron = int(name.split(".")[1]), int(name.split(".")[3])
        if nats["seen"] >= 1e-4:
            last = layer == len(CONFIG.widths) - 3
            modules["both" if last else EYES[int(sides(CONFIG.widths[layer + 1])[neuron])]].append(name)
    with torch.no_grad():
        right = model(x).argmax(1) == both(images).long()
    return {"modules": modules, "by_construction": True, "accuracy": round(float(right.double().mean()), 5)}


def train(seed: int = 0, steps: int = STEPS) -> Iterator[tuple[int, float, nn.Sequential]]:
    """Train on all images, yielding (step, loss, model) every 100 steps and at the end; seconds."""
    torch.manual_seed(seed)
    images = all_images()
    x, seen = 2.0 * images - 1, both(images).long()
    model, masks = make_mlp(CONFIG), crossing()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, pct_start=0.1)
    with torch.no_grad():
        for layer, mask in zip(linear_layers(model), masks, strict=True):
            layer.weight[mask] = 0.0
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(x), seen)
        optimiser.zero_grad()
        loss.backward()
        for layer, mask in zip(linear_layers(model), masks, strict=True):
            assert layer.weight.grad is not None
            layer.weight.grad[mask] = 0.0  # so they stay at zero
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            yield step, float(loss.detach()), model
