"""Scope pays: the size needed for 0.01 nats under narrower scopes.

    python -m benchmarks.scope

Sizes are found by bisection on calibration data (which must reach 0.01 nats there) and the divergence is then
measured on held-out data in the scope. Narrower in three ways: an output quotient, a subset of positions, both.
"""

from __future__ import annotations

import time

import torch

from benchmarks.common import SHARED, interval, model, save
from unweave.capture import load_tokenizer
from unweave.compression import channel_moments
from unweave.compression.allocation import Budgeter, mean_divergence
from unweave.data import Batch, TokenData
from unweave.execution import run
from unweave.graph import Graph
from unweave.pipeline import token_strings
from unweave.scope import Quotient, Scope, divergence, position_mask

TARGET = 0.01


@torch.no_grad()
def held_out(graph: Graph, small: Graph, data: TokenData, scope: Scope) -> tuple[float, float, float]:
    values = []
    for batch in data.batches(16):
        kl = divergence(scope, run(graph, batch.inputs).logits, run(small, batch.inputs).logits, batch)
        mask = position_mask(scope, batch)
        values += [float(k.sum() / m.sum()) for k, m in zip(kl, mask, strict=True) if m.any()]
    return interval(values)


def needed_size(graph: Graph, data: TokenData, scope: Scope) -> Graph:
    """The smallest graph within the target on the calibration data."""
    budgeter = Budgeter(graph, channel_moments(graph, data, scope, samples=2))
    low, high, best = 0.0, 1.0, graph
    check = data.select(slice(0, 96))
    for _ in range(9):
        size = (low + high) / 2
        try:
            small = budgeter.at_size(size)
            close = mean_divergence(graph, small, check, scope) <= TARGET
        except ValueError:
            close = False
        low, high, best = (low, size, small) if close else (size, high, best)
    return best


# by model: what is asked of the next token, and after which token positions count
QUESTIONS = {
    "stories260K": ("does a sentence end?", r"[.!?]", "said"),
    "pylm": ("is a bracket closed?", r"[)\]}]", "return"),
}


def scopes_of(name: str, graph: Graph) -> dict[str, Scope]:
    question, pattern, word = QUESTIONS[name]
    tokens = token_strings(load_tokenizer(SHARED / "models" / name), graph.info["d_out"])
    ids = torch.tensor([i for i, t in enumerate(tokens) if word in t])
    classes = Quotient.from_regex(pattern, tokens)

    def near(batch: Batch) -> torch.Tensor:
        seen = torch.nn.functional.pad(torch.isin(batch.inputs, ids), (9, 0))
        return seen.unfold(1, 10, 1).any(-1)

    return {
        "every next token": Scope(),
        question: Scope(quotient=classes),
        f"every token within ten after '{word}'": Scope(near),
        f"{question[:-1]}, within ten after '{word}'?": Scope(near, classes),
    }


def main() -> None:
    started = time.time()
    torch.set_num_threads(1)
    rows = []
    for name in QUESTIONS:
        graph, train, held = model(name)
        for what, scope in scopes_of(name, graph).items():
            small = needed_size(graph, train.select(slice(0, 256)), scope)
            size = small.n_channel_parameters / graph.n_channel_parameters
            kl = held_out(graph, small, held.select(slice(0, 128)), scope)
            rows.append({"model": name, "scope": what, "size": size, "kl_nats_held_out": kl})
            print(rows[-1], flush=True)
    save("scope", {"target": TARGET, "rows": rows}, started, "python -m benchmarks.scope")


if __name__ == "__main__":
    main()
