"""The rows of the paper's Table 1, in its order; the four that have figures for MARS are its Table 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One network of the paper's tables, and how well it did there.

    name: the paper's.
    changes: what the row makes of a recipe, by the recipe's fields.
    paper: its figures in percent by dataset: rank-1, rank-5, rank-20, and for MARS mAP before them.
    """

    name: str
    changes: Mapping[str, Any]
    paper: Mapping[str, tuple[float, ...]]


_ROWS = (
    # The mean of the backbone's maps, identified: no triplet loss.
    Row(
        name="Baseline",
        changes={"rru": "none", "head": "baseline", "video_loss": False, "part_loss": False},
        paper={
            "ilids-vid": (57.7, 78.9, 91.3),
            "prid-2011": (84.4, 96.2, 99.5),
            "mars": (64.7, 81.7, 91.8, 96.2),
        },
    ),
    # The baseline with the triplet loss on its clips.
    Row(
        name="Baseline+Lv",
        changes={"rru": "none", "head": "baseline", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (72.2, 89.7, 97.5),
            "prid-2011": (88.0, 97.2, 99.9),
        },
    ),
    # An LSTM over the frames in place of their mean.
    Row(
        name="Baseline+LSTM+Lv",
        changes={"rru": "none", "head": "lstm", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (71.5, 90.4, 96.5),
            "prid-2011": (86.7, 97.1, 99.8),
        },
    ),
    # STIM on the backbone's maps, unrefined.
    Row(
        name="Baseline+STIM+Lv",
        changes={"rru": "none", "head": "stim", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (77.3, 92.8, 97.7),
            "prid-2011": (91.1, 98.6, 100.0),
            "mars": (71.1, 83.2, 92.4, 96.1),
        },
    ),
    # The RRU with its spatial attention alone.
    Row(
        name="Baseline+RRU(s)+Lv",
        changes={"rru": "spatial", "head": "baseline", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (73.5, 90.4, 97.0),
            "prid-2011": (90.8, 98.5, 99.9),
        },
    ),
    # The RRU with its channel attention alone.
    Row(
        name="Baseline+RRU(c)+Lv",
        changes={"rru": "channel", "head": "baseline", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (73.4, 90.0, 96.0),
            "prid-2011": (88.7, 97.6, 99.8),
        },
    ),
    # The RRU whose gate sees the difference of appearance, no motion.
    Row(
        name="Baseline+RRU(ad)+Lv",
        changes={"rru": "both", "rru_inputs": "appearance", "head": "baseline", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (74.0, 89.8, 96.7),
            "prid-2011": (90.1, 97.6, 99.9),
        },
    ),
    # The RRU whose gate sees the frame and the state themselves, no differences.
    Row(
        name="Baseline+RRU(od)+Lv",
        changes={"rru": "both", "rru_inputs": "raw", "head": "baseline", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (73.3, 90.4, 95.5),
            "prid-2011": (89.2, 98.5, 100.0),
        },
    ),
    # The RRU, and the mean of what it refined.
    Row(
        name="Baseline+RRU+Lv",
        changes={"rru": "both", "head": "baseline", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (75.0, 90.9, 97.0),
            "prid-2011": (91.3, 98.3, 99.9),
        },
    ),
    # The RRU, and an LSTM over what it refined.
    Row(
        name="Baseline+RRU+LSTM+Lv",
        changes={"rru": "both", "head": "lstm", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (72.3, 90.1, 97.1),
            "prid-2011": (89.6, 98.0, 100.0),
        },
    ),
    # The RRU, and STIM on what it refined.
    Row(
        name="Baseline+RRU+STIM+Lv",
        changes={"rru": "both", "head": "stim", "video_loss": True, "part_loss": False},
        paper={
            "ilids-vid": (80.5, 94.1, 98.8),
            "prid-2011": (91.5, 98.8, 99.9),
            "mars": (72.2, 83.9, 93.4, 95.8),
        },
    ),
    # The paper's whole method: RRU, STIM, and the triplet losses on clips and on strips.
    Row(
        name="Baseline+RRU+STIM+Lv+Lp",
        changes={"rru": "both", "head": "stim", "video_loss": True, "part_loss": True},
        paper={
            "ilids-vid": (84.3, 96.8, 99.5),
            "prid-2011": (92.7, 98.8, 99.8),
            "mars": (72.7, 84.4, 93.2, 96.3),
        },
    ),
)
ROWS: dict[str, Row] = {row.name: row for row in _ROWS}
