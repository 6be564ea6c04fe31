"""A graph that knows what clean texts need and little else: the explanation whose gaps an anomaly score looks for."""

from __future__ import annotations

import dataclasses

import torch

from unweave import tree
from unweave.audit.disagreement import check_pair
from unweave.compression.refinement import refine_factors, trainable
from unweave.data import TokenData
from unweave.errors import InputError
from unweave.graph import Graph
from unweave.scope import Scope

__all__ = ["relearn"]


def relearn(
    graph: Graph,
    original: Graph,
    data: TokenData,
    scope: Scope | None = None,
    *,
    noise: float = 0.3,
    steps: int = 400,
    learning_rate: float = 1e-2,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Graph:
    """Disturb what a graph stores, then refine it on clean texts only.

    Every stored number w of a map or bias becomes w + noise * rms * z, z from N(0, 1), rms the root mean square of its
    tensor. Noise disturbs all that the model does alike; refining (:func:`unweave.compression.refine_factors`) brings
    back what the texts use. A behaviour that they never use stays disturbed, even where the graph as cut had it.

    Args:
        graph: compressed, low-rank.
        original: the model, captured.
        data: clean texts, best thousands; others than an alarm is then calibrated on.
        noise: 0 only refines. More forgets more, and leaves more of the clean texts to learn again.

    Returns:
        A graph of the same structure.

    Raises:
        InputError: a negative noise, or other nonsensical numbers.
        NonFiniteError: training diverged; lower the learning rate or the noise.

    Cost:
        That of ``steps`` steps of refining.

    Example:
        >>> import unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> data = unweave.load_data("zoo:induction", limit=32)
        >>> small = unweave.compress(graph, data, size=0.5)
        >>> relearn(small, graph, data, steps=2).n_parameters == small.n_parameters
        True

    Source: after Liu et al. 2018, "Fine-Pruning" (a backdoor is lost when what clean inputs leave idle is taken away
        and the rest trained on them).
    """
    check_pair(graph, original)
    if not noise >= 0:
        raise InputError(f"noise must be 0 or more, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    disturbed = {
        path: w + noise * w.square().mean().sqrt() * torch.randn(w.shape, generator=generator).to(w)
        for path, w in trainable(graph).items()
    }
    start = dataclasses.replace(graph, stages=tree.replace_tensors(graph.stages, disturbed))
    return refine_factors(
        start,
        original,
        data,
        scope,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
