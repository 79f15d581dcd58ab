"""Layout of benchmarks/: commands on top, and imports that go one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.harness.results import ROOT

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


def imports_of(path: Path) -> set[str]:
    """Return the modules and names of benchmarks that a file imports, dotted, without "benchmarks."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("benchmarks.") for name in found if name.startswith("benchmarks.")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_lower_folders_only(folder: str) -> None:
    files = list((FOLDER / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            assert name.split(".")[0] in MAY_IMPORT[folder] | {folder}, f"{path.name} imports {name}"


def test_a_file_on_top_is_a_command_that_no_file_imports() -> None:
    commands = {path for path in FOLDER.glob("*.py") if path.name not in PYTEST | {"__init__.py"}}
    assert all('\nif __name__ == "__main__":\n' in path.read_text("utf-8") for path in commands)
    names = {path.stem for path in commands}
    imported = {name.split(".")[0] for path in FOLDER.rglob("*.py") for name in imports_of(path)}
    assert imported & names == set()


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(MAY_IMPORT)
