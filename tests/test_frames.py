"""Every result class with a table, found by introspection, as a DataFrame: columns, units, types, rows and numbers."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import unweave
from unweave.audit import audit, search_inputs, search_triggers
from unweave.circuits import faithfulness_curve
from unweave.coarsening import lattice
from unweave.coarsening.needs import Need, Needs
from unweave.dissection import Prediction
from unweave.drivers.descriptions import Description, Descriptions
from unweave.drivers.directions import Directions
from unweave.drivers.examples import Examples, Picked
from unweave.drivers.holding import HeldEffect
from unweave.errors import InputError, UnknownNameError
from unweave.evaluation import Faithfulness
from unweave.falsification import EditTable, PredictionRow, Scrubbed, Validation
from unweave.falsification.discarding import DiscardCost
from unweave.features.comparison import FeatureRow
from unweave.features.surveying import FeatureSurvey
from unweave.frames import to_frame
from unweave.hypotheses.alignment import Location
from unweave.hypotheses.interchange import Accuracy, Interchange
from unweave.hypotheses.search import AlignmentSearch, Candidate
from unweave.intervals import Estimate
from unweave.modules import centralisation
from unweave.modules.ablating import Ablated, ModuleEffects
from unweave.modules.centrality import AgainstNull
from unweave.modules.communication import Communication
from unweave.modules.components import SharedSubspace, SharedSubspaces
from unweave.modules.interfaces import Interface, Interfaces
from unweave.modules.participation import Reuse
from unweave.modules.replacing import ReplacementLoss
from unweave.modules.swapping import Swapped, Swaps
from unweave.paths import composition, path_effect
from unweave.pipeline import Decompiled
from unweave.probes.fitting import LinearProbe
from unweave.probes.tables import ProbeRow, ProbeTable
from unweave.sampling import record_usage, types_by_label
from unweave.subspaces import Subspace
from unweave.universality.matching import Matching, NodePair
from unweave.universality.stitching import StitchLoss

MLP, HEAD = "blocks.0.mlp", "blocks.1.attn.head.1"
SCOPE = unweave.Scope(positions="answered")
HALF, THIRD, NONE = Estimate(0.5, 0.25, 0.75), Estimate(0.3, 0.2, 0.4), Estimate(math.nan, math.nan, math.nan)
ROW = Faithfulness(HALF, THIRD, HALF, NONE, 0.1, 0.2, 0.9, (), 3, 30)
ACCURACY = Accuracy(HALF, THIRD, HALF, 5, 6)

# a float column is in nats or bits and says so, or has no unit: what these words stand for
UNITS = ("nats", "bits")
PLAIN = {
    *("accuracy", "agreement", "auroc", "betweenness", "correlation", "faithfulness", "iia", "loss_recovered"),
    *("modularity", "n_cut", "p", "percentile", "interaction_percentile", "participation", "r2", "score", "null"),
    *("null_sd", "null_95", "random", "random_auroc", "random_score", "share", "sign", "size", "slope", "stability"),
    *("top_token", "top1_agreement", "unchanged", "weight", "z", "elsewhere", "mislabelled", "random_network"),
    *(
        "baseline",
        "control",
        "selectivity",
        "gain",
        "similarity",
        "margin",
        "kl_recovered",
        "variance_explained",
        "l0",
        "dead",
        "hoyer",
        "kurtosis",
    ),
    *("numbers_share", "quantile", "dimensions", "effective_readers", "effective_writers", "value"),
}


def result_classes() -> dict[str, type]:
    """Every public class of the package with a method ``table`` that gives plain rows."""
    found = {}
    for module in pkgutil.walk_packages(unweave.__path__, "unweave."):
        if module.name.endswith("__main__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(kind) and not name.startswith("_") and kind.__module__.startswith("unweave"):
                table = inspect.getattr_static(kind, "table", None)
                if inspect.isfunction(table) and inspect.signature(table).return_annotation == "list[dict[str, Any]]":
                    found[name] = kind
    return found


CLASSES = result_classes()
Case = tuple[Any, dict[str, Any], int, dict[str, Any]]  # result, options, rows, columns with what is expected in them


@pytest.fixture(scope="module")
def cases(induction, induction_data, tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("usage")
    made = [
        _of_graphs(induction, induction_data),
        _of_modules(induction, induction_data),
        _of_data(induction, induction_data, folder),
        _of_hypotheses(),
        _of_drivers(induction, induction_data),
        _of_falsification(),
        _of_networks(),
    ]
    return {name: case for part in made for name, case in part.items()}


def _of_graphs(graph: unweave.Graph, data: Any) -> dict[str, Case]:
    scores = unweave.score_edges(graph, data, SCOPE)
    values = scores.nats[graph.edge_matrix].abs().sort(descending=True).values.double()
    circuit = unweave.find_circuit(graph, data, SCOPE, edges=8)
    proof = unweave.prove(circuit, data, n_random=2, n_subsets=2)
    shares = (0.1, 1.0)
    curve = faithfulness_curve(scores, graph, data, SCOPE, circuit.instead, shares=shares)
    path = path_effect(graph, data, [f"{HEAD}->unembed.in"], scope=SCOPE)
    talk = composition(graph)
    small = Subspace(torch.eye(2), torch.tensor([0.5, 0.25]))
    points = [{"edge": "a->b.in", "attributed": 0.25, "measured": 0.5, "kept": True}]
    compressed = {"unweave": [(0.5, HALF)], "plain SVD": [(0.5, THIRD), (0.25, HALF)]}
    found = Decompiled(graph, graph, scores, {}, compressed, {})
    top = [float(x) for x in values[:3]]
    return {
        "EdgeScores": (scores, {"k": 3}, 3, {"nats": top, "measured": [False] * 3, "frozen": ["none"] * 3}),
        "Circuit": (circuit, {}, 8, {"edge": [r["edge"] for r in scores_of(circuit)]}),
        "Proof": (
            proof,
            {},
            11,
            {
                "value": [*(e.value for e in (proof.nats, proof.faithfulness, proof.agreement)), proof.empty_nats, ...],
                "unit": ["nats", "share", "share", "nats", "nats", "nats", "share", "share", "share", "nats", "nats"],
            },
        ),
        "FaithfulnessCurve": (
            curve,
            {},
            2,
            {
                "share": list(shares),
                "n_edges": list(curve.n_edges),
                "nats": list(curve.nats),
                "faithfulness": [f.value for f in curve.faithfulness],
                "faithfulness_low": [f.low for f in curve.faithfulness],
                "faithfulness_high": [f.high for f in curve.faithfulness],
            },
        ),
        "PathEffect": (path, {}, 1, {"nats": [path.nats], "se_nats": [path.se], "path": [(f"{HEAD}->unembed.in",)]}),
        "Composition": (
            talk,
            {"k": 1},
            1,
            {"score": [float(torch.stack([talk.q, talk.k, talk.v]).nan_to_num(-9).max())]},
        ),
        "Subspace": (small, {}, 2, {"dimension": [0, 1], "nats": [0.5, 0.25]}),
        "Prediction": (
            Prediction(points, 2.0, 1.0, 1.0),
            {},
            1,
            {"edge": ["a->b.in"], "attributed_nats": [0.25], "measured_nats": [0.5], "kept": [True]},
        ),
        "Decompiled": (
            found,
            {},
            3,
            {"method": ["unweave", "plain SVD", "plain SVD"], "size": [0.5, 0.5, 0.25], "kl_nats": [0.5, 0.3, 0.5]},
        ),
    }


def scores_of(circuit: unweave.Circuit) -> list[dict[str, Any]]:
    """The circuit's edges with their scores, the largest first, by a loop."""
    rows = []
    for j, port in enumerate(circuit.original.ports):
        for i, writer in enumerate(circuit.original.writers):
            if circuit.kept[j, i]:
                rows.append({"edge": f"{writer}->{port}", "nats": float(circuit.scores.nats[j, i])})
    return sorted(rows, key=lambda row: -abs(row["nats"]))


def _of_modules(graph: unweave.Graph, data: Any) -> dict[str, Case]:
    modules = unweave.find_modules(graph, data, SCOPE, nulls=())
    nats = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.25, 1.0, 0.0]])
    talk = Communication(("a", "b", "c"), nats, nats, (0, 1, 2))
    traffic = centralisation(talk, draws=4)
    against = AgainstNull(1.5, 1.0, 0.5, 1.0, 90.0)
    reused = Reuse(
        ("a",), ("x", "y"), torch.tensor([[1.0, 3.0]]), torch.tensor([[0.25, 0.75]]), torch.tensor([1.75]),
        (against,), against, (0,),
    )  # fmt: skip
    line = SharedSubspace(torch.eye(2), 0.5, {"a": 0.5}, {"b": 0.25, "c": 0.25}, 3, 1.0, 2.0, "private line")
    shared = SharedSubspaces((line,), (("a", "b"),), 1.0, 0.5, 0.5, 0.1)
    none = torch.zeros(0, 2)
    sent = Interface("m", "n", (), 0.5, 0.125, none, none, torch.zeros(0), torch.tensor([0.5]), (), (), ())
    crossing = Interfaces(graph, (sent,), {}, SCOPE, 3, 30)
    alone, both = Ablated(("m",), HALF, None, (0.1,), ()), Ablated(("m", "n"), HALF, THIRD, (0.1, 0.9), (0.1,))
    swapped = Swapped("m", HALF, {"n": THIRD}, frozenset({"n"}), frozenset({"n"}), {"n": (0.1,)}, 0.01)
    return {
        "Modules": (
            modules,
            {},
            modules.partition.n_blocks,
            {
                "module": list(modules.partition.blocks),
                "nodes": list(modules.partition.blocks.values()),
                "inside_nats": [
                    sum(modules.communication.between(a, b)[0] for a in nodes for b in nodes)
                    for nodes in modules.partition.blocks.values()
                ],
            },
        ),
        "Criterion": (
            modules.criterion,
            {"partitions": modules.hierarchy},
            len(modules.hierarchy),
            {"bits": [modules.criterion.describe(p).bits for p in modules.hierarchy]},
        ),
        "Communication": (talk, {}, 3, {"src": ["b", "a", "a"], "dst": ["c", "b", "c"], "nats": [1.0, 0.5, 0.25]}),
        "Traffic": (traffic, {"k": 2}, 2, {"node": ["b", "c"], "traffic_nats": [1.5, 1.25]}),
        "Reuse": (reused, {}, 1, {"node": ["a"], "z": [1.0], "share.x": [0.25], "share.y": [0.75]}),
        "SharedSubspaces": (
            shared,
            {},
            1,
            {"writers": [(("a", 0.5),)], "readers": [(("b", 0.25), ("c", 0.25))], "dimensions": [2], "nats": [0.5]},
        ),
        "Interfaces": (
            crossing,
            {},
            1,
            {"from": ["m"], "to": ["n"], "nats": [0.5], "se_nats": [0.125], "measured_nats": [math.nan]},
        ),
        "ModuleEffects": (
            ModuleEffects({"m": alone}, {("m", "n"): both}, "mean", 3, 30),
            {},
            2,
            {"modules": ["m", "m + n"], "nats_low": [0.25, 0.25], "interaction_nats": [math.nan, 0.3]},
        ),
        "Swaps": (
            Swaps({"m": swapped}, "writes", 3),
            {},
            1,
            {"module": ["m"], "predicted": [("n",)], "changed": [("n",)], "agreement": [1.0]},
        ),
        "ReplacementLoss": (
            ReplacementLoss("m", "lookup", HALF, THIRD, HALF, 7, 3, 30),
            {},
            3,
            {"value": [0.5, 0.3, 0.5], "high": [0.75, 0.4, 0.75], "unit": ["nats", "nats", "share"]},
        ),
    }


def _of_data(graph: unweave.Graph, data: Any, folder: Path) -> dict[str, Case]:
    scopes = {"all": unweave.Scope(), "last": unweave.Scope(positions="last")}
    ordered = lattice(scopes)
    need = Need(graph, "edges", 4, 0.25, 0.01, HALF, ("embed", "unembed"), frozenset(), {}, 3, 30)
    small = unweave.compress(graph, data, SCOPE, size=0.3)
    found = audit(small, graph, data, SCOPE, n_tokens=4, n_texts=2)
    hits = search_inputs(small, graph, data, budget=64)
    triggers = search_triggers(small, graph, data, length=1, budget=500, progress=False)
    heads = unweave.score_heads(graph, data)
    usage = record_usage(graph, data, SCOPE, folder / "usage")
    kinds = types_by_label(usage, "answered")
    mean = {part: float(usage.matrix()[:, k].mean()) for k, part in enumerate(usage.columns)}
    best = max(range(len(heads.heads) * len(heads.detectors)), key=lambda k: (heads.score - heads.null).flatten()[k])
    return {
        "Lattice": (ordered, {}, 2, {"scope": ["all", "last"], "coarser": [("last",), ()]}),
        "Needs": (
            Needs(ordered, 0.01, {"all": need}, (), ()),
            {},
            1,
            {"scope": ["all"], "size": [4], "share": [0.25], "kl_nats": [0.5], "kl_nats_low": [0.25], "n_tokens": [30]},
        ),
        "Audit": (
            found,
            {"of": "writers"},
            len(found.writers),
            {"name": [p.name for p in found.writers], "restored_nats": [p.restored_nats for p in found.writers]},
        ),
        "Found": (
            hits,
            {},
            len(hits.hits),
            {"nats": [h.nats for h in hits.hits], "tokens": [h.tokens for h in hits.hits]},
        ),
        "Triggers": (
            triggers,
            {},
            16,
            {"tokens": [t.tokens for t in triggers.runs], "excess_nats": [t.excess_nats for t in triggers.runs]},
        ),
        "HeadScores": (
            heads,
            {},
            len(heads.heads) * len(heads.detectors),
            {"head": [heads.heads[best % len(heads.heads)], ...], "score": [float(heads.score.flatten()[best]), ...]},
        ),
        "Usage": (
            usage,
            {},
            len(mean),
            {"part": sorted(mean, key=lambda p: -mean[p]), "nats": sorted(mean.values(), reverse=True)},
        ),
        "DataTypes": (
            kinds,
            {},
            len(kinds.types),
            {"type": [k.name for k in kinds.types], "n_tokens": [int(k.tokens.sum()) for k in kinds.types]},
        ),
        "DataType": (
            kinds.types[0],
            {},
            len(usage.columns),
            {"weight": sorted(map(float, kinds.types[0].weights), reverse=True)},
        ),
    }


def _of_hypotheses() -> dict[str, Case]:
    here = Candidate(Location("blocks.0.mlp", torch.eye(4)[:, :2]), ACCURACY, 0.1)
    search = AlignmentSearch("x", (here,), (here,), ())
    changed = Interchange({"x": ACCURACY}, {"x": (ACCURACY, ACCURACY)}, {"x": ACCURACY}, HALF, 8)
    return {
        "AlignmentSearch": (
            search,
            {},
            1,
            {"dimensions": [2], "iia": [0.5], "iia_low": [0.25], "iia_high": [0.75], "mislabelled": [math.nan]},
        ),
        "Interchange": (
            changed,
            {},
            1,
            {
                "variables": ["x"],
                "iia": [0.5],
                "unchanged": [0.3],
                "nats": [0.5],
                "elsewhere": [0.5],
                "n_effective": [5],
            },
        ),
    }


def _of_drivers(graph: unweave.Graph, data: Any) -> dict[str, Case]:
    one = torch.tensor([[0.5, 0.25]])
    picked = Picked(one, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))
    directions = Directions(graph, (HEAD,), {HEAD: torch.eye(8)[:1]})
    shown = Examples(directions, data, {"top": picked}, (), torch.zeros(1), torch.ones(1), 30)
    held = HeldEffect(HEAD, 0, 1.0, 0.0, 0.75, {"unembed": 0.25, HEAD: 0.5}, torch.tensor([0.1, -0.2]), 30)
    named = Description(HEAD, 0, "digits", None, ("digit",), 0.5, 0.75, 0.0, 0.5, "weak")
    return {
        "Examples": (
            shown,
            {"node": HEAD, "number": 0, "kinds": ["top"]},
            2,
            {
                "value": [0.5, 0.25],
                "sequence": [0, 1],
                "position": [2, 3],
                "quantile": [math.nan, math.nan],
                "token": [f"[{int(data.tokens[0, 2])}]", f"[{int(data.tokens[1, 3])}]"],
            },
        ),
        "HeldEffect": (
            held,
            {"k": 1},
            5,
            {
                "what": ["total", "directly", "through", "up", "down"],
                "value": [0.75, 0.5, 0.25, 0.1, -0.2],
                "unit": ["nats", "nats", "nats", "log-probability", "log-probability"],
            },
        ),
        "Descriptions": (
            Descriptions((named,), torch.zeros(2), 0.125, 30, 15),
            {},
            1,
            {"node": [HEAD], "direction": [0], "rules": [("digit",)], "score": [0.5], "null_95": [0.125]},
        ),
    }


def _of_falsification() -> dict[str, Case]:
    called = PredictionRow("half", "graph", HALF, THIRD, HALF, NONE, THIRD, 0.125, 12)
    share = {"r2": [0.3], "r2_low": [0.2], "top_token": [math.nan], "mean_change_nats": [0.125], "n_edits": [12]}
    nats = {"kl_nats": [0.5], "kl_nats_low": [0.25], "kl_nats_high": [0.75], "kl_max_nats": [0.9], "n_tokens": [30]}
    return {
        "Faithfulness": (ROW, {}, 1, nats | {"loss_nats": [0.3], "loss_recovered": [math.nan], "n_sequences": [3]}),
        "Validation": (
            Validation({"data": {"all": {"candidate": ROW, "original": ROW}}}, {}),
            {},
            2,
            {
                "data": ["data"] * 2,
                "graph": ["candidate", "original"],
                "kl_nats": [0.5, 0.5],
                "kl_p999_nats": [0.2, 0.2],
            },
        ),
        "PredictionRow": (called, {}, 1, share),
        "EditTable": (EditTable((called,), {}, {}, {}, {}), {}, 1, {"size": ["half"], "predictor": ["graph"], **share}),
        "DiscardCost": (
            DiscardCost(HALF, THIRD, HALF, THIRD, 0.4, 3, 30),
            {},
            1,
            {"kl_nats": [0.5], "cost_nats_high": [0.4], "numbers_share": [0.4], "n_tokens": [30]},
        ),
        "Scrubbed": (
            Scrubbed(HALF, THIRD, HALF, HALF, HALF, THIRD, HALF, {}, "tree", 1, 3, 30),
            {},
            7,
            {"value": [0.5, 0.3, 0.5, 0.5, 0.5, 0.3, 0.5], "unit": ["share"] * 2 + ["nats"] * 5},
        ),
    }


def _of_networks() -> dict[str, Case]:
    lost = ReplacementLoss("m", "a", HALF, THIRD, HALF, 7, 3, 30)
    probe = LinearProbe(torch.zeros(1, 2), torch.zeros(1), 0, torch.zeros(2), torch.eye(2), torch.zeros(1))
    row = FeatureRow(HALF, THIRD, HALF, HALF, 0.9, 4.0, 0.125, 0.5, 2.5, 64, 30)
    return {
        "FeatureSurvey": (
            FeatureSurvey(MLP, {}, {"topk": row, "neurons": row}, None, {}, {}),
            {},
            2,
            {"name": ["topk", "neurons"], "kl_nats": [0.5, 0.5], "l0": [4.0, 4.0], "n_latents": [64, 64]},
        ),
        "Matching": (
            Matching((NodePair(MLP, "blocks.1.mlp", 0.5, 0.25),), "behaviour", {}, {}, {}),
            {},
            1,
            {"a": [MLP], "b": ["blocks.1.mlp"], "similarity": [0.5], "margin": [0.25]},
        ),
        "ProbeTable": (
            ProbeTable((ProbeRow("depth", "before unembed", 2, 10, HALF, 0.25, 0.125, probe),)),
            {},
            1,
            {"concept": ["depth"], "score": [0.5], "score_high": [0.75], "selectivity": [0.375], "step": [10]},
        ),
        "StitchLoss": (
            StitchLoss(lost, lost, MLP, HEAD, MLP, 7),
            {},
            6,
            {"value": [0.5, 0.3, 0.5] * 2, "unit": ["nats", "nats", "share"] * 2},
        ),
    }


# ---- every class ----------------------------------------------------------------------------------------


def test_every_class_with_a_table_is_tried(cases) -> None:
    assert set(cases) == set(CLASSES), "give the new class a result in this file, or take the one that is gone out"
    for name, (result, *_) in cases.items():
        assert type(result) is CLASSES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_rows_and_numbers_are_the_results_own(cases, name: str) -> None:
    result, options, n_rows, expected = cases[name]
    frame = to_frame(result, **options)
    assert len(frame) == n_rows > 0
    for column, values in expected.items():
        got = frame[column].tolist()
        if values[-1] is ...:
            values, got = values[:-1], got[: len(values) - 1]
        assert len(got) == len(values)
        for g, v in zip(got, values, strict=True):
            assert g == pytest.approx(v, rel=1e-6, nan_ok=True) if isinstance(v, float) else g == v, column


@pytest.mark.parametrize("name", CLASSES)
def test_columns_say_their_unit_and_are_of_one_type(cases, name: str) -> None:
    result, options, *_ = cases[name]
    frame = to_frame(result, **options)
    assert frame.columns.is_unique
    assert all(type(column) is str for column in frame.columns)
    for column in frame.columns:
        kind, values = frame[column].dtype, frame[column].dropna()
        if pd.api.types.is_object_dtype(kind):  # tuples, or text with gaps
            assert all(type(value) in (tuple, str) for value in values), column
            assert len(set(values)) >= 1 or values.empty  # they can be hashed
        elif pd.api.types.is_float_dtype(kind):
            stem = column.removesuffix("_low").removesuffix("_high").partition(".")[0]
            says = any(word in stem.split("_") for word in UNITS) or stem in PLAIN or values.empty
            assert says or ("unit" in frame.columns and column in ("low", "high")), f"{name}.{column} has no unit"
        else:
            assert pd.api.types.is_integer_dtype(kind) or pd.api.types.is_bool_dtype(kind) or kind == "str", column
    if "value" in frame.columns and name not in ("Examples",):  # of different kinds; there, of one code
        assert frame["unit"].notna().all()


# ---- what else can be given -----------------------------------------------------------------------------


def test_intervals_take_three_columns_and_gaps_keep_whole_numbers() -> None:
    frame = to_frame([{"kl": {"value": 1.0, "low": 0.5, "high": 2.0}, "n": 3}, {"kl": None, "n": None}])
    assert list(frame.columns) == ["kl", "kl_low", "kl_high", "n"]
    assert frame["n"].dtype == "Int64"
    assert frame.loc[0].tolist() == [1.0, 0.5, 2.0, 3]
    assert frame.loc[1].isna().all()


def test_mappings_are_named_level_by_level() -> None:
    frame = to_frame({"in": {"a": ROW, "b": ROW}, "out": {"a": ROW}}, keys=("data", "graph"))
    assert list(zip(frame["data"], frame["graph"], strict=True)) == [("in", "a"), ("in", "b"), ("out", "a")]
    assert frame["kl_nats"].tolist() == [0.5] * 3


def test_subspaces_of_all_nodes(induction, induction_data) -> None:
    spaces = unweave.node_subspaces(induction, unweave.channel_moments(induction, induction_data, SCOPE))
    frame = to_frame(spaces, keys=("node", "part"))
    assert len(frame) == sum(len(space.nats) for parts in spaces.values() for space in parts.values())
    own = frame[(frame["node"] == HEAD) & (frame["part"] == "read.k")]
    np.testing.assert_allclose(own["nats"], spaces[HEAD]["read.k"].nats.numpy())


def test_tuples_explode_and_group(cases) -> None:
    modules = cases["Modules"][0]
    frame = to_frame(modules)
    assert frame.explode("nodes")["nodes"].tolist() == [n for b in modules.partition.blocks.values() for n in b]
    assert len(frame.groupby("nodes")) == len(frame)


def test_usage_of_one_text(cases) -> None:
    usage = cases["Usage"][0]
    text, matrix = usage.text(3), usage.matrix()
    sequence = np.concatenate([block[0] for block in usage.blocks()])
    np.testing.assert_array_equal(text[list(usage.columns)].to_numpy(), matrix[sequence == 3])
    assert text["position"].tolist() == list(range(len(text)))
    assert text["string"].tolist() == [f"[{token}]" for token in text["token"]]
    with pytest.raises(InputError, match="no token of sequence 99"):
        usage.text(99)


def test_frames_and_nothing() -> None:
    frame = pd.DataFrame({"a": [1]})
    assert to_frame(frame) is frame
    assert to_frame([]).empty
    assert to_frame({}).empty


@pytest.mark.parametrize("wrong", [3, None, "rows", [1, 2], {"a": 3}, object()])
def test_what_has_no_table_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="has no table; give"):
        to_frame(wrong)


def test_refusals_of_options_and_names(cases) -> None:
    with pytest.raises(InputError, match="does not take {'first': 3}"):
        to_frame(cases["EdgeScores"][0], first=3)
    with pytest.raises(InputError, match="table of Examples does not take no options"):
        to_frame(cases["Examples"][0])
    with pytest.raises(UnknownNameError, match="writers"):
        to_frame(cases["Audit"][0], of="writer")
    with pytest.raises(InputError, match="already; name the mapping's entries"):
        to_frame({"a": ROW}, keys=("kl_nats",))
    with pytest.raises(InputError, match="name every level"):
        to_frame({"a": {"b": ROW}}, keys=("one",))


@pytest.mark.parametrize(("package", "module"), [("pandas", "frames"), ("matplotlib", "plots")])
def test_a_missing_package_is_named_with_its_extra(package: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from unweave.errors import MissingExtraError\n"
        f"try:\n    import unweave.{module}\n"
        "except MissingExtraError as error:\n    assert 'unweave[notebook]' in str(error), error\n"
        "else:\n    raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
