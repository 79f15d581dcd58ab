"""Compile and link csrc with ninja, which repeats only what has changed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from build_tools import toolchain
from build_tools.toolchain import CAPABILITIES, ROOT, BuildError, Compiler, Cuda, CudaBuildError, Torch

BINARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-DNDEBUG", "-DAT_PARALLEL_OPENMP=1"]
# GCC warns of the deliberately undefined operands in its own AVX-512 intrinsics (its bug 105593).
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# As ATen builds its kernels: no errno from sqrt and the like, so that loops over them vectorize.
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# -O1 with frame pointers for readable stacks. Overflow in code inlined from torch's headers is reported too.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]

# CUDA sources as C++. They run to be tested, not to be fast: optimizing them more takes longer than running them.
EMULATED = ["-O1", "-x", "c++"]


@dataclass(frozen=True)
class BuildConfig:
    """The tools and options of one build."""

    torch: Torch
    compiler: Compiler
    capabilities: list[str]  # SIMD, the lowest first
    sanitize: bool
    emulation: bool = False  # of the CUDA kernels on a CPU, for tests
    cuda: Cuda | None = None
    cuda_architectures: list[str] = field(default_factory=list)

    @property
    def sanitizer_flags(self) -> list[str]:
        return SANITIZE if self.sanitize else []

    @property
    def flags(self) -> list[str]:
        """Flags of every C++ source."""
        return [*FLAGS, *self.sanitizer_flags]


@dataclass(frozen=True)
class CompileStep:
    """One compilation of one source. `command` is without -MF, -o and -c, which the ninja rule adds."""

    source: Path
    variant: str  # a SIMD capability, "CUDA", "emulated" or ""
    command: list[str]


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


def cuda_sources() -> list[Path]:
    """CUDA sources of the kernels, relative to the repository."""
    return _sources("csrc/cuda/*.cu")


def _cpp_steps(config: BuildConfig) -> list[CompileStep]:
    """Compile the bindings and operators once and each csrc/cpu file once for each capability."""
    common = [*config.compiler.command, *config.flags, "-MMD", "-Icsrc"]
    # -isystem: no warnings from torch's headers, and no dependencies on them: their version is in the command.
    for folder in (config.torch.folder / "include", config.torch.folder / "include/torch/csrc/api/include"):
        common += ["-isystem", str(folder)]
    common += [f'-DRRU_TORCH_VERSION="{config.torch.version}"']
    capabilities, architectures = " ".join(config.capabilities), " ".join(config.cuda_architectures)
    bindings = [*common, "-isystem", sysconfig.get_path("include"), "-isystem", sysconfig.get_path("platinclude")]
    bindings += [f'-DRRU_FLAGS="{" ".join(config.flags)}"', f'-DRRU_CAPABILITIES="{capabilities}"']
    bindings += [f"-DRRU_HAS_{capability}" for capability in config.capabilities]
    bindings += [f'-DRRU_CUDA_ARCHITECTURES="{architectures}"'] + ["-DRRU_HAS_CUDA"] * bool(architectures)
    bindings += ["-DRRU_HAS_EMULATION"] * config.emulation
    steps = [CompileStep(source, "", bindings) for source in [*_sources("csrc/*.cpp"), *_sources("csrc/ops/*.cpp")]]
    # The lowest capability first: the linker takes an inline function from the first object that has it.
    for capability in config.capabilities:
        defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
        command = [*common, *CAPABILITIES[capability], *defines]
        steps += [CompileStep(source, capability, command) for source in _sources("csrc/cpu/*.cpp")]
    if config.emulation:
        command = [*config.compiler.command, *config.flags, *EMULATED, "-MMD", "-Icsrc"]
        steps += [CompileStep(s, "emulated", command) for s in [*cuda_sources(), *_sources("csrc/cuda/*.cpp")]]
    return steps


def _cuda_steps(compiler: Compiler, cuda: Cuda, architectures: list[str]) -> list[CompileStep]:
    """Compile each csrc/cuda file once, for all architectures."""
    command = [str(cuda.nvcc), "-std=c++20", "-O3", "-MD", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
    if len(compiler.command) == 1:  # nvcc takes a program here, not a command such as "ccache c++"
        command += ["-ccbin", compiler.command[0]]
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    return [CompileStep(source, "CUDA", command) for source in cuda_sources()]


def compile_and_link(folder: Path, lock: int, config: BuildConfig) -> Path:
    """Bring the binary in `folder` up to date and return its path.

    Args:
        folder: of objects and binary, relative to the repository.
        lock: file descriptor of the folder's lock.
        config: tools and options.

    Raises:
        CudaBuildError: only CUDA sources failed to compile.
        BuildError: other sources failed to compile, or linking failed.
    """
    steps = _cpp_steps(config)
    libraries = [f"-L{config.torch.folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    versions = {"compiler": config.compiler.version}
    if config.cuda is not None:
        steps += _cuda_steps(config.compiler, config.cuda, config.cuda_architectures)
        # Static: users need no CUDA runtime.
        libraries += [f"-L{config.cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        versions["nvcc"] = config.cuda.version
    for name, version in versions.items():  # files on which all objects depend
        path = ROOT / folder / name
        if not path.is_file() or path.read_text() != version:
            path.write_text(version)
    link_command = [*config.compiler.command, "-shared", "-fopenmp", *config.sanitizer_flags]
    failures = _write_ninja_file(folder, steps, list(versions), link_command, libraries)
    _run_ninja(folder / "build.ninja", failures, lock)
    binary = folder / BINARY
    if not (ROOT / binary).is_file():
        raise BuildError(f"{failures[str(binary)]}: no output")
    return ROOT / binary


def _write_ninja_file(
    folder: Path, steps: list[CompileStep], version_files: list[str], link_command: list[str], libraries: list[str]
) -> dict[str, str]:
    """Write `folder`/build.ninja; return for each output the message if making it fails."""
    from ninja import ninja_syntax

    failures: dict[str, str] = {}
    with (ROOT / folder / "build.ninja").open("w") as file:
        writer = ninja_syntax.Writer(file, width=sys.maxsize)  # wrapping could break quoted spaces
        writer.variable("builddir", str(folder))
        writer.rule("compile", "$compiler -MF $out.d -o $out -c $in", "$label", depfile="$out.d", deps="gcc")
        writer.rule("link", "$compiler $in $libraries -o $out", "linking")
        for step in steps:
            name = "-".join(filter(None, [step.source.stem, step.variant]))
            output = str(folder / f"{name}.o")
            label = f"{step.source} ({step.variant})" if step.variant else str(step.source)
            depends = [str(folder / n) for n in version_files if n == "compiler" or step.variant == "CUDA"]
            variables = {"compiler": _quoted(step.command), "label": label}
            writer.build(output, "compile", str(step.source), implicit=depends, variables=variables)
            failures[output] = f"{Path(step.command[0]).name} failed on {step.source}"
        variables = {"compiler": _quoted(link_command), "libraries": _quoted(libraries)}
        writer.build(str(folder / BINARY), "link", list(failures), variables=variables)
        failures[str(folder / BINARY)] = f"{Path(link_command[0]).name} failed on linking"
    return failures


def _quoted(words: list[str]) -> str:
    from ninja import ninja_syntax

    return str(ninja_syntax.escape(shlex.join(words)))


def _run_ninja(file: Path, failures: dict[str, str], lock: int) -> None:
    """Run ninja and relay its output; raise the error if it fails."""
    environment = {**os.environ, "LC_ALL": "C", "NINJA_STATUS": "rru_fast: [%f/%t] "}
    process = subprocess.Popen(
        [str(toolchain.find_ninja()), "-f", str(file), "-j", str(toolchain.max_jobs())],
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
        raise _build_error(lines, status, failures)


def _build_error(lines: list[str], status: int, failures: dict[str, str]) -> BuildError:
    """Return the error for ninja's output: a CudaBuildError if only CUDA sources failed, as CUDA can be left out."""
    # "FAILED: [code=1] OUTPUT", the command, then the compiler's messages.
    failed = [i for i, line in enumerate(lines) if line.startswith("FAILED: ")]
    if not failed:
        return BuildError(f"ninja failed: {lines[-1] if lines else f'exit status {status}'}")
    first = min(failed, key=lambda i: lines[i].endswith("-CUDA.o"))  # C++ before CUDA
    output = lines[first].split()[-1]
    messages = list(takewhile(lambda line: not line.startswith(("rru_fast: [", "ninja: ")), lines[first + 2 :]))
    errors = [line for line in messages if "error:" in line] or [line for line in messages if "error" in line]
    message = (errors or messages[-1:] or ["no message"])[0]
    return (CudaBuildError if output.endswith("-CUDA.o") else BuildError)(f"{failures[output]}: {message}")
