"""Shared fixtures. Tests that need ../shared skip where it is not there, as for every user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unweave
from unweave.data import TokenData

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "models").is_dir():
        pytest.skip("needs the models of ../shared, which only the developers have")
    return SHARED


@pytest.fixture(scope="session")
def induction() -> unweave.Graph:
    return unweave.capture("zoo:induction")


@pytest.fixture(scope="session")
def induction_data() -> TokenData:
    return unweave.load_data("zoo:induction", limit=24)
