"""The operators as Triton kernels for NVIDIA GPUs. Triton itself is imported by the files of an operator alone."""

from __future__ import annotations

import importlib.util
import os

import torch

# Ampere, the first with bf16 and TF32.
CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Return True if kernels run on the CPU in Triton's interpreter, by TRITON_INTERPRET as Triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def missing() -> str | None:
    """Return the reason if the kernels cannot serve, else None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if torch.cuda.device_count() == 0:  # unlike is_available, does not initialize CUDA, after which fork() is not safe
        return "no NVIDIA GPU is seen; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to test them"
    return None


def serves(device: torch.device) -> bool:
    """Return True if the kernels, unless missing, run on this device."""
    if device.type == "cuda":
        return interpreted() or torch.cuda.get_device_capability(device) >= CAPABILITY
    return device.type == "cpu" and interpreted()
