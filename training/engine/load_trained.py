"""Load a trained network and the split to test it on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from training.config.settings import Settings
from training.data import Dataset, load_split
from training.data.tracklets import Split
from training.engine import checkpoint
from training.engine.checkpoint import Checkpoint
from training.engine.run_record import environment, name_digest, options_of, settings_of
from training.model.network import Network
from training.model.operators import Ops
from training.model.pretrained import read_architecture
from training.model.weights import load_weights
from training.runtime import distributed
from training.runtime.atomic_files import realpath
from training.runtime.device import Device, choose_device
from training.runtime.errors import UserError


@dataclass(kw_only=True)
class UseOptions:
    """Options of a trained network's use. Those not given are as in training."""

    dataset: Dataset | None = None
    """The dataset to use it on."""
    data_root: Path | None = None
    """The dataset's folder, or a file made of it by training.pack."""
    split: int | None = None
    """Index of the dataset's split."""
    check_counts: bool = True
    """Assert that iLIDS-VID, PRID-2011 and MARS hold as much as published; the data trained on is as in training."""
    ops: Ops | None = None
    """The library's operators or their plain PyTorch twins."""
    device: Device = "auto"
    """The device to compute on."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained network and the split to test it on.

    network: on its device.
    split: the split to test it on.
    dataset, number: of that split.
    settings: of its training.
    ops: the operators it runs, "fast" or "reference".
    epoch: number of epochs it was trained for.
    saved: the checkpoint.
    """

    network: Network
    split: Split
    dataset: Dataset
    number: int
    settings: Settings
    ops: Ops
    epoch: int
    saved: Checkpoint


def load_trained(path: Path, options: UseOptions) -> LoadedRun:
    """Read a checkpoint and the split to test it on.

    Args:
        path: folder of a run, or of one checkpoint.
        options: what is to be other than in training.

    Raises:
        UserError: the checkpoint or the data cannot be used, or the people searched for were trained on.
    """
    saved = checkpoint.load(path)
    settings = settings_of(saved)
    data, ops = settings.recipe.data, options.ops or settings.step.ops
    dataset = options.dataset or data.dataset
    # Another dataset has another place and other splits.
    root, number = (settings.source.data_root, settings.split) if dataset == data.dataset else (None, 0)
    root = realpath(options.data_root) if options.data_root else root
    number = number if options.split is None else options.split
    check_counts = options.check_counts and (settings.source.check_counts or dataset != data.dataset)
    split = distributed.main_first(lambda: load_split(dataset, root, number, prid=data.prid, check_counts=check_counts))
    same_data = dataset == data.dataset and root == settings.source.data_root
    # A MOT sequence searches for the people trained on, by later frames, and says so.
    comparable = dataset == data.dataset != "mot"
    _check_held_out(split, saved.config, f"split {number}", settings.split, comparable=comparable, same_data=same_data)
    network = load_network(saved, ops, choose_device(options.device))
    return LoadedRun(network, split, dataset, number, settings, ops, saved.epoch or 0, saved)


def _check_held_out(
    split: Split, record: Mapping[str, Any], where: str, trained: int, *, comparable: bool, same_data: bool
) -> None:
    """Raise, or on other data warn, if people searched for are among those trained on, by name or by number.

    Args:
        split: the split to test on.
        record: of the training.
        where: the split's name in the message.
        trained: the number of the split trained on.
        comparable: False where equal numbers mean nothing; names do, if the split has them.
        same_data: True if both splits are of the same data.
    """
    remedy = f"wanted split {trained}, which holds them out"
    if split.names:
        digests = set(record.get("names", ()))
        seen = {name for name in split.names_of(split.query) if name_digest(name) in digests}
        line = f"{where}: got {len(seen)} people to search for that were trained on, such as {min(seen, default='')}"
        remedy += ", of the same people as in training"
    else:
        numbers = {tracklet.person for tracklet in split.query} & set(record["people"])
        seen = set(map(str, numbers)) if comparable else set()
        line = f"{where}: {len(numbers)} of the people searched for have the numbers of people trained on"
    if seen and same_data:
        raise UserError(f"{line}, {remedy}")
    if seen:
        warnings.warn(f"{line}; if they are the same, they were not held out", stacklevel=3)


def load_network(saved: Checkpoint, ops: Ops | None, device: torch.device) -> Network:
    """Make the network of a checkpoint, on a device.

    Args:
        saved: the checkpoint.
        ops: which operators it is to run; `None` for those it was trained with.
        device: where to.

    Raises:
        UserError: the checkpoint is not of this version, or of another network than it says.
    """
    path = saved.folder / checkpoint.CONFIG
    try:
        record = {**saved.config, "settings": options_of(saved.config)}
    except TypeError as error:
        raise UserError(f"{path}: not one this version wrote ({error})") from error
    model, identities, own = read_architecture(record, str(path))
    network = Network(model, identities, ops or own).to(device)
    load_weights(network, saved.model, str(saved.folder))
    return network


def provenance(saved: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Return the origin of all that a checkpoint's network computes, as JSON values.

    Returns:
        "checkpoint": its folder; "epoch": how many it was trained for; "network": a hash of its tensors; "config": its
        config.json, with the seed and the environment it was trained in; "environment": the one it is used in.
    """
    return {
        "checkpoint": str(saved.folder.resolve()),
        "epoch": saved.epoch,
        "network": hashlib.sha256(safetensors.torch.save(saved.model)).hexdigest(),
        "config": saved.config,
        "environment": environment(device),
    }


def flat(about: Mapping[str, Any]) -> dict[str, str]:
    """JSON values as a file's metadata can hold them: strings as they are, the others as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
