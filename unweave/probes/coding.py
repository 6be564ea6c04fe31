"""How many bits it takes to send the labels, once both sides have the activations: probes by description length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave.errors import EmptyDataError
from unweave.probes.logistic import choose_penalty, fit_logistic

__all__ = ["SHARES", "OnlineCode", "online_code"]

# of the labels, where a new probe is fitted
SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5)


@dataclass(frozen=True)
class OnlineCode:
    """The length of an online code.

    Attributes:
        bits: of all labels.
        uniform_bits: of a code that knows nothing, n log2 classes.
        n: how many labels.
        frequency_bits: of a code that knows how often each class comes, and nothing else: n times their entropy.
    """

    bits: float
    uniform_bits: float
    n: int
    frequency_bits: float

    @property
    def compression(self) -> float:
        """uniform_bits / bits: 1 where nothing can be read, above it where classes come not equally often."""
        return self.uniform_bits / self.bits if self.bits > 0 else math.inf

    @property
    def saved(self) -> float:
        """1 - bits / frequency_bits: 0 where nothing can be read, however often classes come; NaN for one class."""
        return 1 - self.bits / self.frequency_bits if self.frequency_bits > 0 else math.nan

    @property
    def bits_per_label(self) -> float:
        """Bits of the average label."""
        return self.bits / self.n


def online_code(x: Float[Tensor, "n width"], label: Int[Tensor, " n"], classes: int) -> OnlineCode:
    """Send the labels piece by piece, each with a probe fitted to all that were sent before.

        bits = t_1 log2 K - sum_i sum_{t_i < j <= t_{i+1}} log2 p_i(y_j | x_j),

    p_i the logistic probe of labels 1..t_i, t_i = ceil(share_i n) for the SHARES 0.1%, 0.2%, ... 50% and at last n. The
    penalty of p_i is chosen within 1..t_i, so that whoever receives the code can do the same. Unlike the score of a
    probe, this says how easily a concept is read: a probe that needs many examples, or learns them by heart, is long.

    Args:
        x: activations ``[n width]``, sequences in random order.
        label: classes ``[n]``.
        classes: K.

    Returns:
        :class:`OnlineCode`.

    Raises:
        InputError, EmptyDataError, NonFiniteError: see :func:`fit_logistic`.

    Cost:
        Ten times the fits of a logistic probe with all its penalties, on twice the labels in all.

    Exact?
        The length is exact for the order of labels given; other orders give other lengths.

    Example:
        >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> online_code(x, (x[:, 0] > 0).long(), 2).compression > 3
        True

    Source:
        Voita and Titov 2020, "Information-Theoretic Probing with Minimum Description Length".
    """
    n = len(x)
    if n == 0:
        raise EmptyDataError("a code needs labels to send; give more data")
    ends = sorted({min(n, math.ceil(share * n)) for share in SHARES} | {n})
    bits = ends[0] * math.log2(classes)
    for sent, end in pairwise(ends):
        penalty = choose_penalty(x[:sent], label[:sent], classes)
        weight, bias, _ = fit_logistic(x[:sent], label[:sent], classes, penalty)
        outputs = x[sent:end].double().cpu() @ weight.T + bias
        nats = torch.nn.functional.cross_entropy(outputs, label[sent:end].cpu().long(), reduction="sum")
        bits += float(nats) / math.log(2)
    share = torch.bincount(label.cpu().long(), minlength=classes).double() / n
    return OnlineCode(bits, n * math.log2(classes), n, n * float(-torch.xlogy(share, share).sum()) / math.log(2))
