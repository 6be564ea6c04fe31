"""What a direction says in tokens: those it favours when written, and those it answers to when read.

What is written reaches the logits through the final norm, x -> F (s(x) C x) with C x centred where the norm centres, F
its gain and s(x) one over the standard deviation of the whole stream. Its Jacobian at x is s F (I - n n^T / d), with
n = s C x. :func:`readout_jacobian` averages s (I - n n^T / d) over real text, so that what is said here is the mean
first-order effect on real text and not that of the gain alone (the plain logit lens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.drivers.directions import Directions
from unweave.errors import EmptyDataError, InputError, ShapeError, UnknownNameError
from unweave.execution import check_inputs, plan_of, trace
from unweave.graph import Graph
from unweave.ops import Attention
from unweave.paths.circuits import ov_circuit, qk_circuit, read_alone
from unweave.paths.weights import embedded_tokens, node_read, port_of, readout_weight
from unweave.scope import Scope, position_mask
from unweave.statistics import Sums, accumulate

__all__ = ["heard_tokens", "later_readers", "node_vocabulary", "readout_jacobian", "tokens_through", "written_tokens"]


def readout_jacobian(
    graph: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Float[Tensor, "d_model d_model"]:
    """J = mean over tokens of s (I - n n^T / d): what the final norm does, on average, to something small added.

    Raises:
        EmptyDataError: the scope selects no position.

    Cost:
        One forward pass.

    Exact?
        Of the first order, yes; s I where the norm's scale is held, I where there is no norm.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")  # it has no norm
        >>> J = readout_jacobian(graph, unweave.load_data("zoo:induction", limit=4))
        >>> bool((J == torch.eye(64)).all())
        True
    """
    last = len(graph.stages) - 1
    port = graph.stages[last].ports[0]

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        t = trace(graph, check_inputs(graph, batch.inputs, batch.mask), keep=True)
        mask = position_mask(scope or Scope(), batch).to(graph.device)
        x = t.inputs[last, port.name][:, 0][mask].float()
        normed, scale = (x, torch.ones_like(x[:, :1])) if port.norm is None else port.norm.standardise(x)
        bends = port.norm is not None and not port.norm.is_linear
        tilted = (normed * scale).T @ normed / x.shape[1] if bends else torch.zeros(x.shape[1], x.shape[1])
        return {"n": mask.sum(), "scale": scale.sum(), "tilted": tilted.to(x)}

    sums = accumulate(data, step, batch_size=batch_size, description="the final norm", progress=progress)
    if float(sums["n"]) == 0:
        raise EmptyDataError("the scope selects no position of this data set")
    eye = torch.eye(len(sums["tilted"]), dtype=torch.float64, device=graph.device)
    return ((sums["scale"] * eye - sums["tilted"]) / sums["n"]).float()


def written_tokens(
    graph: Graph,
    written: Float[Tensor, "direction d_model"],
    jacobian: Float[Tensor, "d_model d_model"] | None = None,
) -> Float[Tensor, "direction outputs"]:
    """By how much each output's logit grows per unit of a written direction, mean over outputs removed.

    W_U F J u: the direct path, see :func:`readout_jacobian`. Without a Jacobian the scale of the final norm and its
    tilt are left out (the logit lens): the figures are then comparable among outputs, not among models.

    Raises:
        ShapeError: directions of another width.

    Exact?
        The mean first-order effect. A cap of the logits is left out.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> written_tokens(graph, torch.eye(64)[:2]).shape
        torch.Size([2, 48])

    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    readout = readout_weight(graph)
    if written.ndim != 2 or written.shape[1] != readout.shape[1]:
        raise ShapeError(f"directions must be [direction, {readout.shape[1]}], got {tuple(written.shape)}")
    seen = written.to(readout) if jacobian is None else written.to(readout) @ jacobian.to(readout).T
    logits = seen @ readout.T
    return logits - logits.mean(1, keepdim=True)


def later_readers(
    graph: Graph, node: str, written: Float[Tensor, "direction d_model"]
) -> tuple[tuple[str, ...], Float[Tensor, "direction ports"]]:
    """(ports, how strongly each later port that hears the node reads a direction), relative to a random direction.

    |W F u|^2 d_model / (|W F|^2 |u|^2), with all reads W of the port: 1 on average over directions u.

    Raises:
        UnknownNameError: an unknown node.

    Cost:
        One product per stage.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> ports, strength = later_readers(graph, "blocks.0.attn.head.0", torch.eye(64)[:1])
        >>> len(ports), strength.shape
        (7, torch.Size([1, 7]))
    """
    if node not in graph.writers:
        raise UnknownNameError("writer", node, graph.writers)
    heard = graph.edge_matrix[:, graph.writers.index(node)]
    names: list[str] = []
    found: list[Tensor] = []
    for s, stage in enumerate(graph.stages):
        for port in plan_of(graph).stages[s].ports:
            start = graph.port_starts[s, port.port.name]
            kept = heard[start : start + len(stage.nodes)].nonzero()[:, 0]
            if not len(kept):
                continue
            maps = torch.cat([read.folded(port.norm).float() for read in port.reads], 1)[kept.to(graph.device)]
            felt = torch.einsum("nwd,md->mnw", maps, written.to(maps)).square().sum(2)
            size = maps.square().sum((1, 2)) * written.to(maps).square().sum(1, keepdim=True)
            found.append(felt * maps.shape[2] / size.clamp(min=1e-30))
            names += [f"{stage.nodes[i]}.{port.port.name}" for i in kept.tolist()]
    return tuple(names), torch.cat(found, 1) if found else written.new_zeros(len(written), 0)


def tokens_through(
    graph: Graph, written: Float[Tensor, "direction d_model"], port: str, *, distance: int = 0
) -> Float[Tensor, "direction tokens"]:
    """What a written direction says in tokens to a later head that reads it.

    Through ``HEAD.v``: what it adds to each output's logit where the head looks (W_U F W_O W_V u, mean over outputs
    removed). Through ``HEAD.q``: which key tokens the head then looks for; through ``HEAD.k``: which query tokens then
    look here (u^T W_Q^T R W_K n(e) and the reverse, mean over tokens removed).

    Args:
        distance: how many tokens the query comes after the key, for rotary heads.

    Raises:
        UnknownNameError: no such head or port.
        InputError: an MLP or the output, which say nothing linear in tokens.

    Exact?
        The linear part: scales of norms in between are left out.
    """
    head, _, name = port.rpartition(".")
    stage, _ = graph.find(head)
    port_of(stage, name)
    if not isinstance(stage.core, Attention):
        raise InputError(f"{port} is no port of an attention head; a direction can be followed into q, k and v only")
    if name == "v":
        matrix = ov_circuit(graph, head).matrix()
        return written_tokens(graph, written.to(matrix) @ matrix.T)
    matrix = qk_circuit(graph, head).matrix(distance)
    norm = port_of(stage, "k" if name == "q" else "q").norm
    x = embedded_tokens(graph, None)
    x = x if norm is None else norm.standardise(x)[0]
    scores = written.to(matrix) @ (matrix if name == "q" else matrix.T) @ x.T
    return scores - scores.mean(1, keepdim=True)


def heard_tokens(graph: Graph, node: str, port: str | None = None) -> Float[Tensor, "read width tokens"]:
    """What each coordinate of a node's code is given by a token's embedding alone, norm and biases exactly.

    For an MLP its neurons before the non-linearity (of a gated one: gate, then up); for a head its value coordinates,
    where it looks at that token. What other nodes write, and learned positions, are left out.

    Args:
        port: by default the one that codes come from: "v" of a head, "in" of an MLP.

    Raises:
        UnknownNameError: an unknown node or port.
        InputError: the node reads nothing, or the graph embeds no tokens.

    Example:
        >>> import unweave
        >>> heard_tokens(unweave.capture("zoo:induction"), "blocks.0.attn.head.0").shape
        torch.Size([1, 32, 48])
    """
    stage, i = graph.find(node)
    if not stage.ports:
        raise InputError(f"{node} reads nothing; name a head or an MLP")
    name = port or ("v" if isinstance(stage.core, Attention) else stage.ports[0].name)
    x = embedded_tokens(graph, None)
    reads = range(len(port_of(stage, name).reads))
    return torch.stack([read_alone(stage, i, name, x, read).T for read in reads])


def node_vocabulary(
    directions: Directions,
    node: str,
    number: int,
    token_strings: Sequence[str] | None = None,
    *,
    jacobian: Float[Tensor, "d_model d_model"] | None = None,
    k: int = 6,
    readers: int = 4,
) -> list[dict[str, Any]]:
    """Everything of this file about one direction, as plain rows: role, port, strength, token, value.

    Roles: "writes" (the direct path, up and down), "through" (a later head's port, among the ``readers`` ports that
    read it most), "read by" (any such port, with no token) and "reads" (tokens whose embedding raises and lowers it,
    one read after the other; only where the direction is a coordinate of what the node reads).

    Args:
        token_strings: the string of every token; ids in brackets without.
        jacobian: see :func:`written_tokens`.
        k: how many tokens at each end.
        readers: how many later ports.

    Raises:
        UnknownNameError, InputError: no such direction.

    Example:
        >>> import unweave
        >>> from unweave.drivers import code_directions
        >>> graph = unweave.capture("zoo:induction")
        >>> rows = node_vocabulary(code_directions(graph), "blocks.0.attn.head.0", 0)
        >>> sorted({row["role"] for row in rows})
        ['read by', 'reads', 'through', 'writes']
    """
    graph = directions.graph
    written = directions.writing(node, number)[None]
    rows = _rows("writes", None, None, written_tokens(graph, written, jacobian)[0], token_strings, k)
    ports, strength = later_readers(graph, node, written)
    for j in strength[0].argsort(descending=True)[:readers].tolist():
        head, _, name = ports[j].rpartition(".")
        value = float(strength[0, j])
        rows.append({"role": "read by", "port": ports[j], "strength": value, "token": None, "value": None})
        if isinstance(graph.find(head)[0].core, Attention):
            heard = tokens_through(graph, written, f"{head}.{name}")[0]
            rows += _rows("through", ports[j], value, heard, token_strings, k)
    stage, i = graph.find(node)
    attends = isinstance(stage.core, Attention)
    port = "v" if attends else stage.ports[0].name if stage.ports else ""
    if stage.ports and (attends or not directions.readings):
        reading = directions.reading(node, number)
        if len(node_read(stage, i, port)) == len(reading):
            for heard in torch.einsum("rwt,w->rt", heard_tokens(graph, node), reading):
                rows += _rows("reads", f"{node}.{port}", None, heard, token_strings, k)
    return rows


def _rows(
    role: str, port: str | None, strength: float | None, values: Tensor, strings: Sequence[str] | None, k: int
) -> list[dict[str, Any]]:
    """The k highest and the k lowest tokens."""
    order = values.argsort(descending=True).tolist()
    ends = order[:k] + order[k:][-k:]
    facts = {"role": role, "port": port, "strength": strength}
    return [facts | {"token": f"[{i}]" if strings is None else strings[i], "value": float(values[i])} for i in ends]
