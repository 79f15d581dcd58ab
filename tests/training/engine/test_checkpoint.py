from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.file_size import file_size_limit
from training.engine import checkpoint
from training.runtime.errors import UserError


def network(value: float) -> nn.Linear:
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, value)
    return linear


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, network(0.5), {"epoch": 3, "optimizer": {"lr": 0.1}}, {"recipe": {"name": "quick"}})
    for folder in (tmp_path, tmp_path / "checkpoint-0003"):
        found = checkpoint.load(folder)
        assert found.model["weight"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert found.training["epoch"] == 3
        assert found.config == {"recipe": {"name": "quick"}}


def test_every_random_generator_continues_where_it_stood(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    checkpoint.save(tmp_path, network(0.0), {"epoch": 1}, {})
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.restore_random_state(checkpoint.load(tmp_path).training["random"])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


def test_only_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        checkpoint.save(tmp_path, network(epoch), {"epoch": epoch}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0003", "last"]


def test_a_save_that_ends_midway_leaves_the_one_before_and_can_be_repeated(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, network(1.0), {"epoch": 1}, {})
    with pytest.raises((AttributeError, TypeError)):  # no generator can be pickled
        checkpoint.save(tmp_path, network(2.0), {"epoch": 2, "unsaveable": (x for x in "")}, {})
    assert (tmp_path / "checkpoint-0002" / "model.safetensors").exists()
    assert checkpoint.load(tmp_path).model["weight"][0, 0] == 1.0
    checkpoint.save(tmp_path, network(2.0), {"epoch": 2}, {})
    assert checkpoint.load(tmp_path).model["weight"][0, 0] == 2.0


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.pt"])
def test_a_damaged_or_missing_file_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, network(1.0), {"epoch": 1}, {})
    (tmp_path / "checkpoint-0001" / name).write_bytes(b"\x00nonsense")
    with pytest.raises(UserError, match="a damaged checkpoint") as raised:
        checkpoint.load(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "checkpoint-0001" / name).unlink()
    with pytest.raises(UserError, match=f"no checkpoint here \\({name} is missing\\)"):
        checkpoint.load(tmp_path)


def test_what_merely_looks_like_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-mine").mkdir()
    (tmp_path / "checkpoint-0000").mkdir()
    (tmp_path / "checkpoint-notes.txt").touch()
    for epoch in (1, 2):
        checkpoint.save(tmp_path, network(epoch), {"epoch": epoch}, {})
    left = ["checkpoint-0000", "checkpoint-0002", "checkpoint-mine", "checkpoint-notes.txt", "last"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_run_is_found_from_its_last_checkpoint_and_from_no_copy_of_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, network(1.0), {"epoch": 1}, {})
    copy = shutil.copytree(tmp_path / "checkpoint-0001", tmp_path / "best")
    assert checkpoint.run_folder_of(tmp_path) == checkpoint.run_folder_of(tmp_path / "checkpoint-0001") == tmp_path
    assert checkpoint.run_folder_of(copy) is None


def test_a_copy_without_links_is_a_run_like_any(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", network(1.0), {"epoch": 1}, {})
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    checkpoint.save(copy, network(2.0), {"epoch": 2}, {})
    assert checkpoint.load(copy).model["weight"][0, 0] == 2.0
    assert checkpoint.load(tmp_path / "run").model["weight"][0, 0] == 1.0


@pytest.mark.parametrize("size", [100, 1500])  # in the midst of the tensors, or of what follows them
def test_a_disk_that_fills_up_is_an_os_error_and_spoils_nothing(tmp_path: Path, size: int) -> None:
    checkpoint.save(tmp_path, network(1.0), {"epoch": 1}, {})
    with file_size_limit(size), pytest.raises(OSError, match="checkpoint-0002"):
        checkpoint.save(tmp_path, network(2.0), {"epoch": 2}, {})
    assert checkpoint.load(tmp_path).model["weight"][0, 0] == 1.0


def test_training_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, network(1.0), {"epoch": 1}, {})
    torch.save([1, 2], tmp_path / "checkpoint-0001" / "training.pt")
    with pytest.raises(UserError, match=r"training.pt: a damaged checkpoint \(it does not say"):
        checkpoint.load(tmp_path)
