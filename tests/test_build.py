"""Builds of stand-in kernels in copies of the repository: what is compiled, recorded, refused and interrupted."""

from __future__ import annotations

import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from build_tools import native, toolchain
from tests.build_tree import ROOT, VARIABLES, Tree, real_tree, run, stand_in_tree

try:
    COMPILER = toolchain.find_compiler().command
except toolchain.BuildError:
    COMPILER = []
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return stand_in_tree(tmp_path / "a tree")  # with a space, which commands must quote


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A built tree, which tests copy."""
    tree = stand_in_tree(tmp_path_factory.mktemp("built") / "a tree")
    assert compiled_sources(tree.build()) == {"bindings", "first", "second"}
    return tree


@pytest.fixture
def built(first_build: Tree, tmp_path: Path) -> Tree:
    return first_build.copy(tmp_path / "a copy")


def compiled_sources(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Names of the sources that a build compiled; it must have succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^rru_fast: \[\d+/\d+\] csrc/(?:cpu/)?(\w+)\.cpp", done.stdout, re.MULTILINE))


@needs_compiler
def test_all_capabilities_are_compiled_and_recorded_on_request(tree: Tree) -> None:
    done = tree.build(RRU_FAST_CAPABILITIES="all")
    labels = ["csrc/bindings.cpp", "linking"]
    labels += [f"csrc/cpu/{name}.cpp ({c})" for name in ("first", "second") for c in toolchain.CAPABILITIES]
    lines = done.stdout.splitlines()
    total = len(labels)
    assert [line.split("]")[0] for line in lines[:-1]] == [f"rru_fast: [{i + 1}/{total}" for i in range(total)]
    assert sorted(line.split("] ")[1] for line in lines[:-1]) == sorted(labels)
    assert tree.call("sum") == "42"
    assert tree.record()["capabilities"] == list(toolchain.CAPABILITIES)


@needs_compiler
def test_a_build_in_place_is_for_this_machine_and_recorded(built: Tree) -> None:
    assert built.call("sum") == "42"
    record = built.record()
    assert record["native"] is None
    assert record["cuda"] == "csrc/cuda holds no kernels"
    assert record["torch"] == torch.__version__
    assert record["capabilities"] == [toolchain.native_capability()]
    assert built.call("flags") == f"{record['flags']}; {torch.__version__}"


@needs_compiler
def test_only_changed_sources_are_compiled_again(built: Tree) -> None:
    assert compiled_sources(built.build()) == set()  # although the folder was copied
    built.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    assert compiled_sources(built.build()) == {"second"}
    assert built.call("sum") == "43"
    built.write("csrc/cpu/kernels.h", (built.root / "csrc/cpu/kernels.h").read_text() + "\n// changed")
    assert compiled_sources(built.build()) == {"bindings", "first"}


@needs_compiler
def test_another_compiler_version_compiles_everything_again(built: Tree) -> None:
    script = built.root / "c++"
    everything = {"bindings", "first", "second"}
    for version, wanted in (("1", everything), ("1", set()), ("2", everything)):
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo {version}\nexec {COMPILER[0]} "$@"\n')
        script.chmod(0o755)
        assert compiled_sources(built.build(CXX=f"'{script}'")) == wanted


@needs_compiler
def test_a_damaged_binary_is_replaced(built: Tree) -> None:
    (binary,) = built.binaries()
    binary.write_bytes(binary.read_bytes()[:5000])
    assert compiled_sources(built.build()) == set()
    assert built.call("sum") == "42"


@pytest.mark.parametrize("variables", [{"PATH": ""}, {"CXX": "false"}, {"CXX": "no such compiler"}], ids=str)
def test_without_a_compiler_the_build_succeeds_and_records_the_reason(tree: Tree, variables: dict[str, str]) -> None:
    done = tree.build(**variables)
    assert done.returncode == 0
    assert done.stdout.startswith("rru_fast: built without native kernels: no C++ compiler: ")
    assert len(done.stdout.splitlines()) == 1
    assert tree.record()["native"].startswith("no C++ compiler: ")
    assert not tree.binaries()


@needs_compiler
def test_a_missing_tool_keeps_the_kernels_of_the_last_build(tree: Tree) -> None:
    compiled_sources(tree.build())
    before = tree.record()
    done = tree.build(CXX="false")
    assert (done.returncode, tree.record(), tree.call("sum")) == (1, before, "42")
    reason = "no C++ compiler: CXX=false does not run"
    assert done.stderr == f"rru_fast: the last build is kept, the kernels cannot be built again: {reason}\n"


@needs_compiler
def test_a_compile_error_is_recorded_with_its_source(tree: Tree) -> None:
    tree.write("csrc/cpu/second.cpp", "int second() { return three; }")
    assert tree.build().returncode == 0
    reason = tree.record()["native"]
    assert "failed on csrc/cpu/second.cpp: " in reason and "error: " in reason and "three" in reason
    assert "\n" not in reason
    assert tree.record()["on_purpose"] is False
    assert not tree.binaries()


@needs_compiler
@pytest.mark.parametrize("compiler", ["false", "true"])
def test_a_compiler_that_fails_without_output_is_recorded(tree: Tree, compiler: str) -> None:
    script = tree.root / "c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo fine\nexec {compiler}\n')
    script.chmod(0o755)
    assert tree.build(CXX=f"'{script}'").returncode == 0
    assert re.match(r"c\+\+ failed on (csrc/|linking: no output)", tree.record()["native"])


def test_required_kernels_that_cannot_be_built_are_an_error(tree: Tree) -> None:
    done = tree.build(RRU_FAST_NATIVE="1", CXX="false")
    assert done.returncode == 1
    assert done.stderr == (
        "rru_fast: RRU_FAST_NATIVE=1, but the kernels cannot be built: no C++ compiler: CXX=false does not run\n"
    )
    assert not (tree.root / "rru_fast/_build.json").exists()


@needs_compiler
def test_native_0_builds_nothing_and_removes_the_last_build(built: Tree) -> None:
    assert compiled_sources(built.build(RRU_FAST_NATIVE="0")) == set()
    assert built.record()["native"] == "RRU_FAST_NATIVE=0 when it was installed"
    assert built.record()["on_purpose"] is True
    assert not built.binaries()


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("RRU_FAST_NATIVE", "yes", "1, 0 or unset"),
        ("RRU_FAST_CUDA", "2", "1, 0 or unset"),
        ("RRU_FAST_SANITIZE", "on", "1, 0 or unset"),
        ("RRU_FAST_CAPABILITIES", "AVX2", "native, all or unset"),
        ("MAX_JOBS", "0", "a positive integer or unset"),
        ("MAX_JOBS", "many", "a positive integer or unset"),
    ],
)
def test_an_invalid_variable_is_an_error_of_one_line(
    variable: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(ROOT / "setup.py"))
    assert raised.value.code == f"{variable}: got {value!r}, wanted {wanted}"


@needs_compiler
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_max_jobs_compilers_run_at_once(tree: Tree, jobs: int) -> None:
    running = tree.root / "running"
    running.mkdir()
    script = tree.root / "counting c++"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ touch running/$$; ls running | wc -l >> counts; sleep 0.3; }}\n'
        f'{COMPILER[0]} "$@"; status=$?; rm -f running/$$; exit $status\n'
    )
    script.chmod(0o755)
    compiled_sources(tree.build(MAX_JOBS=str(jobs), CXX=f"'{script}'"))
    assert max(map(int, (tree.root / "counts").read_text().split())) == jobs


@needs_compiler
def test_concurrent_builds_do_not_harm_each_other(tree: Tree) -> None:
    builds = [tree.start_build() for _ in range(3)]
    for build in builds:
        _, stderr = build.communicate()
        assert build.returncode == 0, stderr
    assert tree.call("sum") == "42"
    assert compiled_sources(tree.build()) == set()
    assert tree.leftovers() == []


@pytest.fixture
def hanging_compiler(built: Tree) -> dict[str, str]:
    """CXX: a compiler that, if $AT is an argument, writes half of its output and its pid to `started`, and hangs."""
    script = built.root / "hanging c++"
    script.write_text(
        '#!/bin/sh\ncase " $* " in *" $AT "*) while [ "$1" != -o ]; do shift; done; echo half > "$2"; '
        f'echo $$ > pid; mv pid started; exec sleep 100;; *) exec {COMPILER[0]} "$@";; esac\n'
    )
    script.chmod(0o755)
    return {"CXX": f"'{script}'"}


def start_hanging_build(tree: Tree, **variables: str) -> tuple[subprocess.Popen[str], int]:
    """Start a build and wait until its compiler hangs; return the build and the compiler's pid."""
    build = tree.start_build(**variables)
    started = tree.root / "started"
    while not started.exists():
        assert build.poll() is None
        time.sleep(0.01)
    return build, int(started.read_text())


@needs_compiler
@pytest.mark.parametrize(
    ("argument", "signum"),
    [
        ("-c", signal.SIGINT),
        ("-shared", signal.SIGKILL),
        pytest.param("-c", signal.SIGKILL, marks=pytest.mark.exhaustive),
        pytest.param("-shared", signal.SIGINT, marks=pytest.mark.exhaustive),
    ],
)
def test_a_stopped_build_leaves_the_last_one_whole_and_the_next_one_succeeds(
    built: Tree, argument: str, signum: signal.Signals, hanging_compiler: dict[str, str]
) -> None:
    binary = built.root / "rru_fast" / native.BINARY
    before, record = binary.read_bytes(), built.record()
    built.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    build, compiler = start_hanging_build(built, **hanging_compiler, AT=argument, MAX_JOBS="1")
    os.killpg(build.pid, signum)  # all its processes, as a terminal does
    if signum == signal.SIGKILL:  # as when a container ends; ninja starts each compiler in its own process group
        os.kill(compiler, signum)
    _, stderr = build.communicate(timeout=60)
    assert (binary.read_bytes(), built.record()) == (before, record)
    assert built.call("sum") == "42"
    if signum == signal.SIGINT:
        message = "rru_fast: the build was interrupted; the next one continues it\n"
        assert (build.returncode, stderr) == (130, message)
        assert built.leftovers() == []
    compiled_sources(built.build())
    assert built.call("sum") == "43"


@needs_compiler
def test_a_build_waits_for_the_compilers_of_a_killed_one(built: Tree, hanging_compiler: dict[str, str]) -> None:
    killed, compiler = start_hanging_build(built, **hanging_compiler, AT="-c", MAX_JOBS="1")
    killed.kill()
    killed.communicate()
    following = built.start_build()
    assert following.stdout is not None
    assert following.stdout.readline() == "rru_fast: waiting for another build in this folder\n"
    os.kill(compiler, signal.SIGKILL)
    _, stderr = following.communicate()
    assert following.returncode == 0, stderr
    assert built.call("sum") == "42"


@needs_compiler
def test_old_temporary_files_of_killed_builds_are_deleted(built: Tree) -> None:
    expired = time.time() - (native.TEMP_FILE_DAYS + 1) * 86400
    for name in (f"rru_fast/{native.BINARY}.1.tmp", "rru_fast/_build.json.1.tmp"):
        built.write(name, "half")
        os.utime(built.root / name, (expired, expired))
    built.write(f"rru_fast/{native.BINARY}.2.tmp", "of a running build")
    compiled_sources(built.build())
    assert built.leftovers() == [f"{native.BINARY}.2.tmp"]


@needs_compiler
@pytest.mark.parametrize(
    ("bug", "finding"),
    [
        ("int* p = new int[4]; delete[] p; return *static_cast<volatile int*>(p);", "heap-use-after-free"),
        pytest.param(
            "volatile int big = 2147483647; return big + 1;",
            "signed integer overflow",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_sanitized_kernels_stop_at_a_bug(built: Tree, bug: str, finding: str) -> None:
    names = ("libasan.so", "libstdc++.so")
    libraries = [run([*COMPILER, f"-print-file-name={name}"], built.root).stdout.strip() for name in names]
    if not os.path.isabs(libraries[0]):
        pytest.skip("the compiler has no libasan.so")
    built.write("csrc/cpu/second.cpp", f"namespace rru::CPU_CAPABILITY {{ int second() {{ {bug} }} }}")
    assert compiled_sources(built.build(RRU_FAST_SANITIZE="1")) == {"bindings", "first", "second"}
    code = "import sys; sys.path.insert(0, 'rru_fast'); import _C; _C.sum()"
    options = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    options["LD_LIBRARY_PATH"] = str(Path(torch.__file__).parent / "lib")
    done = run([sys.executable, "-c", code], built.root, **options)
    assert done.returncode != 0
    assert finding in done.stderr and "second.cpp" in done.stderr
    assert compiled_sources(built.build()) == {"second"}  # the objects that are not sanitized were kept


@needs_compiler
@pytest.mark.nightly  # slow; all other tests of the kernels use those built in this checkout
def test_the_real_kernels_build_in_three_minutes_of_two_cores_and_run(tmp_path: Path) -> None:
    tree = real_tree(tmp_path / "a tree")
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = tree.build(RRU_FAST_NATIVE="1", RRU_FAST_CAPABILITIES="all")
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 2 * 180  # seconds of processor time
    code = (
        "import rru_fast, torch; from rru_fast import native; assert native.missing() is None, native.missing();"
        "print(rru_fast.strip_pool(torch.ones(1, 2, 3, 4, 5), backend='cpu').sum().item()); rru_fast.show_config()"
    )
    done = run([sys.executable, "-W", "error", "-c", code], tree.root)
    assert done.stdout.startswith("12.0\n"), done.stderr
    assert f"built for torch {torch.__version__}" in done.stdout
