"""Train, evaluate and use the paper's network: commands, and `FeatureExtractor` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.engine.feature_extractor import FeatureExtractor

__all__ = ["FeatureExtractor"]


def __getattr__(name: str) -> Any:
    if name == "FeatureExtractor":  # on demand: commands start without it
        from training.engine.feature_extractor import FeatureExtractor

        return FeatureExtractor
    raise AttributeError(f"module 'training' has no attribute {name!r}")
