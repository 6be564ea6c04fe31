"""Edge scores of EAP-IG's own code (eap 2.0.0): EAP, EAP-IG-inputs, EAP-IG-activations, exact.

A score is how much the logit difference changes, per prompt, when the edge carries what the corrupted prompt sends.
"""

from __future__ import annotations

from typing import Any

import eap.attribute
import eap.evaluate
import torch
from eap.graph import Graph
from hooked import arguments, load_model, logit_difference, read_prompts, timed, write_scores
from torch import Tensor

METHODS = ("EAP", "EAP-IG-inputs", "EAP-IG-activations", "exact")


class _OnCpu:
    """torch for a module that asks for device='cuda' by name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *shape: Any, **options: Any) -> Tensor:
        return torch.zeros(*shape, **(options | {"device": "cpu"}))


def tokenize_plus(model: Any, inputs: list[Tensor], max_length: int | None = None) -> tuple[Any, ...]:
    """In place of eap's: the inputs are tokens already, all of one length, so nothing is masked."""
    tokens = torch.stack(list(inputs))
    return tokens, None, torch.full((len(tokens),), tokens.shape[1]), tokens.shape[1]


def main() -> None:
    """Score, and write one file per method."""
    given = arguments(__doc__ or "", METHODS)
    for module in (eap.attribute, eap.evaluate, eap.utils):
        module.torch = _OnCpu()
        module.tokenize_plus = tokenize_plus
    prompts = read_prompts(given.prompts)
    model, off = load_model(given.model, prompts.clean)
    rows = torch.arange(len(prompts.clean)).split(given.batch_size)
    batches = [(list(prompts.clean[r]), list(prompts.corrupted[r]), r) for r in rows]

    def metric(logits: Tensor, clean_logits: Tensor, lengths: Tensor, label: Tensor) -> Tensor:
        # a sum: eap divides by the number of prompts itself
        return logit_difference(logits, type(prompts)(*(field[label] for field in prompts))).sum()

    def exact_metric(logits: Tensor, clean_logits: Tensor, lengths: Tensor, label: Tensor) -> Tensor:
        return logit_difference(logits, type(prompts)(*(field[label] for field in prompts)))

    for method in given.methods:
        graph = Graph.from_model(model)
        chosen = exact_metric if method == "exact" else metric
        steps = {"ig_steps": given.steps} if "IG" in method else {}
        _, seconds = timed(
            lambda g=graph, m=method, c=chosen, s=steps: eap.attribute.attribute(
                model, g, batches, c, m, quiet=True, **s
            )
        )
        scores = {name: float(edge.score) for name, edge in graph.edges.items()}
        facts = {"peer": "eap 2.0.0", "method": method, "seconds": seconds, "logits_off": off}
        write_scores(given.out / f"{method}.json", model, scores, {}, **facts)


if __name__ == "__main__":
    main()
