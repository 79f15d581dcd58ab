"""A tracklet to the feature it is compared by, over all its frames."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from training.data.loading import frames_to_input
from training.data.tracklets import Tracklet, read_frame
from training.errors import UserError
from training.evaluation.ranking import Floats
from training.model.network import Network

CHUNK = 64  # frames through the backbone at once: bounds the memory of a long tracklet


@torch.no_grad()
def extract(network: Network, tracklets: Iterable[Tracklet], chunk: int = CHUNK) -> Floats:
    """The features of tracklets, each over all its frames in order, in eval mode; the network's mode is restored.

    Args:
        network: on the device that does the work.
        tracklets: N of them.
        chunk: frames that go through the backbone at once.

    Returns:
        (N, D) float64.

    Raises:
        UserError: a frame cannot be read, or a feature is not finite.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        rows = []
        for tracklet in tracklets:
            maps = []
            for start in range(0, len(tracklet.frames), chunk):
                frames = [read_frame(frame) for frame in tracklet.frames[start : start + chunk]]
                maps.append(network.backbone(frames_to_input(frames, network.backbone.size, device))[0])
            feature = network.embed(torch.cat(maps)[None])[0][0]
            if not feature.isfinite().all():
                raise UserError(f"{tracklet.name}: its feature is not finite; the network's weights have diverged")
            rows.append(feature.double().cpu().numpy())
        return np.stack(rows)
    finally:
        network.train(was_training)
