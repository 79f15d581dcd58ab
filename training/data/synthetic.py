"""Render a synthetic dataset: `python -m training.data.synthetic --root DIR`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import tyro

from training.data.datasets.synthetic import generate
from training.runtime.command import run_command
from training.runtime.terminal import say

if __name__ == "__main__":
    run_command(lambda: say(f"rendered people in the iLIDS-VID layout: {tyro.cli(generate)}"))
