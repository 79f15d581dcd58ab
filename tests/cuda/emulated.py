"""Builds of the programs that run CUDA kernels on a CPU, emulated, plain and under sanitizers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from build_tools import toolchain

ROOT = Path(__file__).resolve().parents[2]
# Kernels of each test program.
KERNELS: dict[str, tuple[str, ...]] = {
    "emulator": (),
    "refine_eval": ("refine_eval", "refine_pack"),
    "refine_training": ("refine_forward", "refine_backward", "refine_pack"),
}
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-DRRU_FEW_WARPS"]


@dataclass(frozen=True)
class Finished:
    """A program that has ended."""

    status: int
    text: str


@dataclass(frozen=True)
class Program:
    """A build of one of the test programs."""

    path: Path

    def run(self, *arguments: str) -> Finished:
        """Run it without address randomization, which ThreadSanitizer may not cope with."""
        command = [*_fixed_addresses(), str(self.path), *arguments]
        # ThreadSanitizer waits for a second for other threads to report, of which there are none.
        environment = os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        return Finished(done.returncode, done.stdout + done.stderr)


@cache
def _fixed_addresses() -> list[str]:
    """Return the command that turns address randomization off, if a process may."""
    command = ["setarch", "-R"]
    can = (
        shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    )
    return command if can else []


def build(name: str, sanitizer: str = "") -> Program:
    """Compile tests/cuda/`name`.cpp with its kernels, once per content; sanitizer: "thread", "address" or ""."""
    try:
        compiler = toolchain.find_compiler()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    digest = hashlib.sha256("\n".join([compiler.version, *FLAGS]).encode())
    sources = [ROOT / f"csrc/cuda/{kernel}.cu" for kernel in KERNELS[name]]
    sources += [ROOT / "csrc/cuda/emulation.cpp", ROOT / f"tests/cuda/{name}.cpp"]
    for file in sorted([*sources, *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("tests/cuda/*.h")]):
        digest.update(file.read_bytes())
    folder = ROOT / "build/emulated" / f"{name}-{sanitizer or 'plain'}"
    program = Program(folder / digest.hexdigest()[:16])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the same test run wait for the program
        if not program.path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _compile(program, sources, sanitizer, compiler.command)
    return program


def _compile(program: Program, sources: list[Path], sanitizer: str, compiler: Sequence[str]) -> None:
    """Compile and link sources into a program, which exists once all of it does."""

    def compile_one(source: Path) -> str:
        output = str(program.path.parent / f"{source.name}.o")
        flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
        if sanitizer == "thread" and source.stem == "emulation":
            flags = ["-DRRU_THREAD_SANITIZER"]  # it tells the sanitizer of fibers and barriers itself
        _check([*compiler, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", output])
        return output

    with ThreadPoolExecutor(toolchain.max_jobs()) as pool:
        objects = list(pool.map(compile_one, sources))
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    linked = program.path.with_suffix(".linked")
    _check([*compiler, *flags, *objects, "-o", str(linked)])
    linked.rename(program.path)


def _check(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
