"""Measurements of the operators against eager PyTorch, its compiler and their peers."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# As a command, python -m benchmarks.NAME, this comes before all that needs them.
_absent = [name for name in ("matplotlib", "rich", "tyro") if find_spec(name) is None]
if _absent and sys.argv[:1] == ["-m"]:
    sys.stderr.write(f"error: not installed: {', '.join(_absent)}; wanted: pip install -e '.[bench]'\n")
    sys.exit(2)
