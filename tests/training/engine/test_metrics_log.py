from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import ValuesView
from pathlib import Path

import pytest
from rich.console import Console

from training.engine.metrics_log import METRICS, RunLog
from training.runtime.command import uninterrupted


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_of_a_long_run_with_every_loss_fits_in_its_columns(tmp_path: Path, width: int) -> None:
    page = io.StringIO()
    console = Console(file=page, width=width, force_terminal=True, color_system=None)
    losses = {"identity": 5.25, "auxiliary": 3.25, "video": 4.5, "part": 3.0}
    with RunLog(tmp_path, console, epochs=900, epoch=799, step=11985) as log:
        log.begin_epoch(800, 11985, batches=15)
        for step in range(11986, 12001):
            scaled = {name: loss * (2 if step == 12000 else 1) for name, loss in losses.items()}
            log.step(800, step, scaled, frames=160, seconds=0.01, waited=0.0025 if step == 12000 else 0.001)
    bar, names, now, epoch = page.getvalue().rpartition("epoch 800/900 ")[2].splitlines()[:4]
    assert all(len(line) <= width for line in ("epoch 800/900 " + bar, names, now, epoch))
    assert "step 12000/13500" in bar
    assert "ETA" in bar
    assert names.split() == ["loss", *losses, "frames/s", "data", "wait"]
    assert now.split() == ["this", "step", "32.000", "10.500", "6.500", "9.000", "6.000", "16000", "25%"]
    assert epoch.split() == ["this", "epoch", "17.067", "5.600", "3.467", "4.800", "3.200", "16000", "11%"]


def test_epochs_of_different_lengths_each_end_by_their_own_mean(tmp_path: Path) -> None:
    page = io.StringIO()
    with RunLog(tmp_path, Console(file=page, width=80), epochs=3, epoch=1, step=7) as log:
        for epoch, first, losses in ((2, 8, [1.0, 2.0, 6.0]), (3, 11, [4.0, 5.0])):
            log.begin_epoch(epoch, first - 1, len(losses))
            for step, loss in enumerate(losses, start=first):
                log.step(epoch, step, {"identity": loss}, frames=8, seconds=2.0, waited=0.5)
    lines = page.getvalue().splitlines()
    assert lines == [
        "epoch 2/3  loss 3.000  identity 3.000  4 frames/s  data wait 25%  ETA 0:00:06",
        "epoch 3/3  loss 4.500  identity 4.500  4 frames/s  data wait 25%  ETA 0:00:00",
    ]


def test_an_interrupt_waits_for_the_end_of_what_must_not_be_cut() -> None:
    ended = []

    @uninterrupted()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append("the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert ended == ["the block"]
    with pytest.raises(KeyboardInterrupt):  # the handler is Python's own again
        signal.raise_signal(signal.SIGINT)


def test_only_the_main_thread_puts_interrupts_off() -> None:
    handlers = []

    def work() -> None:
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


class Interrupting(dict[str, float]):
    """Losses that send an interrupt when they are read."""

    def values(self) -> ValuesView[float]:  # type: ignore[override]
        signal.raise_signal(signal.SIGINT)
        return super().values()


def test_a_step_is_noted_whole_or_not_at_all(tmp_path: Path) -> None:
    with RunLog(tmp_path, Console(file=io.StringIO()), epochs=1) as log:
        log.begin_epoch(1, 0, batches=2)
        with pytest.raises(KeyboardInterrupt):
            log.step(1, 1, Interrupting(identity=5.0), frames=8, seconds=0.01, waited=0.0)
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line)["identity"] == 5.0
