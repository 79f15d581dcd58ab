"""A training run that ends with the same results however often it was killed: begun, continued or only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.config.settings import Options, Settings, choose_device, differences, resolve, trained_on
from training.data.tracklets import Split
from training.engine import checkpoint
from training.engine.checkpoint import CONFIG
from training.engine.metrics_log import METRICS
from training.engine.run import check_free, read_split, train_run
from training.runtime.atomic_files import write_whole
from training.runtime.errors import UserError

RESULT = "result.json"  # of a finished run: its config, and its results


def run(options: Options) -> list[dict[str, Any]]:
    """Train what the options say in `options.output`, or continue it there, or read what came out if it is finished.

    A run that was killed is continued from its last complete checkpoint, and begun again if it has none.

    Args:
        options: with an output, and nothing to resume.

    Returns:
        The run's results as `Result.record()` has them, in order of epochs, the untrained network's first where the
        recipe evaluates it.

    Raises:
        UserError: the options or the data cannot be used, training diverged, or the folder holds something else, such
            as a run of other settings.
    """
    folder = options.output
    if folder is None or options.resume is not None:
        raise UserError(f"output: got {folder} with resume {options.resume}, wanted a folder, and nothing to resume")
    settings = resolve(options, None)
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
        records = train_run(folder, settings, split, resumed, options)
        results = [{name: value for name, value in record.items() if name != "kind"} for record in records]
        config = settings.fitted(split).config(split, choose_device(options.device))
        write_whole(folder / RESULT, json.dumps({**config, "results": results}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output: {error}") from error
    return results


def _read(path: Path) -> Any:
    """What a file holds, or `None` where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"output: {path} cannot be read ({error})") from error


def _check_same(path: Path, config: Any, settings: Settings, split: Split) -> None:
    """Raise if what a run's file says it was made of is not what is asked for."""
    other = differences(Settings.from_config(config, path), settings.fitted(split))
    if not other and any(config[name] != value for name, value in trained_on(split).items()):
        other = f"other data ({config['data']})"
    if other:
        raise UserError(f"output: {path} is of a run with {other}; wanted the same settings, or another output")
