"""What can be read, when in training and where in the network: a probe for every concept, checkpoint and place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import InputError, UnknownNameError
from unweave.execution import BEFORE, check_inputs, trace
from unweave.features import Site, find_site
from unweave.graph import Graph
from unweave.intervals import Estimate, bootstrap
from unweave.probes.coding import OnlineCode, online_code
from unweave.probes.concepts import Concept, control_task
from unweave.probes.fitting import LinearProbe, fit_probe, probe_sums
from unweave.probes.logistic import logistic_probe
from unweave.progress import counter
from unweave.statistics import accumulate

__all__ = ["ProbeRow", "ProbeTable", "probe_table", "stream_places"]


@dataclass(frozen=True, eq=False)
class ProbeRow:
    """One probe, judged on held-out sequences.

    Attributes:
        concept, place, layer, step: what, where and when.
        score: accuracy, or the share of variance explained (R^2) of a number; 95% interval over sequences.
        baseline: of always saying the commonest class of the training data, or its mean.
        control: the score of a probe for the control task; NaN where none was asked for.
        probe: itself.
        code: of the training labels, :func:`unweave.probes.online_code`; None where it was not asked for.
        control_code: of the control task's labels.
        control_baseline: as ``baseline``, of the control's labels: they come not as often as the concept's, since types
            of tokens do not.
    """

    concept: str
    place: str
    layer: int
    step: int
    score: Estimate
    baseline: float
    control: float
    probe: LinearProbe
    code: OnlineCode | None = None
    control_code: OnlineCode | None = None
    control_baseline: float = float("nan")

    @property
    def selectivity(self) -> float:
        """Score less the control task's score (Hewitt and Liang 2019)."""
        return self.score.value - self.control

    @property
    def gain(self) -> float:
        """(score - baseline) / (1 - baseline): the share of the baseline's errors that the probe does not make."""
        return _gain(self.score.value, self.baseline)

    @property
    def control_gain(self) -> float:
        """The same for the control task; comparable where the two baselines differ, as scores are not."""
        return _gain(self.control, self.control_baseline)


def _gain(score: float, baseline: float) -> float:
    return (score - baseline) / (1 - baseline) if baseline < 1 else float("nan")


@dataclass(frozen=True, eq=False)
class ProbeTable:
    """Every probe of a sweep."""

    rows: tuple[ProbeRow, ...]

    def find(self, concept: str, place: str, step: int | None = None) -> ProbeRow:
        """One of the probes; of the last step by default.

        Raises:
            UnknownNameError: there is none.
        """
        found = {(r.concept, r.place, r.step): r for r in self.rows}
        step = max(r.step for r in self.rows) if step is None else step
        if (concept, place, step) not in found:
            known = [f"{c} at {p}, step {s}" for c, p, s in found]
            raise UnknownNameError("probe", f"{concept} at {place}, step {step}", known)
        return found[concept, place, step]

    def table(self) -> list[dict[str, Any]]:
        """A plain row per probe: concept, step, layer, place, score with its interval, control, compression, ..."""
        return [
            {
                "concept": r.concept,
                "step": r.step,
                "layer": r.layer,
                "place": r.place,
                **r.score.columns("score"),
                "baseline": r.baseline,
                "control": r.control,
                "control_baseline": r.control_baseline,
                "selectivity": r.selectivity,
                "gain": r.gain,
                "control_gain": r.control_gain,
                "bits_per_label": float("nan") if r.code is None else r.code.bits_per_label,
                "compression": float("nan") if r.code is None else r.code.compression,
                "control_compression": float("nan") if r.control_code is None else r.control_code.compression,
                "saved": float("nan") if r.code is None else r.code.saved,
                "control_saved": float("nan") if r.control_code is None else r.control_code.saved,
            }
            for r in self.rows
        ]


def stream_places(graph: Graph) -> tuple[str, ...]:
    """The residual stream before every stage that reads it, named after the stage's first node.

    Example:
        >>> import unweave
        >>> stream_places(unweave.capture("zoo:modular_addition"))[-1]
        'before unembed'
    """
    return tuple(f"{BEFORE}{stage.nodes[0]}" for stage in graph.stages if stage.ports)


def probe_table(
    graphs: Graph | Mapping[int, Graph],
    concepts: Sequence[Concept],
    train: TokenData,
    held_out: TokenData,
    *,
    places: Sequence[str] | None = None,
    control: str | None = "token",
    method: str = "discriminant",
    code: bool = False,
    limit: int = 20_000,
    ridge: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> ProbeTable:
    """Fit a linear probe for every concept, at every place, in every checkpoint, and judge it on other sequences.

    Args:
        graphs: one graph, or one per training step.
        concepts: with different names.
        train, held_out: the data to fit on, and to judge on.
        places: as :func:`unweave.features.find_site` knows them; by default the residual stream before every stage.
        control: types of the control task, see :func:`control_task`; None for no control.
        method: of classes: "discriminant" (closed form, :func:`fit_probe`) or "logistic" (the penalty chosen within the
            training data, :func:`unweave.probes.logistic_probe`). Numbers are read by regression either way.
        code: whether to measure the description length of the labels of classes (:func:`unweave.probes.online_code`).
        limit: how many positions at most, of sequences spread evenly over the data, "logistic" and the code look at.
        ridge: see :func:`fit_probe`.
        seed: of the control labels, and of the order of sequences for "logistic" and the code.

    Returns:
        :class:`ProbeTable`.

    Raises:
        InputError: no graph or concept, two concepts of one name, an unknown method, or a limit below 1.
        UnknownNameError: no such place.
        EmptyDataError: a concept has no label, or only one class.

    Cost:
        One forward pass over each data set per graph; memory concepts x places x width^2, whatever the data's size.
        "logistic" and the code keep ``limit`` activations of every place, and fit some 5 and 50 times.

    Exact?
        What a linear probe reads a network need not use: see :func:`unweave.probes.probe_effect`. The interval leaves
        out the choice of training sequences.

    Example:
        >>> import unweave
        >>> data, held_out = unweave.load_data("zoo:induction", limit=32).split(0.5)
        >>> parity = Concept("parity", lambda batch: batch.inputs % 2, classes=2)
        >>> found = probe_table(unweave.capture("zoo:induction"), [parity], data, held_out)
        >>> found.find("parity", "before blocks.0.attn.head.0").score.value > 0.85
        True

    Source:
        Alain and Bengio 2016; Hewitt and Liang 2019; Voita and Titov 2020; tables of what, when and where: McGrath et
        al. 2022.
    """
    if method not in METHODS or limit < 1:
        raise InputError(f"method must be one of {', '.join(METHODS)} and limit positive, got {method!r} and {limit}")
    steps = {0: graphs} if isinstance(graphs, Graph) else dict(graphs)
    names = [c.name for c in concepts]
    if not steps or not names or len(set(names)) < len(names):
        raise InputError(f"give at least one graph and concepts of different names, got {len(steps)} and {names}")
    controls = [None if control is None else control_task(c, train, control, seed) for c in concepts]
    rows: list[ProbeRow] = []
    sweeps = {
        step: _Sweep(
            graph, [find_site(graph, p) for p in places or stream_places(graph)], concepts, controls, batch_size
        )
        for step, graph in steps.items()
    }
    fits = sum(len(s.sites) * len(s.asked()) for s in sweeps.values())
    with counter("fitting probes", fits * (1 + code + (method == "logistic")), show=progress) as fitted:
        for step, sweep in sweeps.items():
            probes, codes = sweep.fit(train, ridge, fitted), {}
            if code or method == "logistic":
                sample = sweep.sample(train, limit, seed)
                codes = sweep.codes(sample, fitted) if code else {}
                probes |= sweep.logistic(sample, fitted) if method == "logistic" else {}
            rows += sweep.judge(step, probes, codes, held_out)
    order = {name: k for k, name in enumerate(names)}
    return ProbeTable(tuple(sorted(rows, key=lambda r: order[r.concept])))


METHODS = ("discriminant", "logistic")
Key = tuple[int, int, bool]
"""(number of the place, number of the concept, whether it is the control task)."""
Sample = Mapping[Key, tuple[Tensor, Tensor]]
"""(activations, classes) of each."""
T = TypeVar("T")


@dataclass(frozen=True)
class _Sweep:
    """All probes of one graph."""

    graph: Graph
    sites: Sequence[Site]
    concepts: Sequence[Concept]
    controls: Sequence[Concept | None]
    batch_size: int

    def asked(self) -> list[tuple[int, bool, Concept]]:
        """(number, whether it is the control task, concept) of all that is to be read."""
        pairs = list(zip(self.concepts, self.controls, strict=True))
        asked = [(k, False, concept) for k, (concept, _) in enumerate(pairs)]
        return asked + [(k, True, control) for k, (_, control) in enumerate(pairs) if control is not None]

    @torch.no_grad()
    def _activations(self, batch: Batch) -> list[Tensor]:
        t = trace(self.graph, check_inputs(self.graph, batch.inputs, batch.mask), keep=True)
        return [site.activations(t) for site in self.sites]

    def fit(self, data: TokenData, ridge: float, fitted: Callable[[], None]) -> dict[Key, LinearProbe]:
        asked = self.asked()

        def step(batch: Batch) -> dict[str, Tensor]:
            out: dict[str, Tensor] = {}
            labels = [(k, c, *concept.columns(batch)) for k, c, concept in asked]
            for p, x in enumerate(self._activations(batch)):
                for k, c, columns, said in labels:
                    sums = probe_sums(x, columns.to(x.device), said.to(x.device))
                    out |= {f"{p}/{k}/{c}/{name}": value for name, value in sums.items()}
            return out

        sums = accumulate(data, step, batch_size=self.batch_size, description="fitting probes", progress=False)
        probes = {}
        for p, (k, c, concept) in product(range(len(self.sites)), asked):
            probes[p, k, c] = fit_probe(_under(sums, f"{p}/{k}/{c}/"), concept.classes, ridge)
            fitted()
        return probes

    def sample(self, data: TokenData, limit: int, seed: int) -> Sample:
        """(activations, classes) at the positions that have one, sequences in random order."""
        if data.n_tokens > limit:
            n = max(1, limit * len(data) // data.n_tokens)
            data = data.select(torch.linspace(0, len(data) - 1, n).long())
        data = data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)))
        found: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        for batch in data.batches(self.batch_size):
            labels = [(k, c, *concept.values(batch)) for k, c, concept in self.asked() if concept.classes]
            for p, x in enumerate(self._activations(batch)):
                for k, c, value, said in labels:
                    here = said.to(x.device)
                    found.setdefault((p, k, c), []).append((x[here].float(), value.to(x.device)[here].long()))
        return {key: (torch.cat([x for x, _ in got]), torch.cat([y for _, y in got])) for key, got in found.items()}

    def _classes(self, key: Key) -> int:
        return self.concepts[key[1]].classes

    def logistic(self, sample: Sample, fitted: Callable[[], None]) -> dict[Key, LinearProbe]:
        return self._of_each(sample, logistic_probe, fitted)

    def codes(self, sample: Sample, fitted: Callable[[], None]) -> dict[Key, OnlineCode]:
        return self._of_each(sample, online_code, fitted)

    def _of_each(
        self, sample: Sample, make: Callable[[Tensor, Tensor, int], T], fitted: Callable[[], None]
    ) -> dict[Key, T]:
        made = {}
        for key, (x, label) in sample.items():
            made[key] = make(x, label, self._classes(key))
            fitted()
        return made

    def judge(
        self, step: int, probes: Mapping[Key, LinearProbe], codes: Mapping[Key, OnlineCode], data: TokenData
    ) -> list[ProbeRow]:
        found: dict[Key, list[np.ndarray]] = {key: [] for key in probes}
        for batch in data.batches(self.batch_size):
            labels = [(k, c, *concept.values(batch)) for k, c, concept in self.asked()]
            for p, x in enumerate(self._activations(batch)):
                for k, c, value, said in labels:
                    row = _right(probes[p, k, c], x, value.to(x.device), said.to(x.device))
                    found[p, k, c].append(row.cpu().numpy())
        rows = []
        for p, site in enumerate(self.sites):
            for k, concept in enumerate(self.concepts):
                score, baseline = _score(probes[p, k, False], np.concatenate(found[p, k, False], axis=1))
                control, chance = float("nan"), float("nan")
                if self.controls[k] is not None:
                    dealt, chance = _score(probes[p, k, True], np.concatenate(found[p, k, True], axis=1))
                    control = dealt.value
                layer, probe = self.graph.stages[site.stage].layer, probes[p, k, False]
                lengths = codes.get((p, k, False)), codes.get((p, k, True))
                figures = (score, baseline, control, probe, *lengths, chance)
                rows.append(ProbeRow(concept.name, site.name, layer, step, *figures))
        return rows


def _under(sums: Mapping[str, Tensor], stem: str) -> dict[str, Tensor]:
    return {name.removeprefix(stem): value for name, value in sums.items() if name.startswith(stem)}


def _right(probe: LinearProbe, x: Tensor, value: Tensor, said: Tensor) -> Tensor:
    """By sequence: (positions, what is right or the squared error, the same for the baseline, the label, its square).

    Labels of numbers are taken from their training mean, which rounds less.
    """
    if probe.classes:
        right, base = probe.predict(x) == value, value == probe.label_mean.argmax().to(value.device)
        level = torch.zeros_like(value).double()
    else:
        level = value.double() - probe.label_mean.to(x.device)
        right, base = (probe.predict(x) - value.double()).square(), level.square()
    return torch.stack([(t.double() * said).sum(1) for t in (said, right, base, level, level.square())])


def _score(probe: LinearProbe, table: np.ndarray) -> tuple[Estimate, float]:
    """(accuracy or R^2 with its interval over sequences, that of the baseline)."""
    names = ("n", "right", "base", "level", "square")
    values = dict(zip(names, table, strict=True))

    def of(name: str) -> Any:
        def score(**s: float) -> float:
            if probe.classes:
                return s[name] / s["n"] if s["n"] else float("nan")
            spread = s["square"] - s["level"] ** 2 / s["n"] if s["n"] else 0.0
            return 1 - s[name] / spread if spread > 0 else float("nan")

        return score

    return bootstrap(values, of("right")), of("base")(**{k: v.sum() for k, v in values.items()})
