"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.runtime.errors import UserError

LOCK = "lock"


def write_whole(path: Path, content: str | bytes) -> None:
    """Put a file in the place of what was there, in one step, on the disk itself.

    Args:
        path: the file; it is written beside, under `aside(path)`, which a kill may leave behind.
        content: all it is to hold.

    Raises:
        OSError: it cannot be written; the file before stands.
    """
    new = aside(path)
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    to_disk(new)
    new.replace(path)
    to_disk(path.parent)


def resolved(path: Path) -> Path:
    """The path without links and dots; of links in a circle, which Path.resolve raises at, one of them."""
    return Path(os.path.realpath(path))


def aside(path: Path) -> Path:
    """Where `write_whole` writes before it renames."""
    return path.with_name(f"{path.name}.new")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to this process until the block ends, or the process does; those it forks do not hold it.

    Raises:
        UserError: another process has it.
        OSError: it cannot be written.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"output: another process is writing in {folder}, wanted one at a time") from None
        yield


def to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, would outlive the machine's going down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
