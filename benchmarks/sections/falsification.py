"""Predictions that can fail."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.markdown import interval, load, table


def edits() -> str:
    result = load("edits")
    if result is None:
        return ""
    cells = {(r["model"], r["graph"], r["size"], r["predictor"]): r for r in result["rows"] if r["size"] != "all"}
    rows = []
    for model, graph, size in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((model, graph, size, predictor)) for predictor in ("graph", "second order", "gradient")]
        ours = cells[model, graph, size, "graph"]
        r2 = ["–" if row is None else interval(row["r2"], 2) for row in found]
        name = f"{model}: {graph} ({ours['kl_nats']:.3f} nats)"
        rows.append([name, size, *r2, interval(ours["slope"], 2)])
    text = (
        "R² of the change of loss that an edit of weights or state makes, predicted before the model is edited: by the"
    )
    text += " graph, by gradient and Fisher information of the model itself, and by the gradient alone; intervals over"
    text += " edits"
    head = ["graph", "size of edits", "graph's R²", "second order", "gradient", "graph's slope"]
    return f"**Edits predicted** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def certificates() -> str:
    result = load("certificates")
    if result is None:
        return ""

    def ratio(value: float | None) -> str:
        return "–" if value is None else f"{value:,.1f}"

    rows = [
        [
            r["model"],
            r["graph"],
            r["quantity"],
            f"{r['bound']:.3g}",
            *(ratio(r[key]) for key in ("bound_to_worst", "unsplit_to_worst", "intervals_to_worst")),
        ]
        for r in result["boxes"]
        if r["bound"] > 1e-6
    ]
    sampled = sum(r["sampled"] for r in result["boxes"])
    violations = sum(r["violations"] for r in result["boxes"])
    text = f"how far graph and model can be apart anywhere in a box of inputs; {violations} violations in {sampled:,}"
    text += " sampled points; bounds as multiples of the worst point found, at most"
    text += f" {result['limit']:,} boxes; rows where nothing is to be bounded (below 1e-6) are left out"
    head = ["model", "graph", "of", "bound", "ours", "before splitting", "intervals"]
    proofs = result["maximum"]["proofs"]
    shares = [
        [name, f"{p['accuracy']:.4f}", f"{p['operations']:.2g}", f"{p['ratio_operations']:.2g}"]
        for name, p in proofs.items()
    ]
    return (
        f"**Certificates** (`{result['command']}`): {text}:\n\n"
        + table(head, rows)
        + f"\n\nThe maximum of four numbers, {result['maximum']['n_inputs']:,} inputs: accuracy proved, and what the"
        + " proof costs:\n\n"
        + table(["proof", "accuracy at least", "operations", "share of all forward passes"], shares)
    )


def audit() -> str:
    result = load("audit")
    if result is None:
        return ""
    rows = [_audited(r, result["main"]) for r in result["rows"] if "baselines" in r]
    text = (
        f"telling texts with a planted secret from clean ones by how far the {result['main']} explanation is from the"
    )
    text += (
        " model: AUROC, also against only those clean texts that hold a whole idiom, which the model recites as surely"
    )
    text += " as the memorised string; the same explanation refined without noise; Mahalanobis distance on the last"
    text += (
        " stream; the best of all the other baselines (chosen after the fact, place by place); the disagreement with a"
    )
    text += (
        " twin trained without the secret, which no user has; the AUROC of the model's own confidence where the secret"
    )
    text += " decides (0.5 where it gives nothing away); share of 10 triggered texts, and of the tokens that the secret"
    text += " changed, among the top 1% of 2,000 texts that the audit ranks"
    head = ["secret", "unweave", "among idioms", "no noise", "Mahalanobis", "best other", "twin", "confidence"]
    return (
        f"**Audit** (`{result['command']}`): {text}:\n\n"
        + table([*head, "texts", "tokens"], rows)
        + "\n\nA twin without any secret, texts that raise an alarm of the level 1%: "
        + "; ".join(_false_alarms(r) for r in result["rows"] if "baselines" not in r)
        + "."
    )


def _audited(row: dict[str, Any], main: str) -> list[str]:
    baselines, ours = row["baselines"]["all"], row["unweave"][main]
    others = {name: value for name, value in baselines.items() if "twin" not in name}
    best = max(others, key=lambda name: others[name][0])
    return [
        f"{row['secret']}, seed {row['seed']}",
        interval(ours["auroc"]),
        interval(ours["auroc_idioms"]),
        f"{row['unweave']['refined']['auroc'][0]:.3f}",
        interval(baselines["Mahalanobis, before unembed"]),
        f"{best} {others[best][0]:.3f}",
        f"{baselines['reference: the twin'][0]:.3f}",
        f"{row['confidence']['auroc'][0]:.2f}",
        f"{ours['texts_in_top_1_percent']:.0%}",
        f"{ours['changed_tokens_in_top_1_percent']:.0%}",
    ]


def _false_alarms(row: dict[str, Any]) -> str:
    shares = row["relearned"]["0.01"].items()
    return f"seed {row['seed']}: " + ", ".join(f"{share:.1%} of {name}" for name, share in shares)


def triggers() -> str:
    result = load("triggers")
    if result is None:
        return ""
    ways = ("one graph", "two graphs", "two graphs, candidates", "plain nats")
    rows = []
    for r in result["rows"]:
        for at in ("anywhere", "start"):
            name = f"{r['secret'] or 'none (twin)'}, seed {r['seed']}"
            found = [r.get(f"{way}, {at}", {}) for way in ways]
            ranks = ["–" if "rank" not in f else "not tried" if f["rank"] is None else str(f["rank"]) for f in found]
            first = [f"{found[k]['first']['p']:.2g}" for k in (0, 1)]
            single = [
                "–" if way not in r else "first" if r[way]["first"] else "among 32" if r[way]["any"] else "no"
                for way in ("search_inputs", "at random")
            ]
            rows.append([name, at, *ranks, *first, *single])
    text = (
        f"the rank of the planted pair among all {result['n_pairs']:,} after {result['budget']:,} texts run on model"
        f" and graphs (sizes {' and '.join(map(str, result['sizes']))}, refined), with pairs put anywhere or at the"
        " start; p of the pair ranked first, which in a twin should be evenly spread or larger; and whether"
        " single inputs found with as many texts hold what was planted"
    )
    head = ["secret", "put", *ways, "p, one graph", "p, two graphs", "search_inputs", "at random"]
    missing = f"\n\nNot run: {', '.join(result['not_run'])}." if result["not_run"] else ""
    return f"**Triggers** (`{result['command']}`): {text}:\n\n" + table(head, rows) + missing
