"""Hold attention patterns, and the scales of norms: at the values of one run, or against gradients only.

:func:`freeze` makes them constants of one run, whatever flows in afterwards: for effects that are measured.
:func:`hold` leaves every value as it is and stops gradients there: for attributions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import InputError, UnsupportedModelError
from unweave.execution import PortPlan, StagePlan, Trace, plan_of
from unweave.graph import Graph, Port, Stage
from unweave.ops import Attention, Context, Core, FeatureCore, Norm, norm_bias

__all__ = ["FROZEN", "check_frozen", "clean_pattern", "clean_scale", "freeze", "stop_gradients"]

FROZEN = ("none", "patterns", "patterns and norms")


def check_frozen(frozen: str) -> None:
    """Refuse a word that says nothing about what is held.

    Raises:
        InputError: it is none of :data:`FROZEN`.
    """
    if frozen not in FROZEN:
        raise InputError(f"frozen must be one of {', '.join(map(repr, FROZEN))}, got {frozen!r}")


@dataclass(frozen=True, eq=False)
class FrozenNorm(Norm):
    """A norm that divides by what it divided by in another run; linear but for its bias.

    Attributes:
        norm: whose gain, centring and bias it has.
        inverse: 1 / standard deviation, for each distinct sum that the nodes heard; None to divide by its own, through
            which no gradient flows.
        row_of: which of these sums each node heard.
    """

    norm: Norm
    inverse: Float[Tensor, "batch row pos 1"] | None = None
    row_of: Int[Tensor, " nodes"] | None = None

    def _scale(self, x: Tensor) -> Float[Tensor, "... 1"]:
        if self.inverse is None:
            return self.norm.standardise(x.detach())[1]
        rows = self.inverse.shape[1]
        inverse = self.inverse if rows in (1, x.shape[1]) else self.inverse[:, self.row_of]
        return _copied(inverse, x).to(x)

    def apply(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        bias = norm_bias(self.norm, x)
        now = self.norm.standardise(x)[1]
        return (self.norm.apply(x) - bias) * (self._scale(x) / now) + bias

    def standardise(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
        inverse = self._scale(x)
        return x * inverse, inverse

    def fold(self, weight: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.norm.fold(weight)

    def vjp(self, x: Float[Tensor, "... d"], g: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self._scale(x) * self.fold(g)

    @property
    def is_linear(self) -> bool:
        return True

    def for_nodes(self, nodes: Int[Tensor, " n"]) -> Norm:
        if self.inverse is None or self.inverse.shape[1] == 1:
            return self
        assert self.row_of is not None
        return FrozenNorm(self.norm, self.inverse[:, self.row_of[nodes]])


@dataclass(frozen=True, eq=False)
class FrozenAttention(Core):
    """Heads that look where they looked in another run, whatever their queries and keys are now.

    Attributes:
        core: the heads.
        pattern: where they looked; None to look where queries and keys say, through which no gradient flows.
    """

    core: Attention
    pattern: Float[Tensor, "batch node query key"] | None = None

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        q, k, v = reads
        if self.pattern is None:
            return self.core.forward((q.detach(), k.detach(), v), context)
        return self.core.mix(_copied(self.pattern, v), v)

    def for_nodes(self, nodes: Int[Tensor, " n"]) -> Core:
        core = self.core.for_nodes(nodes)
        assert isinstance(core, Attention)
        return FrozenAttention(core, None if self.pattern is None else self.pattern[:, nodes])


def _copied(value: Float[Tensor, "batch a b c"], like: Tensor) -> Float[Tensor, "copies_batch a b c"]:
    """What was held of a batch, for as many copies of it as there are now."""
    copies = like.shape[0] // value.shape[0]
    return value if copies == 1 else value.repeat(copies, 1, 1, 1)


def clean_pattern(t: Trace, s: int) -> Float[Tensor, "batch node query key"]:
    """Where the heads of stage s look in a run that was kept."""
    stage = t.graph.stages[s]
    assert isinstance(stage.core, Attention)
    return stage.core.pattern(t.reads[s, "q"][0], t.reads[s, "k"][0], t.context)


def clean_scale(t: Trace, s: int, port: PortPlan) -> Float[Tensor, "batch row pos 1"]:
    """1 / the standard deviation by which a port's norm divides in a run that was kept; 1 where there is no norm."""
    x = t.inputs[s, port.port.name]
    return torch.ones_like(x[..., :1]) if port.port.norm is None else port.port.norm.standardise(x)[1]


def freeze(t: Trace, frozen: str) -> Graph:
    """The graph of a run, with attention patterns (and norm scales) held at that run's values.

    What it computes on the same inputs is unchanged; on these inputs only does it mean anything.

    Args:
        t: a run with ``keep=True``.
        frozen: what is held.

    Raises:
        InputError: an unknown word.
        UnsupportedModelError: scales are to be held and a layer's writes pass another norm (Gemma).
    """
    check_frozen(frozen)
    if frozen == "none":
        return t.graph
    return _frozen(t.graph, t, frozen)


def stop_gradients(graph: Graph, frozen: str) -> Graph:
    """The same function, with gradients stopped at attention patterns (and norm scales).

    What nodes compute is unchanged; heads' queries and keys get no gradient, and a norm's Jacobian is s F with its
    scale s a constant (see :meth:`Norm.standardise`).

    Args:
        graph: any.
        frozen: where gradients stop.

    Raises:
        InputError: an unknown word.
        UnsupportedModelError: scales are to be held and a layer's writes pass another norm (Gemma).
    """
    check_frozen(frozen)
    return graph if frozen == "none" else _frozen(graph, None, frozen)


def _frozen(graph: Graph, t: Trace | None, frozen: str) -> Graph:
    plans = enumerate(plan_of(graph).stages)
    stages = tuple(_freeze_stage(plan, t, s, frozen == "patterns and norms") for s, plan in plans)
    return dataclasses.replace(graph, stages=stages)


def _freeze_stage(plan: StagePlan, t: Trace | None, s: int, norms: bool) -> Stage:
    stage = plan.stage
    if norms and stage.post is not None:
        raise UnsupportedModelError(
            f"what {stage.nodes[0]} writes passes another norm, whose scale cannot be held here; use frozen='patterns'"
        )
    core = stage.core
    if isinstance(core, Attention):
        core = FrozenAttention(core, None if t is None else clean_pattern(t, s))
    elif isinstance(core, FeatureCore) and isinstance(core.inner, Attention):
        if t is not None:
            raise UnsupportedModelError(f"heads are refined into {stage.nodes[0]}; freeze before refining")
        core = dataclasses.replace(core, inner=FrozenAttention(core.inner))
    ports = tuple(_freeze_port(p, t, s) if norms else p.port for p in plan.ports)
    return dataclasses.replace(stage, core=core, ports=ports)


def _freeze_port(port: PortPlan, t: Trace | None, s: int) -> Port:
    if port.norm is None:
        return port.port
    norm = FrozenNorm(port.norm) if t is None else FrozenNorm(port.norm, clean_scale(t, s, port), port.row_of)
    return dataclasses.replace(port.port, norm=norm)
