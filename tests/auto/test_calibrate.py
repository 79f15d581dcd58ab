"""Calibration by request: of a module's or function's own calls, on the CPU, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rru_fast
from rru_fast import backends, functional, native, report
from rru_fast.auto import choice, spawn
from rru_fast.auto.kinds import BatchHardKind, Kind, RefineKind, StripPoolKind
from rru_fast.calibrate import cases, measure

CPU = torch.device("cpu")
REFINE = RefineKind(
    "float32", True, "contiguous", "float32", "", True, "appearance+motion", "both", 3, 4, 6, 3, 2, 5, 4
)
needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")


class Model(nn.Module):
    """A unit, twice, and a loss, behind a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.drop = nn.Linear(2, 2), nn.Dropout()
        self.unit = rru_fast.RRU(6, (3, 2), hidden=4, spatial_hidden=3)
        self.loss = rru_fast.BatchHardTripletLoss()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = self.unit(self.drop(self.stem(x)))
        self.unit(x[:1])
        return self.loss(out.features.mean((1, 3, 4)), labels) + self.loss(out.strips.permute(2, 0, 1), labels)


@pytest.mark.exhaustive
@needs_kernels
def test_all_kinds_of_a_model_are_measured_and_then_run_by_auto(folder: Path) -> None:
    model, x, labels = Model(), torch.randn(4, 3, 6, 3, 2), torch.tensor([0, 0, 1, 1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = rru_fast.calibrate(model, x, labels)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert [(kind.op, kind.sizes) for kind in found] == [
        ("refine", (4, 3, 6, 3, 2, 4, 3)),
        ("refine", (1, 3, 6, 3, 2, 4, 3)),
        ("batch_hard", (1, 4, 0, 6)),
        ("batch_hard", (3, 4, 0, 6)),
    ]
    assert {decision.backend for decision in found.values()} == {"cpu"}  # at such sizes Python takes all the time
    assert all(decision.ratio is not None and decision.ratio < 1 for decision in found.values())
    assert len(list(folder.glob("*.json"))) == 4
    backends.forget_runs()
    model(x, labels).backward()
    assert backends.ran() == {"refine": ["cpu"], "batch_hard": ["cpu"]}
    assert len(choice._backends) == 4
    lines = report.report().splitlines()
    assert (
        sum(line.startswith("  refine, training, float32, ") and ": cpu: composite is" in line for line in lines) == 2
    )
    # What has been decided is not measured again, unless asked.
    assert rru_fast.calibrate(model, x, labels) == found
    (again,) = rru_fast.calibrate(rru_fast.strip_pool, x, again=True).values()
    assert again.backend == "cpu" and again.measured > 0


@needs_kernels
def test_a_cpu_runs_what_was_decided_for_it(folder: Path) -> None:
    s = torch.randn(2, 3, 5, 4, 2)
    backends.forget_runs()
    rru_fast.strip_pool(s)
    assert backends.ran() == {"strip_pool": ["cpu"]}
    kind = StripPoolKind("float32", False, "contiguous", 2, 4, 5, 4, 2)
    card = rru_fast.auto.cards.card_of(CPU)
    rru_fast.auto.decisions.write(card, kind, rru_fast.auto.decisions.Decision("composite", "measured", "cpu"))
    choice.forget()
    backends.forget_runs()
    rru_fast.strip_pool(s)
    assert backends.ran() == {"strip_pool": ["composite"]}


@needs_kernels
def test_a_decision_on_one_kind_leaves_the_default_of_others(folder: Path) -> None:
    card, kind = rru_fast.auto.cards.card_of(CPU), StripPoolKind("float32", False, "contiguous", 2, 4, 5, 4, 2)
    rru_fast.auto.decisions.write(card, kind, rru_fast.auto.decisions.Decision("composite", "measured", "cpu"))
    choice.forget()
    unit = rru_fast.RRU(256, (1, 1), hidden=64, spatial_hidden=2)
    for clips, wanted in ((64, ["composite"]), (8, ["cpu"])):  # narrow maps, with much work and with little
        backends.forget_runs()
        unit(torch.randn(clips, 2, 256, 1, 1)).features.sum().backward()
        assert backends.ran() == {"refine": wanted}


@needs_kernels
def test_what_is_measured_is_compared_with_the_default_of_its_shape(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def measured(kind: Kind, device: torch.device, default: str, candidates: list[str], **_: object) -> Any:
        asked.append((default, candidates))
        return rru_fast.auto.decisions.Decision(default, "", default)

    monkeypatch.setattr(spawn, "measure", measured)
    unit = rru_fast.RRU(256, (1, 1), hidden=64, spatial_hidden=2)
    for clips in (64, 8):
        rru_fast.calibrate(unit, torch.randn(clips, 2, 256, 1, 1))
    assert asked == [("composite", ["cpu"]), ("cpu", ["composite"])]


def test_a_process_that_hangs_is_killed_and_the_default_serves(folder: Path) -> None:
    (decision,) = rru_fast.calibrate(rru_fast.strip_pool, torch.zeros(1, 1, 1, 1, 1), seconds=0.01).values()
    assert decision.reason == "stopped after 0 s, in its start" and decision.lasts == 86400
    assert decision.backend == backends.choose("auto", CPU)


@pytest.mark.parametrize("seconds", ["1", float("nan"), -1, True])
def test_a_wrong_time_limit_is_an_error(seconds: Any) -> None:
    with pytest.raises(ValueError, match=f"^seconds: got {seconds!r}, wanted a number above 0$"):
        rru_fast.calibrate(print, seconds=seconds)


def test_a_call_of_another_backend_is_nothing_to_calibrate() -> None:
    with pytest.raises(RuntimeError, match="reached no operator"):
        rru_fast.calibrate(rru_fast.strip_pool, torch.zeros(1, 1, 1, 1, 1), backend="reference")


def test_an_error_of_the_function_passes_through_and_restores_its_buffers() -> None:
    unit = rru_fast.RRU(6, (3, 2), hidden=4, spatial_hidden=3)
    before = unit.transition_norm.running_mean.clone()

    def forward(x: Tensor) -> None:
        unit(x)
        raise KeyError("mine")

    holder = nn.Module()
    holder.unit = unit
    holder.forward = forward  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyError, match="mine"):
        rru_fast.calibrate(holder, torch.randn(2, 3, 6, 3, 2))
    assert torch.equal(unit.transition_norm.running_mean, before)
    with pytest.raises(RuntimeError, match="reached no operator"):  # nothing is collected any more
        rru_fast.calibrate(lambda: None)


def test_buffers_that_the_call_replaces_are_restored_too() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(2, 3))

        def forward(self, s: Tensor) -> None:
            self.rows += 1
            self.rows = torch.cat((self.rows, self.rows))
            raise KeyError(rru_fast.strip_pool(s))

    bank = Bank()
    rows = bank.rows
    with pytest.raises(KeyError):
        rru_fast.calibrate(bank, torch.zeros(1, 1, 1, 1, 1))
    assert bank.rows is rows and not rows.any()


# The measurement itself, in this process

KINDS = [
    REFINE,
    RefineKind("bfloat16", False, "channels last", "float32", "", False, "raw", "channel", 2, 5, 6, 3, 2, 5, 0),
    RefineKind("float16", True, "strided", "float16", "", False, "appearance", "spatial", 2, 3, 6, 3, 2, 5, 4),
    RefineKind("float64", True, "contiguous", "float64", "", True, "raw", "both", 2, 3, 6, 3, 2, 5, 4),
    StripPoolKind("bfloat16", True, "channels last", 2, 3, 5, 4, 2),
    StripPoolKind("float32", False, "strided", 2, 3, 5, 4, 2),
    BatchHardKind("float32", True, "contiguous", "", "euclidean", 3, 12, 0, 7),
    BatchHardKind("float64", False, "strided", "", "cosine", 1, 12, 0, 7),
    BatchHardKind("float16", True, "contiguous", "", "cosine", 2, 12, 20, 7),
]


@pytest.mark.parametrize("kind", KINDS, ids=map(str, KINDS))
def test_a_random_call_is_of_the_kind_that_was_asked_for(kind: Kind) -> None:
    with choice.collecting() as found:
        cases.make_case(kind, CPU, seed=0).caller("auto")()
    assert list(found) == [kind]
    one, other, third = (cases.make_case(kind, CPU, seed).results("composite") for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)
    assert kind.gradients == any(name.startswith("d_") for name in one)
    small = list(cases.parity_kinds(kind))
    assert len(small) == 5 and small[-1] == kind
    sizes = {name: getattr(kind, name) for name in (*kind.rounded_sizes, *kind.exact_sizes)}
    assert {replace(of, **sizes) for of in small} == {kind}


@pytest.mark.parametrize("kind", KINDS, ids=map(str, KINDS))
@pytest.mark.parametrize("backend", ["composite", pytest.param("cpu", marks=needs_kernels)])
def test_backends_that_are_right_pass(kind: Kind, backend: str) -> None:
    parity = measure.hold(kind, CPU, backend, lambda stage, of: None)
    assert 0 <= parity.error <= parity.allowed


def test_parity_is_cut_to_what_fits_in_memory() -> None:
    paper = RefineKind("float32", True, "contiguous", "float32", "", True, "raw", "both", 20, 8, 2048, 8, 8, 256, 128)
    assert cases.cut(paper) == paper
    for kind in (
        RefineKind("float32", False, "contiguous", "float32", "", False, "raw", "both", 64, 675, 2048, 16, 8, 256, 128),
        BatchHardKind("float32", True, "contiguous", "", "euclidean", 8, 16384, 65536, 2048),
    ):
        assert cases._elements(cases.cut(kind)) <= cases.MOST_ELEMENTS < cases._elements(kind)


def test_a_call_too_large_for_the_oracle_is_held_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MOST_ELEMENTS", 200)
    kind = StripPoolKind("float32", True, "contiguous", 4, 16, 5, 4, 2)
    pool = functional.strip_pool

    def wrong_where_large(s: Tensor, *, backend: str) -> Tensor:
        out = pool(s, backend=backend)
        return out * 1.001 if backend == "composite" and s.shape[1] == 16 else out

    monkeypatch.setattr(functional, "strip_pool", wrong_where_large)
    found = measure.measure(kind, CPU, "reference", ["composite"], note=lambda *_: None, clock=lambda call, of: 1.0)
    assert found.backend == "reference"
    assert "composite fails: out is off reference's by 1.0e-03 at full size, allowed" in found.reason


@pytest.mark.parametrize(
    ("ratios", "undecided", "ratio"),
    [
        ([2.0] * 11, False, 2.0),
        ([1.0, 1.05, 1.09] * 4, False, 1.05),
        ([0.1, *[1.2] * 9, 9.0], False, 1.2),  # the largest and the smallest do not count
        ([4.0, 2.0] * 6, False, 4.0),  # whichever is right, it is faster
        ([0.9, 0.5] * 6, False, 0.9),
        ([1.3, 0.8] * 6, True, 1.3),
        ([1.15, 1.05] * 6, False, 1.15),
    ],
)
def test_the_median_of_rounds_decides_unless_they_contradict_each_other(
    ratios: list[float], undecided: bool, ratio: float
) -> None:
    calls = {"reference": 0, "composite": 0}

    def clock(call: Callable[[], object], of: str) -> float:
        calls[of] += 1
        # The first call of each tells how many make a round.
        return 1.0 if of == "composite" or calls[of] == 1 else ratios[calls[of] - 2]

    kind = StripPoolKind("float32", True, "contiguous", 2, 3, 5, 4, 2)
    timing = measure.time_pair(kind, CPU, "reference", "composite", {}, clock)
    assert (timing.undecided, timing.ratio) == (undecided, ratio)
    assert calls == {"reference": 12, "composite": 12}


def test_a_default_that_is_wrong_is_replaced_by_composite(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = measure.hold

    def of_backend(
        kind: Kind, device: torch.device, backend: str, note: measure.Note, draw: measure.Draw
    ) -> measure.Parity:
        if backend == "reference":
            raise measure.BackendError("out is off by 1, allowed 0")
        return hold(kind, device, backend, note, draw)

    monkeypatch.setattr(measure, "hold", of_backend)
    found = measure.measure(REFINE, CPU, "reference", ["composite"], note=lambda *_: None)
    assert (found.backend, found.reason) == ("composite", "reference fails: out is off by 1, allowed 0")


@pytest.mark.parametrize("where", ["reference", "allocation"])
def test_what_fails_in_every_backend_is_no_failure_of_one(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = functional.strip_pool

    def failing(s: Tensor, *, backend: str) -> Tensor:
        if where == "reference" and backend == "reference":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED\nmore")
        if where == "allocation" and backend == "cpu":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return pool(s, backend="reference")

    monkeypatch.setattr(functional, "strip_pool", failing)
    kind = StripPoolKind("float32", True, "contiguous", 4, 16, 5, 4, 2)
    found = measure.measure(kind, CPU, "composite", ["cpu"], note=lambda *_: None)
    assert (found.backend, found.lasts) == ("composite", 3600)
    assert found.reason.startswith("the measurement fails: RuntimeError: ")


def test_a_call_that_cannot_be_is_blamed_on_no_backend() -> None:
    kind = replace(REFINE, clips=1, height=1, width=1)
    found = measure.measure(kind, CPU, "cpu", ["composite"], note=lambda *_: None)
    assert found.backend == "cpu" and found.lasts == 3600
    assert found.reason.startswith("the measurement fails: ValueError: Expected more than 1 value per channel")


CRASHES = """
import os, sys
sys.path.insert(0, {root!r})
from rru_fast.calibrate import measure, worker
def hold(kind, device, backend, note, draw):
    note("parity", backend)
    os.abort()
measure.hold = hold
worker.main()
"""


def test_a_default_that_crashes_is_replaced_by_composite(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(rru_fast.__file__).parents[1])
    monkeypatch.setattr(spawn, "command", lambda: [sys.executable, "-c", CRASHES.format(root=root)])
    found = spawn.measure(REFINE, CPU, "cpu", [])
    assert (found.backend, found.reason, found.lasts) == ("composite", "ended by SIGABRT, in parity", None)


SHADOWED = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
sys.path[:0] = [{root!r}]
import torch, rru_fast
from rru_fast.auto import kinds, spawn
kind = kinds.StripPoolKind("float32", False, "contiguous", 2, 3, 5, 4, 2)
print(spawn.measure(kind, torch.device("cpu"), "composite", []).reason)
"""


def test_the_process_imports_this_library_and_no_modules_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("json", "torch", "resource", "types"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    script = tmp_path / "user" / "script.py"
    script.parent.mkdir()
    root = str(Path(rru_fast.__file__).parents[1])
    script.write_text(SHADOWED.format(root=root))
    env = {**os.environ, "RRU_FAST_CALIBRATE": "0"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "nothing to compare it with\n", done.stderr
