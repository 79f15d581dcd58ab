"""The choice of a backend for a call with `backend="auto"`: looked up, or measured at the first call of a kind."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as cached
from math import log2

import torch
from torch import Tensor

from rru_fast import backends, cuda, native
from rru_fast.auto import cards, decisions, spawn
from rru_fast.auto.decisions import Card, Decision, Entry
from rru_fast.auto.kinds import Key, Kind, RefineKind, across_passes

MOST_KINDS, MOST_ALIKE = 6, 2
"""Kinds that a process calibrates by itself, in all and of one category; others take the nearest kind's decision."""
RETRY = 10.0
"""Seconds after which a kind is looked up again that another process was calibrating."""
MOST_KEYS = 4096

logger = logging.getLogger("rru_fast")

_backends: dict[Key, str] = {}
"""Backend by key: what a call looks up."""
_kinds: dict[Key, Kind] = {}
"""Kinds of these keys, rounded."""
_traced: dict[Key, str] = {}
"""The same for calls in traced programs."""
_known: dict[tuple[str, Kind], Decision] = {}
"""Decisions of this process by card and kind, those not kept on disk too."""
_of_ranks: dict[Key, str] = {}
"""First answers of a process that is one of several ranks."""
_retry: dict[Key, float] = {}
"""When to look up a key again that nothing was decided on."""
_calibrated: list[Kind] = []
_calibrating = threading.Lock()
_collecting = threading.local()


def decides(tensor: Tensor) -> bool:
    """Return True if a call is to look up a decision; else "auto" is passed on to the operator, unresolved.

    So it is on a CPU without decisions, and in traced programs, whose operators ask `recorded` where they run.
    """
    return (
        not torch.compiler.is_compiling()
        and _decided_on(tensor.device.type)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0  # type: ignore[attr-defined]
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def choose(key: Key, kind_of: Callable[[Key], Kind]) -> str:
    """Return the backend that runs a call; calibrates its kind first if this is its first call.

    Args:
        key: of the call.
        kind_of: makes the exact kind of the key; called if the key is not known.

    Returns:
        A backend as operators take it: with "auto:" in front, where its kernels are not to be tuned in this process;
        "auto" where nothing is decided on a CPU, whose default is the operator's own choice.
    """
    found = _backends.get(key)
    if found is not None:
        return found
    if time.monotonic() < _retry.get(key, 0):
        return _unresolved(key[0])
    return _look_up(key, kind_of(key))


def recorded(key: Key, kind_of: Callable[[Key], Kind]) -> str:
    """Return the backend that runs a call of a traced program: by the decisions there are, which it never makes.

    A key's first answer stays, so that a backward meets the backend whose forward saved its tensors.
    """
    sticky = across_passes(key)
    found = _traced.get(sticky)
    if found is None:
        device: torch.device = key[0]
        decision = _decision(cards.card_of(device), kind_of(key).rounded()) if _decided_on(device.type) else None
        found = _traced[sticky] = backends.choose("auto", device) if decision is None else _name(decision)
    return found


def demote(key: Key, error: Exception) -> str:
    """Return the default for a call whose backend, chosen here, could not launch a kernel; it serves from now on.

    Raises:
        Exception: `error` itself, if it is another one.
    """
    device: torch.device = key[0]
    chosen, default = _backends.get(key, ""), backends.choose("auto", device)
    if not chosen.startswith(backends.CHOSEN):
        raise error
    own = backends.choose(chosen, device), cuda.fallback(device)  # a part of a call may be the latter's
    if not any(f"got {name!r}, whose" in str(error) for name in own):
        raise error
    logger.warning("rru_fast: auto runs %s from now on, in calls of this shape: %s", default, error)
    _backends[key] = default
    return default


@contextmanager
def collecting() -> Iterator[dict[Kind, torch.device]]:
    """Collect the exact kinds that are called with "auto" in this thread, with their devices; nothing is decided."""
    found: dict[Kind, torch.device] = {}
    _collecting.kinds = found
    _clear_answers()
    try:
        yield found
    finally:
        del _collecting.kinds
        _clear_answers()


def is_collecting() -> bool:
    """Return True in a thread that collects kinds."""
    return getattr(_collecting, "kinds", None) is not None


def calibrate(kind: Kind, device: torch.device, *, again: bool = False, seconds: float = spawn.SECONDS) -> Decision:
    """Return the decision on a call's kind: the one there is, or else a new one, measured in a process of its own.

    Waits while another process calibrates on this kind of card.

    Args:
        kind: the call, with exact sizes.
        device: where it runs.
        again: measure even if there is a decision. One that does not last is measured again anyway.
        seconds: time limit.
    """
    card, rounded = cards.card_of(device), kind.rounded()
    with decisions.lock(card, wait=True):
        found = _decision(card, rounded)
        if again or found is None or found.lasts is not None:
            return _calibrate(kind, device, card, seconds)
    return found


def _calibrate(kind: Kind, device: torch.device, card: Card, seconds: float = spawn.SECONDS) -> Decision:
    """Measure and keep; the caller holds the lock."""
    rounded, default = kind.rounded(), _default(kind, device)
    others = [name for name in cards.candidates(device, default) if kind.is_carried(name)]
    found = spawn.measure(kind, device, default, others, seconds=seconds)
    if (failure := decisions.write(card, rounded, found)) is not None:
        logger.warning("rru_fast: the decision on %s is not kept: %s", rounded, failure)
    return _remember(card, rounded, found)


def _default(kind: Kind, device: torch.device) -> str:
    """Return the backend that runs a kind if nothing has been measured."""
    default = backends.choose("auto", device)
    if default == "cpu" and isinstance(kind, RefineKind):
        sizes = kind.clips, kind.channels, kind.height * kind.width, kind.hidden
        return "composite" if native.is_faster_in_composite(kind.dtype, *sizes, kind.training) else "cpu"
    return default


def _unresolved(device: torch.device) -> str:
    """Return what runs a call on which nothing is decided."""
    default = backends.choose("auto", device)
    return "auto" if default == "cpu" else default


def _name(decision: Decision) -> str:
    """Return the backend of a decision as operators take it."""
    tuned = decision.backend in ("triton", "cuda")  # the latter's backward is the former's
    return backends.CHOSEN + decision.backend if tuned else decision.backend


def forget() -> None:
    """Forget what this process has looked up and decided; files stay."""
    for memory in (_traced, _known, _calibrated, _of_ranks):
        memory.clear()
    _clear_answers()


def _clear_answers() -> None:
    _backends.clear()
    _kinds.clear()
    _retry.clear()
    _decided_on.cache_clear()


def entries(device: torch.device) -> list[Entry]:
    """Return the decisions on a device: those of this process, then those on disk and shipped."""
    card = cards.card_of(device)
    own = [Entry(card, kind, found) for kind, found in _known_on(card).items()]
    known = {entry.kind for entry in own}
    return own + [entry for entry in decisions.read_all(card) if entry.kind not in known]


def _look_up(key: Key, kind: Kind) -> str:
    device: torch.device = key[0]
    if is_collecting():
        _collecting.kinds.setdefault(kind, device)
        return _unresolved(device)
    if key in _of_ranks:
        return _of_ranks[key]
    if _is_capturing(device):
        return _unresolved(device)  # what ran before a capture is in `_backends`, and has been compiled
    found = _find(kind, device)
    if _has_ranks():  # which agree, if they do, for as long as they run
        found = _of_ranks[key] = found or _unresolved(device)
    if found is None:
        if len(_retry) >= MOST_KEYS:
            _retry.clear()
        _retry[key] = time.monotonic() + RETRY
        return _unresolved(device)
    if len(_backends) >= MOST_KEYS:
        _backends.clear()
        _kinds.clear()
    _backends[key], _kinds[key] = found, kind.rounded()
    return found


def _find(kind: Kind, device: torch.device) -> str | None:
    """Return the backend that is decided on, now at the latest if that may be; None if nothing is."""
    card = cards.card_of(device)
    decision = _decision(card, kind.rounded())
    if decision is None:
        if _why_not(kind, device) is not None:
            return None
        alike = sum(of.category == kind.category for of in list(_calibrated))
        if len(_calibrated) >= MOST_KINDS or alike >= MOST_ALIKE:
            decision = _nearest(card, kind.rounded())
        else:
            decision = _calibrate_first(kind, device, card)
    return None if decision is None else _name(decision)


def _calibrate_first(kind: Kind, device: torch.device, card: Card) -> Decision | None:
    """Calibrate at the first call of a kind; None if another process or thread does."""
    rounded = kind.rounded()
    if not _calibrating.acquire(blocking=False):
        return None
    try:
        with decisions.lock(card) as free:
            if not free:
                return None
            found = decisions.read(card, rounded)  # another process may just have written it
            if found is not None:
                return _remember(card, rounded, found)
            _calibrated.append(rounded)
            logger.warning(
                "rru_fast: measuring which backend is the fastest for %s on %s, once, for at most %.0f s in a process "
                "of its own; RRU_FAST_CALIBRATE=0 turns this off",
                rounded,
                card["device"],
                spawn.SECONDS,
            )
            begin = time.monotonic()
            try:
                found = _calibrate(kind, device, card)
            except Exception as error:  # the call itself must go on
                default = backends.choose("auto", device)
                reason = f"the measurement failed: {type(error).__name__}: {error}"
                found = _remember(card, rounded, Decision(default, reason, default, lasts=decisions.HOUR))
            logger.warning(
                "rru_fast: auto runs %s for %s: %s (%.1f s, %.0f MiB)",
                found.backend,
                rounded,
                found.reason,
                time.monotonic() - begin,
                found.peak_mib,
            )
            return found
    finally:
        _calibrating.release()


def _decision(card: Card, rounded: Kind) -> Decision | None:
    """Return the decision on a kind: of this process, on disk or shipped."""
    found = _known.get((repr(card), rounded))
    if found is None and (found := decisions.read(card, rounded)) is not None:
        _remember(card, rounded, found)
    return found


def _remember(card: Card, rounded: Kind, decision: Decision) -> Decision:
    _known[repr(card), rounded] = decision
    for key, of in list(_kinds.items()):  # other answers stay: a capture relies on them
        if of == rounded:
            _backends.pop(key, None)
    _retry.clear()
    _decided_on.cache_clear()
    return decision


def _why_not(kind: Kind, device: torch.device) -> str | None:
    """Return the reason why nothing is calibrated now without being asked, or None."""
    if not calibration_enabled():
        return "RRU_FAST_CALIBRATE=0"
    if not cards.calibrates(device):
        return f"no other backend on {device.type}"
    if kind.dtype == "float64":
        return "float64, which is for checks"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms"
    if _has_ranks():
        return "several ranks"
    if _has_mps():
        return "CUDA MPS, whose clients end with one that fails"
    return None


def calibration_enabled() -> bool:
    """Return False if RRU_FAST_CALIBRATE turns automatic calibration off.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    asked = os.environ.get("RRU_FAST_CALIBRATE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"RRU_FAST_CALIBRATE: got {asked!r}, wanted 0 or 1")
    return asked != "0"


def _has_ranks() -> bool:
    world = os.environ.get("WORLD_SIZE") or "1"  # torchrun's, which is set before its ranks meet
    dist = torch.distributed
    return world != "1" or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def _is_capturing(device: torch.device) -> bool:
    """Return True if a CUDA graph is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _has_mps() -> bool:
    """Return True if GPUs may be shared through CUDA MPS."""
    return "CUDA_MPS_PIPE_DIRECTORY" in os.environ or os.path.exists("/tmp/nvidia-mps")


def _nearest(card: Card, rounded: Kind) -> Decision | None:
    """Return the decision on the nearest kind that runs the same kernels: it differs in sizes that vary alone."""

    def distance(kind: Kind) -> float:
        return sum(abs(log2(max(a, 1)) - log2(max(b, 1))) for a, b in zip(kind.sizes, rounded.sizes, strict=True))

    here = _known_on(card)
    same = [kind for kind in here if kind.category == rounded.category]
    return here[min(same, key=distance)] if same else None


def _known_on(card: Card) -> dict[Kind, Decision]:
    """Return this process's decisions on a card, while other threads may add to them."""
    return {kind: found for (of, kind), found in list(_known.items()) if of == repr(card)}


@cached
def _decided_on(device_type: str) -> bool:
    """Return True if decisions are looked up on devices of this type: on a CPU only if there are any."""
    if device_type in cards.AUTOMATIC:
        return True
    if device_type != "cpu":
        return False
    if is_collecting():
        return True
    # The card of a CPU takes 10 ms to describe.
    maybe = _known or any(decisions.folder().glob("*.json"))
    return bool(maybe and entries(torch.device("cpu")))
