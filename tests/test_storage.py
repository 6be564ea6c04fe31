"""Files, checkpoints, graph folders: bit by bit, whole or not at all, and safe to load from strangers."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, random_model
from jaxtyping import Float, jaxtyped
from safetensors.torch import load_file, save_file
from torch import Tensor

import unweave.files as files
import unweave.storage as storage
from unweave.capture import capture
from unweave.errors import CorruptFileError, InputError, NonFiniteError, StorageError, UnweaveError
from unweave.execution import run
from unweave.files import (
    Checkpoint,
    encode_json,
    read_json,
    read_tensors,
    write_atomic,
    write_bytes,
    write_folder,
    write_json,
    write_tensors,
    write_text,
)
from unweave.graph import Graph, Port, Read, Stage
from unweave.ops import (
    Activation,
    Attention,
    Dense,
    Identity,
    LayerNorm,
    Lookup,
    LowRank,
    Pivoted,
    Readout,
    RMSNorm,
    Rotary,
    Stacked,
)
from unweave.storage import check_destination, finite, load_graph, load_results, save_graph

# ---- on a bundled model ---------------------------------------------------------------------------------


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


# ---- graphs made by hand: every kind of part --------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INFO = {
    "name": "by hand, ünïcode",
    "n_layers": 1,
    "n_ctx": 5,
    "d_model": 6,
    "d_vocab": 7,
    "d_out": 7,
    "more": [0.1, None],
}


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> Graph:
    """A graph with every kind of map, norms, rotary, cut edges, offsets, ties and transposed weights."""
    random = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    table = r(7, 6)
    table[0, :3] = torch.tensor([-0.0, 1e-7, 0.1])
    norm, head_norm = RMSNorm(r(6), 1e-5), RMSNorm(r(4), 1e-6, True)
    pivoted = Pivoted(r(2, 4), torch.tensor([4, 0]), torch.tensor([5, 1, 3, 2]))
    cut = torch.tensor([[True, False], [True, True]])
    q = Port("q", (Read(LowRank(r(8, 2), pivoted), (4, 4), r(8)),), norm, cut, r(2, 1, 6))
    k = Port("k", (Read(Dense(r(6, 4).T), (4,)),), norm)
    v = Port("v", (Read(Stacked((Dense(r(2, 6)), LowRank(r(2, 0), Dense(r(0, 6))))), (4,)),), norm)
    rotary = Rotary(r(2).abs())
    attention = Attention(2, 1, 1 / 3, window=3, rotary=rotary, q_norm=head_norm, k_norm=head_norm)
    hidden = (Read(Dense(r(5, 6)), (5,)), Read(Dense(r(12, 6)[1:11:2]), (5,), r(5)))
    heard = torch.tensor([[True, False, True, True]])
    mlp = Port("in", hidden, LayerNorm(r(6), r(6), 1e-5), heard, r(1, 5, 6))
    act, tied = Activation("silu"), Port("in", (Read(Dense(table), (7,)),))
    heads = ("blocks.0.attn.head.0", "blocks.0.attn.head.1")
    stages = (
        Stage(("embed",), "embed", -1, (), Lookup(table, scale=2.5), Identity(6), (6,), (0, 0)),
        Stage(("pos_embed",), "embed", -1, (), Lookup(r(5, 6), "position"), Identity(6), (6,), (0, 0)),
        Stage(heads, "attn", 0, (q, k, v), attention, Dense(r(8, 6).T), (4, 4), (0, 2), r(6)),
        Stage(("blocks.0.mlp",), "mlp", 0, (mlp,), act, Dense(r(6, 5)), (5,), (0, 3), None, norm),
        Stage(("unembed",), "unembed", 1, (tied,), Readout(30.0), None, (7,), (0, 4)),
    )
    graph = Graph(stages, INFO, modules={"embed": "input", heads[0]: "heads"})
    return graph if dtype == torch.float32 else graph.to(dtype=dtype)


def bits(t: Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(a: Any, b: Any, pairs: dict[int, Tensor]) -> None:
    """Equal in every type, field and bit; ``pairs`` collects which tensor became which, so that ties show."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert bits(a) == bits(b)
        assert pairs.setdefault(id(a), b) is b
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), pairs)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, pairs)
    elif isinstance(a, Mapping):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()), pairs)
    else:
        assert a == b


def assert_same_graph(a: Graph, b: Graph) -> int:
    """Returns how many distinct tensors the graphs have."""
    pairs: dict[int, Tensor] = {}
    assert_same(a, b, pairs)
    assert len({id(t) for t in pairs.values()}) == len(pairs)  # no two became one
    return len(pairs)


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    return save_graph(build(), tmp_path / "g")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# ---- round trip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    graph = build(dtype=dtype)
    n_tensors = assert_same_graph(graph, load_graph(save_graph(graph, tmp_path / "deep" / "er" / "g")))
    assert n_tensors == len(load_file(tmp_path / "deep" / "er" / "g" / "weights.safetensors"))


def test_the_files_say_what_the_graph_is(tmp_path: Path) -> None:
    graph = build()
    folder = save_graph(graph, str(tmp_path / "g"), results={"kl_nats": 0.5})
    assert sorted(p.name for p in folder.iterdir()) == ["graph.json", "results.json", "weights.safetensors"]
    head = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "weights.safetensors")
    assert (head["format"], head["version"], head["info"]) == ("unweave-graph", 1, INFO)
    assert head["modules"] == {"embed": "input", "blocks.0.attn.head.0": "heads"}
    embed, q, readout = head["stages"][0], head["stages"][2]["ports"][0], head["stages"][4]
    assert embed["core"]["type"] == "Lookup"
    assert torch.equal(weights[embed["core"]["table"]["tensor"]], graph.stages[0].core.table)
    assert readout["ports"][0]["reads"][0]["map"]["weight"] == embed["core"]["table"]  # tied: stored once
    assert q["edges"] == {"tensor": "2.ports.0.edges"}
    assert weights["2.ports.0.edges"].tolist() == [[True, False], [True, True]]
    assert weights["2.ports.0.reads.0.map.right.pivots"].tolist() == [4, 0]
    assert weights["2.ports.0.reads.0.map.right.pivots"].dtype == torch.int64
    assert head["tensors"]["2.ports.0.edges"] == {"dtype": "bool", "shape": [2, 2]}
    assert set(head["tensors"]) == set(weights)


def test_a_loaded_graph_computes_the_same_and_saves_the_same_bytes(tmp_path: Path) -> None:
    graph = build()
    first = save_graph(graph, tmp_path / "first", results={"a": 1})
    again = load_graph(first)
    tokens = torch.tensor([[0, 3, 6, 1, 1], [2, 2, 5, 4, 0]])
    logits = run(again, tokens).logits
    torch.testing.assert_close(logits, run(graph, tokens).logits)  # strides, so the order of sums, may differ
    second = save_graph(again, tmp_path / "second", results={"a": 1})
    assert contents(second) == contents(first)
    assert torch.equal(run(load_graph(second), tokens).logits, logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_captured_models_of_every_family_survive(tmp_path: Path, family: str) -> None:
    graph = capture(random_model(family, torch.bfloat16), verify=False)
    assert_same_graph(graph, load_graph(save_graph(graph, tmp_path / "g")))


def test_a_restricted_graph_survives(tmp_path: Path) -> None:
    graph = build()
    zero = graph.restrict(list(graph.edges)[::2], ablation="zero")
    assert load_graph(save_graph(zero, tmp_path / "zero")).edges == zero.edges
    whole = Graph(tuple(dataclasses.replace(s, ports=tuple(uncut(p) for p in s.ports)) for s in graph.stages))
    resampled = whole.restrict(list(whole.edges)[::2], ablation="resample")
    loaded = load_graph(save_graph(resampled, tmp_path / "resampled"))
    assert loaded.resample is True
    assert_same_graph(resampled, loaded)


def uncut(port: Port) -> Port:
    return dataclasses.replace(port, edges=None, offset=None)


def test_a_loaded_graph_does_not_depend_on_its_folder(tmp_path: Path, by_hand: Path) -> None:
    before = contents(by_hand)
    loaded = load_graph(by_hand)
    loaded.stages[0].core.table.add_(1)  # in place, which graphs never do themselves
    assert contents(by_hand) == before
    loaded = load_graph(by_hand)
    save_graph(build(1), by_hand, overwrite=True)
    assert_same_graph(build(), loaded)
    save_graph(loaded, by_hand, overwrite=True)
    shutil.rmtree(by_hand)
    assert_same_graph(build(), loaded)


def test_sizes_bound_by_a_caller_do_not_matter(by_hand: Path) -> None:
    with jaxtyped("context"):
        assert isinstance(torch.zeros(3), Float[Tensor, " d_model"])
        assert_same_graph(build(), load_graph(by_hand))


def test_parameters_that_need_gradients_are_stored_as_plain_tensors(tmp_path: Path) -> None:
    graph = build()
    live = torch.nn.Parameter(graph.stages[0].core.table.clone())
    stage = dataclasses.replace(graph.stages[0], core=Lookup(live))
    graph = dataclasses.replace(graph, stages=(stage, *graph.stages[1:]))
    loaded = load_graph(save_graph(graph, tmp_path / "g"))
    table = loaded.stages[0].core.table
    assert type(table) is Tensor
    assert not table.requires_grad
    assert torch.equal(table, live.detach())


def test_results(tmp_path: Path) -> None:
    results = {"a": [1, 0.1, "é<script>", None, True], "bad": (float("nan"), float("-inf")), 3: {"x": -0.0}}
    folder = save_graph(build(), tmp_path / "g", results=results)
    expected = {"a": [1, 0.1, "é<script>", None, True], "bad": [None, None], "3": {"x": -0.0}}
    assert load_results(folder) == expected == finite(results)
    assert load_results(save_graph(build(), tmp_path / "empty", results={})) == {}
    assert load_results(save_graph(build(), tmp_path / "none")) == {}
    with pytest.raises(StorageError, match="there is no folder"):
        load_results(tmp_path / "nowhere")
    for wrong, message in [
        ("[1]", "must hold an object"),
        ("{", "not valid JSON"),
        ("NaN", "not a JSON number"),
    ]:
        (folder / "results.json").write_text(wrong)
        with pytest.raises(CorruptFileError, match=message):
            load_results(folder)


# ---- saving what cannot be saved -----------------------------------------------------------------------


def replace_info(**info: Any) -> Graph:
    return dataclasses.replace(build(), info={**INFO, **info})


@dataclasses.dataclass(frozen=True, eq=False)
class Unregistered(Identity):
    pass


def foreign_map() -> Graph:
    graph = build()
    return dataclasses.replace(
        graph, stages=(dataclasses.replace(graph.stages[0], write=Unregistered(6)), *graph.stages[1:])
    )


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace_info(kl=float("nan")), "not plain JSON"),
        (lambda: replace_info(path=Path("x")), "not plain JSON"),
        (lambda: replace_info(shape=(1, 2)), "no tuples"),
        (lambda: replace_info(by_layer={0: "a"}), "strings as keys"),
        (lambda: replace_info(name="\ud800"), "lone surrogate"),
        (lambda: replace_info(deep=nested(70)), "nested more than"),
        (lambda: replace_info(n_ctx=0), "n_ctx must be a positive integer"),
        (lambda: replace_info(n_ctx=6), "n_ctx is 6: pos_embed has 5 rows"),
        (lambda: dataclasses.replace(build(), modules={"nobody": "a"}), "modules puts 'nobody'"),
        (foreign_map, "not registered"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path, make: Callable[[], Graph], message: str) -> None:
    with pytest.raises(InputError, match=message):
        save_graph(make(), tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


def test_results_that_are_not_plain_are_not_saved(tmp_path: Path) -> None:
    circular: dict[str, Any] = {}
    circular["me"] = circular
    for wrong in ({"a": torch.zeros(1)}, {"a": {1, 2}}, circular, {"a": nested(70)}):
        with pytest.raises(InputError, match="cannot be stored"):
            save_graph(build(), tmp_path / "g", results=wrong)
    assert list(tmp_path.iterdir()) == []


UNUSABLE = [(kind, float(x)) for kind in [*DTYPES, torch.float8_e5m2] for x in ("nan", "inf", "-inf")]
UNUSABLE += [(torch.float8_e4m3fn, float("nan"))]  # it has no infinity


@pytest.mark.parametrize(("dtype", "value"), UNUSABLE, ids=str)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    graph = build(dtype=dtype)
    folder = save_graph(graph, tmp_path / "g")
    bad = graph.stages[2].bias.float()
    bad[3] = value
    weights = load_file(folder / "weights.safetensors")
    save_file(weights | {"2.bias": bad.to(dtype)}, folder / "weights.safetensors")
    with pytest.raises(NonFiniteError, match=r"'2\.bias' holds NaN or inf"):
        load_graph(folder)
    stages = list(graph.stages)
    stages[2] = dataclasses.replace(stages[2], bias=bad.to(dtype))
    with pytest.raises(NonFiniteError, match=r"'2\.bias' holds NaN or inf"):
        save_graph(dataclasses.replace(graph, stages=tuple(stages)), tmp_path / "h")
    assert not (tmp_path / "h").exists()


# ---- all or nothing ------------------------------------------------------------------------------------


class Steps:
    """Calls ``before(n)`` ahead of the n-th thing done to the disk."""

    def __init__(self, patch: pytest.MonkeyPatch, before: Callable[[int], None], exchange: bool) -> None:
        self.n = 0
        self.before = before
        for module, name in [(os, "fsync"), (os, "replace"), (files, "save_file"), (files, "_exchange")]:
            patch.setattr(module, name, self.watch(getattr(module, name)))
        if not exchange:
            patch.setattr(files, "_exchange", lambda a, b: False)

    def watch(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            n, self.n = self.n, self.n + 1
            self.before(n)
            return real(*args)

        return wrapper


def which(folder: Path) -> str:
    """The old graph or the new one, by weights, facts and results together."""
    graph = load_graph(folder)
    seed = graph.info["seed"]
    assert_same_graph(marked(seed), graph)
    assert load_results(folder) == {"seed": seed}
    return ["old", "new"][seed]


def marked(seed: int) -> Graph:
    """A graph of two stages, to be saved often."""
    table = torch.full((3, 2), float(seed))
    embed = Stage(("embed",), "embed", -1, (), Lookup(table), Identity(2), (2,), (0, 0))
    read = Port("in", (Read(Dense(table), (3,)),))
    unembed = Stage(("unembed",), "unembed", 0, (read,), Readout(), None, (3,), (0, 1))
    return Graph((embed, unembed), {"seed": seed})


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whichever_step_fails_the_old_or_the_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, exchange: bool
) -> None:
    old, home = save_graph(marked(0), tmp_path / "old", results={"seed": 0}), tmp_path / "home"
    outcomes, messages = [], set()
    home.mkdir()
    folder = home / "g"
    for fail_at in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)

        def fail(n: int, fail_at: int = fail_at) -> None:
            if n == fail_at:
                raise error

        with monkeypatch.context() as patch:
            steps = Steps(patch, fail, exchange)
            try:
                save_graph(marked(1), folder, results={"seed": 1}, overwrite=True)
                outcomes.append("saved")
            except StorageError as raised:
                outcomes.append("refused")
                messages.add(str(raised))
            except KeyboardInterrupt:
                outcomes.append("interrupted")
        assert which(folder) in {"saved": ["new"], "refused": ["old"]}.get(outcomes[-1], ["old", "new"])
        assert os.listdir(home) == ["g"]
        if steps.n <= fail_at:
            break
    assert outcomes[-1] == "saved"  # the one in which no step was left to fail
    assert len(outcomes) > 10
    if isinstance(error, OSError):
        assert "refused" in outcomes
        assert messages == {f"cannot write {folder}: {error}; nothing was changed"}  # no temporary name
    else:
        assert set(outcomes[:-1]) == {"interrupted"}


@pytest.mark.parametrize("exchange", [True, False])
def test_at_every_moment_the_old_or_the_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    folder, seen = save_graph(marked(0), tmp_path / "g", results={"seed": 0}), []

    def look(n: int) -> None:
        aside = list(tmp_path.glob(".g.*.old"))
        assert not (exchange and aside)
        seen.append(which(folder if folder.exists() else aside[0]))

    with monkeypatch.context() as patch:
        Steps(patch, look, exchange)
        save_graph(marked(1), folder, results={"seed": 1}, overwrite=True)
    assert seen == sorted(seen, reverse=True)  # old, old, ..., new
    assert set(seen) == {"old", "new"}
    assert os.listdir(tmp_path) == ["g"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_first_save_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(n: int) -> None:
        if n == 2:
            raise error

    Steps(monkeypatch, fail, True)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        save_graph(build(), tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system's own refusal, as on a full disk.

    Only around the lines that write: the limit holds for the whole process, pytest's own log with it.
    """
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 3000])  # refused in the middle of the weights, and of graph.json
def test_a_disk_that_is_really_full(tmp_path: Path, size: int) -> None:
    folder = save_graph(build(), tmp_path / "g")
    assert (folder / "graph.json").stat().st_size > 3000
    before = contents(tmp_path)
    with files_limited_to(size):
        with pytest.raises(StorageError, match=r"cannot write .*/g: .*too large.*; nothing was changed"):
            save_graph(build(1), folder, overwrite=True)
        with pytest.raises(StorageError, match="nothing was changed"):
            write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(2000)})
        with pytest.raises(StorageError, match="nothing was changed"):
            write_text(folder / "graph.json", "x" * 4000)
    assert contents(tmp_path) == before


def test_files_get_the_rights_that_the_user_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "plain folder").mkdir()
    folder = save_graph(build(), tmp_path / "g", results={})
    assert {p.stat().st_mode for p in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert folder.stat().st_mode == (tmp_path / "plain folder").stat().st_mode


def test_a_folder_replaced_while_it_is_read(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        save_graph(build(1), by_hand, overwrite=True)  # same tables, other weights
        return read_tensors(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_tensors", slow)
        with pytest.raises(StorageError, match="was replaced by another graph while it was read"):
            load_graph(by_hand)
    assert_same_graph(build(1), load_graph(by_hand))


# ---- other people's folders ----------------------------------------------------------------------------


def a_file(path: Path) -> None:
    path.write_text("precious")


def another_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("precious")


def anothers_graph(path: Path) -> None:
    path.mkdir()
    (path / "graph.json").write_text('{"nodes": []}')


def broken_graph(path: Path) -> None:
    path.mkdir()
    (path / "graph.json").write_text('{"format": "unweave-graph"')


def with_notes(path: Path) -> None:
    save_graph(build(), path)
    (path / "notes.md").write_text("precious")


def with_subfolder(path: Path) -> None:
    save_graph(build(), path)
    (path / "report.html").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_file, "in, a file"),
        (another_folder, "not a graph folder"),
        (anothers_graph, "not a graph folder"),
        (broken_graph, "not a graph folder"),
        (with_notes, "holds 'notes.md', not from unweave"),
        (with_subfolder, "holds 'report.html', not from unweave"),
    ],
)
def test_what_others_wrote_stays(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "theirs")
    before = contents(tmp_path)
    with pytest.raises(StorageError, match=message):
        save_graph(build(1), tmp_path / "theirs", overwrite=True)
    with pytest.raises(StorageError, match=message):
        check_destination(tmp_path / "theirs", overwrite=True)
    with pytest.raises(StorageError, match=r"choose another name|pass overwrite=True"):
        save_graph(build(1), tmp_path / "theirs")
    assert contents(tmp_path) == before


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    a_file(tmp_path / "f")
    with pytest.raises(StorageError, match="is, or lies in, a file"):
        save_graph(build(), tmp_path / "f" / "g")
    with pytest.raises(StorageError, match="cannot look into"):
        save_graph(build(), tmp_path / ("x" * 300))


def test_a_graph_is_replaced_only_when_asked_and_as_a_whole(tmp_path: Path) -> None:
    folder = save_graph(build(), tmp_path / "g", results={"a": 1})
    (folder / "report.html").write_text("about the old graph")
    (folder / ".report.html.12345678.part").write_text("left by a kill")
    with pytest.raises(StorageError, match=r"pass overwrite=True \(--overwrite\)"):
        save_graph(build(1), folder)
    assert load_results(folder) == {"a": 1}
    save_graph(build(1), folder, overwrite=True)
    assert sorted(os.listdir(folder)) == ["graph.json", "weights.safetensors"]
    assert_same_graph(build(1), load_graph(folder))
    edit(folder, lambda head: head.update(version=2))
    save_graph(build(), folder, overwrite=True)  # a graph of a newer version is still a graph
    assert os.listdir(tmp_path) == ["g"]


def test_empty_folders_and_links_are_filled(tmp_path: Path) -> None:
    for name in ("empty", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("made")
    check_destination(tmp_path / "empty")
    for name in ("empty", "link", "dangling"):
        assert_same_graph(build(), load_graph(save_graph(build(), tmp_path / name)))
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "link", "made", "target"]


# ---- folders from strangers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no folder"),
        (a_file, "there is no folder"),
        (another_folder, "has no graph.json"),
    ],
)
def test_what_is_no_graph_folder(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(StorageError, match=message):
        load_graph(tmp_path / "x")


def at(head: dict[str, Any], path: str) -> Any:
    value: Any = head
    for key in path.split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """The change of graph.json that sets the value at a path."""
    parent, _, key = path.rpartition("/")

    def change(head: dict[str, Any]) -> None:
        where = at(head, parent) if parent else head
        where[int(key) if isinstance(where, list) else key] = value

    return change


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    parent, _, key = path.rpartition("/")
    return lambda head: (at(head, parent) if parent else head).pop(key)


EMBED, ATTN, Q = "stages/0", "stages/2/core", "stages/2/ports/0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", "onnx"), "not an unweave-graph file"),
        (drop("format"), "not an unweave-graph file"),
        (put("version", 2), "version 2.*update unweave"),
        (put("version", True), "version True"),
        (drop("version"), "version None"),
        (drop("tensors"), "'tensors' must be a dict"),
        (put("info", []), "'info' must be a dict"),
        (put("resample", 1), "'resample' must be a bool"),
        (put("stages", []), "needs stages"),
        (put("stages/0", 3), "must be a list of stages"),
        (put("stages", [1, 2]), "must be a list of stages"),
        (drop("stages/0/type"), "unknown type None"),
        (put("stages/0", {"type": "Identity", "size": 6}), "must be a list of stages"),
        (put(f"{EMBED}/core/type", "os.system"), "unknown type 'os.system'"),
        (put(f"{EMBED}/core/type", "Checkpoint"), "unknown type 'Checkpoint'"),
        (put(f"{EMBED}/core/type", ["Lookup"]), "unknown type|unhashable"),
        (put(f"{EMBED}/core/extra", 1), "has no field"),
        (drop(f"{EMBED}/core/table"), "table"),
        (put(f"{EMBED}/core/table", {"tensor": "../../etc/passwd"}), "not in the weights file"),
        (put(f"{EMBED}/core/table", {"tensor": [1]}), "not in the weights file|unhashable"),
        (put(f"{EMBED}/core/table", [[0.0] * 6] * 7), "table"),
        (put(f"{EMBED}/core/scale", "2"), "scale"),
        (put(f"{EMBED}/core/scale", True), "scale"),
        (put(f"{EMBED}/layer", 0.5), "layer"),
        (put(f"{EMBED}/nodes", "embed"), "nodes"),
        (put(f"{EMBED}/core", {"type": "Identity", "size": 6}), "core"),
        (put(f"{EMBED}/write", None), "writes nothing but is not the last"),
        (put(f"{EMBED}/code_widths", [5]), "does not fit its codes"),
        (put(f"{EMBED}/visible", [0, 9]), "sees stages 0..9"),
        (put(f"{EMBED}/visible", [0]), "visible"),
        (put("stages/1/nodes", ["embed"]), "two nodes are named 'embed'"),
        (put(f"{ATTN}/n_heads", "2"), "n_heads"),
        (put(f"{ATTN}/causal", 1), "causal"),
        (put(f"{ATTN}/rotary", {"dict": {}}), "rotary"),
        (put(f"{ATTN}/rotary/inv_freq", {"tensor": "2.ports.0.edges"}), "inv_freq"),
        (put("stages/3/core/name", "eval"), "unknown activation 'eval'"),
        (put(f"{Q}/edges", {"tensor": "3.ports.0.edges"}), "edges|edge table|offset"),
        (put(f"{Q}/offset", {"tensor": "3.ports.0.offset"}), "offset"),
        (put(f"{Q}/reads/0/map/right/pivots", {"tensor": "2.bias"}), "pivots"),
        (put(f"{Q}/reads/0/map/right/pivots", {"tensor": "2.ports.0.reads.0.map.right.others"}), "pivots"),
        (put(f"{Q}/reads/0/map", {"type": "Stacked", "maps": []}), "index out of range"),
        (put("stages/1/core/table", {"tensor": "0.core.table"}), "a tensor is not used"),
        (put("tensors/2.bias/dtype", "float64"), r"'2\.bias' is"),
        (put("tensors/2.bias/shape", [7]), r"'2\.bias' is"),
        (put("tensors/2.bias", None), r"'2\.bias' is"),
        (put("tensors/ghost", {"dtype": "bool", "shape": []}), r"same tensors \('ghost'\)"),
        (drop("tensors/2.bias"), r"same tensors \('2\.bias'\)"),
        (put("info/n_ctx", -5), "n_ctx must be a positive integer"),
        (put("info/n_ctx", True), "n_ctx must be a positive integer"),
        (put("info/n_ctx", 5.0), "n_ctx must be a positive integer"),
        (put("info/d_model", 1 << 40), "d_model must be a positive integer"),
        (put("info/d_vocab", "7"), "d_vocab must be a positive integer"),
        (put("info/d_vocab", 8), "d_vocab is 8: embed has 7 rows"),
        (put("modules", {"embed": 3}), "modules"),
        (put("modules", {"unknown": "m"}), "modules puts 'unknown'"),
    ],
)
def test_a_hostile_graph_file(by_hand: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(by_hand, change)
    with pytest.raises(CorruptFileError, match=message) as caught:
        load_graph(by_hand)
    assert str(by_hand) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"format": "unweave-graph", "version": 1', "not valid JSON"),
        (b'{"format": "\xff"}', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'"just a string"', "not an unweave-graph file"),
        (b" " * 10_001, "larger than 10000 bytes"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_hostile_json(by_hand: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    if message.startswith("larger"):
        monkeypatch.setattr(files, "MAX_JSON_BYTES", 10_000)
    (by_hand / "graph.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=message):
        load_graph(by_hand)


def test_json_within_the_limits_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10_000)
    (tmp_path / "a.json").write_bytes(b"[" * 64 + b"0" + b"]" * 64 + b" " * (10_000 - 129))
    assert read_json(tmp_path / "a.json") == nested(64)


def header(**entries: tuple[str, list[int], list[int]]) -> bytes:
    keys = ("dtype", "shape", "data_offsets")
    return json.dumps({name: dict(zip(keys, entry, strict=True)) for name, entry in entries.items()}).encode()


@pytest.mark.parametrize(
    ("head", "length", "data"),
    [
        (header(a=("F32", [1 << 40], [0, 1 << 42])), None, b"0" * 8),  # more than the file holds
        (header(a=("F32", [4], [0, 8])), None, b"0" * 8),  # more than its own span
        (header(a=("F32", [2], [0, 8]), b=("F32", [2], [0, 8])), None, b"0" * 8),  # overlapping
        (header(a=("F32", [2], [0, 8])), None, b"0" * 16),  # bytes that belong to nothing
        (header(a=("F32", [2], [8, 16])), None, b"0" * 16),  # a gap
        (header(a=("F32", [-2], [0, 8])), None, b"0" * 8),
        (header(a=("F32", [0, 1 << 63], [0, 0])), None, b""),
        (header(a=("F32", [1 << 32, 1 << 32], [0, 0])), None, b""),
        (header(a=("PICKLE", [2], [0, 8])), None, b"0" * 8),
        (header(a=("F32", [2], [0, 8])), 1 << 60, b"0" * 8),
        (header(a=("F32", [2], [0, 8])), 10_000, b"0" * 8),
        (b"[" * 100_000, None, b""),
        (b"not json", None, b""),
        (b"", 0, b""),
    ],
    ids=str,
)
def test_a_header_that_lies(tmp_path: Path, head: bytes, length: int | None, data: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)
    with pytest.raises(CorruptFileError, match="not a valid safetensors file"):
        read_tensors(path)


def test_truncated_weights_are_refused(by_hand: Path) -> None:
    whole = (by_hand / "weights.safetensors").read_bytes()
    for length in (0, 7, 8, 100, len(whole) - 1):
        (by_hand / "weights.safetensors").write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match="not a valid safetensors file"):
            load_graph(by_hand)


def test_a_pickle_is_not_opened(by_hand: Path) -> None:
    torch.save({"0.core.table": torch.zeros(7, 6)}, by_hand / "weights.safetensors")
    with pytest.raises(CorruptFileError, match="not a valid safetensors file"):
        load_graph(by_hand)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights, and the table in graph.json with them."""
    weights = load_file(folder / "weights.safetensors")
    change(weights)
    save_file(weights, folder / "weights.safetensors")
    names = {name: {"dtype": str(t.dtype)[6:], "shape": list(t.shape)} for name, t in weights.items()}
    edit(folder, put("tensors", names))


def test_tensors_beside_the_graph_are_refused(by_hand: Path) -> None:
    rewrite(by_hand, lambda weights: weights.update({"payload": torch.zeros(3)}))
    with pytest.raises(CorruptFileError, match="a tensor is not used"):
        load_graph(by_hand)


def test_a_tensor_named_like_a_path_is_refused(by_hand: Path) -> None:
    rewrite(by_hand, lambda weights: weights.update({"../../x": weights.pop("2.bias")}))
    edit(by_hand, put("stages/2/bias", {"tensor": "../../x"}))
    with pytest.raises(CorruptFileError, match="not named after where it is first used"):
        load_graph(by_hand)
    assert [p.name for p in by_hand.parent.iterdir()] == ["g"]


def test_an_empty_tensor_cannot_claim_any_size(by_hand: Path) -> None:
    rewrite(by_hand, lambda weights: weights.update({"2.bias": torch.zeros(0, 1 << 40)}))
    with pytest.raises(CorruptFileError, match="has a side of 1099511627776"):
        load_graph(by_hand)


def test_an_edge_is_true_or_false(by_hand: Path) -> None:
    path = by_hand / "weights.safetensors"
    table = bytes(load_file(path)["3.ports.0.edges"].view(torch.uint8).flatten().tolist())
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    start = 8 + size + json.loads(content[8 : 8 + size])["3.ports.0.edges"]["data_offsets"][0]
    assert content[start : start + 4] == table == b"\x01\x00\x01\x01"
    path.write_bytes(content[:start] + b"\x07" + content[start + 1 :])
    with pytest.raises(CorruptFileError, match="neither true nor false"):
        load_graph(by_hand)


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors", "results.json"])
def test_links_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    folder = save_graph(build(), tmp_path / "g", results={"a": 1})
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptFileError, match="a link that leads out of the folder"):
        load_results(folder) if name == "results.json" else load_graph(folder)
    (tmp_path / "secret").rename(folder / "elsewhere")
    (folder / name).unlink()
    (folder / name).symlink_to("elsewhere")
    assert_same_graph(build(), load_graph(folder))  # a link that stays inside does no harm
    assert load_results(folder) == {"a": 1}


@pytest.mark.parametrize("name", ["weights.safetensors", "results.json"])
def test_pipes_are_not_waited_for(by_hand: Path, name: str) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    (by_hand / name).unlink(missing_ok=True)
    os.mkfifo(by_hand / name)
    with pytest.raises(StorageError, match="is not a file"):
        load_results(by_hand) if name == "results.json" else load_graph(by_hand)


def test_a_missing_weights_file(by_hand: Path) -> None:
    (by_hand / "weights.safetensors").unlink()
    with pytest.raises(StorageError, match=r"weights\.safetensors does not exist"):
        load_graph(by_hand)


def places(value: Any, path: str = "") -> Iterator[str]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, child in pairs:
        yield f"{path}{key}"
        yield from places(child, f"{path}{key}/")


JUNK = [
    None,
    True,
    -1,
    0,
    1 << 70,
    0.5,
    "",
    "embed",
    [],
    [[]],
    {},
    {"tensor": "2.bias"},
    {"dict": {}},
    {"type": "Dense"},
]


def test_no_change_of_the_graph_file_brings_another_error(by_hand: Path) -> None:
    whole = json.loads((by_hand / "graph.json").read_text())
    everywhere = [path for path in places(whole) if "./" not in path and not re.match(r"tensors/", path)]
    chance, refused, loaded = random.Random(0), 0, 0
    for _ in range(120):
        head = copy.deepcopy(whole)
        put(chance.choice(everywhere), copy.deepcopy(chance.choice(JUNK)))(head)
        (by_hand / "graph.json").write_text(json.dumps(head))
        try:
            load_graph(by_hand)
            loaded += 1
        except UnweaveError:
            refused += 1
    assert refused > 60
    assert loaded > 0


def test_no_change_of_a_byte_of_the_weights_header_brings_another_error(by_hand: Path) -> None:
    path = by_hand / "weights.safetensors"
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    chance, refused = random.Random(0), 0
    for _ in range(150):
        broken = bytearray(whole)
        broken[chance.randrange(8 + size)] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            load_graph(by_hand)
        except UnweaveError:
            refused += 1
    assert refused > 100


# ---- files ---------------------------------------------------------------------------------------------


def test_tensors_of_every_kind_come_back_bit_by_bit(tmp_path: Path) -> None:
    kinds = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.complex64,
    ]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, *DTYPES]
    tensors = {str(kind): (torch.arange(24).reshape(4, 6) % 5).to(kind) for kind in kinds}
    tensors |= {
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 5),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    tensors |= {
        "transposed": torch.randn(3, 5).T,
        "every other": torch.randn(9)[::2],
        "wide": torch.zeros(1).expand(4),
    }
    tensors |= {"a view": tensors["one"].view(1), "/ü x": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "w", tensors, {"note": "ünï"})
    loaded, metadata = read_tensors(str(tmp_path / "w"))
    assert metadata == {"note": "ünï"}
    assert set(loaded) == set(tensors)
    for name, t in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape, bits(loaded[name])) == (
            t.dtype,
            t.shape,
            bits(t.detach()),
        )
        assert not loaded[name].requires_grad


@pytest.mark.parametrize(
    "tensors",
    [
        {"__metadata__": torch.zeros(1)},
        {"a": torch.zeros(1, dtype=torch.complex128)},
        {"\ud800": torch.zeros(1)},
    ],
    ids=["name of the notes", "dtype", "surrogate"],
)
def test_tensors_that_the_format_lacks_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(InputError):
        write_tensors(tmp_path / "w", tensors)
    assert list(tmp_path.iterdir()) == []


def test_text_and_json_are_written_as_the_plain_way_does(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ünï": {"x": "\x00</script>\n"}}
    write_json(tmp_path / "new" / "a.json", value)
    write_text(str(tmp_path / "a.txt"), "ünï\r\n\x00")
    write_bytes(tmp_path / "b", b"\xff")
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == value
    assert read_json(tmp_path / "new" / "a.json") == value
    assert (tmp_path / "a.txt").read_bytes() == "ünï\r\n\x00".encode()
    assert (tmp_path / "b").read_bytes() == b"\xff"
    write_text(tmp_path / "a.txt", "shorter")
    assert (tmp_path / "a.txt").read_text() == "shorter"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b", "new"]


def test_what_json_cannot_say_is_refused(tmp_path: Path) -> None:
    for wrong in (float("nan"), [float("inf")], {1, 2}, torch.zeros(1), {(1, 2): 3}, "\udc80", b"bytes"):
        with pytest.raises(InputError):
            encode_json(wrong)
        with pytest.raises(InputError):
            write_json(tmp_path / "a.json", wrong)
    with pytest.raises(InputError, match="character 2 of the text is a lone surrogate"):
        write_text(tmp_path / "a.txt", "ab\ud800")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write(temporary: Path) -> None:
        if temporary.is_dir():
            (temporary / "half").write_text("half")
        else:
            temporary.write_text("half")
        raise error

    (tmp_path / "file").write_text("old")
    for attempt in (write_atomic, write_folder):
        with pytest.raises(type(error)) as caught:
            attempt(tmp_path / "file", write)
        assert caught.value is error
    assert contents(tmp_path) == {"file": b"old"}


def test_what_is_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    a_file(tmp_path / "file")
    for path in (tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"cannot write .*; nothing was changed"):
            write_text(path, "x")
    with pytest.raises(StorageError, match="is not a folder; nothing was changed"):
        write_folder(tmp_path / "file", lambda temporary: None)
    with pytest.raises(StorageError, match="is not a file"):
        read_json(tmp_path / "folder")
    with pytest.raises(StorageError, match="does not exist"):
        read_tensors(tmp_path / "nothing")
    assert contents(tmp_path) == {"file": b"precious"}


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("é" * 127), "x")
    assert_same_graph(build(), load_graph(save_graph(build(), tmp_path / ("g" * 255))))


# ---- checkpoints ---------------------------------------------------------------------------------------


@pytest.fixture
def saver(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "sums.safetensors", "means of one graph, on one data set")


def test_a_checkpoint_remembers_the_last_save(saver: Checkpoint) -> None:
    assert saver.load() is None
    for step in (1, 2):
        total = torch.tensor([0.1 * step], dtype=torch.float64)
        saver.save({"sum": total}, {"next_batch": step, "ü": [None]})
    found = Checkpoint(str(saver.path), saver.fingerprint).load()
    assert found is not None
    tensors, state = found
    assert list(tensors) == ["sum"]
    assert bits(tensors["sum"]) == bits(torch.tensor([0.2], dtype=torch.float64))
    assert state == {"next_batch": 2, "ü": [None]}
    saver.save({"sum": tensors["sum"] + 1}, state)  # over the file that the tensors are mapped to
    assert saver.load()[0]["sum"].item() == 1.2
    saver.clear()
    saver.clear()
    assert saver.load() is None
    assert list(saver.path.parent.iterdir()) == []


def test_clearing_takes_what_kills_left_and_nothing_else(saver: Checkpoint) -> None:
    saver.save({}, {})
    neighbours = [
        "other",
        ".sums.safetensors.2.0123abcd.part",
        ".sums.safetensors.old",
        "sums.safetensors.part",
    ]
    for name in [*neighbours, ".sums.safetensors.0123abcd.part"]:
        (saver.path.parent / name).touch()
    saver.clear()
    assert sorted(os.listdir(saver.path.parent)) == sorted(neighbours)


def test_the_checkpoint_of_another_pass_is_refused(saver: Checkpoint) -> None:
    saver.save({}, {})
    with pytest.raises(InputError, match=r"sums\.safetensors is of another pass or other data; delete it"):
        Checkpoint(saver.path, "another").load()
    save_file({"w": torch.zeros(1)}, saver.path)  # somebody's model
    with pytest.raises(InputError, match="is not a checkpoint of unweave; choose another path"):
        saver.load()
    assert saver.path.exists()


@pytest.mark.parametrize("state", ["{", "[1]", '{"a": NaN}', ""])
def test_a_checkpoint_with_a_broken_state(saver: Checkpoint, state: str) -> None:
    save_file({}, saver.path, {"fingerprint": saver.fingerprint, "state": state})
    with pytest.raises(CorruptFileError, match=r"sums\.safetensors: its state is not .*delete it"):
        saver.load()


def test_a_truncated_checkpoint(saver: Checkpoint) -> None:
    saver.save({"sum": torch.zeros(100)}, {})
    saver.path.write_bytes(saver.path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="delete it to start afresh"):
        saver.load()


def test_a_failed_checkpoint_keeps_the_last(saver: Checkpoint) -> None:
    saver.save({"sum": torch.ones(3)}, {"next_batch": 1})
    with pytest.raises(InputError, match="not plain JSON"):
        saver.save({"sum": torch.ones(3)}, {"loss": float("nan")})
    with files_limited_to(1000), pytest.raises(StorageError, match="nothing was changed"):
        saver.save({"sum": torch.ones(3000)}, {"next_batch": 2})
    found = saver.load()
    assert found is not None
    assert (found[0]["sum"].tolist(), found[1]) == ([1, 1, 1], {"next_batch": 1})
    assert list(saver.path.parent.iterdir()) == [saver.path]
