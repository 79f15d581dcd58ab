"""Checkpoints that a kill cannot spoil: the file `RUN/last` always names a whole one.

A network to share is a folder too, with config.json and model.safetensors: it can be used, and not trained on.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from training.model.weights import first_line, load_pickle
from training.runtime.atomic_files import fsync_path, realpath, write_atomic
from training.runtime.errors import UserError

CONFIG, MODEL, TRAINING, LAST = "config.json", "model.safetensors", "training.pt", "last"
_SHARED = ("epoch", "identities")  # in the config.json of a network to share: of `export network`, or Hugging Face's


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    folder: the folder.
    config: what was trained, on what, with what: `config.json`.
    model: the network's state_dict: `model.safetensors`.
    training: the trainer's state and that of the random generators: `training.pt`; empty if it is a network to share.
    """

    folder: Path
    config: dict[str, Any]
    model: dict[str, Tensor]
    training: dict[str, Any]

    @property
    def epoch(self) -> int | None:
        """Number of epochs it was trained for; None where that is not recorded."""
        epoch: int | None = self.training.get("epoch", self.config.get("epoch"))
        return epoch


def last(run: Path) -> Path | None:
    """Return the folder of a run's last checkpoint, or None if it has none."""
    try:
        name = (run / LAST).read_text().strip()
    except (OSError, ValueError):
        return None
    return run / name if re.fullmatch(r"checkpoint-\d{4,}", name) else None


def run_folder_of(path: Path) -> Path | None:
    """Return the run that `path` continues: itself, or the one whose last checkpoint it is; None for neither."""
    path = realpath(path)
    if last(path):
        return path
    return path.parent if last(path.parent) == path else None


def save(run: Path, network: nn.Module, training: dict[str, Any], config: dict[str, Any]) -> None:
    """Write a checkpoint under `run` and have `run/last` name it; the one it named before goes only then.

    Args:
        run: an existing folder.
        network: what to keep the tensors of.
        training: `Trainer.state_dict()`; the states of the random generators are added.
        config: JSON values.

    Raises:
        OSError: it cannot be written; the checkpoint before is unharmed.
    """
    before, folder = last(run), run / f"checkpoint-{training['epoch']:04d}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill during its writing
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    state = BytesIO()
    try:
        # Written by Python, which says of a full disk that it is full.
        (folder / MODEL).write_bytes(safetensors.torch.save(tensors))
        torch.save({**training, "random": _random_state()}, state)
        (folder / TRAINING).write_bytes(state.getbuffer())
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for path in (*folder.iterdir(), folder, run):
            fsync_path(path)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # the disk is full enough
        raise OSError(f"{folder}: {error.strerror}") from error
    write_atomic(run / LAST, folder.name + "\n")
    if before not in (None, folder):
        shutil.rmtree(before, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, or a network to share.

    Args:
        path: its folder, or that of the run, whose last one is meant.

    Raises:
        UserError: there is none, or a file of it cannot be read.
    """
    folder, config = load_config(path)
    try:
        model = safetensors.torch.load_file(folder / MODEL)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: a damaged checkpoint ({first_line(error)})") from error
    if not os.path.isfile(folder / TRAINING):
        return Checkpoint(folder, config, model, {})
    training = load_pickle(folder / TRAINING, "a damaged checkpoint")
    if not isinstance(training, dict) or not isinstance(training.get("epoch"), int):
        raise UserError(f"{folder / TRAINING}: a damaged checkpoint (it does not say after which epoch it is)")
    return Checkpoint(folder, config, model, training)


def load_config(path: Path) -> tuple[Path, Any]:
    """Return the folder of a checkpoint and its config; arguments and errors as in `load`."""
    folder = last(path) or path
    _check_files(path, folder, CONFIG, MODEL)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: a damaged checkpoint ({first_line(error)})") from error
    if not isinstance(config, dict) or not any(name in config for name in _SHARED):
        _check_files(path, folder, TRAINING)
    return folder, config


def _check_files(path: Path, folder: Path, *names: str) -> None:
    for name in names:
        if not os.path.isfile(folder / name):  # Path.is_file raises where a folder may not be entered
            raise UserError(f"{path}: no checkpoint here ({name} is missing)")


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
