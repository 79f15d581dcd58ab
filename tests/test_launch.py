"""Prebound launches of Triton kernels, compared with Triton's own launches argument by argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
from rru_fast import triton
from rru_fast.arguments import RefineNeed, RefineUpstream
from tests import parity
from tests.parity import Case

if triton.interpreted():
    pytest.skip("the interpreter binds nothing", allow_module_level=True)
pytest.importorskip("triton")

from benchmarks import compile_report
from benchmarks.launches.stub import Stub, launched_by
from rru_fast.triton import _launch, refine
from rru_fast.triton._launch import Counter, Launches, Slices


def plain(value: Any) -> Any:
    """An argument as the driver takes it: tensors, also those in tuples, by their addresses."""
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value.data_ptr() if isinstance(value, Tensor) else value


def binds(arguments: tuple[Any, ...]) -> bool:
    """Return True if Triton has bound these arguments, which it passes on as tensors."""
    return any(isinstance(value, Tensor) or (isinstance(value, tuple) and binds(value)) for value in arguments)


def run(case: Case, change: Callable[[parity.Call], parity.Call] = lambda call: call) -> None:
    """Run forward and backward of a case by the Triton backend's host code, in fp32 unless `change` casts the call."""
    call = change(parity.make_call(case, torch.float32).map(lambda v: v.float()))
    args = parity.operator_arguments(case, call)
    saved = refine.forward(args, save=True).saved
    upstream = RefineUpstream(call.d_features, call.d_strips)
    refine.backward(upstream, saved, args, RefineNeed(need_x=True, need_weights=True))


EVEN = (3, 4, 8, 4, 4)  # strides of frames, clips and gate channels are multiples of 16 bytes
CASES = [
    Case(EVEN, hidden=8, spatial_hidden=4),
    Case(EVEN, hidden=8, spatial_hidden=4, inputs="raw"),
    Case(EVEN, hidden=8, spatial_hidden=4, inputs="appearance", attention="spatial", mode="eval"),
    Case(EVEN, hidden=8, spatial_hidden=4, attention="channel", mode="ragged"),
    Case(EVEN, hidden=8, spatial_hidden=4, mode="continued"),
    Case((3, 5, 7, 3, 1), hidden=5),  # slices of all alignments
]


class Compared:
    """Compare every launch by `Launches` with Triton's own for the same arguments: kernel, grid and each value."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: list[tuple[Stub, tuple[int, ...], Any]] = []
        self.prebound = 0
        call_it: Callable[..., None] = Launches.__call__

        def compare(launches: Any, n: int) -> None:
            before, bound = launches._run, len(self.passed)
            call_it(launches, n)
            if len(self.passed) > bound + 1:
                return  # a nested call of the same launch has been compared already
            stub, *got = self.passed[-1]
            self.prebound += launches._run is not None and launches._run is before
            arguments = {name: _launch._plain(value, n) for name, value in launches._arguments.items()}
            assert _launch.launch(launches._kernel, launches._grid, **arguments) is stub
            _, *wanted = self.passed.pop()
            assert got == wanted

        monkeypatch.setattr(Launches, "__call__", compare)

    def note(self, stub: Stub, grid: tuple[int, ...], *arguments: Any) -> None:
        """Record a launch in place of the GPU."""
        self.passed.append((stub, grid, plain(arguments)))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compared]:
    compared = Compared(monkeypatch)
    with launched_by(compared.note):
        yield compared


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prebound_launch_passes_what_triton_would_and_runs_the_kernel_it_would(
    case: Case, compared: Compared
) -> None:
    run(case)
    kernels = {stub.kernel.__name__ for stub, *_ in compared.passed}
    assert {"refine_fwd_transition_kernel", "refine_fwd_gate_kernel"} <= kernels
    assert {"refine_bwd_recurrence_kernel", "refine_bwd_gate_kernel"} <= kernels
    assert (compared.prebound > 0) == (case.shape == EVEN)


def test_every_launch_names_its_arguments_in_the_order_of_the_kernel() -> None:
    for launch in compile_report.launches(torch.float32, "default"):
        names = [name for name in launch.arguments if name in launch.kernel.arg_names]
        assert names == launch.kernel.arg_names, launch.kernel.__name__
        assert len(names) <= 25


def misaligned(call: parity.Call) -> parity.Call:
    """Return the call with x at 4 bytes past a multiple of 16."""
    memory = torch.empty(call.x.numel() + 1, dtype=call.x.dtype)
    x = memory[1:].view(call.x.shape).copy_(call.x)
    return replace(call, x=x)


def test_calls_one_after_another_run_the_kernels_that_triton_would(compared: Compared) -> None:
    run(CASES[0])
    run(CASES[0], misaligned)
    run(CASES[0], lambda call: call.map(lambda v: v.bfloat16()))
    run(Case((5, *EVEN[1:]), hidden=8, spatial_hidden=4))  # another grid
    run(Case((EVEN[0], 9, *EVEN[2:]), hidden=8, spatial_hidden=4))
    run(CASES[0])


def test_in_training_a_launch_goes_through_triton_once_a_kind_not_once_a_frame() -> None:
    counts = []
    for frames in (8, 20):
        bound = 0

        def count(stub: Stub, grid: Any, *arguments: Any) -> None:
            nonlocal bound
            bound += binds(arguments)

        with launched_by(count):
            run(Case((2, frames, 16, 4, 4), hidden=8, spatial_hidden=4))
        counts.append(bound)
    assert counts[0] == counts[1]


class Bound:
    """Kernel that records addresses: positive where Triton binds them, negative where a prebound launch passes them."""

    __name__ = "kernel"
    arg_names = ("v", "n")

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> Any:
            self.seen.append(arguments["v"].data_ptr())
            return {(*grid, 1, 1): lambda v, n: self.seen.append(-v)}

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Bound:
    monkeypatch.setattr(_launch, "_compiled", {})
    return Bound()


def test_slices_of_another_tensor_are_launched_at_their_own_addresses_and_bound_once(kernel: Bound) -> None:
    one, other = torch.zeros(3, 4), torch.zeros(3, 4)
    for tensor in (one, other):
        launches = Launches(kernel, (5,), v=Slices(tensor), n=Counter(0))
        for n in range(3):
            launches(n)
    rows = [tensor[n].data_ptr() for tensor in (one, other) for n in range(3)]
    assert kernel.seen == [rows[0], *(-address for address in rows[1:])]


def test_slices_of_another_alignment_are_bound_anew(kernel: Bound) -> None:
    memory = torch.zeros(3, 8)
    for slices in (Slices(memory[:, :4]), Slices(memory[:, 1:5])):
        launches = Launches(kernel, (5,), v=slices, n=Counter(0))
        launches(0)
        launches(1)
    assert [address > 0 for address in kernel.seen] == [True, False, True, False]


def test_each_device_and_each_grid_binds_its_own_kernel(kernel: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = Slices(torch.zeros(3, 4))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for device in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        for grid in (5, 6):
            for _ in range(2):
                Launches(kernel, (grid,), v=slices, n=Counter(0))(0)
    assert [address > 0 for address in kernel.seen] == [True, False] * 4


class Sized(Bound):
    """A kernel with two block sizes."""

    arg_names = ("v", "n", "BLOCK_M", "BLOCK_N")


def test_equal_values_of_other_arguments_are_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_compiled", {})
    kernel, slices = Sized(), Slices(torch.zeros(3, 4))
    for blocks in ({"BLOCK_M": 64, "BLOCK_N": 32}, {"BLOCK_N": 64, "BLOCK_M": 32}):
        Launches(kernel, (5,), v=slices, n=Counter(0), **blocks)(0)
    assert [address > 0 for address in kernel.seen] == [True, True]


class Broken:
    """Kernel that fails to compile."""

    __name__ = "refine_fwd_gate_kernel"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> None:
            raise self.error

        return launch


def test_a_kernel_that_fails_names_itself_the_reason_and_the_backend_without_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.errors import PTXASError

    from rru_fast.triton.refine import forward_kernels as kernels

    error = PTXASError("Internal Triton PTX codegen error\nptxas stderr: ...")
    monkeypatch.setattr(kernels, "refine_fwd_gate_kernel", Broken(error))
    wanted = (
        r"backend: got 'triton', whose refine_fwd_gate_kernel failed: PTXASError: "
        r"PTXAS error: Internal Triton PTX codegen error; "
        r"wanted backend='composite', which needs no Triton"
    )
    with launched_by(lambda *_: None), pytest.raises(RuntimeError, match=wanted) as caught:
        run(CASES[0])
    assert caught.value.__cause__ is error


def test_a_launch_that_fails_later_names_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = 0

    def fail(*_: Any) -> None:
        nonlocal launched
        launched += 1
        if launched == 10:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    wanted = r"backend: got 'triton', whose \w+_kernel failed: RuntimeError: Triton Error \[CUDA\]: an illegal"
    with launched_by(fail), pytest.raises(RuntimeError, match=wanted):
        run(CASES[0])


def test_the_library_can_be_used_after_the_stub() -> None:
    assert rru_fast.RRU(6, (3, 2))(torch.rand(2, 3, 6, 3, 2)).features.shape == (2, 3, 6, 3, 2)
