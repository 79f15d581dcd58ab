"""The RRU with its spatial attention alone."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU(s)+Lv",
    changes={"rru": "spatial", "head": "baseline", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (73.5, 90.4, 97.0),
        "prid-2011": (90.8, 98.5, 99.9),
    },
)
