from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training import checkpoint
from training.errors import UserError


def network(value: float) -> nn.Linear:
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, value)
    return linear


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, network(0.5), {"epoch": 3, "optimizer": {"lr": 0.1}}, {"recipe": {"name": "quick"}})
    for folder in (tmp_path, tmp_path / "last"):
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
    (tmp_path / "last" / name).write_bytes(b"\x00nonsense")
    with pytest.raises(UserError, match="a damaged checkpoint") as told:
        checkpoint.load(tmp_path)
    assert "\n" not in str(told.value)
    (tmp_path / "last" / name).unlink()
    with pytest.raises(UserError, match=f"no checkpoint here \\({name} is missing\\)"):
        checkpoint.load(tmp_path)
