"""Time of the GPU's own work in a call, by torch.profiler: kernels, copies and fills."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

CALLS = 3
# As torch.profiler sets them for compiled graphs: where there are CUDA graphs, CUPTI can crash when it starts again.
CUPTI = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
NAME = 90  # characters of a kernel's name


def kernel_ms(work: Callable[[], object]) -> float:
    """Sum of one call's kernels in milliseconds, the mean of a few calls."""
    return sum(us for _, us in _device_events(work)) / CALLS / 1e3


def by_kernel(work: Callable[[], object], most: int = 20) -> dict[str, Any]:
    """Microseconds of one call, and of its `most` longest kernels: [name, launches per call, mean us]."""
    launches: dict[str, list[float]] = {}
    for name, us in _device_events(work):
        launches.setdefault(name[:NAME], []).append(us)
    longest = sorted(launches.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "us per call": round(sum(map(sum, launches.values())) / CALLS, 1),
        "launches per call": sum(map(len, launches.values())) / CALLS,
        "kernels": [[name, len(of) / CALLS, round(sum(of) / len(of), 2)] for name, of in longest],
    }


def _device_events(work: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and microseconds of everything that the GPU did in CALLS calls, after two that are not counted."""
    os.environ.update(CUPTI)
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            work()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us())
        for event in found.events() or []
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
