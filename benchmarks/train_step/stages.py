"""Stages of a training step, timed by hooks on the trainer's parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.data import DataLoader

from training.data.loading import Batch
from training.engine.trainer import Trainer

STAGES = (
    "data wait",
    "transfer",
    "resize",
    "backbone",
    "RRU",
    "head",
    "losses",
    "backward",
    "optimiser",  # the spelling of the stored results' columns
    "rest",
)


class Stages:
    """Seconds by stage; on a GPU the end of each stage waits for the device.

    The head is everything after the RRU: STIM and the classifier. The backbone lasts until the RRU begins: hooks of its
    own would be compiled with it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def begin(self) -> None:
        """Start the first stage."""
        self._last = self._now()

    def end(self, stage: str) -> None:
        """End a stage and start the next."""
        now = self._now()
        self.seconds[stage] += now - self._last
        self._last = now

    def shares(self) -> dict[str, float]:
        """Return each stage's share of the total."""
        total = sum(self.seconds.values())
        return {stage: spent / total for stage, spent in self.seconds.items()}

    @contextmanager
    def of(self, trainer: Trainer, loader: DataLoader[Any]) -> Iterator[DataLoader[Any]]:
        """Watch a trainer inside the block; yields the loader to train with."""
        network, rru = trainer.network, trainer.network.rru
        assert rru is not None
        hooks = [
            network.register_forward_pre_hook(lambda *_: self.end("resize")),
            rru.register_forward_pre_hook(lambda *_: self.end("backbone")),
            rru.register_forward_hook(lambda *_: self.end("RRU")),
            network.register_forward_hook(lambda *_: self.end("head")),
            trainer.losses.register_forward_hook(lambda *_: self.end("losses")),
            trainer.optimizer.register_step_pre_hook(lambda *_: self.end("backward")),
            trainer.optimizer.register_step_post_hook(lambda *_: self.end("optimiser")),
        ]
        try:
            yield _Watched(loader, self)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class _Batch(Batch):
    """A batch whose transfer to the device ends a stage."""

    stages: Stages

    def to(self, device: torch.device) -> Batch:
        moved = super().to(device)
        self.stages.end("transfer")
        return moved


class _Watched:
    """A loader whose batches end a stage when they arrive and when the next is requested."""

    def __init__(self, loader: DataLoader[Any], stages: Stages) -> None:
        self._loader, self._stages = loader, stages

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self._stages.begin()
        for batch in self._loader:
            self._stages.end("data wait")
            yield _Batch(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, stages=self._stages)
            self._stages.end("rest")
