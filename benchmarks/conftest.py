"""`pytest benchmarks`: what is measured where, beside the figures that pytest-benchmark keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option: whether it runs, in place of how fast."""
    parser.addoption("--toy", action="store_true", help="tiny shapes: whether the benchmarks run")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Say which PyTorch, threads and device; a comparison of runs that differ there carries the plugin's warning."""
    environment = measure.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine_info |= {key: environment[key] for key in ("hardware", "threads", "torch")}
