"""Runs on little data, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.engine import checkpoint
from training.engine.options import Options, make_options


def options(data: Path, output: Path, **changes: Any) -> Options:
    """Recipe `quick` on little, without pictures: 4 people, 2 batches an epoch."""
    small = {"people": 4, "batches": 2, "epochs": 2, "compare_ops": False, "device": "cpu", "check_counts": False}
    where = {"dataset": "ilids-vid", "data_root": data, "output": output, "pictures": False}
    return make_options(**{**where, **small, **changes})


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the measurements of a run, without those of speed."""
    speed = ("frames_per_second", "data_wait")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in speed} for record in records]


def last(run: Path) -> Path:
    """The folder of a run's last checkpoint."""
    folder = checkpoint.last(run)
    assert folder is not None
    return folder
