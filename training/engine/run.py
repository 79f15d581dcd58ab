"""A training run in a folder: from the beginning or from a checkpoint to its last epoch's results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from rru_fast import backends
from training.config.settings import Settings
from training.config.step import eager_mode
from training.data import load_split, workers
from training.data.loading import make_loader
from training.data.resizing import Resize
from training.data.tracklets import Split
from training.engine import checkpoint
from training.engine.build import make_sampler, make_trainer, set_learning_rates
from training.engine.checkpoint import CONFIG, Checkpoint
from training.engine.metrics_log import RunLog
from training.engine.options import Machine
from training.engine.run_record import describe, run_record, settings_of, train_fingerprint
from training.engine.step_timing import compare_ops, timing_table
from training.engine.trainer import Trainer, to_input
from training.evaluation.result import Result
from training.evaluation.scoring import EmbeddedSplit, embed_split
from training.model.network import Network
from training.runtime import distributed
from training.runtime.atomic_files import LOCK, folder_lock, temp_path, write_atomic
from training.runtime.device import choose_device
from training.runtime.errors import UserError
from training.runtime.fields import differing
from training.runtime.terminal import say

BACKENDS = "backends"
"""Key of a run's record: the backends that ran each operator in training and evaluation, known after an epoch."""
Draw: TypeAlias = Callable[[Network, Split, EmbeddedSplit, Resize], Mapping[str, Figure]]
"""Pictures of a network after an evaluation, by name."""


def read_split(settings: Settings) -> Split:
    """Read the split that settings name."""
    data, source = settings.recipe.data, settings.source
    return load_split(data.dataset, source.data_root, settings.split, prid=data.prid, check_counts=source.check_counts)


def train_run(
    run: Path, settings: Settings, split: Split, resumed: Checkpoint | None, machine: Machine, draw: Draw | None = None
) -> list[dict[str, Any]]:
    """Train in a folder, from the beginning or from a checkpoint, and return the results in order of epochs.

    Of several processes the main one alone writes, and alone returns results.

    Args:
        run: the folder; what is there of a run without a complete checkpoint is written over.
        settings: P is lowered to the people there are, where the recipe allows that.
        split: the one that the settings name.
        resumed: where to begin, if not at the beginning.
        machine: how many workers read frames, and on which device.
        draw: pictures of the network after every evaluation, if any.

    Raises:
        UserError: the checkpoint is of other data or another network, or training diverged.
        OSError: the folder cannot be written.
    """
    say(split.description)
    people = len(split.train_people)
    if resumed and any(resumed.config.get(name) != value for name, value in train_fingerprint(split).items()):
        raise UserError(f"resume: the run was trained on other data ({resumed.config['data']})")
    asked, settings = settings.recipe.batch.people, settings.clamp_identities(people)
    recipe, step, device = settings.recipe, settings.step, choose_device(machine.device)
    if recipe.batch.people != asked:
        say(f"people in a batch (P): {people} instead of {asked}, as there are no more people to train on")
    sampler = make_sampler(recipe, split.train)
    sampler.shard(distributed.rank(), distributed.world())

    step.check(device, recipe)
    config = run_record(settings, split, device)
    backends.forget_runs()
    if resumed and (earlier := _earlier(resumed, settings, config)):
        config["earlier"] = earlier
    trainer = make_trainer(settings, people, device, resumed)
    resize = trainer.network.backbone.size if settings.source.resize == "pillow" else None
    # While CUDA graphs are captured no other thread may call CUDA, as one that pins memory does.
    pin = device.type == "cuda" and not step.cuda_graph
    loader = make_loader(split.train, sampler, recipe.batch.frames, machine.workers, resize, pin)
    logged = _logged(run, config, trainer, recipe.epochs) if distributed.is_main() else nullcontext()
    with workers.explain_errors(), logged as log:
        if log:
            size = sum(parameter.numel() for parameter in trainer.network.parameters()) / 1e6
            by = f"{distributed.world()} processes, " * (distributed.world() > 1)
            said = f"recipe {recipe.name}, {size:.2f} M parameters, ops {step.ops}, {by}{device}"
            log.say(f"{said}; results in {run}")
        while trainer.epoch < recipe.epochs:
            if recipe.eval.is_due(trainer.epoch, recipe.epochs):
                _evaluate(trainer, settings, split, log, draw)
            sampler.set_epoch(trainer.epoch)
            if distributed.world() > 1:
                _seed_process(recipe.seed, trainer.epoch)
            set_learning_rates(trainer.optimizer, recipe.optim, trainer.epoch, recipe.epochs)
            trainer.run_epoch(loader, log)
            if log:
                _record_backends(run, config)
                checkpoint.save(run, trainer.network, trainer.state_dict(), config)
        _evaluate(trainer, settings, split, log, draw)
        if log:
            _record_backends(run, config)
    if log is None:
        return []
    if recipe.eval.compare_ops:
        sampler.set_epoch(0)
        with workers.explain_errors():
            clips, labels = to_input(next(iter(loader)), trainer.network, step)
        say(timing_table(compare_ops(trainer.network, recipe, clips, labels)))
    return [record for record in log.records if record["kind"] == "result"]


def _earlier(resumed: Checkpoint, settings: Settings, config: dict[str, Any]) -> list[dict[str, Any]]:
    """List how earlier epochs of a run were computed, up to which epoch, where that was otherwise than from now on."""
    before = settings_of(resumed)  # with another resize it could not be resumed
    was = {name: value for name, (value, _) in differing(before.step, settings.step).items()}
    if resumed.config.get("environment") != config["environment"]:
        was |= {name: resumed.config.get(name) for name in ("environment", BACKENDS)}
    earlier: list[dict[str, Any]] = resumed.config.get("earlier", [])
    return [*earlier, {"to_epoch": resumed.training["epoch"], **was}] if was else earlier


def _record_backends(run: Path, config: dict[str, Any]) -> None:
    """Add to a run's record which backends have run each operator, as far as is known now."""
    if config.get(BACKENDS) != (ran := backends.ran()):
        config[BACKENDS] = ran
        write_atomic(run / CONFIG, json.dumps(config, indent=2) + "\n")


@contextmanager
def _logged(run: Path, config: dict[str, Any], trainer: Trainer, epochs: int) -> Iterator[RunLog]:
    """Write in a run's folder, which no other process does meanwhile."""
    run.mkdir(parents=True, exist_ok=True)
    with folder_lock(run):
        write_atomic(run / CONFIG, json.dumps(config, indent=2) + "\n")
        with RunLog(run, Console(), epochs=epochs, epoch=trainer.epoch, step=trainer.step) as log:
            yield log


def _seed_process(seed: int, epoch: int) -> None:
    """Have dropout differ from process to process, by seed, epoch and rank alone: however many began the run."""
    mixed = np.random.SeedSequence((seed, epoch, distributed.rank()))
    torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


def _evaluate(trainer: Trainer, settings: Settings, split: Split, log: RunLog | None, draw: Draw | None) -> None:
    resize = settings.source.resize
    with eager_mode(trainer.network):
        embedded = embed_split(trainer.network, split, resize=resize)
        if log is None:
            return
        result = Result(describe(settings, distributed.world()), trainer.epoch, embedded.ranking())
        log.result(result, trainer.step)
        if draw:
            for name, figure in draw(trainer.network, split, embedded, resize).items():
                log.picture(name, figure, trainer.step)


def check_free(run: Path) -> None:
    """Raise a UserError unless a run may begin in a folder: one that is not there yet, or holds nothing."""
    try:
        left = (run / LOCK, temp_path(run / CONFIG))  # by a kill at a run's beginning
        taken = any(path not in left for path in run.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"output: {error}") from error
    if taken:
        what = "or --resume to continue the run in it" if checkpoint.last(run) else "it has no checkpoint to resume"
        raise UserError(f"output: {run} is not an empty folder; wanted a new one, {what}")
