"""Paired timing, memory and the machine's own rates, all in one process and one run."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

MIB = 2**20


@dataclass(kw_only=True)
class Where:
    """Options of every operator's benchmark."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """Where to write the rows."""


Work = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def seconds(work: Work) -> float:
    """Wall time of one call, the device's work included."""
    _synchronise()
    start = time.perf_counter()
    result = finished(work)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def finished(work: Work) -> object:
    """What one call returns, once the device has done it too."""
    result = work()
    _synchronise()
    return result


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(works: Mapping[Name, Work], repeats: int, warmup: int = 2) -> dict[Name, list[float]]:
    """Seconds of each work in each of `repeats` rounds; a round runs all of them, in an order that rotates."""
    names = list(works)
    for name in names:
        for _ in range(warmup):
            works[name]()
    times: dict[Name, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # so that each collection below looks only at what the works have left behind
    try:
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                gc.collect()
                times[name].append(seconds(works[name]))
    finally:
        gc.unfreeze()
    return times


def ratio(baseline: list[float], candidate: list[float]) -> float:
    """How many times faster the candidate is: the median over rounds of the two times' ratio."""
    return median(b / c for b, c in zip(baseline, candidate, strict=True))


def saved_bytes(forward: Callable[[], Iterable[Tensor]], free: Iterable[Tensor]) -> int:
    """Bytes autograd keeps for the backward of `forward`, beside the storages of `free` and of its outputs."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = list(forward())
    known = {tensor.untyped_storage().data_ptr() for tensor in (*free, *outputs)}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most memory of the device that `work` holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def gemm_rates(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of each matrix product, (m, k) x (k, n), that PyTorch has here; medians, as all times.

    On a CPU of 16-bit numbers also those in float32, where they may be multiplied too: not every processor has
    instructions for them.
    """
    products: dict[str, Work] = {}
    for multiplied in (dtype, torch.float32) if device.type == "cpu" and dtype.itemsize == 2 else (dtype,):
        a, b = (torch.randn(size, device=device).to(dtype).to(multiplied) for size in ((m, k), (n, k)))
        suffix = "" if multiplied == dtype else " in float32"
        products["torch.mm" + suffix] = partial(torch.mm, a, b.t())
        # What the compiler calls: on processors that are not Intel's, MKL behind torch.mm may reach half of it.
        if device.type == "cpu" and _multiplies_in_onednn(multiplied):
            products["oneDNN" + suffix] = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
    times = paired(products, repeats=25)
    return {name: 2 * m * k * n / median(times[name]) for name in products}


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied as such; on a CPU without instructions for it PyTorch takes minutes."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _multiplies_in_onednn(dtype: torch.dtype) -> bool:
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and (dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16(torch.device("cpu"))))


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes/s, read and written, of this machine's own copy of `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = paired({"copy": lambda: target.copy_(source)}, repeats=25)["copy"]
    return 2 * size / median(times)


def environment(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a figure means nothing without; `dtype` where all rows share one."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]}, {len(names)} cores" if names else model
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # a model's name may say less
        model += f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "threads": torch.get_num_threads(),
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _commit() -> str:
    """The commit measured, marked where the tree has changed since; earlier results do not count as a change."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def write(path: Path, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One run's environment and rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
