"""What commands of this folder need beyond the library, and which extra of pyproject.toml brings it."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def demand(extra: str, *modules: str) -> None:
    """End a command, python -m PACKAGE.NAME, with one line where modules are missing; in its package's __init__.

    That comes before all that needs them. Elsewhere nothing is demanded: an import of the package needs not all.

    Args:
        extra: the extra that brings them.
        modules: their names as imported.
    """
    if sys.argv[:1] == ["-m"] and (absent := [name for name in modules if find_spec(name) is None]):
        sys.stderr.write(f"error: not installed: {', '.join(absent)}; wanted: pip install -e '.[{extra}]'\n")
        sys.exit(2)
