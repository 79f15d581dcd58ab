"""STIM on the backbone's maps, unrefined."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+STIM+Lv",
    changes={"rru": "none", "head": "stim", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (77.3, 92.8, 97.7),
        "prid-2011": (91.1, 98.6, 100.0),
        "mars": (71.1, 83.2, 92.4, 96.1),
    },
)
