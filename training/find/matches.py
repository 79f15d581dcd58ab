"""Tracks of a video, ranked by their similarity to a person."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from training.data.datasets.mot import OVERLAP_SECONDS
from training.engine.feature_extractor import unit_features
from training.evaluation.ranking import Floats
from training.find.scan import Track
from training.runtime.clock import clock

COLUMNS = (
    "rank",
    "score",
    "start",
    "end",
    "start_seconds",
    "end_seconds",
    "first_frame",
    "last_frame",
    "frames",
    "track",
)


@dataclass(frozen=True)
class Match:
    """A track found.

    rank: from 1, the most similar; in a list of everybody, the order of time.
    score: cosine of its feature and the person's; None in a list of everybody.
    track: its boxes.
    """

    rank: int
    score: float | None
    track: Track

    @property
    def times(self) -> str:
        """Begin and end, as a player shows them."""
        return f"{clock(self.track.seconds[0])} - {clock(self.track.seconds[-1])}"


def rank(person: Floats, features: Mapping[int, Floats], tracks: Mapping[int, Track]) -> list[Match]:
    """Rank tracks by the cosine of their features and a person's, the most similar first; of equal ones the earlier.

    Args:
        person: (D,), of length 1.
        features: of the tracks to rank, by number, at least one.
        tracks: these and perhaps others, by number.

    Raises:
        UserError: a feature is zero.
    """
    numbers = list(features)
    units = unit_features(np.stack([features[track] for track in numbers]), [f"track {track}" for track in numbers])
    scores = (units * person).sum(1)
    order = sorted(range(len(numbers)), key=lambda place: (-scores[place], tracks[numbers[place]].frames[0]))
    return [Match(at, float(scores[place]), tracks[numbers[place]]) for at, place in enumerate(order, start=1)]


def everybody(tracks: Iterable[Track]) -> list[Match]:
    """List tracks in order of time."""
    ordered = sorted(tracks, key=lambda track: (track.frames[0], track.number))
    return [Match(number, None, track) for number, track in enumerate(ordered, start=1)]


def at_the_same_time(tracks: Mapping[int, Track], persons: Iterable[Track]) -> set[int]:
    """Return the tracks seen together with one of a person's for more than a second: nobody is at two places."""
    return {number for own in persons for number, other in tracks.items() if own.seconds_with(other) > OVERLAP_SECONDS}


def as_table(matches: Sequence[Match]) -> Table:
    """Return a table for the terminal."""
    scored = matches[0].score is not None
    columns = ("rank", "score", "from", "to", "seen in", "track") if scored else ("track", "from", "to", "seen in")
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for match in matches:
        track = match.track
        row = {
            "rank": str(match.rank),
            "score": f"{match.score or 0:.3f}",
            "from": clock(track.seconds[0]),
            "to": clock(track.seconds[-1]),
            "seen in": f"{len(track.frames)} frames",
            "track": str(track.number),
        }
        table.add_row(*(row[column] for column in columns))
    return table


def as_csv(matches: Sequence[Match]) -> str:
    """Return the content of matches.csv, with COLUMNS."""
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    writer.writerow(COLUMNS)
    for match in matches:
        track = match.track
        begin, end = track.seconds[0], track.seconds[-1]
        score = "" if match.score is None else f"{match.score:.6f}"
        times = (clock(begin), clock(end), f"{begin:.3f}", f"{end:.3f}")
        writer.writerow((match.rank, score, *times, track.frames[0], track.frames[-1], len(track.frames), track.number))
    return page.getvalue()
