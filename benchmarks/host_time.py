"""Host time of a forward and a backward of `refine` by Triton, and of `auto` in every operator, without a GPU.

    python -m benchmarks.host_time

Binds and specializes each launch as on a GPU, and stops before the call into the driver. Tensors are small and on the
CPU: the host's work depends on the number of frames, not on sizes. Prints the minimum thread time of 300 calls, in
microseconds, and the number of launches that went through Triton's binding; then what a call with backend="auto" takes
to find its backend once that is decided.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.launches.recording import refine_arguments
from benchmarks.launches.stub import Stub, launched_by
from rru_fast.arguments import RefineNeed, RefineUpstream
from rru_fast.auto import choice, kinds
from rru_fast.reference import RRU
from rru_fast.triton import refine

SHAPE = (2, 8, 32, 8, 8)
CALLS = 300


def main() -> None:
    """Measure and print a line per dtype."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        launches: list[bool] = []

        def count(stub: Stub, grid: tuple[int, ...], *arguments: Any, launches: list[bool] = launches) -> None:
            launches.append(_bound(arguments))

        with launched_by(count):
            forward, backward = _calls(dtype)
            backward()
            launches.clear()
            forward()
            backward()
            bound, total = sum(launches), len(launches)
            times = [_min_us(call) for call in (forward, backward)]
        print(
            f"{str(dtype).removeprefix('torch.')}: forward {times[0]:.0f} us, backward {times[1]:.0f} us; "
            f"{total} launches, {bound} of them bound by Triton"
        )

    for op, us in auto_us().items():
        print(f"auto, decided, {op}: {us:.1f} us")


def auto_us() -> dict[str, float]:
    """Return the microseconds that a call with "auto" takes to find its backend, by operator."""
    _, _, channels, height, width = SHAPE
    x, features = torch.randn(SHAPE), torch.randn(20, channels)
    arguments = refine_arguments(RRU(channels, (height, width)), x)
    w, w_s1, w_c, inputs, training = (getattr(arguments, name) for name in ("w", "w_s1", "w_c", "inputs", "training"))
    keys: dict[str, tuple[Tensor, Callable[[], kinds.Key]]] = {
        "refine": (x, lambda: kinds.refine_key(x, w, w_s1, w_c, inputs, training, True)),
        "strip_pool": (x, lambda: kinds.strip_pool_key(x.device, x.dtype, x.shape, x.stride(), True)),
        "batch_hard": (features, lambda: kinds.batch_hard_key(features, None, "euclidean", True)),
    }
    found = {}
    for op, (tensor, key) in keys.items():
        with patch.object(choice, "_decided_on", cache(lambda device_type: True)):
            choice._backends[key()] = "composite"

            def look_up(
                tensor: Tensor = tensor, key: Callable[[], kinds.Key] = key, of: Any = kinds.KINDS[op].from_key
            ) -> str | None:
                return choice.choose(key(), of) if choice.decides(tensor) else None

            assert look_up() == "composite"
            found[op] = _min_us(lambda: [look_up() for _ in range(100)]) / 100
    choice.forget()
    return found


def _bound(arguments: tuple[Any, ...]) -> bool:
    """Return True if Triton has bound these arguments, which it passes on as tensors."""
    return any(isinstance(value, Tensor) or (isinstance(value, tuple) and _bound(value)) for value in arguments)


def _calls(dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a forward and a backward of the unit as calls without arguments."""
    clips, _, channels, height, width = SHAPE
    x = torch.randn(SHAPE).to(dtype)
    arguments = refine_arguments(RRU(channels, (height, width)).to(dtype), x)
    saved = refine.forward(arguments, save=True).saved
    upstream = RefineUpstream(torch.randn_like(x), torch.randn(clips, channels, height).to(dtype))
    need = RefineNeed(need_x=True, need_weights=True)
    return (
        lambda: refine.forward(arguments, save=True),
        lambda: refine.backward(upstream, saved, arguments, need),
    )


def _min_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    return 1e6 * min(times)


if __name__ == "__main__":
    main()
