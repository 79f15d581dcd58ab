"""Check before loading begins that shared memory and open files are enough for a loader's workers."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Sequence
from contextlib import suppress

from training.data.tracklets import Tracklet, read_pixels
from training.data.workers import SHARED_MEMORY, mib, open_files_error, shared_memory_error, shared_memory_size
from training.runtime.errors import UserError

PREFETCH = 3  # batches per worker that are read, or being read, beyond the one in use
_SAMPLED_TRACKLETS = 8  # from which a frame's size is estimated
# Open files of a worker, measured: pipes of all workers started before it, and two for each batch in flight.
_FILES, _FILES_PER_WORKER = 16, 5


def check_limits(
    tracklets: Sequence[Tracklet], frames: int, size: tuple[int, int] | None, workers: int, batches: int, processes: int
) -> None:
    """Raise a UserError if so many workers would soon need more shared memory or open files than there are.

    Args:
        tracklets: the data; the size of a frame is estimated from a few of them.
        frames: frames per batch.
        size: height and width to which each frame is resized, if it is.
        workers: workers per process.
        batches: batches per epoch.
        processes: processes on this machine.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < _open_files(limit) + _FILES + _FILES_PER_WORKER * workers:
        raise open_files_error()
    if not SHARED_MEMORY.is_dir():
        return
    rounding = 2 * mmap.PAGESIZE  # pixels and labels are each rounded up to a page
    batch = frames * _mean_frame_bytes(tracklets, size) + rounding
    # Besides the prefetched ones: the batch in use, and the previous one until its variable is rebound.
    count = min(PREFETCH * workers + 2, batches) * processes
    free = shared_memory_size(free=True)
    if count * batch > free:
        raise shared_memory_error(
            f"{mib(free)} free in {SHARED_MEMORY} are too few for {count} batches of {mib(batch)}, {PREFETCH} ahead "
            "for each worker"
        )


def _mean_frame_bytes(tracklets: Sequence[Tracklet], size: tuple[int, int] | None) -> int:
    """Return the mean over a sample of frames, 0 if none can be read: the loader then raises the reason."""
    if size is not None:
        return size[0] * size[1] * 3
    read = []
    for index in sorted({place * len(tracklets) // _SAMPLED_TRACKLETS for place in range(_SAMPLED_TRACKLETS)}):
        with suppress(UserError):
            frames = tracklets[index].frames
            read.append(read_pixels(frames[len(frames) // 2]).nbytes)
    return sum(read) // max(1, len(read))


def _open_files(limit: int) -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # listing needs one more open file than is allowed
        return limit
