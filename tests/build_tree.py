"""Copies of this repository for test builds, with stand-in kernels that compile in a second without torch headers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch

from build_tools import toolchain

ROOT = Path(__file__).resolve().parents[1]
BUILD_COMMAND = [sys.executable, "-m", "build_tools"]
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt")
# Environment variables that control a build: tests start from none of them.
VARIABLES = ("RRU_FAST_NATIVE", "RRU_FAST_CUDA", "RRU_FAST_SANITIZE", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
VARIABLES += ("RRU_FAST_CAPABILITIES", "ATEN_CPU_CAPABILITY", "CXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")

STAND_IN_SOURCES = {
    "csrc/bindings.cpp": """
        #include <Python.h>
        #include "cpu/kernels.h"
        #ifdef RRU_HAS_CUDA
        int cuda_runtime();
        #else
        static int cuda_runtime() { return 0; }
        #endif
        using namespace rru::CHOSEN;
        static PyObject* sum(PyObject*, PyObject*) { return PyLong_FromLong(first() + second()); }
        static PyObject* runtime(PyObject*, PyObject*) { return PyLong_FromLong(cuda_runtime()); }
        static PyObject* flags(PyObject*, PyObject*) { return PyUnicode_FromString(RRU_FLAGS "; " RRU_TORCH_VERSION); }
        static PyMethodDef methods[] = {
            {"sum", sum, METH_NOARGS, ""},
            {"runtime", runtime, METH_NOARGS, ""},
            {"flags", flags, METH_NOARGS, ""},
            {}};
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
        PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
    """,
    "csrc/cpu/kernels.h": """
        #if defined(RRU_HAS_DEFAULT)
        #define CHOSEN DEFAULT
        #elif defined(RRU_HAS_AVX2)
        #define CHOSEN AVX2
        #else
        #define CHOSEN AVX512
        #endif
        namespace rru { namespace CHOSEN { int first(); int second(); } }
    """,
    "csrc/cpu/first.cpp": '#include "kernels.h"\nnamespace rru::CPU_CAPABILITY { int first() { return 40; } }',
    "csrc/cpu/second.cpp": "namespace rru::CPU_CAPABILITY { int second() { return 2; } }",
}
STAND_IN_CUDA = """
    #ifdef __CUDACC__
    #include <cuda_runtime.h>
    __global__ void twice_kernel(float* x) { x[threadIdx.x] *= 2; }
    int cuda_runtime() { int version = 0; cudaRuntimeGetVersion(&version); return version; }
    void twice(float* x, cudaStream_t stream) { twice_kernel<<<1, 32, 0, stream>>>(x); }
    #endif
"""
STAND_IN_TORCH = """
    from torch.version import __version__
    class backends:
        class cpu:
            get_cpu_capability = staticmethod(lambda: "{capability}")
"""


def write_stand_in_torch(site: Path) -> None:
    """Put a stand-in torch into a site-packages folder: it imports at once, and has torch's headers and libraries."""
    folder = site / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text(dedent(STAND_IN_TORCH).format(capability=toolchain.native_capability()))
    (folder / "version.py").write_text(f"__version__ = {str(torch.__version__)!r}\ncuda = None\n")
    for name in ("include", "lib"):
        (folder / name).symlink_to(Path(torch.__file__).parent / name)


@dataclass(frozen=True)
class Tree:
    """A copy of the repository."""

    root: Path

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Build in place and wait."""
        return run(BUILD_COMMAND, self.root, **variables)

    def start_build(self, **variables: str) -> subprocess.Popen[str]:
        """Start a build in place, in a process group of its own."""
        return subprocess.Popen(
            BUILD_COMMAND,
            cwd=self.root,
            env=environment(**variables),
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.root / "rru_fast/_build.json").read_text()))

    def binaries(self) -> list[Path]:
        return list((self.root / "rru_fast").glob("_C*"))

    def leftovers(self) -> list[str]:
        """Temporary files that no build has renamed or deleted."""
        return [path.name for path in (self.root / "rru_fast").glob("*.tmp")]

    def copy(self, root: Path) -> Tree:
        """Copy the tree with its build output, which is up to date in the copy too."""
        shutil.copytree(self.root, root)
        return Tree(root)

    def call(self, function: str) -> str:
        """Call a function of the built extension in a process without torch."""
        code = f"import sys; sys.path.insert(0, 'rru_fast'); import _C; print(_C.{function}())"
        done = run([sys.executable, "-c", code], self.root)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def environment(**variables: str) -> dict[str, str]:
    """The environment without the variables that control a build, plus those given."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `environment(**variables)`."""
    return subprocess.run(command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, check=False)


def _copy_repository(root: Path, *folders: str) -> None:
    root.mkdir(parents=True)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, root)
    for folder in ("build_tools", "rru_fast", *folders):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "*.tmp")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)


def real_tree(root: Path) -> Tree:
    """Copy the repository without build output."""
    _copy_repository(root, "csrc")
    return Tree(root)


def stand_in_tree(root: Path) -> Tree:
    """Copy the repository with stand-in kernels and a package that imports rru_fast.native only."""
    _copy_repository(root)
    tree = Tree(root)
    tree.write("rru_fast/__init__.py", "from rru_fast import native\n")
    for path, text in STAND_IN_SOURCES.items():
        tree.write(path, text)
    return tree
