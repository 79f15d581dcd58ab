"""The CUDA kernels of csrc/cuda, compiled by nvcc without a GPU: resources, and what their machine code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
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
# Operands of refine_eval, in the order of csrc/cuda/refine_layout.h: the dtypes of the compile report.
OPERANDS = ("bfloat16", "float16", "float32 tf32", "float32 tf32x3", "float32 ieee")
# Largest H * W by tiles of 8 positions.
TILES = {4: 32, 8: 64}
PRECISIONS = {"float32 ieee": "ieee", "float32 tf32": "tf32", "float32 tf32x3": "tf32x3"}

MAX_SHARED, MAX_REGISTERS = 232_448, 255
"""Of a CTA, in bytes; of a thread: an SM has 65,536 for 256 threads."""
# Bytes of stack, where spills go; none elsewhere. No kernel may spill within its product.
MAX_STACK = {
    (90, "float32 tf32x3", 64): 8,
    (90, "float32 ieee", 64): 16,
}
# Matrix instructions in a row without a load: more would mean that all loads come first or last, and are waited for.
MAX_RUN = 24
# Instructions that drain the CTA's stores or flush its cache: not within the loop over frames.
DRAINING = frozenset(("MEMBAR", "ERRBAR", "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT"))


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
    """Compile the kernels of the dtypes for an architecture; returns a row per kernel."""
    rows = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            command = [str(toolchain.find_cuda().nvcc), "-std=c++20", "-O3", "-Icsrc", "-cubin"]
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", str(source), "-o", file.name]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            usage, sass = (_dump(option, file.name) for option in ("-res-usage", "-sass"))
        code = dict(_functions(sass, r"Function : (\S+)"))
        for name, text in _functions(usage, r"Function (\S+?):"):
            kernel = re.search(r"\d([a-z_]+)_kernelI.*?OperandsE(\d)ELi8ELi(\d)E", name)
            if kernel is None:  # the check of fragments
                continue
            dtype, tiles = OPERANDS[int(kernel[2])], int(kernel[3])
            if dtype not in dtypes:
                continue
            registers, stack = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
            row = {"kernel": kernel[1], "op": "refine, cuda", "dtype": dtype, "sm": arch, "H * W": TILES[tiles]}
            row |= {"registers": registers, "stack": stack, "shared": None}
            if kernel[1] == "refine_eval":
                row |= {"shared": _shared(dtype, tiles), **of_loop(list(opcodes(code[name])))}
            rows.append(row)
    return rows


def _dump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _functions(text: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield each function's name and the text that follows it."""
    _, *parts = re.split(pattern, text)
    yield from zip(parts[::2], parts[1::2], strict=True)


def _shared(dtype: str, tiles: int) -> int | None:
    """Return the bytes of shared memory at the paper's channels; None where the build cannot tell."""
    if native.missing() is not None or not native.has_emulation():
        return None
    maps = torch.empty(1, 1, 2048, 8, tiles, dtype=getattr(torch, dtype.split()[0]))
    w_c = torch.empty(2048, 256)  # fp32, as under autocast
    _, launch = torch.ops.rru_fast.refine_cuda_plan(maps, 256, 128, w_c, PRECISIONS.get(dtype, "ieee"))
    return int(launch[2])


def opcodes(sass: str) -> Iterator[str]:
    """Yield the name of each instruction of a function, without its modifiers."""
    for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass):
        yield found[1]


def of_loop(code: list[str]) -> dict[str, int]:
    """Return what the loop over frames holds, which begins with the product, or before it.

    The product ends where its last part has been pushed and those of others are waited for.
    """
    multiply = "HMMA" if "HMMA" in code else "FFMA"
    first, first_push = code.index(multiply), code.index("STAS")
    product = code[first : code.index("SYNCS", first_push)]
    of_product = [name for name in product if name in ("HMMA", "LDS", "LDSM")]
    runs = [len(list(group)) for name, group in groupby(of_product) if name == "HMMA"]
    return {
        "draining": sum(name in DRAINING for name in code[first:]),
        "pushes": code.count("STAS"),
        "matrix": code.count("HMMA"),
        "in a row": max(runs, default=0),
        "spills in product": sum(name in ("LDL", "STL") for name in product),
    }


def over_budget(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that a kernel exceeds and each instruction that it lacks."""
    kernel = f"{row['kernel']} ({row['op']}, {row['dtype']}, H * W {row['H * W']}, sm_{row['sm']})"
    most_stack = MAX_STACK.get((row["sm"], row["dtype"], row["H * W"]), 0)
    limits = {"shared": MAX_SHARED, "registers": MAX_REGISTERS, "stack": most_stack}
    limits |= {"in a row": MAX_RUN, "draining": 0, "spills in product": 0}
    found = [
        f"{kernel}: {key} {row[key]}, at most {most}" for key, most in limits.items() if (row.get(key) or 0) > most
    ]
    if row["kernel"] == "refine_eval" and row["shared"] is None:
        found.append(f"{kernel}: shared memory is not known, as this build cannot emulate the kernel")
    if row["kernel"] == "refine_eval" and not row["matrix"] and row["dtype"] != "float32 ieee":
        found.append(f"{kernel}: no matrix instructions")
    return found
