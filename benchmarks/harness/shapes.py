"""Shapes and dtypes of feature maps."""

from __future__ import annotations

import torch

Shape = tuple[int, int, int, int, int]
"""B, T, C, H, W."""

AXES = {"B": 0, "T": 1, "C": 2}
"""Index in a `Shape` of each size that `benchmarks.scaling` varies."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
