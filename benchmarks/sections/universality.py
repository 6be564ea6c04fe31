"""Nodes of networks of other seeds and sizes matched: against truth, by stitching, by edges."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.markdown import interval, load, table

OURS = "behaviour"
# figure -> what it is
FIGURES = {
    "right": "share of nodes with a known role that are matched with a node of that role",
    "lost": "nats lost with each node replaced by its match through linear maps fitted on other data (stitching), over"
    " nats lost with the nodes at their means; 0 is as good as the node itself",
    "edges": "rank correlation of matched edges' nats, less that of matchings permuted within kinds",
}


def universality() -> str:
    result = load("universality")
    if result is None:
        return ""
    rooms = result["rooms"]
    parts = [_figure(rooms, figure, what) for figure, what in FIGURES.items()]
    text = "every two networks of a room matched node by node; intervals over seeds, which pairs share: with so few"
    text += " networks they are too narrow"
    networks = [
        [
            name,
            str(len(room["networks"])),
            f"{min(n['accuracy'] for n in room['networks']):.3f}",
            str(len(room["rows"][OURS]["edges"]["pairs"])),
            _copies(room["in_other_coordinates"][OURS]),
        ]
        for name, room in rooms.items()
    ]
    head = ["room", "networks", "least accuracy", "pairs", "found again when rotated and permuted"]
    return (
        f"**Universality** (`{result['command']}`): {text}:\n\n" + table(head, networks) + "\n\n" + "\n\n".join(parts)
    )


def _copies(found: dict[str, Any]) -> str:
    right = found["of"] - found["wrong"] - found["ties"]
    ties = f" ({found['ties']} beside one as alike)" if found["ties"] else ""
    return f"{right} of {found['of']}{ties}"


def _figure(rooms: dict[str, Any], figure: str, what: str) -> str:
    shown = {name: room for name, room in rooms.items() if room["rows"][OURS].get(figure)}
    ways = list(dict.fromkeys(way for room in shown.values() for way, row in room["rows"].items() if row.get(figure)))
    rows = []
    for way in ways:
        cells = [room["rows"].get(way, {}).get(figure) for room in shown.values()]
        texts = ["–" if cell is None else interval(cell, 2) for cell in cells]
        rows.append([f"**{way}**" if way == OURS else way, *texts])
    return f"{what[0].upper()}{what[1:]}:\n\n" + table(["matched by", *shown], rows)
