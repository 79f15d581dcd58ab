"""Layout of benchmarks/: commands on top, and imports that go one way."""

from __future__ import annotations

import pytest

from benchmarks.harness.results import ROOT
from tests.helpers.imports import assert_commands_on_top, assert_imports_lower_folders_only

FOLDER = ROOT / "benchmarks"
# Folders of benchmarks/ that each folder may import, besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "launches": set(),
    "harness": set(),
    "implementations": {"harness"},
    "reports": {"harness", "implementations"},
    "gpu": {"harness", "implementations", "launches", "reports"},
    "train_step": {"harness", "implementations", "reports"},
}
PYTEST = {"conftest.py", "test_kernels.py"}  # of `pytest benchmarks`


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_lower_folders_only(folder: str) -> None:
    assert_imports_lower_folders_only(FOLDER, folder, MAY_IMPORT)


def test_a_file_on_top_is_a_command_that_no_file_imports() -> None:
    assert_commands_on_top(FOLDER, but_for=PYTEST)


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(MAY_IMPORT)
