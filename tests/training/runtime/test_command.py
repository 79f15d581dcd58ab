from __future__ import annotations

import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch

import rru_fast
from training.config.presets import RECIPES
from training.engine.options import make_options
from training.runtime.command import run_command, uninterrupted
from training.runtime.distributed import RunEnded


@pytest.fixture(autouse=True)
def _restore_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: make_options(epochs=0))
    assert capsys.readouterr().err == "error: epochs: got 0, wanted at least 1\n"


def test_a_check_of_the_library_is_bad_input_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: rru_fast.RRU(8, spatial=(2, 2))(torch.rand(2, 3, 5, 2, 2)))
    printed = capsys.readouterr().err
    assert printed.startswith("error: x: got shape (2, 3, 5, 2, 2)")
    assert printed.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        run_command(lambda: int(RECIPES["quick"].name))


def test_an_interrupt_is_one_line_and_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="130"):
        run_command(interrupt)
    assert capsys.readouterr().err == "interrupted\n"


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_command(lambda: warnings.warn("no weights:\n random", stacklevel=1))
    assert capsys.readouterr().err == "warning: no weights: random\n"


def test_a_file_that_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: Path("x" * 300).stat())
    printed = capsys.readouterr().err
    assert printed.startswith("error: [Errno 36] File name too long: ") and printed.count("\n") == 1


@pytest.mark.parametrize(("error", "lines"), [(OSError("the disk is full"), 0), (RuntimeError("a bug"), 1)])
def test_a_thread_that_meets_a_full_disk_leaves_the_report_to_its_caller(
    capsys: pytest.CaptureFixture[str], error: Exception, lines: int
) -> None:
    def fail() -> None:
        raise error

    def start() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    run_command(start)
    assert capsys.readouterr().err.count("Traceback") == lines


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, RunEnded)])
def test_a_signal_that_is_handled_waits_for_the_end_of_an_uninterrupted_block(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    def handle(*_: object) -> None:
        raise raised

    reached = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(number)
            reached.append("end of the block")

    before = signal.signal(number, handle)
    try:
        with pytest.raises(raised):
            work()
        assert signal.getsignal(number) is handle
    finally:
        signal.signal(number, before)
    assert reached == ["end of the block"]
