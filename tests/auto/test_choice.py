"""When `auto` looks up a decision, when it makes one, and when it does neither."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import rru_fast
from rru_fast import backends, cuda, functional
from rru_fast.auto import cards, choice, decisions, kinds, spawn
from rru_fast.auto.decisions import Decision
from rru_fast.auto.kinds import Kind, StripPoolKind
from rru_fast.cuda_graphs import Graphs
from rru_fast.ops import strip_pool as operator
from rru_fast.types import Refined

CPU = torch.device("cpu")


@dataclass
class Measurements:
    """Measurements that have been asked for, and what comes of them."""

    kinds: list[Kind] = field(default_factory=list)
    backend: str = "triton"
    lasts: float | None = None
    during: Callable[[], object] = lambda: None

    def measure(self, kind: Kind, device: torch.device, default: str, candidates: Any, **_: object) -> Decision:
        assert (device, default, candidates) == (CPU, "composite", ["triton"])
        self.kinds.append(kind)
        self.during()
        return Decision(self.backend, "as the test says", default, lasts=self.lasts, measured=time.time())


@pytest.fixture
def measured(card: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Measurements:
    """A card on which nothing has been decided; measurements take no time."""
    card("")
    found = Measurements()
    monkeypatch.setattr(spawn, "measure", found.measure)
    return found


def key_of(clips: int, frames: int, gradients: bool = True, dtype: torch.dtype = torch.float32) -> kinds.Key:
    s = torch.empty(clips, frames, 3, 4, 2, dtype=dtype)
    return kinds.strip_pool_key(CPU, s.dtype, s.shape, s.stride(), gradients)


def chosen(clips: int, frames: int, gradients: bool = True) -> str:
    """Return the backend of a call of `strip_pool`."""
    return choice.choose(key_of(clips, frames, gradients), StripPoolKind.from_key).removeprefix(backends.CHOSEN)


def write(clips: int, frames: int) -> None:
    """Decide on triton, as another process does."""
    kind = StripPoolKind.from_key(key_of(clips, frames)).rounded()
    assert decisions.write(cards.card_of(CPU), kind, Decision("triton", "by another process", "composite")) is None


def test_a_kind_is_measured_once_at_the_size_of_its_first_call(measured: Measurements, folder: Path) -> None:
    assert [chosen(3, 5), chosen(3, 5), chosen(4, 8), chosen(3, 7)] == ["triton"] * 4
    (kind,) = measured.kinds
    assert isinstance(kind, StripPoolKind) and (kind.clips, kind.frames) == (3, 5)
    choice.forget()  # as in another process
    assert chosen(4, 6) == "triton"
    assert len(measured.kinds) == 1
    measured.backend = "composite"
    assert chosen(5, 5) == "composite" and chosen(4, 6) == "triton"
    assert len(measured.kinds) == 2 == len(list(folder.glob("*.json")))


def test_what_does_not_last_is_measured_again_when_it_is_over_or_when_asked(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.lasts, measured.backend = decisions.HOUR, "composite"
    assert chosen(3, 5) == chosen(4, 5) == "composite"
    choice.forget()
    assert chosen(3, 5) == "composite"
    assert len(measured.kinds) == 1
    now = time.time()
    monkeypatch.setattr(decisions.time, "time", lambda: now + 1.1 * decisions.HOUR)
    assert chosen(3, 5) == "composite"  # this process stays with it
    choice.forget()
    assert chosen(3, 5) == "composite"
    assert len(measured.kinds) == 2
    s = torch.zeros(3, 5, 3, 4, 2, requires_grad=True)
    measured.lasts = None
    rru_fast.calibrate(rru_fast.strip_pool, s)
    rru_fast.calibrate(rru_fast.strip_pool, s)
    assert len(measured.kinds) == 3


def test_a_variable_turns_measurements_off_but_not_what_they_found(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(3, 5) == "triton"
    monkeypatch.setenv("RRU_FAST_CALIBRATE", "0")
    choice.forget()
    assert chosen(3, 5) == "triton"
    assert chosen(30, 5) == "composite"
    assert len(measured.kinds) == 1
    monkeypatch.setenv("RRU_FAST_CALIBRATE", "no")
    with pytest.raises(ValueError, match=r"^RRU_FAST_CALIBRATE: got 'no', wanted 0 or 1$"):
        chosen(90, 5)


def _with_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def _with_ranks_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def _with_a_group_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def _with_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/pipes")


def _while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_is_capturing", lambda device: True)


@pytest.mark.parametrize(
    "begin",
    [
        _with_deterministic_algorithms,
        _with_ranks_of_torchrun,
        _with_a_group_of_ranks,
        _with_mps,
        _while_a_graph_is_captured,
    ],
)
def test_nothing_is_measured_there_and_what_is_known_serves(
    begin: Callable[[pytest.MonkeyPatch], None], measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(3, 5) == "triton"
    with monkeypatch.context() as patch:
        begin(patch)
        assert chosen(3, 5) == "triton"
        assert chosen(30, 5) == chosen(30, 5) == "composite"
    assert len(measured.kinds) == 1
    monkeypatch.setattr(choice, "RETRY", 0)
    choice.forget()
    assert chosen(30, 5) == "triton"


def test_float64_is_not_measured_unless_asked(measured: Measurements) -> None:
    """It is what implementations are compared in, in shapes that no training has."""
    key = key_of(3, 5, dtype=torch.float64)
    assert choice.choose(key, StripPoolKind.from_key) == "composite"
    assert measured.kinds == []
    (decision,) = rru_fast.calibrate(rru_fast.strip_pool, torch.zeros(3, 5, 3, 4, 2, dtype=torch.float64)).values()
    assert decision.backend == "triton"
    assert choice.choose(key, StripPoolKind.from_key) == "composite"  # without gradients, the kind was another
    s = torch.zeros(3, 5, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    rru_fast.calibrate(rru_fast.strip_pool, s)
    assert choice.choose(key, StripPoolKind.from_key) == "auto:triton"


def test_a_graph_that_is_captured_runs_what_the_calls_before_it_ran(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what another process has found meanwhile: its kernels would be compiled during the capture."""
    write(3, 5)
    write(30, 5)
    assert [chosen(3, 5), chosen(30, 5)] == ["triton", "triton"]  # read one after the other
    write(90, 5)
    monkeypatch.setattr(choice, "_is_capturing", lambda device: True)
    assert [chosen(3, 5), chosen(30, 5), chosen(90, 5)] == ["triton", "triton", "composite"]
    monkeypatch.setattr(choice, "_is_capturing", lambda device: False)
    assert chosen(90, 5) == "triton"
    assert measured.kinds == []


def test_ranks_hold_on_to_what_they_found_first(measured: Measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(choice, "RETRY", 0)
    assert chosen(3, 5) == "composite"
    write(3, 5)
    assert chosen(3, 5) == "composite"
    assert chosen(4, 5) == "triton"
    assert chosen(3, 5) == "composite"  # though another kind has been read, whose answers are new


def test_after_two_kinds_that_differ_in_clips_or_frames_the_nearest_one_serves(measured: Measurements) -> None:
    """An evaluation of tracklets of all lengths leaves room for the kinds of training."""
    assert chosen(1, 8) == "triton"
    measured.backend = "composite"
    assert chosen(1, 512) == "composite"
    assert [chosen(1, 16), chosen(2, 31), chosen(1, 400), chosen(8, 900)] == ["triton"] * 2 + ["composite"] * 2
    assert len(measured.kinds) == choice.MOST_ALIKE == 2
    measured.backend = "triton"
    assert chosen(1, 8, gradients=False) == "triton"
    assert len(measured.kinds) == 3


def test_a_process_measures_few_kinds_in_all(measured: Measurements) -> None:
    def with_channels(channels: int) -> str:
        s = torch.empty(3, 5, channels, 4, 2)
        key = kinds.strip_pool_key(CPU, s.dtype, s.shape, s.stride(), True)
        return choice.choose(key, StripPoolKind.from_key).removeprefix(backends.CHOSEN)

    assert [with_channels(channels) for channels in range(1, 9)] == ["triton"] * 6 + ["composite"] * 2
    assert len(measured.kinds) == choice.MOST_KINDS == 6
    assert chosen(2, 5) == "triton"  # near one of them


def test_while_another_process_calibrates_composite_serves_and_its_decision_is_found_later(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(choice.time, "monotonic", lambda: now[0])
    with decisions.lock(cards.card_of(CPU)) as free:
        assert free
        assert chosen(3, 5) == "composite"
        now[0] = 9.0
        assert chosen(3, 5) == "composite"
        write(3, 5)
    assert chosen(3, 5) == "composite"  # not asked again at every call
    now[0] = 11.0
    assert chosen(3, 5) == "triton"
    assert measured.kinds == []


def test_while_another_thread_calibrates_composite_serves(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def during() -> None:
        thread = threading.Thread(target=lambda: found.append(chosen(3, 5)))
        thread.start()
        thread.join()

    measured.during = during
    assert chosen(3, 5) == "triton"
    assert found == ["composite"] and len(measured.kinds) == 1
    assert chosen(3, 5) == "triton"


def test_a_measurement_that_raises_costs_the_call_nothing(
    measured: Measurements, caplog: pytest.LogCaptureFixture
) -> None:
    def during() -> None:
        raise RuntimeError("no such thing")

    measured.during = during
    assert chosen(3, 5) == chosen(3, 5) == "composite"
    assert len(measured.kinds) == 1
    assert "the measurement failed: RuntimeError: no such thing" in caplog.records[-1].getMessage()


def test_interrupts_pass_through(measured: Measurements) -> None:
    def during() -> None:
        raise KeyboardInterrupt

    measured.during = during
    with pytest.raises(KeyboardInterrupt):
        chosen(3, 5)
    measured.during = lambda: None
    assert chosen(3, 5) == "triton"


def test_a_graph_of_a_module_is_a_kind_of_its_own(measured: Measurements) -> None:
    module = rru_fast.RRU(6, (3, 2), hidden=4, spatial_hidden=3)
    x = torch.zeros(2, 3, 6, 3, 2)
    from rru_fast.reference.modules import gate_arguments

    norm = {"gamma": module.transition_norm.weight, "beta": module.transition_norm.bias, "training": True}
    buffers = {"running_mean": module.transition_norm.running_mean, "running_var": module.transition_norm.running_var}
    rest = {"momentum": 0.1, "eps": 1e-3, "bn_groups": 1, "lengths": None, "state": None, "process_group": None}
    arguments = {**gate_arguments(module), **norm, **buffers, **rest, "backend": "auto"}
    assert functional.choose_for_graph(x, arguments) == "auto:triton"
    (kind,) = measured.kinds
    assert isinstance(kind, kinds.RefineKind) and kind.graphed and kind.gradients
    with pytest.raises(ValueError, match=r"^eps: got -1"):  # before anything is measured
        functional.choose_for_graph(x[:1], {**arguments, "eps": -1})
    assert len(measured.kinds) == 1


def test_a_module_captures_graphs_of_the_backend_that_is_decided_on_by_then(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[object] = []

    def capture(self: Graphs, refine: Callable[..., Refined], x: torch.Tensor, arguments: dict[str, Any]) -> Refined:
        captured.append(arguments["backend"])
        return refine(x, **{**arguments, "backend": "composite"})

    monkeypatch.setattr(Graphs, "refine", capture)
    unit = rru_fast.RRU(6, (3, 2), hidden=4, spatial_hidden=3, cuda_graph=True)
    x = torch.randn(2, 3, 6, 3, 2)
    (decision,) = rru_fast.calibrate(unit, x).values()
    assert decision.backend == "triton" and captured == []
    unit(x)
    assert captured == ["auto:triton"]
    (kind,) = measured.kinds
    assert isinstance(kind, kinds.RefineKind) and kind.graphed


# Traced programs


def test_a_traced_program_looks_up_decisions_where_it_runs_and_makes_none(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = key_of(3, 5), key_of(9, 5)
    assert choice.recorded(key, StripPoolKind.from_key) == "composite"
    assert measured.kinds == []
    assert choice.choose(other, StripPoolKind.from_key) == "auto:triton"
    assert choice.recorded(other, StripPoolKind.from_key) == "auto:triton"
    # A forward's backward gets its answer, whatever has been decided between them.
    assert choice.choose(key, StripPoolKind.from_key) == "auto:triton"
    backward = (key[0], None, *key[2:])
    assert choice.recorded(backward, StripPoolKind.from_key) == "composite"


def test_a_compiled_or_exported_call_keeps_auto(measured: Measurements) -> None:
    s = torch.ones(3, 5, 3, 4, 2)

    class Pool(torch.nn.Module):
        def forward(self, s: torch.Tensor) -> torch.Tensor:
            return rru_fast.strip_pool(s)

    program = torch.export.export(Pool(), (s,))
    assert "'auto'" in program.graph_module.code
    torch.testing.assert_close(program.module()(s), torch.ones(3, 3, 4))
    traced = torch.jit.trace(Pool(), (s,), check_trace=False)
    assert "auto" in str(traced.graph)
    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s), torch.ones(3, 3, 4))
    torch.func.vmap(rru_fast.strip_pool)(s[None])
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert rru_fast.strip_pool(torch.empty(3, 5, 3, 4, 2)).shape == (3, 3, 4)
    assert measured.kinds == []


def test_the_backend_that_saved_the_tensors_runs_the_backward(measured: Measurements) -> None:
    """A decision between forward and backward does not change the backend of a call."""
    unit = rru_fast.RRU(6, (3, 2), hidden=4, spatial_hidden=3)
    measured.backend = "composite"
    backends.forget_runs()
    out = unit(torch.randn(2, 3, 6, 3, 2))
    choice._remember(cards.card_of(CPU), measured.kinds[0].rounded(), Decision("triton", "now", "composite"))
    out.features.sum().backward()
    assert backends.ran() == {"refine": ["composite"]}


def test_a_chosen_kernel_that_cannot_be_launched_is_replaced_with_a_warning(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        @staticmethod
        def forward(*args: object) -> None:
            raise RuntimeError(
                "backend: got 'triton', whose strip_pool_fwd_kernel failed: OutOfResources: shared memory"
            )

    s = torch.ones(3, 5, 3, 4, 2)
    monkeypatch.setitem(operator.KERNELS, "triton", Failing)
    for _ in range(2):
        torch.testing.assert_close(rru_fast.strip_pool(s), torch.ones(3, 3, 4))
    (line,) = (record.getMessage() for record in caplog.records if "from now on" in record.getMessage())
    assert line.startswith("rru_fast: auto runs composite from now on, in calls of this shape: backend: got 'triton'")
    with pytest.raises(RuntimeError, match="whose strip_pool_fwd_kernel failed"):  # by name, it is an error
        rru_fast.strip_pool(s, backend="triton")

    def forward(*args: object) -> None:
        raise RuntimeError("another")

    Failing.forward = staticmethod(forward)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"^another$"):
        rru_fast.strip_pool(torch.ones(30, 5, 3, 4, 2))


@pytest.mark.parametrize("failing", ["cuda", "triton"])
def test_a_failed_launch_of_what_a_backend_leaves_to_another_is_its_own(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cuda", None)
    monkeypatch.setattr(cuda, "serves", lambda device: True)
    monkeypatch.setattr(cuda, "fallback", lambda device: "triton")
    key = key_of(3, 2)
    monkeypatch.setitem(choice._backends, key, "auto:cuda")
    error = RuntimeError(f"backend: got {failing!r}, whose kernel failed: none")
    assert choice.demote(key, error) == backends.choose("auto", key[0])
    monkeypatch.setitem(choice._backends, key, "auto:cuda")
    with pytest.raises(RuntimeError, match=r"^another$"):
        choice.demote(key, RuntimeError("another"))


def test_a_chosen_backend_tunes_nothing_in_this_process(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from rru_fast.triton import _autotune

    seen: list[bool] = []

    class Kernels:
        @staticmethod
        def forward(s: torch.Tensor) -> torch.Tensor:
            seen.append(getattr(_autotune._this_thread, "untuned", False))
            return s.mean((1, 4))

    monkeypatch.setitem(operator.KERNELS, "triton", Kernels)
    rru_fast.strip_pool(torch.ones(3, 5, 3, 4, 2))
    rru_fast.strip_pool(torch.ones(3, 5, 3, 4, 2), backend="triton")
    assert seen == [True, False]
