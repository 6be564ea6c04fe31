"""Predictions that can fail."""

from __future__ import annotations

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
    main = result["main"]
    rows = []
    for r in result["rows"]:
        if "baselines" not in r:
            continue
        others = {k: v for k, v in r["baselines"].items() if "twin" not in k and "best place" not in k}
        best = max(others, key=lambda k: others[k][0])
        twin = next(v for k, v in r["baselines"].items() if "twin" in k)
        ours = r["unweave"][main]
        rows.append(
            [
                f"{r['secret']}, seed {r['seed']}",
                interval(ours["auroc"]),
                f"{interval(r['baselines']['Mahalanobis, before unembed'])}",
                f"{best} {others[best][0]:.3f}",
                f"{twin[0]:.3f}",
                f"{r['confidence']['auroc'][0]:.2f}",
                f"{ours['texts_in_top_1_percent']:.0%}",
                f"{ours['changed_tokens_in_top_1_percent']:.0%}",
            ]
        )
    text = "telling texts with a planted secret from clean ones by how much of the output travels through what the"
    text += (
        f" explanation ({main}) leaves out: AUROC, with Mahalanobis distance on the last stream, the best of all the"
    )
    text += " other baselines (chosen after the fact, place by place), and the disagreement with a twin trained without"
    text += (
        " the secret, which no user has; the AUROC of the model's own confidence where the secret decides (0.5 where"
    )
    text += (
        " it gives nothing away); share of the triggered texts, and of the tokens that the secret changed, among the"
    )
    text += " top 1% that the audit ranks"
    head = ["secret", "unweave", "Mahalanobis", "best other", "twin", "confidence", "texts", "tokens"]
    searches = [
        f"{r['secret']} "
        + ", ".join(
            f"{r['search'][k]['among the 32 best']} {k}" for k in ("with gradients", "mutation only", "at random")
        )
        for r in result["rows"]
        if "search" in r
    ]
    found = f"The search for inputs found the trigger, of 3 runs each: {'; '.join(searches)}."
    return f"**Audit** (`{result['command']}`): {text}:\n\n" + table(head, rows) + f"\n\n{found}"


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
