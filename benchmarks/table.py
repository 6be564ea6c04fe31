"""Write docs/results.md, and the README's summary of it, from benchmarks/results: ``python -m benchmarks.table``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.sections import (
    compression,
    drivers,
    edges,
    falsification,
    features,
    machine,
    modules,
    retrodictions,
    summary,
    universality,
)

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- benchmarks: begin (generated from benchmarks/results; do not edit) -->"
END = "<!-- benchmarks: end -->"
INTRODUCTION = """# Results

Every table is written by `python -m benchmarks.table` from a file in `benchmarks/results/`; the command beside it makes
that file again. Intervals are 95%, over held-out sequences unless said. Times are ratios measured in the same run."""

# title -> what it shows, in this order
SECTIONS: dict[str, list[Callable[[], str]]] = {
    "Edges and circuits": [edges.edges, edges.circuits, edges.subspaces, edges.tracr],
    "Compression": [
        lambda: compression.compression("pylm"),
        lambda: compression.compression("stories260K"),
        compression.scope,
    ],
    "Modules": [modules.modules, modules.regulariser, modules.coarsening],
    "Which parts serve which data": [drivers.usage, drivers.kinds, drivers.descriptions],
    "Features": [
        features.synthetic,
        features.language_model,
        features.latents,
        features.circuits,
        features.single_latents,
        features.probes,
    ],
    "The same in other networks": [universality.universality],
    "Falsification": [falsification.edits, falsification.audit, falsification.triggers, falsification.certificates],
    "What is known, again": [retrodictions.retrodictions],
    "The machine": [machine.exactness, machine.convolutional, machine.speed],
}


def render() -> str:
    """The whole page."""
    pages = [INTRODUCTION]
    for title, sections in SECTIONS.items():
        found = [text for text in (section() for section in sections) if text]
        pages += [f"## {title}", *found] if found else []
    return "\n\n".join(pages) + "\n"


def main() -> None:
    (ROOT / "docs/results.md").write_text(render())
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{summary.summary()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
