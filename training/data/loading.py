"""From tracklets to the network's input: clips are read as uint8 at their own size, and resized on the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from training.data.sampler import Clip, PeopleSampler
from training.data.tracklets import Tracklet, people_of, read_frame
from training.errors import UserError


@dataclass
class Batch:
    """B clips of T frames each.

    Args:
        frames: B*T of (3, h, w) uint8, each at its own size, clip by clip.
        labels: (B,) int64, the index of each clip's person among the sorted people trained on.
        clips: B names for messages, e.g. "cam1/person001[12:20]".
    """

    frames: list[torch.Tensor]
    labels: torch.Tensor
    clips: list[str]

    def __getstate__(self) -> dict[str, Any]:
        # A tensor that crosses from a worker holds a file descriptor: one for all frames, not one a frame.
        pixels = torch.cat([frame.flatten() for frame in self.frames])
        return {**vars(self), "frames": (pixels, [frame.shape for frame in self.frames])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pixels, shapes = state["frames"]
        parts = pixels.split([shape.numel() for shape in shapes])
        vars(self).update(state, frames=[part.view(shape) for part, shape in zip(parts, shapes, strict=True)])


class _Clips(Dataset["Batch | UserError"]):
    """Batches of clips, looked up by what the sampler yields; an error is returned, for the loader to raise."""

    def __init__(self, tracklets: Sequence[Tracklet], frames: int) -> None:
        self._tracklets, self._frames = tracklets, frames
        self._label = {person: label for label, person in enumerate(people_of(tracklets))}

    def __getitem__(self, clips: list[Clip]) -> Batch | UserError:
        frames, names = [], []
        try:
            for index, first in clips:
                tracklet = self._tracklets[index]
                window = tracklet.frames[first : first + self._frames]
                frames += [read_frame(frame) for frame in window]
                frames += [frames[-1]] * (self._frames - len(window))
                names.append(f"{tracklet.name}[{first}:{first + len(window)}]")
        except UserError as error:
            return error
        labels = torch.tensor([self._label[self._tracklets[index].person] for index, _ in clips])
        return Batch(frames, labels, names)


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


def make_loader(tracklets: Sequence[Tracklet], sampler: PeopleSampler, frames: int, workers: int) -> DataLoader[Any]:
    """Make the loader of one epoch's batches after another; `sampler.set_epoch` says which.

    Args:
        tracklets: those the sampler was given.
        sampler: the order.
        frames: T, frames a clip; a shorter tracklet repeats its last frame.
        workers: processes that read ahead, 0 to read in this one; the batches are the same.

    Returns:
        A DataLoader of `Batch`; iterating it raises a UserError that names a frame which cannot be read.
    """
    return _Loader(
        _Clips(tracklets, frames),
        batch_size=None,  # the sampler yields whole batches
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_is,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # keeps the loader from drawing on the global generator
    )


def frames_to_input(
    frames: Sequence[torch.Tensor],
    size: tuple[int, int],
    device: torch.device | str,
    mean: float = 0.5,
    std: float = 0.5,
) -> torch.Tensor:
    """Resize and normalise frames on the device, frames of equal size together.

    Args:
        frames: N of (3, h, w) uint8, of any sizes.
        size: height and width of the result, pixels.
        device: where to compute.
        mean: subtracted, after scaling to [0, 1].
        std: divided by, after that.

    Returns:
        (N, 3, *size) float32 on `device`, in the order given.
    """
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for index, frame in enumerate(frames):
        alike[frame.shape].append(index)
    result = torch.empty(len(frames), 3, *size, device=device)
    for indices in alike.values():
        pixels = torch.stack([frames[index] for index in indices]).to(device)
        pixels = transforms.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True)
        result[indices] = pixels.float().div_(255).sub_(mean).div_(std)
    return result
