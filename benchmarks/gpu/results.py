"""Files of a run: a JSON, rewritten at each finding, the log, the suite's XML, and what the library has kept."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.reports.table import Row

CACHED = ("autotune", "auto")
"""Folders of the library's cache: configs of its kernels, and decisions of `auto`."""


class Results:
    """Findings of a run so far, in memory and on disk."""

    def __init__(self, folder: Path, name: str, environment: Row) -> None:
        """Choose file names that no earlier run has used, and write the JSON."""
        self.stem = _free_stem(folder, name)
        self.path = self.stem.with_suffix(".json")
        self.log = self.stem.with_suffix(".log")
        self.environment = environment
        self.rows: list[Row] = []
        self._first_row: dict[str, int] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Write the JSON atomically: a reader sees the previous version or this one."""
        content = {"environment": self.environment, "rows": self.rows, "parts": self.parts}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n")
        os.replace(unfinished, self.path)

    def add(self, part: str, finding: dict[str, Any]) -> None:
        """Add a finding of a part; for its keys see `benchmarks.gpu.parts`."""
        of_part = self.parts[part]
        for key, value in finding.items():
            if key == "rows":
                self._first_row.setdefault(part, len(self.rows))
                self.rows += value
            elif key == "columns":
                self.rows[self._first_row[part] + finding["row"]] |= value
            elif key == "environment":
                self.environment |= value
            elif key == "failed":
                of_part.setdefault("failed", []).append(value)
            elif key != "row":
                of_part[key] = value

    def gather(self, cache: Path) -> None:
        """Write what has been kept in the library's cache, a file for all configs and one for all decisions, if any."""
        for name in CACHED:
            found = []
            for path in sorted((cache / "rru_fast" / name).glob("*.json")):
                with suppress(ValueError):  # a part was killed while it wrote the file
                    found.append(json.loads(path.read_text()))
            if found:
                path = self.stem.with_name(f"{self.stem.name}-{name}.json")
                path.write_text(json.dumps(found, indent=1) + "\n")


class Findings:
    """Reader of the JSON lines that a part writes, while it writes them."""

    def __init__(self, path: Path) -> None:
        """Read `path`, which need not exist yet."""
        self.path = path
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the findings written since the last call, without an incomplete last line."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        lines, self._read = content[self._read : end].splitlines(), max(end, self._read)
        return [json.loads(line) for line in lines]


def _free_stem(folder: Path, name: str) -> Path:
    numbers = ("", *(f"-{number}" for number in range(2, 1000)))
    stems = (folder / f"{name}-{date.today().isoformat()}{number}" for number in numbers)
    return next(stem for stem in stems if not stem.with_suffix(".json").exists())
