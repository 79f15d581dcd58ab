"""The build of the native kernels, run for real in copies of the repository."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from build_tools import native, toolchain
from tests.build_tree import ROOT, Tree, real_tree, run, stand_in_tree

try:
    COMPILER = toolchain.find_compiler().command
except toolchain.MissingError:
    COMPILER = []
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return stand_in_tree(tmp_path / "a tree")  # each test of this file builds in a path with a space


def compiled(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The names of what a build compiled."""
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split("(")[1].rstrip(")") for line in done.stdout.splitlines() if "compiling" in line}


@needs_compiler
def test_the_extension_is_built_once_for_each_capability_and_recorded(tree: Tree) -> None:
    built = compiled(tree.build())
    assert built == {"bindings", *(f"{k}-{c}" for k in ("first", "second") for c in toolchain.CAPABILITIES)}
    assert tree.call("sum") == "42"
    record = tree.record()
    assert record["native"] is None
    assert record["cuda"] == "csrc/cuda holds no kernels yet"
    assert record["torch"] == torch.__version__
    assert record["capabilities"] == list(toolchain.CAPABILITIES)
    assert tree.call("flags") == f"{record['flags']}; {torch.__version__}"


@needs_compiler
def test_only_what_changed_is_compiled_again(tree: Tree) -> None:
    compiled(tree.build())
    assert compiled(tree.build()) == set()
    tree.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    assert compiled(tree.build()) == {f"second-{c}" for c in toolchain.CAPABILITIES}
    assert tree.call("sum") == "43"
    tree.write("csrc/cpu/kernels.h", (tree.root / "csrc/cpu/kernels.h").read_text() + "\n// changed")
    assert compiled(tree.build()) == {"bindings", *(f"first-{c}" for c in toolchain.CAPABILITIES)}


@needs_compiler
def test_a_damaged_binary_is_linked_again(tree: Tree) -> None:
    compiled(tree.build())
    (binary,) = tree.binaries()
    binary.write_bytes(binary.read_bytes()[:5000])
    assert compiled(tree.build()) == set()
    assert tree.call("sum") == "42"


@pytest.mark.parametrize("variables", [{"PATH": ""}, {"CXX": "false"}, {"CXX": "no such compiler"}], ids=str)
def test_without_a_compiler_the_build_says_so_and_succeeds(tree: Tree, variables: dict[str, str]) -> None:
    (tree.root / "rru_fast" / native.BINARY).write_bytes(b"of an earlier build")
    done = tree.build(**variables)
    assert done.returncode == 0
    assert done.stdout.startswith("rru_fast: built without native kernels: no C++ compiler: ")
    assert len(done.stdout.splitlines()) == 1
    assert tree.record()["native"].startswith("no C++ compiler: ")
    assert not tree.binaries()


@needs_compiler
def test_a_source_that_does_not_compile_is_named_with_the_compilers_error(tree: Tree) -> None:
    tree.write("csrc/cpu/second.cpp", "int second() { return three; }")
    assert tree.build().returncode == 0
    why = tree.record()["native"]
    assert "csrc/cpu/second.cpp" in why and "three" in why and "\n" not in why
    assert not tree.binaries()


@needs_compiler
@pytest.mark.parametrize("compiler", ["false", "true"])
def test_a_compiler_that_stops_working_is_no_crash(tree: Tree, compiler: str) -> None:
    script = tree.root / "c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo fine\nexec {compiler}\n')
    script.chmod(0o755)
    assert tree.build(CXX=f"'{script}'").returncode == 0
    assert tree.record()["native"].startswith("c++ failed on csrc/")


def test_what_is_demanded_and_cannot_be_built_is_an_error(tree: Tree) -> None:
    done = tree.build(RRU_FAST_NATIVE="1", CXX="false")
    assert done.returncode == 1
    assert done.stderr == (
        "rru_fast: RRU_FAST_NATIVE=1, but the kernels cannot be built: no C++ compiler: CXX=false runs here\n"
    )
    assert not (tree.root / "rru_fast/_build.json").exists()


def test_native_0_builds_nothing_and_takes_away_what_was_built(tree: Tree) -> None:
    tree.build()
    assert compiled(tree.build(RRU_FAST_NATIVE="0")) == set()
    assert tree.record()["native"] == "RRU_FAST_NATIVE=0 when it was installed"
    assert not tree.binaries()


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("RRU_FAST_NATIVE", "yes", "1, 0 or unset"),
        ("RRU_FAST_CUDA", "2", "1, 0 or unset"),
        ("RRU_FAST_SANITIZE", "on", "1, 0 or unset"),
        ("MAX_JOBS", "0", "a positive integer or unset"),
        ("MAX_JOBS", "many", "a positive integer or unset"),
    ],
)
def test_a_variable_of_no_meaning_is_one_clear_error(tree: Tree, variable: str, value: str, wanted: str) -> None:
    done = run([sys.executable, "setup.py", "--version"], tree.root, **{variable: value})
    assert done.returncode == 1
    assert done.stderr == f"{variable}: got {value!r}, wanted {wanted}\n"


@needs_compiler
@pytest.mark.parametrize("jobs", [1, 2])
def test_max_jobs_is_how_many_compilers_run(tree: Tree, jobs: int) -> None:
    running = tree.root / "running"
    running.mkdir()
    script = tree.root / "counting c++"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ touch running/$$; ls running | wc -l >> counts; sleep 0.3; }}\n'
        f'{COMPILER[0]} "$@"; status=$?; rm -f running/$$; exit $status\n'
    )
    script.chmod(0o755)
    compiled(tree.build(MAX_JOBS=str(jobs), CXX=f"'{script}'"))
    assert max(map(int, (tree.root / "counts").read_text().split())) == jobs


@needs_compiler
def test_builds_that_run_at_once_do_not_harm_each_other(tree: Tree) -> None:
    command = [sys.executable, "-m", "build_tools"]
    builds = [subprocess.Popen(command, cwd=tree.root, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [build.wait() for build in builds] == [0, 0, 0]
    assert tree.call("sum") == "42"
    assert compiled(tree.build()) == set()
    assert tree.leftovers() == []


@pytest.fixture
def stoppable(tree: Tree) -> dict[str, str]:
    """CXX, a compiler that writes half of its output, leaves the file `started` and waits, where $AT is an argument."""
    script = tree.root / "stoppable c++"
    script.write_text(
        '#!/bin/sh\ncase " $* " in *" $AT "*) for last; do :; done; echo half > "$last"; touch started; '
        f'exec sleep 100;; *) exec {COMPILER[0]} "$@";; esac\n'
    )
    script.chmod(0o755)
    return {"CXX": f"'{script}'"}


def stopped(tree: Tree, how: signal.Signals, **variables: str) -> subprocess.CompletedProcess[str]:
    """A build that is sent a signal once its compiler waits; all its processes, as a terminal does it."""
    build = subprocess.Popen(
        [sys.executable, "-m", "build_tools"],
        cwd=tree.root,
        env=os.environ | variables,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tree.root / "started").exists():
        assert build.poll() is None
        time.sleep(0.01)
    os.killpg(build.pid, how)
    stdout, stderr = build.communicate(timeout=60)
    return subprocess.CompletedProcess(build.args, build.returncode, stdout, stderr)


@needs_compiler
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("at", ["-c", "-shared"])  # compiling, and linking
def test_a_stopped_build_leaves_the_whole_of_the_last_and_the_next_one_succeeds(
    tree: Tree, at: str, how: signal.Signals, stoppable: dict[str, str]
) -> None:
    compiled(tree.build(AT="none", **stoppable))
    binary = tree.root / "rru_fast" / native.BINARY
    before, record = binary.read_bytes(), tree.record()
    tree.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    done = stopped(tree, how, AT=at, MAX_JOBS="1", **stoppable)
    assert (binary.read_bytes(), tree.record()) == (before, record)
    assert tree.call("sum") == "42"
    if how == signal.SIGINT:
        said = "rru_fast: the build was interrupted; the next one goes on from here\n"
        assert (done.returncode, done.stderr) == (130, said)
        assert tree.leftovers() == []
    compiled(tree.build(AT="none", **stoppable))
    assert hashlib.sha256(binary.read_bytes()).hexdigest() == tree.record()["sha256"]
    assert tree.call("sum") == "43"


@needs_compiler
def test_what_a_killed_build_left_is_taken_away_when_it_is_old(tree: Tree) -> None:
    week_ago = time.time() - (native.KEPT_DAYS + 1) * 86400
    for name in (f"rru_fast/{native.BINARY}.1.tmp", "rru_fast/_build.1.tmp", "build/native/first.o.1.tmp"):
        tree.write(name, "half")
        os.utime(tree.root / name, (week_ago, week_ago))
    tree.write(f"rru_fast/{native.BINARY}.2.tmp", "of a build under way")
    compiled(tree.build())
    assert tree.leftovers() == [f"{native.BINARY}.2.tmp"]


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("int* p = new int[4]; delete[] p; return *static_cast<volatile int*>(p);", "heap-use-after-free"),
        ("volatile int big = 2147483647; return big + 1;", "signed integer overflow"),
    ],
)
def test_a_sanitized_build_stops_at_a_mistake(tree: Tree, mistake: str, found: str) -> None:
    names = ("libasan.so", "libstdc++.so")
    libraries = [run([*COMPILER, f"-print-file-name={name}"], tree.root).stdout.strip() for name in names]
    if not os.path.isabs(libraries[0]):
        pytest.skip("the compiler has no libasan.so")
    tree.write("csrc/cpu/second.cpp", f"namespace rru::CPU_CAPABILITY {{ int second() {{ {mistake} }} }}")
    compiled(tree.build(RRU_FAST_SANITIZE="1"))
    code = "import sys, torch; sys.path.insert(0, 'rru_fast'); import _C; _C.sum()"
    options = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    done = run([sys.executable, "-c", code], tree.root, **options)
    assert done.returncode != 0
    assert found in done.stderr and "second.cpp" in done.stderr


@needs_compiler
@pytest.mark.parametrize("afresh", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_kernels_of_this_checkout_build_in_three_minutes_of_two_cores_and_serve(
    tmp_path: Path, afresh: bool
) -> None:
    tree = real_tree(tmp_path / "a tree")
    if not afresh and (ROOT / native.CACHE).exists():  # objects are the same wherever they are compiled
        shutil.copytree(ROOT / native.CACHE, tree.root / native.CACHE)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = tree.build(RRU_FAST_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2 * 180  # whatever else the machine does
    code = (
        "import rru_fast, torch; from rru_fast import native; assert native.missing() is None, native.missing();"
        "print(rru_fast.strip_pool(torch.ones(1, 2, 3, 4, 5), backend='cpu').sum().item()); rru_fast.show_config()"
    )
    served = run([sys.executable, "-W", "error", "-c", code], tree.root)
    assert served.stdout.startswith("12.0\n"), served.stderr
    assert f"built for torch {torch.__version__}" in served.stdout
