"""The operators as Triton kernels for NVIDIA GPUs. Imports Triton only where a kernel file is imported."""

from __future__ import annotations

import importlib.util
import os

import torch

# Ampere on: the first with bfloat16 and TF32.
CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET as Triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def missing() -> str | None:
    """Why the kernels cannot serve; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if torch.cuda.device_count() == 0:  # unlike is_available, leaves CUDA alone, so that the process can still fork
        return "no NVIDIA GPU is seen; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to test them"
    return None


def serves(device: torch.device) -> bool:
    """Whether the kernels, where they are not missing, run on this device."""
    if device.type == "cuda":
        return interpreted() or torch.cuda.get_device_capability(device) >= CAPABILITY
    return device.type == "cpu" and interpreted()
