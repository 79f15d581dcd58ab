"""Atomic writes of files and folders, a lock per folder, and checks of output paths."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from training.runtime.command import sigterm_raises
from training.runtime.errors import UserError

LOCK = "lock"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write or replace a file atomically and durably: write a temporary file, fsync, rename.

    Args:
        path: the file; the temporary file is `temp_path(path)`, which a kill may leave behind.
        content: the whole content; a str is encoded as UTF-8.

    Raises:
        OSError: it cannot be written; an earlier file at `path` remains.
    """
    temp = temp_path(path)
    temp.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync_path(temp)
    temp.replace(path)
    fsync_path(path.parent)


def realpath(path: Path) -> Path:
    """Resolve links and dots; does not raise on a cycle of links, as Path.resolve does before Python 3.13."""
    return Path(os.path.realpath(path))


def temp_path(path: Path) -> Path:
    """Return the path of the temporary file that `write_atomic` renames."""
    return path.with_name(f"{path.name}.new")


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process until the block or the process ends; forked processes do not inherit the lock.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder cannot be written.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"output: another process is writing in {folder}, wanted one at a time") from None
        yield


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, suffix: str, *, replace: bool = False) -> None:
    """Check that an output file can be written, and make its folder.

    Args:
        path: the file.
        suffix: the required suffix of its name, e.g. ".json".
        replace: allow it to exist already.

    Raises:
        UserError: its name ends otherwise, it exists already, or it cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"output: got {path}, wanted a name that ends in {suffix}")
    if os.path.isdir(path) or (os.path.lexists(path) and not replace):
        raise UserError(f"output: {path} is there already, wanted {'a file' if replace else 'a new file'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp_path(path).touch()
        temp_path(path).unlink()
    except OSError as error:
        raise UserError(f"output: {error}") from error


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file atomically; raise a UserError and remove the temporary file if that fails."""
    try:
        write_atomic(path, content)
    except OSError as error:
        with suppress(OSError):
            temp_path(path).unlink()
        raise UserError(f"output: {path}: {error.strerror}") from error


def check_new_folder(path: Path) -> None:
    """Check that an output folder can be made; nothing is.

    Raises:
        UserError: it is there already and not empty, is a file, or its folder cannot be written.
    """
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"output: {path} is there already, wanted a new folder")
    except OSError as error:
        raise UserError(f"output: {error}") from error
    above = next(folder for folder in realpath(path).parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"output: {above} cannot be written, wanted a place for {path}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` at the end of the block, and is removed if the block raises.

    SIGTERM ends the block by an exception.

    Raises:
        UserError: it cannot be made; where `path` has been filled by then, the message says where the new one is.
    """
    path = realpath(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sigterm_raises(), TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as temp:
            folder = Path(temp) / path.name
            folder.mkdir()
            yield folder
            if path.is_dir() and not any(path.iterdir()):  # keep the folder itself, which may be the working folder
                for file in sorted(folder.iterdir()):
                    shutil.move(file, path / file.name)
            elif os.path.lexists(path):
                other = path.with_name(f"{path.name}-{os.getpid()}")
                folder.rename(other)
                raise UserError(f"output: {path} was made meanwhile; the result is in {other}")
            else:
                folder.rename(path)
    except OSError as error:
        raise UserError(f"output: {path}: {error.strerror or error}") from error
