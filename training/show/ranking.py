"""Probes and who was found for them, nearest first, hits and misses framed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from training.data.tracklets import Split, Tracklet
from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.protocols import ProtocolName
from training.evaluation.ranking import Ints
from training.evaluation.scoring import Compared, compare
from training.runtime.errors import UserError
from training.runtime.terminal import track
from training.show.picture import GREEN, RED, TEXT, fitted, index_of, pixels

WIDE, TALL = 1.0, 2.0  # of a frame's box
STEP, ROW = 1.28, 2.85  # from box to box, and from probe to probe
ASIDE = 0.5  # between a probe and the first that was found
HEAD = 0.45  # above the first probe
SCALE = 0.64  # inches of a width


@dataclass
class Options(UseOptions):
    """Draw probes and the tracklets found for them, nearest first, hits framed green and misses dashed red."""

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    output: Path
    """The PNG."""
    probes: int | tuple[str, ...] = 6
    """Names of probes, or how many to choose: some that are found at once, and those found last."""
    top: int = 8
    """How many of the gallery to draw for each."""
    protocol: ProtocolName | None = None
    """The rules to rank by; those the dataset is made for unless given."""


@dataclass(frozen=True)
class Found:
    """What was found for a probe.

    probe: who was looked for.
    gallery: the nearest that count by the protocol, nearest first; of equally far the earlier in the gallery first.
    distances: of these.
    hits: which of these show the probe's person.
    first: the rank, from 1, of the nearest of all that does, drawn or not; `None` if the gallery has none.
    """

    probe: Tracklet
    gallery: tuple[Tracklet, ...]
    distances: tuple[float, ...]
    hits: tuple[bool, ...]
    first: int | None


def show(options: Options) -> Figure:
    """Draw what the options say.

    Raises:
        UserError: the checkpoint or the data cannot be used, there is no such probe, or a number is out of range.
    """
    if options.top < 1:
        raise UserError(f"top: got {options.top}, wanted at least 1")
    count = options.probes if isinstance(options.probes, int) else len(options.probes)
    if count < 1:
        raise UserError(f"probes: got {count}, wanted at least 1")
    trained = load_trained(options.checkpoint, options)
    asked: Ints | slice = slice(None)
    if not isinstance(options.probes, int):
        asked = np.array([index_of(name, trained.split.query, "probes") for name in options.probes])
    compared = compare(trained.network, trained.split, protocol=options.protocol, resize=trained.settings.source.resize)
    rows = found(compared, trained.split, options.top, asked)
    return picture(choose(rows, options.probes) if isinstance(options.probes, int) else rows)


def found(compared: Compared, split: Split, top: int, probes: Ints | slice = slice(None)) -> list[Found]:
    """The nearest `top` of the gallery for all probes or for some, what is junk to a probe left out."""
    trial, result = compared.trial, []
    asked = np.arange(len(split.query))[probes]
    distances = chain.from_iterable(compared.distances(probes))
    for probe, distance in track(zip(asked, distances, strict=True), "Ranking", len(asked), "queries"):
        counts, positive = trial.counts[probe], trial.positive[probe]
        order = torch.where(counts, distance.cpu(), torch.inf).argsort(stable=True)[: counts.count_nonzero()]
        right = positive[order].nonzero().ravel()
        nearest = order[:top]
        result.append(
            Found(
                split.query[probe],
                tuple(split.gallery[at] for at in trial.kept[nearest]),
                tuple(distance.cpu()[nearest].tolist()),
                tuple(positive[nearest].tolist()),
                int(right[0]) + 1 if len(right) else None,
            )
        )
    return result


def choose(rows: Sequence[Found], count: int) -> list[Found]:
    """The first probes that are found at once, then as many of those found last, the worst first.

    A probe without a match is not among them. Where one kind has too few, there are more of the other.
    """
    at_once = [row for row in rows if row.first == 1]
    later = sorted((row for row in rows if (row.first or 1) > 1), key=lambda row: -(row.first or 1))
    worst = later[: max(count // 2, count - len(at_once))]
    return [*at_once[: count - len(worst)], *worst]


def picture(rows: Sequence[Found]) -> Figure:
    """Draw a row a probe: its middle frame, and those of the gallery's nearest, each with distance and person.

    A hit's frame is whole and a miss's dashed, so that no one needs the colours.
    """
    most = max(len(row.gallery) for row in rows)
    width, height = STEP * (most + 1) + ASIDE + 0.1, HEAD + ROW * len(rows) + 0.1
    figure = Figure(figsize=(SCALE * width, SCALE * height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for left, heading in ((0.1, "probe"), (0.1 + ASIDE + STEP, "nearest first, by cosine distance")):
        axes.text(left, HEAD / 2, heading, color=TEXT, va="center", fontsize=10)
    for number, row in enumerate(rows):
        top = HEAD + ROW * number + 0.15
        rank = "no match" if row.first is None else f"first hit: {row.first}"
        _frame(axes, row.probe, 0.1, top, TEXT, "-", f"{row.probe.name}\nperson {row.probe.person}\n{rank}")
        for place, (tracklet, distance, hit) in enumerate(zip(row.gallery, row.distances, row.hits, strict=True)):
            colour, line, mark = (GREEN, "-", "✓") if hit else (RED, "--", "✗")
            told = f"{distance:.3f}\nperson {tracklet.person} {mark}"
            _frame(axes, tracklet, 0.1 + ASIDE + STEP * (place + 1), top, colour, line, told)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _frame(axes: Axes, tracklet: Tracklet, left: float, top: float, colour: str, line: str, told: str) -> None:
    frame = pixels(tracklet, len(tracklet.frames) // 2)
    x0, x1, y1, y0 = fitted(frame, left, top, WIDE, TALL)
    axes.imshow(frame, extent=(x0, x1, y1, y0))
    box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=line, linewidth=3.5)
    axes.add_patch(box)
    axes.text(x0, top + TALL + 0.06, told, color=colour, va="top", fontsize=8)
