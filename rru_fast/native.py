"""Load the compiled kernels, rru_fast/_C, if they fit this Python, PyTorch and processor.

The build records in _build.json what it built, or why it did not. A binary that does not fit or is truncated is never
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

from rru_fast.install_hint import reinstall_command

_PACKAGE = Path(__file__).parent
_RECORD_PATH = _PACKAGE / "_build.json"
_BINARY_PATH = _PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each includes those before it
_OMP_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0, 3.2.44

# Fields of the build record, and their types.
_RECORD_TYPES: dict[str, Any] = dict.fromkeys(("python", "torch", "compiler", "flags"), str)
_RECORD_TYPES |= {"capabilities": list, "cuda_architectures": list, "cuda": str | None, "nvcc": str | None}
_RECORD_TYPES["cuda_sources"] = str


class NativeWarning(UserWarning):
    """The native kernels are unusable but were not disabled on purpose; the composite backend serves instead."""


class _UnusableError(Exception):
    """The kernels are missing, damaged or for another environment; reinstalling with `variables` fixes that."""

    def __init__(self, reason: str, variables: str = "") -> None:
        super().__init__(reason)
        self.variables = variables


def missing() -> str | None:
    """Return the reason if the native kernels cannot serve, else None."""
    return _MISSING


def binary() -> Path:
    """Return the file of the compiled kernels."""
    return _BINARY_PATH


def multiplies_bfloat16() -> bool:
    """Return True if `refine` multiplies bf16 maps in bf16 on this processor, False if in fp32."""
    return bool(importlib.import_module("rru_fast._C").build_info()["bfloat16_here"])


def has_emulation() -> bool:
    """Return True if this build can run the CUDA kernels on the CPU, emulated."""
    return bool(importlib.import_module("rru_fast._C").build_info()["emulation"])


def cuda_failure() -> str | None:
    """Return the reason if the CUDA kernels were not built, else None."""
    failure: str | None = _BUILD_RECORD["cuda"]
    return failure


def cuda_sources() -> str:
    """Return a hash of the CUDA kernels' sources."""
    return str(_BUILD_RECORD["cuda_sources"])


def cuda_architectures() -> list[str]:
    """Return the architectures that the CUDA kernels were built for, such as "90" or "90+PTX"."""
    return list(_BUILD_RECORD["cuda_architectures"])


def is_faster_in_composite(dtype: str, clips: int, channels: int, positions: int, hidden: int, training: bool) -> bool:
    """Return True if `refine` with "auto" runs composite on a CPU, for maps so narrow that the kernels are slower."""
    module = importlib.import_module("rru_fast._C")
    return bool(module.is_faster_in_composite(dtype, clips, channels, positions, hidden, training))


def ran() -> list[str]:
    """List the operators that the native kernels have run in this process, since `forget_runs`."""
    return [] if _MISSING is not None else list(importlib.import_module("rru_fast._C").ran())


def forget_runs() -> None:
    """Have `ran` begin anew."""
    if _MISSING is None:
        importlib.import_module("rru_fast._C").forget_runs()


def describe() -> list[str]:
    """Describe the build for `show_config`, as lines."""
    if _MISSING is not None:
        return []
    record = _BUILD_RECORD
    in_use = _supported_capabilities(record["capabilities"])[-1]
    cuda = f"built: nvcc {record['nvcc']}, sm {' '.join(record['cuda_architectures'])}"
    return [
        f"built for torch {record['torch']}, {record['python']}, by {record['compiler']}",
        f"  flags {record['flags']}",
        f"  SIMD {', '.join(record['capabilities'])}; in use: {in_use}",
        f"  bfloat16 is multiplied in {'bfloat16' if multiplies_bfloat16() else 'float32'}",
        f"  CUDA sources {cuda if record['cuda'] is None else 'not built: ' + record['cuda']}",
    ]


def _read_record() -> dict[str, Any]:
    try:
        record = dict(json.loads(_RECORD_PATH.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _UnusableError(f"the record of the native build, {_RECORD_PATH.name}, cannot be read: {error}") from None
    if record.get("native") is None:
        for name, kind in _RECORD_TYPES.items():
            if not isinstance(record.get(name), kind):
                got, wanted = f"got {name} {record.get(name)!r}", f"wanted {getattr(kind, '__name__', kind)}"
                raise _UnusableError(f"the record of the native build, {_RECORD_PATH.name}: {got}, {wanted}")
    return record


def _load() -> tuple[str | None, dict[str, Any]]:
    """Load the extension; return None and its build record, or the reason why it is unusable and {}."""
    try:
        if not _RECORD_PATH.exists() and not _BINARY_PATH.exists():
            raise _UnusableError("native kernels have not been built")
        record = _read_record()
        if (failure := record.get("native")) is not None:
            reason = f"native kernels were not built: {failure}"
            if record.get("on_purpose"):
                return reason, {}
            raise _UnusableError(reason)
        _check(record)
        importlib.import_module("rru_fast._C")
    # A binary that passes the check may still lack a library or a symbol of its own: ImportError.
    except (_UnusableError, OSError, ImportError) as error:
        if isinstance(error, _UnusableError):
            reason = f"{error}; {reinstall_command(_PACKAGE, error.variables)}"
        else:
            reason = f"the native kernels do not load: {error!r}; {reinstall_command(_PACKAGE)}"
        warnings.warn(f"rru_fast runs without its native kernels: {reason}", NativeWarning, stacklevel=2)
        return reason, {}
    _release_threads_before_fork()
    return None, record


def _release_threads_before_fork() -> None:
    """Release OpenMP's thread pool before each fork(); otherwise the child deadlocks waiting for threads it lacks.

    Parent and child start new threads at their next parallel loop. The pool is shared with PyTorch's own operators, so
    those work in the child too.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)  # torch's OpenMP: its symbols are global
    if pause is not None:
        os.register_at_fork(before=lambda: pause(_OMP_PAUSE_HARD))


def _supported_capabilities(capabilities: list[str]) -> list[str]:
    """SIMD capabilities of a build that this processor supports, the best last, by the same rule as in bindings.cpp."""
    current = torch.backends.cpu.get_cpu_capability()
    # ATen has other names too, such as SVE256: on those processors DEFAULT runs.
    level = _CAPABILITIES.index(current) if current in _CAPABILITIES else 0
    return [name for name in _CAPABILITIES[: level + 1] if name in capabilities]


def _check(record: dict[str, Any]) -> None:
    """Raise _UnusableError unless the binary is whole and fits this Python, PyTorch and processor."""
    python = sysconfig.get_config_var("SOABI")
    torch_version = str(torch.__version__)
    for name, built, current in (("Python", record["python"], python), ("torch", record["torch"], torch_version)):
        if built != current:
            raise _UnusableError(f"the native kernels were built for {name} {built}, this is {name} {current}")
    if not _supported_capabilities(record["capabilities"]):
        processor = f"this processor (or ATEN_CPU_CAPABILITY) runs {torch.backends.cpu.get_cpu_capability()}"
        reason = f"the native kernels were built for {', '.join(record['capabilities'])}, {processor}"
        raise _UnusableError(reason, variables="RRU_FAST_CAPABILITIES=all")
    if not _BINARY_PATH.exists():
        raise _UnusableError(f"the native kernels were built, but {_BINARY_PATH.name} does not exist")
    if _is_truncated(_BINARY_PATH):
        raise _UnusableError(f"{_BINARY_PATH.name} is damaged: it is shorter than its headers say")
    if "-fsanitize" in record["flags"] and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        # The sanitizer's runtime would end the process.
        raise _UnusableError("the native kernels are sanitized, and LD_PRELOAD has no libasan; make sanitize sets it")


def _is_truncated(path: Path) -> bool:
    """Return True if a 64-bit ELF file ends before its segments or its section table do.

    The loader maps them unchecked, and access to a page past the end of the file kills the process. Other files are
    rejected by the loader itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        identity = file.read(16)
        if identity[:5] != b"\x7fELF\x02":
            return False
        byte_order = "<" if identity[5] == 1 else ">"
        try:
            header = struct.unpack(byte_order + "HHIQQQIHHHHHH", file.read(48))
            segments, sections = header[4:6]  # offsets of the tables; then the size and the number of entries of each
            segment_size, segment_count, section_size, section_count = header[8:12]
            ends: list[int] = [sections + section_size * section_count]
            for i in range(segment_count):
                file.seek(segments + i * segment_size)
                _, _, offset, _, _, length, _, _ = struct.unpack(byte_order + "IIQQQQQQ", file.read(56))
                ends.append(offset + length)
        except struct.error:
            return True
    return max(ends) > size


_MISSING, _BUILD_RECORD = _load()
