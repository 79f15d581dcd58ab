"""The RRU whose gate sees the frame and the state themselves, no differences."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU(od)+Lv",
    changes={"rru": "both", "rru_inputs": "raw", "head": "baseline", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (73.3, 90.4, 95.5),
        "prid-2011": (89.2, 98.5, 100.0),
    },
)
