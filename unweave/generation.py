"""Let a graph write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unweave.errors import EmptyDataError, InputError
from unweave.execution import Patch, run
from unweave.graph import Graph

__all__ = ["encode_prompt", "generate"]


def encode_prompt(prompt: str, tokenizer: Any = None) -> Int[Tensor, "1 pos"]:
    """The token ids of a text; without a tokenizer, the text is the ids, separated by spaces.

    Raises:
        InputError: no tokenizer, and something else than ids.
        EmptyDataError: there is no token.

    Example:
        >>> encode_prompt("0 7 3")
        tensor([[0, 7, 3]])
    """
    if tokenizer is not None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        words = prompt.split()
        # a longer number is no id of any model, and reading it could take long
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise InputError("this model has no tokenizer: give token ids separated by spaces")
        ids = [int(word) for word in words]
    if not ids:
        raise EmptyDataError("the prompt is empty")
    return torch.tensor([ids])


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
