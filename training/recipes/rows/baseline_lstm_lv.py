"""An LSTM over the frames in place of their mean."""

from training.recipes.rows.row import Row

ROW = Row(
    name="Baseline+LSTM+Lv",
    changes={"rru": "none", "head": "lstm", "video_loss": True, "part_loss": False},
    paper={
        "ilids-vid": (71.5, 90.4, 96.5),
        "prid-2011": (86.7, 97.1, 99.8),
    },
)
