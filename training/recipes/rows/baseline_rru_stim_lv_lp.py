"""The paper's whole method: RRU, STIM, and the triplet losses on clips and on strips."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU+STIM+Lv+Lp",
    changes={"rru": "both", "head": "stim", "video_loss": True, "part_loss": True},
    paper={
        "ilids-vid": (84.3, 96.8, 99.5),
        "prid-2011": (92.7, 98.8, 99.8),
        "mars": (72.7, 84.4, 93.2, 96.3),
    },
)
