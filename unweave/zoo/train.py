"""Train a room's model again: ``python -m unweave.zoo.train induction -o DIR`` (minutes on two cores)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from unweave.errors import InputError
from unweave.progress import track
from unweave.zoo import ROOMS, room, save, weights_folder

__all__ = ["main", "train_room"]


def train_room(name: str, folder: Path, seed: int = 0, steps: int | None = None) -> nn.Module:
    """Train, save to ``folder`` with a record of the losses, and return the model."""
    module: Any = room(name)
    total = module.STEPS if steps is None else steps
    if total < 1:
        raise InputError(f"{total} steps are too few to train {name}; the default is {module.STEPS}")
    losses: list[tuple[int, float]] = []
    model: nn.Module | None = None
    for step, loss, current in track(module.train(seed, total), f"training {name}", total // 100):
        losses.append((step, round(loss, 5)))
        model = current
    assert model is not None
    every = max(1, len(losses) // 30)
    record = {"seed": seed, "steps": total, "losses": losses[::every]}
    save(model.eval(), folder, known=module.known(model), training=record)
    return model


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(ROOMS))
    parser.add_argument("-o", "--output", type=Path, help="folder; by default the bundled weights are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    train_room(args.name, args.output or weights_folder(args.name), args.seed, args.steps)


if __name__ == "__main__":
    main()
