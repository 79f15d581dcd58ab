"""Layout of training/: commands on top, and imports that go one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import training

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
    "export": {"runtime", "data", "model", "evaluation", "engine", "retrieval"},
    "reproduce": {"runtime", "data", "model", "config", "engine", "reports", "show"},
}


def imports_of(path: Path) -> set[str]:
    """Return the modules and names of training that a file imports, dotted, without "training."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("training.") for name in found if name.startswith("training.")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_lower_folders_only(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            assert name.split(".")[0] in MAY_IMPORT[folder] | {folder}, f"{path.name} imports {name}"


def test_a_file_on_top_is_a_command_that_no_file_imports() -> None:
    commands = {path for path in ROOT.glob("*.py") if path.name != "__init__.py"}
    assert all('\nif __name__ == "__main__":\n' in path.read_text("utf-8") for path in commands)
    imported = {name.split(".")[0] for path in ROOT.rglob("*.py") for name in imports_of(path)}
    assert imported & {path.stem for path in commands} == set()


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY_IMPORT)
