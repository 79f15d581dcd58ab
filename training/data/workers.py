"""Worker processes of a loader: check the limits of the system that they can meet, and explain errors in one line."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from torch import Tensor

from training.data.tracklets import Tracklet, read_pixels
from training.runtime.errors import UserError

AHEAD = 3  # batches that each worker has read, or is reading, beyond the one in use
SHARED = Path("/dev/shm")  # tensors pass from process to process in it
_SAMPLED = 8  # tracklets that a frame's size is estimated from
# Open files of a worker, measured: pipes of all workers started before it, and two for each batch that is on its way.
_FILES, _FILES_PER_WORKER = 16, 5


def share(*tensors: Tensor) -> UserError | None:
    """Move tensors of a worker into shared memory, where they are sent from, in place.

    The thread that sends a batch does so otherwise, but only prints its errors, and the receiver waits forever.

    Returns:
        An error where shared memory or open files are not enough.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError) as error:
        if _too_many_files(error):
            return _files_error()
        if "shared memory" in str(error):
            size = sum(tensor.nbytes for tensor in tensors)
            return _memory_error(
                f"{_mib(_size(SHARED))} of {SHARED} are too few for a batch of {_mib(size)} and others"
            )
        raise
    return None


def end_where_sending_fails(worker: int) -> None:
    """Have a worker end, and so the loader raise, where the thread that sends its batches fails; for worker_init_fn."""
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: Exception, item: Any) -> None:
    reason = _files_error() if _too_many_files(error) else f"workers: a batch cannot be sent ({error})"
    sys.stderr.write(f"{' '.join(str(reason).split())}\n")
    sys.stderr.flush()
    os._exit(1)


def check_limits(
    tracklets: Sequence[Tracklet], frames: int, size: tuple[int, int] | None, workers: int, batches: int, processes: int
) -> None:
    """Raise a UserError where so many workers would soon need more shared memory or open files than there are.

    Args:
        tracklets: what is read, of which a few frames tell how large one is.
        frames: of a batch.
        size: height and width to which each is resized, if it is.
        workers: of each process.
        batches: of an epoch.
        processes: on this machine.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < _open_files(limit) + _FILES + _FILES_PER_WORKER * workers:
        raise _files_error()
    if not SHARED.is_dir():
        return
    pages = 2 * mmap.PAGESIZE  # of pixels and labels, each rounded up
    batch = frames * _frame_bytes(tracklets, size) + pages
    # Besides those ahead: the batch in use, and the previous one until its variable is rebound.
    count = min(AHEAD * workers + 2, batches) * processes
    if count * batch > _size(SHARED, free=True):
        free = _mib(_size(SHARED, free=True))
        raise _memory_error(
            f"{free} free in {SHARED} are too few for {count} batches of {_mib(batch)}, {AHEAD} ahead for each worker"
        )


@contextmanager
def explained() -> Iterator[None]:
    """Raise one line where the loader finds that a worker was killed, or lacks open files."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if _too_many_files(error):
            raise _files_error() from error
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        if "Bus error" in reason:
            raise _memory_error(f"{reason}; {_mib(_size(SHARED))} of {SHARED} may be too few") from error
        raise UserError(f"workers: {reason}; where memory ran out, fewer --workers need less") from error


def _frame_bytes(tracklets: Sequence[Tracklet], size: tuple[int, int] | None) -> int:
    """Return the mean over some frames, 0 if none of them can be read: the loader then says why."""
    if size is not None:
        return size[0] * size[1] * 3
    read = []
    for index in sorted({place * len(tracklets) // _SAMPLED for place in range(_SAMPLED)}):
        with suppress(UserError):
            frames = tracklets[index].frames
            read.append(read_pixels(frames[len(frames) // 2]).nbytes)
    return sum(read) // max(1, len(read))


def _size(path: Path, free: bool = False) -> int:
    system = os.statvfs(path)
    return (system.f_bavail if free else system.f_blocks) * system.f_frsize


def _open_files(limit: int) -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # not even one more
        return limit


def _too_many_files(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error)


def _files_error() -> UserError:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"workers: {limit} open files (ulimit -n) are not enough; wanted fewer --workers, or a higher limit"
    )


def _memory_error(what: str) -> UserError:
    return UserError(f"workers: {what}; wanted fewer --workers, or more of it (in Docker, --shm-size=1g)")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
