"""Training itself: a step, an epoch, and the state that continues them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader

from training.config.step import EAGER_FP32, StepConfig
from training.data.loading import Batch, frames_to_input
from training.engine.metrics_log import RunLog
from training.model.finite import first_not_finite
from training.model.losses import Losses
from training.model.network import Network
from training.model.sync_norm import use_sync_norm
from training.runtime import distributed
from training.runtime.errors import UserError


def to_input(batch: Batch, network: Network, step: StepConfig) -> tuple[Tensor, Tensor]:
    """A batch as its network takes it: clips (B, T, 3, h, w) and labels (B,), on the network's device."""
    weight = next(network.parameters())
    batch = batch.to(weight.device)
    size, memory_format = network.backbone.size, step.memory_format
    frames = frames_to_input(batch.frames, size, weight.device, memory_format=memory_format).to(weight.dtype)
    return frames.reshape(len(batch.labels), -1, *frames.shape[1:]), batch.labels


@dataclass
class Trainer:
    """A network in training, with its losses and optimizer, after some epochs and steps.

    network: its backbone is laid out and compiled as `config` says; of several processes all have the main one's.
    losses: whose means over the processes are the losses of all clips.
    config: how a step is computed; without its sync_bn, running statistics are those of the main process.
    """

    network: Network
    losses: Losses
    optimizer: SGD
    config: StepConfig = EAGER_FP32
    epoch: int = 0
    step: int = 0
    scaler: GradScaler = field(init=False)
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.config.prepare(self.network)
        self.scaler = self.config.scaler(next(self.network.parameters()).device)
        self.model = self.network
        if distributed.world() > 1:
            self.model = DistributedDataParallel(self.network)
            if self.config.sync_bn:  # only now: on a CPU no network with such norms can be wrapped
                use_sync_norm(self.network)

    def run_epoch(self, batches: DataLoader[Any], log: RunLog | None) -> None:
        """Train on each batch once; how many there are may differ from epoch to epoch.

        Args:
            batches: of each, what falls to this process.
            log: `None` where another process keeps it.

        Raises:
            UserError: a loss is not finite, or at the end a tensor of the network; step, clips and module are named.
        """
        self.model.train()
        if log:
            log.begin_epoch(self.epoch + 1, self.step, len(batches))
        started = asked = time.perf_counter()
        for batch in batches:
            waited = time.perf_counter() - asked
            clips, labels = to_input(batch, self.network, self.config)
            with self.config.autocast(clips.device):
                total, parts = self.losses(self.model(clips), labels)
            # Together, so that the device is waited for once.
            means = distributed.total(torch.stack(list(parts.values())).detach()) / distributed.world()
            values = dict(zip(parts, means.tolist(), strict=True))
            where = f"epoch {self.epoch + 1}, step {self.step + 1}"
            for part, value in values.items():
                if not math.isfinite(value):
                    named = distributed.gathered(first_not_finite(self.network, clips))
                    first = next(filter(None, named), "the loss itself")
                    clip_names = ", ".join(chain(*distributed.gathered(batch.clips)))
                    shown = f"{clip_names}; first not finite: {first}; last good epoch: {self.epoch}"
                    raise UserError(f"{where}: the {part} loss is {value} on {shown}")
            self.optimizer.zero_grad()
            self.scaler.scale(total).backward()
            self.scaler.step(self.optimizer)  # not where a float16 gradient overflowed: the scale is lowered instead
            self.scaler.update()
            self.step += 1
            seconds, started = time.perf_counter() - started, time.perf_counter()
            if log:
                frames = len(batch.frames) * distributed.world()
                log.step(self.epoch + 1, self.step, values, frames, seconds, waited)
            asked = time.perf_counter()
        if distributed.world() > 1:
            for buffer in self.network.buffers():  # before each step the model has done so itself
                torch.distributed.broadcast(buffer, 0)
        for name, tensor in self.network.state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(f"{where}: {name} is not finite after its update; last good epoch: {self.epoch}")
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state of training, without the network's tensors."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: it is of another network.
        """
        self.epoch, self.step = state["epoch"], state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # there is none of a run without float16, which this one may yet turn to
            self.scaler.load_state_dict(state["scaler"])
        # The optimizer itself compares no shapes.
        if any(p.shape != moments["momentum_buffer"].shape for p, moments in self.optimizer.state.items()):
            raise ValueError("the optimizer's momenta are of another network")
