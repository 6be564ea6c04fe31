"""The rules of a graph, stage by stage: the inside of :meth:`Graph.lint`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unweave.errors import GraphError
from unweave.graph.parts import Port, Stage

__all__ = ["check_stage"]

Check = Callable[[bool, str], None]


def check_stage(stages: Sequence[Stage], s: int) -> None:
    """Check one stage and what it hears of those before it.

    Raises:
        GraphError: the first rule broken, and where.
    """
    stage = stages[s]

    def check(ok: bool, what: str) -> None:
        if not ok:
            raise GraphError(f"stage {s} ({stage.nodes[0] if stage.nodes else 'empty'}): {what}")

    check(bool(stage.nodes), "has no nodes")
    lo, hi = stage.visible
    check(0 <= lo <= hi <= s, f"sees stages {lo}..{hi}, which are not all before it")
    check(bool(stage.ports) == (hi > lo), "must have ports exactly if it sees earlier stages")
    check(len(stage.code_widths) == len(stage.nodes), "needs one code width per node")
    if stage.write is not None:
        check(stage.write.d_in == sum(stage.code_widths), "its write map does not fit its codes")
    else:
        check(s == len(stages) - 1, "writes nothing but is not the last")
    heard = [(write.d_out, len(t.nodes)) for t in stages[lo:hi] if (write := t.write) is not None]
    widths = {width for width, _ in heard}
    check(len(widths) <= 1, f"hears writers of different widths {sorted(widths)}")
    n_writers = sum(n for _, n in heard)
    for port in stage.ports:
        _check_port(port, len(stage.nodes), n_writers, next(iter(widths)), check)


def _check_port(port: Port, n: int, n_writers: int, width: int, check: Check) -> None:
    for read in port.reads:
        check(read.map.d_in == width, f"port {port.name} reads {read.map.d_in} dimensions of a stream of {width}")
        fits = sum(read.widths) == read.map.d_out
        check(fits, f"port {port.name}: block widths do not add up to the read map's outputs")
        fits = n % max(len(read.widths), 1) == 0
        check(fits, f"port {port.name}: {n} nodes cannot share {len(read.widths)} blocks")
    if port.edges is not None:
        check(port.edges.shape == (n, n_writers), f"port {port.name}: the edge table has a wrong shape")
    if port.reach is not None:
        fits = port.reach.shape == (n, n_writers)
        check(fits, f"port {port.name}: the table of what it reaches has a wrong shape")
    if port.offset is not None:
        fits = port.offset.ndim == 3 and port.offset.shape[::2] == (n, width)
        check(fits, f"port {port.name}: a wrong offset shape")
    if port.wires is not None:
        w, e = port.wires, len(port.wires.nodes)
        fits = w.writers.shape == (e,) and w.left.shape == (e, width, w.right.shape[1])
        fits = fits and w.right.shape[::2] == (e, width) and e > 0
        check(fits, f"port {port.name}: wires of wrong shapes")
        inside = 0 <= int(w.nodes.min()) <= int(w.nodes.max()) < n and int(w.writers.min()) >= 0
        inside = inside and int(w.writers.max()) < n_writers
        check(inside, f"port {port.name}: wires from or to nodes that are not there")
