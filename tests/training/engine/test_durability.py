"""Processes that are killed at every step they take in the file system, and what they leave."""

from __future__ import annotations

import os
import resource
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.helpers.file_size import file_size_limit
from tests.helpers.forked import exit_code
from training.engine import checkpoint
from training.engine.options import Options, make_options
from training.engine.resumable_run import RESULT, run
from training.runtime.errors import UserError


def kill_at(step: int, folder: Path) -> None:
    """Have SIGKILL end this process right before so many-th time it opens, makes, renames, ... something in a folder.

    Writes and syncs, which Python does not audit, happen between two of these steps.
    """
    taken = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal taken
        of_files = event == "open" or event.startswith(("os.", "shutil."))
        if of_files and any(isinstance(path, str | Path) and str(path).startswith(str(folder)) for path in arguments):
            taken += 1
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save(folder: Path, epoch: int) -> None:
    """Save a checkpoint of which every part says which it is."""
    network = nn.Linear(16, 16)
    nn.init.constant_(network.weight, epoch)
    nn.init.constant_(network.bias, epoch)
    checkpoint.save(folder, network, {"epoch": epoch, "step": 10 * epoch}, {"seed": epoch})


def epoch_of_last(folder: Path) -> int:
    """Return the epoch of the whole checkpoint in a folder; 0 for none."""
    if checkpoint.last(folder) is None:
        return 0
    found = checkpoint.load(folder)
    epoch = int(found.training["epoch"])
    assert found.training["step"] == 10 * epoch
    assert found.config == {"seed": epoch}
    assert all((tensor == epoch).all() for tensor in found.model.values())
    return epoch


def save_killed_at(step: int, folder: Path, epoch: int) -> None:
    kill_at(step, folder)
    save(folder, epoch)


@pytest.mark.parametrize("before", [0, 1])
def test_a_kill_at_any_step_of_a_save_leaves_the_checkpoint_before_or_the_new_one(before: int, tmp_path: Path) -> None:
    found = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        folder.mkdir()
        if before:
            save(folder, before)
        ended = exit_code(save_killed_at, step, folder, before + 1)
        found.append(epoch_of_last(folder))
        save(folder, before + 2)  # the run goes on
        assert epoch_of_last(folder) == before + 2
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert set(found) == {before, before + 1}
    assert found == sorted(found)
    assert found.count(before) > 10  # steps of the save were met, not its end alone


def save_killed_in_a_write(size: int, folder: Path, epoch: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process on the spot; Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    save(folder, epoch)


def test_a_kill_in_the_midst_of_a_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-0001").iterdir()}
    assert sizes["model.safetensors"] < sizes["training.pt"]
    cut = "checkpoint-0002"
    for size, name in [(0, "model.safetensors"), (700, "model.safetensors"), (1500, "training.pt")]:
        assert exit_code(save_killed_in_a_write, size, tmp_path, 2) == -signal.SIGXFSZ
        assert (tmp_path / cut / name).stat().st_size == size, "it was to end in this file"
        assert epoch_of_last(tmp_path) == 1
    save(tmp_path, 2)
    assert epoch_of_last(tmp_path) == 2


def test_a_disk_that_is_full_at_any_byte_leaves_the_checkpoint_before_and_no_part_of_another(tmp_path: Path) -> None:
    save(tmp_path, 1)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-0001").iterdir())
    for size in range(0, largest, 97):
        with file_size_limit(size), pytest.raises(OSError, match="checkpoint-0002: File too large") as raised:
            save(tmp_path, 2)
        assert "\n" not in str(raised.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0001", "last"]
        assert epoch_of_last(tmp_path) == 1
    save(tmp_path, 2)
    assert epoch_of_last(tmp_path) == 2


def train_killed_at(step: int, options: Options) -> None:
    assert options.output is not None
    kill_at(step, options.output)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        run(options)


def test_a_run_killed_again_and_again_loses_no_checkpoint_and_ends_with_the_same_weights(
    small_data: Path, tmp_path: Path
) -> None:
    def options(name: str) -> Options:
        small: dict[str, Any] = {"people": 4, "batches": 1, "epochs": 3, "compare_ops": False, "device": "cpu"}
        small["pictures"] = False
        places: dict[str, Any] = {"dataset": "ilids-vid", "data_root": small_data, "output": tmp_path / name}
        return make_options(check_counts=False, **small, **places)

    assert exit_code(train_killed_at, -1, options("straight")) == 0
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    epochs = []
    for life in range(1, 30):
        ended = exit_code(train_killed_at, 5 * life, options("killed"))
        last = checkpoint.last(killed)
        epochs.append(checkpoint.load(killed).training["epoch"] if last else 0)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert epochs == sorted(epochs)
    assert {0, 1, 2, 3} == set(epochs)
    for name in ("model.safetensors", "config.json"):
        assert (killed / "checkpoint-0003" / name).read_bytes() == (straight / "checkpoint-0003" / name).read_bytes()
    assert (killed / RESULT).read_bytes() == (straight / RESULT).read_bytes()


def test_a_checkpoint_cut_short_is_refused_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("model.safetensors", "training.pt", "config.json"):
        path = tmp_path / "checkpoint-0001" / name
        whole = path.read_bytes()
        for size in range(0, len(whole) - 1, max(1, len(whole) // 16)):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match="a damaged checkpoint") as raised:
                checkpoint.load(tmp_path)
            assert "\n" not in str(raised.value)
        path.write_bytes(whole)
    assert epoch_of_last(tmp_path) == 1
