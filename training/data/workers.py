"""Worker processes of a loader: send batches in shared memory, and explain in one line what ended a worker."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from torch import Tensor

from training.runtime.errors import UserError

SHARED_MEMORY = Path("/dev/shm")  # tensors pass between processes in it


def move_to_shared_memory(*tensors: Tensor) -> UserError | None:
    """Move a worker's tensors into shared memory, in place, before they are sent.

    Otherwise the thread that sends a batch moves them, but it only prints its errors, and the receiver waits forever.

    Returns:
        An error if there is not enough shared memory or not enough open files, else None.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError) as error:
        if _too_many_files(error):
            return open_files_error()
        if "shared memory" in str(error):
            size = sum(tensor.nbytes for tensor in tensors)
            return shared_memory_error(
                f"{mib(shared_memory_size())} of {SHARED_MEMORY} are too few for a batch of {mib(size)} and others"
            )
        raise
    return None


def exit_if_sending_fails(worker: int) -> None:
    """End this worker, and so have the loader raise, if the thread that sends its batches fails; a worker_init_fn."""
    Queue._on_queue_feeder_error = staticmethod(_exit)  # type: ignore[attr-defined]


def _exit(error: Exception, item: Any) -> None:
    reason = open_files_error() if _too_many_files(error) else f"workers: a batch cannot be sent ({error})"
    sys.stderr.write(f"{' '.join(str(reason).split())}\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def explain_errors() -> Iterator[None]:
    """Raise a one-line UserError if the loader reports that a worker was killed or that open files ran out."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if _too_many_files(error):
            raise open_files_error() from error
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        if "Bus error" in reason:
            size = mib(shared_memory_size())
            raise shared_memory_error(f"{reason}; {size} of {SHARED_MEMORY} may be too few") from error
        raise UserError(f"workers: {reason}; where memory ran out, fewer --workers need less") from error


def shared_memory_size(free: bool = False) -> int:
    """Return the size of shared memory in bytes, or the free part of it."""
    system = os.statvfs(SHARED_MEMORY)
    return (system.f_bavail if free else system.f_blocks) * system.f_frsize


def open_files_error() -> UserError:
    """Make the error for too few open files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"workers: {limit} open files (ulimit -n) are not enough; wanted fewer --workers, or a higher limit"
    )


def shared_memory_error(what: str) -> UserError:
    """Make the error for too little shared memory."""
    return UserError(f"workers: {what}; wanted fewer --workers, or more of it (in Docker, --shm-size=1g)")


def mib(size: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{size / 2**20:.1f} MiB"


def _too_many_files(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error)
