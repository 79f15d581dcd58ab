"""Splits of people recorded by a user: numbers for their names, seeded halves or given parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from training.data.datasets.readers import check_split
from training.data.image_folder import natural_order
from training.data.tracklets import Split, Tracklet
from training.runtime.errors import NoSuchSplit, UserError

PARTS = ("train", "query", "gallery")
SPLITS = 10
SEED = 2019  # of the halves
PROTOCOL = "mars-standard-ap"  # any number of cameras and of tracklets by each


@dataclass(frozen=True)
class Recording:
    """A tracklet as its owner names it.

    part: one of PARTS, or "" where the people are to be split in halves.
    person, camera: their names.
    frames: in order of time.
    name: of the tracklet, for messages.
    """

    part: str
    person: str
    camera: str
    frames: tuple[Path, ...]
    name: str


def make_split(recordings: Sequence[Recording], split: int, source: str, example: str) -> Split:
    """Make a split of recordings.

    With parts, there is one split: what is in "train" is trained on, each of "query" is searched for in "gallery".
    Without, there are ten, each of which holds out another half, by a fixed seed, of the people seen by two cameras or
    more: the first tracklet of a person by a camera is a query, and all tracklets of these people are the gallery. All
    others are trained on.

    A name that is a number is the person's number, if all are; otherwise people are numbered from 1 in natural order of
    their names, and so are cameras. The split has the names, by which people are known in another split or place.

    Args:
        recordings: at least one.
        split: its number, from 0.
        source: dataset and place, for messages.
        example: of what is wanted, for messages.

    Raises:
        UserError: the query or the gallery is empty, a person is trained on and searched for, no query has a match by
            another camera, too few people were seen by two cameras, or there is no such split.
    """
    people, cameras = (_numbers(r.person for r in recordings), _numbers(r.camera for r in recordings))
    tracklets = [Tracklet(people[r.person], cameras[r.camera], r.frames, r.name) for r in recordings]
    by_part = any(r.part for r in recordings)
    made = (_by_part if by_part else _by_half)(recordings, tracklets, split, source, example)
    return replace(made, names={number: name for name, number in people.items()})


def _by_part(
    recordings: Sequence[Recording], tracklets: Sequence[Tracklet], split: int, source: str, example: str
) -> Split:
    if split != 0:
        raise NoSuchSplit(f"split: got {split}, wanted 0, the only split of data with parts of its own")
    parts: dict[str, list[Tracklet]] = {part: [] for part in PARTS}
    people: dict[str, set[str]] = {part: set() for part in PARTS}
    for recording, tracklet in zip(recordings, tracklets, strict=True):
        parts[recording.part].append(tracklet)
        people[recording.part].add(recording.person)
    for part in ("query", "gallery"):
        if not parts[part]:
            raise UserError(f"{source}: got nothing as {part}, wanted train, query and gallery, as {example}")
    if seen := sorted(people["train"] & people["query"]):
        raise UserError(
            f"{source}: {seen[0]} is in train and in query, wanted people to be searched for that are not trained on"
        )
    seen_by = {(tracklet.person, tracklet.camera) for tracklet in parts["gallery"]}
    if not any(p == query.person and camera != query.camera for query in parts["query"] for p, camera in seen_by):
        raise UserError(f"{source}: got no query with the same person by another camera in the gallery, as {example}")
    description = (
        f"{source}: {len(people['train'])} people to train on ({len(parts['train'])} tracklets), "
        f"{len(people['query'])} other people held out, {len(parts['query'])} queries in a gallery of "
        f"{len(parts['gallery'])}"
    )
    train, query, gallery = (tuple(parts[part]) for part in PARTS)
    return Split(train, query, gallery, PROTOCOL, description)


def _by_half(
    recordings: Sequence[Recording], tracklets: Sequence[Tracklet], split: int, source: str, example: str
) -> Split:
    check_split(split, SPLITS, "the random halves")
    views: dict[str, set[str]] = defaultdict(set)
    for recording in recordings:
        views[recording.person].add(recording.camera)
    twice = sorted((person for person, seen in views.items() if len(seen) > 1), key=_by_name)
    order = np.random.default_rng((SEED, split)).permutation(len(twice))
    held_out = {twice[place] for place in order[: len(twice) // 2]}
    if not held_out or len(views) - len(held_out) < 2:
        raise UserError(
            f"{source}: got {len(views)} people, {len(twice)} of them by two cameras or more, wanted at least 3 and 2, "
            f"or train, query and gallery of your own; a person is to be found by another camera, as {example}"
        )
    train, query, gallery = [], [], []
    queried = set()
    for recording, tracklet in zip(recordings, tracklets, strict=True):
        if recording.person not in held_out:
            train.append(tracklet)
            continue
        gallery.append(tracklet)
        if (recording.person, recording.camera) not in queried:
            queried.add((recording.person, recording.camera))
            query.append(tracklet)
    description = (
        f"{source}, random half {split} of {SPLITS} (seed {SEED}): {len(views) - len(held_out)} people to train on "
        f"({len(train)} tracklets), {len(held_out)} other people held out, {len(query)} queries, the first tracklet of "
        f"each person by each camera, in a gallery of {len(gallery)} that they are part of"
    )
    return Split(tuple(train), tuple(query), tuple(gallery), PROTOCOL, description)


def _numbers(names: Iterable[str]) -> Mapping[str, int]:
    """Number names: as they are if all are distinct numbers, else from 1 in natural order."""
    ordered = sorted(set(names), key=_by_name)
    if all(name.isascii() and name.isdecimal() and len(name) <= 18 for name in ordered):
        own = {name: int(name) for name in ordered}
        if len(set(own.values())) == len(own):
            return own
    return {name: number for number, name in enumerate(ordered, start=1)}


def _by_name(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Key to sort names in natural order, "7" and "007" too."""
    return natural_order(name), name
