"""Checkpoints that a kill cannot spoil: `RUN/last` always leads to a whole one."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from training.errors import UserError

LAST = "last"
_FOLDERS = "checkpoint-*"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    config: what was trained, on what, with what: `config.json`.
    model: the network's state_dict: `model.safetensors`.
    training: where training stands, the random generators included: `training.pt`.
    """

    config: dict[str, Any]
    model: dict[str, Tensor]
    training: dict[str, Any]


def save(run: Path, network: nn.Module, training: dict[str, Any], config: dict[str, Any]) -> None:
    """Write a checkpoint under `run` and point `run/last` at it; the one before goes only then.

    Args:
        run: an existing folder.
        network: what to keep the tensors of.
        training: `Trainer.state_dict()`; the states of the random generators are added.
        config: JSON values.
    """
    folder = run / _FOLDERS.replace("*", f"{training['epoch']:04d}")
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill during its writing
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    torch.save({**training, "random": _random_state()}, folder / "training.pt")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in (*folder.iterdir(), folder):
        _to_disk(path)
    link = run / f"{LAST}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(run / LAST)
    _to_disk(run)
    for old in run.glob(_FOLDERS):
        if old != folder:
            shutil.rmtree(old)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: its folder, or that of the run, whose last one is meant.

    Raises:
        UserError: there is none, or a file of it cannot be read.
    """
    folder = path / LAST if (path / LAST).is_dir() else path
    for name in ("config.json", "model.safetensors", "training.pt"):
        if not (folder / name).is_file():
            raise UserError(f"{path}: no checkpoint here ({name} is missing)")
    try:
        return Checkpoint(
            config=json.loads((folder / "config.json").read_text()),
            model=safetensors.torch.load_file(folder / "model.safetensors"),
            training=torch.load(folder / "training.pt", map_location="cpu", weights_only=True),
        )
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: a damaged checkpoint ({reason})") from error


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every random generator to where it stood at `save`; CUDA's only where there are as many devices."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.uint32)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
