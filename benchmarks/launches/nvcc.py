"""The CUDA kernels of csrc/cuda, compiled by nvcc without a GPU: resources, and what their machine code shows.

Read from this build where it has the architecture, else compiled for it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import triton

from build_tools import toolchain
from rru_fast import native

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (90,)
"""Compute capabilities, times ten, that the kernels are written for; later ones run them too."""
# Operands in the order of csrc/cuda/refine_layout.h: the dtypes of the compile report. The last are gradients'.
OPERANDS = ("bfloat16", "float16", "float32 tf32", "float32 tf32x3", "float32 ieee", "float16")
# Largest H * W by tiles of 8 positions.
TILES = {4: 32, 8: 64}
PRECISIONS = {"float32 ieee": "ieee", "float32 tf32": "tf32", "float32 tf32x3": "tf32x3"}

MAX_SHARED, MAX_REGISTERS = 232_448, 255
"""Of a CTA, in bytes; of a thread: an SM has 65,536 for 256 threads."""
# Bytes of stack, where spills go, by kernel, dtype, H * W and channels of a CTA; none elsewhere. No kernel may spill
# within its product.
MAX_STACK = {
    ("refine_eval", "float32 ieee", 64, 128): 8,
    ("refine_forward", "bfloat16", 64, 512): 8,
    ("refine_forward", "float16", 64, 512): 8,
    ("refine_forward", "float32 tf32", 64, 512): 24,
    ("refine_forward", "float32 ieee", 64, 512): 80,
    ("refine_backward", "float32 ieee", 64, 512): 128,
}
# Matrix instructions in a row without a load of an operand, or of W where it streams from L2: more would mean that all
# loads come first or last, and are waited for.
MAX_RUN = {"in a row": 26, "between loads of W": 32}
# Instructions that drain the CTA's stores or flush its cache: not within the loop over frames, but for those of a flag.
DRAINING = frozenset(("MEMBAR", "ERRBAR", "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT"))
OF_A_FLAG = Counter({"MEMBAR": 2, "ERRBAR": 1, "CCTL": 2})  # its first poll stands before the loop of others
MULTIPLYING = ("refine_eval", "refine_forward", "refine_backward")
TRAINING = MULTIPLYING[1:]


def serves(arch: int) -> bool:
    """Return True if the kernels can be compiled for an architecture here."""
    return arch in ARCHITECTURES and version() is not None


def version() -> str | None:
    """Return the version of nvcc, None without it."""
    try:
        return toolchain.find_cuda().version
    except toolchain.BuildError:
        return None


def compile_all(arch: int, dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per kernel of the dtypes for an architecture."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in _binaries(arch, Path(folder)):
            usage, sass = (_dump(option, path) for option in ("-res-usage", "-sass"))
            code = dict(_functions(sass, r"Function : (\S+)"))
            for name, text in _functions(usage, r"Function (\S+?):"):
                row = _row(name, text, arch)
                if row is None or row["dtype"] not in dtypes:
                    continue
                if row["kernel"] in MULTIPLYING:
                    row |= {"shared": _shared(row), **of_loop(list(opcodes(code[name])), row["kernel"] in TRAINING)}
                rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], row["dtype"], row["H * W"], row["channels"]))


def _binaries(arch: int, folder: Path) -> Iterator[Path]:
    """Yield files with the machine code of all kernels, this build's or new ones."""
    if native.missing() is None and str(arch) in native.cuda_architectures():
        yield native.binary()
        return
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        to = folder / f"{source.stem}.cubin"
        command = [str(toolchain.find_cuda().nvcc), "-std=c++20", "-O3", "-Icsrc", "-cubin"]
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(to)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        yield to


def _row(name: str, usage: str, arch: int) -> dict[str, Any] | None:
    """Return what a function's name and usage of resources say; None if it is none of `refine`."""
    kernel = re.search(r"\d(refine_[a-z_]+)_kernelI.*?OperandsE(\d)ELi8ELi(\d)E(?:Li(\d)E)?", name)
    if kernel is None:  # the check of fragments
        return None
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return {
        "kernel": kernel[1],
        "op": "refine, cuda",
        "dtype": OPERANDS[int(kernel[2])],
        "sm": arch,
        "H * W": TILES[int(kernel[3])],
        "channels": 128 * int(kernel[4] or 1),
        "registers": registers,
        "stack": stack,
        "shared": None,
    }


def _dump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _functions(text: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield each function's name and the text that follows it."""
    _, *parts = re.split(pattern, text)
    yield from zip(parts[::2], parts[1::2], strict=True)


def _shared(row: dict[str, Any]) -> int | None:
    """Return the bytes of shared memory with all CTAs of a cluster busy; None where the build cannot tell."""
    if native.missing() is not None or not native.has_emulation():
        return None
    ops, dtype = torch.ops.rru_fast, getattr(torch, row["dtype"].split()[0])
    precision, height, width = PRECISIONS.get(row["dtype"], "ieee"), 8, row["H * W"] // 8
    w_c = torch.empty(2048, 256)  # fp32, as under autocast
    if row["kernel"] == "refine_eval":
        _, launch = ops.refine_cuda_plan(torch.empty(1, 1, 2048, height, width, dtype=dtype), 256, 128, w_c, precision)
        return int(launch[2])
    # As many clips as make the kernels take these channels a CTA.
    clips = {128: 7, 256: 15, 512: 30}[row["channels"]]
    x = torch.empty(clips, 2, 2048, height, width, dtype=dtype)
    _, launch = ops.refine_cuda_training_plan(x, 256, 128, w_c, 1, precision, row["kernel"] == "refine_backward")
    return int(launch[2])


def opcodes(sass: str) -> Iterator[str]:
    """Yield the name of each instruction of a function, without its modifiers, but for prefetches."""
    for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)", sass):
        yield "PREFETCH" if found[1] == "CCTL" and ".PF" in found[2] else found[1]


def of_loop(code: list[str], has_flag: bool) -> dict[str, int]:
    """Return what the loop over frames holds, which follows the barrier of the cluster, and its product.

    A product that is pushed ends where its last part has been, and those of others are waited for.
    """
    loop = code[code.index("UCGABAR_WAIT") + 2 :]  # and its flush
    multiply = "HMMA" if "HMMA" in loop else "FFMA"
    first = loop.index(multiply)
    last = len(loop) - loop[::-1].index("HMMA") if multiply == "HMMA" else loop.index("SYNCS", loop.index("STAS"))
    product = loop[first:last]
    draining = Counter(name for name in loop if name in DRAINING)
    if has_flag:
        draining -= OF_A_FLAG
    of_product = [name for name in product if name in ("HMMA", "LDS", "LDSM", "LDG")]
    return {
        "draining": draining.total(),
        "pushes": code.count("STAS"),
        "matrix": code.count("HMMA"),
        "in a row": _longest_run(of_product),
        "between loads of W": _longest_run([name for name in of_product if name in ("HMMA", "LDG")]),
        "spills in product": sum(name in ("LDL", "STL") for name in product),
    }


def _longest_run(names: list[str]) -> int:
    """Return the most matrix instructions in a row."""
    return max((len(list(group)) for name, group in groupby(names) if name == "HMMA"), default=0)


def over_budget(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that a kernel exceeds and each instruction that it lacks."""
    size = f"H * W {row['H * W']}, {row['channels']} channels a CTA, sm_{row['sm']}"
    kernel, dtype = row["kernel"], row["dtype"]
    limits = {
        "shared": MAX_SHARED,
        "registers": MAX_REGISTERS,
        "stack": MAX_STACK.get((kernel, dtype, row["H * W"], row["channels"]), 0),
        "in a row": MAX_RUN["in a row"],
        "draining": 0,
    }
    if kernel in TRAINING:
        limits["between loads of W"] = MAX_RUN["between loads of W"]
    if kernel not in TRAINING or row["matrix"]:  # in fp32 a product ends where nothing tells
        limits["spills in product"] = 0
    found = [f"{key} {row[key]}, at most {most}" for key, most in limits.items() if (row.get(key) or 0) > most]
    if kernel in MULTIPLYING and row["shared"] is None:
        found.append("shared memory is not known, as this build cannot emulate the kernel")
    if kernel in MULTIPLYING and not row["matrix"] and dtype != "float32 ieee":
        found.append("no matrix instructions")
    return [f"{kernel} ({row['op']}, {dtype}, {size}): {sentence}" for sentence in found]
