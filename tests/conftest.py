"""Fixtures shared by the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared_dir() -> Path:
    """The folder of real data beside the repository; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside the repository")
    return SHARED


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as they come: what tuning finds differs from machine to machine."""
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "0")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
