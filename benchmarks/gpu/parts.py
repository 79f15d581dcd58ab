"""Parts of a run in the order of their worth, each a generator that yields its findings one by one.

A finding is a dictionary. Its keys "rows", "environment" and "failed" go where their names say, "columns" into the
part's row number "row", "ended" replaces how the part ended, and all others are listed under the part's name.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.run import WHY, Work

ROOT = Path(__file__).resolve().parents[2]

Finding = dict[str, Any]


class LeftOutError(Exception):
    """Raised by a part that cannot run here, with the reason."""


@dataclass(frozen=True)
class Context:
    """Arguments of every part."""

    device: torch.device
    toy: bool
    repeats: int
    seconds: float
    """Limit, after which the part is killed."""
    stem: Path
    """Beginning of the names of files that the part leaves."""


@dataclass(frozen=True)
class Part:
    """A part and its limits."""

    run: Callable[[Context], Iterator[Finding]]
    seconds: float
    needs_gpu: bool = False
    interpreted: bool = True
    """Keep TRITON_INTERPRET where it is set."""


def environment(context: Context) -> Iterator[Finding]:
    """Versions and the GPU's state."""
    found: Finding = {"python": platform.python_version(), "cores": os.cpu_count(), "CUDA": torch.version.cuda}
    for package in ("triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.limit"
    if context.device.type == "cuda":
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError as error:
            found["nvidia-smi"] = str(error)
    yield {"environment": found}


def warm(context: Context) -> Iterator[Finding]:
    """Compile the kernels of all sections, of `smoke` and of `sanitizer`; the parity suite compiles its own."""
    from benchmarks.gpu import warm

    yield from warm.warm(context.toy)


def smoke(context: Context) -> Iterator[Finding]:
    """Hold every operator to the oracle in short."""
    from benchmarks.gpu import run, smoke

    plan, sizes = (smoke.TOY, run.TOY) if context.toy else (smoke.FULL, run.Sizes())
    os.environ["RRU_FAST_AUTOTUNE"] = "0"
    yield from smoke.smoke(context.device, plan, sizes)


def sections(*titles: str) -> Callable[[Context], Iterator[Finding]]:
    """Return the part that measures these sections."""

    def part(context: Context) -> Iterator[Finding]:
        from benchmarks.gpu.kernel_times import kernel_ms
        from benchmarks.gpu.run import make_run, set_precision
        from benchmarks.gpu.sections import SECTIONS

        run = make_run(context.device, context.toy, context.repeats)
        yield {"environment": {"roofline": f"{run.copy / 1e9:.0f} GB/s"}}
        profiled: list[tuple[str, dict[str, Work]]] = []  # by row of this part: its precision and calls
        for title in titles:
            op, section = SECTIONS[title]
            for rows in section(run):
                calls = [{column: cell for column, cell in row.items() if callable(cell)} for row in rows]
                profiled += [(row["precision"], own) for row, own in zip(rows, calls, strict=True)]
                yield {
                    "rows": [
                        {**row, **dict.fromkeys(own), "op": op, "mode": title}
                        for row, own in zip(rows, calls, strict=True)
                    ]
                }
                for row in rows:
                    if why := row.get(WHY):
                        yield {"failed": f"{title}, {row['implementation']}, {row['precision']}: {why}"}
        # The profiler slows down what is timed after it.
        for number, (precision, calls_of_row) in enumerate(profiled if context.device.type == "cuda" else []):
            set_precision(precision, context.device)
            yield {"row": number, "columns": {column: kernel_ms(call) for column, call in calls_of_row.items()}}

    return part


def kernels(context: Context) -> Iterator[Finding]:
    """Microseconds per kernel of a training step, ours and the authors' eager."""
    from benchmarks.gpu.kernel_times import by_kernel
    from benchmarks.gpu.run import TOY, Sizes, set_precision
    from benchmarks.gpu.sections import OURS, autocast
    from benchmarks.implementations import refine as contenders

    sizes = TOY if context.toy else Sizes()
    for name, precision, bfloat16 in (
        ("float32, high", "high", False),
        ("float32, defaults", "defaults", False),
        ("bfloat16", "defaults", True),
    ):
        set_precision(precision, context.device)
        field = contenders.contenders(sizes.maps, "float32", context.device, hidden=sizes.hidden)
        for implementation in (OURS, contenders.AUTHORS):
            own = autocast(field[implementation]) if bfloat16 else field[implementation]
            yield {f"{implementation}, {name}": by_kernel(own.step)}


def parity(context: Context) -> Iterator[Finding]:
    """Run the core of the parity suite."""
    from benchmarks.gpu import suite

    yield from suite.suite(ROOT, suite.CORE, context.stem.with_name(f"{context.stem.name}-parity.xml"), context.seconds)


def rest(context: Context) -> Iterator[Finding]:
    """Run the tests of the parity suite that `parity` leaves out."""
    from benchmarks.gpu import suite

    yield from suite.suite(ROOT, suite.REST, context.stem.with_name(f"{context.stem.name}-rest.xml"), context.seconds)


def sanitizer(context: Context) -> Iterator[Finding]:
    """Look for races and for memory out of bounds."""
    from benchmarks.gpu import sanitizer

    if (tool := sanitizer.find_tool()) is None:
        raise LeftOutError("compute-sanitizer is not installed")
    yield from sanitizer.sanitize(ROOT, tool)


PARTS = {
    "environment": Part(environment, 30),
    "warm": Part(warm, 60, interpreted=False),
    "smoke": Part(smoke, 90),
    "float32": Part(sections("training, float32"), 100),
    "bfloat16": Part(sections("training, bfloat16 autocast"), 60),
    "kernels": Part(kernels, 60, needs_gpu=True),
    "parity": Part(parity, 150, needs_gpu=True),
    "eval": Part(sections("eval, a tracklet, float32"), 80),
    "losses": Part(sections("L_v + L_p, forward + backward", "many features, forward + backward"), 50),
    "strips": Part(sections("forward + backward"), 30),
    "sanitizer": Part(sanitizer, 80, needs_gpu=True),
    "compile": Part(
        sections("training, float32, torch.compile", "training, bfloat16 autocast, torch.compile"), 200, needs_gpu=True
    ),
    "rest": Part(rest, 600, needs_gpu=True),
}
