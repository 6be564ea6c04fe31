"""Let a graph write."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from unweave.errors import InputError
from unweave.execution import Patch, run
from unweave.graph import Graph

__all__ = ["generate"]


@torch.no_grad()
def generate(
    graph: Graph,
    tokens: Int[Tensor, "batch pos"],
    n_new: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
    patch: Mapping[str, Patch] | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue token sequences, one token at a time.

    Args:
        n_new: how many tokens to add.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
        stop: a token id at which to end (with a batch of one).
        patch: values to set in every run, see :func:`unweave.run`; a text grows, so give functions or what broadcasts.

    Raises:
        InputError: the graph does not read tokens, or the numbers make no sense.

    Cost:
        One run over the whole text per token; beyond the context only its end is read.

    Example:
        >>> import torch, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> generate(graph, torch.tensor([[0, 7, 3, 9, 2, 7, 3, 9]]), 2).shape
        torch.Size([1, 10])
    """
    if "d_vocab" not in graph.info:
        raise InputError("this graph does not read tokens, so it cannot continue a text")
    if n_new < 0 or temperature < 0:
        raise InputError("n_new and temperature must not be negative")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_new):
        logits = run(graph, tokens[:, -graph.info["n_ctx"] :], patch=patch).logits[:, -1].float().cpu()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new.to(tokens)], dim=1)
        if stop is not None and tokens.shape[0] == 1 and int(new) == stop:
            break
    return tokens
