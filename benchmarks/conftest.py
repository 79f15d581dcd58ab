"""Options of `pytest benchmarks`, and the environment that pytest-benchmark stores with the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness.results import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --toy, which runs each benchmark once at a tiny shape."""
    parser.addoption("--toy", action="store_true", help="run each benchmark once, at a tiny shape")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Store hardware, threads and PyTorch's version; the plugin warns if those of two runs it compares differ."""
    found = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine_info |= {key: found[key] for key in ("hardware", "threads", "torch")}
