"""Commands in their own process groups, which are killed at a time limit or with the process that started them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

POLL = 0.1  # seconds
ENDING = 10  # seconds that a killed process may take to end


def run(
    command: Sequence[str],
    seconds: float,
    output: IO[bytes],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    poll: Callable[[], object] = lambda: None,
    inherit: Sequence[int] = (),
) -> str:
    """Run a command; no process of its group survives.

    Args:
        command: program and arguments; the program may call `end_with_parent`.
        seconds: time limit, at which the group is killed.
        output: open file that its standard output and error go to.
        cwd, env: working directory and environment; those of this process by default.
        poll: called every 0.1 s while the command runs.
        inherit: file descriptors that it may use too.

    Returns:
        "ok", "exit status N", negative for a signal, or "stopped after N s".

    Raises:
        OSError: the command cannot be started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # nothing is written; the command reads the end of file when this process ends
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=env,
        start_new_session=True,
        pass_fds=inherit,
    )
    reaped = False
    try:
        end = time.monotonic() + seconds
        # WNOWAIT: a process that is not reaped keeps its ID, so killpg below cannot hit another group.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                return f"stopped after {seconds:.0f} s"
            poll()
            time.sleep(POLL)
    except ChildProcessError:  # it has ended, and another part of this program has reaped it, or SIGCHLD is ignored
        reaped = True
    finally:
        with suppress(ProcessLookupError):
            if not reaped:
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a hanging driver blocks the end of its process
            process.wait(ENDING)
        assert process.stdin is not None
        process.stdin.close()
    return f"exit status {process.returncode}" if process.returncode else "ok"


def end_with_parent() -> None:
    """Kill this process's group as soon as the process that called `run` has ended."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode) or os.getpgrp() != os.getpid():
        return
    pipe = os.dup(0)  # unlike 0, not inherited by children
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def wait() -> None:
        os.read(pipe, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
