"""Addition modulo 113 by one transformer layer, trained until it grokked.

The network writes both numbers as cosines and sines at a few key frequencies, multiplies them, and reads the sum
off by interference. Source: Nanda et al. 2023, "Progress measures for grokking via mechanistic interpretability".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unweave.zoo.toy import Block, ToyConfig, ToyTransformer

__all__ = ["CONFIG", "MODULUS", "all_pairs", "data", "fourier_power", "train"]

MODULUS = 113
CONFIG = ToyConfig(
    n_layers=1,
    n_heads=4,
    d_model=64,
    d_head=16,
    d_mlp=256,
    d_vocab=MODULUS + 1,
    d_out=MODULUS,
    n_ctx=3,
    name="zoo:modular_addition",
)
STEPS = 6000
TRAIN_SHARE = 0.35


def all_pairs() -> tuple[Int[Tensor, "pairs 3"], Int[Tensor, " pairs"]]:
    """(tokens, answers): every a, b, "=" and (a + b) mod 113."""
    a, b = torch.meshgrid(torch.arange(MODULUS), torch.arange(MODULUS), indexing="ij")
    tokens = torch.stack([a.flatten(), b.flatten(), torch.full((MODULUS**2,), MODULUS)], dim=1)
    return tokens, (tokens[:, 0] + tokens[:, 1]) % MODULUS


def data(n: int | None = None, seed: int = 1) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]:
    """(tokens, answered): pairs in random order; only the last position has an answer."""
    order = torch.randperm(MODULUS**2, generator=torch.Generator().manual_seed(seed))[:n]
    tokens = all_pairs()[0][order]
    answered = torch.zeros(tokens.shape, dtype=torch.bool)
    answered[:, -1] = True
    return tokens, answered


def fourier_power(table: Float[Tensor, "modulus d"]) -> Float[Tensor, " frequencies"]:
    """The share of a table's variance over residues at each frequency 1 .. 56 (sums to 1).

    Example:
        >>> wave = torch.cos(2 * math.pi * 5 * torch.arange(113) / 113)[:, None]
        >>> int(fourier_power(wave).argmax()) + 1
        5
    """
    power = torch.fft.rfft(table.double(), dim=0).abs().square().sum(1)[1:]
    return power / power.sum()


def last_logits(model: ToyTransformer, tokens: Int[Tensor, "n 3"]) -> Float[Tensor, "n modulus"]:
    """The logits at "=", computing nothing else: what makes full-batch training cheap."""
    block: Block = model.blocks[0]  # type: ignore[assignment]
    x = model.W_E[tokens] + model.W_pos
    q = torch.einsum("bd,hdw->bhw", x[:, -1], block.W_Q) + block.b_Q
    k, v = (torch.einsum("btd,hdw->bhtw", x, w) + b[:, None] for w, b in ((block.W_K, block.b_K), (block.W_V, block.b_V)))
    pattern = (torch.einsum("bhw,bhtw->bht", q, k) / math.sqrt(CONFIG.d_head)).softmax(-1)
    mixed = torch.einsum("bht,bhtw->bhw", pattern, v)
    h = x[:, -1] + torch.einsum("bhw,hwd->bd", mixed, block.W_O) + block.b_O
    h = h + F.relu(h @ block.W_in + block.b_in) @ block.W_out + block.b_out
    return h @ model.W_U + model.b_U


def train(seed: int = 0, steps: int = STEPS) -> Iterator[tuple[int, float, ToyTransformer]]:
    """Train on a third of all pairs, full batch, yielding (step, test loss, model) every 100 steps."""
    torch.manual_seed(seed)
    tokens, answers = all_pairs()
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    cut = int(TRAIN_SHARE * len(tokens))
    seen, unseen = order[:cut], order[cut:]
    model = ToyTransformer(CONFIG)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1.0, betas=(0.9, 0.98))
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            # warm up, stay, then come to rest: a constant rate keeps throwing the weights about
            group["lr"] = 2e-3 * min(step / 10, 1.0, (steps - step) / (0.4 * steps) + 1e-3)
        loss = F.cross_entropy(last_logits(model, tokens[seen]), answers[seen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            with torch.no_grad():
                test = F.cross_entropy(last_logits(model, tokens[unseen]), answers[unseen])
            yield step, float(test), model
