"""Compile csrc into rru_fast/_C and write rru_fast/_build.json: what was built and with what, or why it was not.

Objects are kept in build/native under a name that ends in a hash of all that goes into them: what has not changed is
not compiled again, and builds that run at once share them safely, since each writes beside its goal and renames.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import toolchain
from build_tools.toolchain import CAPABILITIES, Compiler, Cuda, MissingError, Torch

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path("build/native")  # relative, as all paths below: commands run in ROOT, and objects are the same wherever
BINARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
KEPT_DAYS = 7

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-DNDEBUG", "-DAT_PARALLEL_OPENMP=1"]
# GCC takes the deliberately undefined operands inside its AVX-512 intrinsics for mistakes of ours (its bug 105593).
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# As ATen builds its kernels: no errno from sqrt and the like, so that loops over them vectorise.
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# -O1 with frame pointers for readable stacks. Overflow in torch's own inlined headers is reported as ours would be.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


class CudaError(MissingError):
    """The CUDA part failed to build; the rest can do without it."""


@dataclass(frozen=True)
class Unit:
    """One compilation: a source, what its object is called, and the command short of -o."""

    source: Path
    name: str
    command: list[str]
    compiler: str  # --version of what compiles it

    def key(self) -> str:
        """A hash of all that goes into the object but torch's headers, which its version stands for."""
        digest = hashlib.sha256(json.dumps([self.command, self.compiler]).encode())
        for path in _with_includes(self.source):
            digest.update(b"\0" + path.as_posix().encode() + b"\0" + (ROOT / path).read_bytes())
        return digest.hexdigest()[:16]


def _with_includes(source: Path) -> list[Path]:
    """A source and all that it includes of ours, by "name", beside it or in csrc."""
    found, todo = [], [source]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', (ROOT / path).read_text("utf-8"), re.MULTILINE):
            beside = (Path(os.path.normpath(folder / name)) for folder in (path.parent, Path("csrc")))
            todo += [p for p in beside if (ROOT / p).is_file()][:1]
    return found


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def skipped() -> str | None:
    """Why no native kernels will be tried here, or None: what can be known before anything is compiled."""
    if toolchain.asked("RRU_FAST_NATIVE") is False:
        return "RRU_FAST_NATIVE=0 when it was installed"
    try:
        if not sys.platform.startswith("linux"):
            raise MissingError(f"the kernels are built on Linux only, this is {sys.platform}")
        if not (ROOT / "csrc" / "bindings.cpp").is_file():
            raise MissingError("csrc/bindings.cpp is not there")
        toolchain.find_compiler()
        toolchain.find_torch()
    except MissingError as why:
        return str(why)
    return None


def build(package: Path) -> None:
    """Put _C and _build.json into the folder `package`.

    What cannot be built is left out with one line, unless RRU_FAST_NATIVE=1 or RRU_FAST_CUDA=1 demands it: then
    SystemExit says why. An interrupt is a line and SystemExit too, and leaves what an earlier build made.
    """
    demanded = [v for v in ("RRU_FAST_NATIVE", "RRU_FAST_CUDA") if toolchain.asked(v)]
    record: dict[str, Any] = {"python": sysconfig.get_config_var("SOABI"), "native": None, "cuda": None}
    try:
        if (why := skipped()) is not None:
            raise MissingError(why)
        record |= _extension(package / BINARY, _read(package / "_build.json"))
    except (MissingError, OSError) as error:
        if demanded:
            raise SystemExit(f"rru_fast: {demanded[0]}=1, but the kernels cannot be built: {error}") from None
        (package / BINARY).unlink(missing_ok=True)
        record["native"] = record["cuda"] = str(error)
        print(f"rru_fast: built without native kernels: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("rru_fast: the build was interrupted; the next one goes on from here\n")
        raise SystemExit(130) from None
    else:
        cuda = "CUDA" if record["cuda"] is None else f"no CUDA: {record['cuda']}"
        print(f"rru_fast: native kernels are built ({', '.join(record['capabilities'])}; {cuda})")
    package.mkdir(parents=True, exist_ok=True)
    _drop_old(package, "_*.tmp")
    aside = package / f"_build.{os.getpid()}.tmp"
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(package / "_build.json")


def _read(record: Path) -> dict[str, Any]:
    """An earlier build's record; empty where there is none that can be read."""
    try:
        return dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _extension(binary: Path, earlier: dict[str, Any]) -> dict[str, Any]:
    """Build `binary`, with CUDA if that can be; what the record says of it."""
    torch, compiler = toolchain.find_torch(), toolchain.find_compiler()
    why_not_cuda = None
    try:
        cuda, architectures = _find_cuda(torch)
        objects = _compile(_cpp_units(torch, compiler, architectures) + _cuda_units(compiler, cuda, architectures))
    except CudaError as error:
        if toolchain.asked("RRU_FAST_CUDA"):
            raise
        cuda, architectures, why_not_cuda = None, [], str(error)
        objects = _compile(_cpp_units(torch, compiler, architectures))
    command = [*compiler.command, "-shared", "-fopenmp", *_sanitize(), *map(str, objects)]
    command += [f"-L{torch.folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    if cuda is not None:  # static: the CUDA runtime need not be where the kernels are loaded
        command += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    record = {
        "torch": torch.version,
        "compiler": compiler.version,
        "flags": " ".join([*FLAGS, *_sanitize()]),
        "capabilities": list(CAPABILITIES),
        "cuda": why_not_cuda,
        "nvcc": None if cuda is None else cuda.version,
        "cuda_architectures": architectures,
        "inputs": hashlib.sha256(json.dumps([command, compiler.version]).encode()).hexdigest(),
    }
    linked = (earlier.get("inputs"), earlier.get("sha256"))
    if not binary.is_file() or linked != (record["inputs"], _sha256(binary)):
        binary.parent.mkdir(parents=True, exist_ok=True)
        _run(command, binary.absolute(), "linking")
    return record | {"sha256": _sha256(binary)}


def _find_cuda(torch: Torch) -> tuple[Cuda, list[str]]:
    """The toolkit and the architectures to build for; CudaError where CUDA is not to be built."""
    demanded = toolchain.asked("RRU_FAST_CUDA")
    if demanded is False:
        raise CudaError("RRU_FAST_CUDA=0 when it was installed")
    if not _sources("csrc/cuda/*.cu"):
        raise CudaError("csrc/cuda holds no kernels yet")
    try:
        cuda, architectures = toolchain.find_cuda(), toolchain.cuda_architectures()
    except MissingError as error:
        raise CudaError(str(error)) from None
    if not demanded and (torch.cuda or "none").split(".")[0] != cuda.version.split(".")[0]:
        wanted = f"torch {torch.version} has CUDA {torch.cuda or 'not at all'}"
        raise CudaError(f"nvcc is of CUDA {cuda.version} and {wanted}; RRU_FAST_CUDA=1 builds all the same")
    return cuda, architectures


def _sanitize() -> list[str]:
    return SANITIZE if toolchain.asked("RRU_FAST_SANITIZE") else []


def _cpp_units(torch: Torch, compiler: Compiler, architectures: list[str]) -> list[Unit]:
    """bindings.cpp once, each csrc/cpu file once for each capability."""
    common = [*compiler.command, *FLAGS, *_sanitize(), "-Icsrc"]
    # -isystem: warnings in their headers are not ours to mend. The version enters each object's key by its definition.
    for folder in (torch.folder / "include", torch.folder / "include/torch/csrc/api/include"):
        common += ["-isystem", str(folder)]
    common += [f'-DRRU_TORCH_VERSION="{torch.version}"']
    bindings = [*common, "-isystem", sysconfig.get_path("include"), "-isystem", sysconfig.get_path("platinclude")]
    bindings += [f'-DRRU_FLAGS="{" ".join([*FLAGS, *_sanitize()])}"', f'-DRRU_CAPABILITIES="{" ".join(CAPABILITIES)}"']
    bindings += [f'-DRRU_CUDA_ARCHITECTURES="{" ".join(architectures)}"'] + ["-DRRU_HAS_CUDA"] * bool(architectures)
    bindings += [f"-DRRU_HAS_{capability}" for capability in CAPABILITIES]
    source = Path("csrc/bindings.cpp")
    units = [Unit(source, "bindings", [*bindings, "-c", str(source)], compiler.version)]
    # The plainest capability first: of an inline function that several objects carry, the linker takes the first one's.
    for capability, flags in CAPABILITIES.items():
        defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
        for source in _sources("csrc/cpu/*.cpp"):
            command = [*common, *flags, *defines, "-c", str(source)]
            units.append(Unit(source, f"{source.stem}-{capability}", command, compiler.version))
    return units


def _cuda_units(compiler: Compiler, cuda: Cuda, architectures: list[str]) -> list[Unit]:
    """Each csrc/cuda file once, for all architectures."""
    command = [str(cuda.nvcc), "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
    if len(compiler.command) == 1:  # nvcc takes a program here, not a command such as "ccache c++"
        command += ["-ccbin", compiler.command[0]]
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    version = f"{cuda.version} {compiler.version}"
    return [Unit(s, f"{s.stem}-CUDA", [*command, "-c", str(s)], version) for s in _sources("csrc/cuda/*.cu")]


def _compile(units: list[Unit]) -> list[Path]:
    """The units' objects, made where they are not there already, several at once."""
    (ROOT / CACHE).mkdir(parents=True, exist_ok=True)
    interrupted = threading.Event()

    def compiled(unit: Unit) -> Path:
        if interrupted.is_set():  # before this thread's next unit was cancelled
            raise KeyboardInterrupt
        try:
            return _object(unit)
        except KeyboardInterrupt:
            interrupted.set()
            raise

    with ThreadPoolExecutor(toolchain.jobs()) as pool:
        futures = [pool.submit(compiled, unit) for unit in units]
        try:
            objects = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _drop_old(ROOT / CACHE, "*")
    return objects


def _drop_old(folder: Path, pattern: str) -> None:
    """Take away what has not been in use for days: old objects, and what a killed build was writing."""
    for old in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another build's: it renames, and takes away, at the same time
            if old.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                old.unlink()


def _object(unit: Unit) -> Path:
    """The object of a unit, compiled unless it is there."""
    path = CACHE / f"{unit.name}-{unit.key()}.o"
    if (ROOT / path).is_file():
        os.utime(ROOT / path)  # in use, so not among the old
        return path
    sys.stdout.write(f"rru_fast: compiling {unit.source} ({unit.name})\n")  # print writes the end of line apart
    try:
        _run(unit.command, ROOT / path, str(unit.source))
    except MissingError as error:
        raise (CudaError if unit.source.suffix == ".cu" else MissingError)(str(error)) from None
    return path


def _run(command: list[str], goal: Path, what: str) -> None:
    """Run a compiler for `goal`, which appears whole or not at all."""
    aside = goal.with_name(f"{goal.name}.{os.getpid()}.tmp")
    try:
        done = toolchain.run([*command, "-o", str(aside)], cwd=ROOT)
        if done.returncode == -signal.SIGINT:  # a terminal sends it to the compilers as well, and a thread gets none
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        aside.unlink(missing_ok=True)
        raise
    sys.stderr.write(done.stderr)
    if done.returncode != 0 or not aside.is_file():
        aside.unlink(missing_ok=True)
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise MissingError(f"{Path(command[0]).name} failed on {what}: {said.strip()}")
    aside.replace(goal)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
