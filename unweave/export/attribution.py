"""Attribution graphs in the JSON of circuit-tracer and Neuronpedia, which their pages show.

Heads are shown as attention features ("lorsa"), MLPs as transcoder features, modules as supernodes. A link carries
the sum over the ports of its reader. Without values per position, the prompt is one pseudo token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave import __version__
from unweave.errors import InputError, ShapeError, UnknownNameError
from unweave.export.grid import Scores, score_matrix
from unweave.files import write_json
from unweave.graph import Graph
from unweave.scoring import EdgeScores

__all__ = ["MAX_LINKS", "Prompt", "to_attribution_graph"]

MAX_LINKS = 50_000
PSEUDO_TOKEN = "(any token)"
FEATURE_TYPES = {"embed": "embedding", "attn": "lorsa", "mlp": "cross layer transcoder", "unembed": "logit"}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt and what every edge was worth in it.

    Attributes:
        tokens: the strings of its tokens.
        values: ``[pos ports writers]``, by the position at which the edge is read; or ``[to from ports writers]``, by
            the position the reading node writes to and the one it reads from, which shows what heads carry along.
        frozen: what was held when they were made, see :func:`unweave.score_edges`; "" where that is not known.
    """

    tokens: Sequence[str]
    values: Float[Tensor, "pos ports writers"] | Float[Tensor, "to from ports writers"]
    frozen: str = ""


def to_attribution_graph(
    graph: Graph,
    path: str | Path,
    scores: Scores | Prompt,
    *,
    slug: str = "unweave",
    labels: Mapping[str, str] | None = None,
    description: str = "",
    max_links: int = MAX_LINKS,
) -> Path:
    """Write the edges of a graph as an attribution graph.

    Args:
        graph: any graph; its modules become supernodes.
        path: the file to write, ``{slug}.json`` by convention.
        scores: of the edges, for all positions together, or a :class:`Prompt`. Edges that are cut or have no score
            get no link.
        slug: the graph's name on the page.
        labels: what nodes are called there, by name; their names otherwise.
        description: for people; how the scores were made and what was frozen is added to it.
        max_links: only the strongest so many are kept; at most 50,000, with which pages stay usable.

    Returns:
        The path.

    Raises:
        InputError: a nonsensical number of links, or an infinite value.
        ShapeError: the values are not of this graph, or not one per token.
        UnknownNameError: a label for a node that is not there.
        StorageError: it could not be written.

    Cost:
        About 70 bytes per link.

    Exact?
        The links are the scores, summed over ports. ``influence`` is the share of all the links' absolute weight that
        falls on a node and on those with more, which is how the page's slider prunes.

    Example:
        >>> import tempfile, unweave
        >>> graph = unweave.capture("zoo:induction")
        >>> scores = unweave.score_edges(graph, unweave.load_data("zoo:induction", limit=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_attribution_graph(graph, folder + "/induction.json", scores, slug="induction").name
        'induction.json'

    Source:
        Ameisen et al. 2025, "Circuit Tracing".
    """
    if not 1 <= max_links <= MAX_LINKS:
        raise InputError(f"max_links must be between 1 and {MAX_LINKS}, got {max_links}")
    for name in labels or {}:
        if name not in graph.where:
            raise UnknownNameError("node", name, graph.nodes)
    prompt = scores if isinstance(scores, Prompt) else Prompt([PSEUDO_TOKEN], score_matrix(graph, scores)[None])
    values = _check_values(graph, prompt)
    ids, links = _Ids(graph, len(prompt.tokens)), _strongest(_by_node(graph, values), max_links)
    used = sorted({place for row in links for place in row[:2]})
    data = {
        "metadata": {
            "slug": slug,
            "scan": str(graph.info.get("name", "graph")),
            "prompt_tokens": list(prompt.tokens),
            "prompt": "".join(prompt.tokens),
            "schema_version": 1,
            "info": {
                "description": _described(description, scores),
                "generator": {"name": "unweave", "version": __version__},
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": _supernodes(graph, ids, used),
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": _nodes(graph, ids, used, _influences(links), labels or {}),
        "links": [{"source": ids.of(i), "target": ids.of(j), "weight": weight} for i, j, weight in links],
    }
    write_json(path, data)
    return Path(path)


def _described(description: str, scores: Scores | Prompt) -> str:
    """The description with what is known of the scores: the format has no other place for it."""
    frozen = "" if isinstance(scores, Tensor) else scores.frozen
    known = {"method": scores.method if isinstance(scores, EdgeScores) else "", "frozen": frozen}
    return "; ".join([*filter(None, [description]), *(f"{k}: {v}" for k, v in known.items() if v)])


Place = tuple[int, int]  # position, place of the node in graph.nodes
Link = tuple[Place, Place, float]


def _check_values(graph: Graph, prompt: Prompt) -> Float[Tensor, "to from ports writers"]:
    values, n = prompt.values.detach().cpu().double(), len(prompt.tokens)
    if values.shape not in ((n, *graph.edge_matrix.shape), (n, n, *graph.edge_matrix.shape)):
        got = f"{tuple(values.shape)} for {n} tokens"
        raise ShapeError(f"values must be [pos ports writers] or [to from ports writers] of this graph, got {got}")
    if bool(values.isinf().any()):
        raise InputError("an attribution is infinite")
    values = values.masked_fill(~graph.edge_matrix, 0.0).nan_to_num()
    return values if values.ndim == 4 else torch.diag_embed(values.permute(1, 2, 0)).permute(2, 3, 0, 1)


def _by_node(graph: Graph, values: Float[Tensor, "to from ports writers"]) -> Float[Tensor, "to from readers writers"]:
    """Summed over the ports of each reading node."""
    reader = torch.tensor([graph.nodes.index(port.rpartition(".")[0]) for port in graph.ports])
    out = values.new_zeros(*values.shape[:2], len(graph.nodes), values.shape[3])
    return out.index_add_(2, reader, values)


def _strongest(weights: Float[Tensor, "to from readers writers"], k: int) -> list[Link]:
    """The k largest by absolute value, zeros left out, as (from, to, weight)."""
    flat = weights.flatten()
    order = flat.abs().argsort(descending=True, stable=True)[:k]
    order = order[flat[order] != 0]
    to, at, reader, writer = (x.tolist() for x in torch.unravel_index(order, weights.shape))
    return [
        ((s, i), (t, j), weight)
        for t, s, j, i, weight in zip(to, at, reader, writer, flat[order].tolist(), strict=True)
    ]


def _influences(links: Sequence[Link]) -> dict[Place, float]:
    """For each node, the share of the weight on it and on all nodes with more: small is important."""
    weight: dict[Place, float] = {}
    for source, target, value in links:
        for place in (source, target):
            weight[place] = weight.get(place, 0.0) + abs(value)
    total, so_far, out = math.fsum(weight.values()), 0.0, {}
    for place in sorted(weight, key=lambda p: (-weight[p], p)):
        so_far += weight[place]
        out[place] = min(so_far / total, 1.0)
    return out


class _Ids:
    """Unique ids ``LAYER_NUMBER_POSITION``, circuit-tracer's form: the number counts the nodes of a layer."""

    def __init__(self, graph: Graph, n_pos: int) -> None:
        self.layers, self.numbers, seen = list[str](), list[int](), dict[str, int]()
        depth = 1 + max(stage.layer for stage in graph.stages)
        for stage in graph.stages:
            layer = {"embed": "E", "unembed": str(depth + 1)}.get(stage.kind, str(stage.layer))
            for _ in stage.nodes:
                self.layers.append(layer)
                self.numbers.append(seen.setdefault(layer, 0))
                seen[layer] += 1

    def of(self, place: Place) -> str:
        pos, node = place
        return f"{self.layers[node]}_{self.numbers[node]}_{pos}"

    def feature(self, node: int) -> int | None:
        """The Cantor number of a channel's (layer, number)."""
        if not self.layers[node].isdigit():
            return None
        layer, number = int(self.layers[node]), self.numbers[node]
        return (layer + number) * (layer + number + 1) // 2 + number


def _supernodes(graph: Graph, ids: _Ids, used: Sequence[Place]) -> list[list[str]]:
    """[label, node ids...] of every module with a node that is shown."""
    groups: dict[str, list[str]] = {}
    for place in used:
        node = graph.nodes[place[1]]
        if node in graph.modules:
            groups.setdefault(graph.modules[node], []).append(ids.of(place))
    return [[label, *members] for label, members in groups.items()]


def _nodes(
    graph: Graph,
    ids: _Ids,
    used: Sequence[Place],
    influences: Mapping[Place, float],
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    rows = []
    for place in used:
        pos, i = place
        name = graph.nodes[i]
        stage = graph.find(name)[0]
        label = labels.get(name, name)
        row = {
            "node_id": ids.of(place),
            "feature": ids.feature(i) if stage.kind in ("attn", "mlp") else None,
            "layer": ids.layers[i],
            "ctx_idx": pos,
            "feature_type": FEATURE_TYPES.get(stage.kind, "unexplored node"),
            "jsNodeId": f"{ids.layers[i]}_{ids.numbers[i]}-{pos}",
            "clerp": label,
            "influence": influences[place],
        }
        if stage.kind == "unembed":
            row |= {"clerp": f'Output "{label}" (p=1.000)', "token_prob": 1.0, "is_target_logit": True}
        rows.append(row)
    return rows
