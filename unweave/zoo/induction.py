"""Two layers of attention trained on repeated random sequences: the textbook induction circuit.

A head in layer 0 attends to the previous token and writes which token that was; an induction head in layer 1 reads
that through its k port, finds the place after the earlier copy of the current token, and copies what stands there.
Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from unweave.zoo.toy import ToyConfig, ToyTransformer

__all__ = ["CONFIG", "DATA_SIZE", "batch", "data", "train"]

CONFIG = ToyConfig(
    n_layers=2, n_heads=2, d_model=64, d_head=32, d_mlp=0, d_vocab=48, d_out=48, n_ctx=48, name="zoo:induction"
)
BOS = 0
DATA_SIZE = 512
STEPS = 8000
HEAD_PRICE = 0.02


def batch(n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]:
    """(tokens, repeated): BOS, then a random text whose second part repeats its first part.

    The length of the repeated part differs from text to text, so that no fixed distance gives the answer;
    ``repeated`` marks the positions whose next token can be known from the first part.
    """
    length = CONFIG.n_ctx
    tokens = torch.randint(1, CONFIG.d_vocab, (n, length), generator=generator)
    tokens[:, 0] = BOS
    period = torch.randint(8, 24, (n, 1), generator=generator)
    pos = torch.arange(length).expand(n, -1)
    source = (pos - 1) % period + 1
    tokens = torch.where(pos > 0, tokens.gather(1, source), tokens)
    repeated = (pos > period) & (pos < length - 1)
    return tokens, repeated


def data(n: int = DATA_SIZE, seed: int = 1) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]:
    """Fresh texts of the kind the model was trained on, for decompiling it."""
    return batch(n, torch.Generator().manual_seed(seed))


def train(seed: int = 0, steps: int = STEPS) -> Iterator[tuple[int, float, ToyTransformer]]:
    """Train, yielding (step, loss, model) every 100 steps; about two minutes on two cores."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ToyTransformer(CONFIG)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        tokens, repeated = batch(64, generator)
        logits = model(tokens)[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = losses[repeated[:, :-1]].mean()
        # a price on each head's writes, so that one head of a kind does the work instead of several
        price = sum((block.W_O.square().sum((1, 2)) + 1e-4).pow(0.25).sum() for block in model.blocks)
        optimiser.zero_grad()
        (loss + HEAD_PRICE * max(0.0, 1 - step / (0.7 * steps)) * price).backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            yield step, float(loss.detach()), model
