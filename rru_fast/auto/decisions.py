"""Decisions, and the files that keep them: one per kind and card, so that processes can write in parallel."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any, NamedTuple

from rru_fast import backends, cache
from rru_fast.auto import kinds
from rru_fast.auto.kinds import Kind

# Decisions measured on known GPUs: one file per GPU, a list of entries as in the files of `folder`.
SHIPPED = Path(__file__).parent / "shipped"

Card = dict[str, str]


HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Decision:
    """Which backend runs calls of a kind on a card, and why."""

    backend: str
    reason: str
    """In words, of at most a line."""
    default: str
    """The backend that it was compared with."""
    lasts: float | None = None
    """Seconds for which it is valid, of a measurement that may end otherwise next time; None for good."""
    ratio: float | None = None
    """Of the default's time to that of the fastest other backend: the median of paired rounds; None if not timed."""
    spread: float | None = None
    """Range of the ratios without the largest and the smallest, relative to their median."""
    error: float | None = None
    """The fastest backend's largest relative error, and the bound for it, of the tensor nearest its bound."""
    allowed: float | None = None
    seconds: float = 0.0
    """Time that the measurement took."""
    peak_mib: float = 0.0
    """Memory of the device that it took at most, of the host on a CPU."""
    measured: float = 0.0
    """When it ended, in seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """Return the decision as JSON values; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Decision:
        """Return the decision that `to_json` described.

        Raises:
            TypeError: it did not.
        """
        decision = cls(**values)
        wanted: dict[str, Any] = dict.fromkeys(("backend", "reason", "default"), str)
        wanted |= dict.fromkeys(("seconds", "peak_mib", "measured"), int | float)
        wanted |= dict.fromkeys(("lasts", "ratio", "spread", "error", "allowed"), int | float | None)
        for name, kind in wanted.items():
            if not isinstance(getattr(decision, name), kind):
                raise TypeError(f"decision: got {name} {getattr(decision, name)!r}, wanted {kind}")
        return decision

    @property
    def usable(self) -> bool:
        """True while it is valid, if its backend is available."""
        is_valid = self.lasts is None or time.time() < self.measured + self.lasts
        return is_valid and backends.BACKENDS.get(self.backend, "unknown") is None

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


class Entry(NamedTuple):
    """A decision with what it is about."""

    card: Card
    kind: Kind
    decision: Decision


def folder() -> Path:
    """Return the folder of the decisions."""
    return cache.folder("auto")


def read(card: Card, kind: Kind) -> Decision | None:
    """Return the decision on a kind, from disk or shipped; None if there is none that can be used."""
    for entry in (*_entries_of(_path(card, kind)), *_shipped()):
        if entry.card == card and entry.kind == kind and entry.decision.usable:
            return entry.decision
    return None


def read_folder() -> list[Entry]:
    """Return all decisions on disk that are usable, those of other cards too."""
    with suppress(OSError):
        found = [entry for path in sorted(folder().glob("*.json")) for entry in _entries_of(path)]
        return [entry for entry in found if entry.decision.usable]
    return []


def read_all(card: Card) -> list[Entry]:
    """Return the decisions of a card, from disk and shipped."""
    own = [entry for entry in read_folder() if entry.card == card]
    known = {entry.kind for entry in own}
    shipped = [entry for entry in _shipped() if entry.card == card and entry.decision.usable]
    return own + [entry for entry in shipped if entry.kind not in known]


def write(card: Card, kind: Kind, decision: Decision) -> str | None:
    """Keep a decision on disk; returns the reason if that is not possible."""
    content = {"card": card, "kind": kind.to_json(), "decision": decision.to_json()}
    return cache.write_json(_path(card, kind), content)


@contextmanager
def lock(card: Card, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a kind of card, which ends with the process; yields False if another process has it.

    Where a lock is not possible, as in a folder that is read-only, yields True.

    wait: until the other process releases it.
    """
    try:
        import fcntl

        folder().mkdir(parents=True, exist_ok=True)
        file = (folder() / f"{_hash(card)}.lock").open("w")
    except (OSError, ImportError):
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        try:
            yield True
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # processes that were forked meanwhile hold it too


def _path(card: Card, kind: Kind) -> Path:
    return folder() / f"{kind.op}-{_hash([card, kind.to_json()])}.json"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _entries_of(path: Path) -> list[Entry]:
    """Read a file of one entry or of a list of them; entries that are missing or damaged are left out."""
    content = cache.read_json(path)
    found = []
    for values in content if isinstance(content, list) else [content]:
        with suppress(KeyError, TypeError, ValueError):
            entry = Entry(dict(values["card"]), kinds.from_json(values["kind"]), Decision.from_json(values["decision"]))
            found.append(entry)
    return found


@cached
def _shipped() -> tuple[Entry, ...]:
    return tuple(entry for path in sorted(SHIPPED.glob("*.json")) for entry in _entries_of(path))
