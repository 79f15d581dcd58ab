"""A pipeline as it trains: the trainer, its loader and its log."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console

from benchmarks.train_step.pipelines import Pipeline, Run, packed
from benchmarks.train_step.stages import Stages
from training.data import load_split
from training.data.loading import Batch, frames_to_input, make_loader
from training.engine.build import make_optimizer, make_sampler
from training.engine.metrics_log import RunLog
from training.engine.trainer import Trainer
from training.model.losses import Losses
from training.model.network import Network
from training.runtime.fields import update


class Step(NamedTuple):
    """Results of a training step."""

    loss: float
    gradients: dict[str, torch.Tensor]
    """Float64, by the name of the weight."""
    changes: dict[str, torch.Tensor]
    """Weight after the step minus weight before it, float64, by name."""


class Runner:
    """A trainer with its loader and its log, as in `training.train`."""

    def __init__(self, pipeline: Pipeline, run: Run, dtype: torch.dtype = torch.float32) -> None:
        """Build the network, with the same weights for every pipeline, and start the loader's workers on first use.

        Raises:
            UserError: the pipeline cannot run here, or its file of frames cannot be read.
        """
        recipe = update(run.section.recipe, batches=run.section.steps)
        pipeline.step.check(run.device, recipe)
        root = run.data if pipeline.packed == "no" else packed(run.data, pipeline.packed)
        split = load_split("ilids-vid", root, 0, check_counts=False)
        torch.manual_seed(0)
        network = Network(recipe.model, len(split.train_people), pipeline.step.ops, pipeline.step.cuda_graph)
        network.to(run.device, dtype)
        losses = Losses(recipe.loss, pipeline.step.ops)
        self.trainer = Trainer(network, losses, make_optimizer(network, recipe.optim), pipeline.step)
        self.sampler = make_sampler(recipe, split.train)
        size = network.backbone.size if pipeline.resize == "pillow" else None
        pin = run.device.type == "cuda" and not pipeline.step.cuda_graph  # as in training.train
        self.loader = make_loader(split.train, self.sampler, recipe.batch.frames, run.section.workers, size, pin)
        self.log = RunLog(Path(mkdtemp(dir=run.data.parent)), Console(quiet=True), epochs=recipe.epochs)
        self.device = run.device
        self.shares: list[dict[str, float]] = []
        """Share of each stage in each epoch of `watched_epoch`."""

    def batches(self) -> list[Batch]:
        """Return the batches of the first epoch, all of them, so that the workers are idle afterwards."""
        self.sampler.set_epoch(0)
        return list(self.loader)

    def gray_levels(self, batch: Batch) -> torch.Tensor:
        """Return the frames of a batch as the network sees them, (N, T, 3, H, W) in gray levels from 0 to 255."""
        frames = frames_to_input(batch.to(self.device).frames, self.trainer.network.backbone.size, self.device)
        return frames.mul(127.5).add(127.5)

    def step_on(self, batch: Batch) -> Step:
        """Train for a step on a batch."""
        weights = dict(self.trainer.network.named_parameters())
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        torch.manual_seed(0)
        self.trainer.run_epoch(cast(Any, [batch]), self.log)
        gradients = {name: weight.grad.double() for name, weight in weights.items() if weight.grad is not None}
        changes = {name: (weight.detach() - before[name]).double() for name, weight in weights.items()}
        return Step(self.log.records[-1]["loss"], gradients, changes)

    def epoch(self) -> None:
        """Train for an epoch."""
        self.sampler.set_epoch(self.trainer.epoch)
        self.trainer.run_epoch(self.loader, self.log)

    def watched_epoch(self) -> None:
        """Train for an epoch, and append the shares of its stages to `shares`."""
        self.sampler.set_epoch(self.trainer.epoch)
        stages = Stages(self.device)
        with stages.of(self.trainer, self.loader) as loader:
            self.trainer.run_epoch(loader, self.log)
        self.shares.append(stages.shares())
