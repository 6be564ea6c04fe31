"""Dictionaries: on data whose features are known, and on a language model beside bases."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.markdown import interval, load, table

CUTS = ("half of the edges", "500 edges")


def synthetic() -> str:
    result = load("dictionaries")
    if result is None:
        return ""
    settings = result["settings"]
    rows = [
        [
            name,
            interval([r["mmcs"], r["low"], r["high"]]),
            f"{r['dead']:.0%}" if "dead" in r else "–",
            f"{r['l0']:.1f}" if "l0" in r else "–",
        ]
        for name, r in result["results"]["synthetic"]["rows"].items()
    ]
    text = (
        f"mean max cosine with the {settings['features']} true sparse features in {settings['dimensions']} dimensions,"
    )
    text += f" {settings['active']} active at a time"
    head = ["dictionary", "mean max cosine", "dead", "active"]
    return f"**Dictionaries on known features** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def language_model() -> str:
    result = load("dictionaries-stories260K")
    if result is None:
        return ""
    rows = []
    for place, found in result["results"].items():
        for name, r in found["rows"].items():
            words = r.get("descriptions", {}).get("score")
            rows.append(
                [
                    place,
                    name,
                    interval(r["loss_recovered"]),
                    f"{r['l0']:.0f} of {r['n_latents']}",
                    f"{r['dead']:.0%}",
                    f"{r['hoyer']:.2f}",
                    f"{r['kurtosis']:.1f}",
                    "–" if words is None else f"{words['mean']:.2f}",
                ]
            )
    text = "the loss recovered when the reconstruction stands in for what an MLP of stories260K writes (1 is all, 0 its"
    text += (
        " mean), active latents, dead ones, sparsity, kurtosis over tokens, and how well descriptions by rule predict"
    )
    text += " latents on held-out text; random columns are the baseline for dictionaries"
    head = ["place", "basis or dictionary", "loss recovered", "active", "dead", "Hoyer", "kurtosis", "described"]
    return f"**Dictionaries of stories260K** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def circuits() -> str:
    result = load("feature_circuits")
    if result is None:
        return ""
    rows = [
        [
            level,
            f"{found['kept']:,} of {found['edges']:,}",
            interval(found["faithfulness"]["circuit"]),
            interval(found["faithfulness"]["circuit without errors"]),
        ]
        for level in ("nodes", "features")
        for found in (result[level],)
    ]
    text = f"the task {result['task']} of stories260K, the same search over nodes and over groups of latents with error"
    text += " nodes; faithfulness on held-out prompts"
    head = ["graph", "edges", "faithfulness", "without error nodes"]
    return f"**Circuits over features** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def single_latents() -> str:
    result = load("feature_circuits")
    if result is None or "speed" not in result:
        return ""
    rows = [
        [n, f"{found['edges']:,}", *(f"{found[name]['ratio']:.1f}x" for name in ("scores", *CUTS))]
        for n, found in result["speed"].items()
    ]
    text = "one MLP of stories260K, every latent a node of its own: how many times longer it takes to compute the whole"
    text += " layer for each node than its latents alone (processor time, the same results up to rounding)"
    head = ["latents", "edges", "scores of all edges", *(f"a graph of {name}" for name in CUTS)]
    return f"**Single latents** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def probes() -> str:
    """What the trained network and the untrained one hold; only rows with a code are shown with one."""
    result = load("probes")
    if result is None or "logistic" not in result["when"][0]:
        return ""
    steps = sorted({row["step"] for row in result["when"]})
    figures = ("score", "control", "logistic", "logistic_control", "compression", "control_compression")

    def cell(row: dict[str, Any], figure: str) -> str:
        # numbers have no code, and no logistic probe
        there = figure in row and ("compression" in row or figure in figures[:2])
        return f"{row[figure][0]:.2f}" if there else "–"

    rows = [
        [row["concept"], str(row["step"]), row["place"], *(cell(row, figure) for figure in figures)]
        for row in result["when"]
        if row["step"] in (steps[0], steps[-1])
    ]
    text = f"zoo:brackets trained {result['seeds']} times; before training and after it, by place: accuracy (R² of"
    text += (
        " numbers) of probes in closed form and of logistic ones, each beside a control task with labels by token at"
    )
    text += " position, and how much shorter than a uniform code the labels are sent (online code)"
    head = ["concept", "step", "place", "score", "control", "logistic", "control", "compression", "control"]
    return f"**Probes** (`{result['command']}`): {text}:\n\n" + table(head, rows)


def latents() -> str:
    result = load("dictionaries-stories260K")
    if result is None:
        return ""
    bases = [
        [place, f"{p['kurtosis']:.2f}", f"{p['rotated_mean']:.2f} ± {p['rotated_std']:.2f}", f"{p['z']:.1f}"]
        for found in result["results"].values()
        for place, p in found["privilege"].items()
    ]
    words = [
        [place, kind, str(latent["latent"]), latent["text"].replace("|", "\\|"), f"{latent['score']:.2f}"]
        for place, found in result["results"].items()
        for kind in ("best", "random")
        for latent in found["latents"][kind][:10]
    ]
    text = "excess kurtosis of coordinates against random rotations: hidden neurons are a basis of their own, the"
    text += " coordinates of what an MLP writes hardly"
    return (
        f"**Privileged bases** (`{result['command']}`): {text}:\n\n"
        + table(["coordinates of", "kurtosis", "rotated", "z"], bases)
        + f"\n\n**Latents in words** (`{result['command']}`): of {result['settings']['shown']}, the ten that score best"
        + " and ten at random; R² on held-out text that did not choose them:\n\n"
        + table(["place", "which", "latent", "description", "R²"], words)
    )
