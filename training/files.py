"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from pathlib import Path


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


def aside(path: Path) -> Path:
    """Where `write_whole` writes before it renames."""
    return path.with_name(f"{path.name}.new")


def to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, would outlive the machine's going down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
