"""Load clips of tracklets as uint8 batches, and resize and normalize them on the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.data.resizing import resize
from training.data.sampler import Clip, IdentitySampler
from training.data.tracklets import Tracklet, people_of, read_pixels
from training.data.worker_limits import PREFETCH, check_limits
from training.data.workers import exit_if_sending_fails, move_to_shared_memory
from training.runtime import distributed
from training.runtime.errors import UserError


@dataclass
class Batch:
    """B clips of T frames each.

    Args:
        pixels: uint8, the frames one after another, each (h, w, 3) at its own size: one tensor, so that a batch is sent
            by a worker, or copied to a device, in one transfer.
        sizes: (h, w) of the B*T frames, clip by clip.
        labels: (B,) int64, the index of each clip's person among the sorted people trained on.
        clips: B names for messages, e.g. "cam1/person001[12:20]".
    """

    pixels: torch.Tensor
    sizes: list[tuple[int, int]]
    labels: torch.Tensor
    clips: list[str]

    @property
    def frames(self) -> list[torch.Tensor]:
        """The B*T frames, each (3, h, w) uint8, as views of `pixels`."""
        parts = torch.split(self.pixels, [h * w * 3 for h, w in self.sizes])
        return [part.view(h, w, 3).permute(2, 0, 1) for part, (h, w) in zip(parts, self.sizes, strict=True)]

    def pin_memory(self) -> Batch:
        """Copy to pinned memory; called by a DataLoader with pin_memory."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Copy to a device, asynchronously if from pinned memory."""
        pixels, labels = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.labels))
        return replace(self, pixels=pixels, labels=labels)


class _Clips(Dataset["Batch | UserError"]):
    """Batches of clips, indexed by the sampler's lists of clips; errors are returned, for the loader to raise."""

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
        if get_worker_info() is not None and (shortage := move_to_shared_memory(pixels, labels)):
            return shortage
        return Batch(pixels, [(frame.shape[0], frame.shape[1]) for frame in frames], labels, names)


class _Loader(DataLoader["Batch | UserError"]):
    """A DataLoader that raises the errors its workers return.

    The message of an exception raised in a worker contains the worker's traceback; a returned one remains one line.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                # Raising `batch` itself would make a reference cycle with this frame and the workers, and garbage
                # collection closes the workers' pipes before it stops the workers.
                raise UserError(str(batch))
            yield batch


def _identity(batch: Any) -> Any:
    return batch


def make_loader(
    tracklets: Sequence[Tracklet],
    sampler: IdentitySampler,
    frames: int,
    workers: int,
    resize: tuple[int, int] | None = None,
    pin: bool = False,
) -> DataLoader[Any]:
    """Make a loader that yields the batches of one epoch; choose the epoch by `sampler.set_epoch`.

    Args:
        tracklets: the tracklets given to the sampler.
        sampler: the sampler of clips.
        frames: T, frames per clip; a shorter tracklet repeats its last frame.
        workers: processes that read ahead, 0 to read in this one; the batches are the same.
        resize: height and width to which Pillow resizes each frame as it is read; if not given, frames are not resized.
        pin: put batches into pinned memory, for asynchronous copies to a GPU.

    Returns:
        A DataLoader of `Batch`; iterating it raises a UserError that names an unreadable frame, or the resource that
        the workers lack.

    Raises:
        UserError: the system has too little shared memory, or allows too few open files, for so many workers.
    """
    if workers:
        frames_per_batch, processes = frames * sampler.clips_per_batch, distributed.local_world()
        check_limits(tracklets, frames_per_batch, resize, workers, len(sampler), processes)
    return _Loader(
        _Clips(tracklets, frames, resize),
        batch_size=None,  # the sampler yields whole batches
        sampler=sampler,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=exit_if_sending_fails,
        generator=torch.Generator(),  # otherwise the loader advances the global generator
    )


def frames_to_input(
    frames: Sequence[torch.Tensor],
    size: tuple[int, int],
    device: torch.device | str,
    mean: float = 0.5,
    std: float = 0.5,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Resize and normalize frames on the device, frames of equal size in one call.

    Args:
        frames: N frames, each (3, h, w) uint8, of any sizes.
        size: height and width of the result, pixels.
        device: the device to compute on.
        mean: subtracted, after scaling to [0, 1].
        std: divided by, after that.
        memory_format: memory format of the result.

    Returns:
        (N, 3, *size) float32 on `device`, in the order given.
    """
    device = torch.device(device)
    # On a CPU PyTorch resizes uint8 directly, several times faster than floats; on a GPU it resizes floats alone.
    dtype = torch.uint8 if device.type == "cpu" else torch.float32
    # Channels last until all are resized: frames are read that way, and it is the fastest layout to resize.
    levels = torch.empty(len(frames), *size, 3, dtype=dtype, device=device).permute(0, 3, 1, 2)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, frame in enumerate(frames):
        by_shape[frame.shape].append(index)
    for indices in by_shape.values():
        pixels = torch.stack([frames[index].permute(1, 2, 0) for index in indices]).to(device).permute(0, 3, 1, 2)
        levels[indices] = resize(pixels.to(dtype), size)
    return levels.to(torch.float32, memory_format=memory_format).div_(255).sub_(mean).div_(std)
