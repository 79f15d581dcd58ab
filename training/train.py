"""Train the paper's network end to end: `python -m training.train --recipe quick`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

from datetime import datetime
from pathlib import Path

from training.config.recipe import Recipe
from training.engine import checkpoint
from training.engine.options import Options, parse_options
from training.engine.run import check_free, read_split, train_run
from training.evaluation.result import result_table
from training.runtime import distributed
from training.runtime.atomic_files import realpath
from training.runtime.command import run_command
from training.runtime.errors import UserError
from training.runtime.terminal import say
from training.show.board import pictures


def train(options: Options) -> None:
    """Train, evaluate, and leave the results in a folder.

    Args:
        options: of the command line; the same in every process.

    Raises:
        UserError: the options, the data or the checkpoint cannot be used, or training diverged.
        KeyboardInterrupt: it was interrupted; the message says what continues it.
    """
    settings, resume = options.settings, options.base.resume
    resumed = checkpoint.load(resume) if resume else None
    if resumed and not resumed.training:
        raise UserError(f"resume: {resume} is a network without the state of its training, wanted a run's folder")
    run = distributed.from_main(lambda: _run_folder(options, settings.recipe))
    distributed.set_resume_hint(lambda: _resume_hint(run))
    epochs = settings.recipe.epochs
    if resumed and resumed.training["epoch"] >= epochs:
        line = f"epoch {resumed.training['epoch']} is reached already, of {epochs}: nothing to train"
        say(f"{line}; --epochs asks for more")
    try:
        split = distributed.main_first(lambda: read_split(settings))  # which may render it
        records = train_run(
            run, settings, split, resumed, options.machine, pictures if options.machine.pictures else None
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_resume_hint(run)}") from None
    except OSError as error:
        raise UserError(f"output: {error}; {_resume_hint(run)}") from error
    if distributed.is_main():
        say(result_table(records))
        say(f"results, last checkpoint and TensorBoard's events: {run}")


def _run_folder(options: Options, recipe: Recipe) -> Path:
    """Return the folder of the run: the resumed one's, or one that holds nothing yet."""
    resume = options.base.resume
    resumed = checkpoint.run_folder_of(resume) if resume else None
    if options.output is None and resume:
        if resumed is None:
            raise UserError(f"resume: {resume} is not the last checkpoint of a run, wanted --output for a new one")
        return resume if checkpoint.last(resume) else resumed
    run = options.output or Path("runs") / f"{recipe.name}-{recipe.data.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    if realpath(run) != resumed:
        check_free(run)
    return run


def _resume_hint(run: Path) -> str:
    """Return how to continue a run that ends early."""
    last = checkpoint.last(run)
    if last is None:
        return f"no epoch was complete, so nothing in {run} can be resumed"
    return f"last good epoch: {int(last.name.rpartition('-')[2])}; continue with --resume {run}"


if __name__ == "__main__":
    run_command(lambda: train(parse_options("python -m training.train")), several=True)
