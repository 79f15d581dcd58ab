"""The RRU, and the mean of what it refined."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU+Lv",
    changes={"rru": "both", "head": "baseline", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (75.0, 90.9, 97.0),
        "prid-2011": (91.3, 98.3, 99.9),
    },
)
