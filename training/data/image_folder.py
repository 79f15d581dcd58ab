"""Images of a folder, in natural order."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from PIL import Image

from training.runtime.errors import UserError


def is_image(path: Path) -> bool:
    """Return True if a file's name is that of an image that Pillow reads, and it is not hidden."""
    return not path.name.startswith(".") and path.suffix.lower() in _readable()


def images_in(folder: Path) -> tuple[Path, ...]:
    """List the images of a folder in natural order of their names: 2.png comes before 10.png."""
    with os.scandir(folder) as entries:
        images = [folder / entry.name for entry in entries if is_image(Path(entry.name)) and not entry.is_dir()]
    return tuple(sorted(images, key=lambda path: natural_order(path.name)))


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Key to sort names with numbers in them as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def frames_of_folder(folder: Path, option: str) -> tuple[Path, ...]:
    """List the frames of one tracklet.

    Args:
        folder: the folder that holds them.
        option: the name of the option that gave it, for messages.

    Raises:
        UserError: it is no folder, or holds no image.
    """
    try:
        images = images_in(folder)
    except OSError as error:
        raise UserError(f"{option}: {folder}: {error.strerror}, wanted a folder of images") from None
    if not images:
        raise UserError(f"{option}: got no image in {folder}, wanted the frames of a tracklet")
    return images


@cache
def _readable() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
