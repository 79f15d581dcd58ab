"""Processes of their own that cost no start: forked from one that has the training package imported, and no threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
# pytest too: a child imports what its function is a part of, and what the process that started it began with.
# torch._dynamo: the first optimiser imports it, which takes a second.
PROCESSES.set_forkserver_preload(
    ["pytest", "torch._dynamo", "scipy.io", "training.ablation", "training.reproduce", "tests.training.three_steps"]
)


def exit_code(target: Callable[..., None], *arguments: Any) -> int | None:
    """How a process of its own ended; minus the signal that ended it."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode
