"""What `benchmarks.train_step` measures: pipelines, held to the reference's batches and step, then timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any, Literal, TypeAlias, cast

import torch
from rich.console import Console

from benchmarks.harness import measure
from benchmarks.implementations import refine as contenders
from benchmarks.reports.table import Row
from benchmarks.train_step.stages import STAGES, Stages
from training.config.presets import RECIPES
from training.config.recipe import Recipe
from training.config.step import StepConfig
from training.data import load_split
from training.data.loading import Batch, frames_to_input, make_loader
from training.data.resizing import Resize
from training.engine.build import make_optimizer, make_sampler
from training.engine.metrics_log import RunLog
from training.engine.trainer import Trainer
from training.model.losses import Losses
from training.model.network import Network
from training.runtime.fields import MOST, update

END_TO_END = ("frames/s", "x reference", "step ms")
WHY, NOT_HERE = "left out", "n/a"
LEVELS = 2  # grey levels that a resize on the device may be off Pillow's
ROUNDING = 1e-3  # of a grey level in float32, between -1 and 1 and back
# How far a step may be from the reference's in float64, relative: its loss, and every weight's gradient and change, by
# its Euclidean norm. In float64 what is left is the order of sums; else it is rounding, which depth multiplies.
EXACT = (1e-9, 1e-6)
WITHIN = {"off": (1e-4, 1e-2), "bfloat16": (5e-2, 3e-1)}
# A gradient in float64 below this share of the largest is zero but for rounding: that of a bias before a batch norm.
ZERO = 1e-9


EAGER_REFERENCE = StepConfig("reference")


@dataclass(frozen=True)
class Pipeline:
    """How frames become steps; as it stands, the reference.

    packed: whether frames are in one file, as encoded or as pixels; else each is in its own.
    """

    packed: Literal["no", "encoded", "pixels"] = "no"
    resize: Resize = "pillow"
    step: StepConfig = EAGER_REFERENCE

    def exact(self) -> Pipeline:
        """What it computes of a batch, whatever that was read from and however its numbers are rounded."""
        return Pipeline(step=replace(self.step, amp="off"))


REFERENCE = "reference"
OURS = Pipeline(packed="pixels", resize="device", step=StepConfig("fast"))


# The reference, each switch alone on it, and ours: as it is, then with what a step can be computed by.
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
    """A network and its batches."""

    recipe: Recipe
    workers: int
    steps: int  # an epoch
    rounds: int  # in each, every pipeline trains for an epoch
    compiled: bool  # whether compiled backbones are tried
    # Whether rounding leaves a gradient what it was; it makes noise of that of a deep network from random weights, and
    # of one of four clips.
    steady: bool = True


def _of(recipe: str, **changes: Any) -> Recipe:
    fixed = {"dataset": "ilids-vid", "weights": "random", "epochs": MOST, "compare_ops": False}
    return update(RECIPES[recipe], **fixed, **changes)


CPU = {
    "tiny backbone, 2 workers": Section(_of("quick"), 2, steps=10, rounds=7, compiled=True),
    "Inception-v3, 1 worker": Section(
        _of("paper", people=2, frames=3), 1, steps=1, rounds=5, compiled=False, steady=False
    ),
}
GPU = {"Inception-v3, 8 workers": Section(_of("paper"), 8, steps=20, rounds=7, compiled=True, steady=False)}
# Not of two frames: there oneDNN's 16-bit weight gradient of a 3x3x3 convolution holds what memory held before.
TOY = {"toy, 1 worker": Section(_of("quick", people=2, frames=3), 1, steps=2, rounds=1, compiled=False, steady=False)}


@dataclass(frozen=True)
class Run:
    """What a section is given: the folder of the data, and beside it the same packed."""

    name: str
    section: Section
    data: Path
    device: torch.device


def packed(data: Path, how: str) -> Path:
    """The file that a folder's frames are packed in."""
    return data.with_suffix(f".{how}.pack")


# A step's loss, its gradients and what it changed, by the weight's name, in float64.
Step: TypeAlias = "tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]"


class Runner:
    """A pipeline at work: the trainer, its loader and its log."""

    def __init__(self, pipeline: Pipeline, run: Run, dtype: torch.dtype = torch.float32) -> None:
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

    def batches(self) -> list[Batch]:
        """Those of the first epoch; to the end, so that the workers have nothing left to do."""
        self.sampler.set_epoch(0)
        return list(self.loader)

    def levels(self, batch: Batch) -> torch.Tensor:
        """The frames of a batch as the network sees them, in grey levels."""
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
        return self.log.records[-1]["loss"], gradients, changes

    def epoch(self) -> None:
        """Train for an epoch."""
        self.sampler.set_epoch(self.trainer.epoch)
        self.trainer.run_epoch(self.loader, self.log)

    def watched_epoch(self) -> None:
        """Train for an epoch, and keep the stages' shares of it."""
        self.sampler.set_epoch(self.trainer.epoch)
        stages = Stages(self.device)
        with stages.of(self.trainer, self.loader) as loader:
            self.trainer.run_epoch(loader, self.log)
        self.shares.append(stages.shares())


def rows(run: Run) -> list[Row]:
    """Check every pipeline, time those that are right, and tell of all."""
    batch = run.section.recipe.batch
    frames = batch.people * batch.clips * batch.frames
    right, refused = _sifted(run)
    ends = _timed(right, run)
    shape = [frames // batch.frames, batch.frames, 3]
    shape += right[REFERENCE].trainer.network.backbone.size
    columns = [*END_TO_END, *(f"{stage} %" for stage in STAGES), WHY]
    found = []
    for name in PIPELINES:
        row: Row = {"pipeline": name, "op": "train_step", "mode": run.name, "shape": shape, **dict.fromkeys(columns)}
        if name in right:
            seconds = median(ends[name])
            row["frames/s"] = frames * run.section.steps / seconds
            row["x reference"] = measure.ratio(ends[REFERENCE], ends[name])
            row["step ms"] = 1e3 * seconds / run.section.steps
            shares = right[name].shares
            row |= {f"{stage} %": 100 * median(share[stage] for share in shares) for stage in STAGES}
        row[WHY] = refused.get(name)
        found.append(row)
    return found


def _sifted(run: Run) -> tuple[dict[str, Runner], dict[str, str]]:
    """Runners that run and are right, by name, and why another is not among them."""
    right: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    with _in_full_precision():
        reference = Runner(Pipeline(), run)
        batches = reference.batches()
        runners, frames = {REFERENCE: reference}, {REFERENCE: 0.0}
        # Every loader's workers begin before any network has trained: each keeps what memory held when it was forked.
        for name, pipeline in PIPELINES.items():
            if pipeline.step.cuda_graph and run.device.type != "cuda":
                refused[name] = f"{NOT_HERE} on a {run.device.type.upper()}"
            elif pipeline.step.amp != "off" and not measure.has_bfloat16(run.device):
                refused[name] = f"{NOT_HERE}: this processor has no bfloat16"
            elif pipeline.step.compile_backbone and not run.section.compiled:
                refused[name] = f"{NOT_HERE}: compilation takes minutes"
            elif name != REFERENCE:
                with _or_why(name, refused):
                    runner = Runner(pipeline, run)
                    pairs = [*zip(runner.batches(), batches, strict=True)]
                    if any(a.clips != b.clips or not torch.equal(a.labels, b.labels) for a, b in pairs):
                        refused[name] = "wrong: its batches are of other clips, or have other labels"
                        continue
                    frames[name] = max(float((runner.levels(a) - reference.levels(b)).abs().max()) for a, b in pairs)
                    runners[name] = runner
        step = Runner(Pipeline(), run, torch.float64).step_on(batches[0])
        exact = {Pipeline(): (0.0, 0.0)}  # how far each is off in float64
        for name, runner in runners.items():
            with _or_why(name, refused):
                same = PIPELINES[name].exact()
                if same not in exact:
                    exact[same] = _off(Runner(same, run, torch.float64).step_on(batches[0]), step)
                rounded = _off(runner.step_on(batches[0]), step)
                told, fits = _compared(PIPELINES[name], frames[name], exact[same], rounded, run.section)
                if fits:
                    right[name] = runner
                    print(f"parity: {name}, {told}")
                else:
                    refused[name] = f"wrong: {told}"
    for name, why in refused.items():
        print(f"{name} is left out: {why}")
    return right, refused


@contextmanager
def _or_why(name: str, refused: dict[str, str]) -> Iterator[None]:
    """Note what is raised inside as the reason why a pipeline is left out: the others can be measured."""
    try:
        yield
    except Exception as error:
        refused[name] = f"does not run: {contenders.told(error)}"


def _compared(
    pipeline: Pipeline, frames: float, exact: tuple[float, float], rounded: tuple[float, float], section: Section
) -> tuple[str, bool]:
    """How far a pipeline is from the reference, told; and whether that is near enough."""
    told = f"frames within {frames:.2g} grey levels"
    for what, off in (("in float64", exact), ("as timed", rounded)):
        told += f", {what} loss within {off[0]:.1e} and weights within {off[1]:.1e}"
    compared = [(frames, LEVELS + ROUNDING if pipeline.resize == "device" else 0.0)]
    compared += zip(exact, EXACT, strict=True)
    compared += [*zip(rounded, WITHIN[pipeline.step.amp], strict=True)][: 1 + section.steady]
    return told, all(off <= limit for off, limit in compared)


def _off(step: Step, wanted: Step) -> tuple[float, float]:
    """How far a step's loss, and its gradients and changes at their worst, are from those wanted, relative."""
    (loss, *of_weights), (wanted_loss, *wanted_of_weights) = step, wanted
    worst = 0.0
    for found, true in zip(of_weights, wanted_of_weights, strict=True):
        norms = {name: float(tensor.norm()) for name, tensor in true.items()}
        for name, norm in norms.items():
            if norm > ZERO * max(norms.values()):
                worst = max(worst, float((found[name] - true[name]).norm()) / norm)
    return abs(loss / wanted_loss - 1), worst


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """No TF32 inside; outside, what a GPU multiplies float32 in by default, and products too."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")


def _timed(runners: Mapping[str, Runner], run: Run) -> dict[str, list[float]]:
    """Seconds of each pipeline's epochs, its stages watched; warm they are from the check, workers and all."""
    rounds = run.section.rounds
    ends = measure.paired({name: runner.watched_epoch for name, runner in runners.items()}, rounds, warmup=0)
    if run.device.type == "cuda":  # there watching waits for the device at every stage
        ends = measure.paired({name: runner.epoch for name, runner in runners.items()}, rounds, warmup=0)
    return ends
