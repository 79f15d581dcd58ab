"""The baseline with the triplet loss on its clips."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+Lv",
    changes={"rru": "none", "head": "baseline", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (72.2, 89.7, 97.5),
        "prid-2011": (88.0, 97.2, 99.9),
    },
)
