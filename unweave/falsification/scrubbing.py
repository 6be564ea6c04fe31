"""Causal scrubbing: does a network still work when every value is replaced by one that a hypothesis calls equal?

Source: Chan et al. 2022, "Causal Scrubbing: a method for rigorously testing interpretability hypotheses".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError, InputError, UnknownNameError
from unweave.execution import check_inputs, trace
from unweave.falsification.resampling import Partners, gather
from unweave.graph import Edge, Graph
from unweave.intervals import Estimate, bootstrap, divide
from unweave.progress import track
from unweave.scope import Scope, divergence, loss, position_mask

__all__ = ["Child", "Hypothesis", "Scrubbed", "Scrubbing", "scrub", "scrubbed_logits"]

FORMS = ("tree", "dag")
# a tree has one node per path: beyond this many, only the other form is practical
MOST_PATHS = 2000


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """What every value that matters may depend on.

    Attributes:
        keys: node or edge (``"embed->blocks.0.mlp.in"``) -> a function of the batch that gives ``[batch]`` or
            ``[batch pos]`` (or a tuple of these): the value depends on the input through this alone. With a key per
            position, what is written at each position is swapped on its own; with a key per sequence, all of it at
            once. None: it may depend on everything and is not resampled, but what it is computed from is. A node's key
            is for all edges out of it but those with keys of their own. What is not named does not matter.
        description: for people.

    Raises:
        InputError: a key that is not a function.
    """

    keys: Mapping[str, Any]
    description: str = ""

    def __post_init__(self) -> None:
        for name, key in self.keys.items():
            if key is not None and not callable(key):
                raise InputError(f"the key of {name} must be a function of a batch, or None, got {key!r}")


class Child(NamedTuple):
    """An edge that matters, and whose key it has: its own name's or its writer's."""

    edge: Edge
    subject: str


@dataclass(frozen=True, eq=False)
class Scrubbing:
    """A hypothesis laid over a graph.

    Attributes:
        form: "tree": every path to the output has partners of its own; "dag": every node has.
    """

    graph: Graph
    hypothesis: Hypothesis
    form: str

    def __post_init__(self) -> None:
        keys = self.hypothesis.keys
        self.graph.mark_edges(name for name in keys if "->" in name)  # refuses those that cannot be
        for name in keys:
            if "->" not in name and name not in self.graph.writers:
                raise UnknownNameError("writer", name, self.graph.writers)
        idle = sorted(set(keys) - {child.subject for node in self.reached for child in self.children[node]})
        if idle:
            raise InputError(
                f"{idle[0]} has a key, but no edge leads from it to the output over nodes that have one; "
                "give the nodes that hear it keys, too, or leave it out"
            )
        if self.form == "tree" and self.n_paths > MOST_PATHS:
            raise InputError(f'the hypothesis has {self.n_paths:,} paths to the output; use form="dag"')

    @property
    def output(self) -> str:
        """The output node."""
        return self.graph.nodes[-1]

    @cached_property
    def children(self) -> Mapping[str, tuple[Child, ...]]:
        """Of every node, the edges into it that matter."""
        keys = self.hypothesis.keys
        out: dict[str, list[Child]] = {}
        for edge in self.graph.edges:
            subject = next((name for name in (str(edge), edge.src) if name in keys), None)
            if subject is not None:
                out.setdefault(edge.dst, []).append(Child(edge, subject))
        return {node: tuple(out.get(node, ())) for node in self.graph.nodes}

    @cached_property
    def reached(self) -> tuple[str, ...]:
        """The output and all nodes that matter to it, latest first."""
        seen = {self.output}
        for node in reversed(self.graph.nodes):
            if node in seen:
                seen |= {child.edge.src for child in self.children[node]}
        return tuple(node for node in reversed(self.graph.nodes) if node in seen)

    @cached_property
    def n_paths(self) -> int:
        """Over how many paths what matters reaches the output."""
        below: dict[str, int] = {}
        for node in reversed(self.reached):
            below[node] = sum(1 + below[child.edge.src] for child in self.children[node])
        return below[self.output]

    @cached_property
    def names(self) -> frozenset[str]:
        """What has to be recorded of a clean run: what these nodes hear, and what they write."""
        ports = {f"{n}.{p.name}" for n in self.reached for p in self.graph.find(n)[0].ports}
        return frozenset(ports | (set(self.reached) - {self.output}))

    def path(self, parent: str, child: Child) -> str:
        """The name of a place, for which partners are drawn: a path from the output, or what has the key."""
        return f"{parent} <- {child.edge}" if self.form == "tree" else child.subject

    def elsewhere(self, path: str) -> str:
        """The name of the draw of what does not matter to a node."""
        return f"{path} <- the rest" if self.form == "tree" else "the rest"


class _Sample:
    """One batch, resampled once."""

    def __init__(self, plan: Scrubbing, batch: Batch, partners: Partners) -> None:
        self.plan, self.partners = plan, partners
        self.context = check_inputs(plan.graph, batch.inputs, batch.mask)
        self.clean = trace(plan.graph, self.context, record=plan.names)
        self.known: dict[str, Tensor] = {}

    @property
    def at_random(self) -> Float[Tensor, "batch pos d_out"]:
        """The logits when the output hears another input altogether."""
        rest = self.partners.anywhere(self.plan.elsewhere(self.plan.output))
        return gather(self.clean.output, rest)

    @property
    def logits(self) -> Float[Tensor, "batch pos d_out"]:
        """The scrubbed logits."""
        return trace(self.plan.graph, self.context, patch=self._heard(self.plan.output, self.plan.output)).output

    def _heard(self, node: str, path: str) -> dict[str, Tensor]:
        """What a node hears at every port: a random input's, but for the edges that matter."""
        values = self.clean.values
        rest = self.partners.anywhere(self.plan.elsewhere(path))
        ports = self.plan.graph.find(node)[0].ports
        out = {f"{node}.{port.name}": gather(values[f"{node}.{port.name}"], rest) for port in ports}
        for child in self.plan.children[node]:
            place = self.plan.path(path, child)
            rows = self.partners.of(place, child.subject, self.plan.hypothesis.keys[child.subject])
            sent = gather(self._written(child.edge.src, place), rows)
            port = f"{node}.{child.edge.port}"
            out[port] = out[port] + sent - gather(values[child.edge.src], rest)
        return out

    def _written(self, node: str, place: str) -> Float[Tensor, "batch pos d_model"]:
        """What a node writes when all that it hears is scrubbed, for every sequence of the batch."""
        if not self.plan.children[node]:
            # nothing that it hears matters, or it hears nothing
            hears = bool(self.plan.graph.find(node)[0].ports)
            rest = self.partners.anywhere(self.plan.elsewhere(place)) if hears else None
            value = self.clean.values[node]
            return value if rest is None else gather(value, rest)
        name = place if self.plan.form == "tree" else node
        if name not in self.known:
            run = trace(self.plan.graph, self.context, record=frozenset([node]), patch=self._heard(node, name))
            if self.plan.form == "tree":
                return run.values[node]  # no other path asks for it
            self.known[name] = run.values[node]
        return self.known[name]


@dataclass(frozen=True, eq=False)
class Scrubbed:
    """How much of a network's behaviour is left when only what the hypothesis names is kept.

    Attributes:
        loss_recovered: (L_scrubbed - L_random) / (L_original - L_random), of the next-token loss: the published
            measure; NaN for networks without tokens.
        recovered: 1 - D_scrubbed / D_random, of the divergence from the original's output.
        loss_nats, original_loss_nats, random_loss_nats: the three losses.
        nats, random_nats: the two divergences, nats per token of the scope.
        alone: by key, the share of its draws where no other sequence agreed, so that nothing was swapped: it counts as
            recovered though nothing was tested.
        form: "tree" or "dag".
        n_samples, n_sequences, n_tokens: on how much.
    """

    loss_recovered: Estimate
    recovered: Estimate
    loss_nats: Estimate
    original_loss_nats: Estimate
    random_loss_nats: Estimate
    nats: Estimate
    random_nats: Estimate
    alone: Mapping[str, float]
    form: str
    n_samples: int
    n_sequences: int
    n_tokens: int

    def table(self) -> list[dict[str, Any]]:
        """Plain rows: what, value, low, high, unit."""
        rows = {
            "loss recovered": self.loss_recovered,
            "divergence recovered": self.recovered,
            "loss, scrubbed": self.loss_nats,
            "loss, original": self.original_loss_nats,
            "loss, all resampled": self.random_loss_nats,
            "divergence, scrubbed": self.nats,
            "divergence, all resampled": self.random_nats,
        }
        units = {name: "share" if name.endswith("recovered") else "nats" for name in rows}
        return [{"what": name, **estimate._asdict(), "unit": units[name]} for name, estimate in rows.items()]


def scrubbed_logits(
    graph: Graph, batch: Batch, hypothesis: Hypothesis, *, form: str = "tree", seed: tuple[int, ...] = (0,)
) -> Float[Tensor, "batch pos d_out"]:
    """The logits of one resampling of one batch.

    Raises:
        InputError, ShapeError, UnknownNameError: as :func:`scrub`.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=8)
        >>> scrubbed_logits(graph, next(data.batches(8)), Hypothesis({})).shape
        torch.Size([8, 48, 48])
    """
    return _Sample(_scrubbing(graph, hypothesis, form), batch, Partners(batch, seed)).logits


def _scrubbing(graph: Graph, hypothesis: Hypothesis, form: str) -> Scrubbing:
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
    if graph.resample:
        raise InputError("this graph's cut edges hear another input; scrub an uncut graph, or one cut to means or zero")
    return Scrubbing(graph, hypothesis, form)


@torch.no_grad()
def scrub(
    graph: Graph,
    data: TokenData,
    hypothesis: Hypothesis,
    scope: Scope | None = None,
    *,
    form: str = "tree",
    samples: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
) -> Scrubbed:
    """Test a hypothesis by resampling, recursively, all that it says makes no difference.

    The output on x hears, from a node that matters, what that node writes on another input x' that agrees with x in
    the node's key; there, in turn, the node hears its own inputs from inputs that agree with x' in theirs, and so on.
    From everything that does not matter it hears a random input. If the hypothesis is true the output does not change:

        recovered = (L_scrubbed - L_random) / (L_original - L_random),

    L_random being the loss when the output hears nothing but a random input. Wrong hypotheses recover less; one that
    is true but coarse (too few keys, or too fine ones) may recover all, so compare with rivals.

    Args:
        graph: uncut, or cut to constants.
        data: partners are drawn within batches of it. With keys per position, partners have a real token there; with
            keys per sequence, and for what does not matter, they are at least as long.
        scope: which positions count.
        form: "tree": every path to the output (ports apart) draws partners of its own; "dag": every node, or edge with
            a key of its own, draws once for all who hear it, and what does not matter comes from one other input.
        samples: how often to resample everything.
        batch_size: more gives more partners, and takes more memory.

    Returns:
        :class:`Scrubbed`.

    Raises:
        UnknownNameError: a key of an unknown node or edge.
        InputError: a key that nothing can hear, or in which no two sequences agree; an unknown form; fewer than two
            sequences; a graph whose cut edges are resampled.
        ShapeError: a key of the wrong shape.
        EmptyDataError: the scope selects no position.

    Cost:
        Per sample, 2 forward passes and one for each node that matters ("dag") or each path ("tree"). Memory: of one
        batch, what the nodes that matter hear and write.

    Exact?
        For these draws. Partners are uniform over the others of the batch that agree, never the sequence itself unless
        it is alone (counted in ``alone``; the paper's draws may return the same input). On one path, two positions
        that got the same partner share what is drawn for it further up. Heads whose layer passes another norm
        (Gemma) write with the scale that the rest of the layer has unscrubbed.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=128)
        >>> everything = Hypothesis({name: None for name in graph.writers})
        >>> scrub(graph, data, everything, unweave.Scope("answered"), form="dag").loss_recovered.value > 0.999
        True

    Source:
        Chan et al. 2022, "Causal Scrubbing: a method for rigorously testing interpretability hypotheses".
    """
    if samples < 1 or batch_size < 2 or len(data) < 2:
        raise InputError(
            f"scrubbing needs at least one sample, two sequences and a batch_size of two, got {samples}, {len(data)} "
            f"and {batch_size}"
        )
    plan, scope = _scrubbing(graph, hypothesis, form), scope or Scope()
    # batches of equal size: the last one, too, needs partners
    n_batches = -(-len(data) // batch_size)
    size = max(-(-len(data) // n_batches), 2)
    rows: list[np.ndarray] = []
    alone: dict[str, list[tuple[int, int]]] = {}
    batches = data.batches(size, shuffle_seed=seed)
    for number, batch in enumerate(track(batches, "scrubbing", n_batches, show=progress)):
        table = np.zeros((len(batch.mask), 7))
        for sample in range(samples):
            partners = Partners(batch, (seed, number, sample))
            table += _sums(_Sample(plan, batch, partners), scope, batch) / samples
            for name, counts in partners.alone.items():
                alone.setdefault(name, []).append(counts)
        rows.append(table)
    sums = np.concatenate(rows)
    shares = {name: float(np.divide(*np.sum(counts, axis=0))) for name, counts in alone.items()}
    return _summary(sums, {name: shares[name] for name in hypothesis.keys if name in shares}, form, samples, seed)


def _sums(sample: _Sample, scope: Scope, batch: Batch) -> Float[np.ndarray, "batch 7"]:
    """Per sequence: tokens, divergences (scrubbed, random), tokens with a next one, losses (the same, original)."""
    original, scrubbed, at_random = sample.clean.output, sample.logits, sample.at_random
    mask = position_mask(scope, batch).to(original.device)
    nats = [divergence(scope, original, logits, batch).sum(1) for logits in (scrubbed, at_random)]
    # reals, or tokens that are no outputs: the network does not say what comes next
    if batch.inputs.is_floating_point() or int(batch.inputs.max()) >= original.shape[-1]:
        told = [torch.zeros_like(nats[0])] * 4
    else:
        crosses = [loss(logits, batch) for logits in (scrubbed, at_random, original)]
        real = crosses[0][1] & mask
        told = [real.sum(1), *(torch.where(real, cross, 0.0).sum(1) for cross, _ in crosses)]
    return torch.stack([column.double() for column in (mask.sum(1), *nats, *told)], 1).cpu().numpy()


def _summary(sums: np.ndarray, alone: Mapping[str, float], form: str, samples: int, seed: int) -> Scrubbed:
    names = ("tokens", "nats", "random_nats", "told", "loss", "random", "original")
    columns = dict(zip(names, sums.T, strict=True))
    if columns["tokens"].sum() == 0:
        raise EmptyDataError("the scope selects no position of this data set")

    def estimate(function: Any, **chosen: str) -> Estimate:
        return bootstrap({name: columns[column] for name, column in chosen.items()}, function, seed)

    def share(loss: float, random: float, original: float) -> Any:
        return divide(loss - random, original - random)

    return Scrubbed(
        loss_recovered=estimate(share, loss="loss", random="random", original="original"),
        recovered=estimate(lambda top, bottom: 1 - divide(top, bottom), top="nats", bottom="random_nats"),
        loss_nats=estimate(divide, top="loss", bottom="told"),
        original_loss_nats=estimate(divide, top="original", bottom="told"),
        random_loss_nats=estimate(divide, top="random", bottom="told"),
        nats=estimate(divide, top="nats", bottom="tokens"),
        random_nats=estimate(divide, top="random_nats", bottom="tokens"),
        alone=alone,
        form=form,
        n_samples=samples,
        n_sequences=len(sums),
        n_tokens=int(columns["tokens"].sum()),
    )
