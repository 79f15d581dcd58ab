"""Bars and lines on a real terminal (a pty), and what reaches a file in place of one."""

from __future__ import annotations

import io
import multiprocessing
import os
import pty
import re
import sys
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from training.engine.progress import LiveView, Measured
from training.runtime.terminal import progress, say, track


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Put stdout and stderr on a terminal of 80 columns; the result returns what was written since its last call.

    No fixture: pytest sets the streams again when a test begins.
    """
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, os.fdopen(os.dup(theirs), "w"))
    os.set_blocking(ours, False)

    def read() -> str:
        parts = []
        while True:
            try:
                parts.append(os.read(ours, 2**16))
            except BlockingIOError:
                return b"".join(parts).decode().replace("\r\n", "\n")

    return read


def screen(written: str) -> list[str]:
    """Lines that a terminal shows of what was written to it, as far as rich's codes for moving and erasing go."""
    lines, row, column = [""], 0, 0
    for code, char in re.findall(r"(\x1b\[[?\d;]*[A-Za-z])|(.|\n)", written):
        if char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        elif char:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code == "\x1b[2K":
            lines[row] = ""
    return lines


@pytest.mark.parametrize("forced", [False, True])
def test_off_a_terminal_there_is_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track(range(3), "Working", 3)) == [0, 1, 2]
    say("done")
    assert capsys.readouterr() == ("done\n", "")


def test_a_bar_shows_count_and_eta_in_its_columns_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with progress("Extracting features", 250_000, "frames") as advance:
        advance(125_000)
        time.sleep(0.6)
        (line,) = filter(None, screen(during := terminal()))
    assert re.fullmatch(r"Extracting features +\S+ +125000/250000 frames 0:00:00 ETA 0:00:0\d *", line)
    assert len(line) <= 80
    assert not any(screen(during + terminal()))


def test_bars_within_a_bar_are_drawn_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    for _ in track(range(1), "Evaluating", 2, "runs"):
        with progress("Extracting features", None):
            outer, inner = filter(None, screen(terminal()))
    assert outer.startswith("Evaluating ") and " 0/2 " in outer
    assert re.fullmatch(r"Extracting features +\S+ +0:00:00 *", inner)


def test_a_line_said_during_a_bar_stays_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    written = ""
    with progress("Training", 3, "runs") as advance:
        for number in range(3):
            say(f"run {number} " + "of many " * 12)  # wider than the terminal
            advance(1)
            written += terminal()
            *lines, bar = filter(None, screen(written))
            assert [line.split(" of ")[0] for line in lines] == [f"run {before}" for before in range(number + 1)]
            assert bar.startswith("Training ")
    written += terminal()
    assert [line[:5] for line in screen(written) if line] == ["run 0", "run 1", "run 2"]


def test_lines_for_a_file_reach_it_while_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, page = open_terminal(monkeypatch), io.StringIO()
    monkeypatch.setattr(sys, "stdout", page)
    with progress("Training", 3, "runs"):
        say("run 0")
        sys.stdout.write("of a library's\n")
    assert page.getvalue() == "run 0\nof a library's\n"
    assert "run 0" not in (written := terminal()) and "Training" in written


def test_an_error_ends_the_bar_and_shows_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)

    def fail() -> None:
        for item in track(range(3), "Working", 3):
            raise ValueError(f"item {item} is wrong")

    with pytest.raises(ValueError, match="item 0 is wrong"):
        fail()
    written = terminal()
    assert not any(screen(written))
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    with progress("Again", 1):
        assert "Again" in terminal()


def test_another_process_draws_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    process = multiprocessing.get_context("fork").Process(target=lambda: list(track(range(3), "Working", 3)))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert terminal() == ""


def test_during_training_an_evaluation_is_drawn_in_the_run_s_view(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    measured = Measured()
    measured.add({"loss": 1.5}, frames=8, seconds=1.0, waited=0.5)
    view = LiveView(Console(), epochs=3, step=0)
    view.start()
    view.begin_epoch(1, total=30)
    view.show(10, measured, measured)
    with progress("Extracting features", 200, "frames") as advance:
        advance(50)
        view.console.print("after epoch 0")
        view.refresh()
        written = terminal()
    view.refresh()
    after = terminal()
    view.stop()
    said, run, _, now, epoch, bar = filter(None, screen(written))
    assert said.startswith("after epoch 0")
    assert run.startswith("epoch 1/3 ") and " 10/30 " in run
    assert now.split()[:2] == ["this", "step"] and epoch.split()[:2] == ["this", "epoch"]
    assert bar.startswith("Extracting features ") and " 50/200 frames " in bar
    assert [line.split()[0] for line in screen(written + after) if line] == ["after", "epoch", "loss", "this", "this"]
    assert [line for line in screen(written + after + terminal()) if line.strip()] == [said]
    with progress("Alone again", 2):
        assert "Alone again" in terminal()


def test_where_the_view_has_no_terminal_an_evaluation_s_bar_has(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    view = LiveView(Console(file=io.StringIO()), epochs=3, step=0)
    view.start()
    with progress("Extracting features", 200, "frames"):
        assert "Extracting features" in terminal()
    view.stop()
