"""Comparison with a table of the paper: means over splits, after the last epoch and after the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, TypeAlias

from rich import box
from rich.table import Table

Results: TypeAlias = Sequence[Mapping[str, Any]]
"""Result records of one run, in order of epochs."""

NOTE = (
    "In percent, the mean ± standard deviation (of a sample) over splits. Last: after the last epoch. Best: after the "
    "one tested epoch whose mean {first} over the splits is the highest; it is chosen on the people tested on, and so "
    "flatters. A best epoch of each split's own would flatter more and is not shown. diff: ours less the paper's, in "
    "points."
)


def compare(
    row: str, runs: Mapping[int, Results], paper: Mapping[str, float] | None, scores: Sequence[str]
) -> dict[str, Any]:
    """Compare one row with the paper's figures; returns JSON values, in percent.

    Args:
        row: its name.
        runs: finished runs by split, all evaluated after the same epochs.
        paper: the paper's figures by score, in percent; `None` if it has none.
        scores: names of the figures to show; the best epoch is the one with the best mean of the first.

    Returns:
        "row", "splits", "paper" and, once a run has finished, "last" and "best". Both hold the epoch and, by score, the
        mean, the standard deviation over the splits (`None` for one split) and the mean less the paper's figure.
    """
    entry: dict[str, Any] = {"row": row, "splits": sorted(runs), "paper": paper}
    if not runs:
        return entry
    by_epoch: dict[int, list[Mapping[str, Any]]] = {}
    for split in sorted(runs):
        for record in runs[split]:
            if record["epoch"] > 0:  # 0 is the untrained network
                by_epoch.setdefault(record["epoch"], []).append(record)
    # Leave out epochs that a split has no result of, as its log was lost.
    by_epoch = {epoch: records for epoch, records in by_epoch.items() if len(records) == len(runs)}
    last = max(by_epoch)
    best = max(sorted(by_epoch), key=lambda epoch: mean(record[scores[0]] for record in by_epoch[epoch]))
    for name, epoch in (("last", last), ("best", best)):
        entry[name] = {"epoch": epoch}
        for score in scores:
            values = [100 * record[score] for record in by_epoch[epoch]]
            entry[name][score] = {
                "mean": mean(values),
                "deviation": stdev(values) if len(values) > 1 else None,
                "minus_paper": mean(values) - paper[score] if paper else None,
            }
    return entry


def markdown(title: str, rows: Sequence[Mapping[str, Any]], scores: Sequence[str], notes: Sequence[str]) -> str:
    """Return the table as Markdown, with one line per row and score.

    Args:
        title: text above the table.
        rows: results of `compare`.
        scores: the scores given to it.
        notes: paragraphs below the table.
    """
    head = ("row", "figure", "splits", "last", "diff", "best", "diff", "best epoch", "paper")
    lines = [f"{title}\n", _line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for row in rows:
        epoch = str(row["best"]["epoch"]) if row["splits"] else "-"
        for score in scores:
            last, best = _cells(row, "last", score), _cells(row, "best", score)
            lines.append(_line((row["row"], score, str(len(row["splits"])), *last, *best, epoch, _paper(row, score))))
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def terminal(title: str, rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> Table:
    """Return the table for a terminal of 80 columns; arguments as of `markdown`."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True
    )
    for column in ("row", "figure"):
        table.add_column(column, no_wrap=True)
    for column in ("last", "diff", "best", "diff", "paper"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        ran = len(row["splits"])
        about = [row["row"], f"{ran} split{'s' * (ran != 1)}", f"best epoch {row['best']['epoch']}" if ran else ""]
        for number, score in enumerate(scores):
            last, best = _cells(row, "last", score), _cells(row, "best", score)
            name = about[number] if number < len(about) else ""
            ends = number == len(scores) - 1
            table.add_row(name, score, *last, *best, _paper(row, score), end_section=ends)
    return table


def _cells(row: Mapping[str, Any], when: str, score: str) -> tuple[str, str]:
    if not row["splits"]:
        return "-", "-"
    figure = row[when][score]
    spread = "" if figure["deviation"] is None else f" ±{figure['deviation']:.1f}"
    difference = "-" if figure["minus_paper"] is None else f"{figure['minus_paper']:+.1f}"
    return f"{figure['mean']:.1f}{spread}", difference


def _paper(row: Mapping[str, Any], score: str) -> str:
    return f"{row['paper'][score]:.1f}" if row["paper"] else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
