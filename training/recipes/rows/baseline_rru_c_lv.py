"""The RRU with its channel attention alone."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU(c)+Lv",
    changes={"rru": "channel", "head": "baseline", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (73.4, 90.0, 96.0),
        "prid-2011": (88.7, 97.6, 99.8),
    },
)
