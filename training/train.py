"""Train the paper's network end to end: `python -m training.train --recipe quick`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

from datetime import datetime
from pathlib import Path

import tyro

from training.config.presets import Recipe
from training.config.settings import Options, Settings, resolve
from training.engine import checkpoint
from training.engine.run import check_free, read_split, train_run
from training.evaluation.result import result_table
from training.runtime import distributed
from training.runtime.atomic_files import resolved
from training.runtime.command import run_command
from training.runtime.errors import UserError
from training.runtime.terminal import say


def train(options: Options) -> None:
    """Train, evaluate, and leave the results in a folder.

    Args:
        options: of the command line; the same in every process.

    Raises:
        UserError: the options, the data or the checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: it was interrupted; the message says what continues it.
    """
    resumed = checkpoint.load(options.resume) if options.resume else None
    settings = resolve(options, Settings.of(resumed) if resumed else None)
    run = distributed.from_main(lambda: _run_folder(options, settings.recipe))
    distributed.keep(lambda: _kept(run))
    epochs = settings.recipe.epochs
    if resumed and resumed.training["epoch"] >= epochs:
        line = f"epoch {resumed.training['epoch']} is reached already, of {epochs}: nothing to train"
        say(f"{line}; --epochs asks for more")
    try:
        split = distributed.main_first(lambda: read_split(settings))  # which may render it
        records = train_run(run, settings, split, resumed, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_kept(run)}") from None
    except OSError as error:
        raise UserError(f"output: {error}; {_kept(run)}") from error
    if distributed.is_main():
        say(result_table(records))


def _run_folder(options: Options, recipe: Recipe) -> Path:
    """The folder of the run: the resumed one's, or one that holds nothing yet."""
    resumed = checkpoint.run_of(options.resume) if options.resume else None
    if options.output is None and options.resume:
        if resumed is None:
            raise UserError(
                f"resume: {options.resume} is not the last checkpoint of a run, wanted --output for a new one"
            )
        return options.resume if checkpoint.last(options.resume) else resumed
    run = options.output or Path("runs") / f"{recipe.name}-{recipe.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    if resolved(run) != resumed:
        check_free(run)
    return run


def _kept(run: Path) -> str:
    """What a run that ends early can be continued from."""
    kept = checkpoint.last(run)
    if kept is None:
        return f"no epoch was complete, so nothing in {run} can be resumed"
    return f"last good epoch: {int(kept.name.rpartition('-')[2])}; continue with --resume {run}"


if __name__ == "__main__":
    prog = "python -m training.train"
    run_command(lambda: train(tyro.cli(Options, prog=prog, console_outputs=distributed.is_main())), several=True)
