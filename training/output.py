"""The file a command is asked to write: known to be possible before the work is done, there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from training.errors import UserError
from training.files import aside, write_whole


def check_output(path: Path, suffix: str, *, replace: bool = False) -> None:
    """Make the folder of a file to come.

    Args:
        path: the file.
        suffix: what its name has to end in, e.g. ".json".
        replace: whether a file that is there already may be written over.

    Raises:
        UserError: its name ends otherwise, it is there already, or it cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"output: got {path}, wanted a name that ends in {suffix}")
    if os.path.isdir(path) or (os.path.lexists(path) and not replace):
        raise UserError(f"output: {path} is there already, wanted {'a file' if replace else 'a new file'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside(path).touch()
        aside(path).unlink()
    except OSError as error:
        raise UserError(f"output: {error}") from error


def write_output(path: Path, content: str | bytes) -> None:
    """Write the file; a UserError if it cannot be, and then nothing of it is left."""
    try:
        write_whole(path, content)
    except OSError as error:
        with suppress(OSError):
            aside(path).unlink()
        raise UserError(f"output: {path}: {error.strerror}") from error
