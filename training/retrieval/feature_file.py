"""Features of tracklets with their labels in a safetensors file, which may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.evaluation.ranking import Floats
from training.model.weights import first_line
from training.runtime.atomic_files import write_output
from training.runtime.errors import UserError

SUFFIX = ".safetensors"
_DTYPES = {"features": "F32", "people": "I64", "cameras": "I64", "names": "U8"}


def write_features(
    path: Path,
    features: Floats | Tensor,
    people: Sequence[int],
    cameras: Sequence[int],
    names: Sequence[str],
    about: Mapping[str, str],
) -> None:
    """Write the features of N tracklets.

    The file holds "features" (N, D) float32, "people" and "cameras" (N,) int64, and "names", the UTF-8 bytes of a JSON
    list of N strings, for which the header may be too small.

    Args:
        path: a new file.
        features: (N, D).
        people, cameras, names: N of each, one per tracklet.
        about: the provenance of the features, stored as the file's metadata.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {
        "features": torch.as_tensor(features, dtype=torch.float32).contiguous(),
        "people": torch.tensor(people, dtype=torch.int64),
        "cameras": torch.tensor(cameras, dtype=torch.int64),
        "names": torch.frombuffer(bytearray(json.dumps(list(names)).encode()), dtype=torch.uint8),
    }
    write_output(path, safetensors.torch.save(tensors, dict(about)))


@dataclass(frozen=True)
class FeatureFile:
    """An open file of N features.

    path: its path.
    rows, width: N and D.
    about: its metadata.
    """

    path: Path
    rows: int
    width: int
    about: dict[str, str]
    _opened: Any

    @cached_property
    def people(self) -> list[int]:
        """Person of each of the N tracklets."""
        people: list[int] = self._opened.get_tensor("people").tolist()
        return people

    @cached_property
    def cameras(self) -> list[int]:
        """Camera of each of the N tracklets."""
        cameras: list[int] = self._opened.get_tensor("cameras").tolist()
        return cameras

    @cached_property
    def names(self) -> list[str]:
        """Name of each of the N tracklets.

        Raises:
            UserError: the file holds another number of names, or one that is not a string.
        """
        try:
            names: list[str] = json.loads(self._opened.get_tensor("names").numpy().tobytes())
        except ValueError as error:
            raise UserError(f"{self.path}: names: got invalid JSON ({error}), wanted a list") from error
        if not isinstance(names, list) or len(names) != self.rows:
            got = f"{len(names)} of them" if isinstance(names, list) else "something else"
            raise UserError(f"{self.path}: names: got {got}, wanted a list of {self.rows}, one a tracklet")
        if other := [name for name in names if not isinstance(name, str)]:
            raise UserError(f"{self.path}: names: got {other[0]!r}, wanted strings")
        return names

    def chunks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the features in parts (n, D) of at most `rows` rows, each after the number of its first row.

        Raises:
            UserError: a feature is not finite, or is zero and has no direction.
        """
        features = self._opened.get_slice("features")
        for start in range(0, self.rows, rows):
            part = features[start : start + rows]
            largest = part.abs().amax(1)
            usable = largest.isfinite() & (largest > 0)
            if not usable.all():
                row = start + int((~usable).nonzero()[0])
                raise UserError(f"{self.path}: the feature of {self.names[row]} (row {row}) is zero or not finite")
            yield start, part


def open_features(path: Path) -> FeatureFile:
    """Open a file by `write_features`, or another with the same tensors.

    Raises:
        UserError: it does not exist, or holds something else.
    """
    try:
        opened: Any = safe_open(path, framework="pt")
        shapes = {name: opened.get_slice(name).get_shape() for name in _DTYPES if name in opened.keys()}  # noqa: SIM118
        dtypes = {name: opened.get_slice(name).get_dtype() for name in shapes}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable file of features ({first_line(error)})") from error
    missing = [name for name in _DTYPES if name not in shapes]
    if missing:
        raise UserError(f"{path}: got no {', '.join(missing)}, wanted a file of `python -m training.export features`")
    if len(shapes["features"]) != 2 or 0 in shapes["features"]:
        raise UserError(f"{path}: features: got shape {tuple(shapes['features'])}, wanted (tracklets, D)")
    rows, width = shapes["features"]
    for name, dtype in _DTYPES.items():
        if dtypes[name] != dtype:
            raise UserError(f"{path}: {name}: got dtype {dtypes[name]}, wanted {dtype}")
        if name in ("people", "cameras") and shapes[name] != [rows]:
            raise UserError(f"{path}: {name}: got shape {tuple(shapes[name])}, wanted ({rows},), one a tracklet")
    return FeatureFile(path, rows, width, opened.metadata() or {}, opened)
