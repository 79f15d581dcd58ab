"""Autotuning of block sizes, with a heuristic default and an on-disk cache.

Autotuning times whole calls on the caller's tensors, which change nothing but their outputs: the candidates of one
kernel after another, each in alternation with the best so far. It runs at the first call of a kind on a GPU, not while
a CUDA graph is captured; RRU_FAST_AUTOTUNE=0 turns it off. It captures no graph, empties no cache and waits for its own
stream alone, so that other threads, a DataLoader's among them, go on. Results are cached in
$XDG_CACHE_HOME/rru_fast/autotune, one file per kind of call, so that processes can write in parallel.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache as cached
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from rru_fast import cache
from rru_fast.triton import _device

KernelConfig = dict[str, int]
"""Block sizes, warps and stages of one kernel."""
LaunchConfig = dict[str, KernelConfig]
"""Config of each kernel of a call, by the kernel's name."""

# For kernels with about as many programs as fit at once: registers are not spilled to make room for more programs.
ALL_REGISTERS = {"maxnreg": 255}


class Candidates(NamedTuple):
    """Configs of an operator's kernels."""

    default: LaunchConfig
    others: Mapping[str, list[KernelConfig]]
    """Alternatives to a kernel's default, by its name."""


# Required speed-up. A change of config can change the order of sums, and so the last bits: not within noise.
MARGIN = 1.03
ROUNDS = 7
LONG = 5e-3  # seconds of host time from which a call is timed in fewer rounds
LONGEST_WAIT = 0.05  # seconds
CLOCK = 2e9  # Hz, of a GPU's multiprocessors at most
# Configs tuned on known GPUs: one file per GPU, a list of cache entries.
SHIPPED = Path(__file__).parent / "tuned"

_known: dict[tuple[Any, ...], LaunchConfig] = {}
_defaults: dict[tuple[Any, ...], LaunchConfig] = {}
_tuning = threading.Lock()
_this_thread = threading.local()


@contextmanager
def without_tuning() -> Iterator[None]:
    """Use configs that have been tuned before, in this thread, and no others but the defaults."""
    before = getattr(_this_thread, "untuned", False)
    _this_thread.untuned = True
    try:
        yield
    finally:
        _this_thread.untuned = before


def enabled(tensor: Tensor) -> bool:
    """Return True if a call on this tensor may be tuned now."""
    asked = os.environ.get("RRU_FAST_AUTOTUNE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"RRU_FAST_AUTOTUNE: got {asked!r}, wanted 0 or 1")
    if asked == "0" or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return tensor.is_cuda or asked == "1"


def autotune(
    op: str,
    sizes: tuple[Any, ...],
    tensor: Tensor,
    candidates: Callable[[], Candidates],
    run: Callable[[LaunchConfig], object],
) -> LaunchConfig:
    """Return the fastest config for calls of this operator and these sizes; without tuning, the GPU's or the default.

    Args:
        op, sizes: the kind of call, with the dtype and the device of `tensor`.
        tensor: the call's main input.
        candidates: returns the configs to choose from.
        run: performs the call with a config.
    """
    key = op, sizes, tensor.dtype, tensor.device, _device.num_sms(tensor)
    if key in _known:
        return _known[key]
    if getattr(_this_thread, "untuned", False) and enabled(tensor):
        own, kind = candidates(), _kind(op, sizes, tensor)
        found = _usable(cache.read_json(_path(op, kind)), kind, own) or _usable(_shipped(), kind, own)
        _known[key] = found or own.default
        return _known[key]
    if not enabled(tensor) or not _tuning.acquire(blocking=False):
        if key not in _defaults:
            own = candidates()
            _defaults[key] = _usable(_shipped(), _kind(op, sizes, tensor), own) or own.default
        return _defaults[key]
    try:
        own = candidates()
        kind = _kind(op, sizes, tensor)
        config = _usable(cache.read_json(_path(op, kind)), kind, own) or _usable(_shipped(), kind, own)
        if config is None:
            config = _best(own, run, tensor.is_cuda)
            # A folder that is not writable: the next process tunes again.
            cache.write_json(_path(op, kind), {kind: config})
    finally:
        _tuning.release()
    _known[key] = config
    return config


def _best(candidates: Candidates, run: Callable[[LaunchConfig], object], on_gpu: bool) -> LaunchConfig:
    """Return the fastest config of those that run here.

    Raises:
        RuntimeError: no config runs; the error of the default.
    """
    best: LaunchConfig | None = None
    failures: list[tuple[Exception, str]] = []
    for change in _changes(candidates):
        trial = (best or candidates.default) | change
        try:
            run(trial)  # compiles
            if best is None or _faster(run, trial, best, on_gpu):
                best = trial
        except Exception as error:  # the compiler's passes raise anything
            cause = error.__cause__ or error
            needs_more_memory = isinstance(cause, OutOfResources | torch.OutOfMemoryError)
            if on_gpu and not needs_more_memory:
                torch.cuda.current_stream().synchronize()  # raises if the GPU itself is lost
            if best is None and isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
            # Warn once of a failure that all candidates share, and of none that needs more memory than the device has.
            if not needs_more_memory and (best is not None or reason not in {known for _, known in failures}):
                failing = change or "the default"
                warnings.warn(f"rru_fast: got a config that fails here, {failing}: {reason}", stacklevel=2)
            failures.append((error, reason))
    if best is None:
        raise failures[0][0]
    return best


def _changes(candidates: Candidates) -> Iterator[LaunchConfig]:
    """Yield changes to try in order: none first, then each kernel's distinct alternatives."""
    yield {}
    for kernel, configs in candidates.others.items():
        seen = [candidates.default[kernel]]
        for config in configs:
            if config not in seen:
                seen.append(config)
                yield {kernel: config}


def _faster(run: Callable[[LaunchConfig], object], trial: LaunchConfig, best: LaunchConfig, on_gpu: bool) -> bool:
    """Return True if `trial`, which has been compiled, is faster by MARGIN, in the median of paired rounds."""
    if not on_gpu:
        return bool(_wall_seconds(run, best) >= MARGIN * _wall_seconds(run, trial))
    host_seconds = min(_wall_seconds(run, trial) for _ in range(2))
    # The GPU waits until both calls are in its queue; otherwise the host's time would be measured.
    wait = int(min(4 * host_seconds, LONGEST_WAIT) * CLOCK)
    ratios = []
    for _ in range(ROUNDS if host_seconds < LONG else 3):
        torch.cuda._sleep(wait)  # type: ignore[no-untyped-call]
        (best_begin, best_end), (begin, end) = (_events(run, config) for config in (best, trial))
        end.synchronize()
        ratios.append(best_begin.elapsed_time(best_end) / begin.elapsed_time(end))
    return bool(median(ratios) >= MARGIN)


def _events(run: Callable[[LaunchConfig], object], config: LaunchConfig) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Run a call and return the events on the current stream before and after it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run(config)
    end.record()
    return begin, end


def _wall_seconds(run: Callable[[LaunchConfig], object], config: LaunchConfig) -> float:
    begin = time.perf_counter()
    run(config)
    return time.perf_counter() - begin


def _kind(op: str, sizes: tuple[Any, ...], tensor: Tensor) -> str:
    """Return all that a config depends on, as text."""
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else tensor.device.type
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{op} {' '.join(map(str, sizes))} {dtype}, {device}, triton {triton.__version__}, kernels {_sources()}"


@cached
def _sources() -> str:
    """Hash the kernels' code."""
    files = [*Path(__file__).parent.rglob("*_kernels.py"), Path(__file__).with_name("_primitives.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def _path(op: str, kind: str) -> Path:
    return cache.folder("autotune") / f"{op}-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.json"


def _usable(entries: Any, kind: str, candidates: Candidates) -> LaunchConfig | None:
    """Return the config of a kind from cached entries, {kind: config}, if it is one of the candidates."""
    config = entries.get(kind) if isinstance(entries, dict) else None
    default, others = candidates
    if (
        isinstance(config, dict)
        and config.keys() == default.keys()
        and all(own == default[kernel] or own in others.get(kernel, []) for kernel, own in config.items())
    ):
        return config
    return None


@cached
def _shipped() -> dict[str, LaunchConfig]:
    """Read the configs that are shipped with the library as defaults of their GPUs."""
    lists = (json.loads(path.read_text()) for path in sorted(SHIPPED.glob("*.json")))
    return {kind: config for entries in lists for entry in entries for kind, config in entry.items()}
