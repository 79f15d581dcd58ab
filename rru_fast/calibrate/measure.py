"""Parity, then speed: which of a device's backends is to run calls of a kind."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from rru_fast import backends
from rru_fast.auto.decisions import HOUR, Decision
from rru_fast.auto.kinds import Kind
from rru_fast.calibrate import cases
from rru_fast.testing import EXACT, relative_error

Note = Callable[[str, str], object]
"""Called with each stage, and the candidate that it runs, "" for none."""
Clock = Callable[[Callable[[], object], str], float]
"""Returns the seconds of a call of a backend."""

# A candidate replaces the default only if it is this much faster.
MARGIN = 1.10
ROUNDS = 11
# Ratios of one pair may range over this part of their median, unless all of them are on one side of MARGIN.
SPREAD = 0.30
DRAWS = 3  # of each small call: chance decides the rounding of a single one
# Errors may be this many times those of eager PyTorch in the same dtype, plus ROUNDING: a GPU's approximate functions.
FACTOR = 4
ROUNDING = 1e-6
ROUND_SECONDS = 5e-3  # of one backend in one round, in as many calls as that takes
MOST_CALLS = 20
# One draw of a small call may exceed its bound by this much, or err by so many roundings of a product, by chance.
LUCK, LUCKY_ROUNDINGS = 25, 16
# At sizes too large for the oracle: errors against the default, times the bound of parity; of gradients, in which ReLUs
# that change sides count.
AT_FULL_SIZE, GRADIENTS_AT_FULL_SIZE = 4, 0.05
# Of errors that a device or host without room, or without a compiler, raises in any backend.
_STARVED = ("out of memory", "alloc", "busy or unavailable", "no space left", "c compiler", "too many open files")


class BackendError(Exception):
    """A backend fails, or its results are wrong; the message says how."""


class Parity(NamedTuple):
    """Relative error of the tensor nearest its bound, and that bound."""

    error: float
    allowed: float


def measure(
    kind: Kind, device: torch.device, default: str, candidates: Sequence[str], *, note: Note, clock: Clock | None = None
) -> Decision:
    """Hold each candidate to the float64 oracle, time those that pass, and decide.

    Args:
        kind: a call, with exact sizes.
        device: where it runs.
        default: the backend that serves unless another is faster, or unless it is itself wrong.
        candidates: the others.
        note: called with each stage.
        clock: times a call of a backend; by default the wall clock.
    """
    begin = time.perf_counter()
    clock = clock or (lambda call, backend: wall_seconds(call, device))
    failures: dict[str, str] = {}
    try:
        found = _decide(kind, device, default, candidates, note, clock, failures)
    except Exception as error:  # not a backend's: the oracle, the device or the host
        reason = f"the measurement fails: {type(error).__name__}: {_first_line(error)}"
        found = Decision(default, "; ".join([reason, *failures.values()]), default, lasts=HOUR)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _host_bytes()
    return replace(found, seconds=round(time.perf_counter() - begin, 1), peak_mib=round(peak / 2**20))


def _decide(
    kind: Kind,
    device: torch.device,
    default: str,
    candidates: Sequence[str],
    note: Note,
    clock: Clock,
    failures: dict[str, str],
) -> Decision:
    # Composite as the default is what serves where others are wrong.
    held = [*candidates, *([default] if default != "composite" else [])]
    passed = _hold_all(kind, device, held, note, failures)
    base = "composite" if default in failures and "composite" not in failures else default
    timings: list[Timing] = []
    for name in candidates:
        if name in passed and name != base:
            note(f"times of {name}", name)
            with _noting_failure(name, failures):
                timings.append(time_pair(kind, device, base, name, passed, clock))
    if not timings:
        return Decision(base, "; ".join(failures.values()) or "nothing to compare it with", base)
    best = max(timings, key=lambda timing: timing.ratio)
    return Decision(
        best.name if best.ratio >= MARGIN and not best.undecided else base,
        "; ".join([best.describe(base), *failures.values()]),
        base,
        lasts=HOUR if best.undecided else None,
        ratio=best.ratio,
        spread=best.spread,
        error=passed[best.name].error,
        allowed=passed[best.name].allowed,
    )


@contextmanager
def _noting_failure(backend: str, failures: dict[str, str]) -> Iterator[None]:
    """Note a backend's failure, and go on with the next one."""
    try:
        yield
    except BackendError as error:
        failures[backend] = f"{backend} fails: {error}"


@contextmanager
def _blaming(backend: str, device: torch.device) -> Iterator[None]:
    """Raise BackendError for what goes wrong inside, unless the device or the host has no room."""
    try:
        yield
        _synchronize(device)
    except BackendError:
        raise
    except Exception as error:  # kernels' compilers and drivers raise anything
        line = _first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or any(mark in str(error).lower() for mark in _STARVED):
            raise
        raise BackendError(f"{type(error).__name__}: {line}") from error


Draw = Callable[[Kind, int], tuple[cases.Case, cases.Results, cases.Results]]
"""Returns a random call of a kind by its seed, its results in eager PyTorch, and those of the oracle."""


def _hold_all(
    kind: Kind, device: torch.device, names: Sequence[str], note: Note, failures: dict[str, str]
) -> dict[str, Parity]:
    """Hold backends to the oracle, which runs once for all of them; return the parities of those that pass."""
    draw = cache(partial(_draw, device))
    passed: dict[str, Parity] = {}
    for name in names:
        with _noting_failure(name, failures):
            passed[name] = hold(kind, device, name, note, draw)
    return passed


def _draw(device: torch.device, kind: Kind, seed: int) -> tuple[cases.Case, cases.Results, cases.Results]:
    case, oracle = cases.draw_case(kind, device, seed)
    return case, case.results("reference"), oracle


def hold(kind: Kind, device: torch.device, backend: str, note: Note, draw: Draw | None = None) -> Parity:
    """Hold a backend to the float64 oracle, and two of its runs to each other.

    Returns the error nearest its bound.

    Raises:
        BackendError: it fails, an error exceeds its bound, a result is not finite, or two runs differ.
    """
    worst, draw = Parity(0.0, 1.0), draw or partial(_draw, device)
    *small, whole = cases.parity_kinds(kind)
    for number, of in enumerate((*small, whole)):
        errors: dict[str, list[Parity]] = {}
        for turn in range(DRAWS if number < len(small) else 1):
            note("the oracle", "")
            case, eager, oracle = draw(of, 100 * number + turn)
            note(f"parity of {backend}, {of}", backend)
            # Small calls are not worth the compilation of all configs.
            with _blaming(backend, device), _untuned() if number < len(small) else nullcontext():
                backends.forget_runs()
                got = case.results(backend)
                if backend not in (ran := backends.ran().get(of.op, [])):
                    raise BackendError(f"leaves {of} to {', '.join(ran)}")
                if turn == 0:
                    _check_repeatable(case, backend, got)
            for name, value in got.items():
                if not value.isfinite().all() and oracle[name].isfinite().all():
                    raise BackendError(f"{name} is not finite in {of}")
                parity = _parity(value, eager[name], oracle[name])
                if parity.error > max(LUCK * parity.allowed, LUCKY_ROUNDINGS * _product_rounding(of)):
                    raise BackendError(f"{name} is off by {parity.error:.1e}, allowed {parity.allowed:.1e}, in {of}")
                errors.setdefault(name, []).append(parity)
        for name, parities in errors.items():
            error, allowed = (median(values) for values in zip(*parities, strict=True))
            if not error <= allowed:
                raise BackendError(f"{name} is off by {error:.1e}, allowed {allowed:.1e}, in {of}")
            if error / allowed > worst.error / worst.allowed:
                worst = Parity(error, allowed)
    return worst


@contextmanager
def _untuned() -> Iterator[None]:
    """Turn autotuning off."""
    before = os.environ.get("RRU_FAST_AUTOTUNE")
    os.environ["RRU_FAST_AUTOTUNE"] = "0"
    try:
        yield
    finally:
        os.environ.pop("RRU_FAST_AUTOTUNE")
        if before is not None:
            os.environ["RRU_FAST_AUTOTUNE"] = before


def _parity(got: Tensor, eager: Tensor, oracle: Tensor) -> Parity:
    rounding = max(ROUNDING, torch.finfo(got.dtype).eps)
    allowed = EXACT if got.dtype == torch.float64 else FACTOR * relative_error(eager, oracle) + rounding
    return Parity(relative_error(got, oracle), allowed)


def _product_rounding(kind: Kind) -> float:
    """Return the epsilon of the products of a kind: of its dtype, or of TF32."""
    in_tf32 = "tf32" in getattr(kind, "precision", "")
    return max(torch.finfo(getattr(torch, kind.dtype)).eps, 2**-10 if in_tf32 else 0.0)


def _check_repeatable(case: cases.Case, backend: str, first: cases.Results) -> None:
    for name, value in case.results(backend).items():
        if not torch.equal(value, first[name]) and first[name].isfinite().all():
            raise BackendError(f"{name} differs between two runs")


class Timing(NamedTuple):
    """A candidate's speed."""

    name: str
    ratio: float
    """The default's time by the candidate's: the median of rounds."""
    spread: float
    undecided: bool = False
    """The spread is over SPREAD, and ratios are on both sides of MARGIN."""

    def describe(self, base: str) -> str:
        """Return in words how it compares with the default."""
        if self.undecided:
            of = f"{self.name} takes {1 / self.ratio:.2f} of the time of {base}"
            return f"undecided: {of}, but ratios range over {100 * self.spread:.0f} %"
        if self.ratio >= MARGIN:
            return f"{self.ratio:.2f} x as fast as {base}"
        return f"{self.name} is {self.ratio:.2f} x as fast, wanted {MARGIN:.2f} x"


def time_pair(
    kind: Kind, device: torch.device, base: str, name: str, passed: Mapping[str, Parity], clock: Clock
) -> Timing:
    """Time a candidate against the default in alternating rounds.

    Raises:
        BackendError: it fails, or its results at full size, or of a CUDA graph, are not the default's.
    """
    case = cases.make_case(kind, device, seed=7)
    calls = {base: case.caller(base)}
    for _ in range(3):
        calls[base]()
    wanted = case.results(base) if cases.cut(kind) != kind or getattr(kind, "graphed", False) else None
    with _blaming(name, device):
        calls[name] = case.caller(name)
        for _ in range(3):  # compiles, tunes and captures
            calls[name]()
        if wanted is not None:
            # What is timed returns gradients, if there are any, and has been held to the oracle at smaller sizes alone.
            _check_agreement(case.results(name), wanted, base, passed[name].allowed)
            timed = zip([key for key in wanted if key.startswith("d_")] or wanted, calls[name](), strict=True)
            _check_agreement(dict(timed), wanted, base, passed[name].allowed)
        repeats = {of: _repeats(clock(call, of)) for of, call in calls.items()}
        ratios = []
        for turn in range(ROUNDS):
            order = (base, name) if turn % 2 == 0 else (name, base)
            times = {of: clock(_repeated(calls[of], repeats[of]), of) / repeats[of] for of in order}
            ratios.append(times[base] / times[name])
    low, *_, high = sorted(ratios)[1:-1]
    spread = (high - low) / median(ratios)
    return Timing(name, median(ratios), spread, spread > SPREAD and low < MARGIN <= high)


def _check_agreement(got: cases.Results, wanted: cases.Results, base: str, allowed: float) -> None:
    for key, value in got.items():
        if not value.isfinite().all() and wanted[key].isfinite().all():
            raise BackendError(f"{key} is not finite at full size")
        bound = max(AT_FULL_SIZE * allowed, GRADIENTS_AT_FULL_SIZE if key.startswith("d_") else 0.0)
        if (error := relative_error(value, wanted[key])) > bound:
            raise BackendError(f"{key} is off {base}'s by {error:.1e} at full size, allowed {bound:.1e}")


def _repeats(seconds: float) -> int:
    return min(MOST_CALLS, max(1, math.ceil(ROUND_SECONDS / max(seconds, 1e-9))))


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call until the device has finished."""
    _synchronize(device)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
