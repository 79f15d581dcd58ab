"""Paired timing, memory, and the rates that this machine reaches, all in one process and one run."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

MIB = 2**20
QUICK = 2  # seconds of rounds that pass without a line of progress

Fn = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def seconds(fn: Fn) -> float:
    """Return the wall time of one call in seconds, until the device has finished."""
    _synchronize()
    start = time.perf_counter()
    result = call_and_wait(fn)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def call_and_wait(fn: Fn) -> object:
    """Call `fn` and return its result when the device has computed it."""
    result = fn()
    _synchronize()
    return result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(fns: Mapping[Name, Fn], repeats: int, warmup: int = 2) -> dict[Name, list[float]]:
    """Return the seconds of each function in each of `repeats` rounds.

    A round calls all functions once, in an order that rotates from round to round; each has been called `warmup` times
    before the first.
    """
    names = list(fns)
    for name in names:
        for _ in range(warmup):
            fns[name]()
    times: dict[Name, list[float]] = {name: [] for name in names}
    begin = time.monotonic()
    gc.collect()
    gc.freeze()  # each collection below looks only at what the functions have left behind
    try:
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                gc.collect()
                times[name].append(seconds(fns[name]))
            _show_progress(turn + 1, repeats, time.monotonic() - begin)
    finally:
        gc.unfreeze()
    return times


def _show_progress(done: int, rounds: int, elapsed: float) -> None:
    """Overwrite one line on stderr, if it is a terminal, with the rounds done and the ETA; clear it after the last."""
    if sys.stderr.isatty() and elapsed > QUICK:
        line = "" if done == rounds else f"round {done}/{rounds}, ETA {elapsed / done * (rounds - done):.0f} s"
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def ratio(baseline: list[float], candidate: list[float]) -> float:
    """Return the speed-up of the candidate: the median over rounds of the ratio of the two times."""
    return median(b / c for b, c in zip(baseline, candidate, strict=True))


def saved_bytes(forward: Callable[[], Iterable[Tensor]], free: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves in `forward` for the backward, each storage counted once.

    The storages of `free` and of the outputs are not counted.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = list(forward())
    known = {tensor.untyped_storage().data_ptr() for tensor in (*free, *outputs)}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def peak_bytes(fn: Fn, device: torch.device) -> int:
    """Return the peak of the device's memory during `fn`, in bytes beyond those allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    # torch.profiler.profile would build its list of events too, which takes most of the time.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        fn()
    allocated = peak = 0
    for event in profile.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def gemm_rates(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the median FLOP/s of each way that PyTorch can multiply (m, k) x (k, n) on the device, by name.

    On a CPU a 16-bit dtype is also multiplied in float32: not every processor has 16-bit instructions.
    """
    fns: dict[str, Fn] = {}
    for multiplied in (dtype, torch.float32) if device.type == "cpu" and dtype.itemsize == 2 else (dtype,):
        a, b = (torch.randn(size, device=device).to(dtype).to(multiplied) for size in ((m, k), (n, k)))
        suffix = "" if multiplied == dtype else " in float32"
        fns["torch.mm" + suffix] = partial(torch.mm, a, b.t())
        # torch.compile calls oneDNN: on processors that are not Intel's, MKL behind torch.mm may reach half of it.
        if device.type == "cpu" and _multiplies_in_onednn(multiplied):
            fns["oneDNN" + suffix] = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
    times = paired(fns, repeats=25)
    return {name: 2 * m * k * n / median(times[name]) for name in fns}


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16; a CPU without its instructions takes minutes for a step."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _multiplies_in_onednn(dtype: torch.dtype) -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and (dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16(torch.device("cpu"))))


def copy_rate(size: int, device: torch.device) -> float:
    """Return the bytes/s, read plus written, of a copy of `size` bytes on the device."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = paired({"copy": lambda: target.copy_(source)}, repeats=25)["copy"]
    return 2 * size / median(times)
