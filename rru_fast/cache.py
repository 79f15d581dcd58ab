"""Files that are kept from process to process: autotuned configs, decisions on backends."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def folder(name: str) -> Path:
    """Return the folder $XDG_CACHE_HOME/rru_fast/`name`, by default in ~/.cache; it need not exist."""
    parent = os.environ.get("XDG_CACHE_HOME")
    if not parent:
        try:
            parent = str(Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as in some containers
            parent = str(Path(tempfile.gettempdir(), f"cache-{os.getuid()}"))
    return Path(parent) / "rru_fast" / name


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: Path, content: Any) -> str | None:
    """Write a JSON file, and its folder if missing, atomically; returns the reason if that is not possible."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        return f"{error.strerror}: {path.parent}"
    return None
