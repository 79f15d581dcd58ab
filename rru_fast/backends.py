"""Available backends, the choice of one for a call, and reasons why others are not available."""

from __future__ import annotations

import os
import platform

import torch

from rru_fast import native, triton

__version__ = "0.1.0"

# Reason why a backend is not available; None if it is. From the oracle to the lowest-level kernels.
BACKENDS: dict[str, str | None] = {
    "reference": None,
    "composite": None,
    "cpu": native.missing(),
    "triton": triton.missing(),
    "cuda": f"CUDA kernels are not part of version {__version__}",
}


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or an available backend."""
    if isinstance(backend, str) and (backend == "auto" or BACKENDS.get(backend, "unknown") is None):
        return
    usable = ", ".join(repr(name) for name, reason in BACKENDS.items() if reason is None)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {usable}")
    raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {usable}: {BACKENDS[backend]}")


def choose(backend: str, device: torch.device) -> str:
    """Return the backend that runs a call with argument `backend` and tensors on `device`."""
    check_backend(backend)
    if backend == "auto":
        # On a GPU the Triton kernels are opt-in until they have been run, and timed, on one.
        return "cpu" if device.type == "cpu" and BACKENDS["cpu"] is None else "composite"
    if not _serves(backend, device):
        major, minor = triton.CAPABILITY
        on = {"cpu": "the CPU", "triton": f"an NVIDIA GPU of compute capability {major}.{minor} or newer"}[backend]
        raise ValueError(f"backend: got {backend!r} with tensors on {device}, wanted 'auto', or tensors on {on}")
    return backend


def _serves(backend: str, device: torch.device) -> bool:
    """Return True if an available backend runs on `device`."""
    if backend == "cpu":
        return device.type == "cpu"
    return triton.serves(device) if backend == "triton" else True


def serving(device: torch.device) -> list[str]:
    """List the backends that can run on `device`, the reference first."""
    return [name for name, why in BACKENDS.items() if why is None and _serves(name, device)]


def report() -> str:
    """Return versions, devices and backends as `show_config` prints them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"rru_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"threads: {torch.get_num_threads()}, CPU: {torch.backends.cpu.get_cpu_capability()}, GPU: {gpu}",
        *native.describe(),
        f"auto runs: {choose('auto', torch.device('cpu'))} on a CPU, {choose('auto', torch.device('cuda'))} on a GPU",
        f"fp32 products on a GPU: {_fp32_precision()}",
    ]
    lines += [
        f"  {name:<10} {'available' if why is None else 'not available: ' + why}" for name, why in BACKENDS.items()
    ]
    return "\n".join(lines)


def _fp32_precision() -> str:
    """Precision of the operators' fp32 products on a GPU, and the settings that decide it."""
    conv, matmul = (
        "TF32" if setting.fp32_precision == "tf32" else "fp32"
        for setting in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    )
    asked = os.environ.get("RRU_FAST_FLOAT32")
    return f"{conv} in refine (torch.backends.cudnn.conv), {matmul} in batch_hard (torch.backends.cuda.matmul)" + (
        f", {asked} in both by triton (RRU_FAST_FLOAT32)" if asked else ""
    )


def show_config() -> None:
    """Print versions, devices, available backends, and why others are not available.

    >>> import rru_fast
    >>> rru_fast.show_config()  # doctest: +ELLIPSIS
    rru_fast ...
    """
    print(report())
