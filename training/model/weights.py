"""Weights files: torchvision's download, .pth and .safetensors, loaded only where every name and shape fits."""

from __future__ import annotations

import os
import re
import warnings
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from training.errors import UserError


def download_inception() -> dict[str, Tensor] | None:
    """Torchvision's ImageNet weights of Inception-v3, or `None` and a warning where they cannot be fetched."""
    from torchvision.models import Inception_V3_Weights  # takes as long to import as torch

    try:
        return dict(Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))
    # URLError is an OSError; a wrong hash is a RuntimeError; a file fetched by halves is any of the last three.
    except (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError) as error:
        warnings.warn(f"no ImageNet weights ({first_line(error)}): Inception-v3 starts at random", stacklevel=3)
        return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file that holds a state_dict, by name.

    Raises:
        UserError: there is no such file, or it is not of that form.
    """
    if not os.path.isfile(path):  # where Path.is_file raises at a name that is too long
        raise UserError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable state_dict ({first_line(error)})") from error
    state = load_pickle(path, "not a readable state_dict")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"weights: {path} holds a {type(state).__name__}, wanted a state_dict (names to tensors)")
    return state


def load_pickle(path: Path, otherwise: str) -> Any:
    """What `torch.save` wrote to a file, on the CPU.

    Args:
        path: the file.
        otherwise: what to call it in the message where it cannot be read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes raises anything
        raise UserError(f"{path}: {otherwise} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The reason in an error's message: its first sentence, without colours or PyTorch's advice to trust the file."""
    reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).rpartition("WeightsUnpickler error:")[2]
    return re.split(r"(?<=\.)\s|\n", reason.strip())[0] or type(error).__name__


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
