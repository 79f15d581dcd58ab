"""A training run that ends with the same results however often it was killed: begun, continued or only read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

from training import checkpoint
from training.errors import UserError
from training.logging import METRICS
from training.settings import Options
from training.train import train


def run(options: Options) -> list[dict[str, Any]]:
    """Train what the options say in `options.output`, or continue it there, and return its results in order of epochs.

    Raises:
        UserError: there is no output, or the options or the data cannot be used.
    """
    folder = options.output
    if folder is None:
        raise UserError("output: got none, wanted a folder")
    if checkpoint.last(folder):
        train(replace(options, resume=folder, output=None))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        train(options)
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [record for record in records if record["kind"] == "result"]
