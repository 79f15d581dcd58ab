"""Compilation of the kernels that the other parts launch, before them and on all cores.

The calls of the parts are made on CPU tensors; their launches are recorded, not run, and compiled into Triton's cache
for this machine's GPU, or for sm_90 without one. The processes that compile have no CUDA context.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

import rru_fast.triton
from benchmarks.gpu import losses, sanitizer, smoke
from benchmarks.gpu.implementations import autocast
from benchmarks.gpu.run import PRECISIONS, TOY, Sizes, set_float32
from benchmarks.harness.shapes import Shape
from benchmarks.implementations.refine import Implementation
from benchmarks.launches.recording import NUM_SMS, Launch, Recorder, Specialization, Specializer, recording
from rru_fast import backends
from tests.parity import Call, make_call, run

CPU = torch.device("cpu")


def warm(toy: bool) -> Iterator[dict[str, Any]]:
    """Record and compile; yields the number of kernels, and the error of each that does not compile."""
    target, num_sms, launchers = GPUTarget("cuda", 90, 32), NUM_SMS, torch.cuda.is_available()
    if launchers:
        found = torch.cuda.get_device_properties(0)
        target, num_sms = GPUTarget("cuda", 10 * found.major + found.minor, 32), found.multi_processor_count
    jobs = record(target, num_sms, call_toy if toy else call_parts)
    yield {"kernels": len(jobs), "architecture": target.arch}
    workers = 1 if toy else os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = 0
        for wrong in pool.map(partial(compile_one, target=target, launcher=launchers), jobs):
            if wrong is not None:  # not a failure of this part: a candidate of autotuning may exceed the GPU's limits
                failed += 1
                yield {f"does not compile, {failed}": wrong}
    yield {"compiled": len(jobs) - failed}


def compile_one(job: Specialization, target: GPUTarget, launcher: bool) -> str | None:
    """Compile a kernel, and with `launcher` its launcher in C, which needs a GPU; returns the error, if any."""
    try:
        compiled = job.compile(target)
        if launcher:
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # the compiler's passes raise anything
        return f"{job.name} {job.options['num_warps']} warps: {type(error).__name__}: {error}"[:300]
    return None


def record(target: GPUTarget, num_sms: int, calls: Callable[[Recorder], None]) -> list[Specialization]:
    """Return the specializations of all kernels that the calls launch, each once."""
    specializer = Specializer(target)
    jobs: list[Specialization] = []

    def note(launch: Launch) -> None:
        if (job := specializer.new(launch)) is not None:
            jobs.append(job)

    with triton_on_cpu(), recording(note, num_sms) as recorder:
        calls(recorder)
    return jobs


def call_parts(recorder: Recorder) -> None:
    """Make the calls of all parts, with the candidates of autotuning for the parts that do not disable it."""
    recorder.candidates = True
    call_sections(Sizes())
    recorder.candidates = False
    call_untuned(Sizes())


def call_toy(recorder: Recorder) -> None:
    """Make a few calls, which compile in seconds."""
    _unit(TOY.tracklet, TOY.hidden, training=False).forward()
    call_strips(TOY)


def call_sections(sizes: Sizes) -> None:
    """Make the calls that the sections time, at each precision."""
    for precision in PRECISIONS:
        set_float32(precision)
        call_step(sizes, bfloat16=False)
        _unit(sizes.tracklet, sizes.hidden, training=False).forward()
        function = losses.strip_loss_functions(sizes, CPU, ["triton"])["triton"]
        losses.results(function, losses.strip_loss_inputs(sizes, CPU))
        function = losses.many_functions(sizes, CPU, ["triton"])["triton"]
        losses.results(function, {"features": torch.empty(sizes.many)})
        function = losses.gallery_functions(sizes, CPU, ["triton"])["triton"]
        losses.results(function, {name: torch.empty(v) for name, v in losses.gallery_shapes(sizes).items()})
    set_float32("defaults")
    call_step(sizes, bfloat16=True)
    call_strips(sizes)


def call_step(sizes: Sizes, bfloat16: bool) -> None:
    """Call the unit in training: forward alone, then with its backward."""
    unit = _unit(sizes.maps, sizes.hidden, training=True)
    unit = autocast(unit) if bfloat16 else unit
    unit.forward()
    unit.step()


def call_strips(sizes: Sizes) -> None:
    """Call strip pooling, forward and backward."""
    losses.results(partial(rru_fast.strip_pool, backend="triton"), {"s": torch.empty(sizes.maps)})


def call_untuned(sizes: Sizes) -> None:
    """Make the calls of the smoke test and of the sanitizer."""
    for case in smoke.SMALL:
        set_float32("exact")
        run(case, make_call(case), "triton")
    full: Call = make_call(smoke.PAPER)
    for dtype, precision in smoke.DTYPES.values():
        set_float32(precision)
        run(smoke.PAPER, full.map(partial(Tensor.to, dtype=dtype)), "triton")
    set_float32("exact")
    for dtype in smoke.FULL.others:
        for operator, function in smoke.OTHERS.items():
            shape = sizes.maps if operator == "strip_pool" else sizes.features
            function(torch.empty(shape, dtype=dtype), "triton", sizes)
    set_float32("defaults")
    sanitizer.small_calls(CPU)


def _unit(shape: Shape, hidden: tuple[int, int], training: bool) -> Implementation:
    """Return our module on uninitialized maps."""
    clips, _, channels, height, width = shape
    settings: dict[str, Any] = {"hidden": hidden[0], "spatial_hidden": hidden[1], "backend": "triton"}
    unit = rru_fast.RRU(channels, (height, width), **settings).train(training)
    x = torch.empty(shape).requires_grad_(training)
    return Implementation(unit, x, (torch.empty(shape), torch.empty(clips, channels, height)))


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Let backend "triton" serve CPU tensors; their launches must be recorded, not run."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(backends.BACKENDS, triton=None))
        stack.enter_context(patch.object(rru_fast.triton, "serves", lambda device: True))
        for op in ("refine", "batch_hard", "strip_pool"):
            kernels: Mapping[str, Any] = import_module(f"rru_fast.ops.{op}").KERNELS
            stack.enter_context(patch.dict(kernels, triton=import_module(f"rru_fast.triton.{op}")))
        yield
