"""Train the rows of the paper's tables and compare: `python -m training.reproduce --table 1`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import time
import warnings
from datetime import timedelta
from typing import Any

from training.engine.resumable_run import RESULT, run
from training.engine.run import read_split
from training.model.backbone import make_backbone
from training.reports.paper_table import Results, terminal
from training.reproduce.options import Options, parse_options
from training.reproduce.plan import Plan, make_plan
from training.reproduce.table import table_content, write_table
from training.runtime.command import run_command
from training.runtime.errors import UserError
from training.runtime.terminal import say
from training.show.board import pictures


def reproduce(options: Options) -> dict[str, Any]:
    """Run what is missing of a table, show it, and leave it as `table.md` and `table.json`.

    Both are brought up to date by every run that ends.

    Returns:
        The content of `table.json`.

    Raises:
        UserError: the options or the data cannot be used, a folder holds other runs, or training diverged.
        KeyboardInterrupt: it was interrupted; the message says what continues it.
    """
    plan = make_plan(options)
    # All of them before anything is trained: an error comes at once.
    data, *_ = [read_split(plan.run(plan.rows[0], split).settings).description for split in range(plan.splits)]
    try:
        content = _run_all(plan, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command continues in {plan.output}") from None
    say(terminal(content["title"], content["rows"], plan.scores))
    for line in (*content["notes"], f"table.md, table.json and the runs are in {plan.output}"):
        say(line)
    return content


def _run_all(plan: Plan, data: str) -> dict[str, Any]:
    """Read the runs that are finished and train the others, row by row; returns the content of the table at the end."""
    results: dict[str, dict[int, Results]] = {row: {} for row in plan.rows}
    runs = [(row, split) for row in plan.rows for split in range(plan.splits)]
    missing = [of_run for of_run in runs if not (plan.folder(*of_run) / RESULT).exists()]
    for row, split in runs:
        if (row, split) not in missing:
            results[row][split] = _result(plan, row, split)
    if len(missing) < len(runs):
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already")
    if missing:
        _check_weights(plan)
    started = time.perf_counter()
    for done, (row, split) in enumerate(missing):
        seconds = (time.perf_counter() - started) / max(done, 1) * (len(missing) - done)
        eta = f"ETA {timedelta(seconds=round(seconds))}" if done else "ETA after this one"
        line = f"run {len(runs) - len(missing) + done + 1} of {len(runs)}: {row}, split {split}; {eta}"
        say(line)
        results[row][split] = _result(plan, row, split)
        write_table(plan, table_content(plan, data, results))
    content = table_content(plan, data, results)
    write_table(plan, content)  # where nothing was missing but the table is of other rows
    return content


def _result(plan: Plan, row: str, split: int) -> Results:
    try:
        return run(plan.run(row, split), pictures if plan.options.machine.pictures else None)
    except UserError as error:
        raise UserError(f"{row}, split {split}: {error}") from error


def _check_weights(plan: Plan) -> None:
    """Raise where a backbone would start at random for want of the weights that its recipe names."""
    model = plan.options.recipe.model
    if model.weights == "imagenet":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is an error here
            if not make_backbone(model, identities=1).pretrained:
                raise UserError("weights: ImageNet's cannot be fetched here, wanted a file (--weights PATH) or random")


if __name__ == "__main__":
    run_command(lambda: reproduce(parse_options("python -m training.reproduce")))
