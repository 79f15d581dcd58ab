"""Build native kernels in copies of the repository."""

from __future__ import annotations

import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from build_tools import native, toolchain
from tests.build_tree import ROOT, VARIABLES, Tree, environment, real_tree, run, stand_in_tree

try:
    COMPILER = toolchain.find_compiler().command
except toolchain.BuildError:
    COMPILER = []
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


NATIVE = toolchain.native_capability()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return stand_in_tree(tmp_path / "a tree")  # each test of this file builds in a path with a space


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree that was built; tests take copies."""
    tree = stand_in_tree(tmp_path_factory.mktemp("built") / "a tree")
    assert compiled(tree.build()) == {"bindings", "first", "second"}
    return tree


@pytest.fixture
def built(first_build: Tree, tmp_path: Path) -> Tree:
    return first_build.copy(tmp_path / "a copy")


def compiled(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Names of the sources that a build compiled."""
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^rru_fast: \[\d+/\d+\] csrc/(?:cpu/)?(\w+)\.cpp", done.stdout, re.MULTILINE))


@needs_compiler
def test_all_capabilities_are_compiled_and_recorded_where_asked(tree: Tree) -> None:
    done = tree.build(RRU_FAST_CAPABILITIES="all")
    units = [
        "csrc/bindings.cpp",
        *(f"csrc/cpu/{k}.cpp ({c})" for k in ("first", "second") for c in toolchain.CAPABILITIES),
    ]
    lines = done.stdout.splitlines()
    total = len(units) + 1
    assert [line.split("]")[0] for line in lines[:-1]] == [f"rru_fast: [{i + 1}/{total}" for i in range(total)]
    assert sorted(line.split("] ")[1] for line in lines[:-1]) == sorted([*units, "linking"])
    assert tree.call("sum") == "42"
    assert tree.record()["capabilities"] == list(toolchain.CAPABILITIES)


@needs_compiler
def test_a_build_in_place_is_for_this_machine_and_recorded(built: Tree) -> None:
    assert built.call("sum") == "42"
    record = built.record()
    assert record["native"] is None
    assert record["cuda"] == "csrc/cuda holds no kernels yet"
    assert record["torch"] == torch.__version__
    assert record["capabilities"] == [NATIVE]
    assert built.call("flags") == f"{record['flags']}; {torch.__version__}"


@pytest.mark.skipif("AVX2" not in toolchain.CAPABILITIES, reason="of x86-64")
@pytest.mark.parametrize(
    ("flags", "capability"),
    [
        ("fpu sse4_2 avx fma", "DEFAULT"),
        ("avx avx2", "DEFAULT"),
        ("avx avx2 fma", "AVX2"),
        ("avx2 fma avx512f avx512dq avx512vl", "AVX2"),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl", "AVX512"),
    ],
)
def test_the_capability_of_this_machine_is_chosen_as_by_aten(flags: str, capability: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512bw\n\n" * 2)
    assert toolchain.native_capability(cpuinfo) == capability


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="the choice is overridden")
@pytest.mark.skipif("AVX2" not in toolchain.CAPABILITIES, reason="of x86-64")
def test_the_capability_of_this_machine_is_that_of_its_torch() -> None:
    assert torch.backends.cpu.get_cpu_capability() == NATIVE


@needs_compiler
def test_only_what_changed_is_compiled_again(built: Tree) -> None:
    assert compiled(built.build()) == set()  # though it is another folder
    built.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    assert compiled(built.build()) == {"second"}
    assert built.call("sum") == "43"
    built.write("csrc/cpu/kernels.h", (built.root / "csrc/cpu/kernels.h").read_text() + "\n// changed")
    assert compiled(built.build()) == {"bindings", "first"}


@needs_compiler
def test_another_version_of_the_compiler_compiles_all_again(built: Tree) -> None:
    script = built.root / "c++"
    for version, again in (
        ("1", {"bindings", "first", "second"}),
        ("1", set()),
        ("2", {"bindings", "first", "second"}),
    ):
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo {version}\nexec {COMPILER[0]} "$@"\n')
        script.chmod(0o755)
        assert compiled(built.build(CXX=f"'{script}'")) == again


@needs_compiler
def test_a_damaged_binary_is_replaced(built: Tree) -> None:
    (binary,) = built.binaries()
    binary.write_bytes(binary.read_bytes()[:5000])
    assert compiled(built.build()) == set()
    assert built.call("sum") == "42"


@pytest.mark.parametrize("variables", [{"PATH": ""}, {"CXX": "false"}, {"CXX": "no such compiler"}], ids=str)
def test_without_a_compiler_the_build_says_so_and_succeeds(tree: Tree, variables: dict[str, str]) -> None:
    done = tree.build(**variables)
    assert done.returncode == 0
    assert done.stdout.startswith("rru_fast: built without native kernels: no C++ compiler: ")
    assert len(done.stdout.splitlines()) == 1
    assert tree.record()["native"].startswith("no C++ compiler: ")
    assert not tree.binaries()


@needs_compiler
def test_a_missing_tool_costs_no_kernels_that_were_built_before(tree: Tree) -> None:
    compiled(tree.build())
    before = tree.record()
    done = tree.build(CXX="false")
    assert (done.returncode, tree.record(), tree.call("sum")) == (1, before, "42")
    why = "no C++ compiler: CXX=false does not run"
    assert done.stderr == f"rru_fast: the last build is kept, the kernels cannot be built again: {why}\n"


@needs_compiler
def test_a_source_that_does_not_compile_is_named_with_the_compilers_error(tree: Tree) -> None:
    tree.write("csrc/cpu/second.cpp", "int second() { return three; }")
    assert tree.build().returncode == 0
    why = tree.record()["native"]
    assert "failed on csrc/cpu/second.cpp: " in why and "error: " in why and "three" in why and "\n" not in why
    assert tree.record()["on_purpose"] is False
    assert not tree.binaries()


@needs_compiler
@pytest.mark.parametrize("compiler", ["false", "true"])
def test_a_compiler_that_stops_working_is_no_crash(tree: Tree, compiler: str) -> None:
    script = tree.root / "c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo fine\nexec {compiler}\n')
    script.chmod(0o755)
    assert tree.build(CXX=f"'{script}'").returncode == 0
    assert re.match(r"c\+\+ failed on (csrc/|linking: no output)", tree.record()["native"])


def test_what_is_demanded_and_cannot_be_built_is_an_error(tree: Tree) -> None:
    done = tree.build(RRU_FAST_NATIVE="1", CXX="false")
    assert done.returncode == 1
    assert done.stderr == (
        "rru_fast: RRU_FAST_NATIVE=1, but the kernels cannot be built: no C++ compiler: CXX=false does not run\n"
    )
    assert not (tree.root / "rru_fast/_build.json").exists()


@needs_compiler
def test_native_0_builds_nothing_and_takes_away_what_was_built(built: Tree) -> None:
    assert compiled(built.build(RRU_FAST_NATIVE="0")) == set()
    assert built.record()["native"] == "RRU_FAST_NATIVE=0 when it was installed"
    assert built.record()["on_purpose"] is True
    assert not built.binaries()


def test_without_ninja_the_build_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(toolchain.BuildError, match=r"^no ninja: install ninja first$"):
        toolchain.find_ninja()


@pytest.mark.parametrize(
    ("version", "serves"), [("2.10.1", False), ("2.9", False), ("2.11.0a0+git1", True), ("3.0", True)]
)
def test_a_torch_that_is_too_old_is_refused_at_once(
    version: str, serves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch/include/ATen").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    if serves:
        assert toolchain.find_torch().version == version
    else:
        with pytest.raises(
            toolchain.BuildError, match=rf"^torch: got {version}, wanted 2\.11 or newer: install it first$"
        ):
            toolchain.find_torch()


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
def test_a_variable_of_no_meaning_is_one_clear_error(
    variable: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as told:
        runpy.run_path(str(ROOT / "setup.py"))
    assert told.value.code == f"{variable}: got {value!r}, wanted {wanted}"


@needs_compiler
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
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
    builds = [subprocess.Popen(command, cwd=tree.root, env=environment(), stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [build.wait() for build in builds] == [0, 0, 0]
    assert tree.call("sum") == "42"
    assert compiled(tree.build()) == set()
    assert tree.leftovers() == []


@pytest.fixture
def stoppable(built: Tree) -> dict[str, str]:
    """CXX: a compiler that, if $AT is an argument, writes half of its output and its pid to `started`, and waits."""
    script = built.root / "stoppable c++"
    script.write_text(
        '#!/bin/sh\ncase " $* " in *" $AT "*) while [ "$1" != -o ]; do shift; done; echo half > "$2"; '
        f'echo $$ > pid; mv pid started; exec sleep 100;; *) exec {COMPILER[0]} "$@";; esac\n'
    )
    script.chmod(0o755)
    return {"CXX": f"'{script}'"}


def stopped(tree: Tree, how: signal.Signals, **variables: str) -> subprocess.CompletedProcess[str]:
    """A build that is sent a signal once its compiler waits; all its processes, as a terminal does it."""
    build = subprocess.Popen(
        [sys.executable, "-m", "build_tools"],
        cwd=tree.root,
        env=environment(**variables),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tree.root / "started").exists():
        assert build.poll() is None
        time.sleep(0.01)
    os.killpg(build.pid, how)
    if how == signal.SIGKILL:  # as where a container ends; ninja gives each compiler a group of its own
        os.kill(int((tree.root / "started").read_text()), how)
    stdout, stderr = build.communicate(timeout=60)
    return subprocess.CompletedProcess(build.args, build.returncode, stdout, stderr)


@needs_compiler
@pytest.mark.parametrize(
    ("at", "how"),
    [
        ("-c", signal.SIGINT),
        ("-shared", signal.SIGKILL),
        pytest.param("-c", signal.SIGKILL, marks=pytest.mark.exhaustive),
        pytest.param("-shared", signal.SIGINT, marks=pytest.mark.exhaustive),
    ],
)
def test_a_stopped_build_leaves_the_whole_of_the_last_and_the_next_one_succeeds(
    built: Tree, at: str, how: signal.Signals, stoppable: dict[str, str]
) -> None:
    binary = built.root / "rru_fast" / native.BINARY
    before, record = binary.read_bytes(), built.record()
    built.write("csrc/cpu/second.cpp", "namespace rru::CPU_CAPABILITY { int second() { return 3; } }")
    done = stopped(built, how, AT=at, MAX_JOBS="1", **stoppable)
    assert (binary.read_bytes(), built.record()) == (before, record)
    assert built.call("sum") == "42"
    if how == signal.SIGINT:
        said = "rru_fast: the build was interrupted; the next one continues it\n"
        assert (done.returncode, done.stderr) == (130, said)
        assert built.leftovers() == []
    compiled(built.build())
    assert built.call("sum") == "43"


@needs_compiler
def test_a_build_waits_for_the_compilers_of_one_that_was_killed(built: Tree, stoppable: dict[str, str]) -> None:
    build = subprocess.Popen(
        [sys.executable, "-m", "build_tools"],
        cwd=built.root,
        env=environment(**stoppable, AT="-c", MAX_JOBS="1"),
    )
    started = built.root / "started"
    while not started.exists():
        time.sleep(0.01)
    build.kill()
    build.wait()
    following = subprocess.Popen(
        [sys.executable, "-m", "build_tools"], cwd=built.root, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert following.stdout is not None
    assert following.stdout.readline() == "rru_fast: waiting for another build in this folder\n"
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert following.wait() == 0
    assert built.call("sum") == "42"


@needs_compiler
def test_old_temporary_files_of_killed_builds_are_deleted(built: Tree) -> None:
    week_ago = time.time() - (native.TEMP_FILE_DAYS + 1) * 86400
    for name in (f"rru_fast/{native.BINARY}.1.tmp", "rru_fast/_build.json.1.tmp"):
        built.write(name, "half")
        os.utime(built.root / name, (week_ago, week_ago))
    built.write(f"rru_fast/{native.BINARY}.2.tmp", "of a build under way")
    compiled(built.build())
    assert built.leftovers() == [f"{native.BINARY}.2.tmp"]


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("int* p = new int[4]; delete[] p; return *static_cast<volatile int*>(p);", "heap-use-after-free"),
        pytest.param(
            "volatile int big = 2147483647; return big + 1;",
            "signed integer overflow",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_sanitized_build_stops_at_a_mistake(built: Tree, mistake: str, found: str) -> None:
    names = ("libasan.so", "libstdc++.so")
    libraries = [run([*COMPILER, f"-print-file-name={name}"], built.root).stdout.strip() for name in names]
    if not os.path.isabs(libraries[0]):
        pytest.skip("the compiler has no libasan.so")
    built.write("csrc/cpu/second.cpp", f"namespace rru::CPU_CAPABILITY {{ int second() {{ {mistake} }} }}")
    assert compiled(built.build(RRU_FAST_SANITIZE="1")) == {"bindings", "first", "second"}
    code = "import sys; sys.path.insert(0, 'rru_fast'); import _C; _C.sum()"
    options = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    options["LD_LIBRARY_PATH"] = str(Path(torch.__file__).parent / "lib")
    done = run([sys.executable, "-c", code], built.root, **options)
    assert done.returncode != 0
    assert found in done.stderr and "second.cpp" in done.stderr
    assert compiled(built.build()) == {"second"}  # both kinds of objects are kept


@needs_compiler
@pytest.mark.nightly  # every other test of the kernels uses those of this checkout
def test_the_kernels_of_this_checkout_build_in_three_minutes_of_two_cores_and_serve(tmp_path: Path) -> None:
    tree = real_tree(tmp_path / "a tree")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = tree.build(RRU_FAST_NATIVE="1", RRU_FAST_CAPABILITIES="all")
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2 * 180  # of processor time
    code = (
        "import rru_fast, torch; from rru_fast import native; assert native.missing() is None, native.missing();"
        "print(rru_fast.strip_pool(torch.ones(1, 2, 3, 4, 5), backend='cpu').sum().item()); rru_fast.show_config()"
    )
    served = run([sys.executable, "-W", "error", "-c", code], tree.root)
    assert served.stdout.startswith("12.0\n"), served.stderr
    assert f"built for torch {torch.__version__}" in served.stdout
