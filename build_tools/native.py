"""Build rru_fast/_C from csrc and record in rru_fast/_build.json what was built, or why it was not.

The binary is built in build/native/TORCH, one folder for each torch version and for sanitized kernels, and then copied
into the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from build_tools import toolchain
from build_tools.ninja_build import BINARY, BuildConfig, compile_and_link, cuda_sources
from build_tools.toolchain import ROOT, BuildError, Cuda, CudaBuildError, Torch

CACHE = Path("build/native")  # relative, as are all paths of sources and objects: a copy of it works in another tree
TEMP_FILE_DAYS = 7  # temporary files that are older belong to builds that were killed


def disabled_reason() -> str | None:
    """Return the reason if kernels are disabled, or not supported on this platform; else None."""
    if toolchain.read_switch("RRU_FAST_NATIVE") is False:
        return "RRU_FAST_NATIVE=0 when it was installed"
    return None if sys.platform.startswith("linux") else f"the kernels need Linux, this is {sys.platform}"


def skip_reason() -> str | None:
    """Return the reason if kernels are disabled or a tool to build them is missing; else None."""
    if (reason := disabled_reason()) is not None:
        return reason
    try:
        if not (ROOT / "csrc" / "bindings.cpp").is_file():
            raise BuildError("csrc/bindings.cpp does not exist")
        toolchain.find_compiler()
        toolchain.find_torch()
        toolchain.find_ninja()
    except BuildError as error:
        return str(error)
    return None


def build(package: Path, keep_last: bool = False) -> None:
    """Build _C and write it and _build.json into the folder `package`.

    If the kernels cannot be built, they are left out and one line is printed.

    Args:
        package: folder of the package.
        keep_last: if a tool is missing, keep the kernels of the last build and raise SystemExit.

    Raises:
        SystemExit: the kernels cannot be built although RRU_FAST_NATIVE=1 or RRU_FAST_CUDA=1 requires them, `package`
            cannot be written to, or the build was interrupted, which leaves the last build in place.
    """
    required = [v for v in ("RRU_FAST_NATIVE", "RRU_FAST_CUDA") if toolchain.read_switch(v)]
    record: dict[str, Any] = {"python": sysconfig.get_config_var("SOABI"), "native": None, "cuda": None}
    try:
        if (reason := skip_reason()) is not None:
            if keep_last and (package / BINARY).is_file() and disabled_reason() is None:
                raise SystemExit(f"rru_fast: the last build is kept, the kernels cannot be built again: {reason}")
            raise BuildError(reason)
        record |= _build_extension(package / BINARY, in_place=package == ROOT / "rru_fast")
    except (BuildError, OSError) as error:
        if required:
            raise SystemExit(f"rru_fast: {required[0]}=1, but the kernels cannot be built: {error}") from None
        if os.access(package, os.W_OK):
            (package / BINARY).unlink(missing_ok=True)
        record |= {"native": str(error), "cuda": str(error), "on_purpose": disabled_reason() is not None}
        print(f"rru_fast: built without native kernels: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("rru_fast: the build was interrupted; the next one continues it\n")
        raise SystemExit(130) from None
    else:
        cuda = "CUDA" if record["cuda"] is None else f"no CUDA: {record['cuda']}"
        print(f"rru_fast: native kernels are built ({', '.join(record['capabilities'])}; {cuda})")
    try:
        _replace_file(package / "_build.json", (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise SystemExit(f"rru_fast: {package}: cannot be written to: {error}") from None
    for temp_path in package.glob("_*.tmp"):
        with suppress(FileNotFoundError):
            if temp_path.stat().st_mtime < time.time() - TEMP_FILE_DAYS * 86400:
                temp_path.unlink()


def _replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp_path = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temp_path.write_bytes(content)
    temp_path.replace(path)


def _build_extension(binary: Path, in_place: bool) -> dict[str, Any]:
    """Build `binary`, with CUDA if possible, and return its part of the record.

    Args:
        binary: path of the file.
        in_place: build for this checkout, whose tests run the CUDA kernels emulated, on this machine.
    """
    import fcntl  # missing on Windows, where this module is imported too

    config = BuildConfig(
        toolchain.find_torch(),
        toolchain.find_compiler(),
        toolchain.capabilities_to_build(in_place),
        sanitize=bool(toolchain.read_switch("RRU_FAST_SANITIZE")),
        emulation=in_place and bool(cuda_sources()),
    )
    folder = CACHE / (config.torch.version + "-sanitized" * config.sanitize)
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    with (ROOT / folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("rru_fast: waiting for another build in this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        no_cuda_reason = None
        try:
            cuda, architectures = _find_cuda(config.torch)
            config = replace(config, cuda=cuda, cuda_architectures=architectures)
            linked = compile_and_link(folder, lock.fileno(), config)
        except CudaBuildError as error:
            if toolchain.read_switch("RRU_FAST_CUDA"):
                raise
            no_cuda_reason = str(error)
            config = replace(config, cuda=None, cuda_architectures=[])
            linked = compile_and_link(folder, lock.fileno(), config)
        content = linked.read_bytes()
        if not binary.is_file() or binary.read_bytes() != content:
            _replace_file(binary, content)
    return {
        "torch": config.torch.version,
        "compiler": config.compiler.version,
        "flags": " ".join(config.flags),
        "capabilities": config.capabilities,
        "cuda": no_cuda_reason,
        "nvcc": None if config.cuda is None else config.cuda.version,
        "cuda_architectures": config.cuda_architectures,
        "cuda_sources": _hash_cuda_sources(),
    }


def _hash_cuda_sources() -> str:
    """Hash the CUDA kernels' sources: measurements of one build hold for another of the same sources."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc/cuda").glob("*.[ch]*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _find_cuda(torch: Torch) -> tuple[Cuda, list[str]]:
    """Return the CUDA toolkit and the architectures to build for, or raise CudaBuildError."""
    required = toolchain.read_switch("RRU_FAST_CUDA")
    if required is False:
        raise CudaBuildError("RRU_FAST_CUDA=0 when it was installed")
    if not cuda_sources():
        raise CudaBuildError("csrc/cuda holds no kernels")
    try:
        cuda, architectures = toolchain.find_cuda(), toolchain.cuda_architectures()
    except BuildError as error:
        raise CudaBuildError(str(error)) from None
    if not required and (torch.cuda or "none").split(".")[0] != cuda.version.split(".")[0]:
        wanted = f"that of torch {torch.version}, {torch.cuda or 'none'}"
        raise CudaBuildError(f"nvcc: got CUDA {cuda.version}, wanted {wanted}; RRU_FAST_CUDA=1 builds anyway")
    return cuda, architectures
