"""The RRU, and an LSTM over what it refined."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+RRU+LSTM+Lv",
    changes={"rru": "both", "head": "lstm", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (72.3, 90.1, 97.1),
        "prid-2011": (89.6, 98.0, 100.0),
    },
)
