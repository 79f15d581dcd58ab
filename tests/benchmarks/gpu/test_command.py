"""GPU benchmark, run without a GPU: its parts, their processes, and its requirements."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import benchmarks.gpu.__main__ as command
from benchmarks.gpu import losses
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import make_run
from benchmarks.gpu.sections import SECTIONS
from benchmarks.harness.results import ROOT
from rru_fast import triton

interpreted = pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(triton.interpreted(), reason="nothing is compiled in the interpreter")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

NEEDED = ("torch", "triton", "numpy", "pytest")
ABSENT = ("tyro", "rich", "matplotlib", "PIL", "av", "faiss", "pytorch_metric_learning", "torchvision", "scipy")
WITHOUT_GPU = [name for name, part in PARTS.items() if not part.needs_gpu]


def top_levels(*names: str) -> set[Path]:
    """Return the entries of site-packages of these distributions and of all that they require."""
    requirements = pytest.importorskip("packaging.requirements")
    seen: set[tuple[str, str]] = set()
    found: set[Path] = set()
    todo = [(name, "") for name in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            own = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        found |= {Path(own.locate_file(path.parts[0])) for path in own.files or [] if path.parts[0] != ".."}  # type: ignore[arg-type]
        for requirement in map(requirements.Requirement, own.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Python with the required packages only, and a checkout without compiled kernels."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    for path in top_levels(*NEEDED):
        if path.name != "__pycache__" and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    checkout = folder / "checkout"
    unwanted = shutil.ignore_patterns("_C*", "_build.json", "__pycache__", "results")
    for name in ("rru_fast", "benchmarks", "build_tools", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    return folder / "env" / "bin" / "python", checkout


def run_bare(bare: tuple[Path, Path], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python, checkout = bare
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON", "TRITON", "RRU_FAST"))}
    inherited |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(python), *arguments], cwd=checkout, env=inherited, capture_output=True, text=True, check=False
    )


def test_the_environment_lacks_all_other_packages(bare: tuple[Path, Path]) -> None:
    code = f"from importlib.util import find_spec; print([name for name in {ABSENT} if find_spec(name)])"
    done = run_bare(bare, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


@compiled
def test_the_suite_is_collected_with_nothing_else_installed(bare: tuple[Path, Path]) -> None:
    options = ("--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider")
    done = run_bare(bare, "-m", "pytest", *options, "tests/test_gpu.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.search(r"^(\d+) tests collected in", done.stdout, re.MULTILINE)  # none deselected, no errors
    assert count and int(count.group(1)) > 400, done.stdout[-500:]
    assert "-triton]" in done.stdout


@compiled
@no_gpu
def test_the_command_runs_with_nothing_else_installed(bare: tuple[Path, Path], tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = run_bare(
        bare,
        *("-m", "benchmarks.gpu", "--toy", "--commit", "abc", "--results", str(results)),
        TRITON_INTERPRET="1",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(results.iterdir())) <= 8
    (written,) = results.glob("*.json")
    found = json.loads(written.read_text())
    assert list(found["parts"]) == list(PARTS)
    ended = {name: own["ended"] for name, own in found["parts"].items()}
    assert ended.pop("cuda").startswith("left out: native kernels have not been built")
    others = [name for name in PARTS if name != "cuda"]
    assert ended == {name: "ok" if name in WITHOUT_GPU else "left out: needs a GPU" for name in others}
    assert found["environment"]["commit"] == "abc" and found["environment"]["op"] == "gpu"
    assert found["parts"]["warm"]["compiled"] == found["parts"]["warm"]["kernels"] >= 4
    measured = [title for title in SECTIONS if "torch.compile" not in title]
    assert list(dict.fromkeys(row["mode"] for row in found["rows"])) == measured
    for title in measured:
        own = [row for row in found["rows"] if row["mode"] == title and row["implementation"] == "triton"]
        assert all((row.get("ms") or row["fwd+bwd ms"]) > 0 for row in own)
        one = "bfloat16" in title or title == "forward + backward"
        assert [row["precision"] for row in own] == (["defaults"] if one else ["defaults", "high"]), title
        assert title in done.stdout


WARMED = """
import sys
from pathlib import Path
from unittest.mock import patch
import triton
from triton.backends.compiler import GPUTarget
from benchmarks.gpu import warm
from benchmarks.gpu.run import TOY
from benchmarks.launches.recording import NUM_SMS
from rru_fast.triton import _device, _launch

class Driver:
    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def launch(kernel, grid, **arguments):
    kernel.run(grid=grid, warmup=True, **arguments)
    launched.append(kernel.__name__)

def calls(recorder):
    warm.call_step(TOY, bfloat16=True)
    warm.call_strips(TOY)

target, launched, cache = GPUTarget("cuda", 90, 32), [], Path(sys.argv[1])
jobs = warm.record(target, NUM_SMS, calls)
assert [warm.compile_one(job, target, launcher=False) for job in jobs] == [None] * len(jobs)
warmed = set(cache.rglob("*"))
triton.runtime.driver.set_active(Driver())
num_sms = patch.object(_device, "num_sms", lambda tensor: NUM_SMS)
with warm.triton_on_cpu(), patch.object(_launch, "launch", launch), num_sms:
    calls(None)
print(len(jobs), len(set(launched)), len(warmed), len(set(cache.rglob("*")) - warmed))
"""


@compiled
def test_a_launch_finds_the_warmed_kernels_in_the_cache(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARMED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jobs, kernels, warmed, new = map(int, done.stdout.split())
    assert jobs > kernels >= 8 and warmed > jobs and new == 0


@interpreted
def test_triton_is_a_row_of_dashes_if_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRU_FAST_FLOAT32", "tf16")  # refused by every kernel that multiplies
    for found in losses.many(make_run(torch.device("cpu"), toy=True, repeats=1)):
        rows = {row["implementation"]: row for row in found}
        assert rows["triton"]["left out"].startswith("does not run: ValueError: RRU_FAST_FLOAT32: got 'tf16'")
        assert "ms" not in rows["triton"]
        assert rows["composite"]["ms"] > 0 and rows["composite"]["x eager"] > 0


BEGIN = "import os, subprocess, sys, time; file = open(sys.argv[1], 'a')\n"
SAY = "print('{\"found\": ' + str(os.getpid()) + '}', file=file, flush=True)\n"
CHILD = (
    "child = subprocess.Popen(['sleep', '600']); print('{\"child\": ' + str(child.pid) + '}', file=file, flush=True)\n"
)
# Script in place of a part, by its name.
SCRIPTS = {
    "environment": f"{BEGIN}{SAY}os._exit(3)",
    "warm": f"{BEGIN}{SAY}{CHILD}",
    "smoke": f"{BEGIN}{SAY}print('half a line', end='', file=file)",
    "eval": f"{BEGIN}{SAY}{CHILD}time.sleep(600)",
    "strips": f"{BEGIN}{SAY}",
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the parts by scripts."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(
        command, "command", lambda name, findings, *_: [sys.executable, "-c", SCRIPTS[name], str(findings)]
    )


def gone(pid: int) -> bool:
    """Return True if a process has ended, a zombie included."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except OSError:
            return True
        time.sleep(0.1)
    return False


def written(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@no_gpu
@pytest.mark.usefixtures("scripted")
def test_a_part_that_crashes_or_hangs_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "LEAST", 0)
    with pytest.raises(SystemExit, match=r"^failed:\n  environment: exit status 3$"):
        command.main(["--toy", "--seconds", "3", "--results", str(tmp_path), "--only", *SCRIPTS])
    parts = written(tmp_path)["parts"]
    ended = {name: own["ended"] for name, own in parts.items()}
    assert re.fullmatch(r"stopped after \d s", ended.pop("eval"))
    assert ended == {
        "environment": "exit status 3",
        "warm": "ok",
        "smoke": "ok",
        "strips": "left out: 3 s are over",
    }
    assert all("found" in parts[name] for name in ("environment", "warm", "smoke", "eval"))
    assert gone(parts["eval"]["found"]) and gone(parts["eval"]["child"]) and gone(parts["warm"]["child"])
    printed = capsys.readouterr().out
    assert "== environment: exit status 3" in printed and "  strips: left out: 3 s are over" in printed


ORPHAN = """
import sys, os
from pathlib import Path
from rru_fast.auto import processes
part = "import os, subprocess, sys, time; from rru_fast.auto.processes import end_with_parent; end_with_parent(); "
part += "child = subprocess.Popen(['sleep', '600']); print(os.getpid(), child.pid, flush=True); time.sleep(600)"
processes.run([sys.executable, "-c", part], 600, open(sys.argv[1], "ab"))
"""


def test_a_part_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(log)], cwd=ROOT) as main:
        while not log.exists() or not log.read_text().endswith("\n"):
            assert main.poll() is None
            time.sleep(0.05)
        main.send_signal(signal.SIGKILL)
    assert all(gone(int(pid)) for pid in log.read_text().split())


@no_gpu
@pytest.mark.usefixtures("scripted")
def test_no_run_overwrites_an_earlier_one_and_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    command.main(["--toy", "--seconds", "0", "--results", str(tmp_path), "--commit", "abc"])
    found = written(tmp_path)
    assert found["environment"]["commit"] == "abc" and found["rows"] == []
    assert {name: own["ended"] for name, own in found["parts"].items()} == {
        name: "left out: 0 s are over" if name in WITHOUT_GPU else "left out: needs a GPU" for name in PARTS
    }
    (first,) = tmp_path.iterdir()
    before = first.read_bytes()
    command.main(["--toy", "--seconds", "0", "--results", str(tmp_path), "--only", "warm"])
    assert len(list(tmp_path.glob("*.json"))) == 2 and first.read_bytes() == before
    other = json.loads(first.with_name(f"{first.stem}-2.json").read_text())
    assert list(other["parts"]) == ["warm"] and other["environment"]["commit"] != "abc"


@no_gpu
def test_without_a_gpu_the_error_says_how_to_try_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "--toy: got False without a GPU, wanted one, or --toy with TRITON_INTERPRET=1"
    with pytest.raises(SystemExit, match=wanted):
        command.main(["--results", str(tmp_path)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="triton: got a backend that does not serve: "):
        command.main(["--toy", "--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
