"""Rebuilt graphs: the program computes what the graph computes, without unweave."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import random_model
from safetensors.torch import load_file, save_file

from unweave.capture import capture
from unweave.circuits import find_circuit
from unweave.compression import compress
from unweave.data import TokenData, from_tensor
from unweave.errors import EmptyDataError, StorageError, UnsupportedModelError
from unweave.execution import run
from unweave.falsification import Steer, discard_cost, rebuild
from unweave.graph import Graph
from unweave.ops import Attention
from unweave.scope import Scope
from unweave.statistics import collect_means

FAMILIES = ("gpt2", "gpt2-scaled-by-layer", "gpt_neo", "gpt_neox-partial", "llama-tied-biased", "qwen3")
FAMILIES += ("mistral-window", "llama-yarn", "llama")

# one process for all folders, in which unweave cannot be imported
DRIVER = """
import importlib.util, json, sys
sys.modules["unweave"] = None
import torch
from safetensors.torch import load_file, save_file
for folder in json.loads(sys.argv[1]):
    spec = importlib.util.spec_from_file_location("model", folder + "/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = load_file(folder + "/given.safetensors")
    with torch.no_grad():
        model = module.load()
        out = {"plain": model(given["tokens"]), "masked": model(given["tokens"], given["mask"].bool())}
    save_file({k: v.contiguous() for k, v in out.items()}, folder + "/out.safetensors")
assert not [name for name in sys.modules if name.startswith("unweave.")]
"""


def inputs(graph: Graph) -> tuple[torch.Tensor, torch.Tensor]:
    n = min(9, graph.info["n_ctx"])
    tokens = torch.randint(0, graph.info["d_vocab"], (3, n), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(n) < torch.tensor([[n], [4], [6]])


def check(graphs: dict[str, Graph], folder: Path) -> None:
    """Rebuild all, run all in one other process, compare; the source must be formatted and clean."""
    for name, graph in graphs.items():
        rebuild(graph, folder / name)
        tokens, mask = inputs(graph)
        save_file({"tokens": tokens, "mask": mask.to(torch.uint8)}, str(folder / name / "given.safetensors"))
    folders = json.dumps([str(folder / name) for name in graphs])
    subprocess.run([sys.executable, "-c", DRIVER, folders], check=True, cwd=folder)
    for name, graph in graphs.items():
        out = load_file(str(folder / name / "out.safetensors"))
        tokens, mask = inputs(graph)
        truth = run(graph, tokens).logits
        close = 1e-5 * max(1.0, float(truth.abs().max()))
        assert float((out["plain"] - truth).abs().max()) < close, name
        assert float((out["masked"] - run(graph, tokens, mask).logits)[mask].abs().max()) < close, name
        assert float(truth.std()) > 1e-3, name
    ruff = Path(sys.executable).parent / "ruff"
    for command in (["format", "--check"], ["check", "--select", "E,F,B,C90,UP", "--ignore", "B905"]):
        done = subprocess.run(
            [ruff, *command, "--isolated", "--no-cache", folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def rows() -> TokenData:
    return from_tensor(torch.randint(0, 50, (8, 10), generator=torch.Generator().manual_seed(1)))


def test_captured_models_of_every_family(tmp_path):
    check({family: capture(random_model(family), verify=False) for family in FAMILIES}, tmp_path)
    code = (tmp_path / "llama" / "model.py").read_text()
    assert "EDGES" not in code or "gpt_neox" in code
    assert len(code.splitlines()) < 220


def test_compressed_and_cut_graphs(tmp_path, rows):
    graphs = {}
    for family in ("gpt2", "qwen3"):
        graph = capture(random_model(family), verify=False)
        means, by_place = collect_means(graph, rows), collect_means(graph, rows, per_position=True)
        keep = torch.rand(graph.edge_matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.6
        small = compress(graph, rows, size=0.6)
        graphs |= {
            f"{family}-low-rank": small,
            f"{family}-sparse": compress(graph, rows, size=0.6, form="sparse"),
            f"{family}-cut": graph.restrict(keep, means=means),
            f"{family}-cut-zero": graph.restrict(keep, ablation="zero"),
            f"{family}-cut-by-position": graph.restrict(keep, means=by_place),
            f"{family}-low-rank-cut": small.restrict(keep, means=means),
            f"{family}-refined": graph.refine({f"blocks.0.attn.head.{h}": 2 for h in range(4)} | {"blocks.1.mlp": 3}),
            f"{family}-steered": Steer("embed", torch.ones(32)).apply_to_graph(graph),
        }
    check(graphs, tmp_path)


def test_a_circuit_lists_its_edges_and_holds_only_its_nodes(tmp_path, induction, induction_data):
    circuit = find_circuit(induction, induction_data, Scope(positions="answered"), faithfulness=0.9)
    check({"whole": induction, "circuit": circuit.graph}, tmp_path)
    code = (tmp_path / "circuit" / "model.py").read_text()
    table = code.split("EDGES = ")[1].split("\n}\n")[0]
    listed = eval(table + "}")
    alive = {port.rpartition(".")[0] for port in listed} | {w for heard in listed.values() for w in heard}
    kept = {str(e) for e in circuit.graph.edges if e.dst in alive}
    assert {f"{writer}->{port}" for port, heard in listed.items() for writer in heard} == kept
    reached, frontier = set(), {"unembed"}
    while frontier:
        reached |= frontier
        frontier = {e.src for e in circuit.graph.edges if e.dst in frontier} - reached
    assert alive == reached
    whole = (tmp_path / "whole" / "weights.safetensors").stat().st_size
    assert (tmp_path / "circuit" / "weights.safetensors").stat().st_size < whole


def test_shared_models(tmp_path, shared):
    folders = [shared / "models" / "stories260K", shared / "models" / "tracr" / "hist"]
    check({folder.name: capture(folder, verify=False) for folder in folders}, tmp_path)


def test_narrow_weights_stay_narrow(tmp_path, rows):
    graph = capture(random_model("llama"), verify=False)
    for form in ("low-rank", "sparse"):
        small = compress(graph, rows, size=0.5, form=form)
        rebuild(small, tmp_path / form)
        stored = load_file(str(tmp_path / form / "weights.safetensors"))
        numbers = sum(t.numel() for t in stored.values() if t.is_floating_point())
        frequencies = sum(t.numel() for name, t in stored.items() if "rotary" in name)
        masks = sum(-(-t.numel() // 32) for t in stored.values() if t.dtype == torch.bool)
        assert numbers - frequencies + masks == small.n_parameters


def test_what_discarding_costs(rows):
    graph = capture(random_model("gpt2"), verify=False).to(dtype=torch.float64)
    small = compress(graph, rows, size=0.5)
    cost = discard_cost(small, graph, rows, Scope(positions=(2, 5, -1)), batch_size=3)
    kl, ours, truth = [], [], []
    for row in range(8):
        ids = rows.tokens[row][None].long()
        p, q = (run(g, ids).logits[0].log_softmax(-1) for g in (graph, small))
        for t in (2, 5, 9):
            kl.append(float((p[t].exp() * (p[t] - q[t])).sum()))
            if t < 9:
                ours.append(-float(q[t, ids[0, t + 1]]))
                truth.append(-float(p[t, ids[0, t + 1]]))
    expected = [sum(x) / len(x) for x in (kl, ours, truth)]
    assert [cost.kl_nats.value, cost.loss_nats.value, cost.model_loss_nats.value] == pytest.approx(expected)
    assert cost.cost_nats.value == pytest.approx(expected[1] - expected[2])
    assert cost.kl_nats.low < cost.kl_nats.value < cost.kl_nats.high
    assert cost.numbers == small.n_parameters / graph.n_parameters < 1
    assert (cost.n_sequences, cost.n_tokens) == (8, 24)
    nothing = discard_cost(graph, graph, rows)
    assert nothing.kl_nats.value == nothing.cost_nats.value == nothing.cost_nats.high == 0.0


def test_refusals(tmp_path, rows):
    graph = capture(random_model("llama"), verify=False)
    keep = torch.zeros_like(graph.edge_matrix)
    first = torch.eye(32)[:, :3]
    mlp = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    attention = graph.stages[1]
    assert isinstance(attention.core, Attention)
    full = dataclasses.replace(attention, core=dataclasses.replace(attention.core, causal=False))
    mixed = dataclasses.replace(graph, stages=(graph.stages[0], full, *graph.stages[2:]))
    bad = {
        "another input": graph.restrict(keep, ablation="resample"),
        "few dimensions": graph.narrow({"embed->unembed.in": (first, first.T)}, ablation="zero"),
        "split by position": graph.unroll(8),
        "real vectors": capture(mlp, verify=False),
        "Gemma|softly capped": capture(random_model("gemma2"), verify=False),
        "differ in causality": mixed,
    }
    for message, wrong in bad.items():
        with pytest.raises(UnsupportedModelError, match=message):
            rebuild(wrong, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="holds something"):
        rebuild(graph, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(EmptyDataError, match="next token"):
        discard_cost(graph, graph, rows, Scope(positions="last"))
