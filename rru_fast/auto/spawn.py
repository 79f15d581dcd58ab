"""Measurement of a kind in a process of its own: a kernel that crashes or hangs must not take the caller with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rru_fast.auto import cards, processes
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import Kind

SECONDS = 120.0
"""Time limit of a measurement."""

# Without the working directory in sys.path, whose files could hide modules; with the package that is in use here.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append({path!r}); "
    "from rru_fast.calibrate import worker; worker.main()"
)


def command() -> list[str]:
    """Return the command of a measurement, to which its request is added."""
    return [sys.executable, "-c", _START.format(path=str(Path(__file__).resolve().parents[2]))]


def measure(
    kind: Kind,
    device: torch.device,
    default: str,
    candidates: Sequence[str],
    *,
    seconds: float = SECONDS,
    note: Callable[[str], object] = lambda stage: None,
) -> Decision:
    """Hold candidates to the oracle, time them against the default backend, and return which one is to run.

    Args:
        kind: a call, with exact sizes.
        device: where it runs.
        default: the backend that serves unless another is faster.
        candidates: the others.
        seconds: time limit; the process is killed then.
        note: called with each stage of the measurement, in words, when it begins.

    Returns:
        A decision for `default`, or composite if that is a candidate, with the reason, if the process fails.
    """
    request = {
        "kind": kind.to_json(),
        "device": str(device),
        "uuid": cards.uuid_of(device),
        "default": default,
        "candidates": list(candidates),
        "threads": torch.get_num_threads(),
    }
    if not sys.executable:
        return _failed(default, "no Python to start: sys.executable is empty", keep=False)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    answer = _Answer(reader, note)
    try:
        with tempfile.TemporaryFile() as output:
            words = [*command(), json.dumps(request), str(writer)]
            env = {**os.environ, "RRU_FAST_CALIBRATE": "0"}
            ended = processes.run(words, seconds, output, env=env, poll=answer.read, inherit=[writer])
            output.seek(0)
            last = ["", *output.read().decode(errors="replace").strip().splitlines()][-1]
        answer.read()
    except OSError as error:
        return _failed(default, f"no process could be started: {error}", keep=False)
    finally:
        os.close(reader)
        os.close(writer)
    if answer.decision is not None:
        return Decision.from_json({**answer.decision, "date": date.today().isoformat()})
    return _failed(default, *_why(answer, ended, last))


class _Answer:
    """What a measurement has written so far: lines of JSON, each a stage or, the last one, the decision."""

    def __init__(self, reader: int, note: Callable[[str], object]) -> None:
        self._reader, self._note, self._rest = reader, note, b""
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
                self._note(self.stage)


def _why(answer: _Answer, ended: str, last: str) -> tuple[str, bool]:
    """Return why a process ended without a decision, and whether that would happen again."""
    if ended.startswith("stopped"):
        return f"{ended}, in {answer.stage}", bool(answer.of)
    status = int(ended.split()[-1]) if ended != "ok" else 0
    if status < 0:
        # The host's memory may be at its end: not the candidate's fault.
        return f"ended by {signal.Signals(-status).name}, in {answer.stage}", bool(
            answer.of
        ) and -status != signal.SIGKILL
    return f"{ended}, in {answer.stage}" + (f": {last}" if last else ""), bool(answer.of)


def _failed(default: str, reason: str, keep: bool) -> Decision:
    return Decision(default, reason, keep=keep, default=default, date=date.today().isoformat())
