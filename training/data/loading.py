"""From tracklets to the network's input: clips are read as uint8, and resized on the device unless Pillow is to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.data.resizing import resize
from training.data.sampler import Clip, PeopleSampler
from training.data.tracklets import Tracklet, people_of, read_pixels
from training.data.workers import AHEAD, check_limits, end_where_sending_fails, share
from training.runtime import distributed
from training.runtime.errors import UserError


@dataclass
class Batch:
    """B clips of T frames each.

    Args:
        pixels: uint8, the frames one after another, each (h, w, 3) at its own size: one tensor, so that what crosses
            from a worker, or to a device, does so at once.
        sizes: (h, w) of B*T frames, clip by clip.
        labels: (B,) int64, the index of each clip's person among the sorted people trained on.
        clips: B names for messages, e.g. "cam1/person001[12:20]".
    """

    pixels: torch.Tensor
    sizes: list[tuple[int, int]]
    labels: torch.Tensor
    clips: list[str]

    @property
    def frames(self) -> list[torch.Tensor]:
        """B*T of (3, h, w) uint8, views of `pixels`."""
        parts = torch.split(self.pixels, [h * w * 3 for h, w in self.sizes])
        return [part.view(h, w, 3).permute(2, 0, 1) for part, (h, w) in zip(parts, self.sizes, strict=True)]

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from while the CPU goes on; a DataLoader that pins asks for it."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory the copy is not waited for."""
        pixels, labels = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.labels))
        return replace(self, pixels=pixels, labels=labels)


class _Clips(Dataset["Batch | UserError"]):
    """Batches of clips, looked up by what the sampler yields; an error is returned, for the loader to raise."""

    def __init__(self, tracklets: Sequence[Tracklet], frames: int, size: tuple[int, int] | None) -> None:
        self._tracklets, self._frames, self._size = tracklets, frames, size
        self._label = {person: label for label, person in enumerate(people_of(tracklets))}

    def __getitem__(self, clips: list[Clip]) -> Batch | UserError:
        frames: list[np.ndarray] = []
        names = []
        try:
            for index, first in clips:
                tracklet = self._tracklets[index]
                window = tracklet.frames[first : first + self._frames]
                frames += [read_pixels(frame, self._size) for frame in window]
                frames += [frames[-1]] * (self._frames - len(window))
                names.append(f"{tracklet.name}[{first}:{first + len(window)}]")
        except UserError as error:
            return error
        labels = torch.tensor([self._label[self._tracklets[index].person] for index, _ in clips])
        pixels = torch.from_numpy(np.concatenate([frame.reshape(-1) for frame in frames]))
        if get_worker_info() is not None and (lacking := share(pixels, labels)):
            return lacking
        return Batch(pixels, [(frame.shape[0], frame.shape[1]) for frame in frames], labels, names)


class _Loader(DataLoader["Batch | UserError"]):
    """A DataLoader that raises the errors its workers return.

    An exception raised in a worker reaches the caller with the worker's traceback pasted into its message; one that is
    returned keeps its one line.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                # Raising `batch` itself would tie it, this frame and the workers into a cycle, and garbage collection
                # closes the workers' pipes before it stops the workers.
                raise UserError(str(batch))
            yield batch


def _as_is(batch: Any) -> Any:
    return batch


def make_loader(
    tracklets: Sequence[Tracklet],
    sampler: PeopleSampler,
    frames: int,
    workers: int,
    resize: tuple[int, int] | None = None,
    pin: bool = False,
) -> DataLoader[Any]:
    """Make the loader of one epoch's batches after another; `sampler.set_epoch` says which.

    Args:
        tracklets: those the sampler was given.
        sampler: the order.
        frames: T, frames a clip; a shorter tracklet repeats its last frame.
        workers: processes that read ahead, 0 to read in this one; the batches are the same.
        resize: height and width to which Pillow resizes each frame as it is read; as they are if not given.
        pin: whether to put batches where a GPU copies from while the CPU goes on.

    Returns:
        A DataLoader of `Batch`; iterating it raises a UserError that names a frame which cannot be read, or what the
        workers lack.

    Raises:
        UserError: the system has too little shared memory, or allows too few open files, for so many workers.
    """
    if workers:
        of_batch, processes = frames * sampler.clips_per_batch, distributed.local_world()
        check_limits(tracklets, of_batch, resize, workers, len(sampler), processes)
    return _Loader(
        _Clips(tracklets, frames, resize),
        batch_size=None,  # the sampler yields whole batches
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=end_where_sending_fails,
        generator=torch.Generator(),  # keeps the loader from drawing on the global generator
    )


def frames_to_input(
    frames: Sequence[torch.Tensor],
    size: tuple[int, int],
    device: torch.device | str,
    mean: float = 0.5,
    std: float = 0.5,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Resize and normalise frames on the device, frames of equal size together; one that has the size stays as it is.

    Args:
        frames: N of (3, h, w) uint8, of any sizes.
        size: height and width of the result, pixels.
        device: where to compute.
        mean: subtracted, after scaling to [0, 1].
        std: divided by, after that.
        memory_format: how the result is stored.

    Returns:
        (N, 3, *size) float32 on `device`, in the order given.
    """
    device = torch.device(device)
    # On a CPU PyTorch resizes uint8 as it is, several times faster than floats; on a GPU floats alone.
    dtype = torch.uint8 if device.type == "cpu" else torch.float32
    # Stored channels last until all is resized: so frames are read, and so they are resized fastest.
    levels = torch.empty(len(frames), *size, 3, dtype=dtype, device=device).permute(0, 3, 1, 2)
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for index, frame in enumerate(frames):
        alike[frame.shape].append(index)
    for indices in alike.values():
        pixels = torch.stack([frames[index].permute(1, 2, 0) for index in indices]).to(device).permute(0, 3, 1, 2)
        levels[indices] = resize(pixels.to(dtype), size)
    return levels.to(torch.float32, memory_format=memory_format).div_(255).sub_(mean).div_(std)
