"""Load the compiled kernels, rru_fast/_C, if they fit this Python, PyTorch and processor.

The build records in _build.json what it built, or why it did not. A binary that does not fit, or is cut short, is never
loaded: it could crash the process instead of raising.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import struct
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_RECORD = _FOLDER / "_build.json"
_BINARY = _FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each runs the kernels of those before it
_OMP_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0, 3.2.44

# Fields of the record of a build, and their types.
_FIELDS: dict[str, Any] = dict.fromkeys(("python", "torch", "compiler", "flags"), str)
_FIELDS |= {"capabilities": list, "cuda_architectures": list, "cuda": str | None, "nvcc": str | None}


class NativeWarning(UserWarning):
    """There are no usable native kernels, though nobody left them out on purpose: the composite backend serves."""


class _UnusableError(Exception):
    """There are no kernels, or they do not fit here, or are damaged; `variables` begin the command that mends it."""

    def __init__(self, reason: str, variables: str = "") -> None:
        super().__init__(reason)
        self.variables = variables


def missing() -> str | None:
    """Return the reason if the native kernels cannot serve, else None."""
    return _MISSING


def multiplies_bfloat16() -> bool:
    """Return True if `refine` multiplies bfloat16 in bfloat16 on this processor, False if in float32."""
    return bool(importlib.import_module("rru_fast._C").build_info()["bfloat16_here"])


def describe() -> list[str]:
    """Describe the build for `show_config`, as lines."""
    if _MISSING is not None:
        return []
    cuda = f"built: nvcc {_BUILT['nvcc']}, sm {' '.join(_BUILT['cuda_architectures'])}"
    return [
        f"built for torch {_BUILT['torch']}, {_BUILT['python']}, by {_BUILT['compiler']}",
        f"  flags {_BUILT['flags']}",
        f"  SIMD {', '.join(_BUILT['capabilities'])}; in use: {_usable(_BUILT['capabilities'])[-1]}",
        f"  bfloat16 is multiplied in {'bfloat16' if multiplies_bfloat16() else 'float32'}",
        f"  CUDA sources {cuda if _BUILT['cuda'] is None else 'not built: ' + _BUILT['cuda']}",
    ]


def _read_record() -> dict[str, Any]:
    try:
        built = dict(json.loads(_RECORD.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _UnusableError(f"the record of the native build, {_RECORD.name}, cannot be read: {error}") from None
    if built.get("native") is None:
        for name, kind in _FIELDS.items():
            if not isinstance(built.get(name), kind):
                got, wanted = f"got {name} {built.get(name)!r}", f"wanted {getattr(kind, '__name__', kind)}"
                raise _UnusableError(f"the record of the native build, {_RECORD.name}: {got}, {wanted}")
    return built


def _load() -> tuple[str | None, dict[str, Any]]:
    """Load the extension; return None and the record of its build, or the reason why not."""
    try:
        if not _RECORD.exists() and not _BINARY.exists():
            raise _UnusableError("native kernels have not been built")
        built = _read_record()
        if (why := built.get("native")) is not None:
            reason = f"native kernels were not built: {why}"
            if built.get("on_purpose"):
                return reason, {}
            raise _UnusableError(reason)
        _check(built)
        importlib.import_module("rru_fast._C")
    # A binary that passes the check may still lack a library or a symbol of its own: ImportError.
    except (_UnusableError, OSError, ImportError) as error:
        from rru_fast.remedy import remedy

        what = str(error) if isinstance(error, _UnusableError) else f"the native kernels do not load: {error!r}"
        mend = remedy(_FOLDER).replace("run: ", f"run: {getattr(error, 'variables', '')}", 1)
        reason = f"{what}; {mend}"
        warnings.warn(f"rru_fast runs without its native kernels: {reason}", NativeWarning, stacklevel=2)
        return reason, {}
    _release_threads_before_fork()
    return None, built


def _release_threads_before_fork() -> None:
    """Release OpenMP's thread pool before each fork(); otherwise the child deadlocks waiting for threads it lacks.

    Parent and child start new threads at their next parallel loop. The pool is shared with PyTorch's own operators, so
    those work in the child too.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # torch's OpenMP: its symbols are global
    if pause is not None:
        os.register_at_fork(before=lambda: pause(_OMP_PAUSE_HARD))


def _usable(capabilities: list[str]) -> list[str]:
    """The SIMD capabilities of a build that run here, the best last; ATen's choice, as in bindings.cpp."""
    here = torch.backends.cpu.get_cpu_capability()
    level = _CAPABILITIES.index(here) if here in _CAPABILITIES else 0  # other processors have names of their own
    return [name for name in _CAPABILITIES[: level + 1] if name in capabilities]


def _check(built: dict[str, Any]) -> None:
    """Raise _UnusableError unless the binary is whole, and for this Python, PyTorch and processor."""
    python = sysconfig.get_config_var("SOABI")
    for name, wanted, here in (("Python", built["python"], python), ("torch", built["torch"], str(torch.__version__))):
        if wanted != here:
            raise _UnusableError(f"the native kernels were built for {name} {wanted}, this is {name} {here}")
    if not _usable(built["capabilities"]):
        runs = f"this processor (or ATEN_CPU_CAPABILITY) runs {torch.backends.cpu.get_cpu_capability()}"
        why = f"the native kernels were built for {', '.join(built['capabilities'])}, {runs}"
        raise _UnusableError(why, variables="RRU_FAST_CAPABILITIES=all ")
    if not _BINARY.exists():
        raise _UnusableError(f"the native kernels were built, but {_BINARY.name} does not exist")
    if _cut_short(_BINARY):
        raise _UnusableError(f"{_BINARY.name} is damaged: it is shorter than its headers say")
    if "-fsanitize" in built["flags"] and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        # The sanitizer's runtime would end the process.
        raise _UnusableError("the native kernels are sanitized, and LD_PRELOAD has no libasan; make sanitize sets it")


def _cut_short(path: Path) -> bool:
    """Return True if a 64-bit ELF file ends before its segments or its section table do.

    The loader maps them unchecked, and a touch of a page past the end kills the process. It rejects other files itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        identity = file.read(16)
        if identity[:5] != b"\x7fELF\x02":
            return False
        order = "<" if identity[5] == 1 else ">"
        try:
            header = struct.unpack(order + "HHIQQQIHHHHHH", file.read(48))
            segments, sections = header[4:6]  # offsets of the tables; then the size and the number of entries of each
            segment_size, segment_count, section_size, section_count = header[8:12]
            ends: list[int] = [sections + section_size * section_count]
            for i in range(segment_count):
                file.seek(segments + i * segment_size)
                _, _, offset, _, _, length, _, _ = struct.unpack(order + "IIQQQQQQ", file.read(56))
                ends.append(offset + length)
        except struct.error:
            return True
    return max(ends) > size


_MISSING, _BUILT = _load()
