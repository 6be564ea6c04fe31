"""The two circuits of an attention head: what it looks for (QK) and what it does with what it finds (OV).

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import InputError
from unweave.graph import Graph, Stage
from unweave.ops import Attention, Rotary, norm_bias, wide
from unweave.paths.weights import (
    check_table,
    embedded_tokens,
    find_head,
    node_bias,
    node_read,
    node_write,
    port_of,
    readout_weight,
)

__all__ = ["OVCircuit", "QKCircuit", "ov_circuit", "positive_share", "qk_circuit", "read_alone"]

Tokens = Int[Tensor, " tokens"]


def positive_share(left: Float[Tensor, "n width"], right: Float[Tensor, "n width"]) -> float:
    """sum Re(l) / sum |l| over the eigenvalues l of the n x n matrix left right^T; 0 for a matrix of zeros.

    The eigenvalues that are not 0 are those of the width x width matrix right^T left.
    """
    values = torch.linalg.eigvals(right.double().T @ left.double())
    mass = float(values.abs().sum())
    return float(values.real.sum()) / mass if mass > 0 else 0.0


def turn(rotary: Rotary | None, x: Float[Tensor, "n width"], position: int) -> Float[Tensor, "n width"]:
    """x as the rotary embedding turns it at a position, which may be negative."""
    if rotary is None:
        return x
    angle = position * wide(rotary.inv_freq)
    cos, sin = (angle.cos() * rotary.scaling).to(x), (angle.sin() * rotary.scaling).to(x)
    planes = len(angle)
    a, b, rest = x[:, :planes], x[:, planes : 2 * planes], x[:, 2 * planes :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=1)


def read_alone(
    stage: Stage, i: int, port: str, x: Float[Tensor, "tokens d"], read: int = 0
) -> Float[Tensor, "tokens width"]:
    """What a node reads of vectors that are all its port hears: norm and bias exactly."""
    norm = port_of(stage, port).norm
    weight = node_read(stage, i, port, read, folded=False)
    return (x if norm is None else norm.apply(x)) @ weight.T + node_bias(stage, i, port, read)


def _linear_tokens(stage: Stage, port: str, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """The norm of vectors, its bias left out."""
    norm = port_of(stage, port).norm
    return x if norm is None else norm.apply(x) - norm_bias(norm, x)


def _with_gains(core: Attention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """W_Q and W_K with the gains of the norms of queries and keys, where there are such."""
    query = query if core.q_norm is None else query * core.q_norm.gain[:, None]
    return query, key if core.k_norm is None else key * core.k_norm.gain[:, None]


@dataclass(frozen=True, eq=False)
class QKCircuit:
    """What a head looks for: score = scale x_query^T W_Q^T R W_K x_key.

    Attributes:
        graph, head: whose circuit.
        query: ``[width d_model]``: W_Q with the linear part of its norm (and the gain of a norm of queries).
        key: ``[width d_model]``: W_K alike.
        scale: what scores are multiplied with.
    """

    graph: Graph
    head: str
    query: Float[Tensor, "width d_model"]
    key: Float[Tensor, "width d_model"]
    scale: float

    def factors(self, distance: int = 0) -> tuple[Float[Tensor, "width d_model"], Float[Tensor, "width d_model"]]:
        """(A, B): the bilinear form is A^T B, for a query ``distance`` tokens after its key; scale and R in A."""
        rotary = find_head(self.graph, self.head)[2].rotary
        return turn(rotary, self.query.T, distance).T * self.scale, turn(rotary, self.key.T, 0).T

    def matrix(self, distance: int = 0) -> Float[Tensor, "d_model d_model"]:
        """The bilinear form [x_query, x_key] in the stream."""
        a, b = self.factors(distance)
        return a.T @ b

    def token_scores(
        self,
        tokens: Tokens | None = None,
        keys: Int[Tensor, " keys"] | None = None,
        *,
        distance: int = 0,
        positions: tuple[int, int] | None = None,
    ) -> Float[Tensor, "queries keys"]:
        """The score (before the softmax) of every query token against every key token.

        Each token's embedding goes through the port's own norm, biases, the norms of queries and keys, the rotary
        turn, scale and cap; what other nodes write is left out. For a head of the first layer that is the true score.

        Args:
            tokens: ids of queries; all when None.
            keys: ids of keys; the same as ``tokens`` when None.
            distance: how many tokens the query comes after the key.
            positions: (query's, key's), for models with learned positions, whose vectors are then added; they
                replace ``distance``. Without, learned positions are left out.

        Raises:
            InputError: a table of more than 2^26 scores, or ids outside the vocabulary.
            ShapeError: tokens are no ids.
        """
        stage, i, core = find_head(self.graph, self.head)
        at = positions or (None, None)
        distance = distance if positions is None else positions[0] - positions[1]
        keys = tokens if keys is None else keys
        x, y = embedded_tokens(self.graph, tokens, at[0]), embedded_tokens(self.graph, keys, at[1])
        check_table(len(x), len(y))
        q, k = read_alone(stage, i, "q", x), read_alone(stage, i, "k", y)
        q = q if core.q_norm is None else core.q_norm.apply(q)
        k = k if core.k_norm is None else core.k_norm.apply(k)
        scores = turn(core.rotary, q, distance) @ turn(core.rotary, k, 0).T * self.scale
        return scores if core.softcap is None else core.softcap * torch.tanh(scores / core.softcap)

    def matching(self, tokens: Tokens | None = None, *, distance: int = 0) -> float:
        """How far a head looks for the token it is at: sum Re(l) / sum |l| over the eigenvalues of QK in token space.

        1: every token scores positively with itself, in every direction; 0: no preference; -1: tokens repel
        themselves. Biases are left out, so that the form is bilinear.
        """
        stage, i, core = find_head(self.graph, self.head)
        x = embedded_tokens(self.graph, tokens)
        query, key = _with_gains(core, *(node_read(stage, i, port, folded=False) for port in "qk"))
        q = turn(core.rotary, _linear_tokens(stage, "q", x) @ query.T, distance)
        k = turn(core.rotary, _linear_tokens(stage, "k", x) @ key.T, 0)
        return positive_share(q * self.scale, k)


def qk_circuit(graph: Graph, head: str) -> QKCircuit:
    """The QK circuit of a head, as low-rank factors; nothing of the size of the vocabulary is made.

    Args:
        head: its name.

    Raises:
        UnknownNameError: no attention head has that name.

    Cost:
        The head's two matrices.

    Exact?
        :meth:`QKCircuit.token_scores` is, for what the embedding alone says. The factors leave out biases and the
        scales of norms. Edges that were cut, and constants left in their place, are not looked at.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> circuit = qk_circuit(graph, "blocks.0.attn.head.0")
        >>> circuit.matrix().shape, circuit.token_scores(torch.tensor([3, 4])).shape
        (torch.Size([64, 64]), torch.Size([2, 2]))

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    stage, i, core = find_head(graph, head)
    query, key = _with_gains(core, node_read(stage, i, "q"), node_read(stage, i, "k"))
    return QKCircuit(graph, head, query, key, core.scale)


@dataclass(frozen=True, eq=False)
class OVCircuit:
    """What a head does with what it finds: W_O W_V, from the stream at the key to the stream at the query.

    Attributes:
        graph, head: whose circuit.
        write: ``[d_model width]``: W_O.
        value: ``[width d_model]``: W_V with the linear part of its norm.
    """

    graph: Graph
    head: str
    write: Float[Tensor, "d_model width"]
    value: Float[Tensor, "width d_model"]

    def matrix(self) -> Float[Tensor, "d_model d_model"]:
        """W_O W_V."""
        return self.write @ self.value

    def token_logits(
        self, tokens: Tokens | None = None, outputs: Int[Tensor, " outputs"] | None = None
    ) -> Float[Tensor, "tokens outputs"]:
        """What the head adds to each output's logit when it looks at one token and nothing else.

        W_U F W_O (W_V n(e_t) + b_V): the embedding's own norm n exactly, the final norm's linear part F folded; the
        final norm's scale, its bias and a cap of the logits are left out.

        Args:
            tokens: ids looked at; all when None.
            outputs: ids of outputs; all when None.

        Raises:
            InputError: a table of more than 2^26 logits, or ids out of range.
            ShapeError: tokens or outputs are no ids.
        """
        stage, i, _ = find_head(self.graph, self.head)
        x, readout = embedded_tokens(self.graph, tokens), readout_weight(self.graph, outputs)
        check_table(len(x), len(readout))
        return read_alone(stage, i, "v", x) @ (readout @ self.write).T

    def own_logits(self, tokens: Tokens | None = None) -> Float[Tensor, " tokens"]:
        """By how much looking at a token raises its own logit above the mean logit; no table is made.

        Raises:
            InputError: outputs are not the tokens, or ids are out of range.
        """
        stage, i, _ = find_head(self.graph, self.head)
        x, readout = self._same_tokens(tokens)
        read = read_alone(stage, i, "v", x)
        return (read * ((readout - readout_weight(self.graph).mean(0)) @ self.write)).sum(1)

    def copying(self, tokens: Tokens | None = None) -> float:
        """The copying score: sum Re(l) / sum |l| over the eigenvalues of W_U F W_O W_V n(E^T), biases left out.

        1: looking at a token raises that token, in every direction; -1: it lowers it (copy suppression).

        Raises:
            InputError: outputs are not the tokens.
        """
        stage, i, _ = find_head(self.graph, self.head)
        x, readout = self._same_tokens(tokens)
        read = _linear_tokens(stage, "v", x) @ node_read(stage, i, "v", folded=False).T
        return positive_share(readout @ self.write, read)

    def _same_tokens(self, tokens: Tokens | None) -> tuple[Tensor, Tensor]:
        d_vocab, d_out = len(embedded_tokens(self.graph, None)), self.graph.stages[-1].code_widths[0]
        if d_vocab != d_out:
            raise InputError(f"the graph reads {d_vocab} tokens and has {d_out} outputs: no token is its own output")
        return embedded_tokens(self.graph, tokens), readout_weight(self.graph, tokens)


def ov_circuit(graph: Graph, head: str) -> OVCircuit:
    """The OV circuit of a head, as low-rank factors; nothing of the size of the vocabulary squared is made.

    Args:
        head: its name.

    Raises:
        UnknownNameError: no attention head has that name.

    Cost:
        The head's two matrices.

    Exact?
        :meth:`OVCircuit.token_logits` is, up to the final norm's scale, for what the embedding alone says. A norm
        behind the layer's writes (Gemma) counts with its gain only.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> ov_circuit(graph, "blocks.1.attn.head.1").copying() > 0.9
        True

    Source:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    stage, i, _ = find_head(graph, head)
    return OVCircuit(graph, head, node_write(stage, i), node_read(stage, i, "v"))
