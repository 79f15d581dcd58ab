"""Fixtures shared by the whole suite."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

from rru_fast import triton

# A pool of compiling processes costs more than the few small graphs of a test.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor's cache on disk is not keyed by the instruction set that ATEN_CPU_CAPABILITY allows: vectorized code of one
# run would be compiled, and fail, in a run without vectors.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}")),
)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared_dir() -> Path:
    """The folder of real data beside the repository; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside the repository")
    return SHARED


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as they come: what tuning finds differs from machine to machine."""
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "0")


@pytest.fixture(autouse=True)
def _few_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch in Triton's interpreter, which runs its programs one by one, as for a small GPU: fewer programs."""
    if triton.interpreted():
        monkeypatch.setattr("rru_fast.triton._device.num_sms", lambda tensor: 16)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply float32 as such in Triton's interpreter: the reference on a CPU knows no TF32."""
    if triton.interpreted():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
