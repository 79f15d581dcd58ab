"""`python -m rru_fast.calibrate`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rru_fast import native
from rru_fast.calibrate import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"clips": 3, "frames": 2, "tracklet": 5, "channels": 6, "hidden": 4, "spatial-hidden": 3}
SMALL = ["--device", "cpu", "--spatial", "3", "2", *(f"--{name}={size}" for name, size in SIZES.items())]
needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")


@pytest.mark.exhaustive
@needs_kernels
def test_a_table_says_what_was_decided_for_each_kind_and_why(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rru_fast.calibrate", *SMALL, "--dtype", "float32"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "RuntimeWarning" not in done.stderr  # of runpy, about a module that is imported twice
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    header, rule, *decided = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    assert header == list(command.COLUMNS)
    assert all(re.fullmatch("-+", cell) for cell in rule)
    assert [(row[0], row[1]) for row in decided] == [
        ("refine, training, float32, 4 x 2 x 6 x 3 x 2, D 4 A 3", "cpu"),
        ("refine, eval, no gradients, float32, 1 x 8 x 6 x 3 x 2, D 4 A 3", "cpu"),
        ("strip_pool, float32, 4 x 2 x 6 x 3 x 2", "cpu"),
        ("batch_hard, float32, 4 x 6", "cpu"),
        ("batch_hard, float32, 4 x 4 x 6", "cpu"),
    ]
    for row in decided:
        assert re.fullmatch(r"0\.\d\d", row[2]) and row[8] == f"composite is {row[2]} x as fast, wanted 1.10 x"
    assert re.search(r"5 kinds in \d+ s\n$", done.stdout)
    files = list((tmp_path / "rru_fast" / "auto").glob("*.json"))
    assert len(files) == 5
    assert {json.loads(file.read_text())["decision"]["backend"] for file in files} == {"cpu"}
    again = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert [line for line in again.stdout.splitlines() if line.startswith("| ")] == rows
    shown = [sys.executable, "-c", "import rru_fast; rru_fast.show_config()"]
    lines = subprocess.run(shown, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(": cpu: composite is 0." in line for line in lines) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clips", "0"], "argument --clips: got '0', wanted an integer of at least 1"),
        (["--clips", "many"], "argument --clips: got 'many', wanted an integer of at least 1"),
        (["--op", "conv"], "argument --op: invalid choice: 'conv'"),
        (["--seconds", "soon"], "argument --seconds: got 'soon', wanted a number above 0"),
        (["--seconds", "nan"], "argument --seconds: got 'nan', wanted a number above 0"),
        (["--seconds", "-3"], "argument --seconds: got '-3', wanted a number above 0"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "mps", "meta"])
def test_a_device_that_is_not_here_is_one_line(device: str) -> None:
    with pytest.raises(SystemExit, match=f"^--device: got '{device}', wanted a device that is here: .+$"):
        command.main(["--device", device])


@pytest.mark.skipif(native.missing() is None, reason="the C++ kernels are built")
def test_without_another_backend_there_is_nothing_to_measure() -> None:
    with pytest.raises(SystemExit, match=r"^--device: got cpu, where composite is the only backend"):
        command.main(["--device", "cpu"])
