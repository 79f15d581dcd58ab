"""Imports of files, read without running them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path


def imports_of(path: Path, package: str) -> set[str]:
    """Return the modules and names of a package that a file imports, dotted, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}.")}


def assert_imports_lower_folders_only(root: Path, folder: str, may_import: Mapping[str, set[str]]) -> None:
    """Check the imports of all files in a folder of the package at `root`."""
    files = list((root / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path, root.name):
            assert name.split(".")[0] in may_import[folder] | {folder}, f"{path.name} imports {name}"


def assert_commands_on_top(root: Path, but_for: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Check that a file on top of the package at `root` is a command, and that no file imports one."""
    commands = {path for path in root.glob("*.py") if path.name not in but_for | {"__init__.py"}}
    assert all('\nif __name__ == "__main__":\n' in path.read_text("utf-8") for path in commands)
    imported = {name.split(".")[0] for path in root.rglob("*.py") for name in imports_of(path, root.name)}
    assert imported & {path.stem for path in commands} == set()
