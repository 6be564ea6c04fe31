"""Train sparse dictionaries: autoencoders of a site, and transcoders of an MLP.

The loss of :mod:`unweave.features.losses` is minimised by Adam with columns of the decoder of length one. A "batchtopk"
dictionary becomes a "jumprelu" one: at run time there is no batch to choose from, and a latent counts above one
threshold for all, the mean over pieces of the smallest latent that was kept (Bussmann et al. 2024).
Source: Gao et al. 2024; Rajamanoharan et al. 2024; Cunningham et al. 2023; Dunefsky et al. 2024.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unweave.data import TokenData, float_data
from unweave.errors import InputError, NonFiniteError, ShapeError
from unweave.features.losses import Weights, first_weights, least_kept, loss_of
from unweave.features.recipes import Recipe
from unweave.features.sites import find_site
from unweave.features.streaming import ActivationStream, Pair
from unweave.files import Checkpoint
from unweave.graph import Graph
from unweave.ops import Dictionary
from unweave.progress import track
from unweave.scope import Scope
from unweave.statistics import identify

__all__ = ["fit_dictionary", "train_dictionary"]

CHECKPOINT_EVERY = 500
# shares of the steps: the learning rate rises over the first and falls to zero over the last
RISE, FALL = 0.05, 0.3
# pieces after the last step that the threshold of "batchtopk" is the mean over
THRESHOLD_PIECES = 64


def train_dictionary(
    graph: Graph,
    where: str,
    data: TokenData,
    recipe: Recipe,
    *,
    transcoder: bool = False,
    scope: Scope | None = None,
    buffer: int = 16384,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> Dictionary:
    """A dictionary of what stands at one place of a graph, see the module's text for the loss.

    Args:
        where: see :mod:`unweave.features.sites`.
        transcoder: decode what an MLP writes from what it reads (normalised), instead of from itself.
        scope: only positions that it looks at.
        buffer: how many activations are held and shuffled at once.
        checkpoint: a file to resume from after a kill; removed at the end.

    Returns:
        The dictionary in the site's own units, columns of the decoder of length one, float32.

    Raises:
        UnknownNameError, InputError: no such place, or no transcoder can stand for it.
        EmptyDataError: no token is looked at.
        NonFiniteError: activations or the training are not finite.

    Cost:
        A forward pass up to the site for every token, and ``steps`` of a small network; memory for the buffer, the
        weights and two more copies of these.

    Exact?
        Reproducible by seed on one device and number of threads; a resumed training gives the same weights.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=16)
        >>> recipe = Recipe(96, k=8, steps=20, tokens=128)
        >>> train_dictionary(graph, "blocks.0.attn", data, recipe).encode(torch.zeros(1, 64)).shape
        torch.Size([1, 96])
    """
    site = find_site(graph, where)
    options: dict[str, Any] = {"tokens": recipe.tokens, "buffer": buffer, "batch_size": batch_size, "seed": recipe.seed}
    stream = ActivationStream(graph, site, data, transcoder, scope, **options)
    identity = ("dictionary", where, transcoder, buffer, batch_size, recipe, graph, scope or Scope())
    saver = None if checkpoint is None else Checkpoint(Path(checkpoint), identify(data, *identity))
    return _Training(recipe, stream.pieces, saver, transcoder).run(progress)


def fit_dictionary(
    x: Float[Tensor, "tokens d_in"],
    recipe: Recipe,
    *,
    target: Float[Tensor, "tokens d_out"] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> Dictionary:
    """:func:`train_dictionary` on vectors held in memory.

    Args:
        target: what a transcoder decodes; x itself by default.

    Raises:
        ShapeError: fewer than two vectors, or a target of another length.
        NonFiniteError: x, the target or the training is not finite.
    """
    y = x if target is None else target
    if len(y) != len(x) or len(x) < 2:
        raise ShapeError(f"x and the target need as many vectors, at least 2; got {len(x)} and {len(y)}")
    x = x.float()
    y = x if target is None else y.float()

    def pieces(skip: int = 0) -> Iterator[Pair]:
        generator = torch.Generator().manual_seed(recipe.seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for rows in order.split(min(recipe.tokens, len(x)))[: max(1, len(x) // recipe.tokens)]:
                skip -= 1
                if skip < 0:
                    chosen = x[rows.to(x.device)]
                    yield chosen, chosen if y is x else y[rows.to(y.device)]

    saver = None
    if checkpoint is not None:
        saver = Checkpoint(Path(checkpoint), identify(float_data(x.cpu()), recipe, float(y.double().sum())))
    return _Training(recipe, pieces, saver, target is not None).run(progress)


@dataclass(frozen=True)
class _Units:
    """Means and scales of what is encoded and decoded."""

    mean_in: Float[Tensor, " d_in"]
    scale_in: Float[Tensor, ""]
    mean_out: Float[Tensor, " d_out"]
    scale_out: Float[Tensor, ""]

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Units:
        parts = [part for t in (x, y) for part in (t.mean(0), (t - t.mean(0)).square().mean().sqrt())]
        if not all(bool(torch.isfinite(p).all()) for p in parts):
            raise NonFiniteError("what the dictionary is trained on holds NaN or inf")
        if not all(float(p) > 0 for p in parts[1::2]):
            raise InputError("what the dictionary is trained on is constant; choose another place")
        return cls(*parts)

    def apply(self, x: Tensor, y: Tensor) -> Pair:
        inputs = (x - self.mean_in) / self.scale_in
        return inputs, inputs if y is x else (y - self.mean_out) / self.scale_out


@dataclass(frozen=True)
class _Training:
    """One training: ``pieces(skip)`` gives tokens without end."""

    recipe: Recipe
    pieces: Callable[[int], Iterator[Pair]]
    saver: Checkpoint | None
    is_transcoder: bool

    def run(self, progress: bool | None) -> Dictionary:
        found = None if self.saver is None else self.saver.load()
        start = 0 if found is None else int(found[1]["step"])
        pieces = self.pieces(start)
        first = next(pieces)
        if found is None:
            # the statistics of the units need more than one piece
            few = [first, *(next(pieces) for _ in range(7))]
            units = _Units.of(torch.cat([x for x, _ in few]), torch.cat([y for _, y in few]))
            pieces = self.pieces(0)
            first = next(pieces)
            weights = first_weights(self.recipe, first[0].shape[1], first[1].shape[1], first[0].device)
        else:
            kept = {name: t.to(first[0].device).clone() for name, t in found[0].items()}
            units = _Units(*(kept[f"u/{f.name}"] for f in dataclasses.fields(_Units)))
            weights = {name.removeprefix("w/"): t for name, t in kept.items() if name.startswith("w/")}
        for w in weights.values():
            w.requires_grad_()
        optimiser = torch.optim.Adam(weights.values(), lr=self.recipe.learning_rate)
        quiet = torch.zeros(self.recipe.width, dtype=torch.long, device=first[0].device)
        if found is not None:
            quiet = kept["quiet"]
            _restore(optimiser, weights, kept, start)
        for number in track(range(start, self.recipe.steps), "training a dictionary", show=progress):
            pair, first = first, next(pieces)
            quiet = self._one_step(number, units.apply(*pair), weights, optimiser, quiet)
            if self.saver is not None and (number + 1) % CHECKPOINT_EVERY == 0:
                self._save(number + 1, units, weights, optimiser, quiet)
        weights = {n: w.detach() for n, w in weights.items()}
        if self.recipe.kind == "batchtopk":
            weights["threshold"] = self._threshold(weights, units, [first, *islice(pieces, THRESHOLD_PIECES - 1)])
        if self.saver is not None:
            self.saver.clear()
        return _in_own_units(weights, units, self.recipe, self.is_transcoder)

    def _threshold(self, weights: Weights, units: _Units, pieces: list[Pair]) -> Float[Tensor, " latents"]:
        """The smallest latent that is kept, on average over pieces."""
        k, found = self.recipe.k or 1, []
        for x, y in pieces:
            before = F.linear(units.apply(x, y)[0], weights["encoder"], weights["encoder_bias"])
            found.append(least_kept(before, k))
        return torch.stack(found).mean().expand(self.recipe.width).clone()

    def _one_step(
        self, number: int, pair: Pair, weights: Weights, optimiser: torch.optim.Adam, quiet: Int[Tensor, " latents"]
    ) -> Int[Tensor, " latents"]:
        recipe = self.recipe
        done = number / recipe.steps
        rise, penalty = (min(1.0, (number + 1) / max(1.0, share * recipe.steps)) for share in (RISE, recipe.rise))
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * rise * min(1.0, (1 - done) / FALL)
        with torch.enable_grad():
            value, fired = loss_of(weights, *pair, recipe, penalty, quiet >= recipe.dead_after)
        if not bool(torch.isfinite(value)):
            raise NonFiniteError(f"training diverged at step {number}; lower the learning rate {recipe.learning_rate}")
        optimiser.zero_grad()
        value.backward()
        with torch.no_grad():
            decoder = weights["decoder"]
            assert decoder.grad is not None
            decoder.grad -= decoder * (decoder * decoder.grad).sum(0)
            torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimiser.step()
            decoder /= decoder.norm(dim=0).clamp(min=1e-8)
            if "threshold" in weights:
                weights["threshold"].clamp_(min=0)
        return torch.where(fired, 0, quiet + 1)

    def _save(self, done: int, units: _Units, weights: Weights, optimiser: torch.optim.Adam, quiet: Tensor) -> None:
        assert self.saver is not None
        state = {f"u/{f.name}": getattr(units, f.name) for f in dataclasses.fields(units)} | {"quiet": quiet}
        for name, w in weights.items():
            moments = optimiser.state[w]
            state |= {f"w/{name}": w, f"m/{name}": moments["exp_avg"], f"v/{name}": moments["exp_avg_sq"]}
        self.saver.save(state, {"step": done})


def _restore(optimiser: torch.optim.Adam, weights: Weights, kept: Weights, done: int) -> None:
    for name, w in weights.items():
        moments = {"exp_avg": kept[f"m/{name}"], "exp_avg_sq": kept[f"v/{name}"]}
        optimiser.state[w] = {"step": torch.tensor(float(done)), **moments}


def _in_own_units(w: Weights, units: _Units, recipe: Recipe, is_transcoder: bool) -> Dictionary:
    """The same dictionary of the activations as they are, columns of the decoder of length one."""
    wide = {name: t.double() for name, t in w.items()}
    scale = units.scale_out.double()
    encoder = wide["encoder"] / units.scale_in.double()
    bias = wide["encoder_bias"] - encoder @ units.mean_in.double()
    return Dictionary(
        (encoder * scale).float(),
        (bias * scale).float(),
        w["decoder"],
        (wide["decoder_bias"] * scale + units.mean_out.double()).float(),
        "jumprelu" if "threshold" in w else recipe.kind,
        recipe.k if recipe.kind == "topk" else None,
        (wide["threshold"] * scale).float() if "threshold" in w else None,
        is_transcoder,
    )
