"""The operators as CUDA C++ kernels, csrc/cuda, for GPUs with clusters of CTAs: `refine`.

What they do not carry, as `not_carried` says, runs in Triton, or without it in composite.
"""

from __future__ import annotations

import os

import torch

from rru_fast import native, triton

# Hopper, the first with clusters of CTAs and stores into the shared memory of others.
CAPABILITY = (9, 0)

CARRIES = "refine, but for its backward in eval mode"
"""What the kernels carry, in words."""
# Largest sizes of `refine`; csrc/cuda/refine_layout.h has them too.
MAX_CHANNELS, MAX_POSITIONS, MAX_HIDDEN, MAX_SPATIAL_HIDDEN = 2048, 64, 256, 128


def emulated() -> bool:
    """Return True if RRU_FAST_CUDA_EMULATE runs the kernels on the CPU, slowly, to test them.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    asked = os.environ.get("RRU_FAST_CUDA_EMULATE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"RRU_FAST_CUDA_EMULATE: got {asked!r}, wanted 0 or 1")
    return asked == "1"


def missing() -> str | None:
    """Return the reason if the kernels cannot serve, else None."""
    if native.missing() is not None:
        return native.missing()
    if emulated():
        return None if native.has_emulation() else "the emulated kernels are built in a checkout alone"
    if (failure := native.cuda_failure()) is not None:
        return f"not built: {failure}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if torch.cuda.device_count() == 0:  # unlike is_available, does not initialize CUDA, after which fork() is not safe
        how = "; RRU_FAST_CUDA_EMULATE=1 runs the kernels on the CPU, slowly, to test them"
        return "no NVIDIA GPU is seen" + (how if native.has_emulation() else "")
    return None


def serves(device: torch.device) -> bool:
    """Return True if the kernels, unless missing, run on this device."""
    if emulated():
        return device.type == "cpu"
    return device.type == "cuda" and _is_built_for(torch.cuda.get_device_capability(device))


def _is_built_for(capability: tuple[int, int]) -> bool:
    """Return True if a GPU of this compute capability runs the kernels of this build."""
    for architecture in native.cuda_architectures():
        number, _, ptx = architecture.partition("+")
        built = divmod(int(number.rstrip("af")), 10)
        if built < CAPABILITY:
            continue
        # Machine code runs on its major version from its minor one on, PTX on all later GPUs; "a" on its own alone.
        if built == capability if number[-1] == "a" else built[0] == capability[0] and built <= capability:
            return True
        if ptx and number.isdecimal() and built <= capability:
            return True
    return False


def not_carried(
    op: str,
    dtype: str = "",
    inputs: str = "",
    training: bool = False,
    precision: str = "",
    channels: int = 0,
    positions: int = 0,
    hidden: int = 0,
    spatial_hidden: int = 0,
) -> str | None:
    """Return the reason if the kernels do not carry a call, else None.

    In training mode the GPU has to hold all clips, too.

    Args:
        op: "refine", "strip_pool" or "batch_hard".
        dtype: of x, such as "float32".
        inputs, training: as in `rru_fast.refine`.
        precision: of fp32 products, as `rru_fast.precision.conv_precision` returns it.
        channels, positions, hidden, spatial_hidden: C, H * W, D and A.
    """
    if op != "refine":
        return f"there is no CUDA kernel of {op}"
    if inputs == "raw":
        return "inputs='raw'"
    if dtype == "float64":
        return "float64"
    if training and dtype == "float32" and precision == "tf32x3":
        return "three TF32 products (RRU_FAST_FLOAT32=tf32x3) in training"
    for name, size, most in (
        ("C", channels, MAX_CHANNELS),
        ("H * W", positions, MAX_POSITIONS),
        ("D", hidden, MAX_HIDDEN),
        ("A", spatial_hidden, MAX_SPATIAL_HIDDEN),
    ):
        if size > most:
            return f"{name} of {size}, at most {most}"
    return None


def fallback(device: torch.device) -> str:
    """Return the backend that runs what the kernels do not carry."""
    return "triton" if triton.missing() is None and triton.serves(device) else "composite"
