"""Read people in folders: person/camera/frames, or person/camera/tracklet/frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from training.data.datasets.own_people import PARTS, Recording, make_split
from training.data.image_folder import images_in, natural_order
from training.data.tracklets import Split
from training.runtime.errors import UserError

EXAMPLE = "anna/entrance/0001.png"
EXAMPLES = f"{EXAMPLE}, or anna/entrance/first-visit/0001.png where a camera saw her more than once"


def load(root: Path, split: int) -> Split:
    """Read one split of a folder of people; no image is opened.

    In `root` is a folder for each person, in it one for each camera, and in that the frames, or a folder of frames for
    each tracklet. Frames are taken in natural order of their names. Instead of people, `root` may hold the folders
    `train`, `query` and `gallery`, in any case, each of which holds people; `train` may be absent where nothing is to
    be trained. See `training.data.datasets.own_people.make_split` for the splits.

    Args:
        root: the folder.
        split: the number of the split, from 0.

    Raises:
        UserError: a folder is empty, or has images where folders are wanted, or the split cannot be made.
    """
    if not root.is_dir():
        raise UserError(f"{root}: not found; wanted a folder with {EXAMPLES}")
    folders = _folders(root)
    parts = {path: path.name.lower() for path in folders if path.name.lower() in PARTS}
    if parts:
        if others := [path.name for path in folders if path not in parts]:
            part = next(iter(parts)).name
            raise UserError(f"{root}: got {others[0]}/ next to {part}/, wanted only train/, query/ and gallery/")
        recordings = [recording for folder, part in parts.items() for recording in _people(folder, part)]
        example = f"query/{EXAMPLE}"
    else:
        recordings, example = list(_people(root, "")), EXAMPLE
    return make_split(recordings, split, f"people in folders in {root}", example)


def _people(root: Path, part: str) -> Iterator[Recording]:
    """Yield the recordings of a folder of people."""
    for person in _inner_folders(root, "a folder for each person"):
        for camera in _inner_folders(person, "a folder for each camera"):
            inner, images = _folders(camera), images_in(camera)
            if inner and images:
                raise UserError(f"{camera}: got {images[0].name} next to {inner[0].name}/, wanted {EXAMPLES}")
            for tracklet in inner or [camera]:
                frames = images if tracklet == camera else images_in(tracklet)
                if not frames:
                    raise UserError(f"{tracklet}: got no image, wanted {EXAMPLES}")
                yield Recording(part, person.name, camera.name, frames, str(tracklet.relative_to(root)))


def _inner_folders(folder: Path, wanted: str) -> list[Path]:
    """List the folders in a folder; raise if there is none, or an image."""
    if images := images_in(folder):
        raise UserError(f"{folder}: got the image {images[0].name}, wanted {wanted}, as {EXAMPLES}")
    folders = _folders(folder)
    if not folders:
        raise UserError(f"{folder}: got no folder in it, wanted {wanted}, as {EXAMPLES}")
    return folders


def _folders(folder: Path) -> list[Path]:
    inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    return sorted(inner, key=lambda path: natural_order(path.name))
