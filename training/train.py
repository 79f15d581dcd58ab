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
from training.data.sampler import make_sampler
from training.data.tracklets import Split
from training.errors import UserError
from training.evaluation.result import Result, result_table
from training.evaluation.scoring import score
from training.logging import RunLog
from training.model.losses import Losses
from training.model.network import Network
from training.model.operators import Ops
from training.model.weights import first_line, load_weights
from training.optimizer import make_optimizer
from training.recipes import Recipe
from training.settings import Options, Settings, choose_device, resolve, trained_on
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
    run = _run_folder(options, settings.recipe)
    split = load_split(settings.recipe.dataset, settings.data_root, settings.split, check_counts=settings.check_counts)
    console.print(split.description, highlight=False, markup=False, soft_wrap=True)
    people = len(split.train_people)
    if resumed and any(resumed.config[name] != value for name, value in trained_on(split).items()):
        raise UserError(f"resume: the run was trained on other data ({resumed.config['data']})")
    settings = replace(settings, recipe=_fit_people(settings.recipe, people, console))
    recipe = settings.recipe
    sampler = make_sampler(recipe, split.train)
    loader = make_loader(split.train, sampler, recipe.frames, options.workers)

    config = settings.config(split, device)
    trainer = _make_trainer(recipe, settings.ops, people, device, resumed)
    if trainer.epoch >= recipe.epochs:
        line = f"epoch {trainer.epoch} is reached already, of {recipe.epochs}: nothing to train; --epochs asks for more"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with RunLog(run, console, epochs=recipe.epochs, epoch=trainer.epoch, step=trainer.step) as log:
            size = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
            log.say(f"recipe {recipe.name}, {size:.2f} M parameters, ops {settings.ops}, {device}; results in {run}")
            while trainer.epoch < recipe.epochs:
                if recipe.tested_after(trainer.epoch):
                    log.result(_evaluate(trainer, settings, split), trainer.step)
                sampler.set_epoch(trainer.epoch)
                trainer.run_epoch(loader, log)
                checkpoint.save(run, trainer.network, trainer.state_dict(), config)
            log.result(_evaluate(trainer, settings, split), trainer.step)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_kept(run)}") from None
    except OSError as error:
        raise UserError(f"output: {error}; {_kept(run)}") from error
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
        load_weights(network, resumed.model, str(resumed.folder))
        try:
            trainer.load_state_dict(resumed.training)
            checkpoint.restore_random_state(resumed.training["random"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{resumed.folder / 'training.pt'}: not of this training ({first_line(error)})") from error
    return trainer


def _evaluate(trainer: Trainer, settings: Settings, split: Split) -> Result:
    ranking = score(trainer.network, split)
    return Result(settings.recipe.name, settings.recipe.preset, settings.ops, trainer.epoch, ranking)


def _fit_people(recipe: Recipe, people: int, console: Console) -> Recipe:
    """The recipe with P lowered to the people there are, where it allows that."""
    if recipe.strict_people or people >= recipe.people or people < 2:
        return recipe
    line = f"people in a batch (P): {people} instead of {recipe.people}, as there are no more people to train on"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return replace(recipe, people=people)


def _run_folder(options: Options, recipe: Recipe) -> Path:
    """The folder of the run: the resumed one's, or one that holds nothing yet."""
    resumed = checkpoint.run_of(options.resume) if options.resume else None
    if options.output is None and options.resume:
        if resumed is None:
            raise UserError(
                f"resume: {options.resume} is not the last checkpoint of a run, wanted --output for a new one"
            )
        return options.resume if checkpoint.last(options.resume) else resumed
    run = options.output or Path("runs") / f"{recipe.name}-{recipe.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        taken = run.resolve() != resumed and any(run.iterdir())
    except FileNotFoundError:
        taken = False
    except OSError as error:
        raise UserError(f"output: {error}") from error
    if taken:
        raise UserError(
            f"output: {run} is not an empty folder; wanted a new one, or --resume to continue the run in it"
        )
    return run


def _kept(run: Path) -> str:
    """What a run that ends early can be continued from."""
    kept = checkpoint.last(run)
    if kept is None:
        return "no epoch was complete"
    return f"last good epoch: {int(kept.name.rpartition('-')[2])}; continue with --resume {run}"


if __name__ == "__main__":
    run_command(lambda: train(tyro.cli(Options, prog="python -m training.train")))
