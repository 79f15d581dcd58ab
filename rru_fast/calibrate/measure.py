"""Parity, then speed: which of a device's backends is to run calls of a kind."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

from rru_fast.auto.decisions import Decision
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


class WrongError(Exception):
    """A candidate's results are wrong; the message says which and by how much."""


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
    try:
        found = _decide(kind, device, default, candidates, note, clock)
    except torch.OutOfMemoryError as error:
        found = Decision(default, f"out of memory: {_first_line(error)}", keep=False, default=default)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _host_bytes()
    return replace(found, seconds=round(time.perf_counter() - begin, 1), peak_mib=round(peak / 2**20))


def _decide(
    kind: Kind, device: torch.device, default: str, candidates: Sequence[str], note: Note, clock: Clock
) -> Decision:
    passed: dict[str, Parity] = {}
    failures: dict[str, str] = {}
    for name in (*candidates, default):
        if name == default == "composite":  # what serves where others are wrong
            continue
        with _noting_failure(name, failures):
            passed[name] = hold(kind, device, name, note)
    base = "composite" if default in failures else default
    timings: list[Timing] = []
    for name in candidates:
        if name in passed and name != base:
            note(f"times of {name}", name)
            with _noting_failure(name, failures):
                timings.append(time_pair(kind, device, base, name, passed, clock))
    if not timings:
        return Decision(base, "; ".join(failures.values()) or "nothing to compare it with", default=base)
    best = max(timings, key=lambda timing: timing.ratio)
    chosen = best.name if best.ratio >= MARGIN and not best.undecided else base
    return Decision(
        chosen,
        "; ".join([best.describe(base), *failures.values()]),
        keep=not best.undecided,
        default=base,
        ratio=best.ratio,
        spread=best.spread,
        error=passed[best.name].error,
        allowed=passed[best.name].allowed,
    )


@contextmanager
def _noting_failure(backend: str, failures: dict[str, str]) -> Iterator[None]:
    """Note an error of a backend, and go on with the next one; that memory is at its end is not its failure."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # kernels' compilers and drivers raise anything
        kind = "" if isinstance(error, WrongError) else f"{type(error).__name__}: "
        failures[backend] = f"{backend} fails: {kind}{_first_line(error)}"


def hold(kind: Kind, device: torch.device, backend: str, note: Note) -> Parity:
    """Hold a backend to the float64 oracle, and two of its runs to each other.

    Returns the error nearest its bound.

    Raises:
        WrongError: an error exceeds its bound, a result is not finite, or two runs differ.
    """
    worst = Parity(0.0, 1.0)
    *small, whole = cases.parity_kinds(kind)
    for number, of in enumerate((*small, whole)):
        note(f"parity of {backend}, {of}", backend)
        errors: dict[str, list[Parity]] = {}
        for draw in range(DRAWS if number < len(small) else 1):
            case = cases.draw_case(of, device, seed=100 * number + draw)
            got = case.results(backend)
            if draw == 0:
                _check_repeatable(case, backend, got)
            eager, oracle = case.results("reference"), case.results("reference", exact=True)
            for name, value in got.items():
                if not value.isfinite().all() and oracle[name].isfinite().all():
                    raise WrongError(f"{name} is not finite in {of}")
                reference = relative_error(eager[name], oracle[name])
                exact = value.dtype == torch.float64
                rounding = max(ROUNDING, torch.finfo(value.dtype).eps)
                allowed = EXACT if exact else FACTOR * reference + rounding
                errors.setdefault(name, []).append(Parity(relative_error(value, oracle[name]), allowed))
        for name, parities in errors.items():
            error, allowed = (median(values) for values in zip(*parities, strict=True))
            if not error <= allowed:
                raise WrongError(f"{name} is off by {error:.1e}, allowed {allowed:.1e}, in {of}")
            if error / allowed > worst.error / worst.allowed:
                worst = Parity(error, allowed)
    return worst


def _check_repeatable(case: cases.Case, backend: str, first: cases.Results) -> None:
    for name, value in case.results(backend).items():
        if not torch.equal(value, first[name]) and first[name].isfinite().all():
            raise WrongError(f"{name} differs between two runs")


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
    """Time a candidate against the default in alternating rounds, after holding its outputs to the default's.

    Raises:
        WrongError: the outputs differ, at sizes too large for the oracle.
    """
    case = cases.make_case(kind, device, seed=7)
    if cases.cut(kind) != kind:
        _check_agreement(case, base, name, passed[name].allowed)
    calls = {of: case.caller(of) for of in (base, name)}
    for call in calls.values():
        for _ in range(3):  # compiles, tunes and captures
            call()
    repeats = {of: _repeats(clock(call, of)) for of, call in calls.items()}
    ratios = []
    for turn in range(ROUNDS):
        order = (base, name) if turn % 2 == 0 else (name, base)
        times = {of: clock(_repeated(calls[of], repeats[of]), of) / repeats[of] for of in order}
        ratios.append(times[base] / times[name])
    low, *_, high = sorted(ratios)[1:-1]
    spread = (high - low) / median(ratios)
    return Timing(name, median(ratios), spread, spread > SPREAD and low < MARGIN <= high)


def _check_agreement(case: cases.Case, base: str, name: str, allowed: float) -> None:
    wanted, got = case.results(base), case.results(name)
    for key in got:
        if not got[key].isfinite().all():
            raise WrongError(f"{key} is not finite at full size")
        if not key.startswith("d_") and (error := relative_error(got[key], wanted[key])) > 4 * allowed:
            raise WrongError(f"{key} is off {base}'s by {error:.1e} at full size, allowed {4 * allowed:.1e}")


def _repeats(seconds: float) -> int:
    return min(MOST_CALLS, max(1, math.ceil(ROUND_SECONDS / max(seconds, 1e-9))))


def _repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _host_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
