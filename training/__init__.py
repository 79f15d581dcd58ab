"""The paper's training model on rru_fast: data, network, losses, evaluation, recipes."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# As a command, python -m training.NAME, this comes before all that needs them.
_NEEDED = ("matplotlib", "PIL", "rich", "safetensors", "tensorboard", "torchvision", "tyro")
_absent = [name for name in _NEEDED if find_spec(name) is None]
if _absent and sys.argv[:1] == ["-m"]:
    sys.stderr.write(f"error: not installed: {', '.join(_absent)}; wanted: pip install -e '.[train]'\n")
    sys.exit(2)
