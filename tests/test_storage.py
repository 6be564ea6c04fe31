"""Folders: whole or not at all, and safe to load from strangers. (Round trips are in the families' battery.)"""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import unweave.files as files
from unweave.errors import CorruptFileError, InputError, NonFiniteError, StorageError
from unweave.files import Checkpoint
from unweave.storage import load_graph, load_results, save_graph


@pytest.fixture
def folder(induction, tmp_path):
    return save_graph(induction, tmp_path / "g", results={"x": float("nan"), "y": [1, 2.5]})


def test_results_travel_along(folder):
    assert load_results(folder) == {"x": None, "y": [1, 2.5]}


def test_ties_are_kept(tmp_path):
    from families import random_model

    from unweave.capture import capture

    graph = capture(random_model("llama-tied-biased"), verify=False)
    back = load_graph(save_graph(graph, tmp_path / "g"))
    assert back.stages[0].core.table is back.stages[-1].ports[0].reads[0].map.weight


def test_existing_folders_are_not_lost(induction, folder, tmp_path):
    with pytest.raises(StorageError, match="overwrite"):
        save_graph(induction, folder)
    save_graph(induction, folder, overwrite=True)
    assert load_results(folder) == {}
    stranger = tmp_path / "holiday"
    stranger.mkdir()
    (stranger / "photo.jpg").write_text("x")
    with pytest.raises(StorageError, match="not a graph folder"):
        save_graph(induction, stranger, overwrite=True)
    assert (stranger / "photo.jpg").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_the_old_folder_whole(induction, folder, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        save_graph(induction.quotient({"a": ["embed"]}), folder, overwrite=True)
    assert load_graph(folder).modules == {}
    assert sorted(os.listdir(folder.parent)) == ["g"]


def test_a_swap_that_fails_puts_the_old_folder_back(induction, folder, monkeypatch):
    """Where two names cannot be exchanged in one step, the second of two renames may fail."""
    real, calls = os.replace, []

    def fail_second(a, b):
        calls.append(b)
        if b == folder and calls.count(folder) == 1:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(files.os, "replace", fail_second)
    with pytest.raises(StorageError):
        save_graph(induction, folder, overwrite=True)
    assert calls.count(folder) == 2
    assert load_graph(folder).n_edges == 42
    assert sorted(os.listdir(folder.parent)) == ["g"]


def edit(folder, change):
    head = json.loads((folder / "graph.json").read_text())
    change(head)
    (folder / "graph.json").write_text(json.dumps(head))


HOSTILE = {
    "unknown type": lambda h: h["stages"][0].update(type="Popen"),
    "no type": lambda h: h["stages"][0].pop("type"),
    "extra field": lambda h: h["stages"][0].update(evil=1),
    "missing field": lambda h: h["stages"][0].pop("core"),
    "not a stage": lambda h: h.update(stages=[1, 2]),
    "no stages": lambda h: h.update(stages=[]),
    "tensor from elsewhere": lambda h: h["stages"][0]["core"]["table"].update(tensor="../../etc/passwd"),
    "table lies about shapes": lambda h: next(iter(h["tensors"].values())).update(shape=[1]),
    "table lies about types": lambda h: next(iter(h["tensors"].values())).update(dtype="int64"),
    "table lists a stranger": lambda h: h["tensors"].update(x={"dtype": "float32", "shape": [1]}),
    "newer version": lambda h: h.update(version=99),
    "other format": lambda h: h.update(format="zip"),
    "info is a list": lambda h: h.update(info=[]),
    "senseless size": lambda h: h["info"].update(n_ctx=-4),
    "broken rule": lambda h: h["stages"][2].update(visible=[0, 9]),
    "odd activation": lambda h: h["stages"][2].update(core={"type": "Activation", "name": "os.system"}),
    "wrong kind of value": lambda h: h["stages"][2].update(code_widths="many"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_folders_are_refused(folder, name):
    edit(folder, HOSTILE[name])
    with pytest.raises(CorruptFileError):
        load_graph(folder)


def test_other_ways_to_be_broken(folder, tmp_path):
    with pytest.raises(StorageError, match="not a graph folder"):
        load_graph(tmp_path)
    weights = load_file(folder / "weights.safetensors")
    name = next(n for n, t in weights.items() if t.is_floating_point())
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, str(folder / "weights.safetensors"))
    with pytest.raises(NonFiniteError, match="NaN"):
        load_graph(folder)
    (folder / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:200])
    with pytest.raises(CorruptFileError, match="safetensors"):
        load_graph(folder)
    (folder / "graph.json").write_text("[" * 100_000)
    with pytest.raises(CorruptFileError, match="JSON"):
        load_graph(folder)
    (folder / "graph.json").unlink()
    (folder / "graph.json").symlink_to("/etc/hostname")
    with pytest.raises(CorruptFileError, match="leads out"):
        load_graph(folder)


def test_checkpoints(tmp_path):
    saver = Checkpoint(tmp_path / "c.safetensors", "one")
    assert saver.load() is None
    saver.save({"a": torch.ones(2)}, {"step": 3})
    tensors, state = saver.load()
    assert tensors["a"].tolist() == [1, 1]
    assert state == {"step": 3}
    with pytest.raises(InputError, match="another pass"):
        Checkpoint(saver.path, "two").load()
    saver.path.write_bytes(b"junk")
    with pytest.raises(CorruptFileError):
        saver.load()
    saver.clear()
    assert not saver.path.exists()
