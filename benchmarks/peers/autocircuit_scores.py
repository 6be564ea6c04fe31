"""Edge scores of auto-circuit 1.0.1: mask gradients (EAP, and integrated over the masks), ACDC, edge pruning.

Mask gradients have EAP's sign and unit. Edge pruning is its subnetwork probing, which learns a mask per edge. Scores of
ACDC and edge pruning rank edges and have no unit. All prompts must end at the same position.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores
from auto_circuit.utils.graph_utils import patchable_model
from hooked import Prompts, arguments, load_model, read_prompts, timed, write_scores
from torch import Tensor

METHODS = ("mask-gradient", "mask-gradient-IG", "ACDC", "edge-pruning")


def loader(prompts: Prompts, batch_size: int) -> PromptDataLoader:
    """The prompts, cut after the token at which the answer is read."""
    end = int(prompts.end[0])
    if not bool((prompts.end == end).all()) or len(prompts.end) % batch_size:
        raise SystemExit("auto-circuit needs prompts that end at one position, and whole batches")
    clean, corrupted = prompts.clean[:, : end + 1], prompts.corrupted[:, : end + 1]
    data = PromptDataset(clean, corrupted, list(prompts.correct[:, None]), list(prompts.wrong[:, None]))
    return PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=batch_size, shuffle=False)


def named(scores: dict[str, Tensor], n_layers: int, n_heads: int) -> dict[str, float]:
    """Scores by EAP's names: auto-circuit's tables are [targets, sources], with the sources in EAP's order."""
    layers = ([*(f"a{i}.h{h}" for h in range(n_heads)), f"m{i}"] for i in range(n_layers))
    sources = ["input", *(name for layer in layers for name in layer)]
    out = {}
    for module, table in scores.items():
        layer, hook = module.split(".")[1:3]
        x = hook.removeprefix("hook_")[0]
        if x in "qkv":
            targets = [f"a{layer}.h{h}<{x}>" for h in range(n_heads)]
        else:
            targets = [f"m{layer}" if hook == "hook_mlp_in" else "logits"]
        for target, row in zip(targets, table.reshape(len(targets), -1).tolist(), strict=True):
            out |= {f"{source}->{target}": value for source, value in zip(sources, row, strict=False)}
    return out


def main() -> None:
    """Score, and write one file per method."""
    given = arguments(__doc__ or "", METHODS)
    torch.optim.adam = importlib.import_module("torch.optim.adam")  # a name that newer torch takes away
    prompts = read_prompts(given.prompts)
    hooked, off = load_model(given.model, prompts.clean)
    cfg = hooked.cfg
    data = loader(prompts, given.batch_size)
    model = patchable_model(hooked, factorized=True, slice_output="last_seq", separate_qkv=True)
    options: dict[str, Any] = {"model": model, "dataloader": data, "official_edges": None}
    attribution = {"grad_function": "logit", "answer_function": "avg_diff"}
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        "mask-gradient": lambda: mask_gradient_prune_scores(**options, **attribution, mask_val=0.0),
        "mask-gradient-IG": lambda: mask_gradient_prune_scores(
            **options, **attribution, integrated_grad_samples=given.steps
        ),
        "ACDC": lambda: acdc_prune_scores(**options, tao_exps=[given.threshold_exponent], tao_bases=[1]),
        "edge-pruning": lambda: subnetwork_probing_prune_scores(
            **options, epochs=given.epochs, circuit_size=given.edges
        ),
    }
    for method in given.methods:
        torch.manual_seed(0)
        scores, seconds = timed(ways[method])
        # its gradients are those of a loss, which falls where the logit difference rises
        sign = -1.0 if method.startswith("mask-gradient") else 1.0
        values = {name: sign * value for name, value in named(scores, cfg.n_layers, cfg.n_heads).items()}
        kept = {}
        if method == "ACDC":  # what it prunes gets the threshold, the rest infinity
            kept = {name: value == float("inf") for name, value in values.items()}
            values = {name: float(kept[name]) for name in values}
        if method == "edge-pruning":
            strongest = sorted(values, key=lambda name: -abs(values[name]))[: given.edges]
            kept = {name: name in set(strongest) for name in values}
        facts = {"peer": "auto-circuit 1.0.1", "method": method, "seconds": seconds, "logits_off": off}
        write_scores(given.out / f"{method}.json", hooked, values, kept, **facts)


if __name__ == "__main__":
    main()
