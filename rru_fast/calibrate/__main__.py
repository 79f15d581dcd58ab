"""Measure which backend is the fastest on this device, for the paper's shapes or for those of a module of yours.

    python -m rru_fast.calibrate                                     # the paper's unit, strips and losses
    python -m rru_fast.calibrate --channels 512 --spatial 16 8 --clips 32 --frames 4 --dtype bfloat16
    python -m rru_fast.calibrate --device cpu

Each kind of call is measured in a process of its own, parity first, and decided once; backend="auto" runs what was
decided from then on. Prints a table of all kinds asked for, with what was decided and why.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator

import torch

from rru_fast import backends
from rru_fast.auto import cards, choice, decisions, spawn
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import BatchHardKind, Kind, RefineKind, StripPoolKind, product_precision

COLUMNS = ("kind", "auto runs", "x", "spread", "error", "allowed", "s", "MiB", "why")


def main(arguments: list[str] | None = None) -> None:
    """Calibrate and print.

    Raises:
        SystemExit: an argument is wrong.
    """
    options = parse(arguments)
    device = _device(options.device)
    default = backends.choose("auto", device)
    if not cards.candidates(device, default):
        wanted = ", ".join(f"{name}: {why}" for name, why in backends.BACKENDS.items() if why is not None)
        raise SystemExit(f"--device: got {device}, where {default} is the only backend ({wanted})")
    print(cards.describe(cards.card_of(device)))
    print(f"decisions in {decisions.folder()}\n")
    begin, rows = time.monotonic(), []
    asked = list(kinds(options, device))
    for number, kind in enumerate(asked, 1):
        sys.stderr.write(f"[{number}/{len(asked)}] {kind}\n")
        decision = choice.calibrate(kind, device, again=options.again, seconds=options.seconds)
        sys.stderr.write(f"    {decision}\n")
        rows.append(_row(kind.rounded(), decision))
    print(_table(rows))
    print(f"\n{len(rows)} kinds in {time.monotonic() - begin:.0f} s")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rru_fast.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--clips", type=_positive, default=20, metavar="B")
    parser.add_argument("--frames", type=_positive, default=8, metavar="T")
    parser.add_argument(
        "--tracklet", type=_positive, default=675, metavar="T", help="frames of a tracklet in eval mode"
    )
    parser.add_argument("--channels", type=_positive, default=2048, metavar="C")
    parser.add_argument("--spatial", type=_positive, nargs=2, default=(8, 8), metavar=("H", "W"))
    parser.add_argument("--hidden", type=_positive, default=256, metavar="D")
    parser.add_argument("--spatial-hidden", type=_positive, default=128, metavar="A")
    parser.add_argument("--attention", choices=("both", "spatial", "channel"), default="both")
    inputs = ("appearance+motion", "appearance", "raw")
    parser.add_argument("--inputs", choices=inputs, default="appearance+motion")
    parser.add_argument("--metric", choices=("euclidean", "cosine"), default="euclidean")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16", "float16", "float64"),
        default=("float32", "bfloat16"),
        help="of the maps and features; a module's weights stay in float32 with 16-bit maps",
    )
    parser.add_argument("--op", nargs="+", choices=backends.OPERATORS, default=backends.OPERATORS)
    parser.add_argument("--seconds", type=_seconds, default=spawn.SECONDS, help="time limit per kind")
    parser.add_argument("--again", action="store_true", help="measure kinds again that have been decided")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0")
    return number


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only the CPU and CUDA have other backends")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise SystemExit(f"--device: got {name!r}, wanted a device that is here: {why}") from error
    return device


def kinds(options: argparse.Namespace, device: torch.device) -> Iterator[Kind]:
    """Yield the kinds that the options ask for: a unit in training and over a tracklet, its strips and its losses."""
    height, width = options.spatial
    conv, matmul = (
        setting.fp32_precision
        for setting in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    )
    for name in options.dtype:
        dtype = getattr(torch, name)
        shape = {"channels": options.channels, "height": height, "width": width}
        if "refine" in options.op:
            yield from _refine_kinds(options, device, name, product_precision(device, dtype, conv), shape)
        if "strip_pool" in options.op:
            yield StripPoolKind(name, True, "contiguous", options.clips, options.frames, **shape)
        if "batch_hard" in options.op:
            precision = product_precision(device, dtype, matmul)
            for groups in dict.fromkeys((1, height)):
                sizes = {"groups": groups, "anchors": options.clips, "gallery": 0, "columns": options.channels}
                yield BatchHardKind(name, True, "contiguous", precision, options.metric, **sizes)


def _refine_kinds(
    options: argparse.Namespace, device: torch.device, dtype: str, precision: str, shape: dict[str, int]
) -> Iterator[Kind]:
    for graphed in (False, True) if device.type == "cuda" else (False,):
        for training in (True, False):
            yield RefineKind(
                dtype=dtype,
                gradients=training,
                layout="contiguous",
                weight_dtype="float64" if dtype == "float64" else "float32",
                precision=precision,
                training=training,
                inputs=options.inputs,
                attention=options.attention,
                clips=options.clips if training else 1,
                frames=options.frames if training else options.tracklet,
                hidden=options.hidden,
                spatial_hidden=0 if options.attention == "channel" else options.spatial_hidden,
                graphed=graphed,
                **shape,
            )


def _row(kind: Kind, decision: Decision) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        str(kind),
        decision.backend,
        number(decision.ratio, ".2f"),
        number(decision.spread, ".0%"),
        number(decision.error, ".1e"),
        number(decision.allowed, ".1e"),
        format(decision.seconds, ".0f"),
        format(decision.peak_mib, ".0f"),
        decision.reason,
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as a table in Markdown, in columns of equal width."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    rule = tuple("-" * width for width in widths)
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (COLUMNS, rule, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


if __name__ == "__main__":
    main()
