"""Weights files: torchvision's download, .pth and .safetensors, loaded only where every name and shape fits."""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights

from training.errors import UserError


def download_inception() -> dict[str, Tensor] | None:
    """Torchvision's ImageNet weights of Inception-v3, or `None` and a warning where they cannot be fetched."""
    try:
        return dict(Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))
    except OSError as error:  # URLError is one
        warnings.warn(f"no ImageNet weights ({error}): Inception-v3 starts at random", stacklevel=3)
        return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file that holds a state_dict, by name.

    Raises:
        UserError: there is no such file, or it is not of that form.
    """
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"weights: {path} cannot be read as a state_dict ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights: {path} holds a {type(state).__name__}, wanted a state_dict (names to tensors)")
    return state


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state_dict whose names and shapes must be exactly the module's.

    Raises:
        UserError: names are unknown or missing, or shapes differ; the first few are named, on one line.
    """
    own = module.state_dict()
    problems = {
        "unknown": sorted(state.keys() - own.keys()),
        "missing": sorted(own.keys() - state.keys()),
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    told = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        raise UserError(f"weights: {source} does not fit this network: {'; '.join(told)}")
    module.load_state_dict(state)
