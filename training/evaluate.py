"""Evaluate a checkpoint: `python -m training.evaluate --checkpoint RUN`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from training import checkpoint
from training.command import run_command
from training.data import Dataset, load_split
from training.evaluation.features import evaluate as rank
from training.evaluation.result import Result, result_table
from training.model.network import Network
from training.model.operators import Ops
from training.settings import Settings, choose_device


@dataclass
class Options:
    """Evaluate a checkpoint. What is not given is as it was in training."""

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    dataset: Dataset | None = None
    """What to evaluate on."""
    data_root: Path | None = None
    """The dataset's folder."""
    split: int | None = None
    """Which of the dataset's splits, from 0."""
    ops: Ops | None = None
    """The library's operators or their plain PyTorch twins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def evaluate(options: Options) -> Result:
    """Rank the people of a split with a trained network, and show the table.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    console = Console()
    saved = checkpoint.load(options.checkpoint)
    settings = Settings.of(saved)
    recipe, ops = replace(settings.recipe, weights="random"), options.ops or settings.ops
    dataset = options.dataset or recipe.dataset
    # Another dataset does not lie where the one trained on did.
    root = options.data_root or (settings.data_root if dataset == recipe.dataset else None)
    split = load_split(dataset, root, settings.split if options.split is None else options.split)
    console.print(split.description, highlight=False, markup=False, soft_wrap=True)
    network = Network(recipe, saved.config["identities"], ops).to(choose_device(options.device))
    network.load_state_dict(saved.model)
    result = Result(recipe.name, ops, saved.training["epoch"], rank(network, split))
    console.print(result_table([result.record()]))
    return result


if __name__ == "__main__":
    run_command(lambda: evaluate(tyro.cli(Options, prog="python -m training.evaluate")))
