"""Write the README's results from benchmarks/results: ``python -m benchmarks.table``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
README = ROOT.parent / "README.md"
# forms that keep single weights; all others keep narrow channels
SPARSE = ("unweave, sparse", "SparseGPT-like", "Wanda", "magnitude")
# circuits: rows that say the same as others of the table, and a task on which all rankings tie
HIDDEN = (
    "mask-gradient (their code)",
    "mask-gradient-IG (their code)",
    "EAP",
    "EAP-IG-inputs (their code)",
    "induction",
)
BEGIN = "<!-- benchmarks: begin (generated from benchmarks/results; do not edit) -->"
END = "<!-- benchmarks: end -->"


def load(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def edges() -> str:
    result = load("edges")
    if result is None:
        return ""
    rows = [
        [r["method"], f"{r['spearman']:.3f}", f"{r['pearson']:.2f}", f"{r['top50']:.0%}", f"{r['time_ratio']:.2g}x"]
        for r in result["rows"]
    ]
    text = f"All {result['edges']:,} edges of {result['model']} against the measured effect of ablating each alone"
    return (
        f"**Edges.** {text} (`{result['command']}`); time against one forward + backward pass of the model:\n\n"
        + table(["scores", "Spearman", "Pearson", "top 50 found", "time"], rows)
    )


def compression(name: str) -> str:
    result = load(f"compression-{name}")
    if result is None:
        return ""
    sizes = sorted({r["size"] for r in result["rows"]}, reverse=True)
    names = dict.fromkeys(r["method"] for r in result["rows"])
    methods = sorted(names, key=lambda name: (name in SPARSE, not name.startswith("unweave")))
    cells = {(r["method"], r["size"]): r for r in result["rows"]}
    rows = []
    for method in methods:
        row = [f"**{method}**" if method.startswith("unweave") else method]
        for key in ("kl_nats", "kl_nats_refined"):
            row += [f"{cells[method, s][key][0]:.3f}" if key in cells.get((method, s), {}) else "–" for s in sizes]
        rows.append(row)
    head = ["method", *(f"{s:.0%}" for s in sizes), *(f"{s:.0%}, refined" for s in sizes)]
    text = "held-out KL in nats per token at a share of the channels' numbers, without training and after the same 200"
    text += " steps; the last four keep single weights (– = not run yet)"
    return f"**Compression of {name}** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def scope() -> str:
    result = load("scope")
    if result is None:
        return ""
    rows = [
        [
            r["model"],
            r["scope"],
            f"{r['size']:.1%}",
            f"{r['kl_nats_held_out'][0]:.4f} ({r['kl_nats_held_out'][1]:.4f}–{r['kl_nats_held_out'][2]:.4f})",
        ]
        for r in result["rows"]
    ]
    text = f"the share of the channels' numbers needed for {result['target']} nats on calibration data"
    head = ["model", "explained", "size", "held-out nats"]
    return f"**Scope** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def speed() -> str:
    result = load("speed")
    if result is None:
        return ""
    rows = []
    for name, ratios in result["forward_ratio"].items():
        rows += [[f"{name}, {what}: forward pass", f"{ratio:.2f}x the model's"] for what, ratio in ratios.items()]
        for n, ratio in result["pipeline_ratio"][name].items():
            what = f"{name}: capture, means, scores, moments and compression of {n} sequences"
            rows.append([what, f"{ratio:.2f}x one forward + backward over them"])
    memory = ", ".join(f"{mb:.0f} MB at {n}" for n, mb in result["peak_mb"].items())
    rows.append(["peak memory against sequences (stories260K)", memory])
    return f"**Speed** (`{result['command']}`):\n\n" + table(["what", "measured"], rows)


def circuits() -> str:
    result = load("circuits")
    if result is None:
        return ""
    shares = list(result["rows"][0]["faithfulness"])
    rows = []
    for r in result["rows"]:
        if r["method"] in HIDDEN or r["task"] in HIDDEN:
            continue
        method = f"**{r['method']}**" if r["method"].startswith("unweave") else r["method"]
        f = [f"{r['faithfulness'][share]:.2f}" for share in shares]
        rows.append([r["task"], method, f"{r['cpr']:.3f}", f"{r['cmd']:.3f}", *f, f"{r['time_ratio']:.2g}x"])
    head = ["task", "edges chosen by", "CPR", "CMD", *(f"f at {float(s):.0%}" for s in shares), "time"]
    text = (
        "faithfulness f of the logit difference on held-out prompts, counterfactual ablation, one evaluator; time as a"
    )
    text += " ratio to our EAP-IG, which gives what its authors' code gives. On the zoo's induction model all rankings"
    text += " but edge pruning's tie"
    return f"**Circuits** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def subspaces() -> str:
    result = load("subspaces")
    if result is None:
        return ""
    cells = {(r["task"], r["target"], r["method"]): r for r in result["rows"]}
    methods = list(dict.fromkeys(r["method"] for r in result["rows"]))
    rows = []
    for task, target in dict.fromkeys((r["task"], r["target"]) for r in result["rows"]):
        row = [task, f"{target:.2f}"]
        for method in methods:
            r = cells[task, target, method]
            held_out = r["faithfulness_held_out"]["value"]
            row.append(f"{r['numbers']:,} ({r['dimensions']}), {held_out:.2f}")
        rows.append(row)
    text = "numbers in the virtual weights of a circuit (dimensions that its edges carry), and its faithfulness on"
    text += " held-out prompts, at equal faithfulness on the prompts it was found on"
    head = ["task", "faithfulness", *methods]
    return f"**Narrow edges** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def tracr() -> str:
    result = load("tracr")
    if result is None:
        return ""
    rows = result["rows"]
    models = list(dict.fromkeys(r["model"] for r in rows))
    by = {a: [r for r in rows if r["ablation"] == a] for a in dict.fromkeys(r["ablation"] for r in rows)}
    untrue = sum(r["felt_but_untrue"] + r["kept_but_untrue"] for r in rows)
    text = (
        f"{len(models)} compiled programs ({', '.join(models)}), three ablations: {untrue} edges that the compiler did"
    )
    text += (
        " not make have an effect or are in a found circuit; the circuit is the true edges less those without effect"
    )
    shares = [f"{sum(not r['lacking_with_effect'] for r in found)} with {a}" for a, found in by.items()]
    rest = "where it is smaller, one of several edges that can stand in for each other was left out."
    return f"**Known circuits** (`{result['command']}`): {text} in {', '.join(shares)} ablation; {rest}"


def exactness() -> str:
    result = load("exactness")
    if result is None:
        return ""
    worst = {}
    for row in result["rows"]:
        share = row["largest"] / row["largest_logit"]
        if share >= worst.get(row["dtype"], (-1.0,))[0]:
            worst[row["dtype"]] = (share, row)
    text = "; ".join(
        f"{dtype}: at most {row['largest']:.1e} in a logit of up to {row['largest_logit']:.1f} ({row['model']})"
        for dtype, (_, row) in worst.items()
    )
    n = len({row["model"] for row in result["rows"]})
    head = f"**Exactness** (`{result['command']}`): {n} models of 9 families and their options, graph against model."
    return f"{head} {text}."


def render() -> str:
    parts = [edges(), compression("pylm"), compression("stories260K"), circuits(), subspaces(), tracr()]
    parts += [scope(), speed(), exactness()]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
