"""Weights files: torchvision's download, .pth and .safetensors, loaded only where every name and shape fits."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from training.runtime.errors import UserError

_BACKBONE = "backbone.net."  # of a network of this project, a prefix of the names
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "network", "net")


def download_inception() -> dict[str, Tensor] | None:
    """Torchvision's ImageNet weights of Inception-v3, or `None` and a warning where they cannot be fetched."""
    from torchvision.models import Inception_V3_Weights  # takes as long to import as torch

    state = download(Inception_V3_Weights.IMAGENET1K_V1)
    if isinstance(state, str):
        warnings.warn(f"no ImageNet weights ({state}): Inception-v3 starts at random", stacklevel=3)
        return None
    return state


def download(weights: Any) -> dict[str, Tensor] | str:
    """Fetch one of torchvision's weights, or find it among those fetched before; return the reason if that fails."""
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    # URLError is an OSError; a wrong hash is a RuntimeError; a file fetched by halves is any of the last three.
    except (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError) as error:
        return first_line(error)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file by name.

    A .pth file holds a state_dict, or a training checkpoint with one under a name of `_STATE_KEYS`, in any of
    PyTorch's serialization formats that load without running code.

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
    content = load_pickle(path, "not a readable state_dict")
    nested = [content[key] for key in _STATE_KEYS if key in content] if isinstance(content, dict) else []
    for state in (content, *nested):
        if _is_state_dict(state):
            return dict(state)
    wanted = f"a state_dict (names to dense tensors), or one under {', '.join(map(repr, _STATE_KEYS))}"
    raise UserError(f"weights: {path} holds a {_described(content)}, wanted {wanted}")


def _described(content: Any) -> str:
    """Name a type, and of a dict the first entry that a state_dict does not have."""
    kind = type(content).__name__
    if not isinstance(content, dict) or not content:
        return kind
    name, value = next((name, value) for name, value in content.items() if not _is_entry(name, value))
    return f"{kind} with {str(name)[:60]!r}: {type(value).__name__}"


def _is_entry(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_meta and not value.is_complex()


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(_is_entry(*entry) for entry in content.items())


def load_pickle(path: Path, otherwise: str) -> Any:
    """Read what `torch.save` wrote to a file, to the CPU.

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
    """The reason in an error's message: its first sentence, without colors or PyTorch's advice to trust the file."""
    reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).rpartition("WeightsUnpickler error:")[2]
    return re.split(r"(?<=\.)\s|\n", reason.strip())[0] or type(error).__name__


def load_pretrained(module: nn.Module, state: Mapping[str, Tensor], source: str, unused: tuple[str, ...] = ()) -> None:
    """Load weights that were published for a network, in the forms in which they are published.

    As `load_weights`, but a prefix "module." (of DataParallel) or "_orig_mod." (of torch.compile) that all names have
    is dropped, and a batch norm's num_batches_tracked that is missing, as in files from before PyTorch 0.4.1, is 0. Of
    a network of this project only its backbone is taken.

    Args:
        module: without the layers that are replaced anyway.
        state: tensors by name.
        source: where they come from, for messages.
        unused: prefixes of names of layers that are left out, e.g. "fc.".

    Raises:
        UserError: a name is unknown or missing, or a shape differs.
    """
    if backbone := {name: value for name, value in state.items() if name.startswith(_BACKBONE)}:
        state = {name.removeprefix(_BACKBONE): value for name, value in backbone.items()}
    names = list(state)
    for prefix in ("module.", "_orig_mod.") * 2:  # in either order
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    counters = {name: torch.tensor(0) for name in module.state_dict() if name.endswith(".num_batches_tracked")}
    given = {name: value for name, value in zip(names, state.values(), strict=True) if not name.startswith(unused)}
    load_weights(module, counters | given, source)


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
    problems_found = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})"
        for what, keys in problems.items()
        if keys
    ]
    if problems_found:
        raise UserError(f"weights: {source} does not fit this network: {'; '.join(problems_found)}")
    module.load_state_dict(state)
