"""Times of small calls: of the operators where most of a call is not its kernel, and of eager PyTorch at some of them.

Run as a program, with a checkout of the library first on PYTHONPATH, it prints the microseconds as JSON:
`benchmarks.floors` runs it with two checkouts in turn. So it imports nothing but torch and the library.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rru_fast

Run = Callable[[Tensor], Tensor]

EVAL, FORWARD, BACKWARD = "no gradients", "forward", "forward + backward"
ROUNDS, SECONDS = 15, 0.02  # rounds of each case; of calls per round, about


def eager(features: Tensor, labels: Tensor, metric: str = "euclidean") -> Tensor:
    """Return the loss of features ([G,] N, D) from the matrices of distances, all groups at once."""
    if metric == "cosine":
        f = F.normalize(features, dim=-1)
        d = 1 - f @ f.mT
    else:
        square = features.square().sum(-1)
        d = (square[..., :, None] + square[..., None, :] - 2 * features @ features.mT).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels
    d_pos = d.masked_fill(~same, float("-inf")).amax(-1)
    return F.relu(0.3 + d_pos - d.masked_fill(same, float("inf")).amin(-1)).mean()


def cases() -> dict[str, tuple[Run, Tensor]]:
    """Return a function of one tensor, which returns a scalar or the strips, and the tensor, by name."""
    torch.manual_seed(0)
    unit = rru_fast.RRU(16, (2, 2), hidden=16)
    frozen = rru_fast.RRU(16, (2, 2), hidden=16).eval()
    clips = torch.randn(2, 2, 16, 2, 2)
    found: dict[str, tuple[Run, Tensor]] = {
        "refine, eval, 2 x 2 x 16 x 2 x 2": (lambda x: frozen(x).strips, clips),
        "refine, training, 2 x 2 x 16 x 2 x 2": (lambda x: unit(x).strips, clips),
        "strip_pool, 2 x 2 x 16 x 2 x 2": (rru_fast.strip_pool, clips),
    }
    for shape, per_identity in (((8, 16), 4), ((64, 2048), 4), ((8, 20, 2048), 2)):
        features, labels = torch.randn(shape), torch.arange(shape[-2]) // per_identity
        for metric in ("euclidean", "cosine"):
            at = f"{metric}, {' x '.join(map(str, shape))}"

            def fast(f: Tensor, labels: Tensor = labels, metric: Any = metric) -> Tensor:
                loss = rru_fast.batch_hard_triplet(f, labels, metric=metric)
                assert isinstance(loss, Tensor)
                return loss

            found[f"batch_hard, {at}"] = fast, features
            found[f"eager, {at}"] = partial(eager, labels=labels, metric=metric), features
    return found


def calls(run: Run, tensor: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed of a case, by column."""
    leaf = tensor.clone().requires_grad_()
    upstream = torch.ones_like(run(tensor))

    def without_gradients() -> None:
        with torch.no_grad():
            run(tensor)

    def backward() -> None:
        leaf.grad = None
        torch.autograd.backward(run(leaf), upstream)

    return {EVAL: without_gradients, FORWARD: lambda: run(leaf), BACKWARD: backward}


def microseconds(call: Callable[[], object]) -> float:
    """Return the median over rounds of the time of a call, each the mean of enough calls to keep caches warm."""
    for _ in range(5):
        call()
    start = time.perf_counter()
    call()
    count = max(1, int(SECONDS / (time.perf_counter() - start)))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    return 1e6 * median(times)


def main() -> None:
    """Measure every case and print the times as JSON."""
    gc.collect()
    gc.freeze()
    found = {name: {column: microseconds(fn) for column, fn in calls(*case).items()} for name, case in cases().items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
