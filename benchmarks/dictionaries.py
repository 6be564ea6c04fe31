"""Dictionaries on synthetic vectors whose sparse features are known, and on nodes of language models.

    python -m benchmarks.dictionaries [synthetic] [MODEL ...]

Synthetic: 64 unit features in 32 dimensions, each there with a chance of 3/64 at 0.5 to 1.5 times its length (Sharkey
et al. 2022, smaller). The figure is the mean over features of the largest cosine with a column of the decoder, over
seeds of data and training, with the 95% interval by bootstrap over features of all seeds; beside it ICA and random
columns. Recipes were chosen on seeds 100 to 105, which are not among those measured (and checked on another size).
Results are saved after every fit and every model; fits saved already are not run again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from benchmarks.common import RESULTS, SHARED, interval, model, save
from benchmarks.descriptions import spread
from unweave.capture import load_tokenizer
from unweave.compression.moments import channel_moments
from unweave.data import TokenData
from unweave.drivers import Descriptions
from unweave.features import (
    Dictionary,
    Recipe,
    collect_activations,
    compare_features,
    describe_dictionary,
    describe_latents,
    find_basis,
    fit_dictionary,
    hook_of,
    load_dictionary,
    measure_privilege,
    measure_splitting,
    save_dictionary,
    untrained_dictionary,
)
from unweave.graph import Graph
from unweave.pipeline import token_strings
from unweave.scope import Scope

SEEDS = (0, 1, 2)
FEATURES, DIMENSIONS, ACTIVE, VECTORS = 64, 32, 3, 40_000
COMMON: dict[str, Any] = {"steps": 2000, "tokens": 512, "learning_rate": 1e-2}
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": ACTIVE},
    "batchtopk": {"kind": "batchtopk", "k": ACTIVE},
    "jumprelu": {"kind": "jumprelu", "penalty": 0.1, "rise": 1.0, "bandwidth": 1.0},
    "relu": {"kind": "relu", "penalty": 0.05},
}
WIDTHS = (64, 96)
# of language models; the learning rate was the better of 1e-3 and 3e-3 on training text of blocks.2.mlp
SIZES: dict[str, dict[str, Any]] = {
    "topk-128": {"width": 128, "k": 8},
    "topk-512": {"width": 512, "k": 8},
    "topk-2048": {"width": 2048, "k": 8},
    "jumprelu-512": {"width": 512, "kind": "jumprelu", "penalty": 0.01},
}
TRAINING: dict[str, Any] = {"steps": 1200, "tokens": 512, "learning_rate": 3e-3}
TOKENS, BASIS_TOKENS, HELD_OUT = 150_000, 20_000, 64
SHOWN = "topk-512"
KEPT = Path(tempfile.gettempdir()) / "unweave-dictionaries"


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """(vectors, unit features)."""
    g = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(FEATURES, DIMENSIONS, generator=g), dim=1)
    there = torch.rand(VECTORS, FEATURES, generator=g) < ACTIVE / FEATURES
    return (there * (0.5 + torch.rand(VECTORS, FEATURES, generator=g))) @ features, features


def cosines(columns: Tensor, features: Tensor) -> list[float]:
    """For every feature, the largest cosine with a column, up to sign for a basis."""
    found: list[float] = (features @ F.normalize(columns, dim=0)).amax(1).tolist()
    return found


def sparsity(d: Dictionary, x: Tensor) -> dict[str, float]:
    """On fresh vectors of the same features."""
    f = d.encode(x)
    left = (x - d.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    active = f > 0
    return {
        "variance_explained": 1 - float(left),
        "l0": float(active.sum(1).float().mean()),
        "dead": float((~active).all(0).float().mean()),
    }


def synthetic(keep: Callable[[dict[str, Any]], None], before: dict[str, Any]) -> dict[str, Any]:
    """Rows by name, and by seed what they are made of; what a run before this one finished is not run again."""
    by_seed: dict[str, Any] = dict(before.get("by_seed", {}))
    for seed in SEEDS:
        x, features = planted(seed)
        done = by_seed.setdefault(str(seed), {})
        for name, find in methods(x[: VECTORS * 3 // 4], x[VECTORS * 3 // 4 :], seed).items():
            if name not in done:
                columns, measures = find()
                done[name] = {"cosines": cosines(columns, features), **measures}
                print(seed, name, sum(done[name]["cosines"]) / FEATURES, flush=True)
                keep({"rows": summary(by_seed), "by_seed": by_seed})
    return {"rows": summary(by_seed), "by_seed": by_seed}


def methods(train: Tensor, held: Tensor, seed: int) -> dict[str, Callable[[], tuple[Tensor, dict[str, float]]]]:
    """By name, a function that gives columns and what is measured on fresh vectors."""

    def fit(width: int, options: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        d = fit_dictionary(train, Recipe(width, seed=seed, **options, **COMMON))
        return d.decoder, sparsity(d, held)

    def noise(width: int) -> tuple[Tensor, dict[str, float]]:
        return torch.randn(DIMENSIONS, width, generator=torch.Generator().manual_seed(seed)), {}

    def ica() -> tuple[Tensor, dict[str, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # more features than dimensions: it has no answer
            mixing = torch.from_numpy(FastICA(random_state=seed, max_iter=200).fit(train.numpy()).mixing_).float()
        return torch.cat([mixing, -mixing], 1), {}

    out: dict[str, Callable[[], tuple[Tensor, dict[str, float]]]] = {}
    for width in WIDTHS:
        out |= {f"{kind}, {width} latents": partial(fit, width, options) for kind, options in RECIPES.items()}
        out[f"random columns, {width}"] = partial(noise, width)
    return out | {"ICA, 32 directions": ica}


def summary(by_seed: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in next(iter(by_seed.values())):
        found = [seed[name] for seed in by_seed.values() if name in seed]
        values = [v for one in found for v in one["cosines"]]
        mean, low, high = interval(values)
        rows[name] = {"mmcs": mean, "low": low, "high": high, "seeds": len(found)}
        rows[name]["by_seed"] = [sum(one["cosines"]) / FEATURES for one in found]
        rows[name]["features_above_0.9"] = sum(v > 0.9 for v in values) / len(values)
        measures = [m for m in found[0] if m != "cosines"]
        rows[name] |= {m: sum(one[m] for one in found) / len(found) for m in measures}
    return rows


def fitted(
    name: str, where: str, collect: Callable[[], Tensor], keys: Iterable[str] = tuple(SIZES)
) -> dict[str, Dictionary]:
    """The dictionaries of one place, each kept in a folder beside other temporary files, and not trained again."""
    found = {}
    for key in keys:
        recipe = Recipe(**SIZES[key], **TRAINING)
        folder = KEPT / f"{name}-{where}-{key}-{TRAINING['steps']}"
        if not folder.exists():
            started = time.time()
            save_dictionary(fit_dictionary(collect(), recipe, progress=False), folder, hook_name=hook_of(where))
            print(where, key, f"{time.time() - started:.0f} s", flush=True)
        found[key] = load_dictionary(folder).dictionary
    return found


def language_model(name: str, keep: Callable[[dict[str, Any]], None], before: dict[str, Any]) -> dict[str, Any]:
    """What every MLP writes: three widths of TopK and one JumpReLU beside the bases, on held-out text."""
    torch.set_num_threads(1)
    graph, data, held = model(name)
    parts = spread(held, 2 * HELD_OUT)
    half = (torch.arange(len(parts)) % 2).bool()
    texts = (spread(data, HELD_OUT), parts.select(~half), parts.select(half))
    moments = channel_moments(graph, texts[0], Scope(), progress=False)
    strings = token_strings(load_tokenizer(SHARED / "models" / name), graph.info["d_vocab"])
    out = dict(before)
    for where in [stage.nodes[0] for stage in graph.stages if stage.kind == "mlp"]:
        if where not in out:
            out[where] = one_place(name, graph, where, data, texts, moments, strings)
            keep(out)
            print(where, {kind: round(row["loss_recovered"][0], 3) for kind, row in out[where]["rows"].items()})
    return out


def one_place(
    name: str, graph: Graph, where: str, data: TokenData, texts: tuple[TokenData, ...], moments: Any, strings: list[str]
) -> dict[str, Any]:
    """The rows of one node, splitting, the privileged basis, and words for the latents of the middle size."""
    started = time.time()
    train, held, again = texts
    x = collect_activations(graph, where, data, limit=TOKENS)
    trained = fitted(name, where, lambda: x)
    kinds = ("neuron", "random", "principal", "fisher", "independent", "sparse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rows = {kind: find_basis(graph, where, data, kind, moments=moments, limit=BASIS_TOKENS) for kind in kinds}
    blank = {f"{k}, random columns": untrained_dictionary(x, Recipe(**o)) for k, o in SIZES.items() if "k" in o}
    rows |= trained | blank
    table = {key: row._asdict() for key, row in compare_features(graph, where, rows, held, progress=False).items()}
    options: dict[str, Any] = {"token_strings": strings, "shifts": 1, "draws": 4, "progress": False}
    found = {
        key: describe_dictionary(graph, where, d, train, held, first=512 if "512" in key else 256, **options)
        for key, d in rows.items()
    }
    for key, words in found.items():
        table[key]["descriptions"] = score_summary(words)
    places = {place: measure_privilege(graph, place, held) for place in (where, f"{where}.code")}
    return {
        "rows": table,
        "splitting": {"trained": splits(trained), "random columns": splits(blank)},
        "privilege": {place: p._asdict() for place, p in places.items()},
        "latents": chosen_latents(graph, where, trained[SHOWN], found[SHOWN], train, again, options),
        "wall_s": round(time.time() - started, 1),
    }


def score_summary(words: Descriptions) -> dict[str, Any]:
    """Means over the latents that fire on the held-out text, with intervals by bootstrap over them."""
    scored = [item for item in words.items if item.score == item.score]
    mean, low, high = interval([item.score for item in scored])
    scores = torch.tensor([item.score for item in scored])
    deciles = [round(float(q), 4) for q in scores.quantile(torch.linspace(0.1, 0.9, 9))]
    return {
        "score": {"mean": mean, "low": low, "high": high},
        "random_score": interval([item.random_score for item in scored])[0],
        "deciles": deciles,
        "above_half": float((scores > 0.5).float().mean()),
        "labelled": sum(item.label is not None for item in words.items) / len(words.items),
        "scored": len(scored),
        "null_95": words.threshold,
    }


def splits(dictionaries: dict[str, Dictionary]) -> dict[str, Any]:
    topk = [name for name in dictionaries if name.startswith("topk")]
    out = {}
    for small, large in pairwise(topk):
        s = measure_splitting(dictionaries[small], dictionaries[large])
        out[f"{small} > {large}"] = {"recovered": s.recovered, "split": s.split, "new": s.new}
    return out


def chosen_latents(
    graph: Graph,
    where: str,
    dictionary: Dictionary,
    words: Descriptions,
    train: TokenData,
    again: TokenData,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The ten that score best on half of the held-out text, and ten that fire at random, scored on the other half."""
    alive = [item for item in words.items if item.score == item.score]
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))[:10].tolist()
    picked = {"best": sorted(alive, key=lambda i: -i.score)[:10], "random": [alive[i] for i in order]}
    numbers = sorted({item.direction for items in picked.values() for item in items})
    rows = dict(zip(numbers, describe_latents(graph, where, dictionary, numbers, train, again, **options), strict=True))
    return {
        kind: [
            {
                "latent": item.direction,
                "text": item.text,
                "score_where_picked": item.score,
                "score": rows[item.direction]["score"],
                "auroc": rows[item.direction]["auroc"],
            }
            for item in items
        ]
        for kind, items in picked.items()
    }


def main() -> None:
    started = time.time()
    command = " ".join(["python -m benchmarks.dictionaries", *sys.argv[1:]])
    settings: dict[str, Any] = {"features": FEATURES, "dimensions": DIMENSIONS, "active": ACTIVE, "vectors": VECTORS}
    settings |= {"recipes": RECIPES, "common": COMMON}
    of_models = {"sizes": SIZES, "training": TRAINING, "tokens": TOKENS, "held_out": HELD_OUT, "shown": SHOWN}
    for name in sys.argv[1:] or ["synthetic"]:
        is_model = name != "synthetic"
        file, mine = (f"dictionaries-{name}", of_models) if is_model else ("dictionaries", settings)
        path = RESULTS / f"{file}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        results: dict[str, Any] = old["results"] if old.get("settings") == mine else {}

        def keep(found: dict[str, Any], file: str = file, mine: dict[str, Any] = mine) -> None:
            save(file, {"settings": mine, "results": found}, started, command)

        if is_model:
            language_model(name, keep, results)
        else:
            keep({name: synthetic(lambda found: keep({"synthetic": found}), results.get(name, {}))})


if __name__ == "__main__":
    main()
