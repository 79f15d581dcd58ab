"""A training run that ends with the same results however often it is killed: begun, continued or only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.config.settings import Settings
from training.data.tracklets import Split
from training.engine import checkpoint
from training.engine.checkpoint import CONFIG
from training.engine.metrics_log import METRICS
from training.engine.options import Options
from training.engine.run import Draw, check_free, read_split, train_run
from training.engine.run_record import differences, run_record, settings_from_record, train_fingerprint
from training.runtime.atomic_files import write_atomic
from training.runtime.device import choose_device
from training.runtime.errors import UserError

RESULT = "result.json"  # of a finished run: its config, and its results


def run(options: Options, draw: Draw | None = None) -> list[dict[str, Any]]:
    """Train what the options say in `options.output`, or continue it there, or read what came out if it is finished.

    A run that was killed is continued from its last complete checkpoint, and begun again if it has none.

    Args:
        options: with an output, and nothing to resume.
        draw: pictures of the network after every evaluation, if any.

    Returns:
        The run's results as `Result.record()` has them, in order of epochs, the untrained network's first where the
        recipe evaluates it.

    Raises:
        UserError: the options or the data cannot be used, training diverged, or the folder holds something else, such
            as a run of other settings.
    """
    folder = options.output
    if folder is None or options.base.resume is not None:
        got = f"{folder} with resume {options.base.resume}"
        raise UserError(f"output: got {got}, wanted a folder, and nothing to resume")
    settings = options.settings
    split = read_split(settings)
    finished = _read(folder / RESULT)
    if finished is not None:
        _check_same(folder / RESULT, finished, settings, split)
        if not isinstance(finished.get("results"), list):
            raise UserError(f"output: {folder / RESULT} holds no results, wanted a finished run's; remove it")
        results: list[dict[str, Any]] = finished["results"]
        return results
    resumed = checkpoint.load(folder) if checkpoint.last(folder) else None
    begun = resumed.config if resumed else _read(folder / CONFIG)
    if begun is None:
        check_free(folder)
    else:
        _check_same((resumed.folder if resumed else folder) / CONFIG, begun, settings, split)
    if resumed and not (folder / METRICS).is_file():
        raise UserError(f"output: {folder / METRICS} is missing, wanted what the run measured; remove {folder}")
    try:
        records = train_run(folder, settings, split, resumed, options.machine, draw)
        results = [{name: value for name, value in record.items() if name != "kind"} for record in records]
        config = run_record(_clamped(settings, split), split, choose_device(options.machine.device))
        write_atomic(folder / RESULT, json.dumps({**config, "results": results}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output: {error}") from error
    return results


def _read(path: Path) -> Any:
    """Return the content of a file, or None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"output: {path} cannot be read ({error})") from error


def _check_same(path: Path, config: Any, settings: Settings, split: Split) -> None:
    """Raise if what a run's file says it was made of is not what is asked for."""
    other = differences(settings_from_record(config, path), _clamped(settings, split))
    if not other and any(config.get(name) != value for name, value in train_fingerprint(split).items()):
        other = f"other data ({config['data']})"
    if other:
        raise UserError(f"output: {path} is of a run with {other}; wanted the same settings, or another output")


def _clamped(settings: Settings, split: Split) -> Settings:
    return settings.clamp_identities(len(split.train_people))
