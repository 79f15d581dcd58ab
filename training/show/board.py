"""Pictures of a network in training for TensorBoard: the same few queries after every evaluation."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from training.data.resizing import Resize
from training.data.tracklets import Split
from training.evaluation.scoring import EmbeddedSplit
from training.model.network import Network
from training.show import features, ranking

QUERIES, TOP, FRAMES = 3, 4, 4  # takes 0.5 s to draw


def pictures(network: Network, split: Split, embedded: EmbeddedSplit, resize: Resize) -> dict[str, Figure]:
    """Draw the search results of a few queries and, with an RRU, the maps around its gate.

    Args:
        network: the network in training.
        split: the split it is evaluated on.
        embedded: the split's features.
        resize: where frames are resized.

    Returns:
        "ranking" and, with an RRU and a query of two frames or more, "gate".
    """
    queries = np.unique(np.linspace(0, len(split.query) - 1, QUERIES).round().astype(np.int64))
    shown = {"ranking": ranking.picture(ranking.search(embedded, split, TOP, queries))}
    moving = next((tracklet for tracklet in split.query if len(tracklet.frames) > 1), None)
    if network.rru is not None and moving is not None:
        shown["gate"] = features.picture([features.maps_of(network, moving, resize=resize)], FRAMES)
    return shown
