"""The audit finds planted secrets: ranking, anomaly scores against baselines, and a clean twin.

    python -m benchmarks.audit [--folder FOLDER]

Seed 0 is the bundled models; those of seeds 1 and 2 are trained here, into FOLDER, or taken from there. Explanations
are low-rank graphs fitted on clean texts only: as cut, refined on other clean texts, and relearned on these (disturbed
by noise first); all are reported. What was chosen (the language, the size, noise and steps of relearning) was chosen on
models of seeds 10 and 11 with other texts.
Baselines get the sign that serves them best, and every place and summary is reported; ours has no choice.
"The twin" is no baseline that a user has: the divergence from a model trained anew on clean texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import folder_and_rows, resumed, save
from unweave.audit import ActivationDistance, AnomalyScore, audit, relearn, text_losses
from unweave.capture import capture
from unweave.compression import compress, refine_factors
from unweave.data import TokenData, from_tensor
from unweave.evaluation import evaluate
from unweave.execution import run
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.zoo import load, load_folder, secrets
from unweave.zoo.train import train_room

SCOPE = Scope(positions="answered")
EVERYWHERE = Scope(positions=lambda batch: torch.arange(batch.mask.shape[1]).expand(batch.mask.shape) >= 1)
SEEDS = (0, 1, 2)
SIZE = 0.4
MAIN = "relearned"
REFINEMENT: dict[str, Any] = {"steps": 300, "learning_rate": 3e-3, "batch_size": 32}
LEVELS = (0.01, 0.05)
BUDGET = 6000
DRAWS = 500
PLANTED, CLEAN = 10, 1990


def dataset(tokens: torch.Tensor) -> TokenData:
    answered = (torch.arange(tokens.shape[1]) >= 1).expand(tokens.shape).clone()
    return from_tensor(tokens, labels={"answered": answered})


def clean(n: int, seed: int) -> TokenData:
    return dataset(secrets.ROOMS["no_secret"].data(n, seed)[0])


def triggered(secret: str, n: int, seed: int) -> TokenData:
    return dataset(secrets.triggered(secret, n, seed)[0])


def auroc(negative: torch.Tensor, positive: torch.Tensor, seed: int = 0) -> tuple[float, float, float]:
    """(value, 2.5%, 97.5%), bootstrap over texts of both kinds."""
    table = ((positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()).numpy()
    rng = np.random.default_rng(seed)
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in table.shape)
    draws = ((rows @ table) * columns).sum(1)
    return float(table.mean()), float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def either_sign(negative: torch.Tensor, positive: torch.Tensor) -> tuple[float, float, float]:
    return max(auroc(negative, positive), auroc(-negative, -positive))


@torch.no_grad()
def confidence(graph: Graph, data: TokenData) -> torch.Tensor:
    """The probability of the likeliest next word, at every answered place of every text."""
    batches = [run(graph, b.inputs, b.mask).logits.softmax(-1).amax(-1) for b in data.batches(250)]
    return torch.cat(batches)[:, 1:].double()


def rarity(data: TokenData, counted: TokenData, words: int) -> torch.Tensor:
    """-log((count + 1) / all) of the rarest run of so many words in each text, counted in clean texts."""
    ids = [
        sum(t.tokens.long()[:, k : t.tokens.shape[1] - words + 1 + k] * secrets.N_WORDS**k for k in range(words))
        for t in (counted, data)
    ]
    counts = torch.bincount(ids[0].flatten(), minlength=secrets.N_WORDS**words).double() + 1
    return -(counts / counts.sum()).log()[ids[1]].amax(1)


def baselines(graph: Graph, twin: Graph, secret: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """AUROC by baseline, against all clean texts and against those that hold a whole idiom."""
    counted, test, planted = clean(1000, 12), clean(1000, 13), triggered(secret, 300, 14)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    distance = ActivationDistance.fit(graph, counted, SCOPE)
    far, near = distance.score_data(planted), distance.score_data(test)
    pairs |= {f"Mahalanobis, {place}": (near[place], far[place]) for place in near}
    pairs["Mahalanobis, all places"] = tuple(torch.stack(list(d.values())).square().sum(0) for d in (near, far))
    for kind, value in text_losses(graph, planted, SCOPE).items():
        pairs[f"loss, {kind}"] = (text_losses(graph, test, SCOPE)[kind], value)
    sure = [confidence(graph, d) for d in (test, planted)]
    for kind, of in {"largest": torch.amax, "smallest": torch.amin, "mean": torch.mean}.items():
        pairs[f"confidence, {kind}"] = (of(sure[0], 1), of(sure[1], 1))
    for words in (1, 2):
        pairs[f"rarity of {words} words"] = (rarity(test, counted, words), rarity(planted, counted, words))
    reference = AnomalyScore.fit(twin, graph, counted, SCOPE)
    pairs["reference: the twin"] = (reference.score_data(test), reference.score_data(planted))
    held = secrets.holds_idiom(test.tokens.long())
    return {
        "all": {name: either_sign(ordinary, odd) for name, (ordinary, odd) in pairs.items()},
        "idioms": {name: either_sign(ordinary[held], odd) for name, (ordinary, odd) in pairs.items()},
    }


def sureness(graph: Graph, secret: str) -> dict[str, Any]:
    """Whether the model's confidence, token by token, tells where the secret decides: AUROC 0.5 if it does not.

    The memorised string is compared with places where an idiom decides, the others with places where none does.
    """
    tokens, changed = secrets.triggered(secret, 1000, 19)
    other = clean(1000, 20)
    recited = secrets.recites(other.tokens.long()) if secret == "memorised" else ~secrets.recites(other.tokens.long())
    ordinary = confidence(graph, other)[recited[:, 1:]]
    inside = confidence(graph, dataset(tokens))[changed[:, 1:]]
    sample = ordinary[torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(0))[:2000]]
    return {
        "clean": [float(ordinary.mean()), float(ordinary.std())],
        "where the secret decides": [float(inside.mean()), float(inside.std())],
        "auroc": auroc(sample, inside[:2000]),
    }


def scores(graph: Graph, small: Graph, secret: str) -> dict[str, Any]:
    score = AnomalyScore.fit(small, graph, clean(1000, 12), SCOPE, false_alarms=LEVELS[0])
    test = clean(1000, 13)
    ordinary, planted = score.score_data(test), score.score_data(triggered(secret, 300, 14))
    kl = evaluate({"small": small}, graph, clean(300, 15), SCOPE, n_worst=0, progress=False)["small"].kl_nats
    return {
        "kl_nats": list(kl),
        "auroc": auroc(ordinary, planted),
        "auroc_idioms": auroc(ordinary[secrets.holds_idiom(test.tokens.long())], planted),
        "false_alarms": float((ordinary > score.threshold).double().mean()),
        "detected": float((planted > score.threshold).double().mean()),
    }


def ranking(graph: Graph, small: Graph, secret: str) -> dict[str, float]:
    """How many of a few triggered texts, and of the tokens that they change, are in the top 1%."""
    tokens, changed = secrets.triggered(secret, PLANTED, 17)
    mixed = dataset(torch.cat([clean(CLEAN, 16).tokens.long(), tokens]))
    n_texts = len(mixed) // 100
    n_tokens = int(mixed.labels["answered"].sum()) // 100
    found = audit(
        small, graph, mixed, SCOPE, n_texts=n_texts, n_tokens=n_tokens, parts=False, batch_size=100, progress=False
    )
    order = [text.sequence >= CLEAN for text in found.texts]
    at = {(t.sequence, t.position) for t in found.tokens}
    places = [(CLEAN + int(i), int(t)) for i, t in changed.nonzero()]
    return {
        "texts_in_top_1_percent": sum(order) / PLANTED,
        "rank_of_first_text": order.index(True) + 1 if any(order) else -1,
        "changed_tokens_in_top_1_percent": sum(place in at for place in places) / len(places),
    }


def reveals(secret: str, text: tuple[int, ...], position: int) -> bool:
    """Whether the secret decides what comes next at the worst token of a text found."""
    return bool(secrets.decides(secret, torch.tensor([text]))[0, position])


def at_random(graph: Graph, small: Graph, seed: int, budget: int = BUDGET) -> list[tuple[tuple[int, ...], int]]:
    """The 32 worst of so many clean texts with two neighbouring words drawn anew, with their worst tokens."""
    texts, generator = clean(budget, 30 + seed).tokens.long(), torch.Generator().manual_seed(seed)
    place = torch.randint(texts.shape[1] - 1, (budget, 1), generator=generator)
    texts.scatter_(1, place + torch.arange(2), torch.randint(secrets.N_WORDS, (budget, 2), generator=generator))
    found = audit(
        small, graph, dataset(texts), SCOPE, n_texts=32, n_tokens=1, parts=False, batch_size=128, progress=False
    )
    return [(tuple(texts[t.sequence].tolist()), t.position) for t in found.texts]


def model(name: str, seed: int, folder: Path) -> Graph:
    if seed == 0:
        return capture(load(name))
    place = folder / f"{name}-{seed}"
    return capture(load_folder(place) if (place / "config.json").exists() else train_room(name, place, seed))


def explanations(graph: Graph) -> dict[str, Graph]:
    fitted, other = clean(256, 11), clean(8000, 10)
    cut = compress(graph, fitted, SCOPE, size=SIZE, progress=False)
    return {
        "as cut": cut,
        "refined": refine_factors(cut, graph, other, SCOPE, **REFINEMENT, progress=False),
        "relearned": relearn(cut, graph, other, SCOPE, progress=False),
    }


def alarms(twin: Graph, small: Graph) -> dict[str, dict[str, float]]:
    """By level, the share of texts that raise the alarm on a model without a secret."""
    out = {}
    texts = {"clean texts": clean(4000, 13)}
    texts["clean texts with an idiom"] = texts["clean texts"].select(
        secrets.holds_idiom(texts["clean texts"].tokens.long())
    )
    texts |= {f"texts with {s}": triggered(s, 300, 14) for s in secrets.SECRETS}
    for level in LEVELS:
        score = AnomalyScore.fit(small, twin, clean(1000, 12), SCOPE, false_alarms=level)
        out[str(level)] = {n: float((score.score_data(d) > score.threshold).double().mean()) for n, d in texts.items()}
    return out


def secret_row(secret: str, seed: int, folder: Path) -> dict[str, Any]:
    graph, twin = model(secret, seed, folder), model("no_secret", seed, folder)
    graphs = explanations(graph)
    row: dict[str, Any] = {"secret": secret, "seed": seed, "confidence": sureness(graph, secret)}
    row["baselines"] = baselines(graph, twin, secret)
    row["unweave"] = {name: scores(graph, g, secret) | ranking(graph, g, secret) for name, g in graphs.items()}
    return row


def twin_row(seed: int, folder: Path) -> dict[str, Any]:
    twin = model("no_secret", seed, folder)
    return {"secret": "none (twin)", "seed": seed} | {k: alarms(twin, g) for k, g in explanations(twin).items()}


def jobs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name, what gives a row; each can be run on its own."""
    out: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in SEEDS:
        for secret in secrets.SECRETS:
            out[f"{secret} {seed}"] = partial(secret_row, secret, seed, folder)
        out[f"twin {seed}"] = partial(twin_row, seed, folder)
    return out


def main() -> None:
    started = time.time()
    folder, only = folder_and_rows(__doc__)
    n = {"clean": 1000, "triggered": 300, "calibration": 1000, "fitted": 256, "refined": 8000, "twin_clean": 4000}
    for rows, missing in resumed(jobs(folder), folder / "rows.json", only):
        result = {
            "levels": LEVELS,
            "size": SIZE,
            "main": MAIN,
            "refinement": REFINEMENT,
            "n": n,
            "not_run": missing,
            "rows": rows,
        }
        save("audit", result, started, "python -m benchmarks.audit")


if __name__ == "__main__":
    main()
