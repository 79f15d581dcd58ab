"""Metadata tables of MARS: person, camera and name-list rows of each tracklet, and the queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.datasets.readers import Ints, check_count, first_file, read_table
from training.runtime.errors import UserError

TRAIN, TEST, QUERY = "tracks_train_info.mat", "tracks_test_info.mat", "query_IDX.mat"
JUNK, DISTRACTOR = -1, 0  # person numbers without an identity
MIN_FRAMES = 8  # of a training tracklet

PUBLISHED = {
    TRAIN: {
        "tracklets": 8298,
        "people": 625,
        "frames": 509_914,
        "tracklets of the person with fewest": 1,
        "tracklets of the person with most": 271,
        "people seen by one camera": 6,
        f"tracklets of {MIN_FRAMES} frames or more": 8212,
    },
    TEST: {
        "tracklets": 12_180,
        "frames": 681_089,
        "frames in the shortest tracklet": 2,
        "frames in the longest tracklet": 920,
        "junk tracklets (person -1)": 870,
        "distractor tracklets (person 0)": 3248,
        "gallery tracklets": 11_310,
    },
    QUERY: {
        "queries": 1980,
        "people": 626,
        "pairs of person and camera": 1980,
        "gallery tracklets without the queries": 9330,
    },
}
"""Counts of the whole dataset, as `count` returns them."""


@dataclass(frozen=True)
class Tracks:
    """A table of N tracklets.

    Args:
        start: (N,) first row in the name list, from 0.
        end: (N,) the row after the last: a tracklet is `names[start:end]`.
        person: (N,) identities.
        camera: (N,) cameras, from 1.
    """

    start: Ints
    end: Ints
    person: Ints
    camera: Ints

    @property
    def lengths(self) -> Ints:
        """Frames per tracklet, (N,)."""
        return self.end - self.start


@dataclass(frozen=True)
class Tables:
    """Metadata of the whole dataset.

    Args:
        train: training tracklets.
        test: test tracklets.
        query: (Q,) distinct rows of `test`, from 0, none of them junk or a distractor.
    """

    train: Tracks
    test: Tracks
    query: Ints

    @property
    def gallery(self) -> Ints:
        """Rows of `test` that are ranked, (G,): all except junk, which no protocol counts; queries included."""
        return np.flatnonzero(self.test.person != JUNK)


def read_tables(info: Path, *, check_counts: bool = True) -> Tables:
    """Read the three MATLAB files.

    Args:
        info: the folder that holds them.
        check_counts: require the published counts.

    Raises:
        UserError: a file is missing or unreadable, its numbers make no sense, or a count is not the published one.
    """
    train = _read_tracks(info / TRAIN, "track_train_info", least_person=1)
    test = _read_tracks(info / TEST, "track_test_info", least_person=JUNK)
    rows = read_table(_existing(info / QUERY), "query_IDX", "1 by queries").ravel()
    wrong = rows[(rows < 1) | (rows > len(test.person))]
    if len(wrong):
        raise UserError(f"{info / QUERY}: got row {wrong[0]}, wanted 1 to {len(test.person)}, the rows of {TEST}")
    query = rows - 1
    not_person = query[test.person[query] <= DISTRACTOR]
    if len(not_person):
        row = not_person[0]
        raise UserError(f"{info / QUERY}: row {row + 1} of {TEST} is person {test.person[row]}, wanted a person from 1")
    if len(np.unique(query)) < len(query):
        raise UserError(f"{info / QUERY}: got a row of {TEST} twice, wanted each query once")
    tables = Tables(train, test, query)
    if check_counts:
        for file, counts in count(tables).items():
            for what, got in counts.items():
                check_count(info / file, what, got, PUBLISHED[file][what])
    return tables


def count(tables: Tables) -> dict[str, dict[str, int]]:
    """Count people, tracklets, frames and queries, under the names of `PUBLISHED`."""
    train, test, query = tables.train, tables.test, tables.query
    people, tracklets = np.unique(train.person, return_counts=True)
    cameras = np.unique(np.stack([train.person, train.camera]), axis=1)[0]
    pairs = np.stack([test.person[query], test.camera[query]])
    return {
        TRAIN: {
            "tracklets": len(train.person),
            "people": len(people),
            "frames": int(train.lengths.sum()),
            "tracklets of the person with fewest": int(tracklets.min()),
            "tracklets of the person with most": int(tracklets.max()),
            "people seen by one camera": int((np.unique(cameras, return_counts=True)[1] == 1).sum()),
            f"tracklets of {MIN_FRAMES} frames or more": int((train.lengths >= MIN_FRAMES).sum()),
        },
        TEST: {
            "tracklets": len(test.person),
            "frames": int(test.lengths.sum()),
            "frames in the shortest tracklet": int(test.lengths.min()),
            "frames in the longest tracklet": int(test.lengths.max()),
            "junk tracklets (person -1)": int((test.person == JUNK).sum()),
            "distractor tracklets (person 0)": int((test.person == DISTRACTOR).sum()),
            "gallery tracklets": len(tables.gallery),
        },
        QUERY: {
            "queries": len(query),
            "people": len(np.unique(pairs[0])),
            "pairs of person and camera": np.unique(pairs, axis=1).shape[1],
            "gallery tracklets without the queries": len(np.setdiff1d(tables.gallery, query)),
        },
    }


def _read_tracks(path: Path, key: str, least_person: int) -> Tracks:
    table = read_table(_existing(path), key, "tracklets by start, end, person, camera")
    if table.shape[1] != 4:
        raise UserError(f"{path}: {key} has {table.shape[1]} columns, wanted 4: start, end, person, camera")
    start, end, person, camera = table.T
    wrong = np.flatnonzero((start < 1) | (end < start) | (person < least_person) | (camera < 1))
    if len(wrong):
        raise UserError(
            f"{path}, row {wrong[0] + 1}: got {table[wrong[0]].tolist()}, wanted 1 <= start <= end, "
            f"a person from {least_person} and a camera from 1"
        )
    return Tracks(start - 1, end, person, camera)


def _existing(path: Path) -> Path:
    return first_file(path, wanted=f"{TRAIN}, {TEST} and {QUERY} in info/, as the MARS-evaluation repository has them")
