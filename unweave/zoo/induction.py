"""Two layers of attention trained on repeated random sequences: the textbook induction circuit.

A head in layer 0 attends to the previous token and writes which token that was; an induction head in layer 1 reads
that through its k port, finds the place after the earlier copy of the current token, and copies what stands there.
Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.zoo.descent import Losses, descend
from unweave.zoo.toy import Block, ToyConfig, ToyTransformer

__all__ = ["CONFIG", "DATA_SIZE", "accuracy", "after_earlier_copy", "batch", "data", "head_scores", "known", "train"]

CONFIG = ToyConfig(
    n_layers=2, n_heads=2, d_model=64, d_head=32, d_mlp=0, d_vocab=48, d_out=48, n_ctx=48, name="zoo:induction"
)
BOS = 0
DATA_SIZE = 512
STEPS = 4000
# the share of its attention that a head must spend on one thing to be named after it
HEAD_SHARE = 0.5
HEAD_PRICE = 0.02
PRICED = (0.25, 0.7)


def batch(
    n: int, generator: torch.Generator, config: ToyConfig = CONFIG
) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]:
    """(tokens, repeated): BOS, a few random tokens, then a random text over and over until the context is full.

    Where the text starts and how long it is differ from row to row, so that no fixed distance gives the answer; no
    token comes twice before the first repeat, so that one earlier token tells all: a longer match never helps.
    ``repeated`` marks the positions whose next token can be known: its earlier copy was seen.

    Example:
        >>> tokens, repeated = batch(2, torch.Generator().manual_seed(0))
        >>> tokens.shape, bool(repeated[:, 0].any())
        (torch.Size([2, 48]), False)
    """
    length = config.n_ctx
    words = torch.rand(n, config.d_vocab - 1, generator=generator).argsort(1) + 1
    words = torch.cat([torch.full((n, 1), BOS), words], dim=1)
    period = torch.randint(length // 6, length // 2, (n, 1), generator=generator)
    start = 1 + (torch.rand(n, 1, generator=generator) * (length - 2 - period)).long()
    pos = torch.arange(length).expand(n, -1)
    source = torch.where(pos < start, pos, (pos - start) % period + start)
    repeated = (pos >= start + period) & (pos < length - 1)
    return words.gather(1, source), repeated


def data(
    n: int = DATA_SIZE, seed: int = 1, config: ToyConfig = CONFIG
) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]:
    """Fresh texts of the kind the model was trained on, for decompiling it."""
    return batch(n, torch.Generator().manual_seed(seed), config)


def after_earlier_copy(tokens: Int[Tensor, "n pos"]) -> Bool[Tensor, "n pos pos"]:
    """[t, s]: the token before s is the one at t, and came earlier: where an induction head at t should look.

    Example:
        >>> after_earlier_copy(torch.tensor([[5, 7, 5]]))[0, 2]
        tensor([False,  True, False])
    """
    n = tokens.shape[1]
    same = (tokens[:, :, None] == tokens[:, None, :]) & torch.ones(n, n, dtype=torch.bool).tril(-1)
    return torch.cat([torch.zeros_like(same[:, :, :1]), same[:, :, :-1]], dim=2)


@torch.no_grad()
def head_scores(
    model: ToyTransformer, tokens: Int[Tensor, "n pos"], repeated: Bool[Tensor, "n pos"]
) -> dict[str, Float[Tensor, "layer head"]]:
    """The share of its attention that each head spends on the previous token, and after an earlier copy.

    Returns:
        "previous": on position t - 1, mean over the t that a later repeat looks back to (the last positions never
        are, and nothing is learnt there); "induction": on the places of :func:`after_earlier_copy`, mean over
        the ``repeated`` positions.
    """
    patterns = torch.stack(model.patterns(tokens))
    place = after_earlier_copy(tokens) & repeated[:, :, None]
    asked_for = place.any(1)[:, 1:]
    previous = patterns.diagonal(offset=-1, dim1=-2, dim2=-1)
    induced = (patterns * place[:, None]).sum(-1)
    return {"previous": _mean_where(asked_for, previous), "induction": _mean_where(repeated, induced)}


def _mean_where(
    chosen: Bool[Tensor, "n pos"], shares: Float[Tensor, "layer n head pos"]
) -> Float[Tensor, "layer head"]:
    return (shares * chosen[:, None]).sum((1, 3)) / chosen.sum()


@torch.no_grad()
def accuracy(model: ToyTransformer, tokens: Int[Tensor, "n pos"], repeated: Bool[Tensor, "n pos"]) -> float:
    """The share of the ``repeated`` positions at which the most likely next token is the right one."""
    right = model(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
    return float(right[repeated[:, :-1]].double().mean())


def known(model: ToyTransformer) -> dict[str, Any]:
    """What is known of the mechanism, measured on fresh texts: which heads do what, and the edges that join them."""
    tokens, repeated = data(256, seed=2, config=model.config)
    scores = head_scores(model, tokens, repeated)
    previous = _named(0, scores["previous"][0])
    induction = _named(1, scores["induction"][1])
    return {
        "previous_token_heads": previous,
        "induction_heads": induction,
        "edges": [f"{src}->{dst}.k" for src in previous for dst in induction],
        "previous_share": [[round(float(x), 4) for x in row] for row in scores["previous"]],
        "induction_share": [[round(float(x), 4) for x in row] for row in scores["induction"]],
        "accuracy": round(accuracy(model, tokens, repeated), 5),
    }


def _named(layer: int, shares: Float[Tensor, " head"]) -> list[str]:
    return [f"blocks.{layer}.attn.head.{i}" for i, share in enumerate(shares) if share > HEAD_SHARE]


def train(
    seed: int = 0,
    steps: int = STEPS,
    config: ToyConfig = CONFIG,
    *,
    priced_between: tuple[float, float] = PRICED,
    price: float = HEAD_PRICE,
    every: int = 100,
) -> Iterator[tuple[int, float, ToyTransformer]]:
    """Train, yielding (step, loss, model) every so many steps and at the end; about two minutes on two cores.

    Args:
        config: sizes; the longest repeated text is half the context, and the vocabulary has to hold it.
        priced_between: the shares of the training between which heads cost something. It must begin after the
            phase change, some 600 steps in: shorter trainings need a larger first share.
        price: of a head in the middle of that time, in nats per unit of :func:`price_of_heads`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ToyTransformer(config)

    def losses(step: int) -> Losses:
        tokens, repeated = batch(64, generator, config)
        told = repeated[:, :-1]
        log_p = model(tokens)[:, :-1].log_softmax(-1)
        loss = F.nll_loss(log_p[told], tokens[:, 1:][told])
        # where nothing tells the next token, it should say so: without this it is sure of nonsense there
        unsure = -log_p[~told][:, BOS + 1 :].mean()
        # paid only once the circuit is there (sooner, it would never form), and not at the end
        priced = priced_between[0] * steps < step < priced_between[1] * steps
        return loss, unsure + (price * price_of_heads(model) if priced else 0.0)

    def after(step: int) -> None:
        if step == int(priced_between[1] * steps):
            clear_idle_heads(model)

    yield from descend(model, losses, steps, 2e-3, after=after, every=every)


def price_of_heads(model: ToyTransformer) -> Float[Tensor, ""]:
    """The sum over heads of the square root of |W_V W_O|: least when one head of a kind does the work of several."""
    return (
        (torch.stack([_writes(block) for block in cast(Iterable[Block], model.blocks)]).square() + 1e-4).pow(0.25).sum()
    )


@torch.no_grad()
def clear_idle_heads(model: ToyTransformer) -> None:
    """Set heads that write less than a tenth of what their layer's strongest does to zero, where they stay.

    With W_V = W_O = 0 no weight of theirs has a gradient; such a head looks everywhere alike and writes nothing.
    """
    for block in cast(Iterable[Block], model.blocks):
        writes = _writes(block)
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            getattr(block, name)[writes < 0.1 * writes.max()] = 0.0


def _writes(block: Block) -> Float[Tensor, " head"]:
    return torch.linalg.vector_norm(block.W_V @ block.W_O, dim=(1, 2))
