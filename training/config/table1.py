"""The rows of the paper's Table 1, in its order; the four that have figures for MARS are its Table 3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from training.config.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One network of the paper's tables: the options that it sets.

    rru_inputs: the recipe's if None.
    """

    rru: Literal["none", "both", "spatial", "channel"]
    head: Literal["baseline", "lstm", "stim"]
    video_loss: bool = True
    part_loss: bool = False
    rru_inputs: Literal["appearance+motion", "appearance", "raw"] | None = None

    def apply(self, recipe: Recipe) -> Recipe:
        """Return a recipe that trains this row."""
        inputs = self.rru_inputs or recipe.model.rru_inputs
        return replace(
            recipe,
            model=replace(recipe.model, rru=self.rru, rru_inputs=inputs, head=self.head),
            loss=replace(recipe.loss, video_loss=self.video_loss, part_loss=self.part_loss),
        )


ROWS: dict[str, Row] = {
    "Baseline": Row("none", "baseline", video_loss=False),
    "Baseline+Lv": Row("none", "baseline"),
    "Baseline+LSTM+Lv": Row("none", "lstm"),
    "Baseline+STIM+Lv": Row("none", "stim"),
    "Baseline+RRU(s)+Lv": Row("spatial", "baseline"),
    "Baseline+RRU(c)+Lv": Row("channel", "baseline"),
    "Baseline+RRU(ad)+Lv": Row("both", "baseline", rru_inputs="appearance"),  # appearance's difference, no motion
    "Baseline+RRU(od)+Lv": Row("both", "baseline", rru_inputs="raw"),  # frame and state themselves, no differences
    "Baseline+RRU+Lv": Row("both", "baseline"),
    "Baseline+RRU+LSTM+Lv": Row("both", "lstm"),
    "Baseline+RRU+STIM+Lv": Row("both", "stim"),
    "Baseline+RRU+STIM+Lv+Lp": Row("both", "stim", part_loss=True),
}
FULL = replace(ROWS["Baseline+RRU+STIM+Lv+Lp"], rru_inputs="appearance+motion")  # the options that rows set

# Percent: rank-1, rank-5 and rank-20 on iLIDS-VID and on PRID-2011; mAP and these on MARS.
_PAPER: dict[str, tuple[tuple[float, ...], ...]] = {
    "Baseline": ((57.7, 78.9, 91.3), (84.4, 96.2, 99.5), (64.7, 81.7, 91.8, 96.2)),
    "Baseline+Lv": ((72.2, 89.7, 97.5), (88.0, 97.2, 99.9)),
    "Baseline+LSTM+Lv": ((71.5, 90.4, 96.5), (86.7, 97.1, 99.8)),
    "Baseline+STIM+Lv": ((77.3, 92.8, 97.7), (91.1, 98.6, 100.0), (71.1, 83.2, 92.4, 96.1)),
    "Baseline+RRU(s)+Lv": ((73.5, 90.4, 97.0), (90.8, 98.5, 99.9)),
    "Baseline+RRU(c)+Lv": ((73.4, 90.0, 96.0), (88.7, 97.6, 99.8)),
    "Baseline+RRU(ad)+Lv": ((74.0, 89.8, 96.7), (90.1, 97.6, 99.9)),
    "Baseline+RRU(od)+Lv": ((73.3, 90.4, 95.5), (89.2, 98.5, 100.0)),
    "Baseline+RRU+Lv": ((75.0, 90.9, 97.0), (91.3, 98.3, 99.9)),
    "Baseline+RRU+LSTM+Lv": ((72.3, 90.1, 97.1), (89.6, 98.0, 100.0)),
    "Baseline+RRU+STIM+Lv": ((80.5, 94.1, 98.8), (91.5, 98.8, 99.9), (72.2, 83.9, 93.4, 95.8)),
    "Baseline+RRU+STIM+Lv+Lp": ((84.3, 96.8, 99.5), (92.7, 98.8, 99.8), (72.7, 84.4, 93.2, 96.3)),
}


def paper_figures(row: str) -> dict[str, tuple[float, ...]]:
    """Return a row's figures in the paper, percent, by dataset: of MARS where Table 3 has the row."""
    return dict(zip(("ilids-vid", "prid-2011", "mars"), _PAPER[row], strict=False))
