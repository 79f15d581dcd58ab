"""CMC curves of several runs: the share of probes whose person is among the k nearest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.protocols import ProtocolName, Trial
from training.evaluation.ranking import DEEPEST, Floats, Ranking
from training.evaluation.scoring import compare
from training.runtime.atomic_files import realpath
from training.runtime.errors import UserError
from training.runtime.terminal import track
from training.show.picture import BLUE, GREEN, ORANGE, PURPLE, QUIET, RED, SKY, TEXT, label_ends

COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, TEXT)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # where lines meet in black and white


@dataclass
class Options(UseOptions):
    """Evaluate runs, and draw how many of the probes each finds among the k nearest, k from 1 to 20."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or of checkpoints."""
    output: Path
    """The PNG."""
    protocol: ProtocolName | None = None
    """The rules to rank by; those the dataset is made for unless given."""


@dataclass(frozen=True)
class Curve:
    """What one run came to.

    name: what to call it.
    ranking: how well it finds people.
    chance: (DEEPEST,), the CMC that a random order of its gallery would give.
    """

    name: str
    ranking: Ranking
    chance: Floats


def show(options: Options) -> Figure:
    """Draw what the options say.

    Raises:
        UserError: a checkpoint or its data cannot be used, or there are too many runs.
    """
    if not 1 <= len(options.runs) <= len(COLOURS):
        raise UserError(f"runs: got {len(options.runs)}, wanted 1 to {len(COLOURS)}, as more are not told apart")
    curves = []
    runs = list(zip(names(options.runs), options.runs, strict=True))
    for name, run in track(runs, "Evaluating", len(runs), "runs"):
        trained = load_trained(run, options)
        resize = trained.settings.source.resize
        compared = compare(trained.network, trained.split, protocol=options.protocol, resize=resize)
        curves.append(Curve(name, compared.ranking(), chance(compared.trial)))
    return picture(curves)


def names(runs: Sequence[Path]) -> list[str]:
    """What tells runs apart: their paths, without the folder that all are in.

    Raises:
        UserError: one is named twice.
    """
    paths = [realpath(run) for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError(f"runs: got one of them twice in {', '.join(map(str, runs))}, wanted each once")
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def chance(trial: Trial) -> Floats:
    """The CMC (DEEPEST,) of a random order: for k, 1 - prod over i < k of 1 - m / (n - i), mean over the probes.

    n of the gallery count for a probe, and m of these are right. Probes without a match count as the protocol has it.
    """
    m, n = (mask.count_nonzero(1).double().numpy()[:, None] for mask in (trial.positive, trial.counts))  # (Q, 1)
    taken = np.full_like(m, True, bool) if trial.protocol.unmatched == "zero" else m > 0
    drawn = np.arange(DEEPEST)
    missed = (1 - m / (n - drawn).clip(min=1)).clip(min=0).cumprod(1)
    mean: Floats = (1 - missed)[taken[:, 0]].mean(0)
    return mean


def picture(curves: Sequence[Curve]) -> Figure:
    """Draw a line a curve, named beside its end; rank-1 and mAP are in the legend."""
    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    ranks = range(1, min(DEEPEST, max(curve.ranking.gallery for curve in curves)) + 1)
    colours = dict(zip((curve.name for curve in curves), COLOURS, strict=False))
    searches = {_search(curve.ranking) for curve in curves}
    for curve, marker in zip(curves, MARKERS, strict=False):
        scores = f"rank-1 {100 * curve.ranking.cmc[1]:.1f}, mAP {100 * curve.ranking.mean_ap:.1f}"
        apart = "" if len(searches) == 1 else f"; {_search(curve.ranking)}"
        shares = [100 * curve.ranking.cmc[k] for k in ranks]
        label = f"{curve.name}: {scores}{apart}"
        colour = colours[curve.name]
        axes.plot(ranks, shares, color=colour, marker=marker, markersize=6, linewidth=1.6, label=label)
    for level in {tuple(curve.chance) for curve in curves}:
        shares = [100 * share for share in level[: len(ranks)]]
        axes.plot(ranks, shares, color=QUIET, linestyle="--", label=f"chance: rank-1 {shares[0]:.1f}")
    label_ends(axes, {curve.name: (ranks[-1], 100 * curve.ranking.cmc[ranks[-1]]) for curve in curves}, colours)
    axes.set(xlim=(0.5, ranks[-1] + 0.5), ylim=(0, 102), xticks=ranks if len(ranks) <= 10 else (1, *ranks[4::5]))
    axes.set_xlabel("rank k: nearest of the gallery that are looked at", color=TEXT)
    axes.set_ylabel("probes whose person is among them, percent", color=TEXT)
    if len(searches) == 1:
        axes.set_title(next(iter(searches)), color=TEXT, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.tick_params(colors=TEXT)
    axes.legend(loc="lower right", frameon=False, labelcolor=TEXT)
    return figure


def _search(ranking: Ranking) -> str:
    return f"{ranking.protocol}, {ranking.valid} probes in a gallery of {ranking.gallery}"
