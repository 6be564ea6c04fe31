"""Recording and patching while a graph runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unweave.errors import ShapeError
from unweave.execution.plans import PortPlan, StagePlan
from unweave.execution.traces import Trace
from unweave.graph import Edge, Graph, at_positions
from unweave.ops import Attention

__all__ = ["BEFORE", "Hooks", "Patch"]

Patch = Tensor | Callable[[Tensor], Tensor]


# "before NODE" names the residual stream that a node's stage finds
BEFORE = "before "


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of this shape broadcasts to the wanted one."""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(a in (1, b) for a, b in pairs)


class Hooks:
    """What one run records and patches, sorted by where it happens."""

    def __init__(self, graph: Graph, record: frozenset[str], patch: dict[str, Patch]) -> None:
        self.record, self.patch = record, patch
        self.active = bool(record or patch)
        self.edges = {name: Edge.parse(name) for name in patch if "->" in name}
        self.stages_apart = {graph.where[e.src][0] for e in self.edges.values()}
        self.stages_apart |= {graph.where[n][0] for n in (*record, *patch) if n in graph.where}

    def touches(self, s: int) -> bool:
        """Whether the nodes of a stage must be known one by one."""
        return self.active and s in self.stages_apart

    def hears(self, plan: StagePlan) -> bool:
        """Whether what a port of a stage hears, in all or over one edge, is recorded or patched."""
        if not self.active:
            return False
        nodes = set(plan.stage.nodes)
        ports = (f"{n}.{port.port.name}" for n in nodes for port in plan.ports)
        return any(e.dst in nodes for e in self.edges.values()) or any(
            p in self.record or p in self.patch for p in ports
        )

    def _apply(self, t: Trace, name: str, value: Tensor) -> Tensor:
        if name in self.patch:
            given = self.patch[name]
            new = given(value) if callable(given) else given
            if not isinstance(new, Tensor) or not _fits(new.shape, value.shape):
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ShapeError(f"the patch of {name} must have shape {tuple(value.shape)}, got {got}")
            value = new.to(value).expand_as(value)
        if name in self.record:
            t.values[name] = value
        return value

    def _each_node(self, t: Trace, s: int, suffix: str, value: Tensor) -> Tensor:
        """Apply to every node of ``[batch node ...]``, replacing only those patched."""
        for i, node in enumerate(t.plan.stages[s].stage.nodes):
            new = self._apply(t, node + suffix, value[:, i])
            if node + suffix in self.patch:
                value = value.clone()
                value[:, i] = new
        return value

    def node(self, t: Trace, s: int, each: Tensor) -> Tensor:
        return self._each_node(t, s, "", each)

    def stream(self, t: Trace, s: int) -> None:
        """Record or patch the residual stream before stage s, for that stage and all after it."""
        if not self.active:
            return
        for name in (f"{BEFORE}{node}" for node in t.plan.stages[s].stage.nodes):
            if name in self.record or name in self.patch:
                lo, hi = t.plan.stages[s].stage.visible
                new = self._apply(t, name, t.stream(lo, hi))
                if name in self.patch:
                    t.shift(lo, hi, new)

    def port(self, t: Trace, s: int, plan: PortPlan, x: Tensor) -> Tensor:
        if not self.active:
            return x
        nodes = t.plan.stages[s].stage.nodes
        name = "." + plan.port.name
        here = {n: e for n, e in self.edges.items() if e.port == plan.port.name and e.dst in nodes}
        if not here and not any(n + name in self.patch or n + name in self.record for n in nodes):
            return x
        x = x.expand(-1, len(nodes), -1, -1) if x.shape[1] == 1 else x[:, plan.row_of]
        for text, edge in here.items():
            stage, i = t.graph.where[edge.src]
            sent = t.node_writes(stage)[:, i]
            x = x.clone()
            x[:, nodes.index(edge.dst)] += self._apply(t, text, sent) - sent
        return self._each_node(t, s, name, x)

    def core(self, t: Trace, s: int, reads: tuple[Tensor, ...], row_of: Tensor | None = None) -> Tensor:
        """Codes of all nodes (``row_of``: of which row of the reads each; by default its own or the one of all)."""
        stage = t.plan.stages[s].stage
        core, nodes = stage.core, stage.nodes
        wanted = self.active and any(n + ".pattern" in self.record or n + ".pattern" in self.patch for n in nodes)
        if wanted and isinstance(core, Attention):
            pattern = self._each_node(t, s, ".pattern", core.pattern(reads[0], reads[1], t.context))
            codes = core.mix(pattern, reads[2])
        else:
            codes = core.forward(reads, t.context) if row_of is None else core.forward_rows(reads, row_of, t.context)
        codes = at_positions(stage, codes)
        return at_positions(stage, self._each_node(t, s, ".code", codes)) if self.active else codes
