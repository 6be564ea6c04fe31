"""Training for a small graph pays: the two-task network with and without each penalty.

    python -m benchmarks.regulariser [PENALTY ...]

Every penalty gets a handful of strengths and the same rule: the largest whose loss, on a seed and data of their own
(TUNING), is at most 1.5% above that without a penalty; that is "at matched loss". Then five networks each are trained
for the same steps. The parameters needed are those of the smallest graph, in steps of 3%, whose KL to the network
itself on calibration data is at most 0.01 nats; loss and KL are measured on held-out data.

"numbers" are what the graph's channels store, biases and masks included; "in all" has the output layer, too; "weights"
are the single weights kept. "fine-tuned" means that for the last fifth of the steps the penalty is gone and so are the
weights that are worth less than 1e-5 nats by then. Two rows were added after the others had been seen, to compare at
equal loss: edge nats one strength weaker and L1 one stronger than the rule chose. Penalties that are named are measured
and put among the results that are there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.common import RESULTS, interval, save
from unweave.capture import capture
from unweave.compression import channel_moments
from unweave.compression.allocation import FORMS, Budgeter, mean_divergence
from unweave.compression.compensation import sweep
from unweave.compression.masks import Masker
from unweave.data import TokenData, float_data
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.ops import Masked
from unweave.penalty import cut_penalty, edge_nats_penalty, rank_penalty
from unweave.penalty import edge_nats as edge_nats_of
from unweave.scope import Scope
from unweave.zoo import two_tasks
from unweave.zoo.mlp import linear_layers, neuron_effects

TARGET = 0.01
SEEDS, TUNING = range(5), 100
ALLOWED, TUNED_TO = 0.02, 0.015
SMALLEST, STEP = {"sparse": 30, "low-rank": 60}, 1.03
FLOOR = 1e-4
RELEASED, NEGLIGIBLE = 0.8, 1e-5
CALIBRATION, HELD_OUT, TUNING_DATA = 11, 12, 13  # seeds of data


def weights(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight for layer in linear_layers(model)]


def l1(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * sum((w.abs().sum() for w in weights(model)), torch.zeros(()))


def weight_decay(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * sum((w.square().sum() for w in weights(model)), torch.zeros(()))


def edge_nats(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * edge_nats_penalty(model, x[:16], floor=FLOOR, generator=generator)


def group_l1(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    """Group lasso: a neuron is what enters it and what leaves it."""
    norms = [
        (before.square().sum(1) + after.square().sum(0) + 1e-12).sqrt().sum()
        for before, after in pairwise(weights(model))
    ]
    return strength * torch.stack(norms).sum()


def log_sum(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    """What reweighted L1 descends: sum of log(1 + |w| / 0.05)."""
    return strength * torch.stack([(w.abs() / 0.05).log1p().sum() for w in weights(model)]).sum()


def cut(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    """Every layer on a line from 0 to 1, the outputs in the middle: it knows nothing of tasks but the inputs' order."""
    lines = [torch.linspace(0, 1, n)[:, None] for n in two_tasks.CONFIG.widths[:-1]]
    middle = torch.full((two_tasks.CONFIG.d_out, 1), 0.5)
    return strength * cut_penalty(weights(model), [*lines, middle])


def rank(strength: float, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    return strength * rank_penalty(weights(model), floor=0.1)


class FineTuned:
    """A penalty that goes, with the weights that are worth nothing by then, for the last steps of the training."""

    def __init__(self, penalty: Callable[..., Tensor]) -> None:
        self.penalty, self.calls = penalty, 0

    def __call__(self, model: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
        self.calls += 1
        last = round((RELEASED - two_tasks.PRICED[0]) * two_tasks.STEPS)
        if self.calls == last:
            # before the next forward pass: this one's backward pass still needs the weights as they are
            self.handle = model.register_forward_pre_hook(lambda *_: self._drop(model, generator))
        return self.penalty(model, x, generator) if self.calls < last else torch.zeros(())

    def _drop(self, model: nn.Sequential, generator: torch.Generator) -> None:
        self.handle.remove()
        drop_worthless(model, generator)


class Kept(nn.Module):
    """The weights that a mask marks."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def drop_worthless(model: nn.Sequential, generator: torch.Generator) -> None:
    x, _ = two_tasks.batch(1024, generator)
    nats = edge_nats_of(model, x, generator=generator)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", Kept(nats[f"{name}.weight"].detach() > NEGLIGIBLE))


PENALTIES: dict[str, tuple[Callable[..., Tensor], tuple[float, ...], bool]] = {
    "edge nats": (edge_nats, (4e-4, 6e-4, 8e-4), False),
    "edge nats, weaker": (edge_nats, (6e-4,), False),
    "L1": (l1, (5e-4, 1e-3, 2e-3), False),
    "L1, stronger": (l1, (2e-3,), False),
    "group L1 on neurons": (group_l1, (1e-3, 2e-3, 4e-3), False),
    "weight decay": (weight_decay, (5e-4, 1e-3, 2e-3), False),
    "edge nats, fine-tuned": (edge_nats, (6e-4, 1.2e-3), True),
    "L1, fine-tuned": (l1, (1e-3, 2e-3, 4e-3), True),
    "log-sum": (log_sum, (2e-4, 4e-4, 8e-4), False),
    "cut": (cut, (2.5e-3, 5e-3, 1e-2), False),
    "rank": (rank, (2.5e-4, 5e-4, 1e-3), False),
}


def trained(seed: int, name: str, strength: float = 0.0) -> nn.Sequential:
    """A network of a seed, under one of the penalties or "none"."""
    penalty: Callable[..., Tensor] | None = None
    if name != "none":
        make, _, fine_tuned = PENALTIES[name]
        penalty = FineTuned(partial(make, strength)) if fine_tuned else partial(make, strength)
    *_, (_, _, model) = two_tasks.train(seed, two_tasks.STEPS, penalty)
    for layer in linear_layers(model):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return model.eval()


@torch.no_grad()
def loss(model: nn.Sequential, seed: int, n: int = 1 << 15) -> float:
    x, pairs = two_tasks.batch(n, torch.Generator().manual_seed(seed))
    return float(F.cross_entropy(model(x), pairs))


def tuned(name: str) -> tuple[float, dict[float, float]]:
    """The largest strength within the loss allowed on the tuning seed (the smallest if none is), and what was tried."""
    strengths = PENALTIES[name][1]
    if len(strengths) == 1:
        return strengths[0], {}
    reference = loss(trained(TUNING, "none"), TUNING_DATA)
    tried = {}
    for strength in strengths:
        tried[strength] = loss(trained(TUNING, name, strength), TUNING_DATA) / reference - 1
        if tried[strength] > TUNED_TO:
            break
    fair = [strength for strength, more in tried.items() if more <= TUNED_TO]
    return max(fair, default=min(tried)), tried


def calibration(seed: int) -> TokenData:
    return float_data(two_tasks.data(2048, seed)[0])


def smallest(graph: Graph, data: TokenData, form: str) -> Graph:
    """The smallest graph within the target on the calibration data."""
    moments = channel_moments(graph, data, Scope(), samples=4, batch_size=256, progress=False)
    masker, budgeter = Masker(graph, moments), Budgeter(graph, moments)
    numbers = float(SMALLEST[form])
    while numbers < graph.n_channel_parameters:
        size = numbers / graph.n_channel_parameters
        numbers *= STEP
        try:
            small = budgeter.at_size(size) if form == "low-rank" else masker.at_size(size)
        except InputError:
            continue
        if form == "sparse":
            small = sweep(small, graph, data, moments, batch_size=2048, progress=False)
        if mean_divergence(graph, small, data, Scope(), 2048) <= TARGET:
            return small
    return graph


def measured(model: nn.Sequential) -> dict[str, float]:
    graph = capture(model)
    held_out = float_data(two_tasks.data(4096, HELD_OUT)[0])
    row: dict[str, float] = {"loss": loss(model, HELD_OUT)}
    for form in FORMS:
        small = smallest(graph, calibration(CALIBRATION), form)
        row[f"{form} numbers"] = small.n_channel_parameters
        row[f"{form} numbers in all"] = small.n_parameters
        row[f"{form} kl_nats"] = mean_divergence(graph, small, held_out, Scope(), 4096)
        maps = [small.stages[s].ports[0].reads[0].map for s in small.channels]
        row[f"{form} neurons"] = sum(m.d_out for m in maps)
        if form == "sparse":
            row["sparse weights"] = sum(len(m.values) if isinstance(m, Masked) else m.n_parameters for m in maps)
    nats = neuron_effects(model, two_tasks.data(1024, HELD_OUT)[0], two_tasks.TASKS).values()
    needed = [v for v in nats if max(v.values()) > two_tasks.LEAST_NATS]
    row["needed neurons"] = len(needed)
    row["mixed neurons"] = sum(min(v.values()) > 0.05 * max(v.values()) for v in needed)
    return row


def summary(rows: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, Any]:
    """Means with intervals over seeds, and each seed's ratio to the same seed without a penalty."""
    means = {key: interval([row[key] for row in rows]) for key in rows[0]}
    smaller = {key: interval([p[key] / r[key] for p, r in zip(plain, rows, strict=True)]) for key in SIZES}
    cost = interval([r["loss"] / p["loss"] - 1 for p, r in zip(plain, rows, strict=True)])
    return {"mean": means, "times_smaller": smaller, "loss_increase": cost}


SIZES = ("sparse numbers", "sparse numbers in all", "sparse weights", "low-rank numbers", "low-rank numbers in all")


def main() -> None:
    started = time.time()
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(PENALTIES)
    rows = json.loads((RESULTS / "regulariser.json").read_text())["rows"] if sys.argv[1:] else {}
    if "none" not in rows:
        plain = [measured(trained(seed, "none")) for seed in SEEDS]
        rows["none"] = {"strength": 0.0, "seeds": plain, **summary(plain, plain)}
    result = {"target_nats": TARGET, "steps": two_tasks.STEPS, "best_loss": two_tasks.best_loss(), "rows": rows}
    result |= {"allowed_loss_increase": ALLOWED, "n": len(SEEDS), "seed": list(SEEDS)}
    for name in names:
        strength, tried = tuned(name)
        seeds = [measured(trained(seed, name, strength)) for seed in SEEDS]
        rows[name] = {"strength": strength, "tuning": tried, "seeds": seeds, **summary(seeds, rows["none"]["seeds"])}
        found = rows[name]["times_smaller"]["sparse numbers"], rows[name]["loss_increase"]
        print(name, strength, tried, *found, f"{time.time() - started:.0f} s", flush=True)
        # after every penalty: a run that is cut short leaves what it has measured
        save("regulariser", result, started, "python -m benchmarks.regulariser")


if __name__ == "__main__":
    main()
