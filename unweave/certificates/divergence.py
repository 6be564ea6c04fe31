"""The largest KL divergence that bounds of logit differences allow: exact for two outputs, a bound for more.

Of two outputs, p = sigmoid(m) and q = sigmoid(m + d), m the margin of the model and d what the graph adds to it:

    KL(p || q) = softplus(m + d) - softplus(m) - sigmoid(m) d
               = integral over s in [0, 1] of (1 - s) d^2 sigmoid'(m + s d).

It is convex in d, with its least value 0 at d = 0; in m it rises to one peak, at

    m* = log(e^d - 1 - d) - log(1 - e^d + d e^d),

and falls, since sigmoid' is log-concave and so is its average with the log-concave weights 1 - s. Its largest value
over a rectangle is thus at an end of d and at the m nearest to that end's m*. Of more outputs, the integrand is the
variance of d over p_s ~ p^(1 - s) q^s, the sum over pairs of p_s(i) p_s(j) (d_i - d_j)^2. With w_ij the most that
(p_s(i) + p_s(j))^2 can be, and R the largest difference of two d,

    KL(p || q) <= min(R, R^2 / 8, sum over pairs i < j of w_ij KL of the two outputs i and j alone),

the second since a variable in a range of R has at most the variance R^2 / 4 (Popoviciu).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["PairBounds", "largest_kl", "peak", "two_output_kl"]

# nearer to 0, the peak is -d / 3 up to d^3
SMALL = 1e-2
# covers that the peak is computed: the KL is flat there
PEAK_MARGIN = 1e-9
# of the margins of the model between their bounds
STRIPS = 16
# larger logits would overflow
MOST_LOGITS = 600.0

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class PairBounds:
    """Bounds of logit i less logit j over boxes, for all pairs i < j.

    Attributes:
        first, second: the outputs i and j.
        original, graph, difference: (low, high) ``[box pair]`` of the model, the graph, and graph less model.
    """

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    original: Interval
    graph: Interval
    difference: Interval


def two_output_kl(m: Float[Tensor, "*shape"], d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """KL of sigmoid(m + d) from sigmoid(m), in nats."""
    return F.softplus(m + d, threshold=40.0) - F.softplus(m, threshold=40.0) - torch.sigmoid(m) * d


def peak(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The margin of the model at which a change d of it costs most.

    Example:
        >>> [round(float(m), 3) for m in peak(torch.tensor([-5.0, 0.003, 5.0]))]
        [1.429, -0.001, -1.429]
    """
    near = d.abs() < SMALL
    far = torch.where(near, 1.0, -d.abs())
    exact = (far.expm1() - far).log() - (
        far * far.exp() - far.expm1()
    ).log()  # of -|d|; that of |d| is its mirror image
    return torch.where(near, -d / 3, -d.sign() * exact)


def _two_outputs(bounds: PairBounds) -> Float[Tensor, "box pair"]:
    """The largest KL of every two outputs: the range of m is cut in strips, which narrows that of d = a - m."""
    (ml, mu), (al, au), (dl, du) = bounds.original, bounds.graph, bounds.difference
    steps = torch.linspace(0, 1, STRIPS + 1, dtype=torch.float64)
    edges = ml[..., None] + (mu - ml).clamp(min=0)[..., None] * steps
    low, high = edges[..., :-1], edges[..., 1:]
    ends = (torch.maximum(dl[..., None], al[..., None] - high), torch.minimum(du[..., None], au[..., None] - low))
    worst = [two_output_kl(torch.minimum(torch.maximum(peak(d), low), high), d) for d in ends]
    # a strip that no difference fits, by more than rounding, has no input
    possible = ends[0] <= ends[1] + 1e-9 * (1 + ends[0].abs())
    return (1 + PEAK_MARGIN) * torch.where(possible, torch.maximum(*worst), 0.0).amax(-1)


def _shares(bounds: PairBounds, n: int) -> Float[Tensor, "box pair"]:
    """The most that (p(i) + p(j))^2 can be in the model, the graph, or between them."""
    i, j = bounds.first, bounds.second
    most = torch.zeros(len(bounds.original[0]), n, n, dtype=torch.float64)
    most[:, i, j] = torch.maximum(bounds.original[1], bounds.graph[1])
    most[:, j, i] = -torch.minimum(bounds.original[0], bounds.graph[0])
    ratios = most.clamp(max=MOST_LOGITS).exp()
    # p(k) / (p(i) + p(j)) is at least
    others = 1 / (ratios[:, i] + ratios[:, j])
    neither = torch.ones(len(i), n, dtype=torch.float64).scatter(1, torch.stack([i, j], dim=1), 0.0)
    return (1 + (others * neither).sum(-1)).pow(-2)


def largest_kl(bounds: PairBounds, n: int) -> tuple[Float[Tensor, " box"], Float[Tensor, "box pair"]]:
    """(a bound of the KL over each box, what each pair of its n outputs may add to it).

    Exact?
        The exact maximum over the bounds of m and d for two outputs, up to a share of 1e-9 and the strips, which use
        the bounds of the graph as well; an upper bound for more.
    """
    parts = _two_outputs(bounds) * _shares(bounds, n)
    low, high = bounds.difference
    reach = torch.maximum(high, -low).amax(1).clamp(min=0)
    return torch.minimum(parts.sum(1), torch.minimum(reach, reach.square() / 8)), parts
