"""Extract the features that tracklets are compared by, over all their frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.data.loading import frames_to_input
from training.data.resizing import Resize
from training.data.tracklets import Frame, Tracklet, read_frame
from training.evaluation.ranking import Floats
from training.model.network import Network, StreamState
from training.runtime import distributed
from training.runtime.errors import UserError
from training.runtime.terminal import progress

CHUNK = 64  # frames per forward pass: bounds the memory of a long tracklet


@torch.no_grad()
def extract(network: Network, tracklets: Sequence[Tracklet], chunk: int = CHUNK, resize: Resize = "device") -> Floats:
    """Extract the features of tracklets, each over all its frames in order, in eval mode; the mode is restored.

    A long tracklet is processed chunk by chunk, in the memory of one chunk; short ones are batched. Several processes
    share the tracklets, and each gets all features.

    Args:
        network: computes on its own device and in its own dtype.
        tracklets: N of them.
        chunk: frames per forward pass, padding included.
        resize: where frames are resized.

    Returns:
        (N, D) float64, in the order of `tracklets`.

    Raises:
        UserError: a frame cannot be read, a feature is not finite, or the chunk is smaller than one frame.
    """
    if chunk < 1:
        raise UserError(f"chunk: got {chunk}, wanted at least 1 frame")
    features = np.zeros((len(tracklets), network.head.features))
    was_training = network.training
    network.eval()
    try:
        groups = _group_by_length([len(tracklet.frames) for tracklet in tracklets], chunk)
        own = groups[distributed.rank() :: distributed.world()]
        frames = sum(len(tracklets[index].frames) for group in own for index in group)
        with progress("Extracting features", frames, "frames") as advance:
            for group in own:
                members = [tracklets[index] for index in group]
                rows = _features(network, members, chunk, resize, advance).cpu().numpy()
                for tracklet, row in zip(members, rows, strict=True):
                    if not np.isfinite(row).all():
                        line = f"{tracklet.name}: its feature is not finite; the network's weights have diverged"
                        raise UserError(line)
                features[group] = rows
        return distributed.total(torch.from_numpy(features)).numpy()  # each row plus zeros, hence exact
    finally:
        network.train(was_training)


def read_maps(network: Network, frames: Sequence[Frame], resize: Resize) -> Tensor:
    """Read N frames and return the backbone's maps (N, C, H, W), on the network's device.

    Args:
        network: in eval mode.
        frames: N of them.
        resize: where they are resized.

    Raises:
        UserError: a frame cannot be read.
    """
    weight, size = next(network.parameters()), network.backbone.size
    pixels = [read_frame(frame, size if resize == "pillow" else None) for frame in frames]
    maps: Tensor = network.backbone(frames_to_input(pixels, size, weight.device).to(weight.dtype))[0]
    return maps


def _group_by_length(lengths: Sequence[int], chunk: int) -> list[list[int]]:
    """Group tracklets, as indices, so that a group padded to its longest fits in a chunk; longer ones stay alone."""
    groups: list[list[int]] = []
    # Sorted, as similar lengths need little padding.
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= chunk:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _features(
    network: Network, tracklets: Sequence[Tracklet], chunk: int, resize: Resize, advance: Callable[[float], None]
) -> Tensor:
    """Return the features (B, D) float64 of several tracklets within one chunk, or of a single longer one."""
    weight = next(network.parameters())
    frames_of = torch.tensor([len(tracklet.frames) for tracklet in tracklets], device=weight.device)
    longest = max(len(tracklet.frames) for tracklet in tracklets)
    total = torch.zeros(len(tracklets), network.head.features, dtype=torch.float64, device=weight.device)
    carried = StreamState()
    for start in range(0, longest, chunk):
        windows = [tracklet.frames[start : start + chunk] for tracklet in tracklets]
        maps = read_maps(network, list(chain(*windows)), resize)
        padded = pad_sequence(maps.split([len(w) for w in windows]), batch_first=True)  # type: ignore[no-untyped-call]
        lengths = (frames_of - start).clamp(max=chunk)
        part, carried = network.stream(padded, lengths, start + chunk >= longest, carried)
        total += part
        advance(len(maps))
    return total / frames_of[:, None]
