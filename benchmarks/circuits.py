"""Circuits against the field: same model, prompts, counterfactual ablation and evaluator for all.

    python -m benchmarks.circuits [TASK ...]

Tasks: induction on the zoo's model; on stories260K closing quotes, and two behaviours in its own stories: the name of
the story's only child, and the pronoun that goes with it (the corrupted story has the other name and pronouns). Edges
are scored on half of the prompts; faithfulness f = (m(circuit) - m(empty)) / (m(model) - m(empty)) of the logit
difference m, and the divergence, are measured on the other half at MIB's sizes. Seconds are of scoring (or searching)
alone, as a ratio to EAP-IG-inputs of this library. Programs of others run in their own environments, where PEERS_EAP
and PEERS_AUTOCIRCUIT name their python (see benchmarks/peers); without them those rows are missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, SHARED, save
from unweave.capture import capture, load_tokenizer
from unweave.circuits import SHARES, faithfulness_curve, find_circuit
from unweave.data import load_data
from unweave.errors import InputError
from unweave.export import from_eap_json
from unweave.graph import Graph
from unweave.scope import Scope
from unweave.scoring import EdgeScores, score_edges
from unweave.statistics import replacement
from unweave.tasks import Task, check_task, make_task
from unweave.tasks.task import assemble

PROMPTS, CONTEXT, TRIALS = 64, 40, 60
SHOWN = (0.01, 0.02, 0.05, 0.1)
# their own exact scores take minutes and are ours
PEERS = {
    "PEERS_EAP": ["eap_scores.py", "--methods", "EAP", "EAP-IG-inputs", "EAP-IG-activations"],
    "PEERS_AUTOCIRCUIT": ["autocircuit_scores.py"],
}
ZOO = ROOT.parent / "unweave" / "zoo" / "weights" / "induction"
STORIES = SHARED / "models" / "stories260K"
SWAPPED = [("Lily", "Tim"), ("she", "he"), ("She", "He"), ("her", "his"), ("Her", "His"), ("girl", "boy")]


def story_task(name: str, asked: tuple[str, str]) -> Task:
    """Prefixes of stories that end before one of two words, with the story of the other child as partner."""
    tokenizer = load_tokenizer(STORIES)
    data = load_data(SHARED / "data" / "stories260K.jsonl", tokenizer, context=256)
    swap = {}
    for pair in SWAPPED:
        ids = [tokenizer.convert_tokens_to_ids("\u2581" + word) for word in pair]
        if tokenizer.unk_token_id not in ids:
            swap |= {ids[0]: ids[1], ids[1]: ids[0]}
    answers = [tokenizer.convert_tokens_to_ids("\u2581" + word) for word in asked]
    names = torch.tensor([tokenizer.convert_tokens_to_ids("\u2581" + word) for word in SWAPPED[0]])
    clean, other, right, wrong = [], [], [], []
    for row, mask in zip(data.tokens, data.mask, strict=True):
        ids = row[mask].tolist()
        for at in range(CONTEXT, len(ids)):
            before = ids[at - CONTEXT + 1 : at]
            if ids[at] in answers and len(set(names.tolist()) & set(before)) == 1:
                prompt = [ids[0], *before]
                clean.append(prompt)
                other.append([swap.get(i, i) for i in prompt])
                right.append([ids[at]])
                wrong.append([answers[1 - answers.index(ids[at])]])
                break
        if len(clean) == PROMPTS:
            break
    given = {"correct": right, "wrong": wrong}
    return assemble(clean, other, given, {}, name=name, vocabulary=len(tokenizer))


def tasks(wanted: list[str]) -> dict[str, tuple[Path, Callable[[], Task]]]:
    every: dict[str, tuple[Path, Callable[[], Task]]] = {
        "induction": (ZOO, lambda: make_task("induction", vocabulary=48, first=0, n=PROMPTS, length=24)),
        "quotes": (STORIES, lambda: make_task("quotes", load_tokenizer(STORIES), n=PROMPTS)),
        "name": (STORIES, lambda: story_task("name", ("Lily", "Tim"))),
        "pronoun": (STORIES, lambda: story_task("pronoun", ("She", "He"))),
    }
    return {name: every[name] for name in wanted or every}


def seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def searched(graph: Graph, data: Any, scope: Scope) -> dict[float, torch.Tensor]:
    """A circuit of our own search at every size; sizes too small for any path keep nothing."""
    scores = score_edges(graph, data, scope, ablation="counterfactual", samples=1)
    out = {}
    for share in SHARES[:-1]:
        try:
            n = max(1, round(share * graph.n_edges))
            options = {"scores": scores, "ablation": "counterfactual", "max_trials": TRIALS}
            out[share] = find_circuit(graph, data, scope, edges=n, **options).kept
        except InputError:
            out[share] = torch.zeros_like(graph.edge_matrix)
    return out | {1.0: graph.edge_matrix}


def theirs(model: Path, task: Task, graph: Graph, like: EdgeScores) -> dict[str, tuple[EdgeScores, float]]:
    """Scores by the programs of others, where they are installed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        labels = task.data.labels
        ends = labels["end"].int().argmax(1).tolist()
        plain = {"clean": task.data.tokens.tolist(), "corrupted": task.corrupted.tokens.tolist(), "end": ends}
        plain |= {kind: labels[kind].tolist() for kind in ("correct", "wrong")}
        prompts.write_text(json.dumps(plain))
        for variable, (script, *more) in PEERS.items():
            if variable not in os.environ:
                continue
            out = Path(folder) / variable
            command = [os.environ[variable], str(ROOT / "peers" / script), str(model), str(prompts), str(out), *more]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(script, done.stderr[-2000:], file=sys.stderr)
            for path in sorted(out.glob("*.json")):
                nats, kept = from_eap_json(path, graph)
                spent = json.loads(path.read_text())["unweave"]["seconds"]
                if "ACDC" in path.stem:  # says what is left, not in which order
                    nats = kept.float() + nats.nan_to_num(0.0).abs().clamp(max=1.0) * 1e-3
                found[f"{path.stem} (their code)"] = (_scores(like, nats.nan_to_num(0.0)), spent)
    return found


def _scores(like: EdgeScores, nats: torch.Tensor) -> EdgeScores:
    return dataclasses.replace(like, nats=nats.masked_fill(like.nats.isnan(), torch.nan))


def one_answer(task: Task) -> Task:
    """The task with one correct and one wrong token per prompt, which is what the programs of others take."""
    labels = dict(task.data.labels)
    for kind in ("correct", "wrong"):
        labels[kind] = labels[kind].reshape(len(task.data), -1)[:, 0]
    return dataclasses.replace(task, data=dataclasses.replace(task.data, labels=labels))


def compare(name: str, model: Path, task: Task) -> list[dict[str, Any]]:
    graph = capture("zoo:induction" if model == ZOO else model)
    check = check_task(graph, task)
    found, held_out = task.split(0.5, 0)
    data, test = found.paired, held_out.paired
    difference, kl = Scope(positions="end", divergence="logit_difference"), Scope(positions="end")
    instead, _ = replacement(graph, data, "counterfactual")
    options: dict[str, Any] = {"ablation": "counterfactual", "batch_size": 32}

    def score(scope: Scope = difference, **more: Any) -> tuple[EdgeScores, float]:
        return seconds(lambda: score_edges(graph, data, scope, **options, **more))

    score(method="eap")  # the first call is slower
    rankings: dict[str, tuple[Any, float]] = {
        "unweave, search": seconds(lambda: searched(graph, data, difference)),
        "unweave, fisher": score(samples=1),
        "unweave, fisher of the KL": score(scope=kl, samples=2),
        "EAP": score(method="eap"),
        "EAP-IG-inputs, 5 steps": score(method="eap-ig"),
        "exact single-edge effects": score(method="exact"),
    }
    like = rankings["EAP"][0]
    rankings |= theirs(model, found, graph, like)
    noise = torch.rand(like.nats.shape, generator=torch.Generator().manual_seed(0))
    rankings["random"] = (_scores(like, noise), 0.0)
    base = rankings["EAP-IG-inputs, 5 steps"][1]
    rows = []
    for method, (ranking, spent) in rankings.items():
        by_metric = faithfulness_curve(ranking, graph, test, difference, instead)
        by_nats = faithfulness_curve(ranking, graph, test, kl, instead)
        at = {s: by_metric.faithfulness[SHARES.index(s)].value for s in SHOWN}
        nats = {s: by_nats.nats[SHARES.index(s)] for s in SHOWN}
        row = {"task": name, "method": method, "cpr": by_metric.cpr, "cmd": by_metric.cmd}
        row |= {"faithfulness": at, "nats": nats, "cmd_nats": by_nats.cmd, "time_ratio": spent / base}
        rows.append(row | {"accuracy": check.accuracy, "n": len(test), "edges": graph.n_edges})
        print(row, flush=True)
    return rows


def main(wanted: list[str]) -> None:
    started = time.time()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (model, make) in tasks(wanted).items():
        rows += compare(name, model, one_answer(make()))
        save("circuits", {"rows": rows}, started, "python -m benchmarks.circuits")


if __name__ == "__main__":
    main(sys.argv[1:])
