"""A trained network, and the people it is tested on: what every command that uses a checkpoint begins with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training import checkpoint
from training.data import Dataset, load_split
from training.data.tracklets import Split
from training.errors import UserError
from training.model.network import Network
from training.model.operators import Ops
from training.model.weights import load_weights
from training.settings import Settings, choose_device


@dataclass(kw_only=True)
class UseOptions:
    """How a trained network is used. What is not given is as it was in training."""

    dataset: Dataset | None = None
    """What to use it on."""
    data_root: Path | None = None
    """The dataset's folder."""
    split: int | None = None
    """Which of the dataset's splits, from 0."""
    check_counts: bool = True
    """Whether iLIDS-VID, PRID-2011 and MARS must hold as much as published; what was trained on is as it was."""
    ops: Ops | None = None
    """The library's operators or their plain PyTorch twins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Trained:
    """A trained network and who it is tested on.

    network: on its device.
    split: what it is tested on.
    settings: what it was trained by.
    ops: which operators it runs, "fast" or "reference".
    epoch: how many epochs it was trained for.
    """

    network: Network
    split: Split
    settings: Settings
    ops: Ops
    epoch: int


def load_trained(path: Path, options: UseOptions) -> Trained:
    """Read a checkpoint and the split to test it on.

    Args:
        path: folder of a run, or of one checkpoint.
        options: what is to be other than in training.

    Raises:
        UserError: the checkpoint or the data cannot be used, or the people searched for were trained on.
    """
    saved = checkpoint.load(path)
    settings = Settings.of(saved)
    recipe, ops = replace(settings.recipe, weights="random"), options.ops or settings.ops
    dataset = options.dataset or recipe.dataset
    # Another dataset does not lie where the one trained on did, nor is it split alike.
    root, number = (settings.data_root, settings.split) if dataset == recipe.dataset else (None, 0)
    root = options.data_root.resolve() if options.data_root else root
    number = number if options.split is None else options.split
    check_counts = options.check_counts and (settings.check_counts or dataset != recipe.dataset)
    split = load_split(dataset, root, number, prid=recipe.prid, check_counts=check_counts)
    people = saved.config["people"]
    seen = {tracklet.person for tracklet in split.probe} & set(people)
    # A MOT sequence searches for the people trained on, by later frames, and says so.
    if seen and dataset == recipe.dataset != "mot":
        line = f"split {number}: {len(seen)} of the people searched for have the numbers of people trained on"
        if root == settings.data_root:
            raise UserError(f"{line}, wanted split {settings.split}, which holds them out")
        warnings.warn(f"{line}; if they are the same, they were not held out", stacklevel=2)
    network = Network(recipe, len(people), ops).to(choose_device(options.device))
    load_weights(network, saved.model, str(saved.folder))
    return Trained(network, split, settings, ops, saved.training["epoch"])
