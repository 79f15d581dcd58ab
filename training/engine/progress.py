"""Live view of a training run on a terminal: progress, losses, speed and the share of time spent waiting for data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from training.runtime.terminal import Bars, draw_bars_in


class Measured:
    """Sums over training steps, with their means and rates."""

    def __init__(self) -> None:
        self.steps = self.frames = 0
        self.seconds = self.waited = 0.0
        self.sums: defaultdict[str, float] = defaultdict(float)

    def add(self, losses: Mapping[str, float], frames: int, seconds: float, waited: float) -> None:
        """Add a step: its losses by name, its frames, its seconds, and how many of these it waited for its batch."""
        self.steps += 1
        self.frames += frames
        self.seconds += seconds
        self.waited += waited
        for name, loss in losses.items():
            self.sums[name] += loss

    @property
    def means(self) -> dict[str, float]:
        """Mean of each loss over the steps."""
        return {name: total / self.steps for name, total in self.sums.items()}

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.frames / self.seconds

    @property
    def wait(self) -> float:
        """Share of the time spent waiting for data, from 0 to 1."""
        return self.waited / self.seconds

    def summary(self) -> str:
        """Return all of it in one line."""
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.means.items())
        return f"{losses}  {self.rate:.0f} frames/s  data wait {self.wait:.0%}"


class LiveView(Progress):
    """A bar for the run, a table of the last step and of the epoch so far, and the bars of an evaluation under way.

    Nothing is drawn where the console is not a terminal.

    Args:
        console: where it is drawn, in 80 columns or more.
        epochs: number of epochs of the whole run.
        step: number of steps made by earlier runs.
    """

    def __init__(self, console: Console, epochs: int, step: int) -> None:
        # Before Progress is set up, as it already draws.
        self._rows: dict[str, Measured] = {}
        self._bars = Bars(console)
        super().__init__(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),  # as wide as the other columns allow
            TextColumn("step"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        self._task = self.add_task("", total=None, completed=step, epoch=0, epochs=epochs)

    def start(self) -> None:
        """Take the terminal: until `stop` the bars of all other work are drawn in this view."""
        super().start()
        if not self.disable:
            draw_bars_in(self._bars)

    def stop(self) -> None:
        """Clear the view."""
        if not self.disable:
            draw_bars_in(None)
        super().stop()

    def begin_epoch(self, epoch: int, total: int) -> None:
        """Show the number of an epoch that begins, and the expected number of steps of the whole run."""
        self.update(self._task, epoch=epoch, total=total)

    def show(self, step: int, now: Measured, epoch: Measured) -> None:
        """Show a step and the mean of the epoch so far."""
        self._rows = {"this step": now, "this epoch": epoch}
        self.update(self._task, completed=step)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the run's bar, from the first step on the table, and the bars of other work."""
        yield self.make_tasks_table(self.tasks)
        if self._rows:
            yield self._table()
        if self._bars.tasks:
            yield self._bars.get_renderable()

    def _table(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
        table.add_column("")
        for name in [*self._rows["this step"].sums, "frames/s", "data wait"]:
            table.add_column(name, justify="right")
        for name, measured in self._rows.items():
            losses = (f"{loss:.3f}" for loss in measured.means.values())
            table.add_row(name, *losses, f"{measured.rate:.0f}", f"{measured.wait:.0%}")
        return table
