from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from training.data.loading import make_loader
from training.data.sampler import PKSampler
from training.data.tracklets import Tracklet
from training.data.workers import exit_if_sending_fails, explain_errors
from training.runtime.errors import UserError

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
    assert line.startswith("error: workers: 1.0 MiB free in /dev/shm are too few for 3 batches of 0."), line
    assert line.endswith("3 ahead for each worker; wanted fewer --workers, or more of it (in Docker, --shm-size=1g)")


def load_underestimated() -> None:
    """Read batches of 4 MiB whose size is underestimated: frames in the middle of a tracklet are tiny."""
    large, tiny = np.zeros((420, 400, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    people = [Tracklet(n, 1, [tiny if t == 4 else large for t in range(9)], f"person{n}") for n in range(4)]
    for _ in make_loader(people, PKSampler(people, 2, 2, 2, seed=0, batches=9), 2, workers=1):
        pass


def test_a_batch_that_does_not_fit_ends_the_loader_and_is_one_line(tmp_path: Path) -> None:
    code = "from tests.training.data.test_workers import load_underestimated; load_underestimated()"
    ended = in_shared_memory_of(2, [sys.executable, "-c", code], tmp_path)
    last = ended.stderr.splitlines()[-1]
    wanted = "training.runtime.errors.UserError: workers: 2.0 MiB of /dev/shm are too few for a batch of 3."
    assert last.startswith(wanted), ended.stderr
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


def load_slowly(mib: int) -> None:
    """Use batches of so many MiB more slowly than the one worker reads them."""
    side = int((mib * 2**20 / 8 / 3) ** 0.5)
    people = [Tracklet(n, 1, [np.zeros((side, side, 3), np.uint8)] * 2, f"person{n}") for n in range(2)]
    for _ in make_loader(people, PKSampler(people, 2, 2, 2, seed=0, batches=12), 2, workers=1):
        time.sleep(0.1)


@pytest.mark.parametrize(("shared", "fits"), [(19, False), (21, True)])
def test_batches_that_pass_the_check_fit_until_the_end(shared: int, fits: bool, tmp_path: Path) -> None:
    code = "from tests.training.data.test_workers import load_slowly; load_slowly(4)"
    ended = in_shared_memory_of(shared, [sys.executable, "-c", code], tmp_path)
    assert (ended.returncode == 0) is fits, ended.stderr
    assert fits or "are too few for 5 batches of 4.0 MiB, 3 ahead" in ended.stderr.splitlines()[-1]


def test_an_epoch_of_fewer_batches_needs_less(tmp_path: Path) -> None:
    code = "from tests.training.data.test_workers import load_one; load_one()"
    assert in_shared_memory_of(5, [sys.executable, "-c", code], tmp_path).returncode == 0


def load_one() -> None:
    people = [Tracklet(n, 1, [np.zeros((400, 400, 3), np.uint8)] * 2, f"person{n}") for n in range(2)]
    (_,) = make_loader(people, PKSampler(people, 2, 2, 2, seed=0, batches=1), 2, workers=2)


def test_epochs_that_are_left_early_keep_nothing_in_shared_memory(tmp_path: Path) -> None:
    code = "from tests.training.data.test_workers import leave_early; leave_early()"
    ended = in_shared_memory_of(32, [sys.executable, "-c", code], tmp_path)
    assert ended.returncode == 0, ended.stderr


def leave_early() -> None:
    """Begin 12 epochs of batches of 2 MiB."""
    people = [Tracklet(n, 1, [np.zeros((296, 296, 3), np.uint8)] * 2, f"person{n}") for n in range(2)]
    loader = make_loader(people, PKSampler(people, 2, 2, 2, seed=0, batches=9), 2, workers=1)
    for _ in range(12):
        next(iter(loader))
        time.sleep(0.2)  # the worker reads ahead


class Unsendable:
    def __reduce__(self) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_worker_whose_batches_cannot_be_sent_ends_the_loader(capfd: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader([Unsendable()], batch_size=None, num_workers=1, worker_init_fn=exit_if_sending_fails)
    with pytest.raises(UserError, match=r"\Aworkers: DataLoader worker .* exited unexpectedly"), explain_errors():
        next(iter(loader))
    assert "open files (ulimit -n) are not enough; wanted fewer --workers" in capfd.readouterr().err


def test_workers_leave_no_shared_memory_behind(tmp_path: Path) -> None:
    code = (
        "import os; from tests.training.data.test_loading import PEOPLE, batches; batches(PEOPLE, 4, workers=2); "
        "print(os.listdir('/dev/shm'))"
    )
    ended = in_shared_memory_of(64, [sys.executable, "-c", code], tmp_path)
    assert ended.stdout == "[]\n", ended.stderr
