"""Fixtures shared by the whole suite."""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from rru_fast import arguments, cuda, triton
from rru_fast.auto import choice, decisions

# Starting a pool of compile workers takes longer than compiling a test's few small graphs.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# PyTorch's disk cache of compiled graphs is not keyed by ATEN_CPU_CAPABILITY: code vectorized in one run would fail to
# compile in a run without vector instructions. Nor is it by our operators' schemas: a cached backward would call them
# with the arguments of another version.
SCHEMAS = hashlib.sha256(Path(arguments.__file__).read_bytes()).hexdigest()[:8]
CACHE = f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}_{SCHEMAS}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), CACHE)))

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared_dir() -> Path:
    """Folder of real data next to the repository; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared data next to the repository")
    return SHARED


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off autotuning, whose configs differ from machine to machine."""
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "0")


@pytest.fixture(autouse=True)
def _undecided(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have `auto` run the defaults: no decisions of this machine's, and none made."""
    path = tmp_path_factory.getbasetemp() / f"decisions-{uuid4().hex}"
    monkeypatch.setenv("RRU_FAST_CALIBRATE", "0")
    monkeypatch.setattr(decisions, "folder", lambda: path)
    choice.forget()
    yield
    choice.forget()


@pytest.fixture(autouse=True)
def _few_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Size grids in Triton's interpreter, which runs programs one by one, for a GPU with few multiprocessors."""
    if triton.interpreted():
        monkeypatch.setattr("rru_fast.triton._device.num_sms", lambda tensor: 16)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off TF32 in kernels that are interpreted or emulated: the reference on a CPU multiplies in fp32."""
    if triton.interpreted() or cuda.emulated():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
