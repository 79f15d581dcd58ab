"""A training run in a folder: from the beginning or from a checkpoint to its last epoch's results."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from training.config.presets import Recipe
from training.config.settings import Options, Settings, choose_device, trained_on
from training.config.step import as_evaluated
from training.data import load_split, workers
from training.data.loading import make_loader
from training.data.sampler import make_sampler
from training.data.tracklets import Split
from training.engine import checkpoint
from training.engine.build import make_optimizer
from training.engine.checkpoint import CONFIG, Checkpoint
from training.engine.metrics_log import RunLog
from training.engine.step_timing import compare_ops, timing_table
from training.engine.trainer import Trainer, to_input
from training.evaluation.result import Result
from training.evaluation.scoring import compare
from training.model.ghost_norm import groups_of_each
from training.model.losses import Losses
from training.model.network import Network
from training.model.weights import first_line, load_weights
from training.runtime import distributed
from training.runtime.atomic_files import LOCK, aside, held, write_whole
from training.runtime.errors import UserError
from training.runtime.terminal import say
from training.show.board import pictures


def read_split(settings: Settings) -> Split:
    """The split that settings name."""
    recipe = settings.recipe
    return load_split(
        recipe.dataset, settings.data_root, settings.split, prid=recipe.prid, check_counts=settings.check_counts
    )


def train_run(
    run: Path, settings: Settings, split: Split, resumed: Checkpoint | None, options: Options
) -> list[dict[str, Any]]:
    """Train in a folder, from the beginning or from a checkpoint, and return the results in order of epochs.

    Of several processes the main one alone writes, and alone returns results.

    Args:
        run: the folder; what is there of a run without a complete checkpoint is written over.
        settings: P is lowered to the people there are, where the recipe allows that.
        split: the one that the settings name.
        resumed: where to begin, if not at the beginning.
        options: how many workers read frames, on which device, and whether pictures are drawn.

    Raises:
        UserError: the checkpoint is of other data or another network, or training diverged.
        OSError: the folder cannot be written.
    """
    say(split.description)
    people = len(split.train_people)
    if resumed and any(resumed.config[name] != value for name, value in trained_on(split).items()):
        raise UserError(f"resume: the run was trained on other data ({resumed.config['data']})")
    asked, settings = settings.recipe.people, settings.fitted(split)
    recipe, device = settings.recipe, choose_device(options.device)
    if recipe.people != asked:
        line = f"people in a batch (P): {people} instead of {asked}, as there are no more people to train on"
        say(line)
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
    logged = _logged(run, config, trainer, recipe) if distributed.is_main() else nullcontext()
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
        say(timing_table(compare_ops(trainer.network, recipe, clips, labels)))
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
def _logged(run: Path, config: dict[str, Any], trainer: Trainer, recipe: Recipe) -> Iterator[RunLog]:
    """Write in a run's folder, which no other process does meanwhile."""
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        write_whole(run / CONFIG, json.dumps(config, indent=2) + "\n")
        with RunLog(run, Console(), epochs=recipe.epochs, epoch=trainer.epoch, step=trainer.step) as log:
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
