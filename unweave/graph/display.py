"""A graph in a notebook: a compact table that needs no style sheet, no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from unweave.graph.parts import Stage

__all__ = ["summary_html"]

HEADS = ("stage", "nodes", "parameters", "hears")
LEFT, RIGHT = "text-align:left", "text-align:right"


def summary_html(
    title: str, stages: Sequence[Stage], names: Sequence[str], ports: Sequence[Sequence[tuple[str, int, int]]]
) -> str:
    """A table of stages as HTML; every name is escaped.

    Args:
        title: one line above the table.
        names: of the stages.
        ports: by stage, (name, edges, possible edges) of each port.
    """
    rows = []
    for stage, name, heard in zip(stages, names, ports, strict=True):
        hears = ", ".join(f"{port} {kept:,}" + (f" of {all_:,}" if kept < all_ else "") for port, kept, all_ in heard)
        sizes = [f"{len(stage.nodes):,}", f"{stage.n_parameters:,}"]
        rows.append(_row("td", [name, *sizes, f"{hears} edges" if hears else ""]))
    head = _row("th", HEADS)
    return f"<div><p><b>{escape(title)}</b></p><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    styles = (LEFT, RIGHT, RIGHT, LEFT)
    pairs = zip(styles, cells, strict=True)
    return "<tr>" + "".join(f'<{tag} style="{style}">{escape(cell)}</{tag}>' for style, cell in pairs) + "</tr>"
