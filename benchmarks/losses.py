"""Published batch-hard losses: their own statement in eager PyTorch against the same swapped by `rru_fast.accelerate`.

    python -m benchmarks.losses
    python -m benchmarks.losses --shapes 64 128 256 128

Forward with backward in float32, of batches with 4 features of each identity. The swapped loss is first held to its own
forward in float64. As many rounds are timed as take `BUDGET` seconds, one at least. Of losses that loop over anchors,
whose backward writes 2 N matrices of N x N, so that a step takes a second at N 1024 and a minute at 4096, torchreid's
alone is measured above `--largest-loop`; the others' rows are dashes there. All takes about 15 minutes on two cores.
"""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("bench")

import time
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import tyro
from torch import Tensor

from benchmarks.harness import measure
from benchmarks.harness.results import BenchArgs, environment, write
from benchmarks.implementations.batch_hard import CLIPS_PER_IDENTITY, batch, results
from benchmarks.implementations.losses import FORMS, Pair, check, pairs
from benchmarks.reports import terminal
from benchmarks.reports.table import Row
from rru_fast import backends

COLUMNS = ("eager ms", "swapped ms", "x eager", "peak MiB eager", "peak MiB swapped")
BUDGET = 3.0
# Seconds of a measurement at least, of as many calls as that takes: a shorter one would be that of the caches and
# threads that the preceding garbage collection has cooled.
SHORTEST = 0.05
EVERY_SIZE = "torchreid"  # the loop that the others have, too


@dataclass
class Options(BenchArgs):
    """Measure published losses, as they are and swapped."""

    shapes: tuple[tuple[int, int], ...] = ((64, 256), (64, 2048), (256, 256), (1024, 256), (4096, 256))
    """Numbers of features, multiples of 4 from 8, and their widths, N D N D ..."""
    repeats: int = 5
    """Rounds; each runs the eager loss and the swapped one once."""
    largest_loop: int = 1024
    """Largest number of features at which all losses that loop over anchors are measured."""
    backend: str = "auto"
    """Of the swapped losses."""


def main(options: Options) -> list[Row]:
    """Check parity, measure and print; returns the rows of every shape, in the order of FORMS.

    Raises:
        SystemExit: a shape does not fit, or a loss is not swapped or wrong; nothing more is measured.
    """
    for n, d in options.shapes:
        if n < 2 * CLIPS_PER_IDENTITY or n % CLIPS_PER_IDENTITY or d < 1:
            wanted = f"N a multiple of {CLIPS_PER_IDENTITY} from {2 * CLIPS_PER_IDENTITY}, and D from 1"
            raise SystemExit(f"shapes: got N {n}, D {d}, wanted {wanted}")
    device = torch.device(options.device)
    backend = backends.choose(options.backend, device)
    losses = pairs(backend)
    by_shape: dict[tuple[int, int], list[Row]] = {}
    for n, d in options.shapes:
        torch.manual_seed(0)
        features, labels = batch(n, d, device)
        by_shape[n, d] = [
            {"implementation": name, "n": n, "d": d}
            | (
                dict.fromkeys(COLUMNS)
                if FORMS[name].loops and n > options.largest_loop and name != EVERY_SIZE
                else _measure(f"{backend}, {name}, N {n}, D {d}", pair, features, labels, options.repeats)
            )
            for name, pair in losses.items()
        ]
    found = environment(device, torch.float32)
    for (n, d), rows in by_shape.items():
        terminal.show(f"losses, N {n}, D {d}, forward + backward", found, rows, hide=["n", "d"])
    rows = [row for shape in by_shape.values() for row in shape]
    if options.json is not None:
        write(options.json, {**found, "op": "losses", "backend": backend}, rows)
    return rows


def _measure(title: str, pair: Pair, features: Tensor, labels: Tensor, repeats: int) -> Row:
    """Check parity; returns times and memory by COLUMNS."""
    check(title, pair, features, labels)
    eager, swapped = (partial(results, loss, features, labels) for loss in (pair.eager, pair.swapped))
    start = time.perf_counter()
    peaks = [measure.peak_bytes(fn, features.device) / measure.MIB for fn in (eager, swapped)]
    elapsed = time.perf_counter() - start
    rounds, calls = min(repeats, max(1, int(BUDGET / elapsed))), max(1, int(SHORTEST / elapsed))
    fns = {name: lambda fn=fn: [fn() for _ in range(calls)] for name, fn in (("eager", eager), ("swapped", swapped))}
    times = measure.paired(fns, rounds, warmup=2 if rounds == repeats else 0)
    milliseconds = [1e3 * median(times[name]) / calls for name in fns]
    ratio = measure.ratio(times["eager"], times["swapped"])
    return dict(zip(COLUMNS, (*milliseconds, ratio, *peaks), strict=True))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
