"""Compile csrc into rru_fast/_C and record in rru_fast/_build.json what was built, or why not.

ninja compiles and links in build/native/TORCH, a folder for each torch version and for sanitized kernels, and repeats
only what has changed. The whole binary is then copied into the package.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from build_tools import toolchain
from build_tools.toolchain import CAPABILITIES, ROOT, Compiler, Cuda, MissingError, Torch

CACHE = Path("build/native")  # relative, as are all paths of sources and objects: a copy of it works in another tree
BINARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
KEPT_DAYS = 7

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-DNDEBUG", "-DAT_PARALLEL_OPENMP=1"]
# GCC warns of the deliberately undefined operands in its own AVX-512 intrinsics (its bug 105593).
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# As ATen builds its kernels: no errno from sqrt and the like, so that loops over them vectorize.
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# -O1 with frame pointers for readable stacks. Overflow in torch's own inlined headers is reported as ours would be.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


class CudaError(MissingError):
    """The CUDA part cannot be built; the rest can do without it."""


@dataclass(frozen=True)
class Unit:
    """One compilation: its command lacks -MF, -o and -c."""

    source: Path
    variant: str  # a SIMD capability, CUDA or nothing
    command: list[str]


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def left_out() -> str | None:
    """Return the reason if kernels are left out on purpose, or the platform has none; else None."""
    if toolchain.asked("RRU_FAST_NATIVE") is False:
        return "RRU_FAST_NATIVE=0 when it was installed"
    return None if sys.platform.startswith("linux") else f"the kernels need Linux, this is {sys.platform}"


def skipped() -> str | None:
    """Return the reason if nothing will be compiled, as far as can be known before; else None."""
    if (why := left_out()) is not None:
        return why
    try:
        if not (ROOT / "csrc" / "bindings.cpp").is_file():
            raise MissingError("csrc/bindings.cpp does not exist")
        toolchain.find_compiler()
        toolchain.find_torch()
        toolchain.find_ninja()
    except MissingError as error:
        return str(error)
    return None


def build(package: Path, keep: bool = False) -> None:
    """Put _C and _build.json into the folder `package`.

    If the kernels cannot be built, they are left out with one line, unless RRU_FAST_NATIVE=1 or RRU_FAST_CUDA=1
    requires them: then SystemExit gives the reason. An interrupt also ends in SystemExit, and keeps the last build.

    Args:
        package: the folder of the package.
        keep: raise SystemExit, and leave the kernels of the last build, if a tool to build them again is missing.
    """
    required = [v for v in ("RRU_FAST_NATIVE", "RRU_FAST_CUDA") if toolchain.asked(v)]
    record: dict[str, Any] = {"python": sysconfig.get_config_var("SOABI"), "native": None, "cuda": None}
    try:
        if (why := skipped()) is not None:
            if keep and (package / BINARY).is_file() and left_out() is None:
                raise SystemExit(f"rru_fast: the last build is kept, the kernels cannot be built again: {why}")
            raise MissingError(why)
        record |= _extension(package / BINARY, toolchain.capabilities(package == ROOT / "rru_fast"))
    except (MissingError, OSError) as error:
        if required:
            raise SystemExit(f"rru_fast: {required[0]}=1, but the kernels cannot be built: {error}") from None
        if os.access(package, os.W_OK):
            (package / BINARY).unlink(missing_ok=True)
        record |= {"native": str(error), "cuda": str(error), "on_purpose": left_out() is not None}
        print(f"rru_fast: built without native kernels: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("rru_fast: the build was interrupted; the next one continues it\n")
        raise SystemExit(130) from None
    else:
        cuda = "CUDA" if record["cuda"] is None else f"no CUDA: {record['cuda']}"
        print(f"rru_fast: native kernels are built ({', '.join(record['capabilities'])}; {cuda})")
    try:
        _put(package / "_build.json", (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise SystemExit(f"rru_fast: {package}: cannot be written to: {error}") from None
    for old in package.glob("_*.tmp"):  # of builds that were killed
        with suppress(FileNotFoundError):
            if old.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                old.unlink()


def _put(goal: Path, content: bytes) -> None:
    """Replace a file in one step, so that it is always whole."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    aside = goal.with_name(f"{goal.name}.{os.getpid()}.tmp")
    aside.write_bytes(content)
    aside.replace(goal)


def _extension(binary: Path, capabilities: list[str]) -> dict[str, Any]:
    """Build `binary`, with CUDA if possible, and return its part of the record."""
    import fcntl  # not on all platforms where this module is imported

    torch, compiler = toolchain.find_torch(), toolchain.find_compiler()
    folder = CACHE / (torch.version + "-sanitized" * bool(_sanitize()))
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    with (ROOT / folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("rru_fast: waiting for another build in this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        why_not_cuda = None
        try:
            cuda, architectures = _find_cuda(torch)
            linked = _compile(folder, lock.fileno(), torch, compiler, capabilities, cuda, architectures)
        except CudaError as error:
            if toolchain.asked("RRU_FAST_CUDA"):
                raise
            cuda, architectures, why_not_cuda = None, [], str(error)
            linked = _compile(folder, lock.fileno(), torch, compiler, capabilities, None, [])
        content = linked.read_bytes()
        if not binary.is_file() or binary.read_bytes() != content:
            _put(binary, content)
    return {
        "torch": torch.version,
        "compiler": compiler.version,
        "flags": " ".join([*FLAGS, *_sanitize()]),
        "capabilities": capabilities,
        "cuda": why_not_cuda,
        "nvcc": None if cuda is None else cuda.version,
        "cuda_architectures": architectures,
    }


def _find_cuda(torch: Torch) -> tuple[Cuda, list[str]]:
    """The toolkit and the architectures to build for; CudaError if CUDA is not to be built."""
    required = toolchain.asked("RRU_FAST_CUDA")
    if required is False:
        raise CudaError("RRU_FAST_CUDA=0 when it was installed")
    if not _sources("csrc/cuda/*.cu"):
        raise CudaError("csrc/cuda holds no kernels yet")
    try:
        cuda, architectures = toolchain.find_cuda(), toolchain.cuda_architectures()
    except MissingError as error:
        raise CudaError(str(error)) from None
    if not required and (torch.cuda or "none").split(".")[0] != cuda.version.split(".")[0]:
        wanted = f"torch {torch.version} has CUDA {torch.cuda or 'not at all'}"
        raise CudaError(f"nvcc is of CUDA {cuda.version} and {wanted}; RRU_FAST_CUDA=1 builds all the same")
    return cuda, architectures


def _sanitize() -> list[str]:
    return SANITIZE if toolchain.asked("RRU_FAST_SANITIZE") else []


def _cpp_units(torch: Torch, compiler: Compiler, capabilities: list[str], architectures: list[str]) -> list[Unit]:
    """bindings.cpp once, each csrc/cpu file once for each capability."""
    common = [*compiler.command, *FLAGS, *_sanitize(), "-MMD", "-Icsrc"]
    # -isystem: no warnings from torch's headers, and no dependencies on them: their version is in the command.
    for folder in (torch.folder / "include", torch.folder / "include/torch/csrc/api/include"):
        common += ["-isystem", str(folder)]
    common += [f'-DRRU_TORCH_VERSION="{torch.version}"']
    bindings = [*common, "-isystem", sysconfig.get_path("include"), "-isystem", sysconfig.get_path("platinclude")]
    bindings += [f'-DRRU_FLAGS="{" ".join([*FLAGS, *_sanitize()])}"', f'-DRRU_CAPABILITIES="{" ".join(capabilities)}"']
    bindings += [f"-DRRU_HAS_{capability}" for capability in capabilities]
    bindings += [f'-DRRU_CUDA_ARCHITECTURES="{" ".join(architectures)}"'] + ["-DRRU_HAS_CUDA"] * bool(architectures)
    units = [Unit(Path("csrc/bindings.cpp"), "", bindings)]
    # The lowest capability first: the linker takes an inline function from the first object that has it.
    for capability in capabilities:
        defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
        command = [*common, *CAPABILITIES[capability], *defines]
        units += [Unit(source, capability, command) for source in _sources("csrc/cpu/*.cpp")]
    return units


def _cuda_units(compiler: Compiler, cuda: Cuda, architectures: list[str]) -> list[Unit]:
    """Each csrc/cuda file once, for all architectures."""
    command = [str(cuda.nvcc), "-std=c++20", "-O3", "-MD", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
    if len(compiler.command) == 1:  # nvcc takes a program here, not a command such as "ccache c++"
        command += ["-ccbin", compiler.command[0]]
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    return [Unit(source, "CUDA", command) for source in _sources("csrc/cuda/*.cu")]


def _compile(
    folder: Path,
    lock: int,
    torch: Torch,
    compiler: Compiler,
    capabilities: list[str],
    cuda: Cuda | None,
    architectures: list[str],
) -> Path:
    """Compile and link in `folder` what is not up to date there; the binary's path."""
    from ninja import ninja_syntax

    units = _cpp_units(torch, compiler, capabilities, architectures)
    libraries = [f"-L{torch.folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    versions = {"compiler": compiler.version}
    if cuda is not None:
        units += _cuda_units(compiler, cuda, architectures)
        # Static: users need no CUDA runtime.
        libraries += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        versions["nvcc"] = cuda.version
    for name, version in versions.items():  # files on which all objects depend
        path = ROOT / folder / name
        if not path.is_file() or path.read_text() != version:
            path.write_text(version)

    linked = folder / BINARY
    failures: dict[str, str] = {}  # of each output, the message if it fails
    with (ROOT / folder / "build.ninja").open("w") as file:
        writer = ninja_syntax.Writer(file, width=sys.maxsize)  # wrapping could break quoted spaces
        writer.variable("builddir", str(folder))
        writer.rule("compile", "$compiler -MF $out.d -o $out -c $in", "$what", depfile="$out.d", deps="gcc")
        writer.rule("link", "$compiler $in $libraries -o $out", "linking")
        for unit in units:
            name = "-".join(filter(None, [unit.source.stem, unit.variant]))
            output = str(folder / f"{name}.o")
            what = f"{unit.source} ({unit.variant})" if unit.variant else str(unit.source)
            depends = [str(folder / name) for name in versions if name == "compiler" or unit.variant == "CUDA"]
            variables = {"compiler": _quoted(unit.command), "what": what}
            writer.build(output, "compile", str(unit.source), implicit=depends, variables=variables)
            failures[output] = f"{Path(unit.command[0]).name} failed on {unit.source}"
        command = [*compiler.command, "-shared", "-fopenmp", *_sanitize()]
        variables = {"compiler": _quoted(command), "libraries": _quoted(libraries)}
        writer.build(str(linked), "link", list(failures), variables=variables)
        failures[str(linked)] = f"{Path(command[0]).name} failed on linking"
    _run_ninja(folder / "build.ninja", failures, lock)
    if not (ROOT / linked).is_file():
        raise MissingError(f"{failures[str(linked)]}: no output")
    return ROOT / linked


def _quoted(words: list[str]) -> str:
    from ninja import ninja_syntax

    return str(ninja_syntax.escape(shlex.join(words)))


def _run_ninja(file: Path, failures: dict[str, str], lock: int) -> None:
    """Run ninja and relay its output; raise MissingError, or CudaError if only CUDA sources failed."""
    environment = {**os.environ, "LC_ALL": "C", "NINJA_STATUS": "rru_fast: [%f/%t] "}
    process = subprocess.Popen(
        [str(toolchain.find_ninja()), "-f", str(file), "-j", str(toolchain.jobs())],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=[lock],  # held until the last compiler has ended, even if this process is killed
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] != "ninja: no work to do.":
                sys.stdout.write(line)
                sys.stdout.flush()
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if status == 130:
        raise KeyboardInterrupt
    if status != 0:
        # "FAILED: [code=1] OUTPUT", the command, then the compiler's messages. C++ first: CUDA alone can be left out.
        failed = [i for i, line in enumerate(lines) if line.startswith("FAILED: ")]
        if not failed:
            raise MissingError(f"ninja failed: {lines[-1] if lines else f'exit status {status}'}")
        first = min(failed, key=lambda i: lines[i].endswith("-CUDA.o"))
        said = list(takewhile(lambda line: not line.startswith(("rru_fast: [", "ninja: ")), lines[first + 2 :]))
        errors = [line for line in said if "error:" in line] or [line for line in said if "error" in line] or said[-1:]
        message = errors[0] if errors else "no message"
        output = lines[first].split()[-1]
        raise (CudaError if output.endswith("-CUDA.o") else MissingError)(f"{failures[output]}: {message}")
