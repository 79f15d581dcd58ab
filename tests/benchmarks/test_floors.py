"""Times of small calls, here and in another checkout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import floors
from benchmarks.harness.results import ROOT
from benchmarks.implementations import floors as worker


@pytest.mark.exhaustive  # half a minute
def test_both_checkouts_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = floors.main(floors.Options(against=ROOT, repeats=1, json=path))
    assert [row["implementation"] for row in rows] == [name for name in worker.cases() if not name.startswith("eager")]
    for row in rows:
        assert all(row[f"{column}{suffix} us"] > 0 for column in floors.COLUMNS for suffix in (" before", ""))
        assert ("x eager" in row) == ("x eager before" in row) == row["implementation"].startswith("batch_hard")
    assert json.loads(path.read_text())["environment"]["op"] == "floors"


@pytest.mark.parametrize(
    ("library", "error"),
    [
        ("raise OSError('no kernels')", "1: OSError: no kernels"),
        ("import os; os._exit(9)", "9: "),
        (None, "1: rru_fast: got that of {root}, wanted that of {against}"),  # the installed one would be measured
    ],
    ids=["raises", "dies", "none"],
)
def test_a_checkout_that_cannot_be_measured_is_an_error_with_its_last_line(
    library: str | None, error: str, tmp_path: Path
) -> None:
    if library is not None:
        (tmp_path / "rru_fast.py").write_text(library)
    wanted = f"checkout: got {tmp_path}, which ended with {error.format(root=ROOT, against=tmp_path)}"
    with pytest.raises(SystemExit, match=f"^{re.escape(wanted)}$"):
        floors.main(floors.Options(against=tmp_path))


def test_a_checkout_without_kernels_is_not_measured(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rru_fast", tmp_path / "rru_fast", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    with pytest.raises(SystemExit, match=rf"^checkout: got {tmp_path}, which ended with 1: \S+: .*backend: got 'cpu'"):
        floors.main(floors.Options(against=tmp_path))


def test_options_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^repeats: got 0, wanted at least 1$"):
        floors.main(floors.Options(repeats=0))
    with pytest.raises(SystemExit, match=rf"^against: got {tmp_path}/none, wanted a folder$"):
        floors.main(floors.Options(against=tmp_path / "none"))


def test_a_case_that_is_wrong_is_not_measured() -> None:
    right = worker.cases()["strip_pool, 2 x 2 x 16 x 2 x 2"]
    worker.check("right", right)
    with pytest.raises(SystemExit, match=r"^parity: wrong, forward is off by 1\.0e-03, wanted at most 1e-05$"):
        worker.check("wrong", right._replace(run=lambda x: 1.001 * right.run(x)))
    with pytest.raises(SystemExit, match=r"^parity: wrong, gradient is off by"):
        worker.check("wrong", right._replace(run=lambda x: right.run(x) + 1e-3 * (x - x.detach()).sum()))
    with pytest.raises(SystemExit, match=r"^parity: wrong, forward is off by inf"):
        worker.check("wrong", right._replace(run=lambda x: torch.nan * right.run(x)))
