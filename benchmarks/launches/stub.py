"""Launch Triton kernels without a GPU: everything but compilation and the call into the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rru_fast.triton import _launch

Run = Callable[..., None]
"""Takes a kernel, its grid and all its arguments."""


class Stub:
    """Stand-in for a compiled kernel that calls `run` in place of the driver."""

    __getitem__ = CompiledKernel.__getitem__
    function = packed_metadata = None

    def __init__(self, kernel: Any, run: Run) -> None:
        self.kernel, self._run = kernel, run

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *_: Any) -> None:
        """Return None, as without hooks."""

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        """Pass on the kernel's arguments, which follow the stream, function, metadata and hooks."""
        self._run(self, (x, y, z), *rest[6:])


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def launched_by(run: Run) -> Iterator[None]:
    """Launch kernels on tensors of any device by calling `run`, bound and specialized as for an H100."""
    used = set()

    def compiled(kernel: Any, key: str, *_: Any) -> Stub:
        used.add(kernel)
        stub: Stub = kernel.device_caches[0][0].setdefault(key, Stub(kernel, run))
        return stub

    with patch.object(JITFunction, "_do_compile", compiled), patch.dict(_launch._compiled, clear=True):
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver.set_active(None)  # Triton creates the default, which needs a GPU, on its next use
            for kernel in used:
                kernel.device_caches.clear()
