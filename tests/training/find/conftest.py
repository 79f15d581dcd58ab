"""A small video of rendered people, and the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.small_video import write_video


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of VISITS, with gt.txt next to it."""
    return write_video(tmp_path_factory.mktemp("video") / "people.mp4")


@pytest.fixture
def alone(rendered: Path, tmp_path: Path) -> Path:
    """The same video without boxes next to it."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return Path(shutil.copy(rendered, folder))
