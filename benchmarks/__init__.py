"""Measurements of the operators against eager PyTorch, its compiler and their peers."""

from build_tools.extras import demand

demand("bench", "matplotlib", "rich", "tyro")
