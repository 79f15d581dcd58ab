"""An evaluation: what was evaluated, how, and what came out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from training.evaluation.ranking import TOP, Ranking


@dataclass(frozen=True)
class Result:
    """A ranking and the network it is of.

    made_by: JSON values that describe the training: "recipe", "row", "preset", "changed", "ops", "resize".
    epoch: how many epochs the network had trained for.
    ranking: what came out.
    """

    made_by: Mapping[str, Any]
    epoch: int
    ranking: Ranking

    def record(self) -> dict[str, Any]:
        """Everything in it, flat, as JSON values; shares from 0 to 1."""
        r = self.ranking
        return {
            **self.made_by,
            "epoch": self.epoch,
            "protocol": r.protocol,
            "ties": r.ties,
            "reranked": r.reranked or False,  # as in records from before versions had names
            **{f"rank-{k}": r.cmc[k] for k in TOP},
            "mAP": r.mean_ap,
            "chance": r.chance,
            "probes": r.queries,
            "valid": r.valid,
            "gallery": r.gallery,
            "junk": r.junk,
        }


def result_table(records: Iterable[dict[str, Any]]) -> Table:
    """A table, in percent, of the records of results by one protocol on one split, the level of chance below them."""
    records = list(records)
    of = records[-1]
    scores = [*(f"rank-{k}" for k in TOP), "mAP"]
    junk = f" ({of['junk']:.1f} junk per query)" if of["junk"] else ""
    reranked = f", re-ranked ({of['reranked']})" if of["reranked"] else ""
    resized = ", resized by Pillow" if of["resize"] == "pillow" else ""
    made_by = [f"recipe {of['recipe']}", *([of["row"]] if of["row"] else []), f"preset {of['preset']}", *of["changed"]]
    table = Table(
        "network",
        title=f"{of['protocol']}, {of['probes']} queries ({of['valid']} valid) in a gallery of {of['gallery']}{junk}",
        caption=f"percent; {', '.join(made_by)}; ops {of['ops']}, ties {of['ties']}{reranked}{resized}",
        title_justify="left",
        caption_justify="left",
    )
    for score in scores:
        table.add_column(score, justify="right")
    for record in records:
        name = f"after epoch {record['epoch']}" if record["epoch"] else "untrained"
        table.add_row(name, *(f"{100 * record[score]:.1f}" for score in scores))
    table.add_row("chance", f"{100 * of['chance']:.1f}")
    return table
