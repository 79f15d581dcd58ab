"""`pytest benchmarks`, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.results import ROOT
from tests.parity import BACKENDS

TOY = ["benchmarks", "--toy", "-q"]
# Three runs in one process, as the import of torch takes longest: saved, compared, and with a wrong kernel.
TWICE_AND_WRONG = f"""
import sys
import pytest
from dataclasses import replace
from rru_fast.composite import refine

storage = [f"--benchmark-storage={{sys.argv[1]}}", "--benchmark-autosave"]
saved = pytest.main([*{TOY}, *storage])
print("SECOND")
compared = pytest.main([*{TOY}, *storage, "--benchmark-compare"])
print("THIRD")
exact = refine.forward
refine.forward = lambda *a: (lambda out: replace(out, features=out.features * 1.001))(exact(*a))
wrong = pytest.main([*{TOY}, f"--benchmark-json={{sys.argv[1]}}/wrong.json", "-k", "refine"])
sys.exit(f"ENDED {{saved:d}} {{compared:d}} {{wrong:d}}")
"""


@pytest.mark.exhaustive  # three runs of all kernels
def test_a_run_is_compared_with_the_one_before_and_a_wrong_kernel_has_no_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWICE_AND_WRONG, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr.strip().endswith("ENDED 0 0 1"), done.stdout + done.stderr
    first, second = sorted(tmp_path.glob("*/*.json"))
    saved = json.loads(first.read_text())
    assert first.name.startswith(f"0001_{saved['commit_info']['id']}")
    assert {"hardware", "threads", "torch"} <= saved["machine_info"].keys()
    names = {own["name"] for own in saved["benchmarks"]}
    for backend in BACKENDS:
        assert {f"test_strip_pool[{backend}]", f"test_batch_hard[{backend}]"} <= names
        for mode in ("training", "eval"):
            assert {f"test_refine[{mode}-{backend}-{passes}]" for passes in ("forward", "forward + backward")} <= names
    assert names == {own["name"] for own in json.loads(second.read_text())["benchmarks"]}
    _, _, after = done.stdout.partition("SECOND")
    comparison, _, last = after.partition("THIRD")
    assert "test_strip_pool[eager] (0001_" in comparison and "test_strip_pool[eager] (NOW)" in comparison
    assert "parity: composite, float32 is off by" in last
    measured = {own["name"] for own in json.loads((tmp_path / "wrong.json").read_text())["benchmarks"]}
    assert measured == {name for name in names if name.startswith("test_refine") and "composite" not in name}


def test_the_suite_does_not_collect_benchmarks(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
