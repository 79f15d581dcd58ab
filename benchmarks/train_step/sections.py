"""Rows of a section: its pipelines validated, then timed in turns."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from benchmarks.harness import measure
from benchmarks.reports.table import Row
from benchmarks.train_step import pipelines
from benchmarks.train_step.pipelines import REFERENCE, Run
from benchmarks.train_step.runner import Runner
from benchmarks.train_step.stages import STAGES
from benchmarks.train_step.validation import filter_valid

END_TO_END = ("frames/s", "x reference", "step ms")
WHY = "left out"


def rows(run: Run) -> list[Row]:
    """Validate every pipeline and time the valid ones; returns a row for each."""
    batch = run.section.recipe.batch
    clips = batch.people * batch.clips
    frames = clips * batch.frames
    valid, refused = filter_valid(run)
    epochs = _time(valid, run)
    shape = [clips, batch.frames, 3, *valid[REFERENCE].trainer.network.backbone.size]
    columns = [*END_TO_END, *(f"{stage} %" for stage in STAGES), WHY]
    found = []
    for name in pipelines.PIPELINES:
        row: Row = {"pipeline": name, "op": "train_step", "mode": run.name, "shape": shape, **dict.fromkeys(columns)}
        if name in valid:
            seconds = median(epochs[name])
            row["frames/s"] = frames * run.section.steps / seconds
            row["x reference"] = measure.ratio(epochs[REFERENCE], epochs[name])
            row["step ms"] = 1e3 * seconds / run.section.steps
            shares = valid[name].shares
            row |= {f"{stage} %": 100 * median(share[stage] for share in shares) for stage in STAGES}
        row[WHY] = refused.get(name)
        found.append(row)
    return found


def _time(runners: Mapping[str, Runner], run: Run) -> dict[str, list[float]]:
    """Return the seconds of each pipeline's epochs, their stages watched; validation has warmed everything up."""
    rounds = run.section.rounds
    epochs = measure.paired({name: runner.watched_epoch for name, runner in runners.items()}, rounds, warmup=0)
    if run.device.type == "cuda":  # watching synchronizes with the device at every stage
        epochs = measure.paired({name: runner.epoch for name, runner in runners.items()}, rounds, warmup=0)
    return epochs
