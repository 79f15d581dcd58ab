"""How large the kernels' blocks are: a plan that suits the sizes, or the fastest of a few, measured once and kept.

Tuning times whole calls, which change nothing but their outputs, one kernel's choices after another. It runs at the
first call of a new kind, on a GPU, not while a CUDA graph is captured; RRU_FAST_AUTOTUNE=0 turns it off. The plans it
found are kept in $XDG_CACHE_HOME/rru_fast/plans.json.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

Meta = dict[str, int]
Plan = dict[str, Meta]
"""By kernel, its blocks and warps."""

_found: dict[str, Plan] = {}


def enabled(tensor: Tensor) -> bool:
    """Whether a call on this tensor may be tuned now."""
    asked = os.environ.get("RRU_FAST_AUTOTUNE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"RRU_FAST_AUTOTUNE: got {asked!r}, wanted 0 or 1")
    if asked == "0" or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return tensor.is_cuda or asked == "1"


def tuned(
    kind: str, sizes: tuple[Any, ...], tensor: Tensor, default: Plan, choices: Mapping[str, list[Meta]],
    run: Callable[[Plan], object],
) -> Plan:  # fmt: skip
    """The fastest plan for calls of this kind and these sizes, or `default` where tuning is off.

    choices: by kernel, what to try instead of the default.
    """
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else tensor.device.type
    dtype = str(tensor.dtype).removeprefix("torch.")
    key = f"{kind} {' '.join(map(str, sizes))} {dtype} {device} triton {triton.__version__}"
    if key in _found:
        return _found[key]
    if not enabled(tensor):
        return default
    kept = _read()
    if key not in kept or {name: set(meta) for name, meta in kept[key].items()} != {
        name: set(meta) for name, meta in default.items()
    }:  # none yet, or one of another version's kernels
        kept[key] = _best(default, choices, run, tensor.is_cuda)
        _write(key, kept[key])
    _found[key] = kept[key]
    return kept[key]


def _best(default: Plan, choices: Mapping[str, list[Meta]], run: Callable[[Plan], object], on_gpu: bool) -> Plan:
    plan, seconds = default, _seconds(lambda: run(default), on_gpu)
    for kernel, metas in choices.items():
        for meta in metas:
            trial = plan | {kernel: meta}
            try:
                taken = _seconds(lambda trial=trial: run(trial), on_gpu)  # type: ignore[misc]
            except triton.runtime.errors.OutOfResources:
                continue  # more shared memory or registers than this GPU has
            except (RuntimeError, triton.CompilationError) as error:
                if on_gpu:
                    torch.cuda.synchronize()  # raises where the GPU itself is lost: then the call is, too
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"rru_fast: {kernel} is not tuned to {meta}, which fails here: {reason}", stacklevel=2)
                continue
            if taken < seconds:
                plan, seconds = trial, taken
    return plan


def _seconds(run: Callable[[], object], on_gpu: bool) -> float:
    run()  # compiles
    if on_gpu:
        return float(triton.testing.do_bench_cudagraph(run, rep=20)) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def path() -> Path:
    """Where plans are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rru_fast" / "plans.json"


def _read() -> dict[str, Plan]:
    try:
        return dict(json.loads(path().read_text()))
    except (OSError, ValueError):
        return {}  # none yet, or another process's half-written one: measured again


def _write(key: str, plan: Plan) -> None:
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False) as file:
            json.dump(_read() | {key: plan}, file, indent=1)
        os.replace(file.name, path())
    except OSError:
        pass  # a home that cannot be written: measured again next time
