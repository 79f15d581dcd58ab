"""The RRU whose gate sees the difference of appearance, no motion."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU(ad)+Lv",
    changes={"rru": "both", "rru_inputs": "appearance", "head": "baseline", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (74.0, 89.8, 96.7),
        "prid-2011": (90.1, 97.6, 99.9),
    },
)
