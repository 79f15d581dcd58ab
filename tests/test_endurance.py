"""Long runs, concurrent threads, and fork() after use."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
from rru_fast import native
from tests import parity

every_backend = pytest.mark.parametrize("backend", parity.COMPILED)
default_backend_first = pytest.mark.parametrize("backend", parity.DEFAULT_FIRST)
LABELS = torch.arange(6) // 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Training:
    """Training of a small unit with the paper's two losses on it."""

    def __init__(self, backend: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.unit = rru_fast.RRU(8, (3, 2), hidden=6, spatial_hidden=4, backend=backend)
        self.loss = rru_fast.BatchHardTripletLoss(backend=backend)
        self.optimizer = torch.optim.SGD(self.unit.parameters(), lr=1e-3)
        self.clips = torch.rand(6, 3, 8, 3, 2)

    def step(self) -> None:
        self.optimizer.zero_grad()
        out = self.unit(self.clips)
        loss = self.loss(out.strips.permute(2, 0, 1), LABELS) + self.loss(out.features.mean((1, 3, 4)), LABELS)
        (loss + rru_fast.strip_pool(out.features, backend=self.unit.backend).square().mean()).backward()
        self.optimizer.step()

    def state_after(self, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            self.step()
        return {name: value.detach().clone() for name, value in self.unit.state_dict().items()}


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.nightly)])
@every_backend
@pytest.mark.exhaustive  # a thousand steps
def test_training_memory_does_not_grow_with_steps(backend: str, steps: int) -> None:
    training = Training(backend)
    training.state_after(500)  # until the allocator's pools are filled
    growth = []
    for _ in range(4):
        gc.collect()
        objects, blocks, memory = len(gc.get_objects()), sys.getallocatedblocks(), resident_bytes()
        training.state_after(steps // 4)
        gc.collect()
        growth.append((resident_bytes() - memory, len(gc.get_objects()) - objects, sys.getallocatedblocks() - blocks))
    # The minimum over the quarters: a leak in the step grows every quarter, other parts of this process only some.
    memory, objects, blocks = map(min, zip(*growth, strict=True))
    assert memory < 1000 * steps // 4  # leaking any one tensor of each step would be more
    assert objects < 50
    assert blocks < steps / 8


@default_backend_first
def test_concurrent_threads_train_as_each_does_alone(backend: str, two_threads: None) -> None:
    alone = [Training(backend, seed).state_after(20) for seed in range(4)]
    trainings = [Training(backend, seed) for seed in range(4)]
    together: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def train(i: int) -> None:
        start.wait()
        together[i] = trainings[i].state_after(20)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, got in zip(alone, together, strict=True):
        for name, value in wanted.items():
            assert torch.equal(got[name], value), name


def _send(connection: Any, function: Callable[[], Any]) -> None:
    connection.send({name: value.numpy() for name, value in function().items()})
    connection.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork()")
@pytest.mark.skipif(
    native.missing() is not None,
    reason="OpenMP's threads are released before fork() only where the C++ kernels are loaded",
)
@pytest.mark.parametrize("backend", [*parity.DEFAULT_FIRST, pytest.param("reference", marks=pytest.mark.exhaustive)])
def test_a_child_forked_after_use_computes_what_its_parent_computes(backend: str) -> None:
    # In a new process: once autograd has started threads, PyTorch refuses a backward in a forked child.
    parent = multiprocessing.get_context("spawn").Process(target=_fork_after_use, args=(backend,))
    parent.start()
    parent.join()
    assert parent.exitcode == 0


def _fork_after_use(backend: str) -> None:
    torch.set_num_threads(2)
    maps = torch.rand(8, 8, 64, 8, 8)  # large enough for both threads to work

    def outputs_and_gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        unit = rru_fast.RRU(64, (8, 8), hidden=16, backend=backend)
        out = unit(maps)
        rru_fast.batch_hard_triplet(out.strips.permute(2, 0, 1), torch.arange(8) // 2, backend=backend).backward()
        gradients = {name: parameter.grad for name, parameter in unit.named_parameters() if parameter.grad is not None}
        return {"features": out.features.detach(), **gradients}

    wanted = outputs_and_gradients()
    context = multiprocessing.get_context("fork")
    for _ in range(2):  # the second time from a parent whose threads were released once
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(sender, outputs_and_gradients))
        child.start()
        sender.close()
        assert receiver.poll(60), "the child hangs"
        got = receiver.recv()
        child.join(60)
        assert child.exitcode == 0
        assert torch.get_num_threads() == 2
        again = outputs_and_gradients()
        for name, value in wanted.items():
            assert torch.equal(torch.from_numpy(got[name]), value), name
            assert torch.equal(again[name], value), name


@pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_small_calls_start_no_threads_and_large_ones_do() -> None:
    script = """
import os, torch, rru_fast
torch.set_num_threads(2)
def threads(clips, channels):
    unit = rru_fast.RRU(channels, (4, 4), hidden=16)
    x = torch.ones(clips, 3, channels, 4, 4, requires_grad=True)
    (unit(x).strips + rru_fast.strip_pool(x)).sum().backward()
    features = torch.randn(clips, channels, requires_grad=True)
    rru_fast.batch_hard_triplet(features, torch.arange(clips) // 2).backward()
    return len(os.listdir("/proc/self/task"))
before = len(os.listdir("/proc/self/task"))
print(threads(4, 8) - before, threads(64, 512) - before > 0)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "True"], done.stderr
