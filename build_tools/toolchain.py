"""Find PyTorch, ninja, a C++ compiler and a CUDA toolkit, and read the variables that control the build."""

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
# SIMD capabilities, the lowest first, and their flags, which are ATen's own.
CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]


class MissingError(Exception):
    """Something needed is missing; the message says why in one line."""


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
    """A CUDA toolkit: its nvcc, its version and where libcudart_static.a lies."""

    nvcc: Path
    version: str
    libraries: Path


def asked(variable: str) -> bool | None:
    """Read a switch: True for 1, False for 0, None if it is unset."""
    value = os.environ.get(variable) or None
    if value not in (None, "0", "1"):
        raise SystemExit(f"{variable}: got {value!r}, wanted 1, 0 or unset")
    return None if value is None else value == "1"


def capabilities(in_place: bool) -> list[str]:
    """SIMD capabilities to compile for, the lowest first.

    RRU_FAST_CAPABILITIES decides; unset, a build in place is for this machine and a wheel for all. To "native" belongs
    what ATEN_CPU_CAPABILITY lowers ATen to.
    """
    value = os.environ.get("RRU_FAST_CAPABILITIES") or ("native" if in_place else "all")
    if value not in ("native", "all"):
        raise SystemExit(f"RRU_FAST_CAPABILITIES: got {value!r}, wanted native, all or unset")
    names = list(CAPABILITIES)
    if value == "all":
        return names
    usable = names[: names.index(native_capability()) + 1]
    lowered = os.environ.get("ATEN_CPU_CAPABILITY", "").upper()
    return [name for name in usable if name in (lowered, usable[-1])]


def native_capability(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The capability that ATen chooses on this machine, by ATen's rule, if ATEN_CPU_CAPABILITY does not lower it."""
    text = cpuinfo.read_text() if "AVX2" in CAPABILITIES and cpuinfo.is_file() else ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"} <= flags:
        return "AVX512"
    return "AVX2" if {"avx2", "fma"} <= flags else "DEFAULT"


def jobs() -> int:
    """Number of concurrent compilations: MAX_JOBS, else the number of processors this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    value = os.environ.get("MAX_JOBS") or str(usable)
    if not value.isdecimal() or int(value) == 0:
        raise SystemExit(f"MAX_JOBS: got {value!r}, wanted a positive integer or unset")
    return int(value)


def _output(command: list[str], cwd: str | None = None, environment: Mapping[str, str] = os.environ) -> str:
    """Both output streams of a command, in English; empty if it fails or does not exist."""
    environment = {**environment, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError:
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def find_torch() -> Torch:
    """The PyTorch of the environment that is being installed into, found without importing it.

    pip builds in an isolated environment with the packages of build-system.requires. torch is not among them: pip would
    download gigabytes, and a version that need not be the installed one. So if this process has no torch, its
    interpreter is asked again without the variables by which pip isolates it. uv isolates with an interpreter of its
    own, from which the environment cannot be found.
    """
    wanted = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[0]
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        code = "import importlib.util as u; print(getattr(u.find_spec('torch'), 'origin', None) or '')"
        origin = _output([sys.executable, "-c", code], sys.prefix, outside).strip()
    folder = Path(origin).parent if origin else None
    if folder is None or not (folder / "include" / "ATen").is_dir():
        raise MissingError(
            f"no PyTorch to build for: install torch>={wanted} first, and for uv also setuptools and ninja, "
            "as uv needs --no-build-isolation"
        )
    version = runpy.run_path(str(folder / "version.py"))
    if _numbers(version["__version__"]) < _numbers(wanted):
        raise MissingError(f"torch: got {version['__version__']}, wanted {wanted} or newer: install it first")
    return Torch(folder, version["__version__"], version["cuda"])


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.match(r"[\d.]*\d", version)[0].split(".")]  # type: ignore[index]


def find_ninja() -> Path:
    """The ninja program of PyPI's ninja package; its module ninja_syntax is used as well."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise MissingError("no ninja: install ninja first") from None
    return Path(BIN_DIR, "ninja")  # BIN_DIR is empty if the program is elsewhere on the PATH


def find_compiler() -> Compiler:
    """The C++ compiler: CXX, else the first of c++, g++ and clang++."""
    wanted = os.environ.get("CXX")
    try:
        candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise MissingError(f"no C++ compiler: CXX={wanted} is no command: {error}") from None
    for command in candidates:
        if version := _output([*command, "--version"]):
            return Compiler(command, version.splitlines()[0])
    if wanted:
        raise MissingError(f"no C++ compiler: CXX={wanted} does not run")
    raise MissingError("no C++ compiler: found none of c++, g++ and clang++; install one, such as Debian's package g++")


def find_cuda() -> Cuda:
    """The CUDA toolkit: CUDA_HOME or CUDA_PATH, else that of the nvcc on the PATH."""
    home = next((f"{v}={os.environ[v]}" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)), None)
    if home is not None:
        root = Path(home.split("=", 1)[1])
    else:
        found = shutil.which("nvcc")
        if found is None:
            raise MissingError("no nvcc: neither CUDA_HOME nor CUDA_PATH is set, and none is on the PATH")
        # The one on the PATH may be a link, which nvcc does not follow to its own files, or a script that runs another
        # nvcc, so it is asked where it lives; it prints that before it looks at the input, which need not exist.
        real = Path(found).resolve()
        top = re.search(r"^#\$ TOP=(.+)$", _output([str(real), "--dryrun", "-c", "none.cu"]), re.MULTILINE)
        root = Path(top[1]).resolve() if top else real.parent.parent
    nvcc = root / "bin" / "nvcc"
    release = re.search(r"release (\d+\.\d+)", _output([str(nvcc), "--version"]))
    if release is None:
        raise MissingError(f"no working nvcc: {nvcc} ({home or 'behind the nvcc on the PATH'}) does not run")
    folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    libraries = next((f for f in folders if (f / "libcudart_static.a").is_file()), None)
    if libraries is None:
        raise MissingError(f"no libcudart_static.a in the CUDA toolkit {root}")
    return Cuda(nvcc, release[1], libraries)


def cuda_architectures() -> list[str]:
    """CUDA architectures, as "90" or "90+PTX": TORCH_CUDA_ARCH_LIST, else of the GPUs present, else 80 and 90."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    words = listed.replace(";", " ").replace(",", " ").split()
    if not words:
        seen = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).split()
        words = sorted({w for w in seen if re.fullmatch(r"\d+\.\d", w)}, key=float) or ["8.0", "9.0"]
    for word in words:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
            raise MissingError(f"TORCH_CUDA_ARCH_LIST: got {listed!r}, wanted numbers such as '8.0;9.0+PTX'")
    return list(dict.fromkeys(word.replace(".", "") for word in words))
