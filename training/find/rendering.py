"""The second pass over a video: crops for the page, and the video of the matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from training.data.footage import Footage
from training.data.tracklets import read_pixels
from training.find.annotated_video import AnnotatedVideo
from training.find.matches import Match
from training.find.page import page, places
from training.find.person import Person
from training.find.scan import Scan, Track
from training.runtime.atomic_files import write_output
from training.runtime.terminal import progress
from training.show.picture import png


def render(
    folder: Path, heading: str, footage: Footage, matches: Sequence[Match], person: Person | None, found: Scan
) -> None:
    """Draw matches.png and matches.mp4, or people.png where there is nobody to look for.

    Args:
        folder: to write to.
        heading: one line over the matches.
        footage: the video, which is read again.
        matches: at least one.
        person: who was looked for, if anybody.
        found: the tracks of the video.

    Raises:
        UserError: a frame cannot be read, or a file cannot be written.
    """
    tracks = [match.track for match in matches]
    tracks += [found.tracks[number] for number in (person.tracks if person else ())]
    with ExitStack() as stack:
        video = None
        if person:
            video = stack.enter_context(AnnotatedVideo(folder / "matches.mp4", matches, footage.frame_rate))
        strips = _read_again(footage, tracks, video, found)
    crops = _crops_of(person, strips) if person else []
    with progress("Drawing", None):
        content = png(page(heading, str(person), crops, matches, strips))
    write_output(folder / ("matches.png" if person else "people.png"), content)


def _read_again(
    footage: Footage, tracks: Sequence[Track], video: AnnotatedVideo | None, found: Scan
) -> dict[int, list[np.ndarray]]:
    """Return the crops to draw, by track, and add the frames to the video."""
    wanted: dict[int, list[tuple[Track, int]]] = {}
    for track in {track.number: track for track in tracks}.values():
        for place in places(len(track.frames)):
            wanted.setdefault(track.frames[place], []).append((track, place))
    strips: dict[int, list[np.ndarray]] = {track.number: [] for track in tracks}
    last = max(wanted)
    with progress("Drawing the matches", found.frames, "frames") as advance:
        for frame in footage.frames(lambda: None):  # what is damaged was counted before
            for track, place in wanted.get(frame.number, ()):
                strips[track.number].append(track.box(place).crop(frame.pixels))
            if video:
                video.add(frame)
            advance(1)
            if frame.number >= last and (video is None or video.is_over(frame.seconds)):
                break
    return strips


def _crops_of(person: Person, strips: Mapping[int, Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return the crops of the person to draw, evenly spaced, also of several tracks."""
    if not person.tracks:
        return [read_pixels(person.crops[place]) for place in places(len(person.crops))]
    crops = [crop for track in person.tracks for crop in strips[track]]
    return [crops[place] for place in places(len(crops))]
