"""Evaluate a checkpoint: `python -m training.evaluate --checkpoint RUN`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from training import checkpoint, distributed
from training.command import run_command
from training.data import Dataset, load_split
from training.errors import UserError
from training.evaluation.protocols import ProtocolName
from training.evaluation.ranking import Ties
from training.evaluation.result import Result, result_table
from training.evaluation.scoring import score
from training.model.network import Network
from training.model.operators import Ops
from training.model.weights import load_weights
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
    check_counts: bool = True
    """Whether iLIDS-VID, PRID-2011 and MARS must hold as much as published; what was trained on is as it was."""
    protocol: ProtocolName | None = None
    """The rules to rank by; those the dataset is made for unless given."""
    ties: Ties = "stable"
    """Of two equally far, the first is: the earlier in the gallery, the right one, or the wrong one."""
    rerank: bool = False
    """Re-rank by k-reciprocal neighbours."""
    ops: Ops | None = None
    """The library's operators or their plain PyTorch twins."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def evaluate(options: Options) -> Result:
    """Rank the people of a split with a trained network, and show the table.

    Raises:
        UserError: the checkpoint or the data cannot be used, or the protocol does not fit the data.
    """
    console = Console(quiet=not distributed.is_main())
    saved = checkpoint.load(options.checkpoint)
    settings = Settings.of(saved)
    recipe, ops = replace(settings.recipe, weights="random"), options.ops or settings.ops
    dataset = options.dataset or recipe.dataset
    # Another dataset does not lie where the one trained on did, nor is it split alike.
    root, number = (settings.data_root, settings.split) if dataset == recipe.dataset else (None, 0)
    root = options.data_root.resolve() if options.data_root else root
    number = number if options.split is None else options.split
    check_counts = options.check_counts and (settings.check_counts or dataset != recipe.dataset)
    split = distributed.main_first(
        lambda: load_split(dataset, root, number, prid=recipe.prid, check_counts=check_counts)
    )
    console.print(split.description, highlight=False, markup=False, soft_wrap=True)
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
    ranking = score(network, split, protocol=options.protocol, ties=options.ties, rerank=options.rerank)
    how = settings.speed, settings.sync_bn, saved.config["environment"]["processes"]
    result = Result(settings.recipe, ops, saved.training["epoch"], ranking, *how)
    console.print(result_table([result.record()]))
    return result


if __name__ == "__main__":
    prog = "python -m training.evaluate"
    run_command(lambda: evaluate(tyro.cli(Options, prog=prog, console_outputs=distributed.is_main())), several=True)
