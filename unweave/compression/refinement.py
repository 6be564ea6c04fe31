"""A short training of the factors, to bring the compressed graph's output back to the original's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from unweave import tree
from unweave.data import Batch, TokenData
from unweave.errors import InputError, NonFiniteError
from unweave.execution import check_inputs, trace
from unweave.files import Checkpoint
from unweave.graph import CHANNEL_KINDS, Graph
from unweave.progress import track
from unweave.scope import Scope, divergence, position_mask
from unweave.statistics import identify

__all__ = ["refine_factors", "trainable"]

CHECKPOINT_EVERY = 50


def trainable(graph: Graph) -> dict[str, Tensor]:
    """The numbers of the channels that compression chose: maps and biases, not norms, by path in the stages."""
    return {
        path: t
        for path, t in tree.tensors(graph.stages).items()
        if graph.stages[int(path.split(".")[0])].kind in CHANNEL_KINDS
        and t.is_floating_point()
        and ".norm." not in path
        and ".core." not in path
        and not path.endswith(".offset")
    }


def refine_factors(
    graph: Graph,
    original: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    steps: int = 200,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    train: Collection[str] | None = None,
) -> Graph:
    """Train the factors on the divergence to the original graph's output (Adam, cosine decay, clipped gradients).

    Structure does not change: as many numbers are trained as are stored; masks stay.

    Args:
        graph: compressed.
        original: what its output should be.
        data: training sequences, shuffled afresh in every epoch.
        learning_rate: at the start; it falls to zero.
        checkpoint: a file to resume from after a kill; removed at the end.
        train: paths of the tensors to train, out of :func:`trainable`; by default all of those.

    Returns:
        A graph of the same structure.

    Raises:
        InputError: nonsensical numbers.
        NonFiniteError: training diverged; says at which step.

    Cost:
        ``steps`` times a forward pass of the original and a forward and backward pass of the graph.
    """
    if steps < 1 or not learning_rate > 0:
        raise InputError(f"steps and learning_rate must be positive, got {steps} and {learning_rate}")
    scope = scope or Scope()
    paths = {path: t for path, t in trainable(graph).items() if train is None or path in train}
    weights = {path: t.detach().clone().requires_grad_() for path, t in paths.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    saver = None
    if checkpoint:
        identity = ("refine", seed, steps, learning_rate, sorted(paths), graph, original, scope)
        saver = Checkpoint(Path(checkpoint), identify(data, *identity))
    start = _resume(saver, weights, optimiser, schedule)
    batches = _endless(data, batch_size, seed, start)
    for step in track(range(start, steps), "refining factors", steps - start, show=progress):
        live = dataclasses.replace(graph, stages=tree.replace_tensors(graph.stages, weights))
        value = _loss(live, original, next(batches), scope)
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(f"refinement diverged at step {step}; lower learning_rate (it was {learning_rate})")
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimiser.step()
        schedule.step()
        if saver is not None and (step + 1) % CHECKPOINT_EVERY == 0:
            _save(saver, weights, optimiser, step + 1)
    if saver is not None:
        saver.clear()
    done = {path: w.detach() for path, w in weights.items()}
    return dataclasses.replace(graph, stages=tree.replace_tensors(graph.stages, done))


def _loss(live: Graph, original: Graph, batch: Batch, scope: Scope) -> Tensor:
    context = check_inputs(original, batch.inputs, batch.mask)
    with torch.no_grad():
        reference = trace(original, context).output
    with torch.enable_grad():
        logits = trace(live, context).output
        count = position_mask(scope, batch).sum().clamp(min=1)
        return divergence(scope, reference, logits, batch).sum() / count


def _endless(data: TokenData, batch_size: int, seed: int, skip: int) -> Iterator[Batch]:
    epoch = 0
    while True:
        for batch in data.batches(batch_size, shuffle_seed=seed * 1000 + epoch):
            if skip > 0:
                skip -= 1
                continue
            yield batch
        epoch += 1


def _save(saver: Checkpoint, weights: dict[str, Tensor], optimiser: torch.optim.Adam, step: int) -> None:
    state = {f"w/{path}": w for path, w in weights.items()}
    for path, w in weights.items():
        state[f"m/{path}"] = optimiser.state[w]["exp_avg"]
        state[f"v/{path}"] = optimiser.state[w]["exp_avg_sq"]
    saver.save(state, {"step": step})


def _resume(
    saver: Checkpoint | None,
    weights: dict[str, Tensor],
    optimiser: torch.optim.Adam,
    schedule: torch.optim.lr_scheduler.CosineAnnealingLR,
) -> int:
    found = saver.load() if saver is not None else None
    if found is None:
        return 0
    state, step = found[0], int(found[1]["step"])
    with torch.no_grad():
        for path, w in weights.items():
            w.copy_(state[f"w/{path}"])
            optimiser.state[w] = {
                "step": torch.tensor(float(step)),
                "exp_avg": state[f"m/{path}"].clone(),
                "exp_avg_sq": state[f"v/{path}"].clone(),
            }
    for group, rate in zip(optimiser.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / schedule.T_max)).item())
    schedule.last_epoch = step
    return step
