"""An approximate index of a gallery of millions, by faiss, built once and kept beside it."""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from training.evaluation.ranking import Floats, Ints
from training.model.weights import first_line
from training.retrieval.exact import unit
from training.retrieval.feature_file import FeatureFile
from training.runtime.atomic_files import write_output
from training.runtime.command import need
from training.runtime.errors import UserError

_ROWS = 2**16  # added at once
_POINTS = 64  # a list is trained on, on average


class Index:
    """The gallery in about sqrt(N) lists by k-means; a search looks into the nearest sixteenth of them, 8 at least.

    It is read from `<gallery>.<checksum>.ivf`. Where there is none for what the gallery holds now, it is built first,
    and takes the place of an older one.

    Args:
        gallery: of N features; all of them are held in memory.
        say: told when one is built.

    Raises:
        UserError: faiss is missing, the index cannot be read or written, or a feature is zero or not finite.
    """

    def __init__(self, gallery: FeatureFile, say: Callable[[str], None]) -> None:
        self._faiss = need("faiss", "search")
        folder, name = gallery.path.parent, gallery.path.name
        path = folder / f"{name}.{_checksum(gallery.path)}.ivf"
        if not path.exists():
            say(f"building an index of {gallery.rows} features: {path}")
            # Through memory: faiss does not tell of a disk that fills up at the end of a file.
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
        """Cosine similarities, descending, and rows, both (Q, k); -1 in the place of a row that was not found."""
        similarity, rows = self._index.search(unit(queries).numpy(), count)
        order = np.lexsort((rows, -similarity))
        return np.take_along_axis(similarity, order, 1).astype(np.float64), np.take_along_axis(rows, order, 1)

    def _build(self, gallery: FeatureFile) -> Any:
        lists = round(math.sqrt(gallery.rows))
        index = self._faiss.index_factory(gallery.width, f"IVF{lists},Flat", self._faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = _POINTS, 1
        step = max(1, gallery.rows // (_POINTS * lists))
        index.train(
            np.concatenate([unit(part[-start % step :: step]).numpy() for start, part in gallery.chunks(_ROWS)])
        )
        for _, part in gallery.chunks(_ROWS):
            index.add(unit(part).numpy())
        return index


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]
