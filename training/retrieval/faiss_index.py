"""Approximate search in a gallery of millions: a faiss index, built once and stored next to the gallery."""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.evaluation.ranking import Floats, Ints
from training.model.weights import first_line
from training.retrieval.exact import unit
from training.retrieval.feature_file import FeatureFile
from training.runtime.atomic_files import write_output
from training.runtime.command import need
from training.runtime.errors import UserError
from training.runtime.terminal import progress, track

_ROWS = 2**16  # features per chunk
_QUERIES = 2**10  # per search
_POINTS = 64  # training features per list, on average


class Index:
    """Inverted file of a gallery in about sqrt(N) lists by k-means; a search probes 1/16 of them, at least 8.

    It is read from `<gallery>.<checksum>.ivf`. If there is none for the gallery's present content, it is built first
    and replaces older ones.

    Args:
        gallery: N features; the index holds all of them in memory.
        say: called with a line before an index is built.

    Attributes:
        path: its file.
        is_new: whether it was built now.

    Raises:
        UserError: faiss is missing, the index cannot be read or written, or a feature is zero or not finite.
    """

    def __init__(self, gallery: FeatureFile, say: Callable[[str], None]) -> None:
        self._faiss = need("faiss", "search")
        folder, name = gallery.path.parent, gallery.path.name
        self.path = path = folder / f"{name}.{_checksum(gallery.path)}.ivf"
        self.is_new = not path.exists()
        if self.is_new:
            say(f"building an index of {gallery.rows} features: {path}")
            # Through memory: faiss does not report a disk that fills up at the end of a file.
            write_output(path, self._faiss.serialize_index(self._build(gallery)).tobytes())
            for old in folder.glob(f"{glob.escape(name)}.*.ivf"):
                if old != path:
                    old.unlink(missing_ok=True)
        try:
            self._index = self._faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: not a readable index ({first_line(error)}), remove it") from error
        if (self._index.d, self._index.ntotal) != (gallery.width, gallery.rows) or not hasattr(self._index, "nlist"):
            got = f"an index of {self._index.ntotal} features of {self._index.d} numbers"
            raise UserError(f"{path}: got {got}, wanted one in lists of {gallery.rows} of {gallery.width}; remove it")
        self._index.nprobe = max(8, self._index.nlist // 16)

    def nearest(self, queries: Tensor, count: int) -> tuple[Floats, Ints]:
        """Return cosine similarities, descending, and rows, both (Q, k); the row is -1 where none was found."""
        found = []
        with progress("Searching the index", len(queries), "queries") as advance:
            for part in torch.split(unit(queries), _QUERIES):
                found.append(self._index.search(part.numpy(), count))
                advance(len(part))
        similarity, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((rows, -similarity))
        return np.take_along_axis(similarity, order, 1).astype(np.float64), np.take_along_axis(rows, order, 1)

    def _build(self, gallery: FeatureFile) -> Any:
        lists = round(math.sqrt(gallery.rows))
        index = self._faiss.index_factory(gallery.width, f"IVF{lists},Flat", self._faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = _POINTS, 1
        step = max(1, gallery.rows // (_POINTS * lists))
        sample = [unit(part[-start % step :: step]).numpy() for start, part in _chunks(gallery, "Reading the gallery")]
        with progress("Clustering the features", None):
            index.train(np.concatenate(sample))
        for _, part in _chunks(gallery, "Filling the index"):
            index.add(unit(part).numpy())
        return index


def _chunks(gallery: FeatureFile, description: str) -> Iterator[tuple[int, Tensor]]:
    return track(gallery.chunks(_ROWS), description, gallery.rows, "features", size=lambda chunk: len(chunk[1]))


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, progress("Hashing the gallery", path.stat().st_size / 2**20, "MiB") as advance:
        while block := file.read(2**20):
            digest.update(block)
            advance(len(block) / 2**20)
    return digest.hexdigest()[:16]
