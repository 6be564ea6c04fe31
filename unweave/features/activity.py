"""How often features speak, how strongly and with whom.

A feature is a direction with a number per token: a latent of a dictionary, a coordinate of a basis, a column of W.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.data import Batch, TokenData
from unweave.errors import EmptyDataError
from unweave.execution import Trace
from unweave.features.sites import Site, check_fits, find_site, site_trace
from unweave.graph import Graph
from unweave.ops import Dictionary
from unweave.scope import Scope, position_mask
from unweave.statistics import Sums, accumulate

__all__ = ["Activity", "activity_from", "activity_sums", "measure_activity"]


class Activity(NamedTuple):
    """How often and how strongly features speak, float64; active is different from 0.

    Attributes:
        frequency: the share of tokens on which each is active.
        mean, power: E f and E f^2.
        correlation: Pearson's, of each pair; NaN for features that never vary.
        together: the share of tokens on which both of a pair are active.
        n_tokens: how many were looked at.
    """

    frequency: Float[Tensor, " features"]
    mean: Float[Tensor, " features"]
    power: Float[Tensor, " features"]
    correlation: Float[Tensor, "features features"]
    together: Float[Tensor, "features features"]
    n_tokens: int

    @property
    def sparsity(self) -> Float[Tensor, " features"]:
        """1 - (E|f|)^2 / E f^2 of Treves and Rolls, for features of one sign: 0 always alike, 1 rarest; NaN if dead."""
        return 1 - self.mean.square() / self.power


def activity_sums(latents: Float[Tensor, "tokens features"]) -> Sums:
    """What :func:`activity_from` needs of some tokens, to be summed over all."""
    f = latents.double()
    active = (latents != 0).double()
    return {
        "n": torch.tensor(float(len(f)), dtype=torch.float64),
        "sum": f.sum(0),
        "products": f.T @ f,
        "together": active.T @ active,
    }


def activity_from(sums: Sums) -> Activity:
    """The activity in sums over tokens.

    Raises:
        EmptyDataError: there were no tokens.

    Example:
        >>> latents = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
        >>> activity_from(activity_sums(latents)).frequency.tolist()
        [0.5, 0.25]
    """
    n = float(sums["n"])
    if n == 0:
        raise EmptyDataError("no token is looked at")
    mean, second, together = sums["sum"] / n, sums["products"] / n, sums["together"] / n
    covariance = second - torch.outer(mean, mean)
    # what rounding leaves of a constant is no variance
    variance = covariance.diagonal()
    spread = torch.where(variance > 1e-12 * second.diagonal(), variance, torch.nan).sqrt()
    correlation = covariance / torch.outer(spread, spread)
    return Activity(together.diagonal(), mean, second.diagonal(), correlation, together, int(n))


def measure_activity(
    graph: Graph,
    where: str,
    dictionary: Dictionary,
    data: TokenData,
    *,
    scope: Scope | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Activity:
    """The activity of a dictionary's latents at a place of a graph, streamed.

    Args:
        where: a site, see :func:`find_site`.
        scope: which positions count; by default all real ones.

    Cost:
        One forward pass up to the site; memory latents^2.

    Example:
        >>> import unweave
        >>> from unweave.features import find_basis
        >>> graph, data = unweave.capture("zoo:induction"), unweave.load_data("zoo:induction", limit=8)
        >>> basis = find_basis(graph, "blocks.0.attn.code", data, "principal")
        >>> measure_activity(graph, "blocks.0.attn.code", basis, data).n_tokens
        384
    """
    site = find_site(graph, where)
    check_fits(graph, site, dictionary)
    like = graph.tensors[0]

    @torch.no_grad()
    def step(batch: Batch) -> Sums:
        mask = (batch.mask if scope is None else position_mask(scope, batch)).to(graph.device)
        return activity_sums(_latents(site, dictionary.to(like), site_trace(graph, site, batch))[mask])

    sums = accumulate(data, step, batch_size=batch_size, description="activity of features", progress=progress)
    return activity_from(sums)


def _latents(site: Site, dictionary: Dictionary, t: Trace) -> Float[Tensor, "batch pos latents"]:
    return dictionary.encode(site.heard(t) if dictionary.is_transcoder else site.activations(t))
