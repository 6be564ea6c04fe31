"""Distributed alignment search: the subspace, and the place, where a variable lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave import tree
from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError
from unweave.execution import BEFORE
from unweave.graph import Graph
from unweave.hypotheses.alignment import Location
from unweave.hypotheses.causal_model import CausalModel
from unweave.hypotheses.interchange import Accuracy, Tally
from unweave.hypotheses.pairs import Answers, Pairs, Verdict, draw_pairs, judge, record, swapped_logits
from unweave.progress import track
from unweave.scope import Positions, Scope, position_mask

__all__ = ["AlignmentSearch", "Candidate", "find_alignment", "redrawn", "search_places"]

# a direction whose variance is this share of the largest is rounding
ROUNDING = 1e-8


@dataclass(frozen=True, eq=False)
class Candidate:
    """A subspace found at one place.

    Attributes:
        location: with its basis.
        accuracy: on held-out pairs.
        train_nats: the loss that the rotation reached, over the last tenth of its steps.
    """

    location: Location
    accuracy: Accuracy
    train_nats: float


@dataclass(frozen=True, eq=False)
class AlignmentSearch:
    """What a search found, best first, and what the same search finds where there is nothing to find.

    Attributes:
        variable: what was looked for.
        found: every place with its best subspace.
        random_network: the same search on a network of this shape whose weights are shuffled.
        mislabelled: the same search on this network, with the hypothesis' answers taken for other sources.
    """

    variable: str
    found: tuple[Candidate, ...]
    random_network: tuple[Candidate, ...]
    mislabelled: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the highest accuracy on held-out effective pairs."""
        return self.found[0]

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: place, dimensions, held-out iia with its interval, and the controls' at the same place."""
        controls = {
            name: {c.location.place: c.accuracy.effective.value for c in found}
            for name, found in (("random_network", self.random_network), ("mislabelled", self.mislabelled))
        }
        return [
            {
                "place": c.location.place,
                "dimensions": c.location.dimension,
                **c.accuracy.effective.columns("iia"),
                "unchanged": c.accuracy.unchanged.value,
                **{name: at.get(c.location.place, float("nan")) for name, at in controls.items()},
            }
            for c in self.found
        ]


def search_places(graph: Graph) -> tuple[str, ...]:
    """Everywhere a variable may live: what each node writes, and the residual stream before each stage.

    Example:
        >>> import unweave
        >>> search_places(unweave.capture("zoo:modular_addition"))[-3:]
        ('before blocks.0.attn.head.0', 'before blocks.0.mlp', 'before unembed')
    """
    ends = {stage.visible: f"{BEFORE}{stage.nodes[0]}" for stage in reversed(graph.stages) if stage.visible[1] > 0}
    return (*graph.writers, *reversed(ends.values()))


def redrawn(graph: Graph, seed: int = 0) -> Graph:
    """A random network of the same shape: the entries of every weight in random order, so that scales stay."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(weight: Tensor) -> Tensor:
        if not weight.is_floating_point():
            return weight
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        return weight.flatten()[order].view(weight.shape)

    return dataclasses.replace(graph, stages=tree.map_tensors(graph.stages, shuffled))


def find_alignment(
    graph: Graph,
    model: CausalModel,
    variable: str,
    data: TokenData,
    *,
    k: int,
    places: Sequence[str] | None = None,
    positions: Positions = "all",
    scope: Scope | None = None,
    held_out: float | int = 0.5,
    n_pairs: int = 256,
    steps: int = 150,
    learning_rate: float = 0.1,
    n_starts: int = 1,
    tolerance: float = 0.01,
    batch_size: int = 32,
    controls: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> AlignmentSearch:
    """The k directions of each place that, swapped, do to the network what swapping the variable does to the model.

    At each place a basis B ``[d k]`` (B^T B = 1), in the span of what differs there between tokens, is learned with
    Adam on pairs of training sequences,

        min_B E_(b, s) [ -log p(M_{V <- M_V(s)}(b)) ],  v <- v + B B^T (v_s - v),

    effective and unchanged positions weighing the same; places are ranked by accuracy on pairs of held-out ones.

    Args:
        k: how many directions; a place with fewer coordinates is swapped whole.
        places: which to search, as in :class:`Location`; by default :func:`search_places`.
        positions: where in the sequence, as in :class:`Location`.
        held_out: a share of the sequences, or how many.
        n_pairs: of training sequences, and of held-out ones.
        steps, learning_rate: of Adam; the rate falls to zero linearly.
        n_starts: how many random starts; the one with the least loss in training is kept. Few directions out of
            many (k = 1) may need several.
        controls: also search a random network, and for wrong answers.

    Returns:
        :class:`AlignmentSearch`.

    Raises:
        UnknownNameError: an unknown variable or place.
        InputError: ``k``, ``steps`` or ``n_starts`` below 1, no places.
        EmptyDataError: swapping the variable never changes the model's answer.

    Cost:
        Per place ``n_starts`` times ``steps`` forward and backward passes of a batch, and a few forward passes over
        the pairs; three times that with controls. Memory: the place's values on all training pairs.

    Exact?
        A local optimum. Ranking by held-out accuracy favours the lucky place a little; controls are ranked alike.
        A learned subspace can pass by waking a path that the network does not use (Makelov et al. 2023).

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:modular_addition"), unweave.load_data("zoo:modular_addition", limit=256)
        >>> model = CausalModel(
        ...     {"a": lambda tokens: tokens[:, 0], "answer": lambda a, tokens: (a + tokens[:, 1]) % 113}, "answer"
        ... )
        >>> options = {"k": 16, "places": ["embed"], "positions": (0,), "steps": 80, "controls": False}
        >>> found = find_alignment(graph, model, "a", data, scope=unweave.Scope(positions="last"), **options)
        >>> found.best.location.dimension, found.best.accuracy.effective.value > 0.5
        (16, True)

    Source:
        Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
        Representations".
    """
    model.require([variable])
    if min(k, steps, n_starts) < 1:
        raise InputError(f"k, steps and n_starts must be at least 1, got {k}, {steps} and {n_starts}")
    where = tuple(search_places(graph) if places is None else places)
    if not where:
        raise InputError("places= is empty: name at least one, or leave it out to search all")
    train, test = data.split(held_out=held_out, seed=seed)
    task = _Task(model, variable, positions, Answers(scope or Scope(), tolerance))
    fit = _Fit(k, steps, learning_rate, n_starts, batch_size, seed)
    drawn = draw_pairs(train, [variable], n_pairs, seed), draw_pairs(test, [variable], n_pairs, seed + 1)
    right, wrong = ([task.judged(pairs, batch_size, wrong=w) for pairs in drawn] for w in (False, True))
    runs = [(graph, right)] + ([(redrawn(graph, seed), right), (graph, wrong)] if controls else [])
    jobs = [(number, *run, place) for number, run in enumerate(runs) for place in where]
    results: list[list[Candidate]] = [[], [], []]
    for number, network, (to_fit, to_test), place in track(jobs, f"searching {variable}", len(jobs), show=progress):
        location, nats = _best_location(network, task, Location(place, positions=positions), to_fit, fit)
        results[number].append(Candidate(location, _held_out(network, task, location, to_test, drawn[1], seed), nats))
    ranked = (tuple(sorted(found, key=_rank, reverse=True)) for found in results)
    return AlignmentSearch(variable, *ranked)


def _rank(candidate: Candidate) -> float:
    return candidate.accuracy.effective.value


class _Fit(NamedTuple):
    """How a rotation is learned."""

    k: int
    steps: int
    learning_rate: float
    n_starts: int
    batch_size: int
    seed: int


class _Judged(NamedTuple):
    """A batch of pairs with what the hypothesis says of them."""

    base: Batch
    sources: dict[str, Batch]
    verdict: Verdict


class _Task(NamedTuple):
    """What a search looks for."""

    model: CausalModel
    variable: str
    positions: Positions
    answers: Answers

    def judged(self, pairs: Pairs, batch_size: int, *, wrong: bool) -> list[_Judged]:
        """What the hypothesis says; on sources other than those swapped in where it is to be wrong."""
        homes = {self.variable: (Location("", positions=self.positions),)}
        out = [
            _Judged(base, sources, judge(self.model, homes, base, others if wrong else sources, self.answers))
            for base, sources, others in pairs.batches(batch_size)
        ]
        if not any(bool(batch.verdict.effective.any()) for batch in out):
            raise EmptyDataError(
                f"on {len(pairs)} pairs, swapping {self.variable!r} at these positions never changes the hypothesis' "
                "answer in the scope; use more data, other positions, or another variable"
            )
        return out

    def source_value(self, graph: Graph, location: Location, batch: _Judged) -> Float[Tensor, "batch pos d"]:
        """What the place holds on the sources."""
        return record(graph, batch.sources[self.variable], [location])[location.place]

    def logits(
        self, graph: Graph, location: Location, batch: _Judged, value: Tensor
    ) -> Float[Tensor, "batch pos d_out"]:
        """The network's output with that swapped in."""
        recorded = {self.variable: {location.place: value}}
        return swapped_logits(graph, {self.variable: (location,)}, batch.base, batch.sources, recorded)

    def loss(self, graph: Graph, location: Location, batch: _Judged, value: Tensor) -> Float[Tensor, ""]:
        """Mean nats over effective positions plus mean nats over unchanged ones."""
        nats = self.answers.compare(self.logits(graph, location, batch, value), batch.verdict.answer)[1]
        parts = [batch.verdict.effective, batch.verdict.unchanged]
        means = [nats[chosen.to(nats.device)].mean() for chosen in parts if bool(chosen.any())]
        return torch.stack(means).sum() if means else nats.sum() * 0


@torch.no_grad()
def _held_out(
    graph: Graph, task: _Task, location: Location, judged: list[_Judged], pairs: Pairs, seed: int
) -> Accuracy:
    tally = Tally()
    for batch in judged:
        value = task.source_value(graph, location, batch)
        tally.add(batch.verdict, task.logits(graph, location, batch, value), task.answers)
    return tally.accuracy(pairs, seed)


@torch.no_grad()
def _best_location(
    graph: Graph, task: _Task, location: Location, judged: list[_Judged], fit: _Fit
) -> tuple[Location, float]:
    """The location with the best basis of all starts, and its loss; whole where fewer than k directions differ."""
    values = [task.source_value(graph, location, batch) for batch in judged]
    span = _span(location, judged, values)
    if fit.k >= span.shape[1]:
        losses = [float(task.loss(graph, location, *known)) for known in zip(judged, values, strict=True)]
        return location, sum(losses) / len(losses)
    starts = (_learn(graph, task, location, (judged, values), span, fit, fit.seed + i) for i in range(fit.n_starts))
    return min(starts, key=lambda learned: learned[1])


def _span(location: Location, judged: list[_Judged], values: list[Tensor]) -> Float[Tensor, "d rank"]:
    """The directions in which the place's values differ at all; the others could only wake what never happens."""
    scope, rows = Scope(positions=location.positions), []
    for batch, value in zip(judged, values, strict=True):
        (source,) = batch.sources.values()
        rows.append(value[position_mask(scope, source).to(value.device)])
    seen = torch.cat(rows).double()
    centred = seen - seen.mean(0)
    variance, directions = torch.linalg.eigh(centred.T @ centred)
    return directions[:, variance > ROUNDING * variance[-1]].to(torch.float32)


def _learn(
    graph: Graph,
    task: _Task,
    location: Location,
    known: tuple[list[_Judged], list[Tensor]],
    span: Float[Tensor, "d rank"],
    fit: _Fit,
    seed: int,
) -> tuple[Location, float]:
    """The location with the basis that training finds in a span, and the loss it reached."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(span.shape[1], fit.k, generator=generator).to(span.device)
    columns = torch.linalg.qr(columns).Q.requires_grad_()
    optimiser = torch.optim.Adam([columns], fit.learning_rate)
    batches = list(zip(*known, strict=True))
    losses: list[float] = []
    for step in range(fit.steps):
        optimiser.param_groups[0]["lr"] = fit.learning_rate * (1 - step / fit.steps)
        batch, value = batches[int(torch.randint(len(batches), (1,), generator=generator))]
        with torch.enable_grad():
            moved = dataclasses.replace(location, basis=span @ torch.linalg.qr(columns).Q)
            loss = task.loss(graph, moved, batch, value)
            (columns.grad,) = torch.autograd.grad(loss, [columns])
        optimiser.step()
        with torch.no_grad():
            # only their span counts: back to orthonormal, so that steps keep their size
            columns.copy_(torch.linalg.qr(columns).Q)
        losses.append(float(loss.detach()))
    last = losses[-max(1, fit.steps // 10) :]
    return dataclasses.replace(location, basis=span @ columns.detach()), sum(last) / len(last)
