"""Processes without the cost of imports: forked from one that has the training package imported."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch.distributed import TCPStore

PROCESSES = multiprocessing.get_context("forkserver")
# pytest too: a child imports what its function is a part of, and what the process that started it began with.
# torch._dynamo: the first optimizer imports it, which takes a second.
PROCESSES.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "scipy.io",
        "training.ablation",
        "training.reproduce.__main__",
        "tests.helpers.three_steps",
    ]
)


class Ended(NamedTuple):
    """Exit status of a process, negative for the signal that ended it, its stdout and its stderr."""

    status: int | None
    out: str
    err: str


class Forked:
    """A function called in a process of its own."""

    def __init__(self, target: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None):
        self._folder = TemporaryDirectory(prefix="said.")
        self._said = [Path(self._folder.name) / stream for stream in ("out", "err")]
        for path in self._said:
            path.touch()
        self.process = PROCESSES.Process(target=_call, args=(environment or {}, self._said, target, arguments))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def out(self) -> str:
        """Return its stdout up to now."""
        return self._said[0].read_text()

    def wait_for(self, there: Callable[[], object]) -> None:
        """Block until a condition is true; fail if the process ends before."""
        deadline = time.monotonic() + 120
        while not there():
            assert self.process.is_alive(), f"it ended before: {self.end()}"
            assert time.monotonic() < deadline, f"two minutes have passed: {self._said[1].read_text()}"
            time.sleep(0.002)

    def end(self) -> Ended:
        """Wait for its end."""
        self.process.join(timeout=300)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"it did not end: {self._said[1].read_text()}")
        return Ended(self.process.exitcode, *(path.read_text() for path in self._said))


def exit_code(target: Callable[..., None], *arguments: Any) -> int | None:
    """Return the exit status of a function in a process of its own, negative for the signal that ended it."""
    return Forked(target, *arguments).end().status


def command(module: str, *arguments: Any) -> Forked:
    """Start a module as `python -m` does."""
    return Forked(main_of, module, [str(argument) for argument in arguments])


class Ranks:
    """A function called in several processes, with the environment variables of torchrun.

    As torchrun does, this process hosts their store, and sends SIGTERM to the others once one has failed.
    """

    def __init__(self, count: int, target: Callable[..., None], *arguments: Any):
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "WORLD_SIZE": str(count)}
        self.each = [
            Forked(target, *arguments, environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]

    def end(self) -> list[Ended]:
        """Wait for their ends."""
        running = [one.process for one in self.each]
        while running:
            connection.wait([process.sentinel for process in running], timeout=300)
            ended = [process for process in running if process.exitcode is not None]
            running = [process for process in running if process.exitcode is None]
            if not ended or any(process.exitcode for process in ended):
                for process in running:
                    process.terminate()
            assert ended, "they hang"
        return [one.end() for one in self.each]


def ranks(count: int, target: Callable[..., None], *arguments: Any) -> list[Ended]:
    """Call a function in several processes as torchrun does, and wait for their ends."""
    return Ranks(count, target, *arguments).end()


def command_of_ranks(count: int, module: str, *arguments: Any) -> Ranks:
    """Start a module in several processes as torchrun does."""
    return Ranks(count, main_of, module, [str(argument) for argument in arguments])


def _call(
    environment: Mapping[str, str], said: list[Path], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    target(*arguments)


def main_of(module: str, arguments: list[str]) -> None:
    """Run a module as `python -m` does, in this process."""
    sys.argv[1:] = arguments
    warnings.filterwarnings("ignore", "'training.* found in sys.modules", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
