"""The model of :mod:`unweave.zoo.shared_step`, trained with a price on every weight that is worth something."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.penalty import edge_nats_penalty
from unweave.zoo import shared_step
from unweave.zoo.shared_step import STEPS, data, known
from unweave.zoo.toy import ToyTransformer

__all__ = ["CONFIG", "STEPS", "data", "known", "penalty", "train"]

CONFIG = dataclasses.replace(shared_step.CONFIG, name="zoo:shared_step_regularised")
# nats that a weight has to be worth, about, to be kept
PRICE = 1e-4
SEQUENCES = 16


def penalty(model: ToyTransformer, tokens: Int[Tensor, "n pos"], generator: torch.Generator) -> Float[Tensor, ""]:
    """The price of the weights that some sequences of the batch need for their answers."""
    some = tokens[:SEQUENCES]
    return PRICE * edge_nats_penalty(model, some, where=some >= shared_step.COPY, generator=generator)


def train(seed: int = 0, steps: int = STEPS) -> Iterator[tuple[int, float, ToyTransformer]]:
    """Train, yielding (step, loss, model) every 100 steps and at the end."""
    for step, loss, model in shared_step.train(seed, steps, penalty):
        model.config = CONFIG
        yield step, loss, model
