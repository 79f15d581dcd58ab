"""`auto` on a card on which nothing has been decided, whose kernels fail in every way that kernels can.

The card is Triton's interpreter, in the process that measures; the scenarios are in tests/helpers/fake_card.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rru_fast
from rru_fast import backends, report, triton
from rru_fast.auto import choice, decisions, kinds, spawn

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
Card = Callable[[str], None]
MAPS = (2, 3, 5, 4, 2)
CPU = torch.device("cpu")

# Why composite serves, and for how many hours; None for good.
FAILURES = {
    "slow": ("triton is 0.50 x as fast, wanted 1.10 x", None),
    "nearly as fast": ("triton is 1.05 x as fast, wanted 1.10 x", None),
    "noisy": ("undecided: triton takes 0.83 of the time of composite, but ratios range over 67 %", 1),
    "crashes": (r"ended by SIGSEGV, in parity of triton, strip_pool, float32, 3 x 4 x .*", None),
    "is killed": (r"ended by SIGKILL, in parity of triton, .*", 1),
    "is told to end": (r"ended by SIGTERM, in parity of triton, .*", 1),
    "writes NaN": ("triton fails: out is not finite in strip_pool, .*", None),
    "is wrong": (r"triton fails: out is off by 1.0e-04, allowed 1\..e-06, in strip_pool, .*", None),
    "is wrong once": (r"triton fails: out is off by 2.0e\+00, allowed 1\..e-06, in strip_pool, .*", None),
    "differs from run to run": ("triton fails: out differs between two runs", None),
    "runs out of memory": ("the measurement fails: OutOfMemoryError: CUDA out of memory. Tried to .* 20.00 GiB.", 1),
    "meets a busy card": ("the measurement fails: RuntimeError: CUDA error: CUDA-capable device.s. is/are busy .*", 1),
    "does not compile": ("triton fails: RuntimeError: .* PTXASError: ptxas: fatal", None),
    "does not start": ("exit status 1, in its start: CUDA error: all .* devices are busy or unavailable", 1),
}


def strips(maps: tuple[int, ...] = MAPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return strips of random maps by "auto", with their gradient, and the right ones."""
    s = torch.randn(maps, requires_grad=True)
    return rru_fast.strip_pool(s), s.detach().mean((1, 4))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "rru_fast"]


@pytest.mark.parametrize("scenario", FAILURES)
def test_a_call_is_right_by_composite_and_one_line_says_why(
    scenario: str, card: Card, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card(scenario)
    why, hours = FAILURES[scenario]
    backends.forget_runs()
    found, wanted = strips()
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert backends.ran() == {"strip_pool": ["composite"]}
    before, after = lines(caplog)
    assert "measuring which backend is the fastest for strip_pool, float32, 2 x 4 x 5 x 4 x 2" in before
    assert "RRU_FAST_CALIBRATE=0 turns this off" in before
    assert re.fullmatch(rf"rru_fast: auto runs composite for strip_pool, .*: {why} \(\d+\.\d s, \d+ MiB\)", after)
    assert len(list(folder.glob("*.json"))) == 1
    (line,) = (line for line in report.report().splitlines() if line.startswith("  strip_pool, float32"))
    assert re.search(rf": composite: {why}, .*{'' if hours is None else f'valid for {hours} h'}$", line)
    # Once, in this process and in the next ones, until it is over.
    strips()
    choice.forget()
    strips()
    assert len(lines(caplog)) == 2


def test_a_kernel_that_hangs_is_stopped(
    card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card("hangs")
    measure = spawn.measure
    monkeypatch.setattr(spawn, "measure", lambda *args, seconds: measure(*args, seconds=8))
    begin = time.monotonic()
    found, wanted = strips()
    assert time.monotonic() - begin < 60
    torch.testing.assert_close(found, wanted)
    assert ": stopped after 8 s, in parity of triton, strip_pool, float32" in lines(caplog)[1]
    assert len(list(folder.glob("*.json"))) == 1


def test_triton_is_chosen_where_it_is_right_and_faster(
    card: Card, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card("fast")
    s = torch.randn(MAPS)
    key = kinds.strip_pool_key(CPU, s.dtype, s.shape, s.stride(), True)
    assert choice.choose(key, kinds.StripPoolKind.from_key) == "auto:triton"
    assert (
        "auto runs triton for strip_pool, float32, 2 x 4 x 5 x 4 x 2: 2.00 x as fast as composite (" in lines(caplog)[1]
    )
    (entry,) = choice.entries(CPU)
    assert (entry.decision.ratio, entry.decision.spread, entry.decision.lasts) == (2.0, 0.0, None)
    assert entry.decision.error is not None and entry.decision.allowed is not None
    assert 0 < entry.decision.error < entry.decision.allowed
    assert entry.decision.peak_mib > 0 and entry.decision.seconds > 0
    # From disk in the next process, without a measurement.
    choice.forget()
    card("crashes")
    assert choice.choose(key, kinds.StripPoolKind.from_key) == "auto:triton"
    if triton.interpreted():
        backends.forget_runs()
        found, wanted = strips()
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
        assert backends.ran() == {"strip_pool": ["triton"]}


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", ["refine", "batch_hard"])
@pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter")
def test_the_other_operators_are_decided_too_with_triton(op: str, card: Card) -> None:
    card("fast")
    backends.forget_runs()
    if op == "refine":
        module = rru_fast.RRU(6, (3, 2), hidden=4, spatial_hidden=3)
        sum(out.sum() for out in module(torch.randn(2, 3, 6, 3, 2))[:2]).backward()
    else:
        features = torch.randn(8, 6, requires_grad=True)
        rru_fast.BatchHardTripletLoss()(features, torch.arange(8) // 2).backward()
    assert backends.ran() == {op: ["triton"]}


USER = """
import sys
sys.path.insert(0, {root!r})
import torch, rru_fast
from tests.helpers import fake_card
from rru_fast import backends
from rru_fast.auto import kinds, choice
for target, value in fake_card.patches("fast"):
    module, _, name = target.rpartition(".")
    setattr(sys.modules[module], name, value)
s = torch.ones(2, 3, 5, 4, 2)
key = kinds.strip_pool_key(s.device, s.dtype, s.shape, s.stride(), True)
print("ready", flush=True)
sys.stdin.readline()
print(choice.choose(key, kinds.StripPoolKind.from_key), flush=True)
"""


def test_of_two_processes_at_once_one_calibrates_and_the_other_goes_on(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "RRU_FAST_CALIBRATE": "1"}
    users = [
        subprocess.Popen(
            [sys.executable, "-c", USER.format(root=str(ROOT))],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for user in users:
        assert user.stdout is not None
        assert user.stdout.readline() == "ready\n"
    outputs = []
    for user in users:
        assert user.stdin is not None
        user.stdin.write("\n")
        user.stdin.flush()
    for user in users:
        outputs.append(user.communicate(timeout=120))
    assert sorted(out for out, _ in outputs) == ["auto:triton\n", "composite\n"]
    for out, error in outputs:
        assert error.count("measuring which backend") == (out == "auto:triton\n")
    assert len(list((tmp_path / "rru_fast" / "auto").glob("*.json"))) == 1


def test_with_a_folder_that_is_read_only_the_decision_holds_for_the_process(
    card: Card, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card("slow")
    monkeypatch.setattr(decisions, "folder", lambda: Path("/proc/no such folder"))
    found, wanted = strips()
    torch.testing.assert_close(found, wanted)
    _, unkept, after = lines(caplog)
    assert "the decision on strip_pool, float32, 2 x 4 x 5 x 4 x 2 is not kept: " in unkept
    assert ": triton is 0.50 x as fast" in after
    strips()
    assert len(lines(caplog)) == 3
