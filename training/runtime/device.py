"""The device of a command, or of one of several processes."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias

import torch

from training.runtime import distributed
from training.runtime.errors import UserError

Device: TypeAlias = Literal["auto", "cpu", "cuda"]


def choose_device(name: Device) -> torch.device:
    """Return the device that a name means here; of several GPUs each process has its own, made current.

    Raises:
        UserError: it is "cuda" and there is none, or one too few.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got 'cuda', but PyTorch sees no CUDA device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if distributed.world() == 1:
        return torch.device("cuda")
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        got = f"process {local_rank + 1} of this machine, which has {gpus} GPUs"
        raise UserError(f"device: got {got}, wanted at most {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
