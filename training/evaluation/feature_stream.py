"""Features of many tracks that grow frame by frame, as a video is decoded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.data.resizing import Resize
from training.evaluation.features import CHUNK, read_maps
from training.evaluation.ranking import Floats
from training.model.network import Network, StreamState
from training.runtime.errors import UserError


class FeatureStream:
    """Features of tracks whose frames arrive one by one, interleaved; each is that of `extract` over the whole track.

    Memory is that of one chunk of frames, and of a state and a frame for each track that has not ended.

    Args:
        network: in eval mode; computes on its own device and in its own dtype.
        chunk: frames per forward pass of the backbone, of any tracks.
        resize: where frames are resized.
    """

    def __init__(self, network: Network, chunk: int = CHUNK, resize: Resize = "device") -> None:
        self._network, self._chunk, self._resize = network, chunk, resize
        self._waiting: dict[int, list[np.ndarray]] = {}  # frames that the network has not seen
        self._ended: set[int] = set()
        self._states: dict[int, StreamState] = {}
        self._sums: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}
        self._features: dict[int, Floats] = {}

    def add(self, track: int, frame: np.ndarray) -> None:
        """Append a frame, (h, w, 3) uint8 RGB, to a track that has not ended."""
        self._waiting.setdefault(track, []).append(frame)
        # One frame of each open track is held back: the head has to know which is the last.
        if sum(map(len, self._waiting.values())) - len(self._waiting) >= self._chunk:
            self._run()

    def end(self, track: int) -> None:
        """Declare that a track has all its frames."""
        self._ended.add(track)

    def finish(self) -> dict[int, Floats]:
        """End all tracks, and return their features (D,) float64 by track.

        Raises:
            UserError: a feature is not finite.
        """
        self._ended |= self._waiting.keys()
        self._run()
        return self._features

    @torch.no_grad()
    def _run(self) -> None:
        """Run all frames but those held back through the network."""
        ready = {track: frames if track in self._ended else frames[:-1] for track, frames in self._waiting.items()}
        ready = {track: frames for track, frames in ready.items() if frames}
        if not ready:
            return
        self._waiting = {track: [frames[-1]] for track, frames in self._waiting.items() if track not in self._ended}
        maps = read_maps(self._network, [frame for frames in ready.values() for frame in frames], self._resize)
        start = 0
        for track, frames in ready.items():
            self._append(track, maps[start : start + len(frames)], last=track in self._ended)
            start += len(frames)

    def _append(self, track: int, maps: Tensor, last: bool) -> None:
        """Continue a track by the maps of its next frames, (T, C, H, W)."""
        lengths = torch.tensor([len(maps)], device=maps.device)
        part, state = self._network.stream(maps[None], lengths, last, self._states.pop(track, StreamState()))
        total = self._sums.pop(track, torch.zeros_like(part[0], dtype=torch.float64)) + part[0]
        length = self._lengths.pop(track, 0) + len(maps)
        if not last:
            self._states[track], self._sums[track], self._lengths[track] = state, total, length
            return
        self._ended.discard(track)
        feature = (total / length).cpu().numpy()
        if not np.isfinite(feature).all():
            raise UserError(f"track {track}: its feature is not finite; the network's weights have diverged")
        self._features[track] = feature
