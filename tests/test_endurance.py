"""What breaks last: many steps, several threads at once, a fork in the middle of things."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
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
    """Steps of a small unit with both losses that the paper puts on it."""

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

    def after(self, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            self.step()
        return {name: value.detach().clone() for name, value in self.unit.state_dict().items()}


def resident() -> int:
    """Bytes of memory that this process occupies."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("steps", [1_000, pytest.param(10_000, marks=pytest.mark.nightly)])
@every_backend
@pytest.mark.exhaustive  # a thousand steps
def test_training_takes_no_more_memory_step_by_step(backend: str, steps: int) -> None:
    training = Training(backend)
    training.after(500)  # until the allocator has what it needs
    grown = []
    for _ in range(4):
        gc.collect()
        objects, blocks, before = len(gc.get_objects()), sys.getallocatedblocks(), resident()
        training.after(steps // 4)
        gc.collect()
        grown.append((resident() - before, len(gc.get_objects()) - objects, sys.getallocatedblocks() - blocks))
    # What a step leaves behind it leaves in every quarter; what other parts of this process do is in some.
    memory, objects, blocks = map(min, zip(*grown, strict=True))
    assert memory < 1000 * steps // 4  # as many times any tensor of a step is more
    assert objects < 50
    assert blocks < steps / 8


@default_backend_first
def test_threads_that_train_at_once_get_what_each_gets_alone(backend: str, two_threads: None) -> None:
    alone = [Training(backend, seed).after(20) for seed in range(4)]
    trainings = [Training(backend, seed) for seed in range(4)]
    together: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def train(i: int) -> None:
        start.wait()
        together[i] = trainings[i].after(20)

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


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.parametrize("backend", [*parity.DEFAULT_FIRST, pytest.param("reference", marks=pytest.mark.exhaustive)])
def test_a_child_forked_after_use_gets_what_its_parent_gets(backend: str) -> None:
    # In a process of its own: where autograd has started threads PyTorch refuses a backward in the child.
    parent = multiprocessing.get_context("spawn").Process(target=_fork_after_use, args=(backend,))
    parent.start()
    parent.join()
    assert parent.exitcode == 0


def _fork_after_use(backend: str) -> None:
    torch.set_num_threads(2)
    maps = torch.rand(8, 8, 64, 8, 8)  # enough for both threads

    def refined() -> dict[str, Tensor]:
        torch.manual_seed(0)
        unit = rru_fast.RRU(64, (8, 8), hidden=16, backend=backend)
        out = unit(maps)
        rru_fast.batch_hard_triplet(out.strips.permute(2, 0, 1), torch.arange(8) // 2, backend=backend).backward()
        gradients = {name: parameter.grad for name, parameter in unit.named_parameters() if parameter.grad is not None}
        return {"features": out.features.detach(), **gradients}

    wanted = refined()
    context = multiprocessing.get_context("fork")
    for _ in range(2):  # the second time from a parent whose threads were let go once
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(theirs, refined))
        child.start()
        theirs.close()
        assert ours.poll(60), "the child hangs"
        got = ours.recv()
        child.join(60)
        assert child.exitcode == 0
        assert torch.get_num_threads() == 2
        again = refined()
        for name, value in wanted.items():
            assert torch.equal(torch.from_numpy(got[name]), value), name
            assert torch.equal(again[name], value), name
