"""The labels of MARS as its authors distribute them, and labels small enough for every case to come up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

from training.evaluation.protocols import QueryGallery


def _mars(folder: Path, *, junk: bool) -> QueryGallery:
    tracks = loadmat(folder / "tracks_test_info.mat")["track_test_info"].astype(np.int64)
    queries = loadmat(folder / "query_IDX.mat")["query_IDX"].ravel().astype(np.int64) - 1
    rows = np.flatnonzero(junk | (tracks[:, 2] != -1))
    people, cameras = tracks[:, 2], tracks[:, 3]
    return QueryGallery(people[queries], cameras[queries], people[rows], cameras[rows], np.searchsorted(rows, queries))


@pytest.fixture
def mars(shared_dir: Path) -> QueryGallery:
    """1,980 queries in a gallery of 11,310: MARS without the tracklets of person -1."""
    return _mars(shared_dir / "data" / "mars-info", junk=False)


@pytest.fixture
def mars_with_junk(shared_dir: Path) -> QueryGallery:
    """1,980 queries in a gallery of 12,180: all of MARS."""
    return _mars(shared_dir / "data" / "mars-info", junk=True)
