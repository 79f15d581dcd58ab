"""Search a gallery of features: `python -m training.search --gallery FILE --query FILE`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from training.data.image_folder import frames_of_folder
from training.data.tracklets import Tracklet
from training.engine.feature_extractor import FeatureExtractor, unit_features
from training.evaluation.ranking import Floats, Ints
from training.retrieval.exact import nearest
from training.retrieval.faiss_index import Index
from training.retrieval.feature_file import FeatureFile, open_features
from training.runtime.command import run_command
from training.runtime.device import Device, choose_device
from training.runtime.errors import UserError
from training.runtime.terminal import say

CHECKED = 100  # queries of an approximate search that are also searched exactly


@dataclass
class Options:
    """Find the gallery tracklets nearest to each query, by the cosine of their features.

    The gallery is a file by `python -m training.export features`. The queries come from another such file, or from a
    folder with the frames of one tracklet, of which the checkpoint's network extracts the feature.
    """

    gallery: Path
    """File of the gallery's features."""
    query: Path | None = None
    """File of the queries' features."""
    names: tuple[str, ...] = ()
    """Names of queries in that file; all if not given."""
    frames: Path | None = None
    """Instead of --query, a folder of images: the frames of one tracklet, in natural order of their names."""
    checkpoint: Path | None = None
    """With --frames, the folder of the run, or of the checkpoint, that extracted the gallery's features."""
    top: int = 10
    """Number of tracklets to find per query."""
    index: Literal["exact", "faiss"] = "exact"
    """Search the whole gallery exactly, or approximately by an index stored next to it, for millions of tracklets."""
    device: Device = "auto"
    """The device to compute on; the index is on the CPU."""


@dataclass(frozen=True)
class Hit:
    """A gallery tracklet found for a query.

    query: name of the query.
    rank: from 1, the nearest.
    similarity: cosine of the features.
    person, camera, name: of the gallery tracklet.
    """

    query: str
    rank: int
    similarity: float
    person: int
    camera: int
    name: str


def search(options: Options) -> list[Hit]:
    """Find and show the most similar tracklets.

    Raises:
        UserError: the options or the files cannot be used, the features are of different networks, or faiss is missing.
    """
    if options.top < 1:
        raise UserError(f"top: got {options.top}, wanted at least 1")
    gallery, device = open_features(options.gallery), choose_device(options.device)
    names, queries, network = _from_frames(options) if options.frames else _from_file(options)
    _check_comparable(gallery, queries, network)
    count = min(options.top, gallery.rows)
    index = None if options.index == "exact" else Index(gallery, say)
    if index is None:
        similarity, rows = nearest(queries, gallery, count, device)
    else:
        similarity, rows = _approximate(index, queries, gallery, count, device)
    hits = [
        Hit(name, rank, float(value), gallery.people[row], gallery.cameras[row], gallery.names[row])
        for name, values, found in zip(names, similarity, rows, strict=True)
        for rank, (value, row) in enumerate(zip(values, found.tolist(), strict=True), start=1)
        if row >= 0
    ]
    say(_table(hits, f"{options.index}, of {gallery.rows} in {options.gallery}"))
    if index and index.is_new:
        say(f"index: {index.path}")
    return hits


def _from_file(options: Options) -> tuple[list[str], Tensor, str | None]:
    """Read the queries of a file: names, features (Q, D), and the hash of their network."""
    if options.query is None or options.checkpoint is not None:
        got = "--checkpoint without --frames" if options.checkpoint else "neither --query nor --frames"
        raise UserError(f"query: got {got}, wanted --query, or --frames and --checkpoint")
    file = open_features(options.query)
    features = torch.cat([part for _, part in file.chunks(file.rows)])
    rows = list(range(file.rows))
    if options.names:
        unknown = [name for name in options.names if name not in file.names]
        if unknown:
            raise UserError(f"names: got {unknown[0]!r}, wanted some of {file.path}'s, such as {file.names[0]!r}")
        rows = [row for wanted in options.names for row, name in enumerate(file.names) if name == wanted]
    return [file.names[row] for row in rows], features[rows], file.about.get("network")


def _from_frames(options: Options) -> tuple[list[str], Tensor, str | None]:
    """Extract the feature of a folder's frames: name, feature (1, D), and the hash of the network."""
    folder = options.frames
    assert folder is not None
    if options.checkpoint is None or options.query is not None or options.names:
        raise UserError("frames: got --frames without --checkpoint, or with --query or --names, wanted just these two")
    frames = frames_of_folder(folder, "frames")
    extractor, name = FeatureExtractor(options.checkpoint, device=options.device), folder.resolve().name
    feature = unit_features(extractor.extract([Tracklet(-1, -1, frames, name)]), [f"frames: {folder}"])
    return [name], torch.from_numpy(feature).float(), extractor.about["network"]


def _check_comparable(gallery: FeatureFile, queries: Tensor, network: str | None) -> None:
    """Raise a UserError if the features are of different networks; warn if that cannot be determined."""
    if queries.shape[1] != gallery.width:
        raise UserError(f"query: got features of {queries.shape[1]} numbers, wanted {gallery.width}, as the gallery's")
    of_gallery = gallery.about.get("network")
    if network is None or of_gallery is None:
        line = "a file does not say which network its features are of; those of different networks do not compare"
        warnings.warn(line, stacklevel=2)
    elif network != of_gallery:
        where = f"{gallery.about.get('checkpoint')} ({of_gallery[:12]})"
        raise UserError(f"query: got features of network {network[:12]}, wanted those of the gallery's, {where}")


def _approximate(
    index: Index, queries: Tensor, gallery: FeatureFile, count: int, device: torch.device
) -> tuple[Floats, Ints]:
    """Search the index, and show its recall against exact search for the first queries."""
    started = time.perf_counter()
    similarity, rows = index.nearest(queries, count)
    between = time.perf_counter()
    _, wanted = nearest(queries[:CHECKED], gallery, count, device)
    ended = time.perf_counter()
    recall = np.mean([np.isin(right, found).mean() for right, found in zip(wanted, rows, strict=False)])
    say(
        f"recall@{count} {recall:.3f} against exact search, over {len(wanted)} of {len(queries)} queries; "
        f"index {between - started:.3f} s for all, exact {ended - between:.3f} s for those"
    )
    return similarity, rows


def _table(hits: list[Hit], title: str) -> Table:
    table = Table("query", title=escape(title), title_justify="left")
    for column in ("rank", "similarity", "person", "camera"):
        table.add_column(column, justify="right")
    table.add_column("name")
    before = None
    for hit in hits:
        if before not in (None, hit.query):
            table.add_section()
        shown = "" if hit.query == before else hit.query
        before = hit.query
        values = (str(hit.rank), f"{hit.similarity:.4f}", str(hit.person), str(hit.camera), escape(hit.name))
        table.add_row(escape(shown), *values)
    return table


if __name__ == "__main__":
    run_command(lambda: search(tyro.cli(Options, prog="python -m training.search")))
