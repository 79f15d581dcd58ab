from __future__ import annotations

import os
import resource
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from training.data.loading import make_loader
from training.data.sampler import PKSampler
from training.data.tracklets import Tracklet
from training.data.workers import Sent, send, told_of_workers
from training.errors import UserError

ROOT = Path(__file__).parents[3]
TRAIN = "-m training.train --recipe quick --epochs 1 --batches 3 --compare-ops False --no-pictures --device cpu"


def in_shared_memory_of(mib: int, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where /dev/shm is a file system of that size, for it alone."""
    enter = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    mount = f'mount -t tmpfs -o size={mib}m none /dev/shm && cd "{folder}" && exec "$@"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run([*enter, "sh", "-c", mount, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no process mount a file system of its own")
    return subprocess.run(
        [*enter, "sh", "-c", mount, "sh", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_too_little_shared_memory_is_one_line_before_training_begins(small_data: Path, tmp_path: Path) -> None:
    data = ["--dataset", "ilids-vid", "--data-root", str(small_data), "--no-check-counts", "--people", "2"]
    command = [sys.executable, *TRAIN.split(), *data, "--workers", "2", "--output", "run"]
    ended = in_shared_memory_of(1, command, tmp_path)
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: workers: 7 batches of 0.")
    assert "3 for each worker and one in use, do not fit in /dev/shm, which has 1.0 MiB free; wanted fewer" in line
    assert "--shm-size" in line


def load_what_grows() -> None:
    """Read batches of 4 MiB whose size a sample of frames does not tell: those in the middle of a tracklet are tiny."""
    large, tiny = np.zeros((420, 400, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    people = [Tracklet(n, 1, [tiny if t == 4 else large for t in range(9)], f"person{n}") for n in range(4)]
    for _ in make_loader(people, PKSampler(people, 2, 2, 2, seed=0, batches=9), 2, workers=1):
        pass


def test_a_batch_that_does_not_fit_ends_the_loader_and_is_one_line(tmp_path: Path) -> None:
    code = "from tests.training.data.test_workers import load_what_grows; load_what_grows()"
    ended = in_shared_memory_of(2, [sys.executable, "-c", code], tmp_path)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("training.errors.UserError: workers: a batch of 3."), ended.stderr
    assert "MiB does not fit in /dev/shm, which has 2.0 MiB free" in last
    assert "multiprocessing" not in ended.stderr


@pytest.mark.parametrize("limit", [22, 30])
def test_too_few_open_files_are_one_line_before_training_begins(small_data: Path, tmp_path: Path, limit: int) -> None:
    data = ["--dataset", "ilids-vid", "--data-root", str(small_data), "--no-check-counts", "--people", "2"]
    command = [sys.executable, *TRAIN.split(), *data, "--workers", "4", "--output", str(tmp_path / "run")]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    wanted = f"{limit} open files (ulimit -n) are not enough; wanted fewer --workers, or a higher limit"
    assert line == f"error: workers: {wanted}"


def test_a_batch_of_a_worker_that_has_ended_is_one_line() -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()

    def worker() -> None:
        theirs.send(send(torch.zeros(9), 36))

    process = context.Process(target=worker)
    process.start()
    sent = ours.recv()
    process.join()
    assert isinstance(sent, Sent)
    told = r"\Aworkers: DataLoader worker has exited before .*; where memory ran out"
    with pytest.raises(UserError, match=told), told_of_workers():
        sent.receive()


def test_workers_leave_no_shared_memory_behind(tmp_path: Path) -> None:
    code = (
        "import os; from tests.training.data.test_loading import PEOPLE, batches; batches(PEOPLE, 4, workers=2); "
        "print(os.listdir('/dev/shm'))"
    )
    ended = in_shared_memory_of(64, [sys.executable, "-c", code], tmp_path)
    assert ended.stdout == "[]\n", ended.stderr
