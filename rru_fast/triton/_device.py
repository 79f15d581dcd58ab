"""The device that a call runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

H100_SMS = 132


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that launches kernels on the tensor's device, whichever device is current outside of it."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def num_sms(tensor: Tensor) -> int:
    """Return the number of multiprocessors, which a launch should fill; an H100's if the tensor is not on a GPU."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else H100_SMS
