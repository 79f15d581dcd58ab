"""A tracklet to the feature it is compared by, over all its frames."""

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

CHUNK = 64  # frames through the network at once: bounds the memory of a long tracklet


@torch.no_grad()
def extract(network: Network, tracklets: Sequence[Tracklet], chunk: int = CHUNK, resize: Resize = "device") -> Floats:
    """The features of tracklets, each over all its frames in order, in eval mode; the network's mode is restored.

    A long tracklet goes through chunk by chunk, in the memory of one chunk; short ones go through together. Several
    processes share the tracklets, and each gets all features.

    Args:
        network: on the device and of the dtype that do the work.
        tracklets: N of them.
        chunk: frames that go through at once, padding included.
        resize: who resizes frames.

    Returns:
        (N, D) float64, in the order of `tracklets`.

    Raises:
        UserError: a frame cannot be read, a feature is not finite, or the chunk has no frame.
    """
    if chunk < 1:
        raise UserError(f"chunk: got {chunk}, wanted at least 1 frame")
    features = np.zeros((len(tracklets), network.head.features))
    was_training = network.training
    network.eval()
    try:
        groups = _alike([len(tracklet.frames) for tracklet in tracklets], chunk)
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
        return distributed.total(torch.from_numpy(features)).numpy()  # a sum with zeros: to the bit
    finally:
        network.train(was_training)


def read_maps(network: Network, frames: Sequence[Frame], resize: Resize) -> Tensor:
    """Read N frames and send them through the backbone: maps (N, C, H, W) before the RRU, on the network's device.

    Args:
        network: in eval mode.
        frames: what to read.
        resize: who resizes them.

    Raises:
        UserError: a frame cannot be read.
    """
    weight, size = next(network.parameters()), network.backbone.size
    pixels = [read_frame(frame, size if resize == "pillow" else None) for frame in frames]
    maps: Tensor = network.backbone(frames_to_input(pixels, size, weight.device).to(weight.dtype))[0]
    return maps


def _alike(lengths: Sequence[int], chunk: int) -> list[list[int]]:
    """Group tracklets, as indices, so that a group padded to its longest fits in a chunk; longer ones stay alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):  # stable, and neighbours need little padding
        if groups and (len(groups[-1]) + 1) * lengths[index] <= chunk:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _features(
    network: Network, tracklets: Sequence[Tracklet], chunk: int, resize: Resize, advance: Callable[[float], None]
) -> Tensor:
    """The features (B, D), float64, of tracklets of at most `chunk` frames, or of one that is longer."""
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
