"""The process that measures a kind, on a card that is none: kernels in Triton's interpreter, times as a test sets them.

Arguments: the scenario, then those of `rru_fast.calibrate.worker`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, __file__]

# Seconds of a call of composite; one of triton takes 1.
TIMES = {"fast": 2.0, "slow": 0.5, "nearly as fast": 1.05}


def main() -> None:
    """Measure, with kernels and clocks of the scenario."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {"TRITON_INTERPRET": "1", "RRU_FAST_AUTOTUNE": "0", "RRU_FAST_FLOAT32": "ieee"}
    scenario = sys.argv.pop(1)
    if scenario == "does not start":
        sys.exit("CUDA error: all CUDA-capable devices are busy or unavailable")
    from rru_fast.calibrate import worker
    from rru_fast.triton import _device, strip_pool

    _device.num_sms = lambda tensor: 16
    strip_pool.forward = changed(scenario, strip_pool.forward)
    numbers = count()

    def seconds(call: Callable[[], object], backend: str) -> float:
        call()
        if scenario == "noisy":
            return 1.0 if backend == "triton" else (0.8, 1.6, 1.2)[next(numbers) % 3]
        return 1.0 if backend == "triton" else TIMES.get(scenario, 2.0)

    worker.CLOCK = seconds
    worker.main()


def patches(scenario: str) -> list[tuple[str, object]]:
    """Return what makes a CPU a card on which triton is a candidate, whose measurements follow a scenario."""
    from rru_fast import backends

    return [
        ("rru_fast.auto.cards.AUTOMATIC", frozenset({"cpu"})),
        ("rru_fast.auto.spawn.command", lambda: [*SCRIPT, scenario]),
        ("rru_fast.backends.BACKENDS", {**backends.BACKENDS, "cpu": "not on this card", "triton": None}),
        ("rru_fast.backends._serves", lambda backend, device: backend != "cpu"),
    ]


def changed(scenario: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernels' forward as it is in the scenario."""
    calls = count()

    def run(*args: Any) -> Any:
        out = forward(*args)
        if scenario == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif scenario == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif scenario == "is told to end":
            os.kill(os.getpid(), signal.SIGTERM)
        elif scenario == "is wrong once":
            out *= 3 if next(calls) == 2 else 1  # the first draw takes two calls
        elif scenario == "meets a busy card":
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")
        elif scenario == "hangs":
            time.sleep(600)
        elif scenario == "writes NaN":
            out[..., -1] = float("nan")
        elif scenario == "is wrong":
            out *= 1 + 1e-4
        elif scenario == "differs from run to run":
            out *= 1 + 1e-7 * (next(calls) % 2)
        elif scenario == "runs out of memory":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
        elif scenario == "does not compile":
            raise RuntimeError("backend: got 'triton', whose kernel failed: PTXASError: ptxas: fatal")
        return out

    return run


if __name__ == "__main__":
    main()
