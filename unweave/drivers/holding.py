"""Set a direction of a code to a value, and see what changes downstream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.drivers.directions import Directions
from unweave.errors import EmptyDataError, InputError
from unweave.execution import Patch, run
from unweave.graph import Edge, Graph
from unweave.scope import Scope, divergence, position_mask
from unweave.statistics import Sums, accumulate

__all__ = ["HeldEffect", "hold", "hold_patch"]


@dataclass(frozen=True, eq=False)
class HeldEffect:
    """What holding one direction does.

    Attributes:
        node, direction, value: what was held, and at what.
        mean_before: the mean value of the direction when it is left alone.
        kl_nats: nats per token by which the outputs move away from the clean ones (the scope's divergence).
        nats: by later node, nats per token when that node alone writes what it writes under the hold; under the held
            node's own name, the direct path to the output alone. They need not add up.
        log_probs: mean change of each output's log-probability (of the output itself under "gaussian").
        n_tokens: how many positions were looked at.
    """

    node: str
    direction: int
    value: float
    mean_before: float
    kl_nats: float
    nats: dict[str, float]
    log_probs: Float[Tensor, " outputs"]
    n_tokens: int

    def table(self, token_strings: Sequence[str] | None = None, k: int = 6) -> list[dict[str, Any]]:
        """Plain rows: the total, the later nodes by nats, the outputs that gain and lose most."""
        rows: list[dict[str, Any]] = [{"what": "total", "name": self.node, "value": self.kl_nats, "unit": "nats"}]
        for name, nats in sorted(self.nats.items(), key=lambda item: -item[1]):
            what = "directly" if name == self.node else "through"
            rows.append({"what": what, "name": name, "value": nats, "unit": "nats"})
        order = self.log_probs.argsort(descending=True).tolist()
        for what, ids in (("up", order[:k]), ("down", order[::-1][:k])):
            for i in ids:
                name = f"[{i}]" if token_strings is None else token_strings[i]
                rows.append({"what": what, "name": name, "value": float(self.log_probs[i]), "unit": "log-probability"})
        return rows


def hold_patch(directions: Directions, node: str, number: int, value: float) -> dict[str, Patch]:
    """The patch that holds one direction at a value, at every position: for :func:`unweave.run` or to let it write.

    code -> code + (value - r . code) e, where e moves this value by 1 and leaves the node's other values.

    Raises:
        UnknownNameError, InputError: no such direction, or a value that is not finite.

    Example:
        >>> import torch, unweave
        >>> from unweave.drivers import code_directions
        >>> from unweave.generation import generate
        >>> graph = unweave.capture("zoo:induction")
        >>> patch = hold_patch(code_directions(graph), "blocks.1.attn.head.1", 3, 5.0)
        >>> generate(graph, torch.tensor([[0, 7, 3, 9, 2, 7, 3, 9]]), 2, patch=patch).shape
        torch.Size([1, 10])
    """
    reading, setting = directions.reading(node, number), directions.setting(node, number)
    if not torch.isfinite(torch.tensor(value)):
        raise InputError(f"a code cannot be held at {value}; give a finite number")

    def held(code: Tensor) -> Tensor:
        # codes of a stage are padded to its widest
        missing = code.shape[-1] - len(reading)
        r, e = F.pad(reading, (0, missing)).to(code), F.pad(setting, (0, missing)).to(code)
        return code + (value - code @ r)[..., None] * e

    return {f"{node}.code": held}


def hold(
    graph: Graph,
    data: TokenData,
    node: str,
    direction: int,
    value: float,
    *,
    directions: Directions | None = None,
    scope: Scope | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> HeldEffect:
    """Hold one direction of a node's code at a value on every token and measure what changes.

    Args:
        direction: its number.
        value: what the direction is set to, in its own units (:class:`unweave.drivers.Examples` says what is usual).
        directions: of this graph, by default the code's coordinates.
        scope: where and how the change of the output is measured.

    Raises:
        UnknownNameError, InputError: no such node or direction, directions of another graph, or a value not finite.
        EmptyDataError: the scope selects no position.

    Cost:
        3 forward passes and one for each later node.

    Exact?
        Yes: everything is measured. Single nodes' nats leave out what nodes do together.

    Example:
        >>> import unweave
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=8)
        >>> effect = hold(graph, data, "blocks.0.attn.head.0", 0, 20.0)
        >>> max(effect.nats, key=effect.nats.get)
        'blocks.1.attn.head.1'
    """
    stage, _ = graph.find(node)
    if stage.write is None:
        raise InputError(f"{node} is the output: nothing comes after it; hold a node that writes")
    if graph.resample:
        raise InputError("this graph's cut edges hear another input; hold a node of the uncut graph")
    directions = directions or Directions(graph, (node,))
    if directions.graph is not graph:
        raise InputError("the directions are of another graph; make them of this one: code_directions(graph)")
    patch = hold_patch(directions, node, direction, value)
    scope, reading = scope or Scope(), directions.reading(node, direction)
    s = graph.where[node][0]
    later = tuple(n for n in graph.writers if graph.where[n][0] > s)
    output = graph.stages[-1]
    direct = Edge(node, output.nodes[0], output.ports[0].name)
    hears = bool((graph.mark_edges([direct]) & graph.edge_matrix).any())

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        where = position_mask(scope, batch).to(graph.device)
        clean = run(graph, batch.inputs, batch.mask, record=[f"{node}.code", node])
        held = run(graph, batch.inputs, batch.mask, record=[node, *later], patch=patch)

        def nats(patched: dict[str, Patch]) -> Tensor:
            logits = run(graph, batch.inputs, batch.mask, patch=patched).logits
            return divergence(scope, clean.logits, logits, batch).double().sum()

        out: Sums = {name: nats({name: held.values[name]}) for name in later}
        out[node] = nats({str(direct): held.values[node]}) if hears else torch.zeros((), dtype=torch.float64)
        code = clean.values[f"{node}.code"]
        before = code[..., : len(reading)].float() @ reading
        out[" before"] = before[where].double().sum()
        out[" total"] = divergence(scope, clean.logits, held.logits, batch).double().sum()
        out[" change"] = _change(scope, clean.logits[where], held.logits[where])
        out[" n"] = where.sum()
        return out

    sums = accumulate(data, step, batch_size=batch_size, description=f"holding {node}", progress=progress)
    n = sums.pop(" n")
    if float(n) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    means = {name: (total / n).cpu() for name, total in sums.items()}
    change, before, total = means.pop(" change").float(), float(means.pop(" before")), float(means.pop(" total"))
    nats = {name: float(mean) for name, mean in means.items()}
    return HeldEffect(node, direction, value, before, total, nats, change, int(n))


def _change(scope: Scope, clean: Float[Tensor, "token outputs"], held: Float[Tensor, "token outputs"]) -> Tensor:
    clean, held = clean.double(), held.double()
    if scope.divergence == "gaussian":
        return (held - clean).sum(0)
    return (held.log_softmax(-1) - clean.log_softmax(-1)).sum(0)
