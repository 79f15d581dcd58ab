"""What pip and setuptools make of this repository: wheels, sdists and editable installs, in a path with a space."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from build_tools import toolchain
from build_tools.native import BINARY
from tests.build_tree import Tree, run, stand_in_tree

try:
    toolchain.find_compiler()
except toolchain.MissingError:
    pytest.skip("no C++ compiler", allow_module_level=True)

MISSING = "from rru_fast import native; print(native.__file__); print(native.missing())"


def make_environment(folder: Path, with_torch: bool = True) -> Path:
    """A virtual environment that sees this one's packages, torch among them; its Python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin/python"
    if with_torch:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with torch and a setuptools that builds this project."""
    python = make_environment(tmp_path_factory.mktemp("environment") / "an environment")
    pip(python, python.parent, "install", "setuptools>=77")
    return python


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return stand_in_tree(tmp_path / "a tree")


def pip(python: Path, cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = run([str(python), "-m", "pip", "-q", *arguments], cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def wheel(python: Path, tree: Tree, *arguments: str, **variables: str) -> Path:
    pip(python, tree.root, "wheel", "--no-deps", "-w", "dist", *arguments, ".", **variables)
    (made,) = (tree.root / "dist").glob("*.whl")
    return made


@pytest.fixture
def missing(python: Path, tmp_path: Path) -> Callable[[], list[str]]:
    """Where the installed rru_fast.native lies, and why it cannot serve."""

    def ask() -> list[str]:
        done = run([str(python), "-W", "error", "-c", MISSING], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return ask


def test_native_0_makes_a_wheel_for_any_python_and_platform(python: Path, tree: Tree) -> None:
    made = wheel(python, tree, "--no-build-isolation", RRU_FAST_NATIVE="0")
    assert made.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(made).namelist()
    assert "rru_fast/_build.json" in names
    assert BINARY not in {Path(name).name for name in names}
    assert not any(name.startswith("build_tools") for name in names)


def test_a_wheel_after_a_native_one_carries_nothing_of_it(python: Path, tree: Tree) -> None:
    native = wheel(python, tree, "--no-build-isolation")
    assert f"rru_fast/{BINARY}" in zipfile.ZipFile(native).namelist()
    assert sysconfig.get_platform().replace("-", "_").replace(".", "_") in native.name
    native.unlink()
    pure = wheel(python, tree, "--no-build-isolation", CXX="false")
    assert pure.name.endswith("-py3-none-any.whl")
    assert f"rru_fast/{BINARY}" not in zipfile.ZipFile(pure).namelist()


def test_pip_isolates_the_build_and_it_still_finds_the_torch_it_is_for(
    python: Path, tree: Tree, missing: Callable[[], list[str]]
) -> None:
    pip(python, tree.root, "install", "--no-deps", "--force-reinstall", ".")
    where, why = missing()
    assert Path(where).is_relative_to(python.parents[1])
    assert why == "None"


def test_python_in_the_source_folder_finds_no_kernels_of_an_install_and_says_how_to_get_them(
    python: Path, tree: Tree
) -> None:
    pip(python, tree.root, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", ".")
    done = run([str(python), "-c", MISSING], tree.root)
    where, why = done.stdout.splitlines()
    assert Path(where).is_relative_to(tree.root)
    assert why == f"native kernels have not been built; in {tree.root}, run: pip install --no-deps -e ."
    assert f"NativeWarning: rru_fast runs without its native kernels: {why}" in done.stderr
    pip(python, tree.root, "install", "--no-deps", "-e", ".")
    done = run([str(python), "-W", "error", "-c", MISSING], tree.root)
    assert done.stdout.splitlines() == [where, "None"], done.stderr


def test_an_editable_install_serves_from_the_tree(python: Path, tree: Tree, missing: Callable[[], list[str]]) -> None:
    pip(python, tree.root, "install", "--no-deps", "--no-build-isolation", "-e", ".")
    where, why = missing()
    assert Path(where).is_relative_to(tree.root)
    assert why == "None"
    tree.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    tree.build()
    assert tree.call("sum") == "43"
    assert missing()[1] == "None"


def test_an_sdist_carries_all_that_a_native_wheel_takes(
    python: Path, tree: Tree, missing: Callable[[], list[str]]
) -> None:
    tree.build()  # what was built here must not travel
    done = run([str(python), "-c", "from setuptools import build_meta as b; b.build_sdist('dist')"], tree.root)
    assert done.returncode == 0, done.stderr
    (sdist,) = (tree.root / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"csrc/cpu/kernels.h", "csrc/cpu/first.cpp", "build_tools/native.py", "constraints.txt"} <= names
    assert not {name for name in names if name.endswith((".so", ".o", ".json"))}
    pip(python, tree.root, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", str(sdist))
    where, why = missing()
    assert Path(where).is_relative_to(python.parents[1])
    assert why == "None"


def test_an_install_that_demands_kernels_fails_with_the_reason(python: Path, tree: Tree) -> None:
    command = [str(python), "-m", "pip", "install", "--no-deps", "--no-build-isolation", "."]
    done = run(command, tree.root, RRU_FAST_NATIVE="1", CXX="false")
    assert done.returncode != 0
    assert "RRU_FAST_NATIVE=1, but the kernels cannot be built: no C++ compiler: CXX=false runs here" in done.stderr


def test_without_torch_the_build_says_how_to_get_kernels(tmp_path: Path, tree: Tree) -> None:
    python = make_environment(tmp_path / "bare", with_torch=False)
    done = run([str(python), "-m", "build_tools"], tree.root)
    assert done.returncode == 0, done.stderr
    assert tree.record()["native"].startswith(
        "no PyTorch to build for: install torch first, then pip install --no-deps"
    )


def test_the_installed_torch_is_found_without_importing_it() -> None:
    code = "import sys; from build_tools import toolchain as t; print(t.find_torch().version, 'torch' in sys.modules)"
    done = run([sys.executable, "-c", code], Path(__file__).resolve().parents[1])
    assert done.stdout.split() == [torch.__version__, "False"]
