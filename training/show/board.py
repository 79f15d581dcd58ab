"""What TensorBoard shows of a network in training: the same few probes after every evaluation."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from training.data.resizing import Resize
from training.data.tracklets import Split
from training.evaluation.scoring import Compared
from training.model.network import Network
from training.show import features, ranking

PROBES, TOP, FRAMES = 3, 4, 4  # half a second of drawing


def pictures(network: Network, split: Split, compared: Compared, resize: Resize) -> dict[str, Figure]:
    """Who is found for a few probes, and with an RRU the maps around its gate for the first that has two frames.

    Args:
        network: as it is now.
        split: what it is tested on.
        compared: the split's tracklets by its features.
        resize: who resizes frames.
    """
    probes = np.unique(np.linspace(0, len(split.query) - 1, PROBES).round().astype(np.int64))
    shown = {"ranking": ranking.picture(ranking.found(compared, split, TOP, probes))}
    moving = next((tracklet for tracklet in split.query if len(tracklet.frames) > 1), None)
    if network.rru is not None and moving is not None:
        shown["gate"] = features.picture([features.maps_of(network, moving, resize=resize)], FRAMES)
    return shown
