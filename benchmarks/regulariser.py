"""Training for modularity pays: the two-task network with and without each penalty.

    python -m benchmarks.regulariser

Every penalty's strength is the largest of a few whose loss, on seeds and data of their own (TUNING), is at most 1.5%
above that without a penalty; L1 and weight decay are tuned by the same rule: that is "at matched loss". Then five
networks each are trained for the same steps. The parameters needed are found by bisection over the size on calibration
data (KL to the network itself at most 0.01 nats), and loss and KL are measured on held-out data.

"numbers" are what the graph's channels store, biases and masks included; "live" leaves out what dead neurons store, and
"weights" counts kept weights only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import interval, save
from unweave.capture import capture
from unweave.compression import channel_moments, compress
from unweave.compression.allocation import FORMS, mean_divergence
from unweave.data import TokenData, float_data
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.ops import Masked
from unweave.penalty import cut_penalty, edge_nats_penalty, rank_penalty
from unweave.scope import Scope
from unweave.zoo import two_tasks
from unweave.zoo.mlp import linear_layers, neuron_effects

TARGET = 0.01
SEEDS, TUNING = range(5), (100,)
ALLOWED, TUNED_TO = 0.02, 0.015
BISECTIONS = 9
CALIBRATION, HELD_OUT, TUNING_DATA = 11, 12, 13  # seeds of data


def weights(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight for layer in linear_layers(model)]


def l1(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * sum((w.abs().sum() for w in weights(model)), torch.zeros(()))


def weight_decay(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * sum((w.square().sum() for w in weights(model)), torch.zeros(()))


def edge_nats(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * edge_nats_penalty(model, x[:16], floor=1e-4, generator=generator)


def cut(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    """Every layer on a line from 0 to 1, the outputs in the middle: it knows nothing of tasks but the inputs' order."""
    lines = [torch.linspace(0, 1, n)[:, None] for n in two_tasks.CONFIG.widths[:-1]]
    middle = torch.full((two_tasks.CONFIG.d_out, 1), 0.5)
    return strength * cut_penalty(weights(model), [*lines, middle])


def rank(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * rank_penalty(weights(model), floor=0.1)


PENALTIES: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "L1": (l1, (2.5e-4, 5e-4, 1e-3, 2e-3)),
    "weight decay": (weight_decay, (2.5e-4, 5e-4, 1e-3, 2e-3)),
    "edge nats": (edge_nats, (2e-4, 4e-4, 6e-4)),
    "cut": (cut, (2.5e-3, 5e-3, 1e-2)),
    "rank": (rank, (2.5e-4, 5e-4, 1e-3)),
}


def trained(seed: int, penalty: Callable[..., Tensor] | None) -> nn.Sequential:
    *_, (_, _, model) = two_tasks.train(seed, two_tasks.STEPS, penalty)
    return model.eval()


@torch.no_grad()
def loss(model: nn.Sequential, seed: int, n: int = 1 << 15) -> float:
    x, pairs = two_tasks.batch(n, torch.Generator().manual_seed(seed))
    return float(F.cross_entropy(model(x), pairs))


def tuned(make: Callable[..., Tensor], strengths: tuple[float, ...], reference: float) -> float:
    """The largest strength within the loss allowed on the tuning seeds (the smallest if none is)."""
    best = strengths[0]
    for strength in strengths:
        found = [loss(trained(seed, partial(make, strength)), TUNING_DATA) for seed in TUNING]
        if sum(found) / len(found) > (1 + TUNED_TO) * reference:
            break
        best = strength
    return best


def smallest(graph: Graph, data: TokenData, form: str) -> Graph:
    """The smallest graph within the target on the calibration data."""
    moments = channel_moments(graph, data, Scope(), samples=4, batch_size=256, progress=False)
    low, high, best = 0.0, 1.0, graph
    for _ in range(BISECTIONS):
        size = (low + high) / 2
        try:
            small = compress(graph, data, size=size, form=form, moments=moments, batch_size=1024, progress=False)
            close = mean_divergence(graph, small, data, Scope(), 1024) <= TARGET
        except InputError:
            close = False
        low, high, best = (low, size, small) if close else (size, high, best)
    return best


def live_numbers(small: Graph) -> tuple[float, int]:
    """(numbers without those of dead neurons, weights alone) of a sparse two-layer graph."""
    maps = [small.stages[s].ports[0].reads[0].map for s in small.channels]
    first, second = (m.mask if isinstance(m, Masked) else m.dense() != 0 for m in maps)
    heard, hears = second.any(0), second.any(1)
    kept = int(first[heard].sum() + second.sum())
    positions = int(heard.sum()) * first.shape[1] + int(hears.sum()) * int(heard.sum())
    return kept + int(heard.sum() + hears.sum()) + positions / 32, kept


def measured(model: nn.Sequential) -> dict[str, float]:
    graph = capture(model)
    calibration = float_data(two_tasks.data(1024, CALIBRATION)[0])
    held_out = float_data(two_tasks.data(4096, HELD_OUT)[0])
    row: dict[str, float] = {"loss": loss(model, HELD_OUT)}
    for form in FORMS:
        small = smallest(graph, calibration, form)
        row[f"{form} numbers"] = small.n_channel_parameters
        row[f"{form} kl_nats"] = mean_divergence(graph, small, held_out, Scope(), 1024)
        if form == "sparse":
            row["sparse live"], row["sparse weights"] = live_numbers(small)
    nats = neuron_effects(model, two_tasks.data(1024, HELD_OUT)[0], two_tasks.TASKS).values()
    needed = [v for v in nats if max(v.values()) > two_tasks.LEAST_NATS]
    row["neurons"] = len(needed)
    row["mixed neurons"] = sum(min(v.values()) > 0.05 * max(v.values()) for v in needed)
    return row


def summary(rows: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, Any]:
    """Means with intervals over seeds, and each seed's ratio to the same seed without a penalty."""
    means = {key: interval([row[key] for row in rows]) for key in rows[0]}
    smaller = {key: interval([p[key] / r[key] for p, r in zip(plain, rows, strict=True)]) for key in SIZES}
    cost = interval([r["loss"] / p["loss"] - 1 for p, r in zip(plain, rows, strict=True)])
    return {"mean": means, "times_smaller": smaller, "loss_increase": cost}


SIZES = ("sparse numbers", "sparse live", "sparse weights", "low-rank numbers")


def main() -> None:
    started = time.time()
    torch.set_num_threads(1)
    reference = sum(loss(trained(seed, None), TUNING_DATA) for seed in TUNING) / len(TUNING)
    plain = [measured(trained(seed, None)) for seed in SEEDS]
    rows = {"none": {"strength": 0.0, "seeds": plain, **summary(plain, plain)}}
    result = {"target_nats": TARGET, "steps": two_tasks.STEPS, "best_loss": two_tasks.best_loss(), "rows": rows}
    result |= {"allowed_loss_increase": ALLOWED, "n": len(SEEDS), "seed": list(SEEDS)}
    for name, (make, strengths) in PENALTIES.items():
        strength = tuned(make, strengths, reference)
        seeds = [measured(trained(seed, partial(make, strength))) for seed in SEEDS]
        rows[name] = {"strength": strength, "seeds": seeds, **summary(seeds, plain)}
        print(name, strength, rows[name]["loss_increase"], rows[name]["times_smaller"], flush=True)
        # after every penalty: a run that is cut short leaves what it has measured
        save("regulariser", result, started, "python -m benchmarks.regulariser")


if __name__ == "__main__":
    main()
