"""The mean of the backbone's maps, identified: no triplet loss."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline",
    changes={"rru": "none", "head": "baseline", "video_loss": False, "part_loss": False},
    paper={
        "ilids-vid": (57.7, 78.9, 91.3),
        "prid-2011": (84.4, 96.2, 99.5),
        "mars": (64.7, 81.7, 91.8, 96.2),
    },
)
