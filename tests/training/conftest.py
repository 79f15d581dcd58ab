"""A small recipe and small data to train on."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from rich.console import Console
from rich.progress import TaskID

from tests.helpers.small_people import render
from tests.helpers.small_runs import options
from training.config.presets import RECIPES, Recipe
from training.data.tracklets import Split, Tracklet
from training.engine.options import make_options
from training.runtime.fields import update
from training.runtime.terminal import Bars, draw_bars_in
from training.train import train

# A busy machine takes as long as it takes over an example.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """A shell's background job, and all that it starts, ignores interrupts, which some tests send."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def recipe() -> Recipe:
    """Recipe `quick` with batches of 3 people, 2 clips, 2 frames."""
    return update(RECIPES["quick"], people=3, clips=2, frames=2, batches=2, epochs=2)


@pytest.fixture
def split() -> Split:
    """Four people seen by two cameras in noise, frames of two sizes, as arrays."""
    rng = np.random.default_rng(0)

    def tracklet(person: int, camera: int) -> Tracklet:
        sizes = [(32, 16), (48, 24)] * 3
        frames = tuple(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes[: 3 + person % 3])
        return Tracklet(person, camera, frames, f"cam{camera}/person{person:03d}")

    train = tuple(tracklet(person, camera) for person in (3, 5, 8, 9) for camera in (1, 2))
    return Split(train, train[::2], train[1::2], "single-shot", "noise")


class _CountedBars(Bars):
    """Bars that are not drawn, and leave what they counted."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.counted: list[tuple[str, float, float | None, str]] = []

    def remove_task(self, task_id: TaskID) -> None:
        (task,) = (task for task in self.tasks if task.id == task_id)
        self.counted.append((task.description, task.completed, task.total, task.fields["unit"]))
        super().remove_task(task_id)


@pytest.fixture
def counted() -> Iterator[list[tuple[str, float, float | None, str]]]:
    """Progress bars that have ended: description, units done, all units, their name."""
    bars = _CountedBars()
    draw_bars_in(bars)
    yield bars.counted
    draw_bars_in(None)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rendered people in the iLIDS-VID layout, four of them to train on."""
    return render(tmp_path_factory.mktemp("data") / "people", people=8)


@pytest.fixture(scope="session")
def run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on the eight people."""
    folder = tmp_path_factory.mktemp("run") / "run"
    small = {"people": 4, "batches": 1, "epochs": 1, "compare_ops": False, "device": "cpu", "check_counts": False}
    train(make_options(dataset="ilids-vid", data_root=small_data, output=folder, pictures=False, **small))
    return folder


@pytest.fixture(scope="module")
def trained(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with pictures."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(options(small_data, run, pictures=True))
    return run
