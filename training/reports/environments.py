"""Environments that the runs of a report were computed in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.engine.resumable_run import RESULT


def environments_of(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the distinct environments of finished runs, in the order of the runs.

    There is more than one if the runs were computed on several machines or by several versions.

    Args:
        runs: their folders.
    """
    distinct: list[dict[str, Any]] = []
    for run in runs:
        environment = json.loads((run / RESULT).read_text())["environment"]
        if environment not in distinct:
            distinct.append(environment)
    return distinct
