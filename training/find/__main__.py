"""Find a person in a video: `python -m training.find --video V --person CROPS_OR_TRACK --output FOLDER`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import warnings
from shlex import quote

import tyro

from training.data.footage import Footage, open_footage
from training.engine.feature_extractor import PRETRAINED, FeatureExtractor
from training.find.boxes import BoxSource, DetectedBoxes, boxes_next_to, source_of_file
from training.find.detection import make_detector
from training.find.matches import Match, as_csv, as_table, at_the_same_time, everybody, rank
from training.find.options import Options
from training.find.person import Person, read_person
from training.find.rendering import render
from training.find.scan import Scan, scan
from training.find.tracking import LOST_SECONDS
from training.runtime.atomic_files import check_new_folder, new_folder, write_output
from training.runtime.command import run_command
from training.runtime.device import choose_device
from training.runtime.errors import UserError
from training.runtime.terminal import say

DRAWN = 40  # strips on a page, at most


def find(options: Options) -> list[Match]:
    """Find a person in a video, or list everybody; show the table and write the pictures.

    Raises:
        UserError: the options, the video, the boxes, the crops or the network cannot be used; nothing is written then.
    """
    options.check()
    check_new_folder(options.output)
    person = None if options.person is None else read_person(options.person)
    footage = open_footage(options.video)
    if person and not options.any_crop:
        person.check_crops()
    extractor = FeatureExtractor(options.checkpoint, device=options.device)
    source = _source(options, footage)
    if person and source.numbers is not None:
        person.check_tracks(source.numbers, options.video)
    say(source.description)
    if options.checkpoint == PRETRAINED:
        say(f"network: the small one of this repository, trained on rendered people; see {PRETRAINED / 'README.md'}")
    found = scan(footage, source, extractor, options.every)
    if found.damaged:
        line = f"{options.video}: skipped {found.damaged} damaged packets; frames are numbered without them"
        warnings.warn(line, stacklevel=2)
    if not found.tracks:
        raise _nobody(options, found, source)
    matches, line = _ranked(options, person, found, extractor) if person else _everybody(options, found)
    if len(matches) > DRAWN:
        line += f"; drawn are the {DRAWN} {'best' if person else 'longest'}"
    say(line)
    if matches:
        say(as_table(matches))
    with new_folder(options.output) as folder:
        write_output(folder / ("matches.csv" if person else "people.csv"), as_csv(matches))
        if source.found:
            write_output(folder / "tracks.txt", found.as_mot())
        if matches:
            drawn = matches if person else sorted(matches, key=lambda match: -len(match.track.frames))
            drawn = sorted(drawn[:DRAWN], key=lambda match: match.rank)
            render(folder, line, footage, drawn, person, found)
        written = sorted(path.name for path in folder.iterdir())
    say(f"{', '.join(written)}: in {options.output}")
    if person is None:
        boxes = options.output / "tracks.txt" if source.found else options.detections
        again = "" if boxes is None else f" --detections {quote(str(boxes))}"
        say(f"to find one of them again: --person TRACK{again}")
    return matches


def _source(options: Options, footage: Footage) -> BoxSource:
    """Return where boxes come from: a file, given or next to the video, unless a detector was asked for."""
    rate = footage.frame_rate / options.every
    given = options.detections
    next_to = boxes_next_to(footage) if options.detector == "auto" and options.detector_weights is None else None
    path = given or next_to
    source: BoxSource
    if path is not None:
        try:
            source = source_of_file(path, rate)
        except UserError as error:
            hint = "" if given else "; it was found next to the video, --detector hog does without"
            raise UserError(f"{error}{hint}") from None
    else:
        device = choose_device(options.device)
        detector = make_detector(options.detector, options.detector_weights, device, warnings.warn)
        source = DetectedBoxes(detector, rate)
    if source.found and 1 / rate > LOST_SECONDS / 2:
        got = f"got {options.every} at {footage.frame_rate:.3g} frames per second, a look in {1 / rate:.1f} s"
        raise UserError(f"every: {got}, wanted one a second or more to follow people")
    return source


def _nobody(options: Options, found: Scan, source: BoxSource) -> UserError:
    """Make the error for a video in which nobody was followed."""
    got = f"got nobody in the {found.frames} frames of {options.video}"
    if source.untracked:
        none = f"of {source.untracked} boxes none could be followed to another frame"
        return UserError(f"video: {got}: {none}, wanted more of them")
    return UserError(f"video: {got}, wanted people inside of the image; --detections FILE takes boxes of your own")


def _everybody(options: Options, found: Scan) -> tuple[list[Match], str]:
    """Return all tracks that are long enough, in order of time, and a line about them."""
    long, dropped = found.at_least(options.min_frames)
    if not long:
        got = f"got {options.min_frames}, but none of {len(found.tracks)} tracks has as many frames"
        raise UserError(f"min_frames: {got}, wanted fewer")
    return everybody(long.values()), f"{len(long)} tracks in {options.video.name}{dropped}"


def _ranked(options: Options, person: Person, found: Scan, extractor: FeatureExtractor) -> tuple[list[Match], str]:
    """Return the matches, and a line about what they are among."""
    person.check_tracks(found.tracks.keys(), options.video)
    long, dropped = found.at_least(options.min_frames)
    own = set(person.tracks)
    together = at_the_same_time(long, [found.tracks[track] for track in person.tracks]) - own
    among = [number for number in long if number not in own | together]
    if together:
        dropped += f", {len(together)} left out that were seen at the same time"
    if not among:
        raise UserError(f"person: got nobody else in {options.video}{dropped}, wanted a track to compare {person} with")
    feature = person.feature(found.features, extractor)
    matches = rank(feature, {number: found.features[number] for number in among}, long)
    line = f"{person} among {len(matches)} tracks in {options.video.name}{dropped}"
    best = matches[0]
    if options.threshold is not None:
        matches = [match for match in matches if match.score is not None and match.score >= options.threshold]
    if not matches:
        line += f": none scores {options.threshold:g} or more, the best {best.score:.3f} ({best.times})"
    return matches[: options.top], line


if __name__ == "__main__":
    run_command(lambda: find(tyro.cli(Options, prog="python -m training.find")))
