"""Exactness and speed."""

from __future__ import annotations

from benchmarks.sections.markdown import interval, load, table


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


def convolutional() -> str:
    result = load("convolutional")
    if result is None:
        return ""
    exact, circuits = result["exactness"], result["circuits"]
    worst = max(row["largest"] for row in exact)
    ways = [way for way in next(iter(result["times"].values())) if way != "edges"]
    times = [[name, f"{t['edges']:,}", *(f"{t[way]:.1f}x" for way in ways)] for name, t in result["times"].items()]
    found = [
        [
            str(r["seed"]),
            f"{r['accuracy']:.2f}",
            f"{r['kept']} of {r['edges']}",
            interval(r["faithfulness"], 2),
            *(f"{nats[0]:.2f}" for nats in r["kl_nats"].values()),
            f"{r['spearman_fisher_exact']:.2f}; {r['spearman_kernel_norm_exact']:.2f}",
        ]
        for r in circuits
    ]
    head = ["seed", "accuracy", "kernels kept", "faithfulness", *(f"nats, {name}" for name in circuits[0]["kl_nats"])]
    first = f"{len(exact)} residual, grouped and depthwise networks are captured with logits within {worst:.0e}."
    second = "Circuits of a small residual network trained here, on fresh images (target 0.9), and rank correlation of"
    return (
        f"**Convolutional networks** (`{result['command']}`): {first} Processor time over the model's own forward pass:"
        f"\n\n{table(['network', 'edges', *ways], times)}\n\n{second} edge scores with exact effects (ours; kernels'"
        f" norms):\n\n{table([*head, 'Spearman'], found)}"
    )
