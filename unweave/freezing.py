"""Hold attention patterns, and the scales of norms, at the values they have in one run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import InputError, UnsupportedModelError
from unweave.execution import PortPlan, Trace
from unweave.graph import Graph, Port, Stage
from unweave.ops import Attention, Context, Core, Norm, norm_bias

__all__ = ["FROZEN", "check_frozen", "clean_pattern", "clean_scale", "freeze"]

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
        inverse: 1 / standard deviation, for each distinct sum that the nodes heard.
        row_of: which of these sums each node heard.
    """

    norm: Norm
    inverse: Float[Tensor, "batch row pos 1"]
    row_of: Int[Tensor, " nodes"]

    def _scale(self, x: Tensor) -> Float[Tensor, "batch row pos 1"]:
        rows = self.inverse.shape[1]
        return self.inverse if rows in (1, x.shape[1]) else self.inverse[:, self.row_of]

    def apply(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        bias = norm_bias(self.norm, x)
        now = self.norm.standardise(x)[1]
        return (self.norm.apply(x) - bias) * (self._scale(x).to(x) / now) + bias

    def standardise(self, x: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... 1"]]:
        inverse = self._scale(x).to(x)
        return x * inverse, inverse

    def fold(self, weight: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.norm.fold(weight)

    def vjp(self, x: Float[Tensor, "... d"], g: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self._scale(x).to(x) * self.fold(g)


@dataclass(frozen=True, eq=False)
class FrozenAttention(Core):
    """Heads that look where they looked in another run, whatever their queries and keys are now."""

    core: Attention
    pattern: Float[Tensor, "batch node query key"]

    def forward(self, reads: tuple[Tensor, ...], context: Context) -> Float[Tensor, "batch node pos width"]:
        return self.core.mix(self.pattern, reads[2])


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
    stages = tuple(_freeze_stage(t, s, frozen == "patterns and norms") for s in range(len(t.graph.stages)))
    return dataclasses.replace(t.graph, stages=stages)


def _freeze_stage(t: Trace, s: int, norms: bool) -> Stage:
    stage, plan = t.graph.stages[s], t.plan.stages[s]
    if norms and stage.post is not None:
        raise UnsupportedModelError(
            f"what {stage.nodes[0]} writes passes another norm, whose scale cannot be held here; use frozen='patterns'"
        )
    core = stage.core
    if isinstance(core, Attention):
        core = FrozenAttention(core, clean_pattern(t, s))
    ports = tuple(_freeze_port(t, s, p) if norms else p.port for p in plan.ports)
    return dataclasses.replace(stage, core=core, ports=ports)


def _freeze_port(t: Trace, s: int, port: PortPlan) -> Port:
    if port.port.norm is None:
        return port.port
    return dataclasses.replace(port.port, norm=FrozenNorm(port.port.norm, clean_scale(t, s, port), port.row_of))
