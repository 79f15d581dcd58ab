"""Find PyTorch, ninja, a C++ compiler and a CUDA toolkit; read the environment variables that control the build."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Compiler flags of the SIMD capabilities, the lowest first, as in ATen.
CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]


class BuildError(Exception):
    """The kernels cannot be built; the message is the reason, in one line."""


class CudaBuildError(BuildError):
    """The CUDA kernels cannot be built; the C++ kernels may build without them."""


@dataclass(frozen=True)
class Torch:
    """The PyTorch to build for."""

    folder: Path
    version: str
    cuda: str | None  # the CUDA version it was built with


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command and the first line of its --version."""

    command: list[str]
    version: str


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    nvcc: Path
    version: str
    libraries: Path  # folder of libcudart_static.a


def read_switch(variable: str) -> bool | None:
    """Read an environment variable: True for 1, False for 0, None if it is unset."""
    value = os.environ.get(variable) or None
    if value not in (None, "0", "1"):
        raise SystemExit(f"{variable}: got {value!r}, wanted 1, 0 or unset")
    return None if value is None else value == "1"


def capabilities_to_build(in_place: bool) -> list[str]:
    """SIMD capabilities to compile for, the lowest first.

    RRU_FAST_CAPABILITIES is "native" or "all"; unset, it is "native" for a build in place and "all" for a wheel.
    "native" is the capability of this machine, and the one that ATEN_CPU_CAPABILITY lowers ATen to.
    """
    value = os.environ.get("RRU_FAST_CAPABILITIES") or ("native" if in_place else "all")
    if value not in ("native", "all"):
        raise SystemExit(f"RRU_FAST_CAPABILITIES: got {value!r}, wanted native, all or unset")
    names = list(CAPABILITIES)
    if value == "all":
        return names
    supported = names[: names.index(native_capability()) + 1]
    lowered = os.environ.get("ATEN_CPU_CAPABILITY", "").upper()
    return [name for name in supported if name in (lowered, supported[-1])]


def native_capability(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the SIMD capability that ATen chooses on this machine unless ATEN_CPU_CAPABILITY lowers it."""
    text = cpuinfo.read_text() if "AVX2" in CAPABILITIES and cpuinfo.is_file() else ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"} <= flags:
        return "AVX512"
    return "AVX2" if {"avx2", "fma"} <= flags else "DEFAULT"


def max_jobs() -> int:
    """Number of concurrent compilations: MAX_JOBS, else the number of processors this process may use."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    value = os.environ.get("MAX_JOBS") or str(processors)
    if not value.isdecimal() or int(value) == 0:
        raise SystemExit(f"MAX_JOBS: got {value!r}, wanted a positive integer or unset")
    return int(value)


def _run_for_output(command: list[str], cwd: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """Return stdout and stderr of a command, in English; "" if it fails or does not exist."""
    environment = {**environment, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError:
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def find_torch() -> Torch:
    """Find the PyTorch of the environment to install into, without importing it.

    pip builds in an isolated environment with the packages of build-system.requires. torch is not among them: pip would
    download gigabytes, and a version that need not be the installed one. So if this process has no torch, its
    interpreter is run without the variables by which pip isolates it. uv isolates with an interpreter of its own, from
    which the environment cannot be found.
    """
    wanted = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[0]
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        code = "import importlib.util as u; print(getattr(u.find_spec('torch'), 'origin', None) or '')"
        origin = _run_for_output([sys.executable, "-c", code], sys.prefix, outside).strip()
    folder = Path(origin).parent if origin else None
    if folder is None or not (folder / "include" / "ATen").is_dir():
        raise BuildError(
            f"no PyTorch to build for: install torch>={wanted} first, and for uv also setuptools and ninja, "
            "as uv needs --no-build-isolation"
        )
    version = runpy.run_path(str(folder / "version.py"))
    if _version_numbers(version["__version__"]) < _version_numbers(wanted):
        raise BuildError(f"torch: got {version['__version__']}, wanted {wanted} or newer: install it first")
    return Torch(folder, version["__version__"], version["cuda"])


def _version_numbers(version: str) -> list[int]:
    return [int(number) for number in re.match(r"[\d.]*\d", version)[0].split(".")]  # type: ignore[index]


def find_ninja() -> Path:
    """Find the program of PyPI's ninja package, whose module ninja_syntax is needed too."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise BuildError("no ninja: install ninja first") from None
    return Path(BIN_DIR, "ninja")  # BIN_DIR is empty if the program is elsewhere on the PATH


def find_compiler() -> Compiler:
    """Find the C++ compiler: CXX, else the first of c++, g++ and clang++."""
    wanted = os.environ.get("CXX")
    try:
        candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise BuildError(f"no C++ compiler: CXX={wanted} is not a command line: {error}") from None
    for command in candidates:
        if version := _run_for_output([*command, "--version"]):
            return Compiler(command, version.splitlines()[0])
    if wanted:
        raise BuildError(f"no C++ compiler: CXX={wanted} does not run")
    raise BuildError("no C++ compiler: found none of c++, g++ and clang++; install one, such as Debian's package g++")


def find_cuda() -> Cuda:
    """Find the CUDA toolkit: CUDA_HOME or CUDA_PATH, else that of the nvcc on the PATH."""
    home = next((f"{v}={os.environ[v]}" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)), None)
    if home is not None:
        root = Path(home.split("=", 1)[1])
    else:
        found = shutil.which("nvcc")
        if found is None:
            raise BuildError("no nvcc: neither CUDA_HOME nor CUDA_PATH is set, and none is on the PATH")
        # The nvcc on the PATH may be a link, from which it does not find its own files, or a script that runs another
        # nvcc. --dryrun prints the toolkit's folder before it reads the input, which need not exist.
        resolved = Path(found).resolve()
        top = re.search(r"^#\$ TOP=(.+)$", _run_for_output([str(resolved), "--dryrun", "-c", "none.cu"]), re.MULTILINE)
        root = Path(top[1]).resolve() if top else resolved.parent.parent
    nvcc = root / "bin" / "nvcc"
    release = re.search(r"release (\d+\.\d+)", _run_for_output([str(nvcc), "--version"]))
    if release is None:
        raise BuildError(f"no working nvcc: {nvcc} ({home or 'behind the nvcc on the PATH'}) does not run")
    folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    libraries = next((f for f in folders if (f / "libcudart_static.a").is_file()), None)
    if libraries is None:
        raise BuildError(f"no libcudart_static.a in the CUDA toolkit {root}")
    return Cuda(nvcc, release[1], libraries)


def cuda_architectures() -> list[str]:
    """CUDA architectures, as "90" or "90+PTX": TORCH_CUDA_ARCH_LIST, else those of the GPUs present, else 90.

    90 is the first that has clusters of CTAs, without which there are no kernels.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    words = listed.replace(";", " ").replace(",", " ").split()
    if not words:
        output = _run_for_output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        words = sorted({w for w in output.split() if re.fullmatch(r"\d+\.\d", w)}, key=float) or ["9.0"]
    for word in words:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {listed!r}, wanted numbers such as '8.0;9.0+PTX'")
    return list(dict.fromkeys(word.replace(".", "") for word in words))
