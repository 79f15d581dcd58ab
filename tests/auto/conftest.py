"""Fixtures of what `auto` runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rru_fast.auto import choice, decisions
from tests.helpers import fake_card


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of decisions, in which calibration is on."""
    path = tmp_path / "rru_fast" / "auto"
    monkeypatch.setattr(decisions, "folder", lambda: path)
    monkeypatch.delenv("RRU_FAST_CALIBRATE")
    for name in ("WORLD_SIZE", "CUDA_MPS_PIPE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this CPU a card, of the scenario that it is called with."""

    def play(scenario: str) -> None:
        for target, value in fake_card.patches(scenario):
            monkeypatch.setattr(target, value)
        choice.forget()

    return play
