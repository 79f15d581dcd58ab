"""What a terminal shows while a network trains: how far it is, what it loses, how fast it goes, what it waits for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Measured:
    """Sums over training steps, and what they come to."""

    def __init__(self) -> None:
        self.steps = self.frames = 0
        self.seconds = self.waited = 0.0
        self.sums: defaultdict[str, float] = defaultdict(float)

    def add(self, losses: Mapping[str, float], frames: int, seconds: float, waited: float) -> None:
        """Count one more step, with its losses by name, and `waited` of its seconds spent until it had its batch."""
        self.steps += 1
        self.frames += frames
        self.seconds += seconds
        self.waited += waited
        for name, loss in losses.items():
            self.sums[name] += loss

    @property
    def means(self) -> dict[str, float]:
        """Each loss, as the mean over the steps."""
        return {name: total / self.steps for name, total in self.sums.items()}

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds

    @property
    def wait(self) -> float:
        """The share of the time that was waited for data, from 0 to 1."""
        return self.waited / self.seconds

    def told(self) -> str:
        """All of it in a line."""
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.means.items())
        return f"{losses}  {self.rate:.0f} frames/s  data wait {self.wait:.0%}"


class LiveView(Progress):
    """A bar for the run and below it a table of the last step and of the epoch so far; nothing where it is no terminal.

    Args:
        console: where it is shown, in 80 columns or more.
        epochs: of the whole run.
        step: how many steps were made by earlier runs.
    """

    def __init__(self, console: Console, epochs: int, step: int) -> None:
        self._rows: dict[str, Measured] = {}  # Progress asks for what is shown before it is made
        super().__init__(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),  # what the others leave
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

    def begin_epoch(self, epoch: int, total: int) -> None:
        """An epoch begins, of a run that is taken to have so many steps."""
        self.update(self._task, epoch=epoch, total=total)

    def show(self, step: int, now: Measured, epoch: Measured) -> None:
        """Show a step and the mean of the epoch so far."""
        self._rows = {"this step": now, "this epoch": epoch}
        self.update(self._task, completed=step)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, and from the first step on the table."""
        yield self.make_tasks_table(self.tasks)
        if self._rows:
            yield self._table()

    def _table(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
        table.add_column("")
        for name in [*self._rows["this step"].sums, "frames/s", "data wait"]:
            table.add_column(name, justify="right")
        for name, measured in self._rows.items():
            losses = (f"{loss:.3f}" for loss in measured.means.values())
            table.add_row(name, *losses, f"{measured.rate:.0f}", f"{measured.wait:.0%}")
        return table
