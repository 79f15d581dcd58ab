"""Draw frames, the maps before and after the RRU, and its gate, as the paper's Figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from build_tools.palette import TEXT
from rru_fast import State
from rru_fast.reference import RRU
from training.data.resizing import Resize
from training.data.tracklets import Tracklet
from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.features import CHUNK, read_maps
from training.evaluation.ranking import Floats, Ints
from training.model.network import Network
from training.runtime.errors import UserError
from training.runtime.terminal import progress
from training.show.gate import gate
from training.show.picture import fitted, index_of, pixels

TALL, STEP = 2.0, 1.06  # height of a frame's box, and distance to the next, in widths of a box
SCALE = 0.64  # inches per width
LEFT, RIGHT, HEAD, GAP = 0.4, 1.0, 0.8, 0.1  # margins around rows and the gap between them, in inches
HEIGHT = HEAD + 4 * (SCALE * TALL + GAP)  # of a block, in inches
VEIL = 0.65  # opacity of a map over its frame
NARROW = 1e-3  # smallest span of the gate's color scale


@dataclass
class Options(UseOptions):
    """Draw a tracklet's frames, the maps before and after the RRU, and its gate."""

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    output: Path
    """The PNG."""
    tracklet: str | None = None
    """Name of a tracklet among the queries, the gallery, or those trained on."""
    queries: Annotated[int | None, tyro.conf.arg(aliases=["--probes"])] = None
    """Instead of a name, the number of queries to draw, from the first; 1 if neither is given."""
    frames: int = 8
    """Number of frames to draw per tracklet: the first, the last, and others evenly spaced between."""


@dataclass(frozen=True)
class Maps:
    """Maps of an RRU for a tracklet of T frames, averaged over the channels.

    tracklet: the tracklet.
    x, s: (T, H, W), X_t before the RRU and S_t after it.
    z: (T, H, W), the gate Z_t; NaN at the first frame, where S_1 = X_1 for any gate.
    """

    tracklet: Tracklet
    x: Floats
    z: Floats
    s: Floats


def show(options: Options) -> Figure:
    """Draw what the options say.

    Raises:
        UserError: the checkpoint or the data cannot be used, the network has no RRU, or there is no such tracklet.
    """
    if options.tracklet is not None and options.queries is not None:
        raise UserError(f"tracklet: got {options.tracklet!r} with queries {options.queries}, wanted one of the two")
    if options.frames < 2:
        raise UserError(f"frames: got {options.frames}, wanted at least 2: the gate opens at the second")
    trained = load_trained(options.checkpoint, options)
    split, resize = trained.split, trained.settings.source.resize
    tracklets = split.query[: options.queries or 1]
    if options.tracklet is not None:
        known = (*split.query, *split.gallery, *split.train)
        tracklets = (known[index_of(options.tracklet, known, "tracklet")],)
    elif options.queries is not None and not 1 <= options.queries <= len(split.query):
        raise UserError(f"queries: got {options.queries}, wanted 1 to {len(split.query)}")
    return picture([maps_of(trained.network, tracklet, resize=resize) for tracklet in tracklets], options.frames)


@torch.no_grad()
def maps_of(network: Network, tracklet: Tracklet, chunk: int = CHUNK, resize: Resize = "device") -> Maps:
    """Run all frames of a tracklet through backbone and RRU in eval mode, chunk by chunk; the mode is restored.

    Raises:
        UserError: the network has no RRU, the tracklet has only one frame, or a frame cannot be read.
    """
    rru = network.rru
    if not isinstance(rru, RRU):
        raise UserError("checkpoint: got a network without an RRU, wanted one that has maps before and after it")
    if len(tracklet.frames) < 2:
        raise UserError(f"tracklet {tracklet.name}: got one frame, wanted more: the gate opens at the second")
    was_training = network.training
    network.eval()
    try:
        parts: list[tuple[Floats, ...]] = []
        state: State | None = None
        with progress("Reading maps", len(tracklet.frames), "frames") as advance:
            for start in range(0, len(tracklet.frames), chunk):
                x = read_maps(network, tracklet.frames[start : start + chunk], resize)
                before = state or State(x[:1], x[:1])
                refined = rru(x[None], state=state)
                state, s = refined.state, refined.features[0]
                z = gate(rru, x, torch.cat((before.s, s[:-1])), torch.cat((before.x, x[:-1])))
                parts.append(tuple(maps.mean(1).double().cpu().numpy() for maps in (x, z, s)))  # (T, H, W) each
                advance(len(x))
    finally:
        network.train(was_training)
    x, z, s = (np.concatenate(part) for part in zip(*parts, strict=True))
    z[0] = np.nan
    return Maps(tracklet, x, z, s)


def picture(tracklets: Sequence[Maps], columns: int) -> Figure:
    """Draw one block per tracklet: a row of frames, and rows of the maps X_t, Z_t and S_t over them.

    X_t and S_t share a color scale within a tracklet, and the gate has its own.

    Args:
        tracklets: at least one.
        columns: maximum number of frames drawn: the first, the last, and others evenly spaced between.
    """
    most = max(min(columns, len(maps.x)) for maps in tracklets)
    size = LEFT + SCALE * STEP * most + RIGHT, HEIGHT * len(tracklets)
    figure = Figure(figsize=size, dpi=100)
    for block, maps in zip(figure.subfigures(len(tracklets), squeeze=False).ravel(), tracklets, strict=True):
        _draw(block, maps, np.unique(np.linspace(0, len(maps.x) - 1, columns).round().astype(np.int64)))
    return figure


def _draw(block: SubFigure, maps: Maps, times: Ints) -> None:
    tracklet = maps.tracklet
    who = f"{tracklet.name}: person {tracklet.person}, camera {tracklet.camera}, {len(tracklet.frames)} frames"
    block.text(0.5, 0.99, who, color=TEXT, fontsize=11, ha="center", va="top")
    both, gates = np.concatenate((maps.x[times], maps.s[times])), maps.z[times[1:]]
    room = max(0.0, NARROW - float(np.ptp(gates))) / 2  # or rounding errors would fill an almost constant gate's scale
    scale, own = Normalize(both.min(), both.max()), Normalize(gates.min() - room, gates.max() + room)
    # The gate's colors always use the whole color map: state the range they cover.
    span = f"gate 0: past, 1: frame; its colors span {gates.min():.4f} to {gates.max():.4f}"
    block.text(0.5, 1 - 0.27 / HEIGHT, span, color=TEXT, fontsize=9, ha="center", va="top")
    frames = [pixels(tracklet, int(time)) for time in times]
    top = _row(block, 0, "frame", len(times))
    for column, (time, frame) in enumerate(zip(times, frames, strict=True)):
        top.imshow(frame, extent=fitted(frame, STEP * column, 0, 1, TALL), aspect="auto")
        top.text(STEP * column + 0.5, -0.08, f"$t$ = {time + 1}", color=TEXT, ha="center", va="bottom")
    rows = (
        ("$X_t$, before", maps.x, scale, "inferno"),
        ("$Z_t$, gate", maps.z, own, "viridis"),
        ("$S_t$, after", maps.s, scale, "inferno"),
    )
    for number, (name, values, norm, color_map) in enumerate(rows, start=1):
        axes = _row(block, number, name, len(times))
        for column, (time, frame) in enumerate(zip(times, frames, strict=True)):
            extent = fitted(frame, STEP * column, 0, 1, TALL)
            axes.imshow(frame.mean(2), extent=extent, cmap="gray", vmin=0, vmax=255, aspect="auto")
            if values is maps.z and time == 0:
                plain = {"facecolor": "white", "edgecolor": "none", "pad": 2}
                axes.text(0.5, TALL / 2, "$S_1 = X_1$", color=TEXT, ha="center", va="center", bbox=plain)
            else:
                veil = axes.imshow(values[time], extent=extent, aspect="auto", cmap=color_map, norm=norm, alpha=VEIL)
                veil.set_interpolation("bilinear")
        bar = axes.inset_axes((1.01, 0, 0.12 / (SCALE * STEP * len(times)), 1))
        block.colorbar(ScalarMappable(norm, color_map), cax=bar, alpha=VEIL, ticks=MaxNLocator(4), format="%.4g")
        bar.tick_params(labelsize=8, colors=TEXT)
        bar.set_ylabel("mean over channels", color=TEXT, fontsize=8)


def _row(block: SubFigure, number: int, name: str, columns: int) -> Axes:
    """Add the axes of a row, counted from the top: one unit is a frame's width, SCALE inches; y points down."""
    width, bottom = float(block.figure.bbox.width / block.figure.dpi), GAP + (3 - number) * (SCALE * TALL + GAP)
    place = LEFT / width, bottom / HEIGHT, SCALE * STEP * columns / width, SCALE * TALL / HEIGHT
    axes: Axes = block.add_axes(place)
    axes.set(xlim=(0, STEP * columns), ylim=(TALL, 0), autoscale_on=False, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(name, color=TEXT, fontsize=11)
    return axes
