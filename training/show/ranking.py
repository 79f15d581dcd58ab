"""Draw queries and their nearest gallery tracklets, with hits and misses framed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from build_tools.palette import GREEN, RED, TEXT
from training.data.tracklets import Split, Tracklet
from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.protocols import ProtocolName
from training.evaluation.ranking import Ints
from training.evaluation.scoring import EmbeddedSplit, embed_split
from training.runtime.errors import UserError
from training.runtime.terminal import track
from training.show.picture import break_name, fitted, index_of, pixels

WIDE, TALL = 1.0, 2.0  # width and height of a frame's box
STEP, ROW = 1.28, 3.05  # distance from box to box, and from query to query
GAP = 0.5  # between a query and its nearest
HEAD = 0.45  # height of the heading
SCALE = 0.64  # inches per width


@dataclass
class Options(UseOptions):
    """Draw queries and their nearest gallery tracklets, hits framed green and misses dashed red."""

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    output: Path
    """The PNG."""
    queries: Annotated[int | tuple[str, ...], tyro.conf.arg(aliases=["--probes"])] = 6
    """Names of queries, or a number to choose: some with a hit at rank 1, and those with the worst first hit."""
    top: int = 8
    """Number of gallery tracklets to draw for each."""
    protocol: ProtocolName | None = None
    """Protocol to rank by; the dataset's own if not given."""


@dataclass(frozen=True)
class SearchResult:
    """Gallery tracklets nearest to a query.

    query: the query.
    gallery: the nearest that are not junk, nearest first; of equal distances the earlier in the gallery first.
    distances: their distances.
    hits: whether each shows the query's person.
    first: rank, from 1, of the first hit in the whole gallery; `None` if there is none.
    """

    query: Tracklet
    gallery: tuple[Tracklet, ...]
    distances: tuple[float, ...]
    hits: tuple[bool, ...]
    first: int | None


def show(options: Options) -> Figure:
    """Draw what the options say.

    Raises:
        UserError: the checkpoint or the data cannot be used, there is no such query, or a number is out of range.
    """
    if options.top < 1:
        raise UserError(f"top: got {options.top}, wanted at least 1")
    count = options.queries if isinstance(options.queries, int) else len(options.queries)
    if count < 1:
        raise UserError(f"queries: got {count}, wanted at least 1")
    trained = load_trained(options.checkpoint, options)
    asked: Ints | slice = slice(None)
    split, resize = trained.split, trained.settings.source.resize
    if not isinstance(options.queries, int):
        asked = np.array([index_of(name, split.query, "queries") for name in options.queries])
    embedded = embed_split(trained.network, split, protocol=options.protocol, resize=resize)
    rows = search(embedded, split, options.top, asked)
    return picture(choose(rows, options.queries) if isinstance(options.queries, int) else rows)


def search(embedded: EmbeddedSplit, split: Split, top: int, queries: Ints | slice = slice(None)) -> list[SearchResult]:
    """Find the `top` nearest gallery tracklets of all queries or of some, without those that are junk to a query."""
    masks, result = embedded.masks, []
    asked = np.arange(len(split.query))[queries]
    distances = chain.from_iterable(embedded.distances(queries))
    for query, distance in track(zip(asked, distances, strict=True), "Ranking", len(asked), "queries"):
        not_junk, positive = masks.not_junk[query], masks.positive[query]
        order = torch.where(not_junk, distance.cpu(), torch.inf).argsort(stable=True)[: not_junk.count_nonzero()]
        hits = positive[order].nonzero().ravel()
        nearest = order[:top]
        result.append(
            SearchResult(
                split.query[query],
                tuple(split.gallery[at] for at in masks.gallery_rows[nearest]),
                tuple(distance.cpu()[nearest].tolist()),
                tuple(positive[nearest].tolist()),
                int(hits[0]) + 1 if len(hits) else None,
            )
        )
    return result


def choose(rows: Sequence[SearchResult], count: int) -> list[SearchResult]:
    """Choose the first queries with a hit at rank 1, then as many with the worst first hits, the worst first.

    Queries without a match are left out. If there are too few of one kind, the other fills up.
    """
    at_once = [row for row in rows if row.first == 1]
    later = sorted((row for row in rows if (row.first or 1) > 1), key=lambda row: -(row.first or 1))
    worst = later[: max(count // 2, count - len(at_once))]
    return [*at_once[: count - len(worst)], *worst]


def picture(rows: Sequence[SearchResult]) -> Figure:
    """Draw one row per query: its middle frame, and those of its nearest, with distance, person and time, if known.

    A hit has a solid frame and a miss a dashed one, so the picture is readable without color.
    """
    most = max(len(row.gallery) for row in rows)
    width, height = STEP * (most + 1) + GAP + 0.1, HEAD + ROW * len(rows) + 0.1
    figure = Figure(figsize=(SCALE * width, SCALE * height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for left, heading in ((0.1, "query"), (0.1 + GAP + STEP, "nearest first, by cosine distance")):
        axes.text(left, HEAD / 2, heading, color=TEXT, va="center", fontsize=10)
    for number, row in enumerate(rows):
        top = HEAD + ROW * number + 0.15
        rank = "no match" if row.first is None else f"first hit: {row.first}"
        _frame(axes, row.query, 0.1, top, TEXT, "-", f"{break_name(row.query.name)}\nperson {row.query.person}\n{rank}")
        for place, (tracklet, distance, hit) in enumerate(zip(row.gallery, row.distances, row.hits, strict=True)):
            color, line, mark = (GREEN, "-", "✓") if hit else (RED, "--", "✗")
            begin = tracklet.name.partition("@")[2].partition("-")[0]
            text = f"{distance:.3f}\nperson {tracklet.person} {mark}" + (f"\nfrom {begin}" if begin else "")
            _frame(axes, tracklet, 0.1 + GAP + STEP * (place + 1), top, color, line, text)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _frame(axes: Axes, tracklet: Tracklet, left: float, top: float, color: str, line: str, text: str) -> None:
    frame = pixels(tracklet, len(tracklet.frames) // 2)
    x0, x1, y1, y0 = fitted(frame, left, top, WIDE, TALL)
    axes.imshow(frame, extent=(x0, x1, y1, y0))
    box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linestyle=line, linewidth=3.5)
    axes.add_patch(box)
    axes.text(x0, top + TALL + 0.06, text, color=color, va="top", fontsize=8)
