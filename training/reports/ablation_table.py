"""Ablation table in Markdown."""

from __future__ import annotations

import re
from statistics import fmean, stdev
from typing import Any

SCORES = ("rank-1", "mAP")


def markdown(ablation: dict[str, Any]) -> str:
    """Return the table: mean and standard deviation over the seeds of each score, per row and rate, with a caption.

    Args:
        ablation: the content of `ablation.json`.
    """
    rates, rows = (list(dict.fromkeys(run[name] for run in ablation["runs"])) for name in ("occlusion", "row"))
    header = ["row", *(f"{score}, occlusion {rate:g}" for rate in rates for score in SCORES)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        lines.append([row, *(_cell(spread(ablation, row, rate, score)) for rate in rates for score in SCORES)])
    return f"*{_caption(ablation)}*\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(ablation: dict[str, Any], row: str, rate: float, score: str) -> tuple[float, float | None]:
    """Return mean and standard deviation over the seeds, in percent; a single seed has no deviation."""
    values = [100 * run[score] for run in ablation["runs"] if (run["row"], run["occlusion"]) == (row, rate)]
    return fmean(values), stdev(values) if len(values) > 1 else None


def _cell(value: tuple[float, float | None]) -> str:
    mean, deviation = value
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _caption(ablation: dict[str, Any]) -> str:
    runs, environments = ablation["runs"], ablation["environments"]
    seeds = len({run["seed"] for run in runs})
    people, held_out = ablation["people"], runs[0]["probes"]
    over = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"

    def of(name: str) -> str:
        # Commits are cut to 12 digits, with "-dirty" left in place.
        values = [re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", str(environment[name])) for environment in environments]
        return " and ".join(dict.fromkeys(values))

    return (
        f"`{ablation['command']}`, commit {of('commit')}; synthetic set of {people} rendered people, "
        f"{people - held_out} to train on and the other {held_out} held out, blur {ablation['blur']:g}; recipe "
        f"{runs[0]['recipe']}, {ablation['epochs']} epochs of {ablation['batches']} batches, ops {runs[0]['ops']}; "
        f"protocol {runs[0]['protocol']}, last epoch, percent{over}; a seed decides the split too; "
        f"chance {100 * runs[0]['chance']:.1f}; torch {of('torch')}, {of('device')}, {of('threads')} thread a run"
    )
