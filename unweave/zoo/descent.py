"""The loop that trains a room: AdamW on a one-cycle schedule, yielding the model on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Losses", "descend"]

Model = TypeVar("Model", bound=nn.Module)
# (what is reported, what is added to it to be made small)
Losses = tuple[Float[Tensor, ""], Float[Tensor, ""] | float]


def descend(
    model: Model,
    losses_at: Callable[[int], Losses],
    steps: int,
    rate: float,
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    after: Callable[[int], None] | None = None,
    every: int = 100,
) -> Iterator[tuple[int, float, Model]]:
    """Train, yielding (step, loss, model) every so many steps and at the end.

    Args:
        losses_at: step -> losses on a batch; the step counts from 1.
        rate: the learning rate at its highest, a tenth of the way.
        after: called after each step, on the model as it is then.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(1, 1)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> found = list(descend(model, lambda step: ((model(x) - x).square().mean(), 0.0), 200, 0.1))
        >>> len(found), found[-1][1] < 1e-2
        (2, True)
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay, betas=betas)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        loss, added = losses_at(step)
        optimiser.zero_grad()
        (loss + added).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if after is not None:
            after(step)
        if step % every == 0 or step == steps:
            yield step, float(loss.detach()), model
