"""Pipelines of a training step that are compared, and the networks and batches they are compared on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from training.config.presets import RECIPES
from training.config.recipe import Recipe
from training.config.step import StepConfig
from training.data.resizing import Resize
from training.runtime.fields import MOST, update

EAGER_REFERENCE = StepConfig("reference")


@dataclass(frozen=True)
class Pipeline:
    """Options of a pipeline from frames to weights; by default the reference.

    packed: read frames from one file, encoded or as pixels, or each from its own ("no").
    """

    packed: Literal["no", "encoded", "pixels"] = "no"
    resize: Resize = "pillow"
    step: StepConfig = EAGER_REFERENCE

    def exact(self) -> Pipeline:
        """Return the pipeline that computes the same on a given batch, without autocast."""
        return Pipeline(step=replace(self.step, amp="off"))


REFERENCE = "reference"
OURS = Pipeline(packed="pixels", resize="device", step=StepConfig("fast"))


# The reference, each switch alone on it, ours, and ours with the options of a step.
PIPELINES = {
    REFERENCE: Pipeline(),
    "fast ops": Pipeline(step=StepConfig("fast")),
    "packed frames": Pipeline(packed="encoded"),
    "packed pixels": Pipeline(packed="pixels"),
    "resize on the device": Pipeline(resize="device"),
    "channels last": Pipeline(step=StepConfig("reference", channels_last=True)),
    "bfloat16 autocast": Pipeline(step=StepConfig("reference", amp="bfloat16")),
    "compiled backbone": Pipeline(step=StepConfig("reference", compile_backbone=True)),
    "fast ops, CUDA-graphed RRU": Pipeline(step=StepConfig("fast", cuda_graph=True)),
    "ours": OURS,
    "ours, channels last": replace(OURS, step=StepConfig("fast", channels_last=True)),
    "ours, channels last, bfloat16": replace(OURS, step=StepConfig("fast", "bfloat16", channels_last=True)),
    "ours, channels last, compiled": replace(OURS, step=StepConfig("fast", channels_last=True, compile_backbone=True)),
    "ours, channels last, compiled, bfloat16": replace(OURS, step=StepConfig("fast", "bfloat16", True, True)),
}


@dataclass(frozen=True)
class Section:
    """A network, its batches, and the rounds in which the pipelines are timed on them.

    recipe: of the network and the batches.
    workers: processes that read frames.
    steps: per epoch.
    rounds: in each, every pipeline trains for an epoch.
    compiled: try compiled backbones.
    stable: rounding moves gradients only a little. It makes noise of those of a deep network with random weights, and
        of those of four clips.
    """

    recipe: Recipe
    workers: int
    steps: int
    rounds: int
    compiled: bool
    stable: bool = True


@dataclass(frozen=True)
class Run:
    """Arguments of a section in its own process; the packed files are next to the folder `data`."""

    name: str
    section: Section
    data: Path
    device: torch.device


def packed(data: Path, form: str) -> Path:
    """Return the path of the file of a folder's frames, in the form "encoded" or "pixels"."""
    return data.with_suffix(f".{form}.pack")


def _of(recipe: str, **changes: Any) -> Recipe:
    fixed = {"dataset": "ilids-vid", "weights": "random", "epochs": MOST, "compare_ops": False}
    return update(RECIPES[recipe], **fixed, **changes)


CPU = {
    "tiny backbone, 2 workers": Section(_of("quick"), 2, steps=10, rounds=7, compiled=True),
    "Inception-v3, 1 worker": Section(
        _of("paper", people=2, frames=3), 1, steps=1, rounds=5, compiled=False, stable=False
    ),
}
GPU = {"Inception-v3, 8 workers": Section(_of("paper"), 8, steps=20, rounds=7, compiled=True, stable=False)}
# Three frames: of two, oneDNN's 16-bit weight gradient of a 3x3x3 convolution reads uninitialized memory.
TOY = {"toy, 1 worker": Section(_of("quick", people=2, frames=3), 1, steps=2, rounds=1, compiled=False, stable=False)}
