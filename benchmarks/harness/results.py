"""Arguments, environment and JSON file of a run."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

from build_tools.provenance import commit_of
from rru_fast.auto import cards

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class BenchArgs:
    """Options of every operator's benchmark."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """File to write the rows to."""

    def __post_init__(self) -> None:
        """Raise SystemExit if a number is below 1."""
        check_numbers(self)


def check_numbers(options: Any) -> None:
    """Check that the integers among a dataclass's options, and in tuples of integers, are at least 1.

    Raises:
        SystemExit: one is not.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and not isinstance(number, bool) and number < 1 for number in numbers):
            raise SystemExit(f"{field.name}: got {value}, wanted at least 1")


def environment(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the hardware, threads, versions, commit and date of a run, as JSON values.

    Args:
        device: where it is measured.
        dtype: where all rows share one.
    """
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cards.processor(),
        "threads": torch.get_num_threads(),
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def _commit() -> str:
    # Results that are written into the tree are not a change of what is measured.
    return commit_of(ROOT, ".", ":!benchmarks/results", short=True) or "unknown"


def write(path: Path, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a run's environment and rows as JSON, and print where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"wrote {len(rows)} rows to {path}")
