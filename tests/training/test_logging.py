from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from training.logging import RunLog


def test_the_progress_of_a_long_run_fits_in_80_columns(tmp_path: Path) -> None:
    page = io.StringIO()
    console = Console(file=page, width=80, force_terminal=True, color_system=None)
    with RunLog(tmp_path, console, batches=15, epochs=900) as log:
        for step in range(1, 12001):
            if step > 11990:
                log.step(800, step, {"identity": 5.25, "video": 4.5, "part": 3.0}, frames=160, seconds=0.01)
    shown = page.getvalue().rpartition("epoch 800")[2].splitlines()[0].rstrip()
    assert len("epoch 800" + shown) <= 80
    assert "12000/13500 ETA " in shown
    assert shown.endswith("loss 12.750  16000 frames/s")
