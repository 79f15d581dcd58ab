"""The RRU, and STIM on what it refined."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU+STIM+Lv",
    changes={"rru": "both", "head": "stim", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (80.5, 94.1, 98.8),
        "prid-2011": (91.5, 98.8, 99.9),
        "mars": (72.2, 83.9, 93.4, 95.8),
    },
)
