"""What was found, as plain data for tables and pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unweave.annotations import driver_facts, page_kind, pair_facts, with_kernels
from unweave.compression.moments import ChannelMoments
from unweave.data import TokenData
from unweave.evaluation import Faithfulness
from unweave.graph import Graph
from unweave.intervals import Estimate
from unweave.report import MAX_EDGES
from unweave.scope import Scope, describe
from unweave.scoring import EdgeScores
from unweave.subspaces import favoured_tokens, node_subspaces, read_tokens

__all__ = ["annotations_of", "edge_facts", "node_facts", "report_data", "token_strings"]

DIRECTIONS_SHOWN = 6


def token_strings(tokenizer: Any, n: int) -> list[str]:
    """The text of every token id, for people; the id itself where there is no tokenizer."""
    if tokenizer is None:
        return [f"[{i}]" for i in range(n)]
    texts = [tokenizer.decode([i]) for i in range(n)]
    # decoding a sentencepiece token alone drops the space it begins with
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    spaced = [isinstance(piece, str) and piece.startswith("\u2581") for piece in pieces]
    return [
        " " + text if space and not text.startswith(" ") else text or f"[{i}]"
        for i, (text, space) in enumerate(zip(texts, spaced, strict=True))
    ]


def report_data(
    graph: Graph,
    original: Graph,
    scores: EdgeScores,
    faithfulness: Mapping[str, Faithfulness],
    curve: Mapping[str, list[tuple[float, Estimate]]],
    train: TokenData,
    test: TokenData,
    scope: Scope,
    tokenizer: Any,
    rivals: Mapping[str, Graph],
    moments: Mapping[int, ChannelMoments],
) -> dict[str, Any]:
    """Everything a page needs, as plain data."""
    sizes = {"decompiled graph": graph, "original": original, **rivals}
    n_in, n_out = original.info.get("d_vocab", 0), original.info["d_out"]
    tokens = token_strings(tokenizer, max(n_in, n_out)) if n_in else [f"[{i}]" for i in range(n_out)]
    return {
        "format": "unweave-report",
        "version": 1,
        "title": str(original.info.get("name", "graph")),
        "model": {**original.info, "n_parameters": original.n_parameters},
        "scope": {
            **describe(scope),
            "n_sequences_calibration": len(train),
            "n_tokens_calibration": train.n_tokens,
            "n_sequences_held_out": len(test),
            "n_tokens_held_out": faithfulness["original"].n_tokens,
        },
        "faithfulness": [_row(n, f, sizes.get(n), original) for n, f in faithfulness.items()],
        "worst_tokens": _worst(faithfulness["decompiled graph"], tokens),
        "rate_distortion": [_curve_row(name, points) for name, points in curve.items()],
        "nodes": _nodes(graph, scores, moments, tokens),
        "edges": edge_facts(graph, scores, scores.ranked()[:MAX_EDGES].tolist()),
    }


def annotations_of(
    graph: Graph,
    train: TokenData,
    test: TokenData,
    moments: Mapping[int, ChannelMoments],
    edges: list[dict[str, Any]],
    scope: Scope,
    tokenizer: Any,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What pages of single nodes show; the edges are told how their nats divide."""
    tokens = token_strings(tokenizer, max(graph.info.get("d_vocab") or 0, graph.info["d_out"]))
    for place, pairs in pair_facts(graph, moments, edges).items():
        edges[place]["pairs"] = pairs
    drivers = driver_facts(graph, train, test, moments, tokens, scope=scope, **options)
    return {} if drivers is None else {"drivers": drivers}


def _curve_row(name: str, points: list[tuple[float, Estimate]]) -> dict[str, Any]:
    rows = [{"size": size, "kl_nats": kl.value, "low": kl.low, "high": kl.high} for size, kl in points]
    return {"name": name, "baseline": name != "unweave", "points": rows}


def _row(name: str, f: Faithfulness, graph: Graph | None, original: Graph) -> dict[str, Any]:
    context = int(original.info.get("n_ctx", 1))
    row = {
        "name": name,
        "baseline": name not in ("decompiled graph", "original"),
        "kl_nats": f.kl_nats._asdict(),
        "loss_nats": f.loss_nats._asdict(),
        "top1_agreement": f.top1_agreement._asdict(),
        "loss_recovered": f.loss_recovered._asdict(),
        "kl_p99": f.kl_p99,
        "kl_p999": f.kl_p999,
        "kl_max": f.kl_max,
    }
    if graph is not None:
        row |= {
            "size": graph.n_channel_parameters / original.n_channel_parameters,
            "n_parameters": graph.n_parameters,
            "flops_per_token": graph.flops_per_token(min(context, 128)),
            "size_bits": graph.size_bits,
        }
    return row


def _worst(f: Faithfulness, tokens: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "kl_nats": nats,
            "context": "".join(tokens[i] for i in context[:-1]),
            "token": tokens[context[-1]],
            "model_prediction": tokens[a],
            "graph_prediction": tokens[b],
        }
        for nats, _, _, context, a, b in f.worst
    ]


def node_facts(graph: Graph, scores: EdgeScores, node: str) -> dict[str, Any]:
    """What a report's row says of any node."""
    stage, _ = graph.find(node)
    at = graph.writers.index(node) if stage.write is not None else None
    return {
        "name": node,
        "kind": page_kind(stage),
        "layer": stage.layer,
        "ports": [port.name for port in stage.ports],
        "score_nats": None if at is None else float(scores.node_nats[at]),
        "score_se": None if at is None else float(scores.node_se[at]),
    }


def _nodes(
    graph: Graph, scores: EdgeScores, moments: Mapping[int, ChannelMoments], tokens: list[str]
) -> list[dict[str, Any]]:
    subspaces = node_subspaces(graph, moments)
    rows = []
    for stage in graph.stages:
        for name in stage.nodes:
            row = node_facts(graph, scores, name) | {"spectra": {}, "ranks": {}, "writes": [], "reads": []}
            if len(stage.nodes) == 1:  # heads share matrices: their numbers cannot be told apart
                row["n_parameters"] = stage.n_parameters
            for key, space in subspaces.get(name, {}).items():
                row["ranks"][key] = space.rank
                row["spectra"][key] = [round(float(v), 8) for v in space.nats[:64]]
                _describe_directions(graph, row, key, space, tokens)
            rows.append(row)
    return rows


def _describe_directions(graph: Graph, row: dict[str, Any], key: str, space: Any, tokens: list[str]) -> None:
    """The tokens that the leading directions promote, or are read from."""
    one_stream = all(s.visible[0] == 0 for s in graph.stages)
    if not one_stream or not hasattr(graph.stages[0].core, "table"):
        return
    for k in range(min(DIRECTIONS_SHOWN, len(space.nats))):
        nats, direction = float(space.nats[k]), space.directions[k]
        if key == "write":
            up, down = favoured_tokens(graph, direction)
            entry = {"promotes": _named(up, tokens), "suppresses": _named(down, tokens)}
            row["writes"].append({"dimension": k, "nats": nats, **entry})
        else:
            read: dict[str, Any] = {"port": key.removeprefix("read."), "dimension": k, "nats": nats}
            row["reads"].append({**read, "tokens": _named(read_tokens(graph, direction), tokens)})


def _named(pairs: list[tuple[int, float]], tokens: list[str]) -> list[list[Any]]:
    return [[tokens[i], round(v, 4)] for i, v in pairs]


def edge_facts(graph: Graph, scores: EdgeScores, pairs: Iterable[Sequence[int]]) -> list[dict[str, Any]]:
    """The rows of a report for some edges, given as (port, writer)."""
    node_at = {name: i for i, name in enumerate(graph.nodes)}
    split = [port.rsplit(".", 1) for port in graph.ports]
    rows = [
        {
            "src": node_at[graph.writers[i]],
            "dst": node_at[split[j][0]],
            "port": split[j][1],
            "nats": float(scores.nats[j, i]),
            "se": float(scores.se[j, i]),
            "measured": bool(scores.measured[j, i]),
        }
        for j, i in pairs
    ]
    return with_kernels(graph, rows)
