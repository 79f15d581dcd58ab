"""MOTChallenge sequences as a dataset: tracks of one camera, split into visits or parts."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from training.data.datasets.mot_boxes import parse_int64
from training.data.datasets.mot_seqinfo import read_sequence_info
from training.data.datasets.mot_sequence import MotSequence, Track, read_sequence
from training.data.tracklets import Split, Tracklet
from training.runtime.clock import clock
from training.runtime.errors import NoSuchSplit, UserError

MIN_FRAMES = 8  # of a tracklet
PART = 0.45  # share of a track for its query, and as much for its gallery; the rest is a gap between them
OVERLAP_SECONDS = 1.0  # allowed between two visits of one person: a track may start before the one before it is lost


def load(root: Path, split: int) -> Split:
    """Read the one split of a sequence.

    With `identities.csv` (track,person) the earliest visit of each person is trained on and, if the person returns, is
    the query; the later visits are the gallery. Without it, each track is a person: its first part is trained on and is
    the query, its last part is the gallery. The description counts the boxes left out because they have no identity
    (-1) or are not pedestrians, see `training.data.datasets.mot_boxes`. A tracklet's name says when it was seen, as
    "track18@0:53.0-1:02.0", or in which frames, "track18@372-435", of images without a frameRate.

    Args:
        root: the sequence's folder.
        split: 0.

    Raises:
        UserError: a file is missing or malformed, one person is at two places, or nobody comes back; or there is an
            `identities.csv` but no frameRate.
    """
    if split != 0:
        raise NoSuchSplit(f"split: got {split}, wanted 0, the only split of a MOT sequence")
    identities = root / "identities.csv"
    if identities.is_file():
        overlap = OVERLAP_SECONDS * _frame_rate(root)  # before any frame is decoded
        sequence = read_sequence(root)
        train, query, gallery, description = _split_by_visit(sequence, identities, overlap)
    else:
        sequence = read_sequence(root)
        train, query, gallery, description = _split_by_part(sequence)
    description = "; ".join((description, *sequence.left_out))
    if not query:
        raise UserError(f"{root}: nobody comes back, so there is nothing to search for; {description}")
    return Split(tuple(train), tuple(query), tuple(gallery), "single-shot", f"MOT sequence {root}: {description}")


def _frame_rate(root: Path) -> float:
    rate = read_sequence_info(root).frame_rate
    if rate is None:
        raise UserError(
            f"{root / 'seqinfo.ini'}: no frameRate, wanted the frames per second, as visits of a person in "
            f"identities.csv may overlap by {OVERLAP_SECONDS:g} s"
        )
    return rate


def _split_by_visit(
    sequence: MotSequence, identities: Path, overlap: float
) -> tuple[list[Tracklet], list[Tracklet], list[Tracklet], str]:
    names = _read_identities(identities, {track.number for track in sequence.tracks})
    long = [track for track in sequence.tracks if len(track.crops) >= MIN_FRAMES]
    visits: dict[str | int, list[Track]] = defaultdict(list)
    for track in sorted(long, key=lambda track: track.frame_numbers[0]):
        visits[names.get(track.number, track.number)].append(track)
    train, query, gallery = [], [], []
    for person, (name, (earliest, *later)) in enumerate(visits.items(), start=1):
        _check_overlap(f"{identities}, person {name}", [earliest, *later], overlap)
        train.append(_tracklet(person, 1, earliest))
        query += train[-1:] if later else []
        gallery += [_tracklet(person, 2, track) for track in later]
    description = (
        f"{len(long)} tracks of {len(train)} people ({len(sequence.tracks) - len(long)} tracks under {MIN_FRAMES} "
        f"frames dropped); everyone's earliest visit is trained on; {len(query)} people return: their earliest visit "
        f"is the query, their {len(gallery)} later visits, never trained on, are the gallery"
    )
    return train, query, gallery, description


def _split_by_part(sequence: MotSequence) -> tuple[list[Tracklet], list[Tracklet], list[Tracklet], str]:
    first, last = [], []
    for track in sequence.tracks:
        whole, part = len(track.crops), int(PART * len(track.crops))
        if part >= MIN_FRAMES:
            first.append(_tracklet(track.number, 1, track, slice(part)))
            last.append(_tracklet(track.number, 2, track, slice(whole - part, whole)))
    description = (
        f"{len(first)} tracks, each taken for a person ({len(sequence.tracks) - len(first)} tracks dropped, a part of "
        f"them being under {MIN_FRAMES} frames); the first {PART:.0%} of a track is trained on and is the query, the "
        f"last {PART:.0%}, never trained on, is the gallery"
    )
    return first, first, last, description


def _tracklet(person: int, camera: int, track: Track, part: slice = slice(None)) -> Tracklet:
    """Make a tracklet of a track or a part of it, whose name says when it was seen."""
    times = list(map(clock, track.seconds[part])) or list(map(str, track.frame_numbers[part]))
    return Tracklet(person, camera, track.crops[part], f"track{track.number}@{times[0]}-{times[-1]}")


def _check_overlap(who: str, visits: list[Track], allowed: float) -> None:
    """Raise if two visits, which are in order of their first frames, overlap by more than `allowed` frames."""
    latest = visits[0]
    for visit in visits[1:]:
        overlap = min(latest.frame_numbers[-1], visit.frame_numbers[-1]) - visit.frame_numbers[0] + 1
        if overlap > allowed:
            raise UserError(
                f"{who}: tracks {latest.number} and {visit.number} overlap by {overlap} frames, wanted at most "
                f"{allowed:g}, as nobody is at two places at once"
            )
        latest = max(latest, visit, key=lambda track: track.frame_numbers[-1])


def _read_identities(path: Path, tracks: set[int]) -> dict[int, str]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            columns, listed = rows.fieldnames, [(rows.line_num, row) for row in rows]
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.reader.line_num}: {error}, wanted track,person") from None
    if not {"track", "person"} <= set(columns or ()):
        raise UserError(f"{path}: got the columns {columns}, wanted track,person")
    names: dict[int, str] = {}
    for line, row in listed:
        where = f"{path}, line {line}"
        track, person = (row["track"] or "").strip(), (row["person"] or "").strip()
        number = parse_int64(track)
        if number is None or not person:
            raise UserError(f"{where}: got {track[:40]!r},{person[:40]!r}, wanted a track number and a person")
        if number not in tracks:
            raise UserError(f"{where}: no track {number} with a box inside the image")
        if names.setdefault(number, person) != person:
            raise UserError(f"{where}: track {number} is person {names[number]} already")
    return names
