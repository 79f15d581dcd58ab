"""What a run leaves behind and shows: `metrics.jsonl`, TensorBoard, a progress bar or a line an epoch."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from training.errors import UserError
from training.evaluation.result import Result
from training.files import write_whole
from training.interrupts import uninterrupted

METRICS = "metrics.jsonl"


class RunLog:
    """The log of one run; a context manager.

    Args:
        run: the run's folder; what it already measured beyond the starting point is dropped.
        console: where people read.
        epochs: of the whole run.
        epoch: after which the run starts: 0, or that of the checkpoint it resumes.
        step: the steps made by then.

    Raises:
        UserError: what it already measured cannot be read.
        OSError: the folder cannot be written.
    """

    def __init__(self, run: Path, console: Console, *, epochs: int, epoch: int = 0, step: int = 0) -> None:
        self._console, self._epochs = console, epochs
        self.records: list[dict[str, Any]] = []
        metrics = run / METRICS
        if epoch:
            # A result is made after its epoch's checkpoint, so the resumed run makes that of `epoch` again.
            kept = _read_records(metrics) if metrics.exists() else []  # a run may go on in another folder
            self.records = [r for r in kept if r["epoch"] < epoch or (r["epoch"] == epoch and r["kind"] == "step")]
        write_whole(metrics, "".join(json.dumps(record) + "\n" for record in self.records))
        self._metrics = metrics.open("a", buffering=1)  # a line at a time
        # Its queue and its writing thread share a lock: whatever uses it is uninterrupted.
        with uninterrupted():
            self._board = SummaryWriter(str(run), purge_step=step + 1)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=16),  # all of it in 80 columns
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, completed=step, epoch=epoch, status="")
        self._batches = self._last = 0  # of the epoch: how many, and the number of its last
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._spent = 0.0

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    @uninterrupted()
    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._board.close()
        self._metrics.close()

    def begin_epoch(self, epoch: int, step: int, batches: int) -> None:
        """An epoch of so many batches begins after so many steps of the run."""
        self._batches, self._last = batches, step + batches
        # Epochs may differ in length: the rest of the run is taken to be like this one.
        self._progress.update(self._task, total=step + batches * (self._epochs - epoch + 1))

    @uninterrupted()
    def step(self, epoch: int, step: int, losses: Mapping[str, float], frames: int, seconds: float) -> None:
        """Note one training step, numbered from 1: its losses by part, its frames, and its time with loading."""
        values = {"loss": sum(losses.values()), **losses}
        rate = frames / seconds
        self._write({"kind": "step", "epoch": epoch, "step": step, **values, "frames_per_second": round(rate, 1)})
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
            self._sums[name] += value
        self._board.add_scalar("train/frames_per_second", rate, step)
        self._sums["frames"] += frames
        self._spent += seconds
        status = f"loss {values['loss']:.3f}  {rate:.0f} frames/s"
        self._progress.update(self._task, completed=step, epoch=epoch, status=status)
        if step == self._last:
            self._end_epoch(epoch)

    def _end_epoch(self, epoch: int) -> None:
        frames = self._sums.pop("frames")
        means = {name: total / self._batches for name, total in self._sums.items()}
        left = timedelta(seconds=round(self._spent * (self._epochs - epoch)))
        self.say(f"epoch {epoch}/{self._epochs}  {_told(means)}  {frames / self._spent:.0f} frames/s  ETA {left}")
        self._sums.clear()
        self._spent = 0.0

    @uninterrupted()
    def result(self, result: Result, step: int) -> None:
        """Note an evaluation, made after so many steps."""
        record = {"kind": "result", **result.record()}
        self._write(record)
        os.fsync(self._metrics.fileno())  # no checkpoint outlives the results before it
        for name in ("rank-1", "mAP"):
            self._board.add_scalar(f"evaluation/{name}", record[name], step)
        scores = "  ".join(f"{name} {100 * record[name]:.1f}" for name in ("rank-1", "mAP", "chance"))
        self.say(f"after epoch {result.epoch}  {record['protocol']}  {scores}")

    def say(self, line: str) -> None:
        """Show one line to people."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._metrics.write(json.dumps(record) + "\n")


def _read_records(metrics: Path) -> list[dict[str, Any]]:
    records = []
    # A kill may have cut the last line short.
    try:
        content = metrics.read_bytes()
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.rpartition(b"\n")[0].splitlines(), start=1):
        try:
            record = json.loads(line)
            records.append({**record, "kind": record["kind"], "epoch": int(record["epoch"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{metrics}, line {number}: damaged ({type(error).__name__}: {error})") from error
    return records


def _told(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
