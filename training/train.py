"""Train the paper's network end to end: `python -m training.train --recipe quick`."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from training import checkpoint
from training.checkpoint import Checkpoint
from training.command import run_command
from training.data import load_split
from training.data.loading import make_loader
from training.data.sampler import PKSampler
from training.data.tracklets import Split
from training.errors import UserError
from training.evaluation.features import evaluate
from training.evaluation.result import Result, result_table
from training.logging import RunLog
from training.model.losses import Losses
from training.model.network import Network
from training.model.operators import Ops
from training.optimizer import make_optimizer
from training.recipes import Recipe
from training.settings import Options, Settings, choose_device, resolve
from training.step_timing import compare_ops, timing_table
from training.trainer import Trainer, to_input


def train(options: Options) -> None:
    """Train, evaluate, and leave the results in a folder.

    Args:
        options: of the command line.

    Raises:
        UserError: the options, the data or the checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: it was interrupted; the message says what continues it.
    """
    console = Console()
    resumed = checkpoint.load(options.resume) if options.resume else None
    settings = resolve(options, Settings.of(resumed) if resumed else None)
    device = choose_device(options.device)
    split = load_split(settings.recipe.dataset, settings.data_root, settings.split)
    console.print(split.description, highlight=False, markup=False, soft_wrap=True)
    people = len(split.train_people)
    if resumed and resumed.config["identities"] != people:
        raise UserError(f"resume: the run was trained on {resumed.config['identities']} people, the data has {people}")
    settings = replace(settings, recipe=_fit_people(settings.recipe, people, console))
    recipe = settings.recipe
    sampler = PKSampler(split.train, recipe.people, recipe.clips, recipe.frames, recipe.seed, recipe.batches)
    loader = make_loader(split.train, sampler, recipe.frames, options.workers)

    run = _run_folder(options, recipe)
    config = settings.config(split, device)
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    trainer = _make_trainer(recipe, settings.ops, people, device, resumed)
    with RunLog(run, console, len(sampler), recipe.epochs, trainer.epoch) as log:
        size = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
        log.say(f"recipe {recipe.name}, {size:.2f} M parameters, ops {settings.ops}, {device}; results in {run}")
        try:
            while trainer.epoch < recipe.epochs:
                if trainer.epoch % (recipe.eval_every or recipe.epochs) == 0:
                    log.result(_evaluate(trainer, settings, split), trainer.step)
                sampler.set_epoch(trainer.epoch)
                trainer.run_epoch(loader, log)
                checkpoint.save(run, trainer.network, trainer.state_dict(), config)
            log.result(_evaluate(trainer, settings, split), trainer.step)
        except KeyboardInterrupt:
            kept = f"continue with --resume {run}" if (run / checkpoint.LAST).exists() else "no epoch was complete"
            raise KeyboardInterrupt(f"interrupted; {kept}") from None
        console.print(result_table(record for record in log.records if record["kind"] == "result"))
    if recipe.compare_ops:
        sampler.set_epoch(0)
        clips, labels = to_input(next(iter(loader)), trainer.network)
        console.print(timing_table(compare_ops(trainer.network, recipe, clips, labels)))


def _make_trainer(recipe: Recipe, ops: Ops, people: int, device: torch.device, resumed: Checkpoint | None) -> Trainer:
    """A trainer at its beginning, or where a checkpoint left it; the random generators too."""
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    # A resumed network gets its tensors from the checkpoint: no weights file is needed, nor a download.
    network = Network(replace(recipe, weights="random") if resumed else recipe, people, ops).to(device)
    trainer = Trainer(network, Losses(recipe, ops), make_optimizer(network, recipe))
    if resumed:
        network.load_state_dict(resumed.model)
        trainer.load_state_dict(resumed.training)
        checkpoint.restore_random_state(resumed.training["random"])
    return trainer


def _evaluate(trainer: Trainer, settings: Settings, split: Split) -> Result:
    return Result(settings.recipe.name, settings.ops, trainer.epoch, evaluate(trainer.network, split))


def _fit_people(recipe: Recipe, people: int, console: Console) -> Recipe:
    """The recipe with P lowered to the people there are, where it allows that."""
    if recipe.strict_people or people >= recipe.people or people < 2:
        return recipe
    line = f"people in a batch (P): {people} instead of {recipe.people}, as there are no more people to train on"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return replace(recipe, people=people)


def _run_folder(options: Options, recipe: Recipe) -> Path:
    if options.output is None and options.resume is not None:
        # `RUN/last` may be given for RUN.
        return options.resume.resolve().parent if (options.resume / "model.safetensors").is_file() else options.resume
    run = options.output or Path("runs") / f"{recipe.name}-{recipe.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    if (run / checkpoint.LAST).exists():
        raise UserError(f"output: {run} holds a run already; continue it with --resume {run}, or choose another folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {run} cannot be made ({error.strerror})") from error
    return run


if __name__ == "__main__":
    run_command(lambda: train(tyro.cli(Options, prog="python -m training.train")))
