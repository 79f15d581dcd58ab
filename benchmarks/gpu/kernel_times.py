"""GPU time of a call by torch.profiler: kernels, copies and fills."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.measure import Fn

CALLS = 3
# CUPTI can crash on a restart where there are CUDA graphs; torch.profiler sets the same for compiled graphs.
CUPTI = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
NAME = 90  # characters of a kernel's name


def kernel_ms(fn: Fn) -> float:
    """Return the milliseconds of one call's kernels, the mean of a few calls."""
    return sum(us for _, us in _device_events(fn)) / CALLS / 1e3


def by_kernel(fn: Fn, most: int = 20) -> dict[str, Any]:
    """Return the microseconds of one call and its `most` longest kernels: [name, launches per call, mean us]."""
    launches: dict[str, list[float]] = {}
    for name, us in _device_events(fn):
        launches.setdefault(name[:NAME], []).append(us)
    longest = sorted(launches.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "us per call": round(sum(map(sum, launches.values())) / CALLS, 1),
        "launches per call": sum(map(len, launches.values())) / CALLS,
        "kernels": [[name, len(of) / CALLS, round(sum(of) / len(of), 2)] for name, of in longest],
    }


def _device_events(fn: Fn) -> list[tuple[str, float]]:
    """Return the name and microseconds of each GPU event in CALLS calls, after two warm-up calls."""
    os.environ.update(CUPTI)
    for _ in range(2):
        fn()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            fn()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us())
        for event in found.events() or []
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
