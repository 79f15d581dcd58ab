"""Times of small calls: of the operators where most of a call is not its kernel, and of eager PyTorch at some of them.

Run as a program, with a checkout of the library as its argument and first on PYTHONPATH, it prints the microseconds as
JSON: `benchmarks.floors` runs it with two checkouts in turn. So it imports nothing but torch and the library.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rru_fast
from rru_fast.testing import gradients, relative_error

Run = Callable[[Tensor], Tensor]

EVAL, FORWARD, BACKWARD = "no gradients", "forward", "forward + backward"
ROUNDS, SECONDS = 15, 0.02  # rounds of each case; of calls per round, about
TOLERANCE = 1e-5  # relative error of results in float32


class Case(NamedTuple):
    """A small call, `run(input)`, which returns a scalar or the strips; `oracle` computes the same from float64."""

    run: Run
    oracle: Run
    input: Tensor


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


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    torch.manual_seed(0)
    clips = torch.randn(2, 2, 16, 2, 2)
    pooled = partial(rru_fast.strip_pool, backend="reference")
    found = {
        "refine, eval, 2 x 2 x 16 x 2 x 2": _refine(rru_fast.RRU(16, (2, 2), hidden=16).eval(), clips),
        "refine, training, 2 x 2 x 16 x 2 x 2": _refine(rru_fast.RRU(16, (2, 2), hidden=16), clips),
        "strip_pool, 2 x 2 x 16 x 2 x 2": Case(rru_fast.strip_pool, pooled, clips),
    }
    for shape, per_identity in (((8, 16), 4), ((64, 2048), 4), ((8, 20, 2048), 2)):
        features, labels = torch.randn(shape), torch.arange(shape[-2]) // per_identity
        for metric in ("euclidean", "cosine"):
            at = f"{metric}, {' x '.join(map(str, shape))}"

            def fast(f: Tensor, labels: Tensor = labels, metric: Any = metric) -> Tensor:
                loss = rru_fast.batch_hard_triplet(f, labels, metric=metric)
                assert isinstance(loss, Tensor)
                return loss

            plain = partial(eager, labels=labels, metric=metric)
            found[f"batch_hard, {at}"] = Case(fast, plain, features)
            found[f"eager, {at}"] = Case(plain, plain, features)
    return found


def _refine(unit: rru_fast.RRU, clips: Tensor) -> Case:
    oracle = copy.deepcopy(unit).double()
    oracle.backend = "reference"
    return Case(lambda x: unit(x).strips, lambda x: oracle(x).strips, clips)


def check(name: str, case: Case) -> None:
    """Hold a case's results and gradient to its oracle in float64.

    Raises:
        SystemExit: they are off.
    """
    found = []
    for run, dtype in ((case.run, torch.float32), (case.oracle, torch.float64)):
        leaf = case.input.detach().to(dtype).requires_grad_()
        out = run(leaf)
        found.append((out, gradients([out], [torch.ones_like(out)], {"input": leaf})["d_input"]))
    for what, got, wanted in zip(("forward", "gradient"), *found, strict=True):
        error = relative_error(got, wanted)
        if error > TOLERANCE:
            raise SystemExit(f"parity: {name}, {what} is off by {error:.1e}, wanted at most {TOLERANCE:.0e}")


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """Return what is timed of a case, by column."""
    run, tensor = case.run, case.input
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
    """Check that the checkout's kernels run, and parity; measure every case and print the times as JSON.

    Raises:
        SystemExit: they do not, or one is wrong; nothing is measured.
    """
    found_in = Path(rru_fast.__file__).resolve().parents[1]
    if found_in != Path(sys.argv[1]).resolve():
        raise SystemExit(f"rru_fast: got that of {found_in}, wanted that of {sys.argv[1]}")
    rru_fast.backends.choose("cpu", torch.device("cpu"))  # an error says what builds them
    of = cases()
    for name, case in of.items():
        check(name, case)
    gc.collect()
    gc.freeze()
    found = {name: {column: microseconds(fn) for column, fn in calls(case).items()} for name, case in of.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
