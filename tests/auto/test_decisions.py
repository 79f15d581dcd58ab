"""The files of decisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rru_fast import backends, cache
from rru_fast.auto import decisions
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import StripPoolKind

CARD = {"device": "a card", "torch": "2.11", "triton": "3.6", "kernels": "abc"}
KIND = StripPoolKind("float32", True, "contiguous", 4, 8, 2048, 8, 8)
DECISION = Decision("composite", "triton is slower", "composite", ratio=0.5, spread=0.1, seconds=3.5)


def test_a_decision_is_read_back_for_its_kind_and_card_alone(folder: Path) -> None:
    assert decisions.read(CARD, KIND) is None
    assert decisions.write(CARD, KIND, DECISION) is None
    assert decisions.read(CARD, KIND) == DECISION
    assert decisions.read(CARD, replace(KIND, clips=8)) is None
    for name in CARD:  # another torch, another source of kernels
        assert decisions.read({**CARD, name: "another"}, KIND) is None
    assert decisions.read_all(CARD) == [(CARD, KIND, DECISION)]
    decisions.write({**CARD, "torch": "2.14"}, KIND, DECISION)
    assert len(decisions.read_folder()) == 2 and len(decisions.read_all(CARD)) == 1
    assert decisions.read(CARD, KIND) == DECISION
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:40],
        lambda content: "[]",
        lambda content: "5",
        lambda content: json.dumps({**content, "kind": {"op": "strip_pool"}}),
        lambda content: json.dumps({**content, "card": 7}),
        lambda content: json.dumps({**content, "decision": {**content["decision"], "backend": 3}}),
        lambda content: json.dumps({**content, "decision": {**content["decision"], "ratio": "fast"}}),
        lambda content: json.dumps({**content, "decision": {**content["decision"], "backend": "none such"}}),
        lambda content: json.dumps({**content, "decision": {**content["decision"], "backend": "vulkan"}}),
        lambda content: json.dumps({**content, "decision": {"backend": "composite"}}),
        lambda content: "\0" * 100,
        lambda content: "[" * 100_000,
        lambda content: json.dumps({**content, "kind": {**content["kind"], "clips": [2]}}),
        lambda content: json.dumps({**content, "kind": {**content["kind"], "gradients": 1}}),
    ],
)
def test_a_damaged_file_is_no_decision_and_is_written_anew(damage: Callable[[Any], str], folder: Path) -> None:
    decisions.write(CARD, KIND, DECISION)
    (file,) = folder.iterdir()
    file.write_text(damage(json.loads(file.read_text())))
    assert decisions.read(CARD, KIND) is None
    assert decisions.read_all(CARD) == decisions.read_folder() == []
    decisions.write(CARD, KIND, DECISION)
    assert decisions.read(CARD, KIND) == DECISION


def test_a_decision_for_a_backend_that_is_not_here_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "triton", None)
    decisions.write(CARD, KIND, replace(DECISION, backend="triton"))
    assert decisions.read(CARD, KIND) is not None
    monkeypatch.setitem(backends.BACKENDS, "triton", "not installed")
    assert decisions.read(CARD, KIND) is None


def test_a_decision_that_does_not_last_is_used_for_its_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions.write(CARD, KIND, replace(DECISION, measured=1000.0, lasts=decisions.HOUR))
    for now, valid in ((1000.0, True), (4599.0, True), (4601.0, False)):
        monkeypatch.setattr(decisions.time, "time", lambda now=now: now)
        assert (decisions.read(CARD, KIND) is not None) == valid
        assert len(decisions.read_all(CARD)) == valid


def test_a_file_that_could_not_be_written_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert decisions.write(CARD, KIND, DECISION) == f"No space left on device: {folder}"
    assert list(folder.iterdir()) == []


def test_where_nothing_can_be_written_the_reason_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "folder", lambda: Path("/proc/no such folder"))
    assert decisions.write(CARD, KIND, DECISION) == "No such file or directory: /proc/no such folder"
    assert decisions.read(CARD, KIND) is None
    assert decisions.read_all(CARD) == []
    with decisions.lock(CARD) as free:
        assert free


def test_decisions_that_are_shipped_are_used_until_there_are_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions.write(CARD, KIND, DECISION)
    (file,) = folder.iterdir()
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "a-card.json").write_text(f"[{file.read_text()}]")
    file.unlink()
    monkeypatch.setattr(decisions, "SHIPPED", shipped)
    decisions._shipped.cache_clear()
    try:
        assert decisions.read(CARD, KIND) == DECISION
        assert [entry.decision for entry in decisions.read_all(CARD)] == [DECISION]
        own = replace(DECISION, reason="measured here")
        decisions.write(CARD, KIND, own)
        assert decisions.read(CARD, KIND) == own
        assert [entry.decision for entry in decisions.read_all(CARD)] == [own]
    finally:
        decisions._shipped.cache_clear()


LOCKER = """
import sys
from pathlib import Path
from rru_fast.auto import decisions
decisions.folder = lambda: Path(sys.argv[1])
with decisions.lock({card!r}) as free:
    print(free, flush=True)
    sys.stdin.readline()
"""


def test_the_lock_of_a_card_ends_with_its_process(folder: Path) -> None:
    command = [sys.executable, "-c", LOCKER.format(card=CARD), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with decisions.lock(CARD) as free:
            assert not free
        with decisions.lock({**CARD, "device": "another"}) as free:
            assert free
        threading.Timer(0.3, other.kill).start()
        with decisions.lock(CARD, wait=True) as free:
            assert free
        assert other.wait(10) != 0
    with decisions.lock(CARD) as free:
        assert free


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_meanwhile_does_not_hold_the_lock(folder: Path) -> None:
    read, write = os.pipe()
    with decisions.lock(CARD) as free:
        assert free
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0)
    try:
        with decisions.lock(CARD) as free:
            assert free
    finally:
        os.write(write, b".")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
