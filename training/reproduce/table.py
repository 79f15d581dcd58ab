"""The table of a reproduction, as files and on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from training.config.presets import diff_from_preset
from training.config.table1 import paper_figures
from training.reports.environments import environments_of
from training.reports.paper_table import NOTE, Results, compare, markdown
from training.reproduce.plan import OTHERS, SPLITS, Plan, rows_of
from training.runtime.atomic_files import write_atomic
from training.runtime.errors import UserError
from training.runtime.fields import flatten


def table_content(plan: Plan, data: str, results: Mapping[str, Mapping[int, Results]]) -> dict[str, Any]:
    """Return the content of `table.json`: the figures, and all that they depend on."""
    options, scores = plan.options, plan.scores
    recipe = plan.run(plan.rows[-1], 0).settings.recipe
    of = next(run[-1] for runs in results.values() for run in runs.values())
    about = {
        "table": options.table,
        "dataset": plan.dataset,
        **{name: of[name] for name in ("protocol", "ties", "valid", "gallery", "junk")},
        **({"people": recipe.data.prid} if plan.dataset == "prid-2011" else {}),
        **(
            {"counts": "as published" if options.source.check_counts else "not checked"}
            if plan.dataset not in OTHERS
            else {}
        ),
        "preset": options.preset,
        "backbone": recipe.model.backbone,
        "ops": options.step.ops,
        "seed": recipe.seed,
        "splits": plan.splits,
        "epochs": recipe.epochs,
    }
    apart = diff_from_preset(recipe)
    changes = f"but for {', '.join(apart)}" if apart else "as it is"
    notes = [
        NOTE.format(first=scores[0]),
        f"Asked for: {len(plan.rows)} of {len(rows_of(options.table))} rows, split{'s' * (plan.splits > 1)} "
        f"{', '.join(map(str, range(plan.splits)))} of {SPLITS[plan.dataset]}, preset {options.preset} {changes}. "
        f"Ended: {sum(map(len, results.values()))} of {len(plan.rows) * plan.splits} runs.",
        f"Data: {data}",
    ]
    environments = environments_of(plan.folder(row, split) for row, runs in results.items() for split in runs)
    notes += [f"Computed with {', '.join(f'{name} {value}' for name, value in e.items())}." for e in environments]
    if plan.dataset in OTHERS:
        notes.append(f"{plan.dataset} is not one of the paper's datasets: these figures compare with none of its.")
    elif apart or plan.splits < SPLITS[plan.dataset] or not options.source.check_counts:
        notes.append("This is not the paper's experiment in full: the differences do not tell how well it reproduces.")
    papers = {
        name: dict(zip(scores, paper_figures(name)[plan.dataset], strict=True)) if plan.dataset not in OTHERS else None
        for name in plan.rows
    }
    return {
        "title": f"Table {options.table} on {', '.join(f'{name} {value}' for name, value in list(about.items())[1:])}",
        **about,
        "rows": [compare(name, results[name], papers[name], scores) for name in plan.rows],
        "data": data,
        "recipe": flatten(recipe),  # of the last row; each run's own is in its folder
        "environments": environments,
        "notes": notes,
    }


def write_table(plan: Plan, content: Mapping[str, Any]) -> None:
    """Write `table.md` and `table.json` into the plan's output; a UserError if they cannot be."""
    table = markdown(content["title"], content["rows"], plan.scores, content["notes"])
    try:
        write_atomic(plan.output / "table.md", table)
        write_atomic(plan.output / "table.json", json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output: {error}") from error
