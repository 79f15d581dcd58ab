"""The log of a run: `metrics.jsonl`, TensorBoard, and on a terminal a live view, or one line per epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from training.engine.progress import LiveView, Measured
from training.evaluation.result import Result
from training.runtime.atomic_files import write_atomic
from training.runtime.command import uninterrupted
from training.runtime.errors import UserError
from training.runtime.terminal import say

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
            records = _read_records(metrics) if metrics.exists() else []  # a run may go on in another folder
            self.records = [r for r in records if r["epoch"] < epoch or (r["epoch"] == epoch and r["kind"] == "step")]
        write_atomic(metrics, "".join(json.dumps(record) + "\n" for record in self.records))
        self._metrics = metrics.open("a", buffering=1)  # a line at a time
        # Its queue and its writing thread share a lock: whatever uses it is uninterrupted.
        with uninterrupted():
            self._board = SummaryWriter(str(run), purge_step=step + 1)
        self._view = LiveView(console, epochs, step)
        self._last = 0  # the number of the epoch's last step
        self._epoch = Measured()

    def __enter__(self) -> RunLog:
        self._view.start()
        return self

    @uninterrupted()
    def __exit__(self, *error: object) -> None:
        self._view.stop()
        self._board.close()
        self._metrics.close()

    def begin_epoch(self, epoch: int, step: int, batches: int) -> None:
        """An epoch of so many batches begins after so many steps of the run."""
        self._last = step + batches
        # Epochs may differ in length: the rest of the run is taken to be like this one.
        self._view.begin_epoch(epoch, total=step + batches * (self._epochs - epoch + 1))

    @uninterrupted()
    def step(
        self, epoch: int, step: int, losses: Mapping[str, float], frames: int, seconds: float, waited: float
    ) -> None:
        """Note one training step, numbered from 1.

        Args:
            epoch, step: where it stands in the run.
            losses: by part.
            frames: how many it was made of.
            seconds: its time, with loading.
            waited: how much of that went by until the loader had its batch, in seconds.
        """
        now = Measured()
        now.add({"loss": sum(losses.values()), **losses}, frames, seconds, waited)
        self._epoch.add(now.sums, frames, seconds, waited)
        speed = {"frames_per_second": round(now.rate, 1), "data_wait": round(now.wait, 4)}
        self._write({"kind": "step", "epoch": epoch, "step": step, **now.sums, **speed})
        for name, value in {**now.sums, **speed}.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._view.show(step, now, self._epoch)
        if step == self._last:
            left = timedelta(seconds=round(self._epoch.seconds * (self._epochs - epoch)))
            self.say(f"epoch {epoch}/{self._epochs}  {self._epoch.summary()}  ETA {left}")
            self._epoch = Measured()

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

    @uninterrupted()
    def picture(self, name: str, figure: Figure, step: int) -> None:
        """Show a figure in TensorBoard, as it was after so many steps."""
        self._board.add_figure(f"evaluation/{name}", figure, step, close=False)

    def say(self, line: str) -> None:
        """Show one line to people."""
        say(line, self._console)

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
