"""Measurement of a kind in a process of its own: a kernel that crashes or hangs must not take the caller with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rru_fast.auto import cards, decisions, processes
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import Kind

SECONDS = 120.0
"""Time limit of a measurement."""

# Signals of a program that fails by itself; others are sent to it, and say nothing about a kernel.
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP")
_PACKAGE = Path(__file__).resolve().parents[1]
# The package that is in use here, wherever it was found; this process's sys.path comes last there, so that no file in a
# working directory hides another module.
_START = """
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path]
sys.path += [path for path in {paths!r} if path not in sys.path]
spec = importlib.util.spec_from_file_location("rru_fast", {init!r}, submodule_search_locations=[{folder!r}])
sys.modules["rru_fast"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["rru_fast"])
from rru_fast.calibrate import worker
worker.main()
"""


def command() -> list[str]:
    """Return the command of a measurement, to which its request is added."""
    paths = [path for path in sys.path if path]
    start = _START.format(paths=paths, init=str(_PACKAGE / "__init__.py"), folder=str(_PACKAGE))
    return [sys.executable, "-c", start]


def measure(
    kind: Kind, device: torch.device, default: str, candidates: Sequence[str], *, seconds: float = SECONDS
) -> Decision:
    """Hold candidates to the oracle, time them against the default backend, and return which one is to run.

    Args:
        kind: a call, with exact sizes.
        device: where it runs.
        default: the backend that serves unless another is faster.
        candidates: the others.
        seconds: time limit; the process is killed then.

    Returns:
        If the process fails, a decision for the default, with the reason; for composite if the default has failed.
    """
    request = {
        "kind": kind.to_json(),
        "device": str(device),
        "uuid": cards.uuid_of(device),
        "default": default,
        "candidates": list(candidates),
        "threads": torch.get_num_threads(),
    }
    if not sys.executable or getattr(sys, "frozen", False):
        return _failed(default, "this program has no Python to start", decisions.HOUR)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    answer = _Answer(reader)
    try:
        with tempfile.TemporaryFile() as output:
            words = [*command(), json.dumps(request), str(writer)]
            env = {**os.environ, "RRU_FAST_CALIBRATE": "0"}
            ended = processes.run(words, seconds, output, env=env, poll=answer.read, inherit=[writer])
            output.seek(0)
            last = ["", *output.read().decode(errors="replace").strip().splitlines()][-1]
        answer.read()
    except OSError as error:
        return _failed(default, f"no process could be started: {error}", decisions.HOUR)
    finally:
        os.close(reader)
        os.close(writer)
    if answer.decision is not None:
        return Decision.from_json({**answer.decision, "measured": time.time()})
    return _failed("composite" if answer.of == default else default, *_why(answer, ended, last))


class _Answer:
    """What a measurement has written so far: lines of JSON, each a stage or, the last one, the decision."""

    def __init__(self, reader: int) -> None:
        self._reader, self._rest = reader, b""
        self.stage, self.of = "its start", ""
        self.decision: Any = None

    def read(self) -> None:
        """Read what has been written since."""
        try:
            self._rest += os.read(self._reader, 1 << 20)
        except BlockingIOError:
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            values = json.loads(line)
            self.decision = values.get("decision")
            if "stage" in values:
                self.stage, self.of = values["stage"], values["of"]


def _why(answer: _Answer, ended: str, last: str) -> tuple[str, float | None]:
    """Return why a process ended without a decision, and for how long that is to be believed; None for good."""
    if ended.startswith("stopped"):  # perhaps while it compiled kernels, which are kept
        return f"{ended}, in {answer.stage}", decisions.DAY
    status = int(ended.split()[-1]) if ended != "ok" else 0
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        by = names.get(-status, f"signal {-status}")
        return f"ended by {by}, in {answer.stage}", None if answer.of and by in _CRASHES else decisions.HOUR
    return f"exit status {status}, in {answer.stage}" + (f": {last}" if last else ""), decisions.HOUR


def _failed(default: str, reason: str, lasts: float | None) -> Decision:
    return Decision(default, reason, default, lasts=lasts, measured=time.time())
