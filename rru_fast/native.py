"""The compiled kernels, rru_fast/_C: loaded where they fit this Python and this PyTorch, else why they are not.

The build leaves _build.json beside the extension: what it was built with, or why it was not. A binary that does not
fit, or that is not the one the record describes, is never loaded: it could crash the process instead of raising.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
# Python started in the source folder imports the package from there, installed or not: kernels belong there then.
_FROM_SOURCES = (_FOLDER.parent / "setup.py").exists()
REMEDY = (
    f"in {_FOLDER.parent}, run: pip install --no-deps -e ."
    if _FROM_SOURCES
    else "in rru_fast's source folder, run: pip install --no-deps --force-reinstall ."
)
_RECORD = _FOLDER / "_build.json"
_BINARY = _FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


# What the record says of a build, beside why it is none.
_FIELDS: dict[str, Any] = dict.fromkeys(("python", "torch", "compiler", "flags", "sha256"), str)
_FIELDS |= {"capabilities": list, "cuda_architectures": list, "cuda": str | None, "nvcc": str | None}


class NativeWarning(UserWarning):
    """Native kernels were not left out, and yet there are none to be used, so the composite backend serves."""


class _UnusableError(Exception):
    """There is no build, or it is not for this Python, not for this PyTorch, or damaged."""


@dataclass(frozen=True)
class Kernels:
    """One operator in C++: the composite's arguments in the composite's order."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def kernels(op: str) -> Kernels:
    """The C++ kernels of an operator, "refine", "strip_pool" or "batch_hard"; only where `missing()` is None."""
    namespace = torch.ops.rru_fast
    return Kernels(getattr(namespace, f"{op}_cpu").default, getattr(namespace, f"{op}_backward_cpu").default)


def missing() -> str | None:
    """Why the native kernels cannot serve; None where they can."""
    return _MISSING


def describe() -> list[str]:
    """What was built with what, a line each, as `show_config` prints it."""
    if _MISSING is not None:
        return []
    cuda = f"built: nvcc {_BUILT['nvcc']}, sm {' '.join(_BUILT['cuda_architectures'])}"
    return [
        f"built for torch {_BUILT['torch']}, {_BUILT['python']}, by {_BUILT['compiler']}",
        f"  flags {_BUILT['flags']}; {', '.join(_BUILT['capabilities'])}",
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
    """Load the extension; why it cannot be loaded, or None and the record of its build."""
    try:
        if not _RECORD.exists() and not _BINARY.exists():
            raise _UnusableError("native kernels have not been built")
        built = _read_record()
        if built.get("native") is not None:
            return f"native kernels were not built: {built['native']}", {}
        _check(built)
        importlib.import_module("rru_fast._C")
    # A binary that passes the check may still lack a library or a symbol of its own: ImportError.
    except (_UnusableError, OSError, ImportError) as error:
        what = str(error) if isinstance(error, _UnusableError) else f"the native kernels do not load: {error!r}"
        reason = f"{what}; {REMEDY}"
        warnings.warn(f"rru_fast runs without its native kernels: {reason}", NativeWarning, stacklevel=2)
        return reason, {}
    return None, built


def _check(built: dict[str, Any]) -> None:
    """Raise _UnusableError unless the binary is there, whole, and for this Python and this PyTorch."""
    python = sysconfig.get_config_var("SOABI")
    for name, wanted, here in (("Python", built["python"], python), ("torch", built["torch"], str(torch.__version__))):
        if wanted != here:
            raise _UnusableError(f"the native kernels were built for {name} {wanted}, this is {name} {here}")
    if not _BINARY.exists():
        raise _UnusableError(f"the native kernels were built, but {_BINARY.name} is not there")
    # Of a file cut short, the loader may map pages that are not there, which kills the process when they are touched.
    if hashlib.sha256(_BINARY.read_bytes()).hexdigest() != built["sha256"]:
        raise _UnusableError(f"{_BINARY.name} is not the file that was built: it is damaged or another build's")
    if "-fsanitize" in built["flags"] and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        # The sanitizer's runtime would end the process.
        raise _UnusableError("the native kernels are sanitized, and LD_PRELOAD has no libasan; make sanitize sets it")


_MISSING, _BUILT = _load()
