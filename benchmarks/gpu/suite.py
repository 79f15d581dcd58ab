"""The parity suite of tests/test_gpu.py in two parts: its core, and the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# "torch.float16" rather than "float16", which "torch.bfloat16" contains. The tests of autotuning and of TF32 are of
# triton alone, but do not have it in their names.
CORE = "(triton or cuda or tuned or products_of_tf32) and not compiled and not torch.float16 and not more_than_31"
REST = f"not ({CORE})"
WORKERS = 12
ENDING = 20  # seconds for pytest to write its results; xdist needs 10 of them to end its workers


def suite(root: Path, selection: str, junit: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Run a selection of the suite and yield its counts and failures; interrupts it before `seconds` are over."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", selection]
    command += ["-o", "faulthandler_timeout=60", "--maxfail=60", f"--junitxml={junit}", "tests/test_gpu.py"]
    plugins = {
        "xdist": ["-n", str(min(WORKERS, os.cpu_count() or 1))],
        "pytest_timeout": ["--timeout=80"],
    }
    for module, options in plugins.items():
        command += options if find_spec(module) else []
    if absent := [module for module in plugins if not find_spec(module)]:
        yield {"not installed": absent}
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL)
    stopped = False
    try:
        status = process.wait(max(1.0, seconds - ENDING))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)
        status = process.wait()
    yield from counts(junit)
    if stopped:
        yield {"ended": f"stopped after {seconds - ENDING:.0f} s"}
    elif status not in (0, 1):  # 1: tests failed, as the counts show
        yield {"failed": f"pytest ended with status {status}"}


def counts(junit: Path) -> Iterator[dict[str, Any]]:
    """Yield the numbers of tests, skipped and failed, then the name and first line of each failure."""
    if not junit.exists():
        return
    cases = list(ElementTree.parse(junit).iter("testcase"))
    bad = {"failure", "error"}
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = [(case.get("name"), child) for case in cases for child in case if child.tag in bad]
    yield {"tests": len(cases), "skipped": skipped, "failures": len(failed)}
    for name, child in failed:
        yield {"failed": f"{name}: {(child.get('message') or '').strip().partition(chr(10))[0]}"}
