"""CMC curves of several runs: the share of queries whose person is among the k nearest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from build_tools.palette import BLUE, GREEN, ORANGE, PURPLE, QUIET, RED, SKY, TEXT
from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.protocols import ProtocolMasks, ProtocolName
from training.evaluation.ranking import DEEPEST, Floats, Ranking
from training.evaluation.scoring import embed_split
from training.runtime.atomic_files import realpath
from training.runtime.errors import UserError
from training.runtime.terminal import track
from training.show.picture import label_ends

COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, TEXT)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # to distinguish lines in black and white


@dataclass
class Options(UseOptions):
    """Evaluate runs and draw their CMC curves, the share of queries with a match among the k nearest, k to 20."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or of checkpoints."""
    output: Path
    """The PNG."""
    protocol: ProtocolName | None = None
    """Protocol to rank by; the dataset's own if not given."""


@dataclass(frozen=True)
class Curve:
    """CMC of one run.

    name: its label.
    ranking: CMC and mAP.
    chance: (DEEPEST,), the CMC of a random order of its gallery.
    """

    name: str
    ranking: Ranking
    chance: Floats


def show(options: Options) -> Figure:
    """Draw what the options say.

    Raises:
        UserError: a checkpoint or its data cannot be used, or there are too many runs.
    """
    if not 1 <= len(options.runs) <= len(COLORS):
        raise UserError(f"runs: got {len(options.runs)}, wanted 1 to {len(COLORS)}, one per color")
    curves = []
    runs = list(zip(names(options.runs), options.runs, strict=True))
    for name, run in track(runs, "Evaluating", len(runs), "runs"):
        trained = load_trained(run, options)
        resize = trained.settings.source.resize
        embedded = embed_split(trained.network, trained.split, protocol=options.protocol, resize=resize)
        curves.append(Curve(name, embedded.ranking(), chance(embedded.masks)))
    return picture(curves)


def names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their paths relative to the folder that contains all of them.

    Raises:
        UserError: one is named twice.
    """
    paths = [realpath(run) for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError(f"runs: got one of them twice in {', '.join(map(str, runs))}, wanted each once")
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def chance(masks: ProtocolMasks) -> Floats:
    """Return the CMC (DEEPEST,) of a random order: for k, 1 - prod over i < k of 1 - m / (n - i), mean over queries.

    n gallery items are not junk to a query, and m of these are positive. Queries without a match count as the protocol
    says.
    """
    m, n = (mask.count_nonzero(1).double().numpy()[:, None] for mask in (masks.positive, masks.not_junk))  # (Q, 1)
    taken = np.full_like(m, True, bool) if masks.protocol.unmatched == "zero" else m > 0
    drawn = np.arange(DEEPEST)
    missed = (1 - m / (n - drawn).clip(min=1)).clip(min=0).cumprod(1)
    mean: Floats = (1 - missed)[taken[:, 0]].mean(0)
    return mean


def picture(curves: Sequence[Curve]) -> Figure:
    """Draw one line per curve, labeled at its end; the legend shows rank-1 and mAP."""
    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    ranks = range(1, min(DEEPEST, max(curve.ranking.gallery for curve in curves)) + 1)
    colors = dict(zip((curve.name for curve in curves), COLORS, strict=False))
    settings = {_setting(curve.ranking) for curve in curves}
    for curve, marker in zip(curves, MARKERS, strict=False):
        scores = f"rank-1 {100 * curve.ranking.cmc[1]:.1f}, mAP {100 * curve.ranking.mean_ap:.1f}"
        setting = "" if len(settings) == 1 else f"; {_setting(curve.ranking)}"
        shares = [100 * curve.ranking.cmc[k] for k in ranks]
        label = f"{curve.name}: {scores}{setting}"
        axes.plot(ranks, shares, color=colors[curve.name], marker=marker, markersize=6, linewidth=1.6, label=label)
    for level in {tuple(curve.chance) for curve in curves}:
        shares = [100 * share for share in level[: len(ranks)]]
        axes.plot(ranks, shares, color=QUIET, linestyle="--", label=f"chance: rank-1 {shares[0]:.1f}")
    label_ends(axes, {curve.name: (ranks[-1], 100 * curve.ranking.cmc[ranks[-1]]) for curve in curves}, colors)
    axes.set(xlim=(0.5, ranks[-1] + 0.5), ylim=(0, 102), xticks=ranks if len(ranks) <= 10 else (1, *ranks[4::5]))
    axes.set_xlabel("rank k", color=TEXT)
    axes.set_ylabel("queries with a match among the k nearest, percent", color=TEXT)
    if len(settings) == 1:
        axes.set_title(next(iter(settings)), color=TEXT, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.tick_params(colors=TEXT)
    axes.legend(loc="lower right", frameon=False, labelcolor=TEXT)
    return figure


def _setting(ranking: Ranking) -> str:
    return f"{ranking.protocol}, {ranking.valid} queries in a gallery of {ranking.gallery}"
