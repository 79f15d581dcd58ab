from __future__ import annotations

import warnings

import pytest
import torch

import rru_fast
from training.command import run_command
from training.recipes import RECIPES
from training.settings import Options, resolve


@pytest.fixture(autouse=True)
def _restore_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: resolve(Options(epochs=0), None))
    assert capsys.readouterr().err == "error: epochs: got 0, wanted at least 1\n"


def test_a_check_of_the_library_is_bad_input_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: rru_fast.RRU(8, spatial=(2, 2))(torch.rand(2, 3, 5, 2, 2)))
    told = capsys.readouterr().err
    assert told.startswith("error: x: got shape (2, 3, 5, 2, 2)")
    assert told.count("\n") == 1


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
