"""The main job in one call: a model and data in, an executable compressed graph with its account out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unweave.ablation import Replacement
from unweave.capture import capture, load_tokenizer
from unweave.compression.allocation import Budgeter, compress
from unweave.compression.baselines import activation_svd, magnitude, plain_svd, wanda
from unweave.compression.masks import Masker
from unweave.compression.moments import ChannelMoments, channel_moments, survey
from unweave.compression.refinement import refine_factors
from unweave.data import TokenData, load_data
from unweave.errors import InputError
from unweave.evaluation import Faithfulness, evaluate
from unweave.graph import Graph
from unweave.intervals import Estimate
from unweave.pipeline.facts import annotations_of, report_data
from unweave.pipeline.provenance import provenance_of
from unweave.scope import Scope
from unweave.scoring import EdgeScores, calibrate
from unweave.statistics import collect_means
from unweave.storage import save_graph

__all__ = ["Decompiled", "data_for", "decompile", "default_scope"]

CURVE_SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True, eq=False)
class Decompiled:
    """What :func:`decompile` made.

    Attributes:
        graph: compressed, executable.
        original: the captured graph, exactly the model.
        scores: of the compressed graph's edges.
        faithfulness: by name, graphs and baselines against the model on held-out data.
        curve: by name, (size, divergence) with intervals: rate against distortion.
        report: everything a page or a table needs, as plain data.
    """

    graph: Graph
    original: Graph
    scores: EdgeScores
    faithfulness: Mapping[str, Faithfulness]
    curve: Mapping[str, list[tuple[float, Estimate]]]
    report: Mapping[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per method and size of the curve: method, size, kl_nats with its interval."""
        return [
            {"method": name, "size": size, **kl.columns("kl_nats")}
            for name, points in self.curve.items()
            for size, kl in points
        ]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the graph, its results and where the model was, as one folder."""
        return save_graph(self.graph, folder, results=self.report, overwrite=overwrite)


def decompile(
    model: str | Path | nn.Module,
    data: str | Path | TokenData | None = None,
    *,
    size: float | None = None,
    kl_nats: float | None = None,
    form: str = "low-rank",
    scope: Scope | None = None,
    tokenizer: Any = None,
    context: int = 128,
    sequences: int = 128,
    held_out: int = 64,
    refine_steps: int = 0,
    measure_top: int = 50,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Decompiled:
    """Decompile a model: capture, measure, compress, score, and compare with the model on held-out data.

    Args:
        model: see :func:`capture`.
        data: a file, hub data set or :class:`TokenData`; zoo models bring their own.
        size: share of the channels' numbers to keep; or
        kl_nats: nats per token to allow. By default kl_nats = 0.05.
        form: "low-rank" or "sparse", see :func:`compress`.
        sequences, held_out: how many sequences to calibrate on, and to test on (at most half of the data).
        refine_steps: KL training steps after the closed form; 0 for none.
        measure_top: how many of the largest edges are measured exactly.

    Returns:
        :class:`Decompiled`.

    Raises:
        InputError: no data, or both budgets.

    Cost:
        About a dozen passes over the calibration data, without refinement.

    Example:
        >>> import unweave
        >>> result = unweave.decompile("zoo:induction", size=0.7, sequences=32, held_out=16, measure_top=0)
        >>> result.graph.n_channel_parameters <= 0.7 * result.original.n_channel_parameters
        True
    """
    if size is not None and kl_nats is not None:
        raise InputError("give one budget: size= or kl_nats=")
    started = time.time()
    scope = scope or default_scope(model)
    original = capture(model)
    tokenizer = tokenizer if tokenizer is not None or isinstance(model, nn.Module) else load_tokenizer(model)
    everything = data_for(model, data, original, tokenizer, context, 4 * (sequences + held_out), progress)
    train, test = everything.split(held_out=min(0.5, held_out / max(len(everything), 1)), seed=seed)
    train, test = train.select(slice(0, sequences)), test.select(slice(0, held_out))
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    means = collect_means(original, train, **options)
    moments = channel_moments(original, train, scope, seed=seed, **options)
    budget: dict[str, Any] = {"size": size} if size is not None else {"kl_nats": kl_nats or 0.05}
    graph = compress(original, train, scope, moments=moments, form=form, **options, **budget)
    if refine_steps:
        graph = refine_factors(graph, original, train, scope, steps=refine_steps, seed=seed, **options)
    scores, graph_moments = _survey(graph, train, scope, measure_top, seed, options)
    share = graph.n_channel_parameters / original.n_channel_parameters
    rivals = _rivals(form, original, moments, share)
    faithfulness = evaluate({"decompiled graph": graph, **rivals}, original, test, scope, means=means, **options)
    curve = _curve(form, original, moments, test, scope, batch_size)
    graph = dataclasses.replace(
        graph, info={**graph.info, "model": str(model) if not isinstance(model, nn.Module) else ""}
    )
    report = report_data(
        graph, original, scores, faithfulness, curve, train, test, scope, tokenizer, rivals, graph_moments
    )
    report |= annotations_of(graph, train, test, graph_moments, report["edges"], scope, tokenizer, options)
    report["provenance"] = provenance_of(model, data, {"form": form, **budget}, refine_steps, seed, started)
    return Decompiled(graph, original, scores, faithfulness, curve, report)


def _survey(
    graph: Graph, data: TokenData, scope: Scope, measure_top: int, seed: int, options: Mapping[str, Any]
) -> tuple[EdgeScores, dict[int, ChannelMoments]]:
    """The compressed graph's own scores, the largest of them measured, and what its channels read and write."""
    means = collect_means(graph, data, **options)
    scores, moments = survey(graph, data, scope, means, seed=seed, **options)
    if measure_top:
        scores = calibrate(scores, data, scope, Replacement("mean", means), measure_top, **options)
    return scores, moments


def default_scope(model: str | Path | nn.Module) -> Scope:
    """Zoo rooms say which positions have an answer; elsewhere every position counts."""
    if str(model).startswith("zoo:"):
        return Scope(positions="answered", description="positions whose answer is determined")
    return Scope()


def data_for(
    model: Any, data: Any, graph: Graph, tokenizer: Any, context: int, limit: int, progress: bool | None
) -> TokenData:
    """The data that was given, or a room's own, no longer than the model reads."""
    if isinstance(data, TokenData):
        return data
    if data is None:
        if not str(model).startswith("zoo:"):
            raise InputError(
                "give data: a .txt, .jsonl, .npy or .safetensors file, a folder of them, or a hub data set"
            )
        data = model
    context = min(context, graph.info.get("n_ctx", context))
    vocabulary = graph.info.get("d_vocab")
    return load_data(data, tokenizer, context=context, limit=limit, vocabulary=vocabulary, progress=progress)


def _rivals(form: str, original: Graph, moments: Mapping[int, ChannelMoments], size: float) -> dict[str, Graph]:
    """The baselines of the same form and size."""
    if form == "sparse":
        return {"Wanda": wanda(original, size, moments), "magnitude": magnitude(original, size)}
    return {
        "activation-whitened SVD": activation_svd(original, size, moments),
        "plain SVD": plain_svd(original, size),
    }


def _curve(
    form: str, original: Graph, moments: Mapping[int, ChannelMoments], data: TokenData, scope: Scope, batch_size: int
) -> dict[str, list[tuple[float, Estimate]]]:
    """Held-out divergence at several sizes, ours (masks before their sweep) and the baselines', all in one pass."""
    budgeter = Masker(original, moments) if form == "sparse" else Budgeter(original, moments)
    graphs: dict[str, Graph] = {}
    for size in CURVE_SIZES:
        try:
            graphs[f"unweave/{size}"] = budgeter.at_size(size)
        except InputError:
            continue  # smaller than its biases alone: the curve ends here
        for name, rival in _rivals(form, original, moments, size).items():
            graphs[f"{name}/{size}"] = rival
    results = evaluate(
        graphs, original, data.select(slice(0, 32)), scope, batch_size=batch_size, n_worst=0, progress=False
    )
    curve: dict[str, list[tuple[float, Estimate]]] = {}
    for key, result in results.items():
        name, _, size_text = key.rpartition("/")
        if name:
            curve.setdefault(name, []).append((float(size_text), result.kl_nats))
    return curve
