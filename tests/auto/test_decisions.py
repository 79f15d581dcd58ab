"""The files of decisions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rru_fast import backends
from rru_fast.auto import decisions
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import StripPoolKind

CARD = {"device": "a card", "torch": "2.11", "triton": "3.6", "kernels": "abc"}
KIND = StripPoolKind("float32", True, "contiguous", 4, 8, 2048, 8, 8)
DECISION = Decision(
    "composite", "triton is slower", ratio=0.5, spread=0.1, seconds=3.5, peak_mib=512, date="2026-11-30"
)


def test_a_decision_is_read_back_for_its_kind_and_card_alone(folder: Path) -> None:
    assert decisions.read(CARD, KIND) is None
    assert decisions.write(CARD, KIND, DECISION) is None
    assert decisions.read(CARD, KIND) == DECISION
    assert decisions.read(CARD, replace(KIND, clips=8)) is None
    for name in CARD:  # another torch, another source of kernels
        assert decisions.read({**CARD, name: "another"}, KIND) is None
    (entry,), others = decisions.read_all(CARD)
    assert entry == (CARD, KIND, DECISION) and others == 0
    decisions.write({**CARD, "torch": "2.14"}, KIND, DECISION)
    assert decisions.read_all({**CARD, "torch": "2.14"})[1] == 1
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
        lambda content: json.dumps({**content, "decision": {**content["decision"], "backend": "cuda"}}),
        lambda content: json.dumps({**content, "decision": {"backend": "composite"}}),
        lambda content: "\0" * 100,
    ],
)
def test_a_damaged_file_is_no_decision_and_is_written_anew(damage: Callable[[Any], str], folder: Path) -> None:
    decisions.write(CARD, KIND, DECISION)
    (file,) = folder.iterdir()
    file.write_text(damage(json.loads(file.read_text())))
    assert decisions.read(CARD, KIND) is None
    assert decisions.read_all(CARD)[0] == []
    decisions.write(CARD, KIND, DECISION)
    assert decisions.read(CARD, KIND) == DECISION


def test_a_decision_for_a_backend_that_is_not_here_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "triton", None)
    decisions.write(CARD, KIND, replace(DECISION, backend="triton"))
    assert decisions.read(CARD, KIND) is not None
    monkeypatch.setitem(backends.BACKENDS, "triton", "not installed")
    assert decisions.read(CARD, KIND) is None


def test_where_nothing_can_be_written_the_reason_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "folder", lambda: Path("/proc/no such folder"))
    assert decisions.write(CARD, KIND, DECISION) == "No such file or directory: /proc/no such folder"
    assert decisions.read(CARD, KIND) is None
    assert decisions.read_all(CARD) == ([], 0)
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
        assert [entry.decision for entry in decisions.read_all(CARD)[0]] == [DECISION]
        own = replace(DECISION, reason="measured here")
        decisions.write(CARD, KIND, own)
        assert decisions.read(CARD, KIND) == own
        assert [entry.decision for entry in decisions.read_all(CARD)[0]] == [own]
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
        other.kill()
    with decisions.lock(CARD) as free:
        assert free
