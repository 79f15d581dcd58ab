"""Parts of a run, most important first, each a generator that yields its findings one by one.

A finding is a dictionary. Its "rows", "environment" and "failed" are added to those of the run, "columns" to the part's
row number "row"; "ended" replaces the status of the part, and all other keys are listed under the part's name.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.run import WHY
from benchmarks.harness.measure import Fn
from benchmarks.harness.results import ROOT
from build_tools.provenance import version_of

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
    """Time limit, after which the part is killed."""
    stem: Path
    """Prefix of the files that the part writes."""


@dataclass(frozen=True)
class Part:
    """A part and its limits."""

    run: Callable[[Context], Iterator[Finding]]
    seconds: float
    needs_gpu: bool = False
    interpreted: bool = True
    """Pass TRITON_INTERPRET on, if it is set."""


def environment(context: Context) -> Iterator[Finding]:
    """Report versions and the state of the GPU."""
    found: Finding = {"python": platform.python_version(), "cores": os.cpu_count(), "CUDA": torch.version.cuda}
    found |= {name: version_of(name) for name in ("triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout")}
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
    """Hold every operator to the oracle, in short."""
    from benchmarks.gpu import run, smoke

    plan, sizes = (smoke.TOY, run.TOY) if context.toy else (smoke.FULL, run.Sizes())
    os.environ["RRU_FAST_AUTOTUNE"] = "0"
    yield from smoke.smoke(context.device, plan, sizes)


def cuda(context: Context) -> Iterator[Finding]:
    """Check what the CUDA kernels take for granted, then hold them to the oracle."""
    from benchmarks.gpu import run, smoke
    from benchmarks.gpu.fragments import fragments
    from rru_fast import backends

    if "cuda" not in backends.serving(context.device):
        why = backends.BACKENDS["cuda"] or f"the kernels do not serve {context.device}"
        raise LeftOutError(why)
    yield from fragments(context.device)
    for plan in smoke.TOY_CUDA if context.toy else smoke.CUDA:
        yield from smoke.smoke(context.device, plan, run.TOY if context.toy else run.Sizes())


def sections(*titles: str) -> Callable[[Context], Iterator[Finding]]:
    """Return the part that measures these sections."""

    def part(context: Context) -> Iterator[Finding]:
        from benchmarks.gpu.kernel_times import kernel_ms
        from benchmarks.gpu.run import make_run, set_precision
        from benchmarks.gpu.sections import SECTIONS

        run = make_run(context.device, context.toy, context.repeats)
        yield {"environment": {"roofline": f"{run.copy / 1e9:.0f} GB/s"}}
        profiled: list[tuple[str, dict[str, Fn]]] = []  # precision and calls of each row of this part
        for title in titles:
            op, section = SECTIONS[title]
            for rows in section(run):
                calls = [{column: cell for column, cell in row.items() if callable(cell)} for row in rows]
                profiled += [(row["precision"], of_row) for row, of_row in zip(rows, calls, strict=True)]
                yield {
                    "rows": [
                        {**row, **dict.fromkeys(of_row), "op": op, "mode": title}
                        for row, of_row in zip(rows, calls, strict=True)
                    ]
                }
                for row in rows:
                    if why := row.get(WHY):
                        yield {"failed": f"{title}, {row['implementation']}, {row['precision']}: {why}"}
        # The profiler slows down what is timed after it.
        for number, (precision, of_row) in enumerate(profiled if context.device.type == "cuda" else []):
            set_precision(precision, context.device)
            yield {"row": number, "columns": {column: kernel_ms(call) for column, call in of_row.items()}}

    return part


def kernels(context: Context) -> Iterator[Finding]:
    """Report the microseconds per kernel of a training step, of ours and of the authors' eager."""
    from benchmarks.gpu.implementations import CUDA, OURS, autocast
    from benchmarks.gpu.kernel_times import by_kernel
    from benchmarks.gpu.run import TOY, Sizes, set_precision
    from benchmarks.implementations.refine import AUTHORS, implementations

    sizes = TOY if context.toy else Sizes()
    for name, precision, bfloat16 in (
        ("float32, high", "high", False),
        ("float32, defaults", "defaults", False),
        ("bfloat16", "defaults", True),
    ):
        set_precision(precision, context.device)
        impls = implementations(sizes.maps, "float32", context.device, hidden=sizes.hidden)
        for key in (name for name in (OURS, CUDA, AUTHORS) if name in impls):
            impl = autocast(impls[key]) if bfloat16 else impls[key]
            yield {f"{key}, {name}": by_kernel(impl.step)}


def calibrate(context: Context) -> Iterator[Finding]:
    """Decide which backend `auto` runs at the paper's shapes."""
    from rru_fast.auto import choice
    from rru_fast.calibrate import __main__ as command

    for kind in command.kinds(command.parse([]), context.device):
        yield {str(kind.rounded()): choice.calibrate(kind, context.device).to_json()}


def parity(context: Context) -> Iterator[Finding]:
    """Run the core of the parity suite."""
    from benchmarks.gpu import suite

    yield from suite.suite(ROOT, suite.CORE, context.stem.with_name(f"{context.stem.name}-parity.xml"), context.seconds)


def rest(context: Context) -> Iterator[Finding]:
    """Run the tests of the parity suite that `parity` leaves out."""
    from benchmarks.gpu import suite

    yield from suite.suite(ROOT, suite.REST, context.stem.with_name(f"{context.stem.name}-rest.xml"), context.seconds)


def sanitizer(context: Context) -> Iterator[Finding]:
    """Check for races and for accesses out of bounds."""
    from benchmarks.gpu import sanitizer

    if (tool := sanitizer.find_tool()) is None:
        raise LeftOutError("compute-sanitizer is not installed")
    yield from sanitizer.sanitize(ROOT, tool)


PARTS = {
    "environment": Part(environment, 30),
    "warm": Part(warm, 60, interpreted=False),
    "smoke": Part(smoke, 90),
    "cuda": Part(cuda, 60),
    "float32": Part(sections("training, float32"), 100),
    "bfloat16": Part(sections("training, bfloat16 autocast"), 60),
    "kernels": Part(kernels, 60, needs_gpu=True),
    "parity": Part(parity, 150, needs_gpu=True),
    "eval": Part(sections("eval, a tracklet, float32", "eval, a tracklet, bfloat16 autocast"), 110),
    "losses": Part(
        sections(
            "L_v + L_p, forward + backward",
            "many features, forward + backward",
            "features against a gallery, cosine, forward + backward",
        ),
        75,
    ),
    "strips": Part(sections("forward + backward"), 30),
    "calibrate": Part(calibrate, 180, needs_gpu=True),
    "sanitizer": Part(sanitizer, 80, needs_gpu=True),
    "compile": Part(
        sections("training, float32, torch.compile", "training, bfloat16 autocast, torch.compile"), 200, needs_gpu=True
    ),
    "rest": Part(rest, 600, needs_gpu=True),
}
