"""Train the paper's network end to end: `python -m training.train --recipe quick`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from training import checkpoint, distributed
from training.checkpoint import CONFIG, Checkpoint
from training.command import run_command
from training.data import load_split, workers
from training.data.loading import make_loader
from training.data.sampler import make_sampler
from training.data.tracklets import Split
from training.errors import UserError
from training.evaluation.result import Result, result_table
from training.evaluation.scoring import compare
from training.files import LOCK, aside, held, resolved, write_whole
from training.logging import RunLog
from training.model.ghost_norm import groups_of_each
from training.model.losses import Losses
from training.model.network import Network
from training.model.weights import first_line, load_weights
from training.optimizer import make_optimizer
from training.recipes import Recipe
from training.settings import Options, Settings, choose_device, resolve, trained_on
from training.show.board import pictures
from training.speed import as_evaluated
from training.step_timing import compare_ops, timing_table
from training.trainer import Trainer, to_input


def train(options: Options) -> None:
    """Train, evaluate, and leave the results in a folder.

    Args:
        options: of the command line; the same in every process.

    Raises:
        UserError: the options, the data or the checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: it was interrupted; the message says what continues it.
    """
    console = Console(quiet=not distributed.is_main())
    resumed = checkpoint.load(options.resume) if options.resume else None
    settings = resolve(options, Settings.of(resumed) if resumed else None)
    run = distributed.from_main(lambda: _run_folder(options, settings.recipe))
    distributed.keep(lambda: _kept(run))
    epochs = settings.recipe.epochs
    if resumed and resumed.training["epoch"] >= epochs:
        line = f"epoch {resumed.training['epoch']} is reached already, of {epochs}: nothing to train"
        console.print(f"{line}; --epochs asks for more", highlight=False, markup=False, soft_wrap=True)
    try:
        split = distributed.main_first(lambda: read_split(settings))  # which may render it
        records = train_run(run, settings, split, resumed, options, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_kept(run)}") from None
    except OSError as error:
        raise UserError(f"output: {error}; {_kept(run)}") from error
    if distributed.is_main():
        console.print(result_table(records))


def read_split(settings: Settings) -> Split:
    """The split that settings name."""
    recipe = settings.recipe
    return load_split(
        recipe.dataset, settings.data_root, settings.split, prid=recipe.prid, check_counts=settings.check_counts
    )


def train_run(
    run: Path, settings: Settings, split: Split, resumed: Checkpoint | None, options: Options, console: Console
) -> list[dict[str, Any]]:
    """Train in a folder, from the beginning or from a checkpoint, and return the results in order of epochs.

    Of several processes the main one alone writes, and alone returns results.

    Args:
        run: the folder; what is there of a run without a complete checkpoint is written over.
        settings: P is lowered to the people there are, where the recipe allows that.
        split: the one that the settings name.
        resumed: where to begin, if not at the beginning.
        options: how many workers read frames, on which device, and whether pictures are drawn.
        console: where people read.

    Raises:
        UserError: the checkpoint is of other data or another network, or training diverged.
        OSError: the folder cannot be written.
    """
    console.print(split.description, highlight=False, markup=False, soft_wrap=True)
    people = len(split.train_people)
    if resumed and any(resumed.config[name] != value for name, value in trained_on(split).items()):
        raise UserError(f"resume: the run was trained on other data ({resumed.config['data']})")
    asked, settings = settings.recipe.people, settings.fitted(split)
    recipe, device = settings.recipe, choose_device(options.device)
    if recipe.people != asked:
        line = f"people in a batch (P): {people} instead of {asked}, as there are no more people to train on"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    sampler = make_sampler(recipe, split.train)
    sampler.deal_out(distributed.rank(), distributed.world())

    settings.speed.check(device, settings.ops, recipe)
    config = settings.config(split, device)
    if resumed and (earlier := _earlier(resumed, config)):
        config["earlier"] = earlier
    trainer = _make_trainer(settings, people, device, resumed)
    resize = trainer.network.backbone.size if settings.resize == "pillow" else None
    # While CUDA graphs are captured no other thread may call CUDA, as one that pins memory does.
    pin = device.type == "cuda" and not settings.speed.cuda_graph
    loader = make_loader(split.train, sampler, recipe.frames, options.workers, resize, pin)
    logged = _logged(run, config, trainer, recipe, console) if distributed.is_main() else nullcontext()
    with workers.explained(), logged as log:
        if log:
            size = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
            by = f"{distributed.world()} processes, " * (distributed.world() > 1)
            said = f"recipe {recipe.name}, {size:.2f} M parameters, ops {settings.ops}, {by}{device}"
            log.say(f"{said}; results in {run}")
        while trainer.epoch < recipe.epochs:
            if recipe.tested_after(trainer.epoch):
                _evaluate(trainer, settings, split, log, options.pictures)
            sampler.set_epoch(trainer.epoch)
            if distributed.world() > 1:
                _seed_process(recipe.seed, trainer.epoch)
            trainer.run_epoch(loader, log)
            if log:
                checkpoint.save(run, trainer.network, trainer.state_dict(), config)
        _evaluate(trainer, settings, split, log, options.pictures)
    if log is None:
        return []
    if recipe.compare_ops:
        sampler.set_epoch(0)
        with workers.explained():
            clips, labels = to_input(next(iter(loader)), trainer.network, settings.speed)
        console.print(timing_table(compare_ops(trainer.network, recipe, clips, labels)))
    return [record for record in log.records if record["kind"] == "result"]


def _earlier(resumed: Checkpoint, config: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run was computed by up to which epoch, where that was otherwise than from now on."""
    how = ("ops", "speed", "resize", "sync_bn", "environment")
    was = {name: resumed.config.get(name) for name in how if resumed.config.get(name) != config[name]}
    before: list[dict[str, Any]] = resumed.config.get("earlier", [])
    return [*before, {"to_epoch": resumed.training["epoch"], **was}] if was else before


def _make_trainer(settings: Settings, people: int, device: torch.device, resumed: Checkpoint | None) -> Trainer:
    """A trainer at its beginning, or where a checkpoint left it; the random generators too."""
    recipe, ops, speed = settings.recipe, settings.ops, settings.speed
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    processes = distributed.world()
    # A resumed network gets its tensors from the checkpoint: no weights file is needed, nor a download.
    begun = replace(recipe, weights="random") if resumed else recipe
    own = replace(begun, bn_groups=groups_of_each(recipe.bn_groups, processes))
    network = Network(own, people, ops, speed.cuda_graph).to(device)
    losses = Losses(recipe, ops, gather=processes > 1)
    trainer = Trainer(network, losses, make_optimizer(network, recipe), speed, settings.sync_bn)
    if resumed:
        load_weights(network, resumed.model, str(resumed.folder))
        try:
            trainer.load_state_dict(resumed.training)
            checkpoint.restore_random_state(resumed.training["random"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{resumed.folder / 'training.pt'}: not of this training ({first_line(error)})") from error
    return trainer


@contextmanager
def _logged(run: Path, config: dict[str, Any], trainer: Trainer, recipe: Recipe, console: Console) -> Iterator[RunLog]:
    """Write in a run's folder, which no other process does meanwhile."""
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        write_whole(run / CONFIG, json.dumps(config, indent=2) + "\n")
        with RunLog(run, console, epochs=recipe.epochs, epoch=trainer.epoch, step=trainer.step) as log:
            yield log


def _seed_process(seed: int, epoch: int) -> None:
    """Have dropout differ from process to process, by seed, epoch and rank alone: however many began the run."""
    mixed = np.random.SeedSequence((seed, epoch, distributed.rank()))
    torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


def _evaluate(trainer: Trainer, settings: Settings, split: Split, log: RunLog | None, drawn: bool) -> None:
    with as_evaluated(trainer.network):
        compared = compare(trainer.network, split, resize=settings.resize)
        if log is None:
            return
        how = settings.speed, settings.resize, settings.sync_bn, distributed.world()
        result = Result(settings.recipe, settings.ops, trainer.epoch, compared.ranking(), *how)
        log.result(result, trainer.step)
        if drawn:
            for name, figure in pictures(trainer.network, split, compared, settings.resize).items():
                log.picture(name, figure, trainer.step)


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
    if resolved(run) != resumed:
        check_free(run)
    return run


def check_free(run: Path) -> None:
    """Raise a UserError unless a run may begin in a folder: one that is not there yet, or holds nothing."""
    try:
        left = (run / LOCK, aside(run / CONFIG))  # by a kill at a run's beginning
        taken = any(path not in left for path in run.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"output: {error}") from error
    if taken:
        what = "or --resume to continue the run in it" if checkpoint.last(run) else "it has no checkpoint to resume"
        raise UserError(f"output: {run} is not an empty folder; wanted a new one, {what}")


def _kept(run: Path) -> str:
    """What a run that ends early can be continued from."""
    kept = checkpoint.last(run)
    if kept is None:
        return f"no epoch was complete, so nothing in {run} can be resumed"
    return f"last good epoch: {int(kept.name.rpartition('-')[2])}; continue with --resume {run}"


if __name__ == "__main__":
    prog = "python -m training.train"
    run_command(lambda: train(tyro.cli(Options, prog=prog, console_outputs=distributed.is_main())), several=True)
