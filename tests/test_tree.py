"""Trees of frozen dataclasses: walking, replacing, and turning into JSON and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave import tree
from unweave.errors import CorruptFileError


@tree.register
@dataclass(frozen=True, eq=False)
class TreeTestBox:
    weight: Tensor
    inner: Any = None
    count: int = 1


@dataclass(frozen=True, eq=False)
class TreeTestStranger:
    weight: Tensor


def boxes() -> tuple[TreeTestBox, Tensor, Tensor]:
    """A tree in which one tensor is used twice, with a tuple, a list and a mapping on the way."""
    a, b = torch.arange(3.0), torch.ones(2, dtype=torch.bool)
    return TreeTestBox(a, (TreeTestBox(b, [a, "text"]), {"key": TreeTestBox(a.clone(), None, 7)})), a, b


def test_leaves_come_in_order_and_ties_as_often_as_they_are_used():
    root, a, b = boxes()
    found = list(tree.leaves(root))
    assert [path for path, _ in found] == [
        "weight",
        "inner.0.weight",
        "inner.0.inner.0",
        "inner.1.key.weight",
    ]
    assert [t is a for _, t in found] == [True, False, True, False]
    assert list(tree.tensors(root)) == ["weight", "inner.0.weight", "inner.1.key.weight"]
    assert tree.tensors(root)["inner.0.weight"] is b


def test_a_tensor_alone_is_a_tree():
    a = torch.ones(2)
    assert [path for path, _ in tree.leaves(a)] == [""]
    assert torch.equal(tree.map_tensors(a, torch.neg), -a)


def test_map_tensors_maps_every_leaf_once_and_keeps_ties():
    root, a, _ = boxes()
    calls = []

    def double(t: Tensor) -> Tensor:
        calls.append(t)
        return t + t

    new = tree.map_tensors(root, double)
    assert len(calls) == 3
    assert new.inner[0].inner[0] is new.weight
    for (path, old), (new_path, now) in zip(tree.leaves(root), tree.leaves(new), strict=True):
        assert path == new_path
        assert torch.equal(now, old + old)
    assert torch.equal(a, torch.arange(3.0))
    assert new.inner[1]["key"].count == 7
    assert new.inner[0].inner[1] == "text"
    assert isinstance(new.inner[0].inner, list)


def test_what_does_not_change_is_shared():
    root, _, _ = boxes()
    part = TreeTestBox(torch.ones(1))
    assert tree.map_tensors(part, lambda t: t) is part
    new = tree.replace_tensors(root, {"inner.1.key.weight": torch.zeros(3)})
    assert new.inner[0] is root.inner[0]


def test_replace_tensors_replaces_a_tied_tensor_wherever_it_stands():
    root, _, b = boxes()
    zero = torch.zeros(3)
    new = tree.replace_tensors(root, {"weight": zero})
    assert new.weight is zero
    assert new.inner[0].inner[0] is zero
    assert new.inner[0].weight is b
    assert torch.equal(new.inner[1]["key"].weight, torch.arange(3.0))


def test_pack_and_unpack_through_json_give_the_same_tree():
    root, _, _ = boxes()
    plain, weights = tree.pack(root)
    back = tree.unpack(json.loads(json.dumps(plain)), weights)
    assert isinstance(back, TreeTestBox)
    assert back.inner[0].inner[0] is back.weight
    assert back.inner[0].inner[1] == "text"
    assert back.inner[1]["key"].count == 7
    for (path, old), (new_path, now) in zip(tree.leaves(root), tree.leaves(back), strict=True):
        assert path == new_path
        assert now is old


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.just(torch.ones(1)),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=40)
@given(values)
def test_any_plain_tree_survives_a_round_trip(value):
    plain, weights = tree.pack(value)
    assert _same(tree.unpack(json.loads(json.dumps(plain)), weights), value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def test_only_registered_dataclasses_of_distinct_names_are_branches():
    assert tree.register(TreeTestBox) is TreeTestBox
    with pytest.raises(TypeError, match="must be a dataclass"):
        tree.register(int)
    with pytest.raises(TypeError, match="named TreeTestBox is registered already"):
        tree.register(dataclass(type("TreeTestBox", (), {})))


@pytest.mark.parametrize("value", [TreeTestStranger(torch.ones(1)), {1, 2}, object(), 1j, b"bytes"])
def test_pack_refuses_what_could_not_be_loaded(value):
    with pytest.raises(TypeError, match=r"cannot be stored"):
        tree.pack({"inside": value})


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"tensor": "w"}, "'w' is not in the weights file"),
        ({"tensor": ["w"]}, "is not in the weights file"),
        ({"tensor": None}, "is not in the weights file"),
        ({"type": "system"}, "unknown type 'system'"),
        ({"type": ["TreeTestBox"]}, "unknown type"),
        ({"type": {"tensor": "weight"}}, "unknown type"),
        ({}, "unknown type None"),
        ({"dict": [1]}, "must hold an object"),
        ({"type": "TreeTestBox"}, "not a valid TreeTestBox"),
        ({"type": "TreeTestBox", "weight": 1, "code": "import os"}, r"no field \['code'\]"),
        ({"type": "Activation", "name": "exec"}, "not a valid Activation: unknown activation 'exec'"),
    ],
)
def test_unpack_refuses_hostile_data_and_says_where(plain, message):
    with pytest.raises(CorruptFileError, match=message) as caught:
        tree.unpack({"dict": {"a": [1, plain]}}, {"weight": torch.ones(1)}, "graph.json")
    assert str(caught.value).startswith("graph.json.a[1]")
