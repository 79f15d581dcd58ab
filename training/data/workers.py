"""Worker processes of a loader: limits of the system that they can meet, each told in one line."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Generic, TypeVar

from training.data.tracklets import Tracklet, read_pixels
from training.errors import UserError

T = TypeVar("T")

AHEAD = 3  # batches that each worker has read, or is reading, beyond the one in use
SHARED = Path("/dev/shm")  # tensors pass from process to process in it
_SAMPLED = 8  # tracklets that a frame's size is estimated from
# Open files of a worker, measured: pipes of all workers started before it, and two for each batch that is on its way.
_FILES, _FILES_PER_WORKER = 16, 5


@dataclass(frozen=True)
class Sent(Generic[T]):
    """A value as a worker sends it: pickled by the worker itself, which can return an error.

    The thread of a queue that pickles it otherwise prints the error and goes on, and the receiver waits for ever.
    """

    content: bytes

    def receive(self) -> T:
        """Unpickle it, once: its tensors are handed over by then.

        Raises:
            RuntimeError: the worker has ended, and its tensors with it.
        """
        try:
            value: T = pickle.loads(self.content)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            raise RuntimeError("DataLoader worker has exited before its batch was received") from error
        return value

    def pin_memory(self) -> T:
        """Unpickle it into memory that a GPU copies from; a DataLoader that pins asks for it."""
        pinned: T = self.receive().pin_memory()  # type: ignore[attr-defined]
        return pinned


def send(value: T, size: int) -> Sent[T] | UserError:
    """Pickle a value, its tensors into shared memory.

    Args:
        value: what to send.
        size: the bytes of its tensors, for messages.

    Returns:
        An error where shared memory or open files are not enough.
    """
    try:
        return Sent(bytes(ForkingPickler.dumps(value)))
    except (RuntimeError, OSError) as error:
        if _too_many_files(error):
            return _files_error()
        if "shared memory" in str(error):
            return _memory_error(f"a batch of {_mib(size)} does not fit in {SHARED}")
        raise


def check_limits(
    tracklets: Sequence[Tracklet], frames: int, size: tuple[int, int] | None, workers: int, processes: int
) -> None:
    """Raise a UserError where so many workers would soon need more shared memory or open files than there are.

    Args:
        tracklets: what is read, of which a few frames tell how large one is.
        frames: of a batch.
        size: height and width to which each is resized, if it is.
        workers: of each process.
        processes: on this machine.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = len(os.listdir("/dev/fd")) + _FILES + _FILES_PER_WORKER * workers
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise _files_error()
    if not SHARED.is_dir():
        return
    batch = frames * _frame_bytes(tracklets, size)
    count = (AHEAD * workers + 1) * processes
    if count * batch > _free():
        raise _memory_error(
            f"{count} batches of {_mib(batch)}, {AHEAD} for each worker and one in use, do not fit in {SHARED}"
        )


@contextmanager
def told_of_workers() -> Iterator[None]:
    """Say in one line that a worker was killed, or what it lacked, wherever the loader says so."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if _too_many_files(error):
            raise _files_error() from error
        found = re.findall(r"DataLoader worker[^\n]*", str(error))
        if not found:
            raise
        told = found[-1].partition(". ")[0]
        if "Bus error" in told:
            raise _memory_error(f"{told}, as where a batch does not fit in {SHARED}") from error
        raise UserError(f"workers: {told}; where memory ran out, fewer --workers need less") from error


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


def _free() -> int:
    of_shared = os.statvfs(SHARED)
    return of_shared.f_bavail * of_shared.f_frsize


def _too_many_files(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error)


def _files_error() -> UserError:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"workers: {limit} open files (ulimit -n) are not enough; wanted fewer --workers, or a higher limit"
    )


def _memory_error(what: str) -> UserError:
    remedy = "wanted fewer --workers, or a larger one (in Docker, --shm-size=1g)"
    return UserError(f"workers: {what}, which has {_mib(_free())} free; {remedy}")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
