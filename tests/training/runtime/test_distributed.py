from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.forked import command_of_ranks, ranks
from tests.helpers.three_steps import CASES, Steps, three_steps, three_steps_of_each
from training.config.presets import RECIPES
from training.data import load_split
from training.engine import checkpoint
from training.engine.build import make_sampler
from training.engine.options import make_options
from training.runtime import distributed
from training.runtime.fields import update
from training.train import train

REPOSITORY = Path(__file__).resolve().parents[3]


def torchrun(processes: int, *arguments: str | Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*start, *map(str, arguments)]


def run(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = torchrun(processes, *arguments)
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def small(data: Path, output: Path, **changes: str) -> list[str | Path]:
    """`training.train` on 4 people, 2 batches an epoch."""
    given = {"people": "4", "batches": "2", "epochs": "999", "compare-ops": "False", "device": "cpu", **changes}
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    place: list[str | Path] = ["--data-root", data, "--output", output]
    return ["training.train", "--dataset", "ilids-vid", "--no-check-counts", "--no-pictures", *place, *options]


class Running:
    """A command under torchrun, in a session of its own."""

    def __init__(self, processes: int, *arguments: str | Path) -> None:
        self._process = subprocess.Popen(
            torchrun(processes, *arguments),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, there: Any) -> None:
        deadline = time.monotonic() + 120
        while not there() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert there(), self.end()

    def pids(self) -> dict[str, int]:
        """The processes that torchrun started, by rank."""
        torchruns = self._process.pid
        children = Path(f"/proc/{torchruns}/task/{torchruns}/children").read_text().split()
        ranks = {}
        for pid in children:
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            ranks.update({entry[5:]: int(pid) for entry in environment if entry.startswith("RANK=")})
        return ranks

    def interrupt(self) -> None:
        """As a terminal does: torchrun, and all that it started."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Wait for its end; return the exit status and stderr, torchrun's report included."""
        try:
            _, stderr = self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        return self._process.returncode, stderr


class RunningForks:
    """The same, forked."""

    def __init__(self, processes: int, *arguments: str | Path) -> None:
        self._ranks = command_of_ranks(processes, *map(str, arguments))

    def wait_for(self, there: Any) -> None:
        self._ranks.each[0].wait_for(there)

    def interrupt(self) -> None:
        for one in self._ranks.each:
            os.kill(one.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        ended = self._ranks.end()
        return max(abs(end.status or 0) for end in ended), "".join(end.err for end in ended)


def lines(stderr: str, *starts: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith(starts)]


def root_cause(stderr: str) -> str:
    """The part of torchrun's report on the process that failed first."""
    return stderr.partition("Root Cause (first observed failure):")[2]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def epoch_of(run: Path) -> int:
    found = checkpoint.last(run)
    return int(found.name.rpartition("-")[2]) if found else 0


@pytest.fixture(scope="module")
def alone() -> dict[str, Steps]:
    """Steps of one process, by case."""
    return {case: three_steps(case) for case in CASES}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
    """Steps of several processes, by case."""
    out = tmp_path_factory.mktemp("steps") / "steps.pt"
    for rank, ended in enumerate(ranks(request.param, three_steps_of_each, out)):
        assert ended == (0, f"process {rank} is done\n", "")
    return {case: Steps(**steps) for case, steps in torch.load(out, weights_only=False).items()}


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Within 1e-6 of each tensor's largest element; a bias before batch norm has no gradient but rounding."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        most = max(1e-6 * tensor.abs().max().item(), 1e-15)
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=most, msg=lambda message, name=name: f"{name}: {message}"
        )


def test_gradients_and_weights_of_several_processes_are_those_of_one(
    alone: dict[str, Steps], together: dict[str, Steps]
) -> None:
    for case in CASES:
        assert all(gradient.abs().max() > 0 for gradient in alone[case].gradients.values())
        assert_close(together[case].gradients, alone[case].gradients)
        assert_close(together[case].state, alone[case].state)  # running statistics too


def test_statistics_of_all_processes_are_not_those_of_groups(alone: dict[str, Steps]) -> None:
    one, other = (alone[case].state["backbone.net.1.running_var"] for case in ("synchronized", "in groups"))
    assert not torch.allclose(one, other, rtol=1e-3)


def test_the_batches_are_those_of_one_process_and_nobody_is_in_two_shares(
    alone: dict[str, Steps], together: dict[str, Steps]
) -> None:
    for (whole,), shares in zip(alone["synchronized"].clips, together["synchronized"].clips, strict=True):
        assert [clip for share in shares for clip in share] == whole
        people = [{clip[5:14] for clip in share} for share in shares]
        assert sum(map(len, people)) == len(set.union(*people)) == 4
        assert len({len(share) for share in shares}) == 1


def test_features_extracted_in_shares_are_those_of_one_process(
    alone: dict[str, Steps], together: dict[str, Steps]
) -> None:
    for case in CASES:
        np.testing.assert_allclose(together[case].features, alone[case].features, rtol=1e-5)
        assert together[case].ranking == alone[case].ranking


@pytest.mark.parametrize(
    ("processes", "running"), [(2, RunningForks), pytest.param(4, Running, marks=pytest.mark.exhaustive)]
)
def test_a_killed_process_ends_all_and_the_run_goes_on_in_one_and_then_in_several(
    small_data: Path, tmp_path: Path, processes: int, running: type[Running] | type[RunningForks]
) -> None:
    begun = tmp_path / "run"
    two = Running(2, *small(small_data, begun), "--sync-bn")
    two.wait_for(lambda: epoch_of(begun) >= 1)
    os.kill(two.pids()["1"], signal.SIGKILL)
    status, stderr = two.end()
    epoch = epoch_of(begun)
    hint = f"last good epoch: {epoch}; continue with --resume {begun}"
    assert status != 0
    assert lines(stderr, "error", "Traceback") == [
        f"error: a process of the run has ended, and all with it; {hint}",
        "Traceback (most recent call last):",  # torchrun's own
    ]
    assert "rank      : 1 " in root_cause(stderr) and "Signal 9 (SIGKILL)" in root_cause(stderr)
    assert checkpoint.load(begun).config["environment"]["processes"] == 2

    train(make_options(resume=begun, epochs=epoch + 1, device="cpu", pictures=False))
    apart = Path(shutil.copytree(begun, tmp_path / "apart"))
    several = running(processes, "training.train", "--resume", begun, "--epochs", "999", "--device", "cpu")
    several.wait_for(lambda: epoch_of(begun) >= epoch + 2)
    several.interrupt()
    status, stderr = several.end()
    assert status != 0
    assert lines(stderr, "interrupted", "error") == [
        f"interrupted; last good epoch: {epoch_of(begun)}; continue with --resume {begun}"
    ]

    train(make_options(resume=apart, epochs=epoch + 2, device="cpu", pictures=False))
    steps = {place: [r for r in records(place, "step") if r["epoch"] == epoch + 2] for place in (begun, apart)}
    assert [record["step"] for record in steps[begun]] == [2 * epoch + 3, 2 * epoch + 4]
    # The triplets of an epoch's first step know nothing of dropout: they are of the same clips, in the same statistics.
    for part in ("video", "part"):
        assert steps[begun][0][part] == pytest.approx(steps[apart][0][part], rel=1e-3), part
    assert [r["step"] for r in records(begun, "step")] == list(range(1, len(records(begun, "step")) + 1))
    assert records(begun, "result")[0]["changed"][-2:] == ["sync_bn True (False)", "processes 2 (1)"]
    assert records(apart, "result")[-1]["changed"][-1] == "sync_bn True (False)"


def stderr_of_torchrun(*command: str | Path) -> str:
    stderr = run(2, *command).stderr
    (line,) = lines(stderr, "error")
    assert f"training.runtime.errors.UserError: {line.removeprefix('error: ')}" in root_cause(stderr)
    return stderr


def stderr_of_forks(*command: str | Path) -> str:
    ended = command_of_ranks(2, *map(str, command)).end()
    assert 2 in {end.status for end in ended} <= {1, 2, -signal.SIGTERM}
    return "".join(end.err for end in ended)


@pytest.mark.parametrize("stderr_of", [stderr_of_forks, pytest.param(stderr_of_torchrun, marks=pytest.mark.exhaustive)])
def test_an_error_of_one_process_is_printed_once_and_so_is_an_error_of_all(
    small_data: Path, tmp_path: Path, stderr_of: Callable[..., str]
) -> None:
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    split = load_split("ilids-vid", data, 0, prid="paper-21", check_counts=False)
    sampler = make_sampler(update(RECIPES["quick"], people=4), split.train)
    sampler.shard(1, 2)
    for index, _ in next(iter(sampler)):
        for frame in split.train[index].frames:
            assert isinstance(frame, Path)
            frame.write_bytes(b"not an image")
    stderr = stderr_of(*small(data, tmp_path / "run", epochs="1"))
    assert len(lines(stderr, "error", "warning")) == 1
    assert "not a readable image" in lines(stderr, "error")[0]
    stderr = stderr_of(*small(data, tmp_path / "odd", people="3"))
    assert lines(stderr, "error") == ["error: people in a batch (P): got 3 for 2 processes, wanted a multiple of 2"]
    assert not (tmp_path / "odd").exists()
    stderr = stderr_of("training.reproduce", "--table", "1")
    assert lines(stderr, "error") == ["error: torchrun: got 2 processes, wanted 1 for this command"]


def test_without_torchrun_there_is_one_process() -> None:
    with distributed.processes():
        assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert distributed.from_main(lambda: 5) == distributed.main_first(lambda: 5) == 5
        assert distributed.gathered("clip") == ["clip"]
    assert distributed.first_to_report() and distributed.first_to_report()
