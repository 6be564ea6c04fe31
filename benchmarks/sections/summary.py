"""The README's table: one row per claim, the best other method measured in the same run beside ours."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.sections.compression import SPARSE
from benchmarks.sections.markdown import load, table
from benchmarks.sections.retrodictions import COMMAND, rows

VERDICTS = {"agrees": "agree", "unclear": "unclear", "differs": "differ"}


def _edges() -> list[str] | None:
    result = load("edges")
    if result is None:
        return None
    by = {r["method"]: r for r in result["rows"]}
    ours, other = by["unweave fisher, 2 samples"], by["EAP-IG, 5 steps"]
    return [
        f"Scores of all {result['edges']:,} edges of stories260K: rank correlation with exact effects",
        f"{ours['spearman']:.3f}, {ours['time_ratio']:.2g}x a forward + backward pass",
        f"EAP-IG {other['spearman']:.3f}, {other['time_ratio']:.2g}x",
        result["command"],
    ]


def _compression() -> list[str] | None:
    result = load("compression-pylm")
    if result is None:
        return None
    rows = [r for r in result["rows"] if r["size"] == 0.6 and "kl_nats" in r]
    texts = []
    for sparse in (False, True):
        form = [r for r in rows if (r["method"] in SPARSE) == sparse]
        ours = min(r["kl_nats"][0] for r in form if r["method"].startswith("unweave"))
        other = min((r for r in form if not r["method"].startswith("unweave")), key=lambda r: r["kl_nats"][0])
        texts.append((f"{ours:.3f}", f"{other['method']} {other['kl_nats'][0]:.3f}"))
    return [
        "pylm in 60% of the numbers, without training, nats per token: low-rank; sparse",
        "; ".join(a for a, _ in texts),
        "; ".join(b for _, b in texts),
        result["command"],
    ]


def _circuits() -> list[str] | None:
    result = load("circuits")
    if result is None:
        return None
    ours, others, names = [], [], []
    for task in ("quotes", "name", "pronoun"):
        rows = [r for r in result["rows"] if r["task"] == task]
        ours.append(next(r["cmd"] for r in rows if r["method"] == "unweave, search"))
        best = min((r for r in rows if not r["method"].startswith("unweave")), key=lambda r: r["cmd"])
        others.append(best["cmd"])
        names.append(best["method"].removesuffix(" (their code)"))
    return [
        "Circuits of three stories260K tasks: distance from the model's behaviour over sizes (CMD, less is better)",
        ", ".join(f"{v:.3f}" for v in ours),
        ", ".join(f"{v:.3f} ({n})" for v, n in zip(others, names, strict=True)),
        result["command"],
    ]


def _tracr() -> list[str] | None:
    result = load("tracr")
    if result is None:
        return None
    rows = [r for r in result["rows"] if r["ablation"] == "resample"]
    right = sum(not r["lacking_with_effect"] and not r["kept_but_untrue"] for r in rows)
    return ["Compiled programs whose circuit is found exactly", f"{right} of {len(rows)}", "–", result["command"]]


def _modules() -> list[str] | None:
    result = load("modules")
    if result is None:
        return None
    rows = [r["adjusted_rand"] for r in result["known"] if r["model"] == "two_tasks"]
    means = {m: sum(r[m] for r in rows) / len(rows) for m in rows[0] if all(m in r for r in rows)}
    other = max((m for m in means if m != "unweave"), key=lambda m: means[m])
    return [
        f"Modules of networks with two tasks, {len(rows)} seeds: mean adjusted Rand index",
        f"{means['unweave']:.2f}",
        f"{other} {means[other]:.2f}",
        result["command"],
    ]


def _edits() -> list[str] | None:
    result = load("edits")
    if result is None:
        return None
    graph = "sparse, 80%, the first 100 edits"
    rows = {(r["size"], r["predictor"]): r["r2"][0] for r in result["rows"] if r["graph"] == graph}
    ours, other = (
        ", ".join(f"{rows[size, predictor]:.2f}" for size in ("0.1", "0.3", "1"))
        for predictor in ("graph", "second order")
    )
    what = "Random edits of stories260K of three sizes: R² of the change of loss that the sparse graph (80%) predicts"
    return [what, ours, f"second order {other}", result["command"]]


def _certificates() -> list[str] | None:
    result = load("certificates")
    if result is None:
        return None
    rows = {q: [r for r in result["boxes"] if r["quantity"] == q and r["bound"] > 1e-6] for q in ("output", "kl")}

    def spread(key: str) -> str:
        figures = [sorted(r[key] for r in some) for some in rows.values()]
        return "; ".join(f"{f[0]:,.1f} to {f[-1]:,.1f}" for f in figures)

    n = len(rows["output"])
    return [
        f"Certified distance of {n} graphs from their models over boxes of inputs: bound / worst found, logits; KL",
        spread("bound_to_worst"),
        f"interval propagation {spread('intervals_to_worst')}",
        result["command"],
    ]


def _audit() -> list[str] | None:
    result = load("audit")
    if result is None:
        return None
    place = "Mahalanobis, before unembed"
    ours: dict[str, list[float]] = {}
    other: dict[str, list[float]] = {}
    for row in (r for r in result["rows"] if "baselines" in r):
        ours.setdefault(row["secret"], []).append(row["unweave"][result["main"]]["auroc"][0])
        other.setdefault(row["secret"], []).append(row["baselines"]["all"][place][0])
    texts = ["; ".join(f"{sum(v) / len(v):.3f}" for v in means.values()) for means in (ours, other)]
    what = f"Texts that hold a planted secret told from clean ones ({'; '.join(ours)}): AUROC, mean of 3 models each"
    return [what, texts[0], f"Mahalanobis distance {texts[1]}", result["command"]]


def _triggers() -> list[str] | None:
    result = load("triggers")
    if result is None:
        return None
    rows = [r for r in result["rows"] if r["secret"]]

    def ranks(way: str) -> str:
        best = [min(r[f"{way}, {at}"]["rank"] for at in ("anywhere", "start")) for r in rows]
        return f"first in {best.count(1)}, at worst {max(best)}"

    what = (
        f"The pair that opens each of {len(rows)} secrets, put anywhere or at the start: rank of {result['n_pairs']:,}"
    )
    return [what, ranks("one graph"), f"plain nats: {ranks('plain nats')}", result["command"]]


def _exactness() -> list[str] | None:
    result = load("exactness")
    if result is None:
        return None
    rows = [r for r in result["rows"] if r["dtype"] == "float32"]
    worst = max(r["largest"] for r in rows)
    return [f"{len(rows)} models of 9 families: graph against model, logits", f"≤ {worst:.1e}", "–", result["command"]]


def _dictionaries() -> list[str] | None:
    result = load("dictionaries")
    if result is None:
        return None
    rows = {name: r["mmcs"] for name, r in result["results"]["synthetic"]["rows"].items()}
    other = max((name for name in rows if name.startswith(("ICA", "random"))), key=lambda name: rows[name])
    return [
        "Dictionaries on data with known sparse features, as many latents: mean max cosine with the truth (TopK)",
        f"{rows['topk, 64 latents']:.3f}",
        f"{other.partition(',')[0]} {rows[other]:.3f}",
        result["command"],
    ]


def _universality() -> list[str] | None:
    result = load("universality")
    if result is None or "induction" not in result["rooms"]:
        return None
    rows = {way: row["right"]["value"] for way, row in result["rooms"]["induction"]["rows"].items() if row.get("right")}
    other = max(("cka", "svcca", "procrustes"), key=lambda way: rows[f"{way}, nearest"])
    networks = len(result["rooms"]["induction"]["networks"])
    return [
        f"Heads of induction, each matched with the nearest of 8 in {networks} networks: share with the same role",
        f"{rows['behaviour, nearest']:.2f} (chance {rows['random']:.2f})",
        f"{other} {rows[f'{other}, nearest']:.2f}",
        result["command"],
    ]


def _retrodictions() -> list[str] | None:
    found = rows()
    if not found:
        return None
    verdicts = [row["verdict"] for row in found]
    counts = ", ".join(f"{verdicts.count(v)} {text}" for v, text in VERDICTS.items())
    n = len({row["phenomenon"] for row in found})
    return [f"Published phenomena trained again: {len(found)} quantities of {n}", counts, "–", COMMAND]


ROWS: list[Callable[[], list[str] | None]] = [
    _exactness,
    _edges,
    _circuits,
    _tracr,
    _compression,
    _modules,
    _edits,
    _audit,
    _triggers,
    _certificates,
    _dictionaries,
    _universality,
    _retrodictions,
]


def summary() -> str:
    lines = [row for row in (make() for make in ROWS) if row is not None]
    text = "Held-out data; the best other method measured in the same run beside ours. All tables, with intervals and"
    text += " what fell short: [results](docs/results.md); every experiment, failed ones too: [log](docs/log.md)."
    return text + "\n\n" + table(["what", "unweave", "best other", "command"], [[*r[:3], f"`{r[3]}`"] for r in lines])
