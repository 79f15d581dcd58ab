"""Layout of training/: commands on top, and imports that go one way."""

from __future__ import annotations

from pathlib import Path

import pytest

import training
from tests.helpers.imports import assert_commands_on_top, assert_imports_lower_folders_only

ROOT = Path(training.__file__).parent
# Folders of training/ that each folder may import, besides itself: those before it that it needs.
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": set(),
    "data": {"runtime"},
    "model": {"runtime"},
    "evaluation": {"runtime", "data", "model"},
    "config": {"runtime", "data", "model", "evaluation"},
    "engine": {"runtime", "data", "model", "evaluation", "config"},
    "retrieval": {"runtime", "model", "evaluation"},
    "reports": {"runtime", "engine"},
    "show": {"runtime", "data", "model", "evaluation", "engine", "reports"},
    "find": {"runtime", "data", "model", "evaluation", "engine", "show"},
    "export": {"runtime", "data", "model", "evaluation", "engine", "retrieval"},
    "reproduce": {"runtime", "data", "model", "config", "engine", "reports", "show"},
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_lower_folders_only(folder: str) -> None:
    assert_imports_lower_folders_only(ROOT, folder, MAY_IMPORT)


def test_a_file_on_top_is_a_command_that_no_file_imports() -> None:
    assert_commands_on_top(ROOT)


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)
