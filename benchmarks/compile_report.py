"""Compile every GPU kernel ahead of time, at the paper's shape and in each dtype, and check it against a budget.

python -m benchmarks.compile_report --arch 80 90 100

Needs no GPU. The operators run on meta tensors; each Triton kernel that they would launch is compiled as the launch
would, for each architecture, and its registers, stack (where spills go), shared memory and, from the PTX, matrix
instructions are read. The CUDA kernels of csrc/cuda are compiled by nvcc, if it is here, for the architectures that
they serve, and their machine code is read too. A kernel over the budget, or a product that misses the tensor cores,
fails the run.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import triton
import tyro
from triton.backends.compiler import GPUTarget

import rru_fast.triton
from benchmarks.launches import nvcc
from benchmarks.launches.recording import Launch, Specializer, recording, refine_arguments
from benchmarks.reports import terminal
from rru_fast.arguments import (
    BatchHardArguments,
    BatchHardNeed,
    BatchHardUpstream,
    RefineArguments,
    RefineNeed,
    RefineUpstream,
)
from rru_fast.reference import RRU
from rru_fast.triton import batch_hard, refine, strip_pool

PAPER = (20, 8, 2048, 8, 8)
CLIPS = 20


@dataclass(frozen=True)
class Variant:
    """Configuration and call of a unit."""

    attention: str = "both"
    inputs: str = "appearance+motion"
    mode: str = "training"  # or eval, ragged (lengths), continued (state)
    layout: str = "NCHW"  # or channels-last, odd (no stride but 1 is a multiple of 16)
    groups: int = 1

    def __str__(self) -> str:
        own = (getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default)
        return ", ".join(f"{value} groups" if isinstance(value, int) else value for value in own) or "the paper's"


# The paper's, and variants that together cover every flag of a kernel and every specialization of its arguments.
PAPERS, EVAL = Variant(), Variant(mode="eval")
VARIANTS = (
    PAPERS,
    EVAL,
    Variant(mode="continued"),
    Variant(inputs="raw"),
    Variant("spatial", "appearance", "ragged"),
    Variant("channel", "raw", "eval"),
    Variant("channel", mode="ragged"),
    Variant(groups=CLIPS),
    Variant(layout="channels-last"),
    Variant(layout="odd"),
    Variant(inputs="raw", layout="odd"),
)

LAYOUTS = ("NCHW", "channels-last", "odd")

# Metric of batch_hard and features of the gallery, 0 without one, by title.
LOSSES = {
    "batch_hard": ("euclidean", 0),
    "batch_hard, cosine": ("cosine", 0),
    "batch_hard, gallery": ("euclidean", 1000),
    "batch_hard, cosine, gallery": ("cosine", 1000),
}
# Calls whose candidates of autotuning are compiled; together they cover every flag of a kernel.
TUNED = ("refine, the paper's", "batch_hard", "batch_hard, cosine, gallery")

# Budget in bytes. Shared memory: the maximum per program on the architecture. Float64 is for checks: it has to compile,
# but its stack has no limit.
MAX_STACK = 0
MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}

MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\S*")

# Dtype and RRU_FAST_FLOAT32, the precision of float32 products.
DTYPES = {
    "float32 ieee": (torch.float32, "ieee"),
    "float32 tf32": (torch.float32, "tf32"),
    "float32 tf32x3": (torch.float32, "tf32x3"),
    "bfloat16": (torch.bfloat16, ""),
    "float16": (torch.float16, ""),
    "float64": (torch.float64, ""),
}


@dataclass
class Options:
    """Compile kernels."""

    arch: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities, times ten."""
    dtype: tuple[str, ...] = tuple(DTYPES)
    """Dtypes of the maps and features, with the precision of float32 products."""
    launched: Literal["all", "default"] = "all"
    """Kernels of every variant of the unit and of autotuning, or of the paper's unit in training and eval, untuned."""
    jobs: int = os.cpu_count() or 1
    """Compiler processes."""


def launches(dtype: torch.dtype, launched: str = "all") -> list[Launch]:
    """Record the operators' launches at the paper's shape, forward and backward, those of autotuning last.

    launched: as in `Options`.
    """
    found: list[Launch] = []
    clips, frames, channels, height, width = PAPER
    strips = torch.empty(clips, channels, height, dtype=dtype, device="meta")
    with recording(found.append) as recorder, torch.device("meta"):

        def begin(op: str) -> None:
            recorder.op = op
            recorder.candidates = launched == "all" and op in TUNED

        for variant in VARIANTS if launched == "all" else (PAPERS, EVAL):
            begin(f"refine, {variant}")
            x = _maps(variant.layout, dtype)
            call = _refine_arguments(x, variant)
            saved = refine.forward(call, save=True).saved
            upstream = RefineUpstream(_maps(variant.layout, dtype), strips)
            for need in (RefineNeed(True, True), RefineNeed(False, True), RefineNeed(True, False)):
                refine.backward(upstream, saved, call, need)
        begin("strip_pool")
        for layout in LAYOUTS:
            strip_pool.forward(_maps(layout, dtype))
        strip_pool.backward(strips, frames, width)
        for title, (metric, m) in LOSSES.items():
            begin(title)
            for shape in ((height, CLIPS, channels), (1, 16384, 256), (1, 1001, 77)):
                _batch_hard(shape, m, metric, dtype)
    return sorted(found, key=lambda launch: launch.tuning)


def _batch_hard(shape: tuple[int, int, int], m: int, metric: str, dtype: torch.dtype) -> None:
    """Call the loss of features (G, N, D), against a gallery of m if m > 0, and its backward."""
    groups, n, d = shape
    features, labels = torch.empty(shape, dtype=dtype), torch.empty(n, dtype=torch.int64)
    gallery = torch.empty(groups, m, d, dtype=dtype) if m else None
    gallery_labels = torch.empty(m, dtype=torch.int64) if m else None
    args = BatchHardArguments(features, labels, gallery, gallery_labels, 0.3, False, metric)
    outputs = batch_hard.forward(args)
    d_mean = outputs.loss.new_empty(()).expand(groups, n)
    for upstream in (BatchHardUpstream(d_mean, None, None), BatchHardUpstream(d_mean, outputs.d_pos, outputs.d_neg)):
        batch_hard.backward(upstream, outputs.saved, args, BatchHardNeed(True, gallery is not None))


def _maps(layout: str, dtype: torch.dtype) -> torch.Tensor:
    clips, frames, channels, height, width = PAPER
    if layout == "channels-last":
        return torch.empty(clips, frames, height, width, channels, dtype=dtype).movedim(-1, 2)
    if layout == "odd":
        wider = torch.empty(clips, frames, channels + 1, height * width + 1, dtype=dtype)
        return wider[:, :, 1:, 1:].view(clips, frames, channels, height, width)
    return torch.empty(PAPER, dtype=dtype)


def _refine_arguments(x: torch.Tensor, variant: Variant) -> RefineArguments:
    clips, _, channels, height, width = PAPER
    settings: dict[str, Any] = {"attention": variant.attention, "inputs": variant.inputs, "bn_groups": variant.groups}
    unit = RRU(channels, (height, width), **settings).to("meta", x.dtype).train(variant.mode == "training")
    lengths = torch.empty(clips, dtype=torch.int64) if variant.mode == "ragged" else None
    state = x.new_empty(clips, channels, height, width) if variant.mode == "continued" else None
    return refine_arguments(unit, x, lengths, (state, state))


def compile_all(arch: int, name: str, launched: str = "all") -> list[dict[str, Any]]:
    """Compile each distinct kernel of a dtype for an architecture; returns a row per kernel."""
    dtype, precision = DTYPES[name]
    specializer = Specializer(GPUTarget("cuda", arch, 32))
    rows: list[dict[str, Any]] = []
    with patch.dict(os.environ, {"RRU_FAST_FLOAT32": precision}):
        recorded = launches(dtype, launched)
    for launch in recorded:
        if (specialization := specializer.new(launch)) is None:
            continue
        description = {
            "kernel": launch.kernel.__name__.removesuffix("_kernel"),
            "op": f"{launch.op}, tuning" if launch.tuning else launch.op,
            "dtype": name,
            "sm": arch,
        }
        try:
            compiled = specialization.compile(specializer.target)
        except Exception as error:  # the compiler's passes raise anything
            raise RuntimeError(f"{description} {launch.arguments}: {error}") from error
        row = {
            **description,
            **_resources(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "matrix instructions": ", ".join(sorted(set(_matrix_instructions(compiled.asm["ptx"])))) or None,
            "multiplies": "tt.dot" in compiled.asm["ttir"],
            "rounds": "cvt.rna.tf32" in compiled.asm["ptx"],
        }
        rows.append(row)
    return rows


def _matrix_instructions(ptx: str) -> Iterator[str]:
    """Yield the kind of each matrix instruction in a PTX text, such as wgmma.m64n64k8.tf32."""
    for found in MATRIX.finditer(ptx):
        parts = found.group(0).split(".")
        shape = next((part for part in parts if re.fullmatch(r"m\d+n\d+k\d+", part)), None)
        types = [part for part in parts if part in ("tf32", "bf16", "f16", "kind::tf32", "kind::f16")]
        yield ".".join(filter(None, (parts[0], shape, types[-1] if types else None)))


def _resources(cubin: bytes) -> dict[str, int]:
    """Return the registers, and the bytes of stack, per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    return {"registers": registers, "stack": stack}


def over_budget(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that a kernel exceeds and each instruction that it lacks."""
    kernel = f"{row['kernel']} ({row['op']}, {row['dtype']}, sm_{row['sm']})"
    limits = {"shared": MAX_SHARED[row["sm"]]} | ({} if row["dtype"] == "float64" else {"stack": MAX_STACK})
    found = [f"{kernel}: {key} {row[key]}, at most {most}" for key, most in limits.items() if row[key] > most]
    # There is no matrix instruction for IEEE float32; the products of the gate's vectors are always exact.
    exact = row["dtype"] in ("float32 ieee", "float64") or row["kernel"] in ("atb", "refine_bwd_pooled")
    if row["multiplies"] and not exact and not row["matrix instructions"]:
        found.append(f"{kernel}: no matrix instructions")
    if row["matrix instructions"] and row["dtype"] == "float32 tf32" and not row["rounds"]:
        found.append(f"{kernel}: factors cut off to TF32, wanted rounded")
    return found


def main(options: Options) -> None:
    """Compile and print a table per architecture and dtype.

    Raises:
        SystemExit: an option is wrong, or, at the end, kernels are over budget.
    """
    if rru_fast.triton.interpreted():
        raise SystemExit("TRITON_INTERPRET: got 1, wanted it unset: nothing is compiled in the interpreter")
    for option, known, values in (("--arch", MAX_SHARED, options.arch), ("--dtype", DTYPES, options.dtype)):
        for value in values:  # type: ignore[attr-defined]
            if value not in known:
                raise SystemExit(f"{option}: got {value!r}, wanted one of {', '.join(map(repr, known))}")
    work = [(arch, dtype) for arch in options.arch for dtype in options.dtype]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        by_nvcc = {
            arch: pool.submit(nvcc.compile_all, arch, options.dtype) for arch in options.arch if nvcc.serves(arch)
        }
        done = pool.map(compile_all, *zip(*work, strict=True), repeat(options.launched))
        for (arch, dtype), found in zip(work, done, strict=True):
            terminal.show(f"sm_{arch}, {dtype}", _environment(), found, hide=("dtype", "sm", "multiplies", "rounds"))
            rows += found
        failed = [sentence for row in rows for sentence in over_budget(row)]
        for arch, compiling in by_nvcc.items():
            found = compiling.result()
            terminal.show(f"sm_{arch}, CUDA C++", {"nvcc": nvcc.version()}, found, hide=("op", "sm"))
            failed += [sentence for row in found for sentence in nvcc.over_budget(row)]
            rows += found
    if nvcc.version() is None:
        print("no nvcc: the CUDA kernels are left out")
    if failed:
        raise SystemExit("over budget:\n  " + "\n  ".join(failed))
    print(f"{len(rows)} kernels within budget")


def _environment() -> dict[str, Any]:
    shape = " x ".join(map(str, PAPER))
    return {"triton": triton.__version__, "torch": torch.__version__, "shape": shape}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
