"""Check that an extra of pyproject.toml is installed when a command starts."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Modules that the commands of an extra import.
MODULES = {
    "train": (
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "PIL",
        "rich",
        "safetensors",
        "scipy",
        "tensorboard",
        "torchvision",
        "tyro",
    ),
    "bench": ("matplotlib", "numpy", "rich", "tyro"),
}


def require(extra: str) -> None:
    """Exit with status 2 and one line if the system is not supported or modules of `extra` are missing.

    A command calls it first in its file, under `if __name__ == "__main__":`, before it imports those modules.
    """
    if find_spec("fcntl") is None:
        wanted = (
            "Linux or macOS, whose Python has fcntl; the library alone, without compiled kernels, runs elsewhere too"
        )
        sys.stderr.write(f"error: system: got {sys.platform}, wanted {wanted}\n")
        sys.exit(2)
    if absent := [name for name in MODULES[extra] if find_spec(name) is None]:
        sys.stderr.write(f"error: not installed: {', '.join(absent)}; wanted: pip install -e '.[{extra}]'\n")
        sys.exit(2)
